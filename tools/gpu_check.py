"""Check a machine with a GPU: tests, then benchmarks. `tools/gpu_check.sh` calls this.

    tools/gpu_check.sh tests [--rehearse]     # at most 300 s: doctor, then all tests marked gpu
    tools/gpu_check.sh bench [--rehearse]     # at most 360 s: doctor, bench_gpu.py part by part, compute-sanitizer

Both commands first run `qfast doctor`, and stop with its first error unless it reports a healthy installation. They
build the libraries only if one of them does not load or was built from other sources (tools/library_checksums.py);
tools/gpu_build.sh builds them beforehand.

Each part is a process with its own log and time limit. A part that runs out of time is reported as "not finished", and
one that fails does not stop the others. The folder gpu_check/COMMAND receives results.txt and one log per part. If the
environment variable OUT names a folder, it receives COMMAND.txt, a copy of results.txt, and COMMAND.tar.gz, the logs.
Both are updated after each part, so they are complete even if this program is killed.

The exit status is 1 if a part failed, 2 if none failed but one is not finished, and 0 if all succeeded.

`--rehearse` runs the same on a machine without a GPU, with the operators of the C++ library in place of the kernels.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO

import library_checksums

ROOT = Path(__file__).resolve().parent.parent
SECONDS = {"tests": 290, "bench": 350}  # the time until the command ends, less ten seconds for its own end
TEST_SECONDS = 280  # for one test file
JOBS = min(12, os.cpu_count() or 1)
# The test files that take longest, in the order in which they start, with the number of processes of each.
LONG_FILES = {
    "test_estimators_cuda.py": 4,
    "test_ops_attention_cuda.py": 6,
    "test_ops_temporal_conv_cuda.py": 2,
    "test_ops_encoder_cuda.py": 2,
    "test_ops_recurrent_cuda.py": 2,
}
BENCHMARKS = ("step", "recurrent", "tcn", "encoder", "attention", "gather", "adam", "ways")
SANITIZERS = ("memcheck", "racecheck", "initcheck")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
OK, FAILED, UNFINISHED = "ok", "FAILED", "not finished"

FACTS = """
import platform, sys, numpy, setuptools, torch
print("torch", torch.__version__, "CUDA", torch.version.cuda, "python", platform.python_version(),
      "numpy", numpy.__version__, "setuptools", setuptools.__version__)
for i in range(torch.cuda.device_count()):
    p = torch.cuda.get_device_properties(i)
    where = f"cuda:{i} {p.name} sm_{p.major}{p.minor}"
    print(where, p.multi_processor_count, "multiprocessors", p.total_memory >> 20, "MiB")
if not torch.cuda.is_available() and "--rehearse" not in sys.argv:
    raise SystemExit("torch detects no usable GPU")
"""
BUILD = """
import os, setuptools, subprocess, sys, torch
if int(setuptools.__version__.split(".")[0]) < 77:
    raise SystemExit(f"setuptools {setuptools.__version__} cannot read pyproject.toml. Remedy: setuptools 77 or newer")
os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "%d.%d" % torch.cuda.get_device_capability())
subprocess.run([sys.executable, "setup.py", "build_ext", "--inplace"], check=True)
"""


@dataclass(frozen=True)
class Part:
    """A command with a time limit in seconds. It counts as `jobs` of the processes that run at the same time."""

    name: str
    command: Sequence[str]
    limit: float
    jobs: int = 1
    environment: dict[str, str] = field(default_factory=dict)


@dataclass
class Running:
    """A part that has started."""

    part: Part
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    began: float
    ends: float
    interrupted: bool = False


class Stopped(Exception):
    """The check cannot continue."""


class Check:
    """Runs parts within a total time, and records their results in a folder and in $OUT."""

    def __init__(self, name: str, seconds: float, folder: Path, out: Path | None = None) -> None:
        self.name, self.folder, self.out = name, folder, out
        self.ends = time.monotonic() + seconds
        self.states: dict[str, str] = {}
        self.running: list[Running] = []
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)

    def say(self, text: str) -> None:
        """Print a text and add it to results.txt."""
        print(text, flush=True)
        with open(self.folder / "results.txt", "a") as results:
            results.write(text + "\n")

    def left(self) -> float:
        """Seconds until the check must end."""
        return self.ends - time.monotonic()

    def log(self, name: str) -> str:
        """The output of a part, empty if there was no time to start it."""
        file = self.folder / f"{name}.log"
        return file.read_text(errors="replace") if file.exists() else ""

    def run(self, parts: Sequence[Part], jobs: int = 1, done: Callable[[Part], None] | None = None) -> None:
        """Run parts in the given order, several at a time. `done` is called after each."""
        waiting = list(parts)
        while waiting or self.running:
            while waiting and self._has_place_for(waiting[0], jobs):
                self._start(waiting.pop(0))
            for one in [*self.running]:
                if one.process.poll() is not None:
                    self._finish(one)
                    if done is not None:
                        done(one.part)
                elif time.monotonic() > one.ends:
                    self._end(one)
            time.sleep(0.05)

    def _has_place_for(self, part: Part, jobs: int) -> bool:
        busy = sum(one.part.jobs for one in self.running)
        return busy == 0 or busy + part.jobs <= jobs

    def _start(self, part: Part) -> None:
        limit = min(part.limit, self.left())
        if limit < 1:
            self._record(part.name, UNFINISHED, 0, "there was no time to start it")
            return
        log = open(self.folder / f"{part.name}.log", "wb")  # noqa: SIM115 - closed in _finish
        # A process group of its own, so that the processes that the part starts are ended with it.
        process = subprocess.Popen(
            part.command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env={**os.environ, **part.environment},
            preexec_fn=os.setpgrp,
        )
        began = time.monotonic()
        self.running.append(Running(part, process, log, began, began + limit))

    def _end(self, one: Running) -> None:
        """Interrupt a part that has run out of time; pytest then prints its summary. Kill it five seconds later."""
        _signal_group(one.process, signal.SIGKILL if one.interrupted else signal.SIGINT)
        one.interrupted, one.ends = True, time.monotonic() + 5

    def _finish(self, one: Running) -> None:
        self.running.remove(one)
        _signal_group(one.process, signal.SIGKILL)  # what the part has left behind
        one.log.close()
        status = one.process.returncode
        state = UNFINISHED if one.interrupted else OK if status == 0 else f"{FAILED} ({status})"
        lines = self.log(one.part.name).split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "")
        self._record(one.part.name, state, time.monotonic() - one.began, last.strip(" =")[:110])

    def _record(self, name: str, state: str, seconds: float, text: str) -> None:
        self.states[name] = state
        self.say(f"{name:<30} {state:<13} {seconds:3.0f} s  {text}")
        self.save()

    def save(self) -> None:
        """Copy the results and an archive of the logs to $OUT, by renaming, so that neither is ever incomplete."""
        if self.out is None:
            return
        self.out.mkdir(parents=True, exist_ok=True)
        archive = self.out / f"{self.name}.tar.gz"
        with tarfile.open(f"{archive}.part", "w:gz") as tar:
            tar.add(self.folder, self.name)
        os.replace(f"{archive}.part", archive)
        shutil.copyfile(self.folder / "results.txt", self.out / f"{self.name}.part")
        os.replace(self.out / f"{self.name}.part", self.out / f"{self.name}.txt")

    def close(self, stopped: Stopped | None = None) -> int:
        """End the parts that still run, record the outcome and return the exit status."""
        for one in [*self.running]:
            _signal_group(one.process, signal.SIGKILL)
            one.process.wait()
            one.interrupted = True
            self._finish(one)
        states = self.states.values()
        failed, unfinished = (sum(state.startswith(kind) for state in states) for kind in (FAILED, UNFINISHED))
        self.say(f"{self.name}: {len(states)} parts, {failed} failed, {unfinished} not finished")
        if stopped is not None:
            self.say(f"stopped: {stopped}")
        self.save()
        return 1 if failed or stopped is not None else 2 if unfinished else 0


def _signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


# ---------------------------------------------------------------- libraries and doctor
def prepare(check: Check, rehearse: bool) -> None:
    """Describe the machine, build the libraries if they are not usable, and require that doctor reports no error."""
    flags = ["--rehearse"] if rehearse else []
    _require(check, Part("machine", [sys.executable, "-c", FACTS, *flags], 60))
    check.say(check.log("machine").strip())
    if shutil.which("nvidia-smi"):
        check.run([Part("driver", ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], 10)])
    doctor = Part("doctor", [sys.executable, "-m", "qfast.doctor"], 90)
    changed = library_checksums.differences(ROOT)
    if changed:
        check.say(f"the libraries are of other sources: {', '.join(changed[:3])}{' ...' if len(changed) > 3 else ''}")
    else:
        check.run([doctor])
    if changed or not_loaded(check.log("doctor"), rehearse):
        for line in [] if changed else not_loaded(check.log("doctor"), rehearse):
            check.say(line)
        check.states.pop("doctor", None)  # the doctor after the build decides
        environment = {"QFAST_CUDA": "0" if rehearse else "1", "MAX_JOBS": str(os.cpu_count())}
        _require(check, Part("build", [sys.executable, "-c", BUILD], 240, environment=environment))
        library_checksums.write(ROOT)
        check.run([doctor])
    missing = not_loaded(check.log("doctor"), rehearse)
    if check.states["doctor"] != OK or missing:
        if missing:
            check.states["doctor"] = FAILED
        raise Stopped(f"doctor is not healthy: {first_error(check.log('doctor'))}")


def _require(check: Check, part: Part) -> None:
    check.run([part])
    if check.states[part.name] != OK:
        raise Stopped(f"{part.name}: {first_error(check.log(part.name))}")


def not_loaded(doctor: str, rehearse: bool) -> list[str]:
    """The lines of doctor's report about the libraries that it did not load."""
    names = ("qfast._C",) if rehearse else ("qfast._C", "qfast._cuda")
    missing = [name for name in names if f"  {name}: loaded\n" not in doctor]
    lines = [line.strip() for line in doctor.splitlines() if any(line.startswith(f"  {name}: ") for name in missing)]
    return lines or [f"{name}: doctor does not say whether it is loaded" for name in missing]


def first_error(log: str) -> str:
    """The first line that reports an error: a failed self-test, a library, an error of a compiler, else the last."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    pattern = re.compile(r"FAILED: |does not load|: not loaded: |\berror: |^\w*Error: ")
    return next((line for line in lines if pattern.search(line)), lines[-1] if lines else "no output")


# ---------------------------------------------------------------- tests
def run_tests(check: Check, rehearse: bool) -> None:
    """Run every test marked gpu, long files first, and print the names of the tests that failed last."""
    parts = [_test_part(path, rehearse) for path in gpu_test_files()]
    check.run(parts, JOBS)
    failing = [line for part in parts for line in failing_tests(check.log(part.name))]
    check.say("\n".join(["failing tests:", *failing]) if failing else "no test failed")


def gpu_test_files(tests: Path = ROOT / "tests") -> list[Path]:
    """The files with tests marked gpu: the long ones first, in the order of LONG_FILES."""
    pattern = re.compile(r"mark\.gpu|needs_kernels")
    files = [path for path in sorted(tests.glob("test_*.py")) if pattern.search(path.read_text())]
    order = [*LONG_FILES]
    return sorted(files, key=lambda path: order.index(path.name) if path.name in order else len(order))


def _test_part(path: Path, rehearse: bool) -> Part:
    jobs = min(LONG_FILES.get(path.name, 1), JOBS) if _has_module("xdist") else 1
    command = [sys.executable, "-m", "pytest", "-v", "-rfE", "--tb=short", "-p", "no:cacheprovider"]
    command += ["-m", "gpu and not slow", str(path.relative_to(ROOT))]
    if jobs > 1:
        command += ["-n", str(jobs), "--dist", "worksteal"]
    if _has_module("pytest_timeout"):  # a kernel that never ends ends its process, and the log has the test's name
        command += ["--timeout", "120", "--timeout-method", "thread"]
    environment = {"COLUMNS": "200"}
    if rehearse:
        library = ROOT / library_checksums.libraries(ROOT)[0]
        environment |= {"QFAST_CUDA_ON_HOST": str(library), "QFAST_HOST_ALL": "1"}
    return Part(path.stem, command, TEST_SECONDS, jobs, environment)


def _has_module(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def failing_tests(log: str) -> list[str]:
    """The summary lines of failing tests, or their names alone if pytest was killed before its summary."""
    summary = [line for line in log.splitlines() if re.match(r"(FAILED|ERROR) tests/", line)]
    if summary:
        return summary
    lines = (line for line in log.splitlines() if re.search(r"\b(FAILED|ERROR)\b", line))
    names = (re.search(r"tests/\S+?::\S+", line) for line in lines)
    return [f"FAILED {name[0]}" for name in names if name]


# ---------------------------------------------------------------- benchmarks and compute-sanitizer
def run_benchmarks(check: Check, rehearse: bool) -> None:
    """Run the parts of bench_gpu.py one after the other, then compute-sanitizer with the time that is left."""
    flags = ["--device", "cpu", "--small"] if rehearse else []
    command = [sys.executable, "bench/bench_gpu.py", *flags, "--only"]

    def show(part: Part) -> None:
        lines = check.log(part.name).partition("Traceback")[0].splitlines()
        check.say("\n".join(line for line in lines if line and not line.startswith("| ---")))
        check.save()

    check.run([Part(f"bench_{name}", [*command, name], 60) for name in BENCHMARKS], done=show)
    sanitize(check, ["cpu"] if rehearse else [])


def sanitize(check: Check, device: Sequence[str]) -> None:
    """Run the kernels under the tools of compute-sanitizer, unless it is missing or does not work on this machine."""
    if shutil.which("compute-sanitizer") is None:
        check.say("compute-sanitizer is not on the PATH and was not run")
        return
    only_ours = ["--kernel-regex", "kns=qfast"]
    probe = [sys.executable, "-c", "import torch; torch.zeros(1).cuda()"]
    for options in (only_ours, []):
        name = "sanitizer_probe" if options else "sanitizer_probe_all_kernels"
        check.run([Part(name, ["compute-sanitizer", "--error-exitcode", "9", *options, *probe], 20)])
        state = check.states.pop(name)  # a tool that does not work on this machine is not a failure of qfast
        if state != f"{FAILED} (1)":  # 1 is the status of an option that this release does not know
            break
    if state != OK:
        check.say("compute-sanitizer does not work on this machine and was not run")
        return
    # Without caching, each tensor is its own allocation, so an access outside a tensor is detected.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for tool in SANITIZERS:
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *options]
        command += [sys.executable, "tools/gpu_kernels.py", *device]
        check.run([Part(f"sanitizer_{tool}", command, check.left(), environment=environment)])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command of the command line and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=[*SECONDS])
    parser.add_argument("--rehearse", action="store_true", help="without a GPU, to test this program")
    parser.add_argument("--seconds", type=float, help=f"time until the command ends (default: {SECONDS})")
    options = parser.parse_args(arguments)

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(f"interrupted by {signal.Signals(number).name}")

    for number in SIGNALS:
        signal.signal(number, stop)
    out = os.environ.get("OUT")
    seconds = SECONDS[options.command] if options.seconds is None else options.seconds
    check = Check(options.command, seconds, ROOT / "gpu_check" / options.command, Path(out) if out else None)
    stopped = None
    try:
        prepare(check, options.rehearse)
        (run_tests if options.command == "tests" else run_benchmarks)(check, options.rehearse)
    except Stopped as reason:
        stopped = reason
    for number in SIGNALS:  # the results are complete before a second signal is obeyed
        signal.signal(number, signal.SIG_IGN)
    return check.close(stopped)


if __name__ == "__main__":
    raise SystemExit(main())
