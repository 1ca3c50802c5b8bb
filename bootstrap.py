#!/usr/bin/env python3
"""Set qfast up in .venv and use it: `python3 bootstrap.py demo` or `python3 bootstrap.py test`.

Needs Python 3.10 or newer and a C++20 compiler; nothing is installed outside .venv.

    demo    build, then train on a synthetic market and write a report
    test    build, then run the test suite; further arguments go to pytest
    qlib    install pyqlib beside it and run the tests that compare with it
    check   lint, types and formatting, as continuous integration runs them
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
    """Run a command in the project's folder; its failure ends ours with the same status."""
    print("$", *command, flush=True)
    path = os.pathsep.join([str(BIN), os.environ.get("PATH", os.defpath)])  # the build looks for ninja there
    status = subprocess.run([str(part) for part in command], cwd=ROOT, env={**os.environ, "PATH": path}).returncode
    if status:
        sys.exit(status)


def install(*what: str) -> None:
    """Install into .venv within the tested versions, building the C++ and CUDA extensions in place."""
    # Python compiles modules when they are first imported; compiling all of torch takes half a minute.
    run(BIN / "python", "-m", "pip", "install", "--quiet", "--no-compile", "--constraint", CONSTRAINTS, *what)


def build_requirements() -> list[str]:
    """What pyproject.toml asks for a build; Python 3.10 reads no TOML."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    found = re.search(r"^\[build-system\]\nrequires = (\[.*\])$", text, re.MULTILINE)
    if found is None:
        sys.exit("pyproject.toml has no line `requires = [...]` right after [build-system]")
    requirements: list[str] = json.loads(found[1])
    return requirements


def main(arguments: list[str]) -> None:
    if sys.version_info < (3, 10):  # noqa: UP036 - whoever runs this may have any version
        sys.exit(f"qfast needs Python 3.10 or newer; this is {sys.version.split()[0]}.")
    if not arguments or arguments[0] not in ("demo", "test", "qlib", "check"):
        sys.exit(__doc__)
    if not (BIN / "python").exists() and not (BIN / "python.exe").exists():
        venv.create(HOME, with_pip=True)
    # Built without isolation: with the torch that is used, and beside the last build, of which ninja keeps what it can
    install(*build_requirements())
    extras = {"demo": "", "test": "[test]", "qlib": "[test]", "check": "[dev]"}[arguments[0]]
    install("--no-build-isolation", "--editable", f".{extras}")
    if arguments[0] == "demo":
        run(BIN / "qfast", "demo", *arguments[1:])
    elif arguments[0] == "test":
        run(BIN / "pytest", *arguments[1:])
    elif arguments[0] == "qlib":
        install("pyqlib")
        run(BIN / "pytest", *arguments[1:])
    else:
        run(BIN / "ruff", "check", ".")
        run(BIN / "ruff", "format", "--check", ".")
        run(BIN / "mypy")
        sources = sorted(p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".cpp", ".h", ".cu", ".cuh"))
        run(BIN / "clang-format", "--dry-run", "--Werror", *sources)


if __name__ == "__main__":
    main(sys.argv[1:])
