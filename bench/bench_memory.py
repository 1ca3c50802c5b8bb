"""Peak memory of building a dataset and of `fit`, against the size of the float32 panel.

    python bench/bench_memory.py [--instruments 1000] [--days 2500] [--columns 160]

Linux only. Prints resident memory after the imports, the peak of building the dataset (the caller's frame
and the panel at once) and the peak of `fit` and `predict` alone.
"""

from __future__ import annotations

import argparse

import numpy as np
import pandas as pd
from compare import memory_mb, reset_peak

from qfast.data import TSDatasetH
from qfast.data.handlers import DataHandlerLP
from qfast.models import ts


def build(instruments: int, days: int, columns: int) -> DataHandlerLP:
    dates = pd.bdate_range("2010-01-01", periods=days)
    names = [f"S{i:04d}" for i in range(instruments)]
    index = pd.MultiIndex.from_product([dates, names], names=["datetime", "instrument"])
    heads = pd.MultiIndex.from_tuples([("feature", f"F{j}") for j in range(columns - 1)] + [("label", "LABEL0")])
    values = np.random.default_rng(0).standard_normal((len(index), columns), dtype=np.float32)
    return DataHandlerLP.from_frame(pd.DataFrame(values, index=index, columns=heads, copy=False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--instruments", type=int, default=1000)
    parser.add_argument("--days", type=int, default=2500)
    parser.add_argument("--columns", type=int, default=160)
    arguments = parser.parse_args()
    print(f"after imports: {memory_mb('VmRSS'):.0f} MB")
    handler = build(arguments.instruments, arguments.days, arguments.columns)
    dates = handler.panel("learn").datetimes
    segments = {"train": (dates[0], dates[len(dates) // 10]), "valid": (dates[-60], dates[-1])}
    dataset = TSDatasetH(handler=handler, segments=segments, step_len=20)
    panel_mb = handler.panel("learn").nbytes / 2**20
    before = memory_mb("VmRSS")
    print(f"panel {panel_mb:.0f} MB; dataset built: resident {before:.0f} MB, peak so far {memory_mb('VmHWM'):.0f} MB")
    model = ts.LSTM(d_feat=arguments.columns - 1, hidden_size=8, n_epochs=1, batch_size=2000, device="cpu")
    reset_peak()
    model.fit(dataset)
    model.predict(dataset, "valid")
    print(f"after fit and predict: resident {memory_mb('VmRSS'):.0f} MB, peak {memory_mb('VmHWM'):.0f} MB")


if __name__ == "__main__":
    main()
