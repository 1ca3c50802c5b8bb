"""Starts worker processes as copies of one process that has imported qfast, which takes seconds in a new process.

The server imports everything that a run needs and then waits. It has no threads and runs no operator, because threads,
for example those of OpenMP, do not exist in a copy. Each request is one message of a socket: "start" with the files for
stdin, stdout and stderr of a new worker, or "wait" for the end of a worker. The server ends when the socket is closed,
which the operating system does when the study's process dies.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

from qfast.studies import worker

__all__ = ["ForkServer"]

STDIN, STDOUT, STDERR = 0, 1, 2
IMPORTED = ("qfast.models.ts", "pyarrow.dataset", "matplotlib.backends.backend_agg", "matplotlib.dates")
HARMLESS_THREADS = {"jemalloc_bg_thd"}  # of pyarrow's allocator, which restarts it in a copy of the process
LONGEST_MESSAGE = 64


class ForkServer:
    """The server, as the study's process sees it. All methods may be called from several threads.

    Parameters
    ----------
    environment : mapping
        Environment of the server and of the workers.
    log : Path
        Receives the output of the server.
    """

    def __init__(self, environment: Mapping[str, str], log: Path) -> None:
        self._lock = threading.Lock()
        self._socket, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        log.parent.mkdir(parents=True, exist_ok=True)
        with other, log.open("wb") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "qfast.studies.fork_server", str(other.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env=dict(environment),
                pass_fds=[other.fileno()],
                start_new_session=True,  # Ctrl-C must reach the study only
            )

    @staticmethod
    def is_available() -> bool:
        """True on Linux, where the number of threads of a process is known."""
        return sys.platform == "linux"

    def start(self, stdin: int, stdout: int, stderr: int) -> int | None:
        """Start a worker with these file descriptors, and return its process id; None if that is not possible."""
        return self._answer(b"start", [stdin, stdout, stderr]) or None

    def wait(self, pid: int) -> int | None:
        """Wait for the end of a worker that is ending, and return its exit status as `subprocess` does.

        None if the status is unknown because the server has died.
        """
        return self._answer(f"wait {pid}".encode(), [])

    def close(self) -> None:
        """End the server. Workers that are still running remain."""
        self._socket.close()
        self._process.wait()

    def _answer(self, message: bytes, files: list[int]) -> int | None:
        with self._lock, contextlib.suppress(OSError):
            socket.send_fds(self._socket, [message], files)
            if answer := self._socket.recv(LONGEST_MESSAGE):
                return int(answer)
        return None


def serve(connection: socket.socket) -> int:
    """Answer requests until the socket is closed. Returns in the server, and in each worker at its end."""
    while True:
        message, files, _, _ = socket.recv_fds(connection, LONGEST_MESSAGE, maxfds=3)
        command, *arguments = message.decode().split() or ["end"]
        if command == "end":
            return 0
        if command == "wait":
            answer = os.waitstatus_to_exitcode(os.waitpid(int(arguments[0]), 0)[1])
        elif not _can_fork():
            answer = 0
        else:
            answer = os.fork()
            if answer == 0:
                connection.close()
                return _work(files)
        for file in files:
            os.close(file)
        connection.send(str(answer).encode())


def _work(files: list[int]) -> int:
    """Become a worker with these files, and return its exit status."""
    os.setsid()
    for file, target in zip(files, (STDIN, STDOUT, STDERR), strict=True):
        os.dup2(file, target)
        os.close(file)
    return worker.main()


def _can_fork() -> bool:
    """Whether the process has no threads that a copy would lack."""
    others = [task for task in os.listdir("/proc/self/task") if task != str(os.getpid())]
    return {Path(f"/proc/self/task/{task}/comm").read_text().strip() for task in others} <= HARMLESS_THREADS


def main() -> int:
    """Import everything and serve the socket whose file descriptor is the argument."""
    for name in IMPORTED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # a collection in a copy must not write to the pages of all objects
    return serve(socket.socket(fileno=int(sys.argv[1])))


if __name__ == "__main__":
    sys.exit(main())
