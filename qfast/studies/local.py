"""The local engine: worker processes on this machine."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO, Protocol

from qfast.studies.fork_server import ForkServer
from qfast.studies.tasks import LOST, Outcome, RunTask

__all__ = ["LocalEngine", "death_reason"]

STOP_SECONDS = 20.0  # time for a worker to record an interrupt before it is killed


class Process(Protocol):
    """A worker process."""

    @property
    def pid(self) -> int:
        """The process id, which is valid until `wait`."""

    def wait(self) -> int | None:
        """Wait for the end and return the exit status as `subprocess` does, or None if it is unknown."""


class ForkedProcess:
    """A worker process that is a copy of the fork server.

    Parameters
    ----------
    pid : int
    server : ForkServer
    """

    def __init__(self, pid: int, server: ForkServer) -> None:
        self.pid = pid
        self._server = server
        self._ended = False
        self._status: int | None = None

    def wait(self) -> int | None:
        """Wait for the end and return the exit status, or None if the server has died."""
        if not self._ended:
            self._status, self._ended = self._server.wait(self.pid), True
        return self._status


class LocalEngine:
    """Executes tasks in worker processes, each of which executes one task after another.

    Parameters
    ----------
    jobs : int
        Number of processes.
    threads : int
        Threads of each process, as OMP_NUM_THREADS.
    logs : Path
        Folder for the output of the workers before their first task.
    """

    def __init__(self, jobs: int, threads: int, logs: Path) -> None:
        self.slots = jobs
        self._threads, self._logs = threads, logs
        self._workers: list[_Worker] = []
        self._messages: queue.Queue[tuple[_Worker, str | None]] = queue.Queue()
        self._started = 0
        self._server: ForkServer | None = None

    def submit(self, task: RunTask) -> None:
        """Send the task to an idle worker, or to a new one."""
        worker = next((worker for worker in self._workers if worker.task is None and worker.is_alive), None)
        if worker is None:
            self._started += 1
            log = self._logs / f"worker-{self._started}.txt"
            worker = _Worker(self._start, log, self._messages)
            self._workers.append(worker)
        worker.send(task)

    def _start(self, stdin: int, stdout: int, stderr: int) -> Process:
        """Start a worker process with these files: a copy of the fork server, or a new process."""
        environment = _environment(self._threads)
        if self._server is None and ForkServer.is_available():
            self._server = ForkServer(environment, self._logs / "workers.txt")
        pid = None if self._server is None else self._server.start(stdin, stdout, stderr)
        if self._server is not None and pid is not None:
            return ForkedProcess(pid, self._server)
        return subprocess.Popen(
            [sys.executable, "-m", "qfast.studies.worker"],
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            env=environment,
            start_new_session=True,  # Ctrl-C reaches the study only, which then stops its workers in order
        )

    def wait(self) -> Sequence[Outcome]:
        """Wait for the next outcome."""
        while True:
            worker, line = self._messages.get()
            task, worker.task = worker.task, None
            if line is not None:
                return [Outcome(**json.loads(line))]
            self._workers.remove(worker)
            reason = worker.death_reason()
            if task is not None:
                return [Outcome(task.number, LOST, reason)]

    def close(self) -> None:
        """End idle workers, and interrupt the others, which record the interrupt in their run folders."""
        for worker in self._workers:
            worker.stop()
        for worker in self._workers:
            worker.join()
        self._workers = []
        if self._server is not None:
            self._server.close()


def _environment(threads: int) -> dict[str, str]:
    """Environment variables of a worker."""
    environment = dict(os.environ)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        environment[name] = str(threads)
    environment.setdefault("OMP_WAIT_POLICY", "passive")
    environment["PYTHONSAFEPATH"] = "1"  # a file torch.py in the working directory is not imported
    root = str(Path(__file__).resolve().parents[2])  # the worker imports the same qfast
    paths = [root, *filter(None, [environment.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    return environment


class _Worker:
    """A worker process and the thread that reads its answers."""

    def __init__(
        self,
        start: Callable[[int, int, int], Process],
        log: Path,
        messages: queue.Queue[tuple[_Worker, str | None]],
    ) -> None:
        self.task: RunTask | None = None
        self._log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        stdin, tasks = os.pipe()
        answers, stdout = os.pipe()
        self._tasks = os.fdopen(tasks, "wb")
        with os.fdopen(stdin), os.fdopen(stdout, "wb"), log.open("wb") as file:
            self._process = start(stdin, stdout, file.fileno())
        self._reader = threading.Thread(target=self._read, args=(os.fdopen(answers, "rb"), messages), daemon=True)
        self._reader.start()

    @property
    def is_alive(self) -> bool:
        """False once the process has closed its stdout, which it does when it ends."""
        return self._reader.is_alive()

    def _read(self, answers: BinaryIO, messages: queue.Queue[tuple[_Worker, str | None]]) -> None:
        with answers:
            for line in answers:
                messages.put((self, line.decode()))
        messages.put((self, None))

    def send(self, task: RunTask) -> None:
        """Send a task. If the worker has died, the reader reports it."""
        self.task = task
        self._write(json.dumps(task.plain(), default=str))

    def stop(self) -> None:
        """Tell an idle worker to end, and interrupt a busy one."""
        if self.task is None:
            self._write("")
        elif self.is_alive:
            os.kill(self._process.pid, signal.SIGTERM)

    def join(self) -> None:
        """Wait for the end of the process, and kill it if it does not end."""
        self._reader.join(STOP_SECONDS)
        if self.is_alive:
            os.kill(self._process.pid, signal.SIGKILL)
            self._reader.join()
        self._process.wait()
        with contextlib.suppress(OSError):
            self._tasks.close()

    def death_reason(self) -> str:
        """Why the process has ended."""
        last = self._log.read_text(errors="replace").strip().splitlines()[-1:] if self._log.exists() else []
        return death_reason(self._process.wait(), last[0] if last else "")

    def _write(self, line: str) -> None:
        with contextlib.suppress(OSError):
            self._tasks.write(line.encode() + b"\n")
            self._tasks.flush()


def death_reason(status: int | None, last_line: str = "") -> str:
    """Why a process with this exit status of `subprocess` has ended. None: the status is unknown.

    >>> death_reason(-9)
    'the process was killed by SIGKILL, which the system also sends when memory runs out'
    """
    if status is None:
        return "the process ended" + (f": {last_line}" if last_line else "")
    if status < 0:
        try:
            name = signal.Signals(-status).name
        except ValueError:
            name = f"signal {-status}"
        also = ", which the system also sends when memory runs out" if name == "SIGKILL" else ""
        return f"the process was killed by {name}{also}"
    return f"the process ended with status {status}" + (f": {last_line}" if last_line else "")
