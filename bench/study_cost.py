"""CPU time and memory of a study of many seeds, compared with the time of its trainings alone.

    OMP_NUM_THREADS=1 python bench/study_cost.py FILE --data PRICES --seeds 20 [--instruments 100] [--epochs 2]
        [--alone 2] [--set KEY=VALUE ...]

Runs Qlib's workflow file FILE, for time-series data, as `qfast study` with two worker processes on real prices. Prints
the summary in the format of Qlib's benchmark tables, and:

- the user and system CPU time of the study, of all its processes;
- the CPU time of its trainings: every `fit` and every `predict` in the workers;
- the overhead for each run: the CPU time of the study without preparing the data once and without its trainings;
- the memory of a worker at the end of each training, and the part of it that maps the prepared data. Pss divides pages
  by the number of processes that map them;
- with `--alone N`, the CPU time of N trainings, each of which is a `qfast run` of its own.

CPU time hardly depends on other work on the machine, unlike wall time.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from qfast.studies.axes import set_text
from qfast.workflow.config import load_config
from qfast.workflow.prepared import PreparedData
from qfast.workflow.validation import check_workflow

ROOT = Path(__file__).resolve().parents[1]
HANDLER = "task.dataset.kwargs.handler.kwargs"
SEGMENTS = {
    "train": ["2013-02-08", "2016-06-30"],
    "valid": ["2016-07-01", "2016-12-31"],
    "test": ["2017-01-01", "2018-02-07"],
}
TIMED_MODULE = '''
"""A model whose workers append the CPU seconds of `fit` and `predict`, and their memory, to a file."""

import json, os, re, time
from qfast.models import ts

def write(stage, began):
    line = {"pid": os.getpid(), "stage": stage, "seconds": time.process_time() - began}
    if stage == "fit":
        line["worker"] = kilobytes(open("/proc/self/smaps_rollup").read())
        mappings = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", open("/proc/self/smaps").read(), flags=re.MULTILINE)
        line["data"] = kilobytes("".join(text for text in mappings if "arrays.bin" in text.partition("\\n")[0]))
    with open(os.environ["STUDY_COST_FILE"], "a") as file:
        file.write(json.dumps(line) + "\\n")

def kilobytes(text):
    return {name: sum(map(int, re.findall(rf"^{name}: *([0-9]+) kB", text, re.MULTILINE)))
            for name in ("Rss", "Pss", "Anonymous")}

class Timed(ts.MODEL):
    def fit(self, *arguments, **options):
        began = time.process_time()
        try:
            return super().fit(*arguments, **options)
        finally:
            write("fit", began)

    def predict(self, *arguments, **options):
        began = time.process_time()
        try:
            return super().predict(*arguments, **options)
        finally:
            write("predict", began)
'''


@dataclass(frozen=True)
class Usage:
    """CPU seconds of some processes, and what their trainings wrote."""

    seconds: float
    wall_seconds: float
    lines: list[dict[str, Any]]

    @property
    def training(self) -> float:
        """CPU seconds of all trainings."""
        return sum(line["seconds"] for line in self.lines)

    def memory(self, part: str, name: str) -> float:
        """Median over the trainings, in MiB."""
        return statistics.median(line[part][name] for line in self.lines if part in line) / 1024


def settings(options: argparse.Namespace) -> list[str]:
    """Changes of the workflow file: the dates and names of the prices, and the number of epochs."""
    instruments: object = "all"
    if options.instruments is not None:
        names = sorted(pd.read_parquet(options.data, columns=["instrument"])["instrument"].unique())
        instruments = [str(name) for name in names[: options.instruments]]
    changes: Mapping[str, object] = {
        "task.model.kwargs.n_epochs": options.epochs,
        "task.model.kwargs.early_stop": options.epochs,
        f"{HANDLER}.instruments": instruments,
        f"{HANDLER}.vwap": "typical",
        f"{HANDLER}.start_time": SEGMENTS["train"][0],
        f"{HANDLER}.end_time": SEGMENTS["test"][1],
        f"{HANDLER}.fit_start_time": SEGMENTS["train"][0],
        f"{HANDLER}.fit_end_time": SEGMENTS["train"][1],
        "task.dataset.kwargs.segments": SEGMENTS,
    }
    return [*(set_text(key, value) for key, value in changes.items()), *options.sets]


def measured(words: Sequence[str], sets: Sequence[str], folder: Path) -> Usage:
    """Run a qfast command with the timed model."""
    file = folder / "times.jsonl"
    file.unlink(missing_ok=True)
    environment = {**os.environ, "STUDY_COST_FILE": str(file), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = [*words, "-q", "--allow-code", str(folder / "timed.py")]
    for text in sets:
        words += ["--set", text]
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, "-m", "qfast", *words], env=environment, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Usage(seconds, time.perf_counter() - began, [json.loads(line) for line in file.read_text().splitlines()])


def prepare_seconds(options: argparse.Namespace, sets: Sequence[str], folder: Path) -> float:
    """CPU seconds of reading and processing the data once."""
    workflow = check_workflow(load_config(options.file, sets).values)
    began = time.process_time()
    PreparedData.write(folder / "prepared", workflow, options.data)
    return time.process_time() - began


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the study and print its summary, its costs and its memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--data", required=True)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--instruments", type=int, default=None, help="the first N names; default: all")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--alone", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], dest="sets")
    parser.add_argument("--output", type=Path, help="folder of the study; default: a temporary folder")
    options = parser.parse_args(arguments)
    found = re.search(r"^\s*model:\s*class: (\w+)", options.file.read_text(), re.MULTILINE)
    if found is None:
        parser.error(f"{options.file} has no section model with a class.")
    sets = settings(options)
    timed = [*sets, "task.model.class=Timed", "task.model.module_path=timed"]
    with tempfile.TemporaryDirectory() as base:
        folder = Path(base)
        (folder / "timed.py").write_text(TIMED_MODULE.replace("MODEL", found[1]))
        prepared = prepare_seconds(options, sets, folder)
        common = [str(options.file), "--data", str(options.data)]
        target = options.output or folder / "study"
        words = ["study", *common, "--seeds", str(options.seeds), "--jobs", str(options.jobs), "-o", str(target)]
        study = measured(words, timed, folder)
        print((target / "summary.md").read_text())
        alone = [
            measured(["run", *common, "--seed", str(n), "-o", str(folder / f"run{n}")], timed, folder)
            for n in range(options.alone)
        ]
    print_costs(study, alone, prepared, options.seeds)


def print_costs(study: Usage, alone: Sequence[Usage], prepared: float, runs: int) -> None:
    """Print the CPU seconds and the memory."""
    overhead = study.seconds - prepared - study.training
    print(f"study: {study.seconds:.1f} s CPU, {study.wall_seconds:.0f} s wall; data prepared in {prepared:.2f} s CPU")
    print(f"trainings: {study.training:.1f} s CPU, {study.training / runs:.2f} for each run")
    print(f"overhead: {overhead / runs:.2f} s CPU for each run")
    print(f"study / (trainings + data prepared once) = {study.seconds / (study.training + prepared):.4f}")
    if alone:
        each = statistics.fmean(usage.training for usage in alone)
        whole = statistics.fmean(usage.seconds for usage in alone)
        print(f"alone: {each:.2f} s CPU for each training, {whole:.2f} for the whole `qfast run`")
        print(f"study / ({runs} trainings alone + data prepared once) = {study.seconds / (runs * each + prepared):.4f}")
        print(f"study / ({runs} whole runs alone) = {study.seconds / (runs * whole):.4f}")
    for part, title in (("worker", "worker"), ("data", "prepared data in a worker")):
        figures = ", ".join(f"{name} {study.memory(part, name):.0f}" for name in ("Rss", "Pss", "Anonymous"))
        print(f"{title}, MiB: {figures}")


if __name__ == "__main__":
    main()
