"""The Ray engine: runs on the nodes of a Ray cluster, which share the study folder."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qfast.studies.tasks import LOST, Outcome, RunTask, execute

__all__ = ["RayEngine"]

log = logging.getLogger("qfast")

NODE_RETRIES = 2  # of Ray, on another node, before the study learns of the loss
CLIENT_PORT = "10001"  # on which Ray Client listens; the address then begins with ray://
STOP_SECONDS = 20.0  # time for runs to record an interrupt


class RayEngine:
    """Executes each task as a Ray task.

    All nodes must see the study folder and the data under the same paths, and have qfast installed. If a node dies, Ray
    starts its tasks on another node, where each run continues from its checkpoint.

    Parameters
    ----------
    address : str
        "HOST:PORT" of the head node or of Ray Client, or "" for the cluster that this machine belongs to. If there is
        none, Ray starts on this machine.
    jobs : int or None
        Number of tasks at the same time. None: as many as the cluster has resources for.
    threads : int
        CPUs of each task, and OMP_NUM_THREADS.
    gpus : float
        GPUs of each task. Fractions share a GPU.
    """

    def __init__(self, address: str, jobs: int | None, threads: int, gpus: float = 0.0) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        self._ray: Any = importlib.import_module("ray")
        self._own = not self._ray.is_initialized()
        if self._own:
            self._connect(address)
        self._jobs, self._needs = jobs, {"CPU": float(threads), "GPU": float(gpus)}
        environment = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
        root = str(Path(__file__).resolve().parents[2])  # the tasks import the same qfast
        environment |= {"OMP_WAIT_POLICY": "passive", "PYTHONPATH": _joined(root, os.environ.get("PYTHONPATH"))}
        self._function = self._ray.remote(_execute).options(
            num_cpus=threads,
            num_gpus=gpus,
            max_retries=NODE_RETRIES,
            runtime_env={"env_vars": environment},
        )
        self._tasks: dict[Any, RunTask] = {}

    @property
    def slots(self) -> int:
        """Number of tasks that the cluster can execute at the same time. It grows when nodes join."""
        if self._jobs is not None:
            return self._jobs
        available: Mapping[str, float] = self._ray.cluster_resources()
        counts = [int(available.get(name, 0.0) / need) for name, need in self._needs.items() if need > 0]
        return max(1, min(counts))

    def _connect(self, address: str) -> None:
        target = f"ray://{address}" if address.endswith(f":{CLIENT_PORT}") else address or None
        self._ray.init(target, logging_level=logging.WARNING, log_to_driver=False)

    def submit(self, task: RunTask) -> None:
        """Begin a task on a node with free resources."""
        self._tasks[self._function.remote(task.plain())] = task

    def wait(self) -> Sequence[Outcome]:
        """Wait for the next outcomes. A task whose worker died on every attempt is lost."""
        done, _ = self._ray.wait(list(self._tasks), num_returns=1)
        return [self._outcome(reference) for reference in done]

    def _outcome(self, reference: Any) -> Outcome:
        task = self._tasks.pop(reference)
        try:
            return Outcome(**self._ray.get(reference))
        except self._ray.exceptions.RayError as error:
            text = " ".join(str(error).split())
            return Outcome(task.number, LOST, f"{type(error).__name__}: {text[:300]}")

    def close(self) -> None:
        """Interrupt the tasks that are running, and disconnect from the cluster."""
        for reference in self._tasks:
            with contextlib.suppress(self._ray.exceptions.RayError, ValueError):
                self._ray.cancel(reference)  # raises KeyboardInterrupt in the task, which the run records
        if self._tasks:
            self._ray.wait(list(self._tasks), num_returns=len(self._tasks), timeout=STOP_SECONDS)
        self._tasks = {}
        if self._own:
            self._ray.shutdown()


def _joined(*paths: str | None) -> str:
    return os.pathsep.join(path for path in paths if path)


def _execute(plain: Mapping[str, Any]) -> dict[str, Any]:
    """The Ray task."""
    task = RunTask(**plain)
    with _log_to(Path(task.log)):
        return dict(vars(execute(task)))


@contextlib.contextmanager
def _log_to(file: Path) -> Iterator[None]:
    """Append the log of qfast to a file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(file)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        handler.close()
