#!/usr/bin/env python3
"""Install qfast into .venv and run a command: `python3 bootstrap.py demo` or `python3 bootstrap.py test`.

Python 3.10 or newer and a C++20 compiler are required. Nothing is installed outside .venv. Each command builds qfast
first and passes further arguments on:

    demo    run `qfast demo`, which trains on a synthetic market and writes a report
    test    run the test suite with pytest
    qlib    install pyqlib too, then run the test suite, including the tests that compare with Qlib
    check   check lint, formatting and types, as continuous integration does (no further arguments)
    docs    build the documentation site into site/, and run its tutorials
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent
HOME = ROOT / ".venv"
BIN = HOME / ("Scripts" if os.name == "nt" else "bin")
CONSTRAINTS = ROOT / "requirements" / "constraints.txt"


def run(*command: str | Path) -> None:
    """Run a command in the project's folder. If it fails, exit with its status."""
    print("$", *command, flush=True)
    path = os.pathsep.join([str(BIN), os.environ.get("PATH", os.defpath)])  # where the build finds ninja
    status = subprocess.run([str(part) for part in command], cwd=ROOT, env={**os.environ, "PATH": path}).returncode
    if status:
        sys.exit(status)


def install(*requirements: str) -> None:
    """Install requirements into .venv, limited to the tested versions."""
    # --no-compile: compiling all of torch takes half a minute, and Python compiles a module at its first import.
    run(BIN / "python", "-m", "pip", "install", "--quiet", "--no-compile", "--constraint", CONSTRAINTS, *requirements)


def build_requirements() -> list[str]:
    """The build requirements in pyproject.toml, read with a regular expression because Python 3.10 has no tomllib."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    match = re.search(r"^\[build-system\]\nrequires = (\[.*\])$", text, re.MULTILINE)
    if match is None:
        sys.exit("pyproject.toml has no line `requires = [...]` right after [build-system]")
    requirements: list[str] = json.loads(match[1])
    return requirements


def main(arguments: list[str]) -> None:
    """Build qfast and run the command that the first argument names."""
    if sys.version_info < (3, 10):  # noqa: UP036 - this file may be run with any version
        sys.exit(f"qfast needs Python 3.10 or newer; this is {sys.version.split()[0]}.")
    if not arguments or arguments[0] not in ("demo", "test", "qlib", "check", "docs"):
        sys.exit(__doc__)
    if not (BIN / "python").exists() and not (BIN / "python.exe").exists():
        venv.create(HOME, with_pip=True)
    # Without build isolation, the build uses the torch in .venv, and ninja compiles only what has changed.
    install(*build_requirements())
    extras = {"demo": "", "test": "[test]", "qlib": "[test]", "check": "[dev]", "docs": "[docs]"}[arguments[0]]
    install("--no-build-isolation", "--editable", f".{extras}")
    if arguments[0] == "demo":
        run(BIN / "qfast", "demo", *arguments[1:])
    elif arguments[0] == "test":
        run(BIN / "pytest", *arguments[1:])
    elif arguments[0] == "qlib":
        install("pyqlib")
        run(BIN / "pytest", *arguments[1:])
    elif arguments[0] == "docs":
        run(BIN / "mkdocs", "build", "--quiet", *arguments[1:])
    else:
        run(BIN / "ruff", "check", ".")
        run(BIN / "ruff", "format", "--check", ".")
        run(BIN / "mypy")
        sources = sorted(p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".cpp", ".h", ".cu", ".cuh"))
        run(BIN / "clang-format", "--dry-run", "--Werror", *sources)


if __name__ == "__main__":
    main(sys.argv[1:])
