"""Alpha158 compared with Qlib's handler, its processors, and a second run from the cache.

    python bench/bench_factors.py [--instruments 500] [--days 1250] [--reference 40]

Synthetic prices. Qlib's handler runs over `--reference` instruments of a Qlib store with one process. Its time is
linear in the number of instruments and is scaled to all of them. Process CPU time, one thread; the last figure is wall
time with two threads. Peak memory is the peak of the process beyond its memory before the call.
"""

from __future__ import annotations

import argparse
import logging
import resource
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from qfast.data import Alpha158, DataHandlerLP, load_prices, synthetic
from qfast.data.panel import Panel

FIELDS = ("open", "high", "low", "close", "volume", "vwap")
RAW: dict[str, Any] = {"infer_processors": [], "learn_processors": []}


def timed(work: Callable[[], Any]) -> tuple[float, float, Any]:
    """(CPU seconds, wall seconds, result)."""
    cpu, wall = time.process_time(), time.perf_counter()
    result = work()
    return time.process_time() - cpu, time.perf_counter() - wall, result


def write_store(root: Path, panel: Panel, count: int) -> None:
    """The first `count` instruments as a Qlib store."""
    for part in ("calendars", "instruments", "features"):
        (root / part).mkdir(parents=True)
    (root / "calendars" / "day.txt").write_text("\n".join(panel.datetimes.strftime("%Y-%m-%d")) + "\n")
    lines = []
    for code, name in enumerate(panel.instruments[:count]):
        rows = np.flatnonzero(panel.instrument_codes == code)
        folder = root / "features" / str(name).lower()
        folder.mkdir()
        for field in FIELDS:
            values = panel.column(field)[rows]
            np.concatenate([[panel.date_codes[rows[0]]], values]).astype("<f4").tofile(folder / f"{field}.day.bin")
        lines.append(f"{name}\t1990-01-01\t2099-12-31")
    (root / "instruments" / "all.txt").write_text("\n".join(lines) + "\n")


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def processors(days: pd.DatetimeIndex) -> dict[str, Any]:
    window = {"fit_start_time": str(days[0].date()), "fit_end_time": str(days[len(days) // 2].date())}
    return {
        **window,
        "infer_processors": [
            {"class": "RobustZScoreNorm", "kwargs": {"fields_group": "feature"}},
            {"class": "Fillna", "kwargs": {"fields_group": "feature"}},
        ],
        "learn_processors": ["DropnaLabel", {"class": "CSRankNorm", "kwargs": {"fields_group": "label"}}],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instruments", type=int, default=500)
    parser.add_argument("--days", type=int, default=1250)
    parser.add_argument("--reference", type=int, default=40)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("qfast").setLevel(logging.ERROR)
    panel = load_prices(synthetic.prices(arguments.instruments, arguments.days))
    with tempfile.TemporaryDirectory() as folder:
        write_store(Path(folder, "store"), panel, arguments.reference)
        torch.set_num_threads(1)
        before = peak_mb()
        ours = min(timed(lambda: Alpha158(data=panel, **RAW))[0] for _ in range(3))
        raw = Alpha158(data=panel, **RAW)
        peak = peak_mb() - before
        size = sum(block.values.nbytes for block in raw.panel("raw").blocks.values()) / 2**20
        half = Alpha158(
            data=panel, instruments=[str(n) for n in panel.instruments[: arguments.instruments // 2]], **RAW
        )
        linear = min(
            timed(lambda: Alpha158(data=panel, instruments=[str(n) for n in half.panel("raw").instruments], **RAW))[0]
            for _ in range(3)
        )
        table = raw.panel("raw")
        staged = min(timed(lambda: DataHandlerLP(table, **processors(panel.datetimes)))[0] for _ in range(3))
        Alpha158(data=panel, cache=Path(folder, "cache"), **RAW)
        again = min(timed(lambda: Alpha158(data=panel, cache=Path(folder, "cache"), **RAW))[1] for _ in range(3))
        torch.set_num_threads(2)
        wall = min(timed(lambda: Alpha158(data=panel, **RAW))[1] for _ in range(3))
        theirs, their_stages = reference(Path(folder, "store"), table.to_frame(), processors(panel.datetimes))
    scale = arguments.instruments / arguments.reference
    print(f"{arguments.instruments} instruments x {arguments.days} days, {size:,.0f} MB of factors")
    print(
        f"factors: Qlib {theirs * scale:.1f} s (of {arguments.reference} instruments, scaled), qfast {ours:.2f} s, "
        f"{theirs * scale / ours:.0f}x; two threads {wall:.2f} s of wall time"
    )
    print(f"half the instruments: {linear:.2f} s")
    print(f"processors: Qlib {their_stages:.1f} s, qfast {staged:.2f} s, {their_stages / staged:.1f}x")
    print(f"from the cache: {again:.2f} s of wall time")
    print(f"peak memory: {peak:,.0f} MB, {peak / size:.2f} of the result")


def reference(root: Path, frame: pd.DataFrame, stages: dict[str, Any]) -> tuple[float, float]:
    """CPU seconds of pyqlib's raw handler, and of its processors over a frame."""
    import qlib
    from qlib.contrib.data.handler import Alpha158 as Reference
    from qlib.data.dataset.handler import DataHandlerLP as ReferenceHandler
    from qlib.data.dataset.loader import StaticDataLoader

    qlib.init(provider_uri=str(root), region="us", kernels=1, joblib_backend="threading", logging_level=logging.ERROR)
    factors = timed(lambda: Reference("all", **RAW))[0]
    window = {name: stages.pop(name) for name in ("fit_start_time", "fit_end_time")}
    stages["infer_processors"][0]["kwargs"].update(window)
    loader = StaticDataLoader(frame)
    return factors, timed(lambda: ReferenceHandler(data_loader=loader, **stages))[0]


if __name__ == "__main__":
    main()
