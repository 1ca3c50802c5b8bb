"""`import qfast`: what it offers, and that it loads nothing before it is used."""

import re
import subprocess
import sys

import pytest

import qfast
from qfast.workflow.demo import DEMO, demo_prices


def test_import_is_cheap():
    code = """
import sys
import qfast
assert not {"torch", "numpy", "pandas"} & set(sys.modules), sorted(sys.modules)
from qfast import QfastError
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", [*qfast.__all__, *qfast._SUBMODULES])
def test_names(name):
    assert name in dir(qfast)
    assert getattr(qfast, name) is getattr(qfast, name)


def test_every_name_is_in_the_docstring():
    for name in [*qfast.__all__, *qfast._SUBMODULES]:
        assert name == "__version__" or re.search(rf"\b{name}\b", qfast.__doc__), name


def test_unknown_name():
    with pytest.raises(AttributeError, match=r"module 'qfast' has no attribute 'train'; its names are \['Callback'"):
        qfast.train  # noqa: B018 - the access is the test


def test_examples_of_the_docstring(tmp_path, monkeypatch):
    """With one epoch, on a small synthetic market whose dates are moved to those of the example."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "workflow.yaml").write_text(DEMO.read_text().replace("n_epochs: 6", "n_epochs: 1"))
    prices = demo_prices(n_instruments=8, n_days=620)
    prices.to_parquet("prices.parquet")
    prices.to_parquet("newest_prices.parquet")
    first, second = re.findall(r"(?:^    .*\n|^\n(?=    ))+", qfast.__doc__, flags=re.M)[:2]
    names: dict[str, object] = {}
    exec(re.sub(r"^    ", "", first, flags=re.M), names)
    assert len(names["scores"]) > 0
    second = second.replace("n_epochs=20", "n_epochs=1").replace("2021-12-31", "2019-06-30").replace("2022", "2020")
    exec(re.sub(r"^    ", "", second, flags=re.M), names)
    assert len(names["scores"]) > 0
