"""The implementations that operators use: loads the native libraries at import and records the reasons.

Four environment variables are read once, when qfast is imported.

`QFAST_BACKEND` selects the libraries:

    auto   the CPU library if it was built, and the CUDA library if torch can use a GPU (default)
    cuda   as auto, but an unusable CUDA library is an error
    cpu    the CPU library only; tensors on a GPU use plain torch
    torch  no native library: every operator is its plain-torch twin

`QFAST_CUDA_LAYERS` selects the layers of networks on a GPU where torch has the same layer (LSTM, GRU, encoder):

    torch  torch's layers, which use cuDNN (default, because qfast's have not been measured on a GPU)
    qfast  the operators of the CUDA library

`QFAST_ISA` (baseline, avx2 or avx512) overrides the instruction set that the CPU library detects. It is for tests.

`QFAST_CACHE_MB` limits the idle memory that the CPU operators hold for later calls (0 holds none). By default,
they hold at most 512 MB more than they had in use at the same time.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from qfast._compatibility import driver_problem, explain_load_error, platform_problem, torch_problem
from qfast.errors import BackendError

CHOICES = ("auto", "cuda", "cpu", "torch")
LAYERS = ("torch", "qfast")
BROKEN = "built but does not load"

__all__ = [
    "BROKEN",
    "CHOICES",
    "LAYERS",
    "choice",
    "cuda_layers",
    "is_loaded",
    "native",
    "status",
    "uses_qfast_layers",
]


def _read_choice(name: str, choices: tuple[str, ...]) -> str:
    value = os.environ.get(name, "").strip().lower() or choices[0]
    if value not in choices:
        raise BackendError(f"{name} is {value!r}; allowed: {', '.join(choices)}.")
    return value


def _load_cpu(backend: str) -> tuple[ModuleType | None, str]:
    """Load the pybind11 module qfast._C. Return it, or None, and the reason."""
    if backend == "torch":
        return None, "QFAST_BACKEND=torch"
    files = _library_files("_C")
    if not files:
        return None, "not built (QFAST_NATIVE=0, or the sources are used without an install)"
    problem = torch_problem(torch.__version__) or platform_problem(files, "_C")
    if problem is not None:
        return None, f"{BROKEN}: {problem}"
    try:
        module = importlib.import_module("qfast._C")
    except (ImportError, OSError) as error:
        return None, f"{BROKEN}: {explain_load_error(error)}"
    _limit_cache(module)
    isa = os.environ.get("QFAST_ISA", "").strip().lower()
    try:
        if isa:
            module.select_isa(isa)
    except ValueError as error:
        raise BackendError(f"QFAST_ISA: {error}") from None
    return module, "loaded"


def _limit_cache(module: ModuleType) -> None:
    text = os.environ.get("QFAST_CACHE_MB", "").strip()
    if text and (not text.isdecimal() or int(text) > 2**30):
        raise BackendError(f"QFAST_CACHE_MB is {text!r}; allowed: a whole number of megabytes, 0 to 2**30.")
    if not hasattr(module, "set_memory_cache_limit"):
        raise BackendError(
            f"{module.__file__} was built from older sources of qfast. Remedy: install qfast again, or python setup.py "
            "build_ext --inplace."
        )
    module.set_memory_cache_limit(int(text) * 2**20 if text else -1)


def _load_cuda(backend: str) -> tuple[bool, str]:
    """Load qfast._cuda if a GPU is usable. Return whether it is loaded and the reason."""
    if backend in ("cpu", "torch"):
        return False, f"QFAST_BACKEND={backend}"
    loaded, reason = _try_cuda()
    if backend == "cuda" and not loaded:
        raise BackendError(
            f"QFAST_BACKEND=cuda but the CUDA tier cannot be used: {reason}. Remedy: unset QFAST_BACKEND, or install a "
            "CUDA build of torch and reinstall qfast with QFAST_CUDA=1 on a machine with nvcc."
        )
    return loaded, reason


def _try_cuda() -> tuple[bool, str]:
    if not torch.backends.cuda.is_built():
        return False, "this torch is a CPU-only build"
    if not torch.cuda.is_available():
        return False, "torch detects no usable GPU"
    files = _library_files("_cuda")
    if not files:
        return False, "qfast was built without nvcc, with a CPU-only torch, or with QFAST_CUDA=0"
    toolkit = "" if native is None else str(native.build_info()["cuda_toolkit"])
    problem = torch_problem(torch.__version__) or driver_problem(toolkit, _driver_version())
    if problem is not None:
        return False, f"{BROKEN}: {problem}"
    try:
        torch.ops.load_library(str(files[0]))
    except OSError as error:
        return False, f"{BROKEN}: {explain_load_error(error)}"
    return True, "loaded"


def _driver_version() -> int:
    """Version of CUDA that the driver supports, 1000 * major + 10 * minor; 0 if unknown."""
    ask: Callable[[], int] | None = getattr(torch._C, "_cuda_getDriverVersion", None)
    return 0 if ask is None else ask()


def _library_files(stem: str) -> list[Path]:
    folder = Path(__file__).parent
    return sorted([*folder.glob(f"{stem}.*so"), *folder.glob(f"{stem}.*pyd")])


choice: str = _read_choice("QFAST_BACKEND", CHOICES)
cuda_layers: str = _read_choice("QFAST_CUDA_LAYERS", LAYERS)
native, _cpu_reason = _load_cpu(choice)
_cuda_loaded, _cuda_reason = _load_cuda(choice)


def uses_qfast_layers(device: torch.device) -> bool:
    """Return whether networks on this device use qfast's operators where torch has the same layer."""
    if device.type == "cuda":
        return _cuda_loaded and cuda_layers == "qfast"
    return device.type == "cpu" and native is not None


def is_loaded(device: torch.device) -> bool:
    """Return whether the native library for tensors on this device is loaded."""
    return native is not None if device.type == "cpu" else _cuda_loaded and device.type == "cuda"


def status() -> dict[str, Any]:
    """Return which native libraries are loaded and why.

    Returns
    -------
    dict
        `choice` : the value of QFAST_BACKEND
        `cpu`, `cuda` : dicts of `loaded` (bool), `reason` (str) and `tier`, the implementation for tensors on that kind
        of device: "cuda", "cpu" or "torch"

    Examples
    --------
    >>> sorted(status())
    ['choice', 'cpu', 'cuda']
    """
    return {
        "choice": choice,
        "cpu": {
            "loaded": native is not None,
            "reason": _cpu_reason,
            "tier": "cpu" if native is not None else "torch",
        },
        "cuda": {
            "loaded": _cuda_loaded,
            "reason": _cuda_reason,
            "tier": "cuda" if _cuda_loaded else "torch",
        },
    }
