"""Seeded frames shaped like real panels."""

from __future__ import annotations

import numpy as np
import pandas as pd

from qfast.data import DatasetH, TSDatasetH


def make_frame(
    n_dates: int = 40,
    n_instruments: int = 7,
    n_features: int = 3,
    *,
    seed: int = 0,
    holes: float = 0.1,
    dtype: type = np.float32,
    freq: str = "B",
) -> pd.DataFrame:
    """(datetime, instrument) frame with ("feature", ...) and ("label", ...) columns and missing rows."""
    rng = np.random.default_rng(seed)
    dates = pd.date_range("2020-01-01", periods=n_dates, freq=freq)
    names = [f"S{i:03d}" for i in range(n_instruments)]
    index = pd.MultiIndex.from_product([dates, names], names=["datetime", "instrument"])
    keep = rng.random(len(index)) >= holes
    index = index[keep]
    columns = pd.MultiIndex.from_tuples([("feature", f"F{j}") for j in range(n_features)] + [("label", "LABEL0")])
    values = rng.standard_normal((len(index), n_features + 1)).astype(dtype)
    return pd.DataFrame(values, index=index, columns=columns)


SEGMENTS = {
    "train": ("2020-01-01", "2020-02-14"),
    "valid": ("2020-02-15", "2020-03-10"),
    "test": ("2020-03-11", "2020-12-31"),
}


def rolling(frame: pd.DataFrame | None = None, segments=SEGMENTS, **kwargs) -> TSDatasetH:
    """Windows of 5 steps and 3 features, by default over a frame of 70 dates and 9 instruments."""
    return TSDatasetH(handler=make_frame(70, 9, 3) if frame is None else frame, segments=segments, step_len=5, **kwargs)


def flat(frame: pd.DataFrame | None = None, segments=SEGMENTS) -> DatasetH:
    """Rows of 12 columns, which are 3 features at 4 steps, by default over 70 dates and 9 instruments."""
    return DatasetH(handler=make_frame(70, 9, 12) if frame is None else frame, segments=segments)


def gappy_frame() -> pd.DataFrame:
    """Missing rows, NaN features, NaN labels, and one date on which no label exists."""
    frame = make_frame(70, 9, 4, holes=0.2, seed=5)
    rng = np.random.default_rng(6)
    frame[("feature", "F1")] = frame[("feature", "F1")].mask(rng.random(len(frame)) < 0.05)
    frame[("label", "LABEL0")] = frame[("label", "LABEL0")].mask(rng.random(len(frame)) < 0.08)
    blank = frame.index.get_level_values("datetime") == frame.index.levels[0][45]
    frame[("label", "LABEL0")] = frame[("label", "LABEL0")].mask(blank)
    return frame


FIT_WINDOW = {"fit_start_time": "2024-01-02", "fit_end_time": "2024-01-05"}


def hostile_frame(seed: int, n_days: int = 7, n_stocks: int = 5, label: str = "LABEL0") -> pd.DataFrame:
    """Multiples of 1/4, whose sums are exact, with ties, constant days, NaN, ±inf and short days."""
    rng = np.random.default_rng(seed)
    dates = pd.date_range("2024-01-01", periods=n_days)
    index = pd.MultiIndex.from_product([dates, [f"S{i}" for i in range(n_stocks)]], names=["datetime", "instrument"])
    values = (rng.integers(-12, 12, size=(len(index), 5)) / 4).astype(np.float32)
    values[rng.random(values.shape) < 0.15] = np.nan
    values[rng.random(values.shape) < 0.03] = np.inf
    values[rng.random(values.shape) < 0.03] = -np.inf
    values[:, 2] = 1.0  # a constant column
    columns = pd.MultiIndex.from_tuples([("feature", f"x{j}") for j in range(4)] + [("label", label)])
    frame = pd.DataFrame(values, index=index, columns=columns)
    keep = rng.random(len(frame)) < 0.8
    keep[:n_stocks] = [True] + [False] * (n_stocks - 1)  # a day with one stock
    keep[-n_stocks:] = [True] * n_stocks
    return frame[keep]
