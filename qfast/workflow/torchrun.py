"""A run over several processes: the process group of torchrun, the run folder that all ranks share, and restarts.

Rank 0 creates the folder and is the only writer. The other ranks receive its path and the seed, prepare the same job
and train with it. After a restart by torchrun, rank 0 continues the folder of the previous attempt.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import shutil
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
import torch.distributed as dist

from qfast.machine import usable_cores
from qfast.training.distributed import only_main_logs
from qfast.training.ranks import Ranks
from qfast.workflow.folder import MANIFEST, RunFolder, versions
from qfast.workflow.prepared import PreparedData
from qfast.workflow.resumption import MAY_DIFFER

if TYPE_CHECKING:
    from qfast.workflow.job import Job
    from qfast.workflow.run import RunResult

START_LIMIT = timedelta(minutes=10)  # in which all processes must start
FOLDER_KEY = "qfast/folder"

__all__ = [
    "FollowedFolder",
    "folder_to_continue",
    "is_launched",
    "joined",
    "require_same_run",
    "same_result",
    "share_run",
]

log = logging.getLogger("qfast")

_launcher_store: Any = None  # of torchrun; it survives restarts


class FollowedFolder(RunFolder):
    """The run folder as ranks other than rank 0 see it: they read it and write nothing."""

    writes = False

    def write_bytes(self, name: str, content: bytes) -> None:
        """Write nothing."""

    def write_frame(self, stem: str, frame: pd.DataFrame) -> Path:
        """Write nothing, and return the path that rank 0 writes to."""
        return self.path / f"{stem}.parquet"

    def restart(self) -> None:
        """Change nothing."""

    def finish(self, status: str, error: str | None = None) -> None:
        """Record nothing."""


@contextlib.contextmanager
def joined() -> Iterator[Ranks | None]:
    """The ranks of this run, or None in one process.

    Under torchrun the processes form a group for the duration of the block, with nccl on GPUs and gloo on CPUs, and
    share the cores of their machine. A group that exists already is used as it is.
    """
    if not is_launched() or dist.is_initialized():
        with _together(Ranks.current()) as ranks:
            yield ranks
        return
    _share_cores()
    _initialize()
    try:
        with _together(Ranks.current()) as ranks:
            yield ranks
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def _together(ranks: Ranks | None) -> Iterator[Ranks | None]:
    if ranks is None:
        yield None
        return
    with ranks.session(), only_main_logs(ranks):
        log.info("rank %d of %d, %d threads each", ranks.rank, ranks.size, torch.get_num_threads())
        yield ranks


def is_launched() -> bool:
    """Whether torchrun, or a launcher that sets the same variables, has started several processes."""
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return dist.is_available() and all(name in os.environ for name in names) and int(os.environ["WORLD_SIZE"]) > 1


def _initialize() -> None:
    """Create the process group. Its keys in the store of the launcher are separate for each attempt.

    torch's own initialization reads the addresses of the previous attempt after a restart, if the store survives it.
    """
    global _launcher_store
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    _launcher_store = dist.TCPStore(  # type: ignore[attr-defined]
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        world_size=size,
        is_master=rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
        timeout=START_LIMIT,
    )
    if torch.cuda.is_available():
        torch.cuda.set_device(_place_on_machine()[0] % torch.cuda.device_count())
    of_attempt = dist.PrefixStore(f"qfast/{_attempt()}", _launcher_store)  # type: ignore[attr-defined]
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
        store=of_attempt,
        rank=rank,
        world_size=size,
    )


def _attempt() -> int:
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def _share_cores() -> None:
    """Divide the cores of the machine among its processes.

    torchrun sets OMP_NUM_THREADS=1 if it is not set, which would leave cores idle. Any other value is kept.
    """
    _, processes = _place_on_machine()
    if os.environ.get("OMP_NUM_THREADS", "1") == "1":
        torch.set_num_threads(max(1, usable_cores() // processes))


# ---------------------------------------------------------------- what the ranks tell each other
def share_run(ranks: Ranks | None, folder: RunFolder, seed: int, *, resumed: bool) -> None:
    """Tell the other ranks the folder and the seed of the run, and store the folder for a restart by torchrun."""
    path = str(folder.path.resolve())
    if _launcher_store is not None:
        _launcher_store.set(FOLDER_KEY, path)
    if ranks is not None:
        ranks.publish("run", {"folder": path, "seed": seed, "resumed": resumed})


def data_of_machine(
    ranks: Ranks | None, job: Job, folder: RunFolder, stack: contextlib.ExitStack
) -> PreparedData | None:
    """Prepare the data once on this machine, for all of its ranks, which map it and share its memory.

    The data is in the run folder until `stack` ends. Returns None if every rank must prepare the data itself: it is the
    only one on its machine, or the handler cannot be pickled.
    """
    local_rank, local_size = _place_on_machine()
    if ranks is None or local_size == 1:
        return None
    number = ranks.rank // local_size
    if local_rank > 0:
        description = ranks.wait_for(f"data/{number}")
        return None if description is None else PreparedData.of(description)
    path = folder / f".data-{number}"
    shutil.rmtree(path, ignore_errors=True)  # of an attempt that was killed
    stack.callback(shutil.rmtree, path, ignore_errors=True)
    try:
        prepared = PreparedData.write(path, job.workflow, job.data, job.read_options)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        log.warning("every process prepares the data itself, because the handler cannot be shared: %s", error)
        prepared = None
    ranks.publish(f"data/{number}", None if prepared is None else prepared.description())
    return prepared


def _place_on_machine() -> tuple[int, int]:
    """Number of this process among those of its machine, and their number, as torchrun sets them."""
    return int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def require_same_run(ranks: Ranks, job: Job) -> None:
    """Check that all ranks run the same workflow on the same data with the same versions.

    Raises
    ------
    ConfigError
        On the rank that differs from rank 0.
    """
    facts: dict[str, object] = {f"the version of {name}": version for name, version in versions().items()}
    facts |= {f"the workflow at {key}": value for key, value in _flat(job.workflow.resolved()) if key not in MAY_DIFFER}
    facts["the content hash of the data"] = job.facts["hash"]
    ranks.require_same(facts, "the same command, files and environment on every machine")


def same_result(ranks: Ranks, result: RunResult) -> RunResult:
    """The result with the metrics of rank 0, on every rank. The ranks leave the run together."""
    if ranks.is_main:
        ranks.publish("result", {"metrics": result.metrics, "portfolio": result.portfolio})
    shared = ranks.wait_for("result")
    ranks.any(False)
    return replace(result, **shared)


def _flat(value: object, path: str = "") -> Iterator[tuple[str, object]]:
    """Keys and values of nested mappings, the keys joined with dots."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _flat(item, f"{path}.{key}" if path else str(key))
    else:
        yield path, str(value)


# ---------------------------------------------------------------- restarts
def folder_to_continue(output: str | os.PathLike[str] | None) -> str | None:
    """The run folder of the previous attempt, if torchrun has restarted the processes; otherwise None."""
    if _launcher_store is None or _attempt() == 0:
        return None
    if _launcher_store.check([FOLDER_KEY]):
        folder = _launcher_store.get(FOLDER_KEY).decode()
    elif output is not None and (Path(output) / MANIFEST).is_file():
        folder = os.fspath(output)
    else:
        log.warning("the run folder of the previous attempt is unknown: a new run begins")
        return None
    log.info("restart %d: continuing the run in %s", _attempt(), folder)
    return folder
