"""One run of a study as a task: plain data that any engine can send to another process, and its execution there."""

from __future__ import annotations

import contextlib
import logging
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qfast.errors import ConfigError, QfastError
from qfast.files import locked
from qfast.training.callbacks import Callback
from qfast.workflow.folder import FAILED, FINISHED, MANIFEST, RunFolder
from qfast.workflow.prepared import PreparedData
from qfast.workflow.run import run

__all__ = ["LOST", "Outcome", "RunTask", "execute"]

log = logging.getLogger("qfast")

LOST = "lost"  # status of a run whose process or node has died
LOCK_SECONDS = 60.0  # time for the worker of a killed study to notice that it is alone


@dataclass(frozen=True)
class RunTask:
    """A run, with everything that another process needs to execute or continue it.

    Attributes
    ----------
    number : int
        Number of the run in the study.
    folder : str
        Absolute path of the run folder.
    config : str
        Absolute path of the run's workflow file.
    seed : int
    prepared : dict
        `PreparedData.description` of the run's data.
    data : str or None
        Path of the data, for the manifest; None: the workflow locates it, or it was in memory.
    read_options : dict
    device : str or None
    allow_code : list of str
    init_from : str or None
        Run folder whose weights the training starts from, as in `qfast.run`.
    trial : dict or None
        Trial of a search that may stop the run early, see `qfast.studies.search.Pruning`.
    log : str
        File that receives the output of the run.
    """

    number: int
    folder: str
    config: str
    seed: int
    prepared: Mapping[str, Any]
    data: str | None = None
    read_options: Mapping[str, Any] = field(default_factory=dict)
    device: str | None = None
    allow_code: tuple[str, ...] = ()
    init_from: str | None = None
    trial: Mapping[str, Any] | None = None
    log: str = ""

    def plain(self) -> dict[str, Any]:
        """The task as plain data, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Outcome:
    """The end of a run.

    Attributes
    ----------
    number : int
    status : {"finished", "failed", "lost"}
    reason : str
        Why the run failed.
    """

    number: int
    status: str
    reason: str = ""


def execute(task: RunTask) -> Outcome:
    """Run a task in this process, or continue it in its folder. A finished run is left unchanged.

    Returns
    -------
    Outcome
        An exception of the run is the reason of status "failed". KeyboardInterrupt is raised.
    """
    try:
        with _run_folder(task) as resume:
            if resume is not None and RunFolder.open(resume).manifest["status"] == FINISHED:
                return Outcome(task.number, FINISHED)
            _run(task, resume)
    except (Exception, SystemExit) as error:  # a class of the user may call sys.exit
        log.exception("run %03d failed", task.number)
        return Outcome(task.number, FAILED, reason_of(error))
    return Outcome(task.number, FINISHED)


def reason_of(error: BaseException) -> str:
    """An error in one line.

    >>> reason_of(MemoryError())
    'out of memory (MemoryError)'
    """
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError) or "can't allocate memory" in text or "CUDA out of memory" in text:
        return f"out of memory ({text or type(error).__name__})"
    return text if isinstance(error, QfastError) else f"{type(error).__name__}: {text}"


def _run(task: RunTask, resume: Path | None) -> None:
    prepared = PreparedData.of(task.prepared)
    callbacks: list[Callback] = []
    if task.trial is not None:
        from qfast.studies.search import Pruning

        callbacks.append(Pruning(task.trial, Path(task.folder), prepared))
    source = {
        "config_path": task.config,
        "output": task.folder,
        "seed": task.seed,
        "device": task.device,
        "init_from": task.init_from,
    }
    run(
        **({"resume": resume} if resume is not None else source),
        data=task.data if task.data is not None else prepared.data,
        callbacks=callbacks,
        allow_code=task.allow_code or None,
        read_options=task.read_options or None,
        prepared=prepared,
    )


@contextlib.contextmanager
def _run_folder(task: RunTask) -> Iterator[Path | None]:
    """The run folder if it contains a run to continue, otherwise None.

    A folder without a manifest remains if a run is killed while it begins. It contains nothing of value.
    """
    folder = Path(task.folder)
    if folder.is_dir():
        _wait_until_unlocked(folder)
        if not (folder / MANIFEST).is_file():
            shutil.rmtree(folder)
    yield folder if folder.is_dir() else None


def _wait_until_unlocked(folder: Path) -> None:
    """Wait while the worker of a killed study still writes to the folder."""
    deadline = time.monotonic() + LOCK_SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(ConfigError), locked(folder):
            return
        time.sleep(0.1)
    with locked(folder):  # raises the error that names the folder
        return
