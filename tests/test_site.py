"""The documentation site contains every page of docs/ and every public name. `python3 bootstrap.py docs` builds it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from ruamel.yaml import YAML

import qfast
from qfast import backtest, data, metrics, nn, ops, training

ROOT = Path(__file__).resolve().parents[1]
API = "".join(path.read_text() for path in sorted((ROOT / "docs" / "api").glob("*.md")))
LISTED = re.findall(r"^::: ([\w.]+)", API, flags=re.M)


def pages(entry: object) -> list[str]:
    """All files of an entry of the navigation."""
    if isinstance(entry, str):
        return [entry]
    return [page for part in (entry.values() if isinstance(entry, dict) else entry) for page in pages(part)]


def test_the_navigation_has_every_page():
    navigation = YAML(typ="safe").load((ROOT / "mkdocs.yml").read_text())["nav"]
    files = [path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")]
    assert sorted(pages(navigation)) == sorted([*files, "RESULTS.md", "CHANGELOG.md"])


@pytest.mark.parametrize("module", [qfast, ops], ids=lambda module: module.__name__)
def test_every_function_has_an_entry(module):
    on_other_pages = {"Callback", "QfastError", "__version__", "OPERATORS", "Operator"}
    assert sorted(set(module.__all__) - on_other_pages - {entry.rsplit(".", 1)[1] for entry in LISTED}) == []


@pytest.mark.parametrize("module", [backtest, data, metrics, nn, training], ids=lambda module: module.__name__)
def test_every_package_has_an_entry(module):
    assert module.__name__ in LISTED


def test_every_estimator_has_an_entry():
    assert {"qfast.models.flat", "qfast.models.ts"} <= set(LISTED)
