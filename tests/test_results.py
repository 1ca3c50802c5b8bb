"""bench/RESULTS.md is what bench/report.py builds from bench/results/, and every section has its provenance."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parents[1] / "bench"
FILES = sorted((BENCH / "results").glob("[0-9]*.json"))


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("report")


def test_results_are_those_of_the_files(report: Any) -> None:
    assert (BENCH / "RESULTS.md").read_text() == report.build(), "run python bench/report.py"
    assert report.main(["--check"]) == 0


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_section_has_machine_dates_and_commands(path: Path) -> None:
    values = json.loads(path.read_text())
    assert values["machine"]
    assert values["software"]
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d", date) for date in values["dates"])
    assert values["dates"]
    has_figures = any("columns" in block or "bench" in block for block in values["blocks"])
    assert values["commands"] or not has_figures
    for command in values["commands"]:  # scripts that no longer exist would make a figure impossible to repeat
        for script in re.findall(r"(?<![\w/])((?:bench|tools|tests)/\w+\.(?:py|sh))", command):
            assert (BENCH.parent / script).exists(), command


def test_incomplete_files_are_refused(report: Any, tmp_path: Path) -> None:
    path = tmp_path / "00_a.json"
    path.write_text(json.dumps({"title": "A"}))
    with pytest.raises(ValueError, match="has no 'machine'"):
        report.build(tmp_path)
    blocks = [{"columns": ["x"], "rows": [["1", "2"]]}]
    complete = {key: [] for key in report.REQUIRED} | {"title": "A", "blocks": blocks}
    path.write_text(json.dumps(complete))
    with pytest.raises(ValueError, match="expected 1 cells"):
        report.build(tmp_path)


def test_a_file_of_qfast_bench(report: Any) -> None:
    model = {
        "name": "GRU",
        "batch_size": 800,
        "reference_name": "Qlib",
        "reference": 30.0,
        "threads_gain": 2.0,
        "epoch": 10.0,
        "ratio": 3.0,
        "parts": dict.fromkeys(report.BENCH_PARTS, 10 / 6),
        "products": 4e10,
        "reference_memory": None,
        "memory": 12.3,
        "notes": ["smaller batches"],
    }
    facts = {
        "created": "2026-01-02T00:00:00",
        "cores": 2,
        "instruction_set": "avx2",
        "versions": {"torch": "2.13", "pyqlib": "0.9.7"},
        "data": {
            "rows": 1000,
            "instruments": 10,
            "first": "a",
            "last": "b",
            "features": 20,
            "step_len": 20,
            "load_seconds": 1.0,
        },
        "product_rates": [5e10],
        "copy_rates": [1e10],
        "not_trusted_because": [],
        "models": [model],
    }
    text = report.bench_tables(facts)
    assert "| model | batch | Qlib, s | qfast, s | ratio | 2 threads | of `torch.mm` | Qlib, MB | qfast, MB |" in text
    assert "| GRU | 800 | 30 | 10 | **3.00x** | 2.00 | 80% | - | 12 |" in text
    assert "The machine was idle." in text
    assert "gather 17%, forward 17%" in text
    assert "\n\nGRU: smaller batches.\n\n" in text
    facts["not_trusted_because"] = ["the load was 9"]
    parts = dict(model["parts"], gather=1.0)
    other = {"name": "TCN", "reference_name": "torch", "threads_gain": None, "products": None, "parts": parts}
    facts["models"] = [model, model | other]
    text = report.bench_tables(facts)
    assert "the machine was busy: the load was 9" in text
    assert "| TCN | 800 | 30 (torch) | 10 | **3.00x** | - | - | - | 12 |" in text
    assert "gather 10 to 17%, forward 17%" in text
    assert "\n\nGRU, TCN: smaller batches.\n\n" in text


def test_the_summary_of_a_grid(report: Any) -> None:
    cells = {
        "encoder inference D=8 M=256 T=10 B=1": 1.5,
        "encoder inference D=8 M=256 T=20 B=16": 0.97,
        "encoder training D=8 M=256 T=10 B=1": 1.1,
        "recurrent inference LSTM H=32 T=10 B=1": 2.0,
        "convolution training conv D=8 T=10 B=1": 1.2,
        "encoder inference D=8 M=256 T=60 B=1": 2.5,
    }
    header, _, *rows = report.grid_table(cells).splitlines()
    assert header == "| layer | pass | cells | lowest | its shape | median of width 8 | 32 |"
    assert rows == [
        "| encoder | inference | 3 | 0.97 | D=8 M=256 T=20 B=16 | 1.50 | |",
        "| encoder | training | 1 | 1.10 | D=8 M=256 T=10 B=1 | 1.10 | |",
        "| LSTM | inference | 1 | 2.00 | H=32 T=10 B=1 | | 2.00 |",
        "| conv | training | 1 | 1.20 | D=8 T=10 B=1 | 1.20 | |",
    ]


def test_paragraphs_and_lists_are_wrapped_outside_code(report: Any, tmp_path: Path) -> None:
    code = "`" + "word " * 18 + "word`"
    text = report.block({"text": "word " * 10 + code + " word" * 10}, tmp_path)
    assert code in text
    assert max(map(len, text.splitlines())) <= report.WIDTH
    text = report.block({"list": ["word " * 30, "b"]}, tmp_path)
    first, second, third = text.splitlines()
    assert first.startswith("- word")
    assert second.startswith("  word")
    assert third == "- b"


def test_a_grid_is_measured_in_pieces(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    grid = importlib.import_module("grid")
    monkeypatch.setattr(grid, "ratio", lambda cell, what, least: 0.5 if cell.column == "16" else 1.25)
    file = tmp_path / "cells.json"
    for what, lowest, highest, status in (("inference", "0", "1e-4", 1), ("training", "5e-4", "1e-3", 0)):
        arguments = ["convolution", "--what", what, "--rows", "conv D=8 T=10", "--output", str(file)]
        arguments += ["--from-gflop", lowest, "--gflop", highest]
        monkeypatch.setattr("sys.argv", ["grid.py", *arguments])
        assert grid.main() == status
    name = "convolution {} conv D=8 T=10 B={}"
    assert json.loads(file.read_text()) == {
        name.format("inference", 1): 1.25,
        name.format("inference", 16): 0.5,
        name.format("training", 64): 1.25,
    }
