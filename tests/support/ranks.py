"""Runs functions in a group of processes of torch.distributed."""

from __future__ import annotations

import multiprocessing
import pickle
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

IMPORTED_ONCE = ["torch._dynamo", "qfast.workflow.run", "support.fits"]  # by the server from which the ranks are forked
LIMIT = 300  # seconds in which all ranks must end


def run_ranks(size: int, function: Callable[..., Any], folder: Path, *arguments: Any) -> list[Any]:
    """Call `function(rank, *arguments)` in `size` new processes, which form a process group with gloo.

    Returns the results of the ranks; for a rank that has failed, its exception. The result of a rank that has died is
    None.
    """
    store = folder / f"store-{size}-{function.__name__}"
    context = prepare_forks()
    processes = [
        context.Process(target=_run, args=(rank, size, function, str(store), arguments)) for rank in range(size)
    ]
    for process in processes:
        process.start()
    deadline = time.monotonic() + LIMIT
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        if process.exitcode is None:
            process.kill()
    return [_read(Path(f"{store}.{rank}")) for rank in range(size)]


def prepare_forks() -> Any:
    """The context whose processes are forked from a server that has imported torch and qfast."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED_ONCE)
    return context


def _read(file: Path) -> Any:
    return pickle.loads(file.read_bytes()) if file.exists() else None


def _run(rank: int, size: int, function: Callable[..., Any], store: str, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=100))
    result: Any
    try:
        result = function(rank, *arguments)
    except Exception as error:
        result = error
    Path(f"{store}.{rank}").write_bytes(pickle.dumps(result))
    dist.destroy_process_group()
