"""tools/torture.py: cases are reproducible, faults are recorded and can be run again, planted faults are detected."""

from __future__ import annotations

import importlib
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "tools" / "torture.py"
GRU = {
    "operator": "gru",
    "sizes": {"cell": "gru", "batch": 3, "steps": 4, "features": 2, "hidden": 7},
    "data": 1,
    "check": "values",
    "isa": None,
    "threads": 1,
}


@pytest.fixture(scope="module")
def parts():
    """The parts, which here leave the settings of this process as they are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "tools"))
        table = importlib.import_module("torture.parts").PARTS
        for name in ("torture.kills", "torture.files"):
            patch.setattr(sys.modules[name], "_prepare", lambda: None)
        yield table
    torch.set_num_threads(1)


def test_cases_depend_only_on_the_seed_and_survive_json(parts):
    for name, part in parts.items():
        cases = [part.draw(random.Random(f"{name}/{number}"), number) for number in range(40)]
        assert cases == [part.draw(random.Random(f"{name}/{number}"), number) for number in range(40)]
        assert json.loads(json.dumps(cases)) == cases
        assert len({json.dumps(case) for case in cases}) > 8


def test_the_first_cases_of_memory_cover_all_operators(parts):
    operators = importlib.import_module("torture.operator_cases").OPERATORS
    cases = [parts["memory"].draw(random.Random(number), number) for number in range(len(operators))]
    assert {case["operator"] for case in cases} == set(operators)


@pytest.mark.parametrize(("name", "kind"), [("operators", "tampered"), ("files", "expression"), ("threads", "counts")])
def test_a_case_runs(parts, name, kind, tmp_path):
    case = GRU | {"check": kind, "kind": kind}
    counts = parts[name].check(case, tmp_path)
    assert counts[parts[name].unit] >= 1


def test_the_kills_of_a_cache_write_leave_all_or_nothing(parts, tmp_path):
    moments = [{"signal": "SIGKILL", "at": place, "number": 0, "after": False} for place in ("replace", "fsync")]
    moments.append({"signal": "SIGKILL", "at": "bytes", "number": 100, "after": False})
    assert parts["kills"].check({"job": "cache", "moments": moments}, tmp_path)["kills"] == 3


@pytest.mark.parametrize("plant", [None, "wrong-kernel"])
def test_a_reproduction_file_runs_again(tmp_path, plant):
    file = tmp_path / "operators-0.json"
    file.write_text(json.dumps({"part": "operators", "seed": 0, "case": GRU} | ({"plant": plant} if plant else {})))
    done = subprocess.run([sys.executable, str(SCRIPT), "--replay", str(file)], capture_output=True, text=True)
    assert done.returncode == (plant is not None), done.stdout + done.stderr
    assert ("the fault is still there" if plant else "no fault") in done.stdout


@pytest.mark.slow
def test_planted_faults_are_detected():
    done = subprocess.run([sys.executable, str(ROOT / "tools" / "torture_plants.py")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("detected by case") == 3
