"""The dates that the experiments score, and the comparison of two scorings."""

from __future__ import annotations

import numpy as np
import pandas as pd

from qfast.data.protocols import HandlerDataset
from qfast.dates import date_text
from qfast.workflow.check.findings import CheckReport

__all__ = ["NEARBY", "ROUNDING_OF_SUMS", "compare_scores", "scored_days", "scored_segment"]

# Tolerances, relative to the standard deviation of the scores.
ROUNDING = 1e-5  # two scorings of one row
ROUNDING_OF_SUMS = 1e-3  # two scorings whose rolling sums begin on different days
NEARBY = 20  # days scored on either side of a cut, because a batch of several days may contain both sides


def scored_segment(dataset: HandlerDataset) -> str:
    """The segment whose scores matter most: test, valid or train, whichever comes first."""
    return next((name for name in ("test", "valid") if name in dataset.segments), "train")


def scored_days(dataset: HandlerDataset) -> pd.DatetimeIndex:
    """Days with rows in the scored segment."""
    panel = dataset.handler.panel("infer")
    codes = np.unique(panel.date_codes[panel.rows_between(*dataset.segments[scored_segment(dataset)])])
    return panel.datetimes[codes]


def compare_scores(
    report: CheckReport,
    topic: str,
    condition: str,
    expected: pd.Series,
    actual: pd.Series,
    tolerance: float = ROUNDING,
    level: str = "error",
) -> None:
    """Report whether two scorings of the same rows agree.

    Parameters
    ----------
    report : CheckReport
        Receives the finding.
    topic, condition : str
        Topic and first words of the finding.
    expected, actual : Series
        Scores with equal indices. NaN equals NaN.
    tolerance : float
        Largest allowed difference, in standard deviations of `expected`.
    level : str
        Level of the finding if the scores differ.
    """
    first, second = expected.to_numpy(dtype=float), actual.to_numpy(dtype=float)
    finite = first[np.isfinite(first)]
    spread = float(np.std(finite)) if len(finite) else 0.0
    differ = ~(np.abs(first - second) <= tolerance * (spread or 1.0)) & ~(np.isnan(first) & np.isnan(second))
    if not differ.any():
        report.add("ok", topic, f"{condition}: all {len(expected):,} scores are the same")
        return
    day, instrument = expected.index[int(np.argmax(differ))]
    report.add(
        level,
        topic,
        f"{condition}: {int(differ.sum()):,} of {len(expected):,} scores differ, first {instrument} on "
        f"{date_text(day)}",
    )
