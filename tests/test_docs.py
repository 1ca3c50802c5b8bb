"""Runs the examples of the documents from top to bottom (Python examples with one epoch) and checks their links."""

from __future__ import annotations

import doctest
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest

from qfast import cli
from qfast.data import synthetic
from qfast.data.factors import unregister_function
from qfast.models import ts
from qfast.workflow.config import load_config
from qfast.workflow.demo import DEMO, demo_prices
from qfast.workflow.validation import check_workflow
from support.frames import make_frame, rolling

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", flags=re.M | re.S)
PYTHON_FILE = re.compile(r"# (\S+\.py)\n")  # the first line of a block that the reader saves
SOURCE_PATH = re.compile(r"(?<![\w/.-])(?:bench|csrc|docs|qfast|tests|tools)/[\w./*-]*\w/?")
DOCUMENTS = ["README.md", "bench/RESULTS.md", *sorted(f"docs/{file.name}" for file in (ROOT / "docs").glob("*.md"))]


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """The working directory of a reader: the demo workflow file and a file of prices."""
    (tmp_path / "qfast" / "workflow").mkdir(parents=True)
    shutil.copy(DEMO, tmp_path / "qfast" / "workflow")
    demo_prices(n_instruments=8, n_days=620).to_parquet(tmp_path / "prices.parquet")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_command(line: str) -> None:
    """Run one `qfast ...` line in this process."""
    words = shlex.split(line)
    assert words[0] == "qfast", f"only qfast commands can be tested: {line}"
    assert cli.main(words[1:]) == 0, line


def run_examples(document: Path, languages: tuple[str, ...] = ("yaml", "sh", "python")) -> int:
    """Run every block in these languages in order and return the number of blocks."""
    names: dict[str, object] = {"__name__": "example"}
    blocks = [block for block in BLOCK.findall(document.read_text()) if block[0] in languages]
    for language, text in blocks:
        if language == "yaml":
            Path(text.split()[1]).write_text(text)  # the first line is "# name.yaml"
        elif language == "sh":
            for line in text.splitlines():
                run_command(line)
        elif first := PYTHON_FILE.match(text):
            Path(first[1]).parent.mkdir(parents=True, exist_ok=True)
            Path(first[1]).write_text(text)
        else:
            assert language == "python"
            text = re.sub(r"n_epochs=\d+", "n_epochs=1", text)
            exec(compile(text, f"{document.name}: {text.splitlines()[0]}", "exec"), names)
    return len(blocks)


def test_gats(reader):
    assert run_examples(ROOT / "docs" / "gats.md") >= 4
    assert (reader / "runs" / "gats" / "pretrain" / "best.safetensors").exists()
    assert (reader / "attention.png").exists()


def test_data(reader):
    assert run_examples(ROOT / "docs" / "data.md", ("python",)) == 3


def test_datasets(reader):
    assert run_examples(ROOT / "docs" / "datasets.md", ("python",)) == 4


def test_results(reader):
    assert run_examples(ROOT / "docs" / "results.md", ("python",)) == 6
    assert (reader / "runs" / "results" / "report.html").exists()


def test_start(reader):
    assert run_examples(ROOT / "docs" / "index.md", ("python",)) == 1


def test_factors(reader):
    assert run_examples(ROOT / "docs" / "factors.md") == 5
    values = check_workflow(load_config(reader / "factors.yaml").values).task.dataset.kwargs.handler
    assert values.class_ == "FactorHandler"
    unregister_function("Spread")
    assert len(list((reader / "factors").iterdir())) == 1


def test_bench(reader):
    assert run_examples(ROOT / "docs" / "bench.md", ("sh", "python")) == 2
    assert (reader / "gru.png").exists()
    assert len(list(reader.glob("bench-*.json"))) == 1


def test_workflow(reader):
    assert run_examples(ROOT / "docs" / "workflow.md") == 10
    assert (reader / "runs" / "own" / "report.html").exists()
    assert (reader / "runs" / "first" / "portfolio_analysis" / "metrics.json").exists()
    assert (reader / "tomorrow.csv").exists()


def test_studies(reader, monkeypatch):
    monkeypatch.setattr("qfast.workflow.plots.png", lambda figure: b"not drawn")  # other tests draw the plots
    assert run_examples(ROOT / "docs" / "studies.md", ("sh", "python")) == 3
    assert (reader / "studies" / "seeds" / "summary.md").exists()
    assert (reader / "studies" / "rolling" / "rolling" / "000-seed-0" / "metrics.json").exists()


@pytest.mark.parametrize("compat", [None, "qlib"])
def test_batches_of_qlib_look_ahead_and_true_days_do_not(compat):
    """As docs/gats.md says: in Qlib's batches the score of a date depends on later windows."""
    frame = make_frame(70, 9, 3, holes=0.0)
    dates = frame.index.get_level_values("datetime")
    later = frame.copy()
    later.loc[dates == dates.max(), "feature"] += 1.0
    model = ts.GATs(d_feat=3, hidden_size=8, n_epochs=1, lr=0.01, seed=1, compat=compat).fit(rolling(frame))
    before, after = (model.predict(rolling(data)).sort_index() for data in (frame, later))
    # torch's products round the last rows of a call differently if it has other numbers of rows.
    same = np.isclose(before.to_numpy(), after.to_numpy(), rtol=1e-6, atol=0)
    changed = before.index[~same].get_level_values("datetime").unique()
    assert list(changed) == [dates.max()] if compat is None else changed.min() < dates.max()


def test_readme(reader):
    """Runs the Python example only. The commands install software or need files of the reader."""
    prices = synthetic.prices(4, 1_310, start="2013-02-08", late=0.0, delisted=0.0, holes=0.0)
    prices.to_parquet("prices.parquet")
    assert run_examples(ROOT / "README.md", ("python",)) == 1


@pytest.mark.parametrize(
    ("document", "least"),
    [
        *(
            (name, 10)
            for name in (
                "alstm.md",
                "attention.md",
                "encoder.md",
                "recurrent.md",
                "tcn.md",
                "training.md",
                "transformer.md",
            )
        ),
        ("factors.md", 2),
        ("precision.md", 5),
    ],
)
def test_sessions_at_the_prompt(document, least):
    done = doctest.testfile(str(ROOT / "docs" / document), module_relative=False)
    assert done.attempted >= least
    assert done.failed == 0


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_to_files(document):
    text = (ROOT / document).read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    assert [link for link in links if not (ROOT / document).parent.joinpath(link).exists()] == []


@pytest.mark.parametrize("document", [name for name in DOCUMENTS if name != "docs/developing.md"])
def test_source_paths_exist(document):
    """tests/test_developing.py checks docs/developing.md, whose paths have placeholders."""
    paths = set(SOURCE_PATH.findall((ROOT / document).read_text()))
    assert sorted(path for path in paths if not any(ROOT.glob(path.rstrip("/")))) == []
