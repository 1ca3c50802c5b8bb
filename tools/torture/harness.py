"""Runs parts in worker processes with limits on time and memory, and collects counts and faults.

A worker announces each case before it runs it. If the worker then dies or hangs, its parent knows the case, records
the fault and starts a new worker behind it.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torture import ROOT
from torture.protocol import Case, Part

SCRIPT = ROOT / "tools" / "torture.py"
ADDRESS_BYTES = 16 << 30  # address space of a worker: an allocation beyond it must end in an error
START_SECONDS = 600.0  # to import torch and qfast, also on a busy machine
MOST_FAULTS = 20  # of a part, which then ends
TRACE_LINES = 60


@dataclass
class Job:
    """Which cases a worker runs. `cases` replaces drawn cases, to run them again."""

    part: str
    seed: int
    first: int = 0
    seconds: float = 60.0
    cases: list[Case] | None = None
    plant: str | None = None
    sanitized: bool = False


@dataclass
class PartResult:
    """Counts and faults of one part. A fault has `number`, `case` and `message`."""

    part: str
    cases: int = 0
    seconds: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)
    faults: list[dict[str, Any]] = field(default_factory=list)


# ---------------------------------------------------------------- the worker
def work(job: Job, channel: int) -> None:
    """Run the cases of a job, and write one JSON line to `channel` before and after each."""
    from torture.parts import PARTS

    def send(**message: Any) -> None:
        os.write(channel, (json.dumps(message) + "\n").encode())

    if job.plant is not None:
        from torture.plants import PLANTS

        PLANTS[job.plant].apply()
    _limit_memory(job.sanitized)
    part = PARTS[job.part]
    send(ready=True)
    deadline = time.monotonic() + job.seconds
    for number, case in _numbered_cases(job, part):
        if job.cases is None and time.monotonic() > deadline:
            break
        send(begin=number, case=case)
        folder = Path(tempfile.mkdtemp(prefix=f"torture-{job.part}-"))
        try:
            send(end=number, counts=part.check(case, folder))
        except (Exception, KeyboardInterrupt):
            lines = traceback.format_exc().splitlines()
            send(end=number, fault="\n".join(lines[-TRACE_LINES:]))
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    send(done=True)


def _numbered_cases(job: Job, part: Part) -> Iterator[tuple[int, Case]]:
    if job.cases is not None:
        yield from enumerate(job.cases)
        return
    number = job.first
    while True:
        yield number, part.draw(random.Random(f"{job.seed}/{job.part}/{number}"), number)
        number += 1


def _limit_memory(sanitized: bool) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if not sanitized:  # AddressSanitizer reserves terabytes of addresses
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_BYTES, hard))


# ---------------------------------------------------------------- the parent
def run_part(job: Job, limit: float, until_fault: bool = False) -> PartResult:
    """Run a job in workers until its time is over, and return the counts and faults.

    Parameters
    ----------
    job : Job
    limit : float
        Seconds after which one case is a fault.
    until_fault : bool
        Stop at the first fault.
    """
    result, started = PartResult(job.part), time.monotonic()
    first, pending = job.first, job.cases
    while True:
        left = job.seconds - (time.monotonic() - started)
        worker = _Worker(Job(job.part, job.seed, first, left, pending, job.plant, job.sanitized), limit)
        done = worker.run(result, until_fault)
        enough = len(result.faults) >= (1 if until_fault else MOST_FAULTS)
        if done or enough or pending is not None or time.monotonic() - started >= job.seconds:
            break
        first = worker.number + 1
    result.seconds = time.monotonic() - started
    return result


class _Worker:
    """A worker process, and the last case that it has announced."""

    def __init__(self, job: Job, limit: float) -> None:
        self.number, self._case, self._limit = job.first - 1, Case(), limit
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by _stop
        self._read, write = os.pipe()
        command = [sys.executable, str(SCRIPT), "--worker", json.dumps(vars(job)), "--channel", str(write)]
        environment = {"OMP_NUM_THREADS": "2" if job.part == "threads" else "1", "MPLBACKEND": "Agg", **os.environ}
        environment["PYTHONFAULTHANDLER"] = "1"
        self._process = subprocess.Popen(
            command, pass_fds=[write], env=environment, stdout=self._log, stderr=self._log, start_new_session=True
        )
        os.close(write)

    def run(self, result: PartResult, until_fault: bool) -> bool:
        """Receive messages until the worker ends. True if it has run all of its cases."""
        done = False
        try:
            for message in self._messages():
                done = done or "done" in message
                self._note(message, result)
                if until_fault and result.faults:
                    break
        except TimeoutError as error:
            self._add_fault(result, str(error))
        else:
            if not done and not (until_fault and result.faults):
                self._add_fault(result, f"the process {self._status()}\n{self._output()}")
        finally:
            self._stop()
        return done

    def _note(self, message: dict[str, Any], result: PartResult) -> None:
        if "begin" in message:
            self.number, self._case = message["begin"], message["case"]
        elif "fault" in message:
            self._add_fault(result, message["fault"])
        elif "counts" in message:
            result.counts.update(message["counts"])
        result.cases += "end" in message

    def _add_fault(self, result: PartResult, text: str) -> None:
        result.faults.append({"number": self.number, "case": self._case, "message": text})

    def _messages(self) -> Iterator[dict[str, Any]]:
        """Messages of the worker. TimeoutError if the next one needs more time than a case may need."""
        buffer, limit = b"", START_SECONDS
        with selectors.DefaultSelector() as selector:
            selector.register(self._read, selectors.EVENT_READ)
            while True:
                if not selector.select(limit):
                    os.kill(self._process.pid, signal.SIGABRT)  # faulthandler prints where it hangs
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        self._process.wait(10)
                    raise TimeoutError(f"not finished after {limit:g} s\n{self._output()}")
                part = os.read(self._read, 1 << 16)
                if not part:
                    return
                *lines, buffer = (buffer + part).split(b"\n")
                for line in lines:
                    yield json.loads(line)
                limit = self._limit

    def _status(self) -> str:
        status = self._process.wait()
        return f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with exit status {status}"

    def _output(self) -> str:
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").splitlines()
        lines = [line for line in lines if not line.startswith("Extension modules:")]
        if len(lines) > 2 * TRACE_LINES:  # a sanitizer's report begins with the place
            lines = [*lines[:TRACE_LINES], "...", *lines[-TRACE_LINES:]]
        return "\n".join(lines)

    def _stop(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        os.close(self._read)
        self._log.close()


def replay(file: Path, sanitized: bool = False) -> PartResult:
    """Run the case of a reproduction file again."""
    from torture.parts import PARTS

    content = json.loads(file.read_text())
    job = Job(content["part"], content["seed"], cases=[content["case"]], plant=content.get("plant"))
    job.sanitized = sanitized
    return run_part(job, PARTS[job.part].seconds)


def split_time(names: Sequence[str], seconds: float, lanes: int) -> list[list[tuple[str, float]]]:
    """Distribute parts over lanes that run at the same time. Returns (part, seconds) for each lane."""
    from torture.parts import PARTS

    shares = sorted(names, key=lambda name: -PARTS[name].share)
    plan: list[list[str]] = [[] for _ in range(min(lanes, len(names)))]
    for name in shares:
        min(plan, key=lambda lane: sum(PARTS[n].share for n in lane)).append(name)
    return [[(name, seconds * PARTS[name].share / sum(PARTS[n].share for n in lane)) for name in lane] for lane in plan]
