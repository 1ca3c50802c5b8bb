"""Checksums of the compiled libraries and of their sources, to detect libraries that were built from other sources.

    python tools/library_checksums.py     # after a build: write qfast/_libraries.sha256

The file has the format of sha256sum, so `sha256sum --check` reads it too.
"""

from __future__ import annotations

import hashlib
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILE = Path("qfast", "_libraries.sha256")


def libraries(root: Path = ROOT) -> list[Path]:
    """The libraries of this version of Python that are built, relative to the root: first the C++ library."""
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    paths = (Path("qfast", f"{stem}{suffix}") for stem in ("_C", "_cuda"))
    return [path for path in paths if (root / path).exists()]


def sources(root: Path = ROOT) -> list[Path]:
    """The files that are compiled, relative to the root."""
    files = (path.relative_to(root) for path in (root / "csrc").rglob("*") if path.is_file())
    return sorted([*files, Path("setup.py")])


def write(root: Path = ROOT) -> None:
    """Write the checksums of the built libraries and of all sources."""
    paths = [*sources(root), *libraries(root)]
    (root / FILE).write_text("".join(f"{_checksum(root / path)}  {path.as_posix()}\n" for path in paths))


def differences(root: Path = ROOT) -> list[str]:
    """The files that differ from their checksums, or are missing or new. Empty if there are no checksums."""
    if not (root / FILE).exists():
        return []
    lines = (line.split("  ", 1) for line in (root / FILE).read_text().splitlines())
    expected = {path: checksum for checksum, path in lines}
    present = {path.as_posix() for path in (*sources(root), *map(Path, expected)) if (root / path).exists()}
    return sorted(
        path for path in present | set(expected) if path not in present or _checksum(root / path) != expected.get(path)
    )


def _checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    write()
