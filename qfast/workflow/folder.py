"""The run folder: every file appears whole or not at all, and the manifest says how the run stands."""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import logging
import math
import os
import platform
import re
import shlex
import sys
import time
from collections.abc import Iterator, Mapping
from importlib import import_module
from importlib import metadata as packages
from pathlib import Path
from typing import Any

import pandas as pd

from qfast.errors import CheckpointError, ConfigError, QfastError
from qfast.files import atomic_write, is_disk_full, sweep

__all__ = ["RunFolder", "check_table_target", "read_frame", "recorded", "versions", "write_frame"]

log = logging.getLogger("qfast")

MANIFEST = "manifest.json"
CONFIG = "config.yaml"
BEST = "best.safetensors"  # weights of the best epoch so far
LAST = "last.safetensors"  # all that training needs to go on
HISTORY = "history.csv"
RESERVE = ".reserve"
RESERVE_BYTES = 256 * 1024  # given back on a full disk, so that the manifest can still say what happened
RUNNING, FINISHED, FAILED, INTERRUPTED = "running", "finished", "failed", "interrupted"


class RunFolder:
    """One run's files.

    Attributes
    ----------
    path : Path
    manifest : dict
        What `manifest.json` holds; change it through `update`.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as base:
    ...     folder = RunFolder.create(Path(base, "run"), "demo")
    ...     folder.update(seed=3)
    ...     RunFolder.open(folder.path).manifest["seed"]
    3
    """

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.manifest = manifest
        self.running = False  # True once this process has started or restarted the run

    @classmethod
    def create(
        cls, output: str | os.PathLike[str] | None, experiment: str, config_text: str | None = None, **fields: Any
    ) -> RunFolder:
        """A new folder: `output`, or runs/<experiment>-<UTC time>. An existing run is never overwritten.

        `config_text` goes into config.yaml, `fields` go into the manifest. The manifest comes last: a folder that
        has one has all that resuming needs.

        Raises
        ------
        ConfigError
            `output` is there and not empty, or cannot be made.
        """
        try:
            path = _new_default(experiment) if output is None else _new_folder(Path(output))
        except OSError as error:
            raise ConfigError(f"the run folder {str(output or 'runs')!r} cannot be made: {error.strerror}.") from None
        folder = cls(path, {"format": 1, "experiment": experiment, "status": RUNNING, "started": now(), "error": None})
        folder.running = True
        try:
            (path / RESERVE).write_bytes(b"\0" * RESERVE_BYTES)
            if config_text is not None:
                folder.write_text(CONFIG, config_text)
            folder.update(**fields)
        except BaseException:  # what is no run yet must not lie in the way of the next one
            for name in (MANIFEST, CONFIG, RESERVE):
                (path / name).unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                path.rmdir()
            raise
        return folder

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> RunFolder:
        """The run in `path`.

        Raises
        ------
        ConfigError
            No such folder, or no run in it.
        """
        folder = Path(path)
        if not folder.is_dir():
            raise ConfigError(f"run folder {str(path)!r} does not exist.")
        try:
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(
                f"{str(path)!r} is no run folder: it has no {MANIFEST}. Give a folder that 'qfast run' has written."
            ) from None
        except (ValueError, OSError) as error:
            raise ConfigError(f"{str(folder / MANIFEST)!r} cannot be read: {error}.") from None
        if not isinstance(manifest, dict) or "status" not in manifest:
            raise ConfigError(f"{str(folder / MANIFEST)!r} is not the manifest of a run.")
        return cls(folder, manifest)

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    # ---------------------------------------------------------------- writing
    def update(self, **fields: Any) -> None:
        """Set fields of the manifest and write it."""
        self.manifest.update(fields)
        self.write_json(MANIFEST, self.manifest)

    def restart(self) -> None:
        """Set the status of a reopened run to running, and remove the temporary files of a killed process."""
        self.running = True
        for file in sweep(self.path):
            log.info("removed %s, a temporary file of a killed run", file)
        self.update(status=RUNNING, error=None, resumed=now())

    def finish(self, status: str, error: str | None = None) -> None:
        """Record the end of the run. On a full disk the reserved space is given back first."""
        (self.path / RESERVE).unlink(missing_ok=True)
        self.update(status=status, error=error, ended=now())

    def resume_hint(self) -> str:
        """How to go on with the run, or why that cannot be."""
        if not (self.path / CONFIG).is_file():
            return f"it ended before {CONFIG} was written, so it cannot be resumed; start it again"
        if self.manifest.get("data", {}).get("given") == "memory":
            source = self.manifest["data"]["source"]
            return (
                f"resume with: qfast.workflow.run.run(resume={str(self.path)!r}, data=...) and the same data ({source})"
            )
        return f"resume with: qfast run --resume {shlex.quote(str(self.path))}"

    def write_json(self, name: str, value: Any) -> None:
        self.write_text(name, json.dumps(_jsonable(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")

    def write_text(self, name: str, text: str) -> None:
        self.write_bytes(name, text.encode("utf-8"))

    def write_bytes(self, name: str, content: bytes) -> None:
        atomic_write(self.path / name, lambda file: file.write_bytes(content))

    def write_frame(self, stem: str, frame: pd.DataFrame) -> Path:
        return write_frame(self.path / f"{stem}.parquet", frame)

    def read_json(self, name: str) -> Any:
        try:
            return json.loads((self.path / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise CheckpointError(
                f"{str(self.path / name)!r} is missing; the run is {self.manifest['status']}."
            ) from None
        except (ValueError, OSError) as error:
            raise CheckpointError(f"{str(self.path / name)!r} cannot be read: {error}.") from None


@contextlib.contextmanager
def recorded(folder: RunFolder) -> Iterator[None]:
    """Record the outcome of the block as the status of the run: finished, interrupted or failed.

    A reopened run is left unchanged until its `restart`, so an error before it does not touch the folder.

    Raises
    ------
    QfastError
        The disk is full; the message says how to resume the run.
    """
    try:
        yield
        folder.finish(FINISHED)
    except KeyboardInterrupt:
        if folder.running:
            _finish_quietly(folder, INTERRUPTED, "interrupted")
            log.warning("interrupted; %s", folder.resume_hint())
        raise
    except BaseException as error:
        if not folder.running:
            raise
        _finish_quietly(folder, FAILED, f"{type(error).__name__}: {error}")
        if is_disk_full(error):
            raise QfastError(
                f"no space left on the disk while writing to {str(folder.path)!r}; the files there are complete. "
                f"Remedy: free some space, then {folder.resume_hint().removeprefix('resume with: ')}."
            ) from error
        raise


def _finish_quietly(folder: RunFolder, status: str, error: str) -> None:
    """Record a failure; an error of the recording itself is logged and must not replace the first one."""
    try:
        folder.finish(status, error)
    except Exception:
        log.exception("the manifest of %s could not be updated", folder.path)


def write_frame(target: Path, frame: pd.DataFrame) -> Path:
    """Write a Parquet file, or CSV where the name ends so or pyarrow is not installed; the path written."""
    _require_table_suffix(target)
    if target.suffix == ".parquet" and not _has_pyarrow():
        target = target.with_suffix(".csv")
    if target.suffix == ".parquet":
        atomic_write(target, lambda file: frame.to_parquet(file))
    else:
        atomic_write(target, lambda file: frame.to_csv(file, float_format="%.9g"))
    return target


def _require_table_suffix(target: Path) -> None:
    if target.suffix not in (".parquet", ".csv"):
        raise ConfigError(f"a table is written as .parquet or .csv, got {target.name!r}.")


def check_table_target(target: Path) -> None:
    """Refuse a target that `write_frame` could not write, before there is work to lose; makes its folder.

    Raises
    ------
    ConfigError
        Another suffix, a folder of that name, a parent that cannot be made or written to.
    """
    _require_table_suffix(target)
    if target.is_dir():
        raise ConfigError(f"{str(target)!r} is a folder; give the name of a file in it.")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"the folder {str(target.parent)!r} cannot be made: {error.strerror}.") from None
    if not os.access(target.parent, os.W_OK):
        raise ConfigError(f"the folder {str(target.parent)!r} cannot be written to; give another one.")


def read_frame(folder: Path, stem: str) -> pd.DataFrame:
    """Read what `write_frame` wrote as `stem`, indexed (datetime, instrument)."""
    file = folder / f"{stem}.parquet"
    if file.exists():
        return pd.read_parquet(file)
    table = pd.read_csv(folder / f"{stem}.csv", parse_dates=["datetime"], dtype={"instrument": str})
    return table.set_index(["datetime", "instrument"])


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    found = {"python": platform.python_version()}
    for name in ("qfast-models", "torch", "numpy", "pandas", "safetensors"):
        module = "qfast" if name == "qfast-models" else name
        try:
            found[module] = packages.version(name)
        except packages.PackageNotFoundError:
            found[module] = str(getattr(import_module(module), "__version__", "not installed"))
    return found


def environment() -> dict[str, Any]:
    """Versions, platform and command line, for the manifest."""
    return {
        "versions": versions(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "command": [os.path.basename(sys.argv[0] or "python"), *sys.argv[1:]],
        "directory": os.getcwd(),
    }


# ---------------------------------------------------------------- helpers
def _new_default(experiment: str) -> Path:
    name = re.sub(r"[^\w.-]+", "_", experiment).strip("._") or "run"
    stamp = dt.datetime.now(dt.timezone.utc).strftime("%Y%m%d-%H%M%S")
    return next(path for path in _numbered(Path("runs") / f"{name}-{stamp}") if _made(path))


def _made(path: Path) -> bool:
    """True if the folder is made by this call; another run of the same second may have it."""
    try:
        path.mkdir(parents=True)
    except FileExistsError:
        return False
    return True


def _numbered(path: Path) -> Iterator[Path]:
    yield path
    number = 2
    while True:
        yield path.with_name(f"{path.name}-{number}")
        number += 1


def _new_folder(path: Path) -> Path:
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(
            f"--output {str(path)!r} is there already and not empty; a run is never overwritten. Give another "
            f"folder, or go on with an unfinished run by --resume {path}."
        )
    path.mkdir(parents=True, exist_ok=True)
    return path


def _has_pyarrow() -> bool:
    try:
        import_module("pyarrow")
    except ImportError:
        return False
    return True


def now() -> str:
    return dt.datetime.fromtimestamp(time.time(), dt.timezone.utc).isoformat(timespec="seconds")


def _jsonable(value: Any) -> Any:
    """JSON has no NaN: a missing number becomes null. NumPy scalars and paths become plain values."""
    if isinstance(value, Mapping):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(item) for item in value]
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
