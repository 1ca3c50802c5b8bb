"""Why a native library cannot be used here: what it was built for, what this machine has, and a remedy."""

from __future__ import annotations

import platform
import re
import sysconfig
from collections.abc import Sequence
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch

__all__ = ["driver_problem", "explain_load_error", "platform_problem", "torch_problem"]

OLDEST_TORCH = (2, 10)  # the target of the build, see setup.py
REINSTALL = "Remedy: pip install --force-reinstall qfast-models in this environment, or build it from source."


def platform_problem(files: Sequence[Path], stem: str) -> str | None:
    """A message if none of the files of an extension module suits this Python on this platform.

    Parameters
    ----------
    files : sequence of Path
        At least one file.
    stem : str
        Name of the module.

    Examples
    --------
    >>> platform_problem([Path("_C.cpython-39-win_arm64.pyd")], "_C").partition(", ")[0]
    'built for cpython-39-win_arm64'
    """
    names = {f"{stem}{suffix}" for suffix in EXTENSION_SUFFIXES}
    if any(file.name in names for file in files):
        return None
    built = ", ".join(sorted(file.name.removeprefix(f"{stem}.").rpartition(".")[0] for file in files))
    found = str(sysconfig.get_config_var("SOABI") or f"Python {platform.python_version()} on {platform.machine()}")
    return f"built for {built}, found {found}. {REINSTALL}"


def torch_problem(version: str) -> str | None:
    """A message if this version of torch is older than the stable ABI that the libraries use.

    >>> torch_problem("2.9.1+cpu")
    "built for torch 2.10 or newer, found torch 2.9.1+cpu. Remedy: pip install 'torch>=2.10'."
    """
    release = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if release >= OLDEST_TORCH:
        return None
    oldest = ".".join(map(str, OLDEST_TORCH))
    return f"built for torch {oldest} or newer, found torch {version}. Remedy: pip install 'torch>={oldest}'."


def driver_problem(toolkit: str, driver: int) -> str | None:
    """A message if the driver is of an older major version of CUDA than the toolkit of the library.

    Parameters
    ----------
    toolkit : str
        Begins with the release of the toolkit, for example "13.0 (/usr/local/cuda)". Other texts are not compared.
    driver : int
        1000 * major + 10 * minor, as cudaDriverGetVersion returns it.

    Examples
    --------
    >>> driver_problem("13.0 (/usr/local/cuda)", 12080).partition(". ")[0]
    'built for CUDA 13.0, found a driver for CUDA 12.8'
    """
    release = re.match(r"(\d+)\.(\d+)", toolkit)
    if release is None or driver <= 0 or int(release[1]) <= driver // 1000:
        return None
    found = f"{driver // 1000}.{driver % 1000 // 10}"
    return (
        f"built for CUDA {release[0]}, found a driver for CUDA {found}. Remedy: a driver for CUDA {release[1]}, or a "
        f"qfast that was built with a toolkit of CUDA {driver // 1000}."
    )


def explain_load_error(error: Exception) -> str:
    """The error of a library that suits this Python but cannot be loaded, with a remedy for known causes."""
    text = str(error)
    glibc = re.search(r"version `(GLIBC\w*)_([\d.]+)' not found", text)
    if glibc is not None:
        library = "glibc" if glibc[1] == "GLIBC" else "libstdc++"
        found = platform.libc_ver()[1] or "another version" if library == "glibc" else "an older one"
        return (
            f"built for {library} with {glibc[1]}_{glibc[2]}, found {found}. Remedy: the pure Python wheel "
            "(py3-none-any), a newer distribution, or a build from source."
        )
    symbol = re.search(r"undefined symbol: (\w+)", text)
    if symbol is not None:
        return (
            f"built for the stable ABI of torch {'.'.join(map(str, OLDEST_TORCH))}, found torch {torch.__version__}, "
            f"which does not provide {symbol[1]}. Remedy: a newer qfast, or a version of torch that docs/developing.md "
            "lists as tested."
        )
    if re.search(r"ELF|mach-o|not a valid Win32", text):
        found = f"{platform.machine()} {platform.system()}"
        return f"built for another platform, found {found} ({text}). {REINSTALL}"
    return text
