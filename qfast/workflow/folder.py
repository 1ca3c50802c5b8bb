"""The run folder: files are written atomically, and the manifest records the status of the run."""

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
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from importlib import metadata as packages
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd

from qfast.errors import CheckpointError, ConfigError, QfastError
from qfast.files import (
    LOCK,
    atomic_write,
    file_hash,
    is_disk_full,
    is_locked,
    is_temporary,
    locked,
    require_file_target,
    sweep,
)
from qfast.workflow.saved_facts import RESTORE, Manifest, require_structure
from qfast.workflow.user_code import option_text

__all__ = ["RunFolder", "check_table_target", "read_frame", "recorded", "versions", "write_frame"]

log = logging.getLogger("qfast")

MANIFEST = "manifest.json"
CONFIG = "config.yaml"
BEST = "best.safetensors"  # weights of the best epoch so far
WEIGHTS = "weights"  # key of the manifest: SHA-256 hashes of the weight files
LAST = "last.safetensors"  # the state that training resumes from
HISTORY = "history.csv"
NEW = ".new"  # in a folder whose manifest is not written yet
RESERVE = ".reserve"
RESERVE_BYTES = 256 * 1024  # freed on a full disk, so the manifest can still be updated
EARLY = (NEW, RESERVE, LOCK, CONFIG, "workflow.yaml")  # files that exist before the manifest of a run or study
RUNNING, FINISHED, FAILED, INTERRUPTED = "running", "finished", "failed", "interrupted"


class RunFolder:
    """The files of one run.

    Attributes
    ----------
    path : Path
    manifest : dict
        The content of `manifest.json`. Use `update` to change it.
    running : bool
        True if this process has created or restarted the run.
    writes : bool
        Whether this process writes files. Over several processes, only one does.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as base:
    ...     folder = RunFolder.create(Path(base, "run"), "demo")
    ...     folder.update(seed=3)
    ...     RunFolder.open(folder.path).manifest["seed"]
    3
    """

    writes: ClassVar[bool] = True

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.manifest = manifest
        self.running = False

    @classmethod
    def create(
        cls, output: str | os.PathLike[str] | None, experiment: str, config_text: str | None = None, **fields: Any
    ) -> RunFolder:
        """Create a folder, which never overwrites an existing run.

        The manifest is written last, so a folder with a manifest contains everything that resuming needs.

        Parameters
        ----------
        output : path or None
            None: runs/<experiment>-<UTC time>.
        experiment : str
        config_text : str, optional
            Content of config.yaml.
        **fields
            Fields of the manifest.

        Raises
        ------
        ConfigError
            `output` exists and is not empty, or cannot be created.
        """
        try:
            path = new_default(experiment) if output is None else new_folder(Path(output))
        except OSError as error:
            raise ConfigError(
                f"the run folder {str(output or 'runs')!r} cannot be created: {error.strerror}."
            ) from None
        folder = cls(path, {"format": 1, "experiment": experiment, "status": RUNNING, "started": now(), "error": None})
        folder.running = True
        with new_content(path, (MANIFEST, CONFIG, RESERVE)):
            (path / RESERVE).write_bytes(b"\0" * RESERVE_BYTES)
            if config_text is not None:
                folder.write_text(CONFIG, config_text)
            folder.update(**fields)
        return folder

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> RunFolder:
        """Open the run in `path`.

        Raises
        ------
        ConfigError
            The folder does not exist or does not contain a run.
        """
        folder = Path(path)
        if not folder.is_dir():
            raise ConfigError(f"run folder {str(path)!r} does not exist.")
        try:
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        except FileNotFoundError:
            if _was_killed_early(folder):
                raise ConfigError(
                    f"the run in {str(path)!r} was killed before its {MANIFEST} was written, so there is nothing to "
                    f"continue. Remedy: start it again with --output {shlex.quote(str(path))}."
                ) from None
            raise ConfigError(
                f"{str(path)!r} is not a run folder: it has no {MANIFEST}. Remedy: pass a folder that 'qfast run' has "
                "written."
            ) from None
        except (ValueError, OSError, RecursionError) as error:
            raise ConfigError(f"{str(folder / MANIFEST)!r} cannot be read: {error}. {RESTORE}") from None
        if not isinstance(manifest, dict) or "status" not in manifest:
            raise ConfigError(f"{str(folder / MANIFEST)!r} is not the manifest of a run.")
        require_structure(Manifest, manifest, folder / MANIFEST, ConfigError)
        return cls(folder, manifest)

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    # ---------------------------------------------------------------- writing
    def update(self, **fields: object) -> None:
        """Set fields of the manifest and write it to the file."""
        self.manifest.update(fields)
        self.write_json(MANIFEST, self.manifest)

    def restart(self) -> None:
        """Set the status of a reopened run to running, and remove the temporary files of a killed process."""
        self.running = True
        for file in sweep(self.path):
            log.info("removed %s, a temporary file of a killed run", file)
        self.manifest.pop(WEIGHTS, None)
        self.update(status=RUNNING, error=None, resumed=now())

    def finish(self, status: str, error: str | None = None) -> None:
        """Record the end of the run. The reserved disk space is freed first, in case the disk is full."""
        (self.path / RESERVE).unlink(missing_ok=True)
        if (self.path / BEST).is_file():
            self.manifest[WEIGHTS] = {BEST: file_hash(self.path / BEST)}
        self.update(status=status, error=error, ended=now())

    def replaced_file(self, name: str) -> str | None:
        """A warning if a file of the run has another content than at the end of the run, otherwise None."""
        recorded = self.manifest.get(WEIGHTS, {}).get(name)
        file = self.path / name
        if recorded is None or not file.is_file() or file_hash(file) == recorded:
            return None
        return (
            f"{file} has been replaced since the run ended (its SHA-256 differs from the manifest), so metrics and "
            "scores in the folder belong to other weights. Remedy: restore the file, and pass other weights with "
            "--weights FILE"
        )

    def resume_hint(self) -> str:
        """How to resume the run, or why that is impossible."""
        if not (self.path / CONFIG).is_file():
            return f"it ended before {CONFIG} was written, so it cannot be resumed; start a new run"
        if self.manifest.get("data", {}).get("given") == "memory":
            source = self.manifest["data"]["source"]
            return f"resume with: qfast.run(resume={str(self.path)!r}, data=...) and the same data ({source})"
        option = option_text(self.manifest)
        return f"resume with: qfast run --resume {shlex.quote(str(self.path))}" + (f" {option}" if option else "")

    def write_json(self, name: str, value: object) -> None:
        """Write a JSON file. NaN and infinity become null."""
        self.write_text(name, json.dumps(_jsonable(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """Write a UTF-8 text file."""
        self.write_bytes(name, text.encode("utf-8"))

    def write_bytes(self, name: str, content: bytes) -> None:
        """Write a binary file."""
        atomic_write(self.path / name, lambda file: file.write_bytes(content))

    def write_frame(self, stem: str, frame: pd.DataFrame) -> Path:
        """Write a table as Parquet, or as CSV without pyarrow, and return its path."""
        return write_frame(self.path / f"{stem}.parquet", frame)

    def read_json(self, name: str) -> Any:
        """Read a JSON file.

        Raises
        ------
        CheckpointError
            The file is missing or cannot be read.
        """
        try:
            return json.loads((self.path / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise CheckpointError(
                f"{str(self.path / name)!r} is missing; the run is {self.manifest['status']}."
            ) from None
        except (ValueError, OSError, RecursionError) as error:
            raise CheckpointError(f"{str(self.path / name)!r} cannot be read: {error}. {RESTORE}") from None


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
    except Exception as failure:
        log.error("the manifest of %s could not be updated: %s: %s", folder.path, type(failure).__name__, failure)


def write_frame(target: Path, frame: pd.DataFrame) -> Path:
    """Write a table as Parquet, or as CSV if the name ends in .csv or pyarrow is not installed.

    Parameters
    ----------
    target : Path
        Name with suffix .parquet or .csv.
    frame : DataFrame

    Returns
    -------
    Path
        The written file.

    Raises
    ------
    ConfigError
        Another suffix.
    """
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
        raise ConfigError(f"the suffix of a table must be .parquet or .csv, got {target.name!r}.")


def check_table_target(target: Path) -> None:
    """Check that `write_frame` can write to `target`, and create its folder.

    Raises
    ------
    ConfigError
        Another suffix than .parquet or .csv, an existing folder of that name, or a parent folder that cannot be created
        or written to.
    """
    _require_table_suffix(target)
    require_file_target(target, "output")


def read_frame(folder: Path, stem: str) -> pd.DataFrame:
    """Read the table `stem` that `write_frame` has written, indexed by (datetime, instrument)."""
    file = folder / f"{stem}.parquet"
    if file.exists():
        return pd.read_parquet(file)
    table = pd.read_csv(folder / f"{stem}.csv", parse_dates=["datetime"], dtype={"instrument": str})
    return table.set_index(["datetime", "instrument"])


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that the results depend on."""
    installed = {"python": platform.python_version()}
    for name in ("qfast-models", "torch", "numpy", "pandas", "safetensors"):
        module = "qfast" if name == "qfast-models" else name
        try:
            installed[module] = packages.version(name)
        except packages.PackageNotFoundError:
            installed[module] = str(getattr(import_module(module), "__version__", "not installed"))
    return installed


def environment() -> dict[str, object]:
    """Versions, platform and command line, for the manifest."""
    return {
        "versions": versions(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "command": [_program(), *sys.argv[1:]],
        "directory": os.getcwd(),
    }


# ---------------------------------------------------------------- helpers
def _program() -> str:
    """The name of the running program: "qfast" also for `python -m qfast`, whose file is `__main__.py`."""
    file = Path(sys.argv[0] or "python")
    package = Path(__file__).resolve().parents[1]
    return "qfast" if file.suffix == ".py" and file.resolve().parent == package else file.name


def new_default(experiment: str, parent: str = "runs") -> Path:
    """Create the default folder of a run: <parent>/<experiment>-<UTC time>."""
    name = re.sub(r"[^\w.-]+", "_", experiment).strip("._") or "run"
    stamp = dt.datetime.now(dt.timezone.utc).strftime("%Y%m%d-%H%M%S")
    return next(path for path in _numbered(Path(parent) / f"{name}-{stamp}") if _create(path))


def _create(path: Path) -> bool:
    """True if this call creates the folder; a run that started in the same second may already have created it."""
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


def new_folder(path: Path) -> Path:
    """Create the folder that a user has named.

    The remains of a run that was killed before its manifest was written are removed.

    Raises
    ------
    ConfigError
        It contains other files, or another process is creating a run in it.
    """
    if _was_killed_early(path):
        if is_locked(path):
            raise ConfigError(
                f"--output {str(path)!r}: another process is creating a run there. Remedy: another folder."
            )
        log.info("removing the remains of a run in %s that was killed before it began", path)
        for entry in path.iterdir():
            entry.unlink()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(
            f"--output {str(path)!r} exists and is not empty; a run is never overwritten. Remedy: another folder, or "
            f"--resume {path} to continue an unfinished run."
        )
    path.mkdir(parents=True, exist_ok=True)
    return path


def _was_killed_early(path: Path) -> bool:
    """Whether a folder contains only the files that a run writes before its manifest."""
    if not path.is_dir():
        return False
    names = [entry.name for entry in path.iterdir() if entry.is_file() and not entry.is_symlink()]
    complete = len(names) == sum(1 for _ in path.iterdir())
    # Earlier versions begin with the reserved disk space.
    begun = NEW in names or RESERVE in names
    return complete and begun and all(name in EARLY or is_temporary(name) for name in names)


@contextlib.contextmanager
def new_content(path: Path, names: Sequence[str]) -> Iterator[None]:
    """Write the first files of a new folder, which is marked and locked until the block ends.

    Parameters
    ----------
    path : Path
        The folder. It is removed if the block raises an error.
    names : sequence of str
        The files that the block writes.

    Raises
    ------
    ConfigError
        The folder cannot be written to, or another process is creating a run in it.
    """
    try:
        with locked(path):
            try:
                (path / NEW).touch()
                yield
                (path / NEW).unlink()
            except BaseException:  # an incomplete folder must not block the next attempt
                for name in (*names, NEW):
                    with contextlib.suppress(OSError):
                        (path / name).unlink(missing_ok=True)
                raise
    except BaseException as error:
        with contextlib.suppress(OSError):
            path.rmdir()
        if isinstance(error, OSError) and not is_disk_full(error):
            raise ConfigError(
                f"the folder {str(path)!r} cannot be written to: {error.strerror}. Remedy: another --output."
            ) from None
        raise


def _has_pyarrow() -> bool:
    try:
        import_module("pyarrow")
    except ImportError:
        return False
    return True


def now() -> str:
    """The current UTC time as ISO text, to the second."""
    return dt.datetime.fromtimestamp(time.time(), dt.timezone.utc).isoformat(timespec="seconds")


def _jsonable(value: object) -> object:
    """Replace NaN and infinity by None, which JSON can represent, and NumPy scalars and paths by plain values."""
    if isinstance(value, Mapping):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(item) for item in value]
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
