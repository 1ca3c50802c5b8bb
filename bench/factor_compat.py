"""Differences between the exact factors and Qlib's (compat="qlib") on stocks with halts: the table of docs/factors.md.

    python bench/factor_compat.py [--instruments 100] [--days 1250]

Synthetic prices from `qfast.data.synthetic.prices`. Each stock is halted three times for 5 to 70 days: its open, high,
low, close and vwap stay at the last close and its volume is 0. For each family of Alpha158 with a cell that differs by
more than 1e-4 of Qlib's value, a line shows

- the cells that differ, of all windows together, and the cells that are missing in only one of them,
- the largest difference of two numbers, the largest number of Qlib's in such a cell, and the exact one there,
- how much the differences move the other rows: the share of the column's rows whose robust z-score
  ((x - median) / (1.4826 MAD), limited to -3 and 3, as in RobustZScoreNorm) changes by more than 0.01.
"""

from __future__ import annotations

import argparse
import logging

import numpy as np
import pandas as pd

from qfast.data import Alpha158, synthetic

HALTS = 3
DAYS_OF_A_HALT = (5, 70)
SAME = 1e-4


def with_halts(prices: pd.DataFrame) -> pd.DataFrame:
    """Prices, indexed (datetime, instrument), in which every stock is halted three times."""
    rng = np.random.default_rng(0)
    parts = []
    for _, stock in prices.sort_index(level=["instrument", "datetime"]).groupby(level="instrument", sort=True):
        stock = stock.copy()
        for begin in rng.integers(1, len(stock) - 1, HALTS):
            rows = slice(int(begin), int(begin) + int(rng.integers(*DAYS_OF_A_HALT)))
            close = stock["close"].iloc[int(begin) - 1]
            for name in stock.columns:
                values = stock[name].to_numpy(copy=True)
                values[rows] = 0 if name == "volume" else close
                stock[name] = values
        parts.append(stock)
    return pd.concat(parts).sort_index()


def robust(values: np.ndarray) -> np.ndarray:
    """Robust z-scores by column, limited to -3 and 3."""
    centered = values - np.nanmedian(values, axis=0)
    deviation = np.nanmedian(np.abs(centered), axis=0) + 1e-12
    return np.clip(centered / (1.4826 * deviation), -3, 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instruments", type=int, default=100)
    parser.add_argument("--days", type=int, default=1250)
    arguments = parser.parse_args()
    logging.getLogger("qfast").setLevel(logging.ERROR)
    prices = with_halts(synthetic.prices(arguments.instruments, arguments.days))
    exact, qlib = (
        Alpha158(data=prices, infer_processors=[], learn_processors=[], compat=compat).fetch(col_set="feature")
        for compat in (None, "qlib")
    )
    families = np.array([name.rstrip("0123456789") for name in exact.columns])
    print(f"{len(exact):,} rows, {arguments.instruments} stocks, {arguments.days} days")
    print(f"{'family':8}{'cells':>9}{'missing':>9}{'difference':>12}{'Qlib':>11}{'exact':>11}{'rows moved':>12}")
    for family in dict.fromkeys(families):
        a, b = (frame.to_numpy(np.float64)[:, families == family] for frame in (exact, qlib))
        missing = np.isnan(a) != np.isnan(b)
        with np.errstate(invalid="ignore"):
            numbers = np.abs(a - b) > SAME * np.abs(b)
        if not (missing | numbers).any():
            continue
        moved = np.nanmean(np.abs(robust(a) - robust(b)) > 0.01)
        largest = np.nan_to_num(np.where(numbers, np.abs(a - b), 0))
        place = np.unravel_index(np.argmax(largest), largest.shape)
        print(
            f"{family:8}{np.sum(missing | numbers):>9,}{np.sum(missing):>9,}{largest[place]:>12.1e}"
            f"{b[place]:>11.1e}{a[place]:>11.1e}{moved:>12.2%}"
        )


if __name__ == "__main__":
    main()
