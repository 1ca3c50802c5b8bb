"""Processes that are killed at a chosen moment: forked children with a trap, and the wait for their end."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torture.protocol import Case, Fault

Moment = Case  # {"signal": name, "at": place, "number": count, "after": whether the place was passed}
PLACES = {"replace": 2.0, "fsync": 1.0, "batch": 2.0, "bytes": 3.0, "time": 2.0}  # where a process dies -> frequency
INTERRUPTED = 130
POLL_SECONDS = 0.002


class Victim:
    """A forked child that runs `function` until it ends or dies at a moment.

    The parent must not have started threads: it imports everything and leaves all work to its children.

    Parameters
    ----------
    function : callable
        Returns the exit status.
    log : Path
        File for the child's output.
    moment : Moment, optional
        When the child dies. By default it lives.
    """

    def __init__(self, function: Callable[[], int], log: Path, moment: Moment | None = None) -> None:
        self._log, self._moment, self._begin = log, moment, time.monotonic()
        log.touch()
        # A signal that arrives before the child has its handlers must not raise an error in the code of the parent.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGTERM])
        self._pid = os.fork()
        if self._pid == 0:
            os._exit(self._live(function))
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _live(self, function: Callable[[], int]) -> int:
        try:
            output = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            os.dup2(output, 1)
            os.dup2(output, 2)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT, signal.SIGTERM])
            if self._moment is not None:
                set_trap(self._moment)
            return function()
        except KeyboardInterrupt:
            return INTERRUPTED
        except BaseException:
            os.write(2, traceback.format_exc().encode())
            return 70

    def wait(self, seconds: float) -> int:
        """The exit status, or minus the signal that ended the child. A child that needs more time is a fault."""
        while True:
            pid, status = os.waitpid(self._pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            age = time.monotonic() - self._begin
            if self._moment is not None and self._moment["at"] == "time" and age > self._moment["number"] / 1000:
                self.send(self._moment["signal"])
                self._moment = None
            if age > seconds:
                self.send("SIGKILL")
                os.waitpid(self._pid, 0)
                raise Fault(f"a process has not ended within {seconds:g} s; its output:\n{self._log.read_text()}")
            time.sleep(POLL_SECONDS)

    def send(self, name: str) -> None:
        """Send a signal to the child."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid, signal.Signals[name])


def was_killed(status: int) -> bool:
    """Whether a child died at its moment, and did not end before."""
    return status == INTERRUPTED or -status in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGXFSZ)


# ---------------------------------------------------------------- traps
def set_trap(moment: Moment) -> None:
    """Let this process die at the moment: at the N-th rename, sync or batch, or when a file exceeds N bytes."""
    if moment["at"] == "bytes":  # the kernel ends the process in the middle of a write
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (moment["number"], hard))
        return
    if moment["at"] == "time":  # the parent sends the signal
        return
    from qfast.training.estimator import Estimator

    owner, name = {"replace": (os, "replace"), "fsync": (os, "fsync"), "batch": (Estimator, "train_step")}[moment["at"]]
    real, calls = getattr(owner, name), _counted()

    def trapped(*arguments: Any, **options: Any) -> Any:
        reached = next(calls) == moment["number"]
        if reached and not moment["after"]:
            _die(moment)
        result = real(*arguments, **options)
        if reached and moment["after"]:
            _die(moment)
        return result

    setattr(owner, name, trapped)


def _counted() -> Iterator[int]:
    number = 0
    while True:
        yield number
        number += 1


def _die(moment: Moment) -> None:
    os.kill(os.getpid(), signal.Signals[moment["signal"]])
