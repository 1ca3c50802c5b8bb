"""Run the core of the test suite under several versions of Python, torch, pandas and NumPy, from one wheel per Python.

    python tools/matrix.py [--pythons 3.10,3.11,3.12,3.13] [--torches 2.10.0,2.13.0] [--libraries oldest,newest]
                           [--folder build/matrix] [--wheel FILE] [pytest arguments...]

Each pair of Python and torch has its own virtual environment in the folder. One wheel per Python serves all of its
combinations: `--wheel`, or the one that tools/build_wheels.sh has left in dist/cpu, or one that is built here with the
last torch of the list. `oldest` is pandas 2.2 with
the oldest NumPy that has wheels for the Python, `newest` the newest versions that pip finds. The tests run against the
installed wheel, not against the sources. A Markdown table is printed and written to table.md in the folder. The exit
status is 0 if every combination that can be installed passes.

A torch with CUDA is a download of several gigabytes per Python. PIP_FIND_LINKS may name a folder of CPU builds.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
CORE = (  # data, factors, operators, training, workflows and their files
    "tests/test_processors.py",
    "tests/test_expression.py",
    "tests/test_rolling.py",
    "tests/test_operator_cases.py",
    "tests/test_optim.py",
    "tests/test_estimator.py",
    "tests/test_config.py",
    "tests/test_damaged_runs.py",
)
BUILD_TOOLS = ("setuptools>=77,<82", "wheel", "ninja", "pybind11>=2.13", "numpy")
TEST_TOOLS = ("pytest", "hypothesis", "scipy", "pyarrow")


class Row(NamedTuple):
    """A row of the table."""

    python: str
    torch: str
    pandas: str
    numpy: str
    result: str


def find_python(version: str) -> str | None:
    """Path of an interpreter of this minor version: of pyenv, or on PATH."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    candidates = sorted(pyenv.glob(f"{version}.*/bin/python"))
    return str(candidates[-1]) if candidates else shutil.which(f"python{version}")


def run(*words: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run a command without the variables that would make it import the sources."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment |= {"QFAST_CUDA": "0", "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)


def install(python: Path, *packages: str) -> str:
    """Install packages into the environment of `python`. Returns pip's last line of an error, or an empty text."""
    done = run(str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check", *packages)
    lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
    return (lines or ["ERROR: pip failed"])[-1] if done.returncode else ""


def environment_of(folder: Path, interpreter: str, torch: str) -> tuple[Path, str]:
    """The interpreter of a new virtual environment with this torch, and why it cannot be made."""
    python = folder / "bin" / "python"
    if not python.exists():
        done = run(interpreter, "-m", "venv", str(folder))
        if done.returncode:
            return python, done.stderr.strip().splitlines()[-1]
    return python, install(python, f"torch=={torch}", *BUILD_TOOLS)


def built_wheel(version: str) -> Path | None:
    """The newest wheel in dist/cpu for this Python."""
    wheels = (ROOT / "dist" / "cpu").glob(f"*-cp{version.replace('.', '')}-*.whl")
    return max(wheels, key=lambda file: file.stat().st_mtime, default=None)


def build_wheel(python: Path, folder: Path) -> Path:
    """Build the wheel in the environment of `python`."""
    done = run(str(python), "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", str(folder), str(ROOT))
    if done.returncode:
        raise SystemExit(f"the wheel does not build:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return max(folder.glob("*.whl"), key=lambda file: file.stat().st_mtime)


def requirements(libraries: str, version: str) -> list[str]:
    """Requirements of pandas and NumPy."""
    if libraries == "newest":
        return ["--upgrade", "--upgrade-strategy=eager", "pandas", "numpy"]
    return ["pandas==2.2.3", "numpy==2.1.*" if version == "3.13" else "numpy==1.26.*"]


def run_tests(python: Path, folder: Path, arguments: Sequence[str]) -> str:
    """Run the tests in a folder without the sources. Returns pytest's summary."""
    tests = folder / "tests"
    shutil.copytree(ROOT / "tests", tests, dirs_exist_ok=True)
    shutil.copy(ROOT / "pyproject.toml", folder)
    started = time.monotonic()
    done = run(str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments, folder=folder)
    (folder / "pytest.log").write_text(done.stdout + done.stderr)
    summary = [line for line in done.stdout.splitlines() if re.match(r"\d+ (passed|failed|error)|no tests", line)]
    return (summary or [f"exit status {done.returncode}"])[-1].split(" in ")[
        0
    ] + f", {time.monotonic() - started:.0f} s"


def versions_of(python: Path) -> list[str]:
    """Versions of torch, pandas and NumPy in an environment."""
    code = "import torch, pandas, numpy; print(torch.__version__, pandas.__version__, numpy.__version__)"
    return run(str(python), "-c", code).stdout.split() or ["?"] * 3


def test_python(version: str, options: argparse.Namespace, arguments: Sequence[str]) -> list[Row]:
    """All rows of one Python."""
    interpreter, rows, wheel = find_python(version), list[Row](), options.wheel or built_wheel(version)
    torches, libraries = options.torches.split(","), options.libraries.split(",")
    if interpreter is None:
        return [Row(version, "", "", "", "not run: there is no such Python")]
    for torch, which in product(reversed(torches), libraries):
        folder = options.folder / f"py{version}-torch{torch}"
        python, problem = environment_of(folder, interpreter, torch)
        if not problem and wheel is None:
            wheel = build_wheel(python, folder)
        problem = problem or install(python, str(wheel), *TEST_TOOLS) or install(python, *requirements(which, version))
        if problem:
            rows.append(Row(version, torch, which, which, f"not run: {problem}"))
        else:
            rows.append(Row(version, *versions_of(python), run_tests(python, folder / "run", arguments)))
        print(" | ".join(rows[-1]), flush=True)
    return rows


def main() -> int:
    """Run all combinations and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pythons", default="3.10,3.11,3.12,3.13")
    parser.add_argument("--torches", default="2.10.0,2.13.0")
    parser.add_argument("--libraries", default="oldest,newest")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "matrix")
    parser.add_argument("--wheel", type=Path, help="an existing wheel, for one Python")
    options, arguments = parser.parse_known_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    options.folder = options.folder.resolve()
    rows = [row for version in options.pythons.split(",") for row in test_python(version, options, arguments or CORE)]
    lines = ["| Python | torch | pandas | NumPy | result |", "| --- | --- | --- | --- | --- |"]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    (options.folder / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    failed = [row for row in rows if "failed" in row.result or "error" in row.result or "exit status" in row.result]
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
