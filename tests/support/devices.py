"""Device of the CUDA operator tests: a GPU, or the CPU with kernels built as host code (tools/cuda_on_host.py)."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch

from qfast import _backend

ON_HOST = os.environ.get("QFAST_CUDA_ON_HOST", "")
DEVICE = "cpu" if ON_HOST else "cuda"
if ON_HOST:
    torch.ops.load_library(ON_HOST)

# cuDNN's recurrent layers and cuBLAS repeat their bits only with this, set before cuBLAS starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

_device = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch detects no usable GPU")
_kernels = pytest.mark.skipif(
    not _backend.status()["cuda"]["loaded"], reason=f"qfast._cuda: {_backend.status()['cuda']['reason']}"
)

needs_gpu = _device  # for tests of the device itself
long_on_host = pytest.mark.skipif(bool(ON_HOST) and not os.environ.get("QFAST_HOST_ALL"), reason="minutes as host code")
needs_kernels = [pytest.mark.gpu] if ON_HOST else [pytest.mark.gpu, _device, _kernels]


def make_cudnn_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let cuDNN multiply in float32, which it does in TF32 by default, and choose kernels that repeat their bits."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


def assert_no_synchronization(call: Callable[[], object]) -> None:
    """Asserts that `call` does not wait for the GPU. The first call, which may initialize libraries, is exempt."""
    call()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
