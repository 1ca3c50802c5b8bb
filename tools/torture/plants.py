"""Faults that tools/torture_plants.py plants in a running process, to prove that the torture test detects them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch


class Plant(NamedTuple):
    """A fault, and the part that must detect it.

    Attributes
    ----------
    apply : callable
        Changes this process.
    part : str
    """

    apply: Callable[[], None]
    part: str


class _WrongKernel:
    """An operator whose output has a relative error of 1e-3 in one value."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kernel, name)

    def __call__(self, *arguments: Any) -> Any:
        results = self._kernel(*arguments)
        if results[0].numel() and results[0].shape[-1] % 8 == 7:
            results[0].view(-1)[-1].mul_(1.001)
        return results


def _plant_wrong_kernel() -> None:
    """`gru` writes a wrong last value where the hidden width is 7 modulo 8, like a kernel with a wrong tail."""
    torch.ops.qfast.gru = _WrongKernel(torch.ops.qfast.gru)


def _plant_write_without_rename() -> None:
    """Files are written in place, so a killed process leaves half of a file."""
    import qfast.workflow.run  # noqa: F401 - imports all modules that write files

    def write_in_place(target: Path, write: Callable[[Path], object]) -> None:
        write(target)
        with target.open("rb+") as file:
            os.fsync(file.fileno())

    for name, module in list(sys.modules.items()):
        if name.startswith("qfast.") and hasattr(module, "atomic_write"):
            module.atomic_write = write_in_place


def _plant_unsafe_yaml() -> None:
    """Tags in YAML call Python functions."""
    from ruamel.yaml import YAML

    from qfast.workflow import yaml_text

    yaml_text.yaml_writer = lambda: YAML(typ="unsafe", pure=True)


PLANTS = {
    "wrong-kernel": Plant(_plant_wrong_kernel, "operators"),
    "write-without-rename": Plant(_plant_write_without_rename, "kills"),
    "unsafe-yaml": Plant(_plant_unsafe_yaml, "files"),
}
