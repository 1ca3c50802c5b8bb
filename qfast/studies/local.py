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
from collections.abc import Sequence
from pathlib import Path

from qfast.studies.tasks import LOST, Outcome, RunTask

__all__ = ["LocalEngine", "death_reason"]

STOP_SECONDS = 20.0  # time for a worker to record an interrupt before it is killed


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

    def submit(self, task: RunTask) -> None:
        """Send the task to an idle worker, or to a new one."""
        idle = (worker for worker in self._workers if worker.task is None and worker.process.poll() is None)
        worker = next(idle, None)
        if worker is None:
            self._started += 1
            log = self._logs / f"worker-{self._started}.txt"
            worker = _Worker(self._environment(), log, self._messages)
            self._workers.append(worker)
        worker.send(task)

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

    def _environment(self) -> dict[str, str]:
        environment = dict(os.environ)
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
            environment[name] = str(self._threads)
        environment.setdefault("OMP_WAIT_POLICY", "passive")
        environment["PYTHONSAFEPATH"] = "1"  # a file torch.py in the working directory is not imported
        root = str(Path(__file__).resolve().parents[2])  # the worker imports the same qfast
        paths = [root, *filter(None, [environment.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(paths)
        return environment


class _Worker:
    """A worker process and the thread that reads its answers."""

    def __init__(
        self, environment: dict[str, str], log: Path, messages: queue.Queue[tuple[_Worker, str | None]]
    ) -> None:
        self.task: RunTask | None = None
        self._log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "qfast.studies.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                env=environment,
                start_new_session=True,  # Ctrl-C reaches the study only, which then stops its workers in order
            )
        threading.Thread(target=self._read, args=(messages,), daemon=True).start()

    def _read(self, messages: queue.Queue[tuple[_Worker, str | None]]) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            messages.put((self, line.decode()))
        self.process.wait()
        messages.put((self, None))

    def send(self, task: RunTask) -> None:
        """Send a task. If the worker has died, the reader reports it."""
        self.task = task
        self._write(json.dumps(task.plain(), default=str))

    def stop(self) -> None:
        """Tell an idle worker to end, and interrupt a busy one."""
        if self.task is None:
            self._write("")
        else:
            self.process.send_signal(signal.SIGTERM)

    def join(self) -> None:
        """Wait for the end of the process, and kill it if it does not end."""
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()

    def death_reason(self) -> str:
        """Why the process has ended."""
        last = self._log.read_text(errors="replace").strip().splitlines()[-1:] if self._log.exists() else []
        return death_reason(self.process.returncode, last[0] if last else "")

    def _write(self, line: str) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.write(line.encode() + b"\n")
            self.process.stdin.flush()


def death_reason(status: int, last_line: str = "") -> str:
    """Why a process with this exit status of `subprocess` has ended.

    >>> death_reason(-9)
    'the process was killed by SIGKILL, which the system also sends when memory runs out'
    """
    if status < 0:
        try:
            name = signal.Signals(-status).name
        except ValueError:
            name = f"signal {-status}"
        also = ", which the system also sends when memory runs out" if name == "SIGKILL" else ""
        return f"the process was killed by {name}{also}"
    return f"the process ended with status {status}" + (f": {last_line}" if last_line else "")
