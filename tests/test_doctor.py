"""qfast doctor, and the effect of QFAST_BACKEND and QFAST_ISA (each in a new process)."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

import qfast.ops
from qfast import _backend, doctor
from qfast.ops import Operator

needs_native = pytest.mark.skipif(_backend.native is None, reason=f"qfast._C: {_backend.status()['cpu']['reason']}")


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, timeout=300
    )


def test_report_names_versions_tiers_and_self_tests() -> None:
    facts = doctor.report()
    assert facts["healthy"] is True
    assert facts["versions"]["torch"] == torch.__version__
    assert set(facts["operators"]) == set(qfast.ops.OPERATORS)
    for name, by_device in facts["operators"].items():
        assert by_device["cpu"]["tier"] in ("cpu", "torch"), name
        assert by_device["cpu"]["reason"], name
    assert facts["self_test"]["gather_windows (cpu)"] == "ok"


def test_the_report_as_json(capsys) -> None:
    from qfast import cli

    assert cli.main(["doctor", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert set(facts) == {"versions", "build", "isa", "bf16", "backend", "operators", "self_test", "healthy"}
    assert facts["healthy"] is True


@needs_native
def test_report_has_build_facts() -> None:
    facts = doctor.report()
    assert facts["build"]["torch_target"] == "2.10"
    assert facts["build"]["cplusplus"] >= "202002"
    assert facts["isa"]["in use"] in facts["isa"]["available"]
    assert "baseline" in facts["isa"]["available"]


def test_main_prints_and_returns_zero(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main() == 0
    text = capsys.readouterr().out
    for piece in ("versions", "QFAST_BACKEND: ", "gather_windows (cpu)", "self-test", "healthy"):
        assert piece in text


def test_a_wrong_operator_is_found(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The self-test compares with plain torch, so a wrong plain-torch version must make the doctor fail."""
    from qfast.ops import window_gather

    right = window_gather._gather_windows_twin
    monkeypatch.setattr(window_gather, "_gather_windows_twin", lambda *a: right(*a) + 1)
    assert doctor.main() == 1
    text = capsys.readouterr().out
    assert "gather_windows (cpu)      FAILED: ArithmeticError: gather_windows, none, BTD" in text
    assert "NOT healthy" in text


def test_a_library_that_does_not_load_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = {"loaded": False, "reason": f"{_backend.BROKEN}: undefined symbol", "tier": "torch"}
    status = {**_backend.status(), "cpu": broken}
    monkeypatch.setattr(_backend, "status", lambda: status)
    assert doctor.report()["healthy"] is False


def test_an_operator_is_tested_only_where_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qfast.ops, "OPERATORS", {"x": Operator(lambda device: None, ("cuda",))})
    expected = ["x (cuda)"] if torch.cuda.is_available() else []
    assert list(doctor.self_tests()) == expected


STATUS = "import json; from qfast import _backend; print(json.dumps([_backend.status(), _backend.native is None]))"


@pytest.mark.parametrize("choice", ["torch", "cpu", "auto", "", " AUTO "])
def test_backend_choices(choice: str) -> None:
    done = run(STATUS, QFAST_BACKEND=choice)
    assert done.returncode == 0, done.stderr
    status, no_native = json.loads(done.stdout)
    assert status["choice"] == (choice.strip().lower() or "auto")
    assert no_native == (choice == "torch" or _backend.native is None)
    if choice in ("torch", "cpu"):
        assert status["cuda"] == {"loaded": False, "reason": f"QFAST_BACKEND={choice}", "tier": "torch"}


def test_an_unknown_backend_is_refused() -> None:
    done = run(STATUS, QFAST_BACKEND="gpu")
    assert done.returncode != 0
    assert "BackendError: QFAST_BACKEND is 'gpu'; allowed: auto, cuda, cpu, torch." in done.stderr


@pytest.mark.skipif(_backend.status()["cuda"]["loaded"], reason="the CUDA tier works here")
def test_cuda_by_request_fails_with_the_reason() -> None:
    done = run(STATUS, QFAST_BACKEND="cuda")
    assert done.returncode != 0
    assert "BackendError: QFAST_BACKEND=cuda but the CUDA tier cannot be used: " in done.stderr
    assert "Remedy: " in done.stderr


@needs_native
def test_isa_override() -> None:
    code = "from qfast import _backend; print(_backend.native.isa())"
    for isa in _backend.native.available_isas():
        assert run(code, QFAST_ISA=isa).stdout.strip() == isa
    done = run(code, QFAST_ISA="sse9")
    assert "BackendError: QFAST_ISA: instruction set 'sse9' is not usable here; allowed: " in done.stderr


@needs_native
def test_select_isa_lists_the_allowed_values() -> None:
    with pytest.raises(ValueError, match=r"instruction set 'mmx' is not usable here; allowed: .*baseline"):
        _backend.native.select_isa("mmx")
