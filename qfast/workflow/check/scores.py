"""The days that are scored, and two ways to score them compared."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from qfast.dates import date_text
from qfast.workflow.check.findings import CheckReport

__all__ = ["NEAR", "NEARBY", "compare_scores", "scored_days", "scored_segment"]


SAME = 1e-5  # scores of one row, asked for in two ways, differ by less, beside their spread
NEAR = 1e-3  # and by less, where rolling sums that began on another day were rounded another way
NEARBY = 20  # days scored on either side of a cut: a batch of a model that mixes days holds both sides


def scored_segment(dataset: Any) -> str:
    """The segment whose scores matter most, of those that are there."""
    return next((name for name in ("test", "valid") if name in dataset.segments), "train")


def scored_days(dataset: Any) -> pd.DatetimeIndex:
    """Days of what is scored."""
    panel = dataset.handler.panel("infer")
    codes = np.unique(panel.date_codes[panel.rows_between(*dataset.segments[scored_segment(dataset)])])
    return panel.datetimes[codes]


def compare_scores(
    report: CheckReport,
    topic: str,
    said: str,
    one: pd.Series,
    other: pd.Series,
    same: float = SAME,
    level: str = "error",
) -> None:
    first, second = one.to_numpy(dtype=float), other.to_numpy(dtype=float)
    known = first[np.isfinite(first)]
    spread = float(np.std(known)) if len(known) else 0.0
    unlike = ~(np.abs(first - second) <= same * (spread or 1.0)) & ~(np.isnan(first) & np.isnan(second))
    if not unlike.any():
        report.add("ok", topic, f"{said}, all {len(one):,} scores are the same")
        return
    day, who = one.index[int(np.argmax(unlike))]
    report.add(
        level, topic, f"{said}, {int(unlike.sum()):,} of {len(one):,} scores differ, first {who} on {date_text(day)}"
    )
