"""Which tier computes: the native libraries, loaded once at import, and the reasons for what was chosen.

`QFAST_BACKEND` decides, read once when qfast is imported:

    auto   the CPU library if it was built, the CUDA library if torch can use a GPU (default)
    cuda   as auto, but an error if the CUDA library cannot be used
    cpu    never load the CUDA library; tensors on a GPU are served by plain torch
    torch  load nothing native: every operator is its plain-torch twin

`QFAST_CUDA_LAYERS` says what networks take on a GPU where torch has a layer of its own (LSTM, GRU, encoder):

    torch  torch's layers, cuDNN among them (default, until ours have been measured there)
    qfast  the operators of the CUDA library

`QFAST_ISA` (baseline, avx2 or avx512) overrides the instruction set that the CPU library picks, for tests.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from qfast.errors import BackendError

CHOICES = ("auto", "cuda", "cpu", "torch")
LAYERS = ("torch", "qfast")
BROKEN = "built but does not load"

__all__ = ["BROKEN", "CHOICES", "LAYERS", "choice", "cuda_layers", "layers_serve", "native", "status"]


def _read_choice(name: str, choices: tuple[str, ...]) -> str:
    value = os.environ.get(name, "").strip().lower() or choices[0]
    if value not in choices:
        raise BackendError(f"{name} is {value!r}; allowed: {', '.join(choices)}.")
    return value


def _load_cpu(wanted: str) -> tuple[ModuleType | None, str]:
    """The pybind11 module qfast._C and why it is or is not loaded."""
    if wanted == "torch":
        return None, "QFAST_BACKEND=torch"
    if not _library_files("_C"):
        return None, "not built (QFAST_NATIVE=0, or the sources are used without an install)"
    try:
        module = importlib.import_module("qfast._C")
    except (ImportError, OSError) as error:
        return None, f"{BROKEN}: {error}"
    isa = os.environ.get("QFAST_ISA", "").strip().lower()
    try:
        if isa:
            module.select_isa(isa)
    except ValueError as error:
        raise BackendError(f"QFAST_ISA: {error}") from None
    return module, "loaded"


def _load_cuda(wanted: str) -> tuple[bool, str]:
    """Load qfast._cuda where a GPU is usable; whether it is loaded and why."""
    if wanted in ("cpu", "torch"):
        return False, f"QFAST_BACKEND={wanted}"
    loaded, reason = _try_cuda()
    if wanted == "cuda" and not loaded:
        raise BackendError(
            f"QFAST_BACKEND=cuda but the CUDA tier cannot be used: {reason}. Remedy: unset QFAST_BACKEND, or "
            "install a CUDA build of torch and reinstall qfast with QFAST_CUDA=1 where nvcc is."
        )
    return loaded, reason


def _try_cuda() -> tuple[bool, str]:
    if not torch.backends.cuda.is_built():
        return False, "this torch is a CPU-only build"
    if not torch.cuda.is_available():
        return False, "torch sees no usable GPU"
    files = _library_files("_cuda")
    if not files:
        return False, "qfast was built without nvcc (or with QFAST_CUDA=0)"
    try:
        torch.ops.load_library(str(files[0]))
    except OSError as error:
        return False, f"{BROKEN}: {error}"
    return True, "loaded"


def _library_files(stem: str) -> list[Path]:
    return sorted(Path(__file__).parent.glob(f"{stem}*.so"))


choice: str = _read_choice("QFAST_BACKEND", CHOICES)
cuda_layers: str = _read_choice("QFAST_CUDA_LAYERS", LAYERS)
native, _cpu_reason = _load_cpu(choice)
_cuda_loaded, _cuda_reason = _load_cuda(choice)


def layers_serve(device: torch.device) -> bool:
    """Whether networks compute by our operators on a device what torch has a layer for."""
    if device.type == "cuda":
        return _cuda_loaded and cuda_layers == "qfast"
    return device.type == "cpu" and native is not None


def status() -> dict[str, Any]:
    """What is loaded and why.

    Returns
    -------
    dict
        `choice` (QFAST_BACKEND), `cpu` and `cuda`: each a dict of `loaded` (bool), `reason` (str) and
        `tier`, the name of what serves tensors on that kind of device: "cuda", "cpu" or "torch".

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
