"""A whole market in little memory: Alpha360 as a view, and several processes on one mapped panel.

    python bench/market.py handler [--instruments 5000] [--days 2500]     Alpha360, training, scores
    python bench/market.py shared [--processes 8]                         processes that train on one panel folder
    python bench/market.py files --instruments 500 --days 1250            columns in files and in memory

All modes write synthetic prices to a panel folder first (--folder, by default a temporary one). "handler" builds the
handler, trains an LSTM on at least 50,000 windows, scores one day, and prints seconds and resident memory of each step.
"shared" prints the anonymous memory (`/proc/PID/smaps_rollup`) of each process while all of them train. "files" builds
Alpha158 with all columns and trains on it, with memory_limit=0 and in memory. Linux only.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from column_selection import SELECTED

from qfast.data import Alpha158, Alpha360, DataHandlerLP, DatasetH, TSDatasetH
from qfast.data.panel import Block, Panel
from qfast.data.processors import FilterCol
from qfast.models import LSTM, ts

FIT: dict[str, Any] = {"fit_start_time": "2010-01-01", "fit_end_time": "2017-12-31"}
FIELDS = ("open", "high", "low", "close", "volume", "vwap")
HANDLER: dict[str, Any] = {
    "infer_processors": [
        {"class": "RobustZScoreNorm", "kwargs": {"fields_group": "feature", "clip_outlier": True}},
        {"class": "Fillna", "kwargs": {"fields_group": "feature"}},
    ],
    "learn_processors": ["DropnaLabel", {"class": "CSRankNorm", "kwargs": {"fields_group": "label"}}],
}


def memory_mb(entry: str, file: str = "status") -> float:
    """An entry of /proc/self, for example VmHWM (peak resident memory) or RssAnon."""
    return int(re.findall(rf"^{entry}:\s+(\d+)", Path("/proc/self", file).read_text(), re.MULTILINE)[0]) / 1024


def write_prices(folder: Path, instruments: int, days: int, seed: int = 0) -> None:
    """Random walks: a tenth of the instruments is listed late, and 1% of the rows is missing."""
    rng = np.random.default_rng(seed)
    first = np.where(rng.random(instruments) < 0.1, rng.integers(0, days // 2, instruments), 0)
    values, dates, codes = [], [], []
    for code in range(instruments):
        present = np.flatnonzero((np.arange(days) >= first[code]) & (rng.random(days) >= 0.01))
        n = len(present)
        close = 20 * np.exp(np.cumsum(rng.normal(0, 0.02, n)))
        start = close * np.exp(rng.normal(0, 0.01, n))
        high, low = (side(start, close) * np.exp(sign * 0.005) for side, sign in ((np.maximum, 1), (np.minimum, -1)))
        columns = (start, high, low, close, rng.lognormal(12, 1, n), (high + low + close) / 3)
        values.append(np.stack(columns, axis=1).astype(np.float32))
        dates.append(present.astype(np.int32))
        codes.append(np.full(n, code, dtype=np.int32))
    names = np.array([f"S{code:05d}" for code in range(instruments)], dtype=object)
    blocks = {"price": Block(np.concatenate(values), FIELDS)}
    calendar = pd.bdate_range("2010-01-01", periods=days)
    Panel(calendar, names, np.concatenate(dates), np.concatenate(codes), blocks).save(folder)


def timed(name: str, call: Callable[[], Any]) -> Any:
    """The result of a call; prints its wall and CPU seconds and the memory of the process."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = call()
    seconds = f"{time.perf_counter() - wall:.1f} | {time.process_time() - cpu:.1f}"
    print(f"| {name} | {seconds} | {memory_mb('VmRSS'):,.0f} | {memory_mb('VmHWM'):,.0f} |", flush=True)
    return result


def training_days(learn: Panel, windows: int) -> tuple[tuple[pd.Timestamp, pd.Timestamp], int]:
    """The last days before the final ten with at least `windows` rows, and the number of these rows."""
    per_day = np.bincount(learn.date_codes[learn.live_rows()], minlength=len(learn.datetimes))
    reached = np.cumsum(per_day[-10::-1])
    count = int(np.searchsorted(reached, windows)) + 1
    return (learn.datetimes[-9 - count], learn.datetimes[-10]), int(reached[count - 1])


def measure_handler(prices: Path, windows: int) -> None:
    """Build the handler, train on the last days before the test day, and score that day."""
    print("| step | wall s | CPU s | resident, MB | peak, MB |\n|---|---|---|---|---|")
    timed("imports", lambda: None)
    handler = timed(
        "handler",
        lambda: Alpha360("all", data=prices, windows="view", **FIT, **HANDLER),
    )
    learn = handler.panel("learn")
    days = learn.datetimes
    train, count = training_days(learn, windows)
    dataset = DatasetH(handler, {"train": train, "valid": (days[-9], days[-8]), "test": (days[-1], days[-1])})
    model = LSTM(d_feat=6, hidden_size=64, num_layers=2, n_epochs=1, batch_size=800, seed=0, progress=False)
    timed(f"training pass over {count:,} windows", lambda: model.fit(dataset))
    scores = timed("scores of one day", lambda: model.predict(dataset))
    print(
        f"{len(learn.instruments):,} instruments x {len(days):,} days, {handler.panel('infer').n_rows:,} rows; "
        f"{len(scores):,} scores, mean {scores.mean():.6f}; {torch.get_num_threads()} threads"
    )


def write_features(prices: Path, folder: Path) -> None:
    """20 factors of Alpha158, processed, as one panel folder; the labels to learn from as a second one."""
    handler = Alpha158(
        "all",
        data=prices,
        infer_processors=[FilterCol("feature", SELECTED), *HANDLER["infer_processors"]],
        learn_processors=HANDLER["learn_processors"],
        memory_limit="500 MB",
        scratch=folder,
        **FIT,
    )
    handler.panel("infer").save(folder / "infer")
    handler.panel("learn").only(["label"]).save(folder / "learn")


def train_on(folder: Path, windows: int) -> None:
    """Train an LSTM on the mapped panel, in this process."""
    torch.set_num_threads(1)
    infer, labels = (Panel.open(folder / name, verify=False) for name in ("infer", "learn"))
    learn = replace(infer, live=labels.live, blocks={**infer.blocks, "label": labels.block("label")})
    del labels
    handler = DataHandlerLP.from_panels(
        {"infer": infer, "learn": learn}, {"shared": [], "infer": [], "learn": []}, start_time=None
    )
    train, _ = training_days(learn, windows)
    days = learn.datetimes
    dataset = TSDatasetH(
        handler, {"train": train, "valid": (days[-9], days[-8]), "test": (days[-1], days[-1])}, step_len=20
    )
    model = ts.LSTM(d_feat=len(SELECTED), hidden_size=64, num_layers=2, n_epochs=1, seed=0, progress=False)
    model.fit(dataset)
    print(f"{len(model.predict(dataset))} scores", flush=True)
    sys.stdin.read()  # the parent measures, and then closes the pipe


def anonymous_mb(pid: int) -> float:
    """Anonymous memory of a process, which no other process shares."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except (OSError, ProcessLookupError):
        return 0.0
    return int(re.findall(r"^Anonymous:\s+(\d+)", text, re.MULTILINE)[0]) / 1024


def measure_shared(folder: Path, processes: int, windows: int) -> None:
    """Train in several processes at the same time, and print the anonymous memory of each process."""
    command = [sys.executable, __file__, "train", "--folder", str(folder), "--windows", str(windows)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    workers: list[subprocess.Popen[str]] = [subprocess.Popen(command, **pipes) for _ in range(processes)]  # type: ignore[call-overload]
    peak, ended = [0.0] * processes, [""] * processes
    readers = [
        threading.Thread(target=lambda n=n: ended.__setitem__(n, workers[n].stdout.readline()))
        for n in range(processes)
    ]
    for reader in readers:
        reader.start()
    while any(reader.is_alive() for reader in readers):
        time.sleep(0.1)
        peak = [max(before, anonymous_mb(worker.pid)) for before, worker in zip(peak, workers, strict=True)]
    print("| process | result | anonymous, MB: peak | at the end |\n|---|---|---|---|")
    for number, worker in enumerate(workers):
        print(f"| {number} | {ended[number].strip()} | {peak[number]:.0f} | {anonymous_mb(worker.pid):.0f} |")
    for worker in workers:
        worker.communicate()
    size = sum(file.stat().st_size for file in folder.glob("*/contents-*/*.values")) / 1e6
    print(f"panels of {size:,.0f} MB, one thread per process")


def measure_files(prices: Path, limit: str, windows: int) -> None:
    """Build Alpha158 with all columns and train on it, in this process; print a row of the table."""
    torch.set_num_threads(1)
    peak, ended = [0.0], threading.Event()

    def sample() -> None:
        while not ended.wait(0.02):
            peak[0] = max(peak[0], memory_mb("RssAnon"))

    before, sampler = memory_mb("RssAnon"), threading.Thread(target=sample)
    sampler.start()
    infer = [*HANDLER["infer_processors"], {"class": "CSZScoreNorm", "kwargs": {"fields_group": "feature"}}]
    seconds = [time.process_time()]
    handler = Alpha158(
        "all",
        data=prices,
        infer_processors=infer,
        learn_processors=HANDLER["learn_processors"],
        memory_limit=limit,
        **FIT,
    )
    seconds.append(time.process_time())
    learn = handler.panel("learn")
    train, count = training_days(learn, windows)
    dataset = TSDatasetH(handler, {"train": train, "test": (learn.datetimes[-1], None)}, step_len=20)
    ts.LSTM(d_feat=158, hidden_size=16, num_layers=1, n_epochs=1, seed=0, progress=False).fit(dataset)
    seconds.append(time.process_time())
    ended.set()
    sampler.join()
    times = " | ".join(f"{seconds[i + 1] - seconds[i]:.1f}" for i in range(2))
    print(f"| {limit} | {times} | {peak[0] - before:,.0f} | {handler.panel('infer').content_hash()[:12]} | {count:,} |")


def main() -> None:
    """Write the prices and run one mode."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=("handler", "shared", "train", "files", "form"))
    parser.add_argument("--instruments", type=int, default=5000)
    parser.add_argument("--days", type=int, default=2500)
    parser.add_argument("--windows", type=int, default=50_000)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--limit", help="memory_limit of form, which is one process of files")
    parser.add_argument("--folder", type=Path, help="folder of the panels, which are kept")
    options = parser.parse_args()
    if options.mode == "train":
        train_on(options.folder, options.windows)
        return
    if options.mode == "form":
        measure_files(options.folder / "prices", options.limit, options.windows)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        prices = folder / "prices"
        if not prices.exists():
            write_prices(prices, options.instruments, options.days)
        if options.mode == "handler":
            measure_handler(prices, options.windows)
            return
        if options.mode == "files":
            print("| memory_limit | handler, CPU s | fit, CPU s | anonymous, MB | digest | windows |")
            print("|---|---|---|---|---|---|", flush=True)
            for limit in ("0", "1 TB"):
                command = [sys.executable, __file__, "form", "--folder", str(folder), "--limit", limit]
                subprocess.run([*command, "--windows", str(options.windows)], check=True)
            return
        features = folder / "features"
        if not features.exists():
            write_features(prices, features)
        measure_shared(features, options.processes, options.windows)


if __name__ == "__main__":
    main()
