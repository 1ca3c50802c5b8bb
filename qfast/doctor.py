"""`qfast doctor`: versions, build facts, the implementation that each operator uses, and self-tests."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

import qfast.ops
from qfast import _backend
from qfast.precision import bf16_obstacle

__all__ = ["main", "report", "self_tests"]

_LIBRARIES = ("torch", "numpy", "pandas", "pyarrow", "safetensors", "qlib")


def report() -> dict[str, Any]:
    """Collect the facts that `qfast doctor` prints, and run all self-tests.

    Returns
    -------
    dict
        `versions` : library -> version or "not installed"
        `build` : facts about the native library, empty if it is not loaded
        `isa` : instruction sets in use and available, empty if the native library is not loaded
        `bf16` : whether the operators can multiply bfloat16 on this CPU, "available" or the reason why not
        `backend` : see `qfast._backend.status`
        `operators` : operator -> device -> {"tier", "reason"}
        `self_test` : self-test -> "ok" or the error
        `healthy` : bool

    Examples
    --------
    >>> report()["healthy"]
    True
    """
    status = _backend.status()
    native = _backend.native
    broken = any(status[device]["reason"].startswith(_backend.BROKEN) for device in ("cpu", "cuda"))
    results = {name: _outcome(test) for name, test in self_tests().items()}
    return {
        "versions": _versions(),
        "build": dict(native.build_info()) if native is not None else {},
        "isa": {"in use": native.isa(), "available": native.available_isas()} if native is not None else {},
        "bf16": _bf16_text(),
        "backend": status,
        "operators": {
            name: {
                device: {"tier": status[device]["tier"], "reason": status[device]["reason"]}
                for device in operator.devices
            }
            for name, operator in qfast.ops.OPERATORS.items()
        },
        "self_test": results,
        "healthy": not broken and all(result == "ok" for result in results.values()),
    }


def self_tests() -> dict[str, Callable[[], None]]:
    """Return the self-tests by name. Each compares an operator with its plain-torch twin on one usable device."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return {
        f"{name} ({device})": partial(operator.self_test, torch.device(device))
        for name, operator in qfast.ops.OPERATORS.items()
        for device in devices
        if device in operator.devices
    }


def main(*, as_json: bool = False) -> int:
    """Print the report as text or as JSON. Return 0 if every self-test passed and every built library loads, else 1."""
    facts = report()
    if as_json:
        print(json.dumps(facts, indent=2, default=str))
    else:
        _print_report(facts)
    return 0 if facts["healthy"] else 1


def _print_report(facts: dict[str, Any]) -> None:
    for title in ("versions", "build", "isa"):
        if facts[title]:
            _print_table(title, {k: _text(v) for k, v in facts[title].items()})
    print(f"\nproducts of bfloat16 on the CPU (precision='bf16'): {facts['bf16']}")
    print(f"\nQFAST_BACKEND: {facts['backend']['choice']}")
    for device in ("cpu", "cuda"):
        state = facts["backend"][device]
        library = "qfast._C" if device == "cpu" else "qfast._cuda"
        print(f"  {library}: {'loaded' if state['loaded'] else 'not loaded: ' + state['reason']}")
    for device, where in (("cpu", "on the CPU"), ("cuda", "on CUDA")):
        tiers = {name: _describe_tier(by[device]) for name, by in facts["operators"].items() if device in by}
        _print_table(f"operators {where}", tiers)
    _print_table("self-test, native against plain torch", facts["self_test"])
    print("\nhealthy" if facts["healthy"] else "\nNOT healthy: see the failures above")


def _versions() -> dict[str, str]:
    versions = {"qfast": _version("qfast"), "python": platform.python_version(), "platform": platform.platform()}
    versions |= {name: _version(name) for name in _LIBRARIES}
    versions["torch"] = torch.__version__  # includes the build, such as +cu128, which the package metadata may lack
    versions["torch CUDA"] = str(torch.version.cuda or "CPU-only build")
    if torch.cuda.is_available():
        versions["GPU"] = torch.cuda.get_device_name()
    return versions


def _bf16_text() -> str:
    obstacle = bf16_obstacle()
    return f"not available: {obstacle}" if obstacle else "available (AMX)"


def _version(name: str) -> str:
    distribution = {"qfast": "qfast-models", "qlib": "pyqlib"}.get(name, name)
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _outcome(test: Callable[[], None]) -> str:
    try:
        test()
    except Exception as error:  # reported, whatever it is
        return f"FAILED: {type(error).__name__}: {error}"
    return "ok"


def _describe_tier(entry: dict[str, str]) -> str:
    names = {"cuda": "CUDA kernel", "cpu": "C++ kernel", "torch": "plain torch"}
    return names[entry["tier"]] + ("" if entry["reason"] == "loaded" else f" ({entry['reason']})")


def _text(value: Any) -> str:
    return ", ".join(value) if isinstance(value, list) else str(value)


def _print_table(title: str, rows: dict[str, str]) -> None:
    width = max(map(len, rows), default=0)
    print(f"\n{title}")
    for name, value in rows.items():
        print(f"  {name:<{width}}  {value}")


if __name__ == "__main__":
    sys.exit(main())
