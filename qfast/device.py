"""The device a model trains on, and its memory."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from qfast.errors import BackendError, ConfigError, DataError, whole_number

__all__ = ["choose_device", "memory_named"]


def choose_device(device: str | torch.device, gpu: Any) -> torch.device:
    """The torch device asked for; never a silent fall to the CPU when a GPU was named.

    Parameters
    ----------
    device : str or torch.device
        "auto", "cpu", "cuda" or "cuda:N". "auto" is GPU number `gpu` if torch sees one, otherwise the CPU.
    gpu : int or None
        The reference's argument `GPU`: a number, or negative or None for the CPU. 0, its default, means "if there
        is one"; a higher number without any GPU is answered with a warning.

    Raises
    ------
    ConfigError
        Not a device name.
    BackendError
        A GPU that this machine does not have.
    """
    if isinstance(device, str) and device == "auto":
        if gpu is None or whole_number("GPU", gpu, -(2**31)) < 0:
            return torch.device("cpu")
        if not torch.cuda.is_available():
            if gpu > 0:
                logging.getLogger("qfast").warning("GPU=%d was asked for but there is none: the CPU is used", gpu)
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
            f"device={str(device)!r} was asked for but this torch ({torch.__version__}) sees no GPU. "
            "Remedy: device='auto' or 'cpu', or a CUDA build of torch."
        )
    if chosen.type == "cuda" and chosen.index is not None and chosen.index >= torch.cuda.device_count():
        raise BackendError(f"device={str(device)!r} was asked for but there are {torch.cuda.device_count()} GPUs.")
    return chosen


@contextmanager
def memory_named(what: str, device: torch.device, remedy: str = "") -> Iterator[None]:
    """Turn an out-of-memory error into a DataError that names the device and the remedies, `remedy` first."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise DataError(
            f"{what} does not fit into the memory of {device} ({error}). Remedy: {remedy}fewer columns or a shorter "
            "period, or device='cpu'."
        ) from None
