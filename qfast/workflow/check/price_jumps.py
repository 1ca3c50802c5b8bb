"""Closing prices with splits that are not adjusted, and prices that are not positive."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator

import numpy as np

from qfast.data.panel import Panel
from qfast.data.protocols import Handler
from qfast.dates import date_text
from qfast.errors import some
from qfast.workflow.check.findings import Finding

__all__ = ["price_findings"]

ADJUSTED = ("adjclose", "adjustedclose", "closeadj", "closeadjusted")
FEWEST_ROWS = 20  # with a close, of an instrument that is compared with others
LARGEST_MOVE = 1.8  # ratio of consecutive closes, or its inverse, that only a split usually exceeds
LARGEST_ADJUSTMENT = 1.2  # the same for the ratio of close and adjusted close, which dividends change, too


def price_findings(handler: Handler) -> Iterator[Finding]:
    """Returns beyond the limits, and whether an adjusted close explains them."""
    prices = getattr(handler, "prices", None)
    if not isinstance(prices, Panel) or "close" not in prices.columns("price"):
        return
    close = prices.column("close", "price")
    bad = int(np.count_nonzero(close <= 0))
    if bad:
        yield Finding("warning", "prices", f"{bad} closing prices are zero or negative, so their returns are wrong")
    yield from _equal_series(prices, close)
    rows = np.flatnonzero(np.isfinite(close) & (close > 0))
    later, earlier = rows[1:], rows[:-1]
    same = prices.instrument_codes[later] == prices.instrument_codes[earlier]
    later, earlier = later[same], earlier[same]
    if getattr(getattr(handler, "read_options", None), "adjust", None):
        return
    adjusted = next((c for c in prices.columns("price") if re.sub("[^a-z]", "", c) in ADJUSTED), None)
    if adjusted is not None:
        yield from _unadjusted(prices, close, adjusted, later, earlier)
        return
    ratio = close[later].astype(np.float64) / close[earlier]
    jumps = np.flatnonzero((ratio > LARGEST_MOVE) | (ratio < 1 / LARGEST_MOVE))
    if len(jumps):
        listed = [f"{_where(prices, int(later[i]))} {ratio[i] - 1:+.0%}" for i in jumps]
        yield Finding(
            "warning",
            "prices",
            f"{len(jumps)} closing price(s) change by a factor of more than {LARGEST_MOVE} from one day to the next, "
            f"which may be an unadjusted split: {some(listed, most=3)}",
        )


def _equal_series(prices: Panel, close: np.ndarray) -> Iterator[Finding]:
    """Instruments whose close never changes, and instruments with the closes of another one."""
    constant, copies = [], []
    first: dict[tuple[int, bytes], str] = {}
    starts = np.flatnonzero(np.diff(prices.instrument_codes, prepend=-1))
    for start, stop in zip(starts, [*starts[1:], len(close)], strict=True):
        values = close[start:stop]
        present = values[np.isfinite(values)]
        if len(present) < FEWEST_ROWS:
            continue
        name = str(prices.instruments[prices.instrument_codes[start]])
        if present.min() == present.max():
            constant.append(name)
            continue
        content = hashlib.blake2b(np.ascontiguousarray(values).tobytes(), digest_size=16).digest()
        other = first.setdefault((int(prices.date_codes[start]), content), name)
        if other != name:
            copies.append(f"{name} has those of {other}")
    if constant:
        yield Finding(
            "warning", "prices", f"the close of {len(constant)} instrument(s) never changes: {some(constant, most=5)}"
        )
    if copies:
        yield Finding(
            "warning",
            "prices",
            f"{len(copies)} instrument(s) have the same closes as another one: {some(copies, most=3)}",
        )


def _unadjusted(
    prices: Panel, close: np.ndarray, adjusted: str, later: np.ndarray, earlier: np.ndarray
) -> Iterator[Finding]:
    with np.errstate(all="ignore"):
        factor = close.astype(np.float64) / prices.column(adjusted, "price")
        change = factor[later] / factor[earlier]
        ratio = close[later].astype(np.float64) / close[earlier]
        splits = (change > LARGEST_ADJUSTMENT) | (change < 1 / LARGEST_ADJUSTMENT)
    if splits.any():
        listed = [
            f"{_where(prices, int(row))} {move - 1:+.0%}"
            for row, move in zip(later[splits], ratio[splits], strict=True)
        ]
        yield Finding(
            "warning",
            "prices",
            f"close is not adjusted for {np.count_nonzero(splits)} split(s), but the prices have the column "
            f"{adjusted!r}: {some(listed, most=3)}. Features and label use close. Remedy: --adjust (in Python: "
            "read_options={'adjust': True}) adjusts all prices",
        )
    else:
        yield Finding("note", "prices", f"features and label use close, not the column {adjusted!r} (--adjust uses it)")


def _where(prices: Panel, row: int) -> str:
    instrument = prices.instruments[prices.instrument_codes[row]]
    return f"{instrument} on {date_text(prices.datetimes[prices.date_codes[row]])}"
