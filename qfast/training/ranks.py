"""The processes of a torch.distributed group: what they exchange, and what one of them learns when another one fails.

`Ranks` adds to torch.distributed what a training run needs: an error of one process ends all processes with its
message, and a process that dies is named. Collectives therefore wait in short intervals, and between them look at the
group's key-value store, where a failing process leaves its message and every process a sign of life.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from qfast.errors import ConfigError, QfastError, RankError, shown

POLL = 2.0  # seconds between two looks at the store while waiting
BEAT = 3.0  # seconds between two signs of life
SILENCE = 45.0  # seconds without a sign of life after which a process on another machine counts as dead
GRACE = 15.0  # seconds in which the cause of a lost connection is searched

__all__ = ["Ranks", "writes_files"]


class Ranks:
    """This process among the processes of torch.distributed's default group.

    Attributes
    ----------
    rank, size : int
        Number of this process, and number of processes.
    message_device : torch.device
        Device of small tensors that the ranks exchange.

    Examples
    --------
    Outside of a process group there are no ranks:

    >>> Ranks.current() is None
    True
    """

    _of_group: ClassVar[tuple[Any, Ranks] | None] = None

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._store: Any = dist.distributed_c10d._get_default_store()
        has_cpu = str(dist.get_backend()) != "nccl"
        self.message_device = torch.device("cpu" if has_cpu else "cuda")
        self._sessions = 0  # sessions that this process has entered
        self._depth = 0
        self._messages = 0
        self._last_beats: dict[int, tuple[bytes, float]] = {}  # rank -> last sign of life, and when it was seen first
        self._store.set(f"qfast/process/{self.rank}", json.dumps({"machine": _machine(), "pid": os.getpid()}))

    @classmethod
    def current(cls) -> Ranks | None:
        """The ranks of the initialized process group; None without a group, or in a group of one process."""
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return None
        group = dist.group.WORLD
        if cls._of_group is None or cls._of_group[0] is not group:
            cls._of_group = (group, cls())
        return cls._of_group[1]

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the only process that writes files and logs."""
        return self.rank == 0

    # ---------------------------------------------------------------- failures
    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        """Work that all ranks do together. An error in it on one rank ends it on all of them.

        Raises
        ------
        RankError
            Another rank has failed or died. The message contains its error.
        """
        if self._depth:
            yield
            return
        self._sessions += 1
        self._messages = 0
        self._last_beats.clear()
        stop = threading.Event()
        threading.Thread(target=self._beat, args=(stop,), daemon=True).start()
        self._depth += 1
        try:
            yield
        except BaseException as error:
            self._report(error)
            raise
        finally:
            self._depth -= 1
            stop.set()

    def require_alive(self) -> None:
        """Raise a RankError if another rank has reported an error or has died."""
        key = self._key("error")
        if self._store.check([key]):
            raise RankError(self._store.get(key).decode())
        for rank in range(self.size):
            if rank != self.rank and (where := self._where_it_died(rank)):
                raise RankError(
                    f"rank {rank} ({where}) has ended without an error message: it was killed, or it did not call fit "
                    "or predict like the other ranks. Remedy: look at its output; a killed process often lacked memory."
                )

    def _report(self, error: BaseException) -> None:
        """Store an error for the other ranks, unless one of them was faster."""
        if isinstance(error, RankError):
            text = str(error)
        else:
            named = str(error) if isinstance(error, QfastError) else f"{type(error).__name__}: {error}"
            text = f"rank {self.rank} failed: {named}"
        with contextlib.suppress(RuntimeError):  # the store has ended with the process that hosted it
            if self._store.add(self._key("errors"), 1) == 1:
                self._store.set(self._key("error"), text)

    def _where_it_died(self, rank: int) -> str | None:
        """Process and machine of a rank that has died; None if it is alive, or has not begun."""
        if not self._store.check([f"qfast/process/{rank}"]):
            return None
        process = json.loads(self._store.get(f"qfast/process/{rank}"))
        where = f"process {process['pid']} on {process['machine'].split('/')[0]}"
        if process["machine"] == _machine():
            return None if _is_running(process["pid"]) else where
        key = self._key(f"alive/{rank}")
        if not self._store.check([key]):
            return None
        beat, now = self._store.get(key), time.monotonic()
        if self._last_beats.get(rank, (b"", 0.0))[0] != beat:
            self._last_beats[rank] = (beat, now)
        return where if now - self._last_beats[rank][1] > SILENCE else None

    def _beat(self, stop: threading.Event) -> None:
        """Write a sign of life until the session ends."""
        with contextlib.suppress(RuntimeError):
            store = self._store.clone()  # a connection of its own: the other one may be busy
            number = 0
            while not stop.wait(BEAT if number else 0.0):
                number += 1
                store.set(self._key(f"alive/{self.rank}"), str(number))

    def _explain(self, lost: BaseException) -> RankError:
        """The error for a collective that has failed: that of the rank which caused it, if it can be found."""
        deadline = time.monotonic() + GRACE
        while time.monotonic() < deadline:
            try:
                self.require_alive()
            except RankError as error:
                return error
            except RuntimeError:
                return RankError(f"rank 0, which connects the ranks, has ended ({lost}).")
            time.sleep(0.1)
        return RankError(f"the connection to another rank was lost ({lost}).")

    # ---------------------------------------------------------------- the store
    def _key(self, name: str) -> str:
        return f"qfast/{self._sessions}/{name}"

    def publish(self, name: str, value: object) -> None:
        """Store a JSON value that other ranks read with `wait_for`."""
        self._store.set(self._key(name), json.dumps(value))

    def wait_for(self, name: str) -> Any:
        """The value that another rank publishes under `name` in this session, however long that takes.

        Raises
        ------
        RankError
            Another rank has failed or died.
        """
        key = self._key(name)
        try:
            pause = 0.01
            while not self._store.check([key]):
                self.require_alive()
                time.sleep(pause)
                pause = min(2 * pause, 0.5)
            return json.loads(self._store.get(key))
        except RankError:
            raise
        except RuntimeError as error:
            raise self._explain(error) from None

    def require_same(self, facts: Mapping[str, object], remedy: str) -> None:
        """Compare facts, JSON values by name, with those of rank 0.

        Raises
        ------
        ConfigError
            Names the first fact that differs, with both values.
        """
        self._messages += 1
        name = f"facts/{self._messages}"
        if self.is_main:
            self.publish(name, facts)
        expected = self.wait_for(name)
        own = json.loads(json.dumps(facts))
        different = next((fact for fact in own if own[fact] != expected.get(fact)), None)
        error = None
        if different is not None:
            error = ConfigError(
                f"rank {self.rank} and rank 0 differ in {different}: {shown(own[different])} and "
                f"{shown(expected.get(different))}. Remedy: {remedy}."
            )
            self._report(error)
        if self.any(error is not None):  # no rank goes on, and the group remains usable
            if error is None:
                self.require_alive()
            raise error or RankError("another rank differs from rank 0.")

    # ---------------------------------------------------------------- collectives
    def sum_(self, tensor: Tensor) -> None:
        """Replace a tensor by its sum over all ranks."""
        self._finish(dist.all_reduce(tensor, async_op=True), tensor)

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true on any rank."""
        count = torch.tensor([float(flag)], device=self.message_device)
        self.sum_(count)
        return bool(count.item())

    def broadcast_(self, tensor: Tensor) -> None:
        """Replace a tensor by that of rank 0."""
        self._finish(dist.broadcast(tensor, 0, async_op=True), tensor)

    def gather(self, local: Tensor, owner: Tensor) -> Tensor:
        """Assemble rows that are spread over the ranks.

        Parameters
        ----------
        local : Tensor [n, ...]
            The rows of this rank, in ascending order of their places.
        owner : Tensor [N], int64
            The rank of each row, equal on all ranks.

        Returns
        -------
        Tensor [N, ...]
            On every rank.
        """
        counts = torch.bincount(owner, minlength=self.size).tolist()
        padded = local.new_zeros((max(counts), *local.shape[1:]))
        padded[: len(local)] = local
        parts = [torch.empty_like(padded) for _ in counts]
        if max(counts):
            self._finish(dist.all_gather(parts, padded, async_op=True), padded)
        result = local.new_empty((len(owner), *local.shape[1:]))
        for rank, (part, count) in enumerate(zip(parts, counts, strict=True)):
            result[owner == rank] = part[:count]
        return result

    def _finish(self, work: Any, tensor: Tensor) -> None:
        """Wait for a collective on `tensor`.

        Raises
        ------
        RankError
            Another rank has failed or died.
        """
        if tensor.device.type != "cpu":  # the host does not wait for the device; torch's watchdog detects failures
            work.wait()
            return
        while True:
            try:
                work.wait(timedelta(seconds=POLL))
                return
            except RuntimeError as error:
                if work.is_completed():
                    raise self._explain(error) from None
            try:
                self.require_alive()
            except RankError:
                raise
            except RuntimeError as error:
                raise self._explain(error) from None


def writes_files() -> bool:
    """Whether this process writes files: True on rank 0 and without a process group.

    >>> writes_files()
    True
    """
    ranks = Ranks.current()
    return ranks is None or ranks.is_main


def _machine() -> str:
    """A name that is equal for processes which see each other's process numbers."""
    with contextlib.suppress(OSError):
        return f"{socket.gethostname()}/{os.readlink('/proc/self/ns/pid')}"
    return socket.gethostname()


def _is_running(pid: int) -> bool:
    """Whether a process of this machine runs. A killed process that its parent has not noticed yet does not."""
    if Path("/proc/self/stat").exists():
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return False
        return state not in "ZX"
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
