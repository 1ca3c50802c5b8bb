"""The examples of the documents, run from top to bottom as they stand (the README's with fewer epochs)."""

from __future__ import annotations

import doctest
import re
import shlex
import shutil
from pathlib import Path

import pandas as pd
import pytest

from qfast import cli
from qfast.data import synthetic
from qfast.data.factors import unregister_function
from qfast.models import ts
from qfast.workflow.demo import DEMO, demo_prices
from support.frames import make_frame, rolling

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", flags=re.M | re.S)


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """A folder as a reader of the documents has it: the project's workflow file and prices of his own."""
    (tmp_path / "qfast" / "workflow").mkdir(parents=True)
    shutil.copy(DEMO, tmp_path / "qfast" / "workflow")
    demo_prices(n_instruments=8, n_days=620).to_parquet(tmp_path / "prices.parquet")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_command(line: str) -> None:
    words = shlex.split(line)
    assert words[0] == "qfast", f"an example that is not run: {line}"
    assert cli.main(words[1:]) == 0, line


def run_examples(document: Path, languages: tuple[str, ...] = ("yaml", "sh", "python")) -> int:
    """Run every block of these languages in order; returns how many there were."""
    names: dict[str, object] = {"__name__": "example"}
    blocks = [block for block in BLOCK.findall(document.read_text()) if block[0] in languages]
    for language, text in blocks:
        if language == "yaml":
            Path(text.split()[1]).write_text(text)  # "# name.yaml" in its first line
        elif language == "sh":
            for line in text.splitlines():
                run_command(line)
        else:
            assert language == "python"
            text = re.sub(r"n_epochs=\d+", "n_epochs=1", text)
            exec(compile(text, f"{document.name}: {text.splitlines()[0]}", "exec"), names)
    return len(blocks)


def test_gats(reader):
    assert run_examples(ROOT / "docs" / "gats.md") >= 4
    assert (reader / "runs" / "gats" / "pretrain" / "best.safetensors").exists()
    assert (reader / "attention.png").exists()


def test_factors(reader):
    assert run_examples(ROOT / "docs" / "factors.md") == 1
    unregister_function("Spread")
    assert len(list((reader / "factors").iterdir())) == 1


def test_workflow(reader):
    assert run_examples(ROOT / "docs" / "workflow.md") == 1
    assert (reader / "runs" / "first" / "portfolio_analysis" / "metrics.json").exists()
    assert (reader / "tomorrow.csv").exists()


@pytest.mark.parametrize("compat", [None, "qlib"])
def test_the_references_batches_look_ahead_and_days_do_not(compat):
    """What docs/gats.md says of them: the score of a date moves with later windows."""
    frame = make_frame(70, 9, 3, holes=0.0)
    dates = frame.index.get_level_values("datetime")
    later = frame.copy()
    later.loc[dates == dates.max(), "feature"] += 1.0
    model = ts.GATs(d_feat=3, hidden_size=8, n_epochs=1, lr=0.01, seed=1, compat=compat).fit(rolling(frame))
    before, after = (model.predict(rolling(data)).sort_index() for data in (frame, later))
    moved = before.index[before.to_numpy() != after.to_numpy()].get_level_values("datetime").unique()
    assert list(moved) == [dates.max()] if compat is None else moved.min() < dates.max()


@pytest.mark.slow
def test_readme(reader):
    """Its Python; the commands install things or stand for a reader's own files."""
    prices = synthetic.prices(6, 1_310, start="2013-02-08", late=0.0, delisted=0.0, holes=0.0)
    dates = prices.index.get_level_values("datetime").unique()
    assert pd.Timestamp("2018-02-07") in dates
    prices.rename(index=lambda name: "AAPL" if name == prices.index[0][1] else name, level="instrument").to_parquet(
        "prices.parquet"
    )
    assert run_examples(ROOT / "README.md", ("python",)) >= 3
    assert (reader / "attention.png").exists()


@pytest.mark.parametrize(
    ("document", "least"),
    [
        *(
            (name, 10)
            for name in ("alstm.md", "attention.md", "encoder.md", "recurrent.md", "tcn.md", "transformer.md")
        ),
        ("factors.md", 2),
    ],
)
def test_sessions_at_the_prompt(document, least):
    done = doctest.testfile(str(ROOT / "docs" / document), module_relative=False)
    assert done.attempted >= least
    assert done.failed == 0


@pytest.mark.parametrize("document", ["README.md", *(f"docs/{file.name}" for file in (ROOT / "docs").glob("*.md"))])
def test_links_lead_to_files(document):
    text = (ROOT / document).read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    assert [link for link in links if not (ROOT / document).parent.joinpath(link).exists()] == []
