"""Seeded frames shaped like real panels."""

from __future__ import annotations

import numpy as np
import pandas as pd


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
