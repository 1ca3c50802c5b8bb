"""Kill a study at random moments, resume it, and compare its results with an uninterrupted study.

    OMP_NUM_THREADS=1 python bench/study_kills.py --runs 200 --kills 20 [--seed 0] [--jobs 2] [--folder FOLDER]

Both studies train a small LSTM on synthetic factors for two epochs with RUNS seeds. The second one receives KILLS
SIGKILLs. Each kills the main process, one worker, the fork server, or all of them. After the main process has been
killed, `qfast study --resume` starts at once, while workers may still be running. The seed determines the order of the
kills and their moments. A moment is a number of further runs and a fraction of a second.

The script fails unless table.csv, summary.csv and the ensemble's scores are equal files, and the weights, scores and
metrics of every run are. The plots are not drawn, because they take most of the time of such a small run.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from qfast.data import synthetic

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("main process", "worker", "all processes")
LONGEST_DELAY = 2.0  # seconds after a run has begun, longer than a run
STUDY_FILES = ("table.csv", "summary.csv", "ensembles/000/pred.parquet")
RUN_FILES = ("best.safetensors", "pred.parquet", "metrics.json", "daily.csv")
WORKFLOW = """
experiment_name: kills
task:
  model:
    class: LSTM
    module_path: undrawn
    kwargs: {d_feat: 4, hidden_size: 4, num_layers: 1, n_epochs: 2, batch_size: 256, metric: loss, GPU: 0}
  dataset:
    class: DatasetH
    module_path: qlib.data.dataset
    kwargs:
      handler:
        class: DataHandlerLP
        kwargs:
          infer_processors: [{class: Fillna, kwargs: {fields_group: feature}}]
          learn_processors: [DropnaLabel]
      segments:
        train: [2020-01-01, 2020-02-28]
        valid: [2020-03-02, 2020-03-31]
        test: [2020-04-01, 2020-05-29]
  record: [{class: SignalRecord, module_path: qlib.workflow.record_temp}]
"""
UNDRAWN_MODULE = """
from qfast.models import LSTM
from qfast.workflow import plots

plots.png = lambda figure: b"not drawn"
"""


class Study:
    """A study in a subprocess, which can be killed and resumed.

    Parameters
    ----------
    folder : Path
        The study folder.
    words : sequence of str
        Arguments of `qfast study` that begin the study.
    jobs : int
    """

    def __init__(self, folder: Path, words: Sequence[str], jobs: int) -> None:
        self.folder, self._jobs = folder, jobs
        self._start([*words, "--output", str(folder)])

    def resume(self) -> None:
        """Continue the study, whose main process has ended."""
        begun = (self.folder / "study.json").is_file()
        if not begun:
            raise SystemExit(f"{self.folder} has no study.json: the study was killed before it began.")
        self._start(["--resume", str(self.folder)])

    def _start(self, words: Sequence[str]) -> None:
        command = [sys.executable, "-m", "qfast", "study", *words, "--jobs", str(self._jobs), "-q"]
        command += ["--allow-code", str(self.folder.parent / "undrawn.py")]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        with (self.folder.parent / f"{self.folder.name}.log").open("ab") as log:
            self._process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)

    @property
    def runs(self) -> int:
        """Number of runs that have begun."""
        return len(list(self.folder.glob("runs/*/manifest.json")))

    @property
    def running(self) -> bool:
        """True until the main process has ended."""
        return self._process.poll() is None

    def wait_for_runs(self, count: int) -> None:
        """Wait until `count` more runs have begun, or the study has ended."""
        target = self.runs + count
        while self.running and self.runs < target:
            time.sleep(0.05)

    def kill(self, kind: str, rng: random.Random) -> bool:
        """Send SIGKILL, and resume if the main process was killed. False if no such process was alive."""
        workers = sorted(self._workers())
        if not self.running or not workers:
            return False
        victims = [rng.choice(workers)] if kind == "worker" else [self._process.pid]
        victims += workers if kind == "all processes" else []
        for victim in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
        if kind != "worker":
            self._process.wait()
            self.resume()
        return True

    def _workers(self) -> Iterator[int]:
        """The workers, and the server that they are copies of."""
        pending = [self._process.pid]
        while pending:
            for file in Path(f"/proc/{pending.pop()}/task").glob("*/children"):
                with contextlib.suppress(OSError):
                    children = [int(word) for word in file.read_text().split()]
                    pending += children
                    yield from children

    def wait(self) -> int:
        """Wait for the end, and return the exit status."""
        return self._process.wait()


def kill_repeatedly(study: Study, runs: int, kills: int, rng: random.Random) -> dict[str, int]:
    """Kill a study at random moments, and return the number of kills of each kind."""
    counts = dict.fromkeys(KINDS, 0)
    pending = [KINDS[number % len(KINDS)] for number in range(kills)]
    rng.shuffle(pending)
    while pending:
        most = 2 * (runs - study.runs) // (len(pending) + 1) - 2  # runs until the next kill, so all kills fit
        study.wait_for_runs(rng.randint(0, max(most, 1)))
        time.sleep(rng.uniform(0.0, LONGEST_DELAY))
        if study.kill(pending[-1], rng):
            kind = pending.pop()
            counts[kind] += 1
            print(f"kill {sum(counts.values())} of {kills}: {kind}, after {study.runs} runs have begun", flush=True)
        elif not study.running:
            raise SystemExit(f"the study ended after {sum(counts.values())} of {kills} kills. Remedy: more --runs.")
    return counts


def differences(one: Path, other: Path, runs: int) -> list[str]:
    """Names of the files that two studies do not have in common."""
    files = [*STUDY_FILES, *(f"runs/{number:03d}/{name}" for number in range(runs) for name in RUN_FILES)]
    return [name for name in files if (one / name).read_bytes() != (other / name).read_bytes()]


def write_case(folder: Path) -> list[str]:
    """Write the workflow and its data, and return the arguments of `qfast study` for them."""
    (folder / "kills.yaml").write_text(WORKFLOW)
    frame = synthetic.factors(8, 110, 4, seed=0, start="2020-01-01")
    frame.columns = frame.columns.get_level_values(-1)
    frame.to_parquet(folder / "factors.parquet")
    (folder / "undrawn.py").write_text(UNDRAWN_MODULE)
    return [str(folder / "kills.yaml"), "--data", str(folder / "factors.parquet")]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run both studies and compare them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="new folder for both studies; default: a temporary folder")
    parser.add_argument("--whole", type=Path, help="an uninterrupted study of an earlier call, which is not repeated")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as base:
        folder = options.folder or Path(base)
        folder.mkdir(parents=True, exist_ok=True)
        words = [*write_case(folder), "--seeds", str(options.runs)]
        killed = Study(folder / "killed", words, options.jobs)
        counts = kill_repeatedly(killed, options.runs, options.kills, random.Random(options.seed))
        status, resumes = killed.wait(), 0
        while status == 1 and resumes < options.kills:  # a run whose worker was killed twice has failed
            killed.resume()
            status, resumes = killed.wait(), resumes + 1
        if not status and options.whole is None:
            status = Study(folder / "whole", words, options.jobs).wait()
        if status:
            raise SystemExit(f"a study failed; its log is {folder}/killed.log or whole.log")
        different = differences(killed.folder, options.whole or folder / "whole", options.runs)
    print(f"{options.runs} runs, kills: {counts}; {resumes} resumes after failed runs")
    print(f"files that differ from the uninterrupted study: {different or 'none'}")
    sys.exit(bool(different))


if __name__ == "__main__":
    main()
