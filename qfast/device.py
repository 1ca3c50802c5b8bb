"""The device a model trains on, and errors about its memory."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from qfast._renamed import renamed_names
from qfast.errors import BackendError, ConfigError, DataError, whole_number

__all__ = ["choose_device", "explain_out_of_memory"]


def choose_device(device: str | torch.device, gpu: int | None) -> torch.device:
    """Return the torch device that `device` and Qlib's argument `GPU` select.

    A request for a GPU never falls back to the CPU silently.

    Parameters
    ----------
    device : str or torch.device
        "auto", "cpu", "cuda" or "cuda:N". "auto" is GPU number `gpu` if torch detects one, otherwise the CPU.
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
        device = f"cuda:{gpu}"
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
    except torch.OutOfMemoryError as error:
        raise DataError(
            f"{subject} does not fit into the memory of {device} ({error}). Remedy: {remedy}fewer columns or a shorter "
            "period, or device='cpu'."
        ) from None


__getattr__ = renamed_names(__name__, {"memory_named": "qfast.device.explain_out_of_memory"})
