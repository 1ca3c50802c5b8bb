"""The device a model trains on, and errors about its memory."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from qfast import _backend
from qfast._renamed import renamed_names
from qfast.errors import BackendError, ConfigError, DataError, whole_number

__all__ = ["choose_device", "explain_out_of_memory", "memory_shortage", "release_memory"]


def release_memory() -> int:
    """Free the idle memory that the CPU operators hold for later calls, and return its size in bytes.

    The operators reuse their workspace and the activations that they save for a backward pass, because the system
    clears fresh memory, page by page. They hold at most 512 MB more than they had in use at the same time, or
    QFAST_CACHE_MB of idle memory if that is set, and free blocks that no call has used for half a minute. `fit` calls
    this function at its end. Memory in use is not affected.

    Returns
    -------
    int
        The number of bytes, 0 without the CPU library.

    Examples
    --------
    >>> release_memory() >= 0
    True
    >>> release_memory()
    0
    """
    return 0 if _backend.native is None else int(_backend.native.release_idle_memory())


def choose_device(device: str | torch.device, gpu: int | None) -> torch.device:
    """Return the torch device that `device` and Qlib's argument `GPU` select.

    A request for a GPU never falls back to the CPU silently.

    Parameters
    ----------
    device : str or torch.device
        "auto", "cpu", "cuda" or "cuda:N". "auto" is GPU number `gpu` if torch detects one, otherwise the CPU. Under
        torchrun, GPU 0 means the GPU with the number of the process on its machine.
    gpu : int or None
        Qlib's argument `GPU`, used with "auto" only: the number of the GPU; a negative number or None selects the CPU.
        The default 0 means "a GPU if there is one". A higher number logs a warning if there is no GPU.

    Raises
    ------
    ConfigError
        `device` is not a device name, or `gpu` is not a whole number.
    BackendError
        The requested GPU is not available.

    Examples
    --------
    >>> choose_device("auto", gpu=-1)
    device(type='cpu')
    """
    if isinstance(device, str) and device == "auto":
        if gpu is None or whole_number("GPU", gpu, -(2**31)) < 0:
            return torch.device("cpu")
        if not torch.cuda.is_available():
            if gpu > 0:
                logging.getLogger("qfast").warning("GPU=%d was requested but no GPU is available: using the CPU", gpu)
            return torch.device("cpu")
        # Each process of torchrun has a GPU of its own.
        device = f"cuda:{gpu or int(os.environ.get('LOCAL_RANK', '0'))}"
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f"device must be 'auto', 'cpu', 'cuda' or 'cuda:N', got {device!r} ({error}).") from None
    if chosen.type not in ("cpu", "cuda"):
        raise ConfigError(f"device must be 'auto', 'cpu', 'cuda' or 'cuda:N', got {device!r}.")
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise BackendError(
            f"device={str(device)!r} was requested but this torch ({torch.__version__}) detects no GPU. "
            "Remedy: device='auto' or 'cpu', or a CUDA build of torch."
        )
    if chosen.type == "cuda" and chosen.index is not None and chosen.index >= torch.cuda.device_count():
        raise BackendError(
            f"device={str(device)!r} was requested but the number of GPUs is {torch.cuda.device_count()}. "
            "Remedy: a smaller number, or device='auto'."
        )
    return chosen


@contextmanager
def explain_out_of_memory(subject: str, device: torch.device, remedy: str = "") -> Iterator[None]:
    """Convert an out-of-memory error of the block into a DataError.

    Parameters
    ----------
    subject : str
        What needs the memory, for example "A training batch".
    device : torch.device
    remedy : str
        First remedy in the message, followed by general ones.

    Raises
    ------
    DataError
        The block ran out of memory.

    Examples
    --------
    >>> with explain_out_of_memory("The panel", torch.device("cpu")):  # doctest: +ELLIPSIS
    ...     raise torch.OutOfMemoryError("8 GiB")
    Traceback (most recent call last):
    qfast.errors.DataError: The panel does not fit into the memory of cpu (8 GiB). Remedy: fewer columns ...
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        shortage = memory_shortage(error)
        if shortage is None:
            raise
        other_device = "" if device.type == "cpu" else ", or device='cpu'"
        raise DataError(
            f"{subject} does not fit into the memory of {device} ({shortage}). Remedy: {remedy}fewer columns or a "
            f"shorter period{other_device}."
        ) from None


def memory_shortage(error: BaseException) -> str | None:
    """Return a description of an out-of-memory error without a remedy, or None for any other error.

    On the CPU torch raises a RuntimeError if it cannot allocate a tensor, on a GPU a torch.OutOfMemoryError. Python,
    NumPy and the CPU kernels raise a MemoryError.

    Examples
    --------
    >>> memory_shortage(MemoryError("no memory for 8 GiB. Remedy: a smaller batch."))
    'no memory for 8 GiB'
    >>> memory_shortage(RuntimeError("DefaultCPUAllocator: ... you tried to allocate 8388608 bytes."))
    'no memory for 8.0 MiB on cpu'
    >>> memory_shortage(RuntimeError("sizes do not match")) is None
    True
    """
    text = str(error)
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return text.partition(" Remedy: ")[0].rstrip(".") or "no memory on cpu"
    size = re.search(r"DefaultCPUAllocator: .*tried to allocate (\d+) bytes", text)
    if size is not None:
        return f"no memory for {int(size[1]) / 2**20:,.1f} MiB on cpu"
    if "integer multiplication overflow" in text or "Storage size calculation overflowed" in text:
        return "no memory for a tensor of 2**63 bytes or more"
    return None


__getattr__ = renamed_names(__name__, {"memory_named": "qfast.device.explain_out_of_memory"})
