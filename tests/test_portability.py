"""qfast without what only some systems have, and messages about libraries for another machine."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qfast import _backend
from qfast._compatibility import driver_problem, explain_load_error, platform_problem, torch_problem

ROOT = Path(__file__).parents[1]

# Imports the libraries that qfast uses, hides what only POSIX systems have, then imports every module and trains.
OTHER_SYSTEM = r"""
import importlib, io, os, pathlib, pkgutil, signal, sys, tempfile
import jinja2, matplotlib.pyplot, numpy, pandas, pydantic, ruamel.yaml, safetensors.torch, torch, tqdm, typer
import multiprocessing.shared_memory, torch.distributed, torch.export, pyarrow.parquet

HIDDEN = ("fcntl", "resource", "pwd", "grp", "termios", "tty", "pty")
for name in HIDDEN:
    sys.modules[name] = None
for name in ("fork", "forkpty", "sysconf", "sched_getaffinity", "sched_setaffinity", "getuid", "geteuid", "getgid",
             "getpgid", "setsid", "killpg", "mkfifo", "posix_fadvise", "posix_fallocate", "statvfs", "uname",
             "getloadavg", "readlink"):
    if hasattr(os, name):
        delattr(os, name)
for name in ("SIGKILL", "SIGHUP", "SIGALRM", "setitimer", "alarm", "SIGXCPU", "SIGUSR1", "SIGPIPE"):
    if hasattr(signal, name):
        delattr(signal, name)

def is_hidden(path):
    return isinstance(path, (str, os.PathLike)) and os.fspath(path).startswith(("/proc/", "/sys/fs/cgroup"))

def hiding(function):
    def hidden(path, *args, **kwargs):
        if is_hidden(path):
            raise FileNotFoundError(2, "hidden", os.fspath(path))
        return function(path, *args, **kwargs)
    return hidden

io.open = hiding(io.open)
os.open, os.stat, os.listdir, os.scandir = map(hiding, (os.open, os.stat, os.listdir, os.scandir))

import qfast
for module in pkgutil.walk_packages(qfast.__path__, "qfast."):
    leaf = module.name.rpartition(".")[2]
    if leaf not in ("__main__", "_C", "_cuda", "template_process") and not leaf.startswith("ray_"):
        importlib.import_module(module.name)

from qfast import cli
from qfast.workflow.demo import DEMO, demo_prices
folder = pathlib.Path(tempfile.mkdtemp())
demo_prices(12, 600).to_parquet(folder / "prices.parquet")
sets = ["--set", "task.model.kwargs.n_epochs=1", "--set", "task.model.kwargs.hidden_size=4"]
assert cli.main(["run", str(DEMO), "--data", str(folder / "prices.parquet"), "-o", str(folder / "run"), *sets]) == 0
assert cli.main(["predict", str(folder / "run"), "--date", "latest"]) == 0
assert cli.main(["info", str(folder / "run")]) == 0
print("everything works")
"""


def test_no_module_needs_what_only_some_systems_have(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg"}
    command = [sys.executable, "-W", "ignore", "-c", OTHER_SYSTEM]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert result.stdout.endswith("everything works\n"), result.stderr[-3000:]


# ---------------------------------------------------------------- messages
def test_a_library_for_another_python() -> None:
    files = [Path("_C.cpython-39-aarch64-linux-gnu.so"), Path("_C.cp313-win_amd64.pyd")]
    message = platform_problem(files, "_C")
    assert message is not None
    assert "built for cp313-win_amd64, cpython-39-aarch64-linux-gnu, found " in message
    assert "Remedy: pip install --force-reinstall qfast-models" in message
    own = [file for file in _backend._library_files("_C") if _backend.native is not None]
    assert platform_problem([*own, *files], "_C") is None or not own


@pytest.mark.parametrize(("version", "is_problem"), [("2.9.1", True), ("1.13.0+cu117", True), ("2.10.0", False)])
def test_an_old_torch(version: str, is_problem: bool) -> None:
    message = torch_problem(version)
    assert (message is not None) == is_problem
    assert message is None or message == (
        f"built for torch 2.10 or newer, found torch {version}. Remedy: pip install 'torch>=2.10'."
    )
    assert torch_problem(torch.__version__) is None


@pytest.mark.parametrize(
    ("toolkit", "driver", "message"),
    [
        (
            "13.0 (/usr/local/cuda)",
            12080,
            "built for CUDA 13.0, found a driver for CUDA 12.8. Remedy: a driver for CUDA 13",
        ),
        ("12.8 (/usr/local/cuda)", 12020, None),  # drivers support all releases of their major version
        ("12.8 (/usr/local/cuda)", 13000, None),
        ("none", 12020, None),
        ("/usr/local/cuda", 12020, None),
        ("13.0", 0, None),
    ],
)
def test_an_old_driver(toolkit: str, driver: int, message: str | None) -> None:
    result = driver_problem(toolkit, driver)
    assert (result is None) == (message is None)
    assert message is None or message in str(result)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "/lib/libc.so.6: version `GLIBC_2.34' not found (required by x)",
            r"built for glibc with GLIBC_2\.34, found .*py3",
        ),
        ("libstdc++.so.6: version `GLIBCXX_3.4.30' not found", r"built for libstdc\+\+ with GLIBCXX_3\.4\.30.* Remedy"),
        ("x.so: undefined symbol: torch_new", r"stable ABI of torch 2\.10, found torch .*provide torch_new\. Remedy"),
        ("x.so: wrong ELF class: ELFCLASS32", r"built for another platform, found .*Remedy: pip install"),
        ("something else", "^something else$"),
    ],
)
def test_errors_of_the_loader(text: str, message: str) -> None:
    assert re.search(message, explain_load_error(OSError(text)))


def test_the_reason_of_a_library_for_another_python(tmp_path: Path) -> None:
    """A copy of the package with such a library: plain torch computes, and the status says why."""
    shutil.copytree(ROOT / "qfast", tmp_path / "qfast", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (tmp_path / "qfast" / "_C.cpython-39-aarch64-linux-gnu.so").touch()
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "QFAST_BACKEND": "auto"}
    command = [sys.executable, "-c", "from qfast import _backend; print(_backend.status()['cpu'])"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert "'loaded': False" in result.stdout, result.stderr
    assert "built but does not load: built for cpython-39-aarch64-linux-gnu, found cpython-3" in result.stdout
