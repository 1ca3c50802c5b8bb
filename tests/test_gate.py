"""bench/gate.py: the verdicts on lines, unknown kinds of CPU, and recording. The times are made up."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The module, with an empty file of expected ratios and without an effect on the memory of this process."""
    monkeypatch.syspath_prepend(str(BENCH))
    module = importlib.import_module("gate")
    monkeypatch.setattr(module, "EXPECTED", tmp_path / "expected.json")
    monkeypatch.setattr(module, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(module, "cpu_kind", lambda: "made-up CPU")
    monkeypatch.setattr(module, "SECONDS", 0.0)
    return module


def line(gate: Any, name: str, ratios: Iterator[float]) -> Any:
    """A line with these ratios in consecutive passes."""

    def build() -> Any:
        ratio = next(ratios)
        return gate.Pair(lambda: 1.0, lambda: ratio)

    return gate.Line(name, build)


def constant(ratio: float) -> Iterator[float]:
    while True:
        yield ratio


def then(first: float, passes: int, second: float) -> Iterator[float]:
    yield from [first] * passes
    yield from constant(second)


def test_verdicts(gate: Any) -> None:
    lines = [
        line(gate, "same", constant(2.0)),
        line(gate, "slower by 20%", constant(2.0 / 1.2)),
        line(gate, "slower by 8%", constant(2.0 / 1.08)),
        line(gate, "disturbed once", then(1.0, gate.PASSES, 2.0)),
        line(gate, "faster", constant(3.0)),
        line(gate, "new", constant(1.0)),
    ]
    expected = {row.name: 2.0 for row in lines if row.name != "new"}
    verdicts = {row.name: row for row in gate.judge(lines, expected)}
    assert [name for name, row in verdicts.items() if row.is_failure] == ["slower by 20%", "new"]
    assert verdicts["slower by 20%"].text == "FAILED: slower twice (1.67 and 1.67)"
    assert verdicts["disturbed once"].text == "ok in the repeat (first 1.00)"
    assert verdicts["faster"].text.startswith("faster")
    assert "--record" in verdicts["new"].text
    assert verdicts["same"].change == 0


def test_the_ratio_of_short_and_long_calls(gate: Any) -> None:
    times = [(1.0, 2.0), (2.0, 3.0), (4.0, 20.0)]
    assert gate.ratio_of(times, is_short=True) == 2.0
    assert gate.ratio_of(times, is_short=False) == 2.0
    assert gate.ratio_of([*times, (0.5, 4.0)], is_short=True) == 4.0
    assert gate.ratio_of([*times, (0.5, 4.0)], is_short=False) == 3.5


def test_an_unknown_cpu_reports_and_succeeds(gate: Any, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(gate, "LINES", (line(gate, "one", constant(0.1)),))
    assert gate.main([]) == 0
    shown = capsys.readouterr().out
    assert "not recorded" in shown
    assert "no line can fail" in shown


def test_recording_and_failing(gate: Any, monkeypatch: Any, capsys: Any) -> None:
    gate.EXPECTED.write_text(json.dumps({"another CPU": {"recorded": "2026-01-01", "ratios": {"one": 9.0}}}))
    speed = {"one": 2.0, "two": 3.0}
    monkeypatch.setattr(
        gate,
        "LINES",
        tuple(gate.Line(name, lambda name=name: gate.Pair(lambda: 1.0, lambda: speed[name])) for name in speed),
    )
    assert gate.main(["--record"]) == 0
    recorded = json.loads(gate.EXPECTED.read_text())
    assert recorded["another CPU"]["ratios"] == {"one": 9.0}
    assert recorded["made-up CPU"]["ratios"] == speed
    assert gate.main([]) == 0
    speed["two"] = 2.4
    assert gate.main([]) == 1
    assert "1 of 2 lines failed: two" in capsys.readouterr().out
    assert gate.main(["--only", "one"]) == 0
    assert gate.main(["--record", "--only", "two"]) == 0
    assert json.loads(gate.EXPECTED.read_text())["made-up CPU"]["ratios"] == {"one": 2.0, "two": 2.4}
    assert gate.main([]) == 0


def test_an_unknown_line_is_an_error(gate: Any, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        gate.main(["--only", "no such line"])
    assert "matches none of" in capsys.readouterr().err


def test_the_kind_of_cpu_contains_instruction_set_and_torch(gate: Any, monkeypatch: Any) -> None:
    monkeypatch.undo()
    kind = gate.cpu_kind()
    assert kind.endswith(f"torch {'.'.join(torch.__version__.split('.')[:2])}")
    assert len(kind.split(", ")) == 3


def test_every_line_has_a_recorded_ratio(gate: Any) -> None:
    entries = json.loads((BENCH / "gate_expected.json").read_text())
    names = {row.name for row in importlib.import_module("gate_cases").LINES}
    assert len(names) > 30
    assert {kind: set(entry["ratios"]) ^ names for kind, entry in entries.items()} == {kind: set() for kind in entries}


@pytest.mark.parametrize("part", ["gather by row numbers", "tanh", "clipping and Adam"])
def test_lines_can_be_built(gate: Any, part: str) -> None:
    chosen = next(row for row in importlib.import_module("gate_cases").LINES if row.name == part)
    pair = chosen.build()
    assert pair.ours() > 0
    assert pair.reference() > 0
