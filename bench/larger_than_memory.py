"""Train on a panel folder that is larger than the memory of the process.

    python bench/larger_than_memory.py --limit 1000 [--instruments 2000] [--days 2000] [--features 158] [--batches 100]

Writes random factors and labels to a panel folder, then measures processes of their own, without a limit and in a
memory control group of `--limit` megabytes, which includes the cached pages of files. Each one opens the folder, trains
an LSTM on shuffled windows of 20 rows and prints windows per second, megabytes read per second of training, and its
peak of memory. Two lines show the speed of the disk: `pread` of the same number of windows at random places, without
any computation, and a sequential read; both after the pages of the file were dropped from memory. Linux only. A control
group needs root; an existing group can be passed with `--group FOLDER`.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from qfast.data import DataHandlerLP, TSDatasetH
from qfast.data.panel import Block, Panel
from qfast.models import ts
from qfast.training.callbacks import Callback

STEP_LEN, BATCH, HIDDEN = 20, 800, 16
GROUPS = Path("/sys/fs/cgroup")


class EnoughError(Exception):
    """Ends the training after the measured batches."""


class Rate(Callback):
    """Times of the batches after the first one, and the bytes that they read from the disk."""

    def __init__(self, batches: int) -> None:
        self.batches, self.done = batches, 0
        self.start = self.start_bytes = 0.0

    def on_batch_end(self, estimator: object) -> None:
        self.done += 1
        if self.done == 1:
            self.start, self.start_bytes = time.perf_counter(), read_bytes()
        if self.done > self.batches:
            raise EnoughError


def read_bytes() -> float:
    """Bytes that this process has caused to be read from a disk."""
    return float(re.findall(r"^read_bytes: (\d+)", Path("/proc/self/io").read_text(), re.MULTILINE)[0])


def write_panel(folder: Path, instruments: int, days: int, features: int) -> None:
    """Random factors, one instrument at a time."""
    rng = np.random.default_rng(0)
    names = np.array([f"S{code:05d}" for code in range(instruments)], dtype=object)
    dates, codes = np.tile(np.arange(days, dtype=np.int32), instruments), np.repeat(np.arange(instruments), days)
    label = Block(rng.standard_normal((len(codes), 1)).astype(np.float32), ("LABEL0",))
    keys = Panel(pd.bdate_range("2010-01-01", periods=days), names, dates, codes.astype(np.int32), {"label": label})
    groups = {"feature": [f"F{column}" for column in range(features)], "label": ["LABEL0"]}
    with keys.create(folder, groups) as values:
        values["label"][:] = label.values
        for code in range(instruments):
            rows = slice(code * days, (code + 1) * days)
            values["feature"][rows] = rng.standard_normal((days, features), dtype=np.float32)


def values_file(folder: Path) -> Path:
    """The file of the features."""
    return max(folder.glob("contents-*/*.values"), key=lambda file: file.stat().st_size)


def forget(file: Path) -> None:
    """Drop the pages of a file from memory."""
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def train(folder: Path, batches: int, name: str) -> None:
    """Train in this process and print a row of the table."""
    torch.set_num_threads(1)
    panel = Panel.open(folder, verify=False)
    steps: dict[str, list[object]] = {"shared": [], "infer": [], "learn": []}
    handler = DataHandlerLP.from_panels({"infer": panel, "learn": panel}, steps, start_time=None)
    dataset = TSDatasetH(handler, {"train": (None, None)}, step_len=STEP_LEN)
    features = len(panel.columns("feature"))
    model = ts.LSTM(d_feat=features, hidden_size=HIDDEN, num_layers=1, batch_size=BATCH, seed=0, progress=False)
    rate = Rate(batches)
    begin = time.perf_counter()
    with contextlib.suppress(EnoughError):
        model.fit(dataset, callbacks=[rate])
    seconds, read = time.perf_counter() - rate.start, read_bytes() - rate.start_bytes
    status = Path("/proc/self/status").read_text()
    anonymous = int(re.findall(r"^RssAnon:\s+(\d+)", status, re.MULTILINE)[0]) / 1024
    print(
        f"| {name} | {batches * BATCH / seconds:,.0f} | {read / seconds / 1e6:,.0f} | {rate.start - begin:.1f} | "
        f"{anonymous:,.0f} |",
        flush=True,
    )


def disk_rows(file: Path, features: int, windows: int) -> list[str]:
    """Rows of the table for the speed of the disk alone."""
    size, row = file.stat().st_size, 4 * features
    rng = np.random.default_rng(1)
    places = rng.integers(0, size // row - STEP_LEN, windows) * row
    forget(file)
    with file.open("rb", buffering=0) as opened:
        begin, before = time.perf_counter(), read_bytes()
        for place in places.tolist():
            os.pread(opened.fileno(), STEP_LEN * row, place)
        seconds, read = time.perf_counter() - begin, read_bytes() - before
        random = f"| disk, random windows | {windows / seconds:,.0f} | {read / seconds / 1e6:,.0f} | - | - |"
    forget(file)
    with file.open("rb", buffering=0) as opened:
        begin = time.perf_counter()
        while opened.read(1 << 24):
            pass
        seconds = time.perf_counter() - begin
    return [random, f"| disk, sequential | {size / row / seconds:,.0f} rows | {size / seconds / 1e6:,.0f} | - | - |"]


def new_group(limit: int) -> Path:
    """A control group with a limit of memory, in version 1 or 2 of control groups."""
    is_first_version = (GROUPS / "memory").exists()
    group = (GROUPS / "memory" if is_first_version else GROUPS) / f"qfast-{os.getpid()}"
    group.mkdir()
    file = "memory.limit_in_bytes" if is_first_version else "memory.max"
    (group / file).write_text(str(limit * 10**6))
    return group


def main() -> None:
    """Write the panel and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=1000, help="megabytes of memory")
    parser.add_argument("--group", type=Path, help="an existing control group, instead of a new one")
    parser.add_argument("--instruments", type=int, default=2000)
    parser.add_argument("--days", type=int, default=2000)
    parser.add_argument("--features", type=int, default=158)
    parser.add_argument("--batches", type=int, default=100)
    parser.add_argument("--folder", type=Path, help="folder of the panel, which is kept")
    parser.add_argument("--train", help=argparse.SUPPRESS)  # name of the row, in a process of its own
    options = parser.parse_args()
    if options.train:
        if options.group:
            (options.group / "cgroup.procs").write_text(str(os.getpid()))
        train(options.folder, options.batches, options.train)
        return
    with tempfile.TemporaryDirectory(dir="/var/tmp") as temporary:
        folder = options.folder or Path(temporary, "panel")
        if not folder.exists():
            write_panel(folder, options.instruments, options.days, options.features)
        file = values_file(folder)
        print(f"{file.stat().st_size / 1e6:,.0f} MB of features, limit {options.limit:,} MB\n")
        print("| process | windows per second | MB read per second | s before the first batch | anonymous memory, MB |")
        print("|---|---|---|---|---|", flush=True)
        command = [sys.executable, __file__, "--folder", str(folder), "--batches", str(options.batches)]
        subprocess.run([*command, "--train", "without a limit"], check=True)
        group = options.group or new_group(options.limit)
        try:
            forget(file)
            subprocess.run([*command, "--group", str(group), "--train", f"{options.limit:,} MB"], check=True)
        finally:
            if not options.group:
                group.rmdir()
        print("\n".join(disk_rows(file, options.features, options.batches * BATCH)))


if __name__ == "__main__":
    main()
