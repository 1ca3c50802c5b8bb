"""bench/bench_gpu.py without a GPU: a case that fails is reported, and the others still run."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

CPU = torch.device("cpu")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module, with short measurements. Settings of torch that it changes are restored."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "bench"))
    module = importlib.import_module("bench_gpu")
    monkeypatch.setattr(module, "WARM_UP", 1)
    monkeypatch.setattr(module, "REPEATS", 1)
    monkeypatch.setattr(module._backend, "cuda_layers", module._backend.cuda_layers)
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield module
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def fails(*_: Any) -> None:
    raise RuntimeError("no kernel image\nand a second line")


def recipes(bench: Any) -> Any:
    """Cases of which one cannot be built, one cannot run, and two are right."""
    yield "right", lambda: bench.Case(lambda: 1, lambda: 2, moved=1e3)
    yield "unbuilt", fails
    yield "half", lambda: bench.Case(fails, lambda: 2)
    yield "last", lambda: bench.Case(graphs={"one": lambda: 1, "two": fails, "three": lambda: 3})


def test_every_failure_is_a_row_and_the_run_continues(bench: Any, capsys: pytest.CaptureFixture[str]) -> None:
    failures = bench.time_cases(recipes(bench), bench.Clock(CPU), bench.Limits(1e9, 1e9))
    assert failures == bench.Failures(3, None)
    rows = [line.split(" | ")[:3] for line in capsys.readouterr().out.splitlines()]
    assert [(row[0], row[1], "FAILED" in row[2]) for row in rows] == [
        ("| right", "torch", False),
        ("| right", "qfast", False),
        ("| unbuilt", "-", True),
        ("| half", "torch", False),
        ("| half", "qfast", True),
        ("| last", "one", False),
        ("| last", "two", True),
        ("| last", "three", False),
    ]
    assert rows[2][2] == "FAILED: RuntimeError: no kernel image |"


def test_a_new_process_continues_where_the_device_is_lost(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(bench, "usable", lambda device: False)
    monkeypatch.setattr(bench.subprocess, "run", lambda command, **_: commands.append(command))
    monkeypatch.setattr(
        bench, "OF_PART", {"one": lambda *_: recipes(bench), "two": lambda *_: pytest.fail("in this process")}
    )
    assert bench.main(["--device", "cpu", "--small", "--only", "one,two"]) == 1
    expected = ["--only", "one,two", "--skip", "2", "--device", "cpu", "--small"]
    assert commands == [[sys.executable, bench.__file__, *expected]]


def test_skipped_cases_are_not_built(bench: Any) -> None:
    assert bench.time_cases(recipes(bench), bench.Clock(CPU), bench.Limits(1e9, 1e9), skip=3) == bench.Failures(1, None)


def test_a_part_runs_on_the_cpu(bench: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--device", "cpu", "--small", "--only", "gather"]) == 0
    output = capsys.readouterr().out
    assert output.count("| qfast |") == output.count("| torch |") - 1 == 3  # a column is called torch too
    assert "FAILED" not in output


def test_every_case_of_every_part_can_be_built(bench: Any) -> None:
    for part, cases in bench.OF_PART.items():
        built = [build() for _, build in cases(CPU, True)]
        assert built, part
        assert all(case.ours is not None or case.graphs for case in built)


def test_days_are_pinned_for_a_gpu_because_a_capture_copies_them(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = sys.modules["gpu_cases"]
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: ("pinned", tensor))
    offsets = cases.day_offsets(3, 10, torch.device("cuda"))
    assert offsets[0] == "pinned"
    assert offsets[1].tolist() == cases.day_offsets(3, 10, CPU).tolist() == [0, 10, 20, 30]
