"""Do the rows to be scored have the history that their features look back on?

What lies before the first row of the data is missing in the features, and processors fill it with a constant,
so that too short a file would be scored without a word, and wrongly.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from qfast._renamed import renamed_names
from qfast.data.panel import Panel
from qfast.dates import date_text
from qfast.errors import DataError

__all__ = ["check_lookback", "days_needed", "short_fraction"]

__getattr__ = renamed_names(
    __name__,
    {
        "check_history": "qfast.workflow.lookback.check_lookback",
        "short_share": "qfast.workflow.lookback.short_fraction",
    },
)

# A date counts as short when more of its rows lack history than this, or than twice what training saw: stocks that
# are new in the market have no history to give.
TOLERATED = 0.1


def days_needed(dataset: Any) -> int:
    """Days, its own included, that the features of one sample look at."""
    return int(getattr(dataset.handler, "lookback", 1)) + int(getattr(dataset, "step_len", 1)) - 1


def short_fraction(dataset: Any, segment: str = "train") -> float:
    """Share of a segment's rows whose instrument had fewer than `days_needed` days in the data."""
    panel = dataset.handler.panel("infer")
    rows = panel.rows_between(*dataset.segments[segment])
    needed = days_needed(dataset)
    if needed == 1 or not len(rows):
        return 0.0
    return float(np.mean(_days_available(dataset.handler, panel, rows) < needed))


def check_lookback(dataset: Any, start: Any, end: Any, trained: float = 0.0) -> str | None:
    """A sentence about the dates from `start` to `end` whose rows lack history; None if all is well.

    Parameters
    ----------
    dataset : DatasetH
        Its handler holds the new data.
    start, end : date-like or None
        The dates to be scored, both inclusive.
    trained : float
        `short_fraction` of the training rows.

    Raises
    ------
    DataError
        Not one row has the history that the features need.
    """
    needed = days_needed(dataset)
    panel: Panel = dataset.handler.panel("infer")
    rows = panel.rows_between(start, end)
    if needed == 1 or not len(rows):
        return None
    days = _days_available(dataset.handler, panel, rows)
    short = days < needed
    dates = panel.date_codes[rows]
    size = len(panel.datetimes)
    of_date = np.bincount(dates, minlength=size)
    lacking = np.bincount(dates, weights=short, minlength=size)
    reported = np.flatnonzero(lacking > max(TOLERATED, 2 * trained) * of_date)
    if short.all():
        raise DataError(
            f"too little history: the features of one score look at {needed} days, and no row to be scored "
            f"({_period(panel, np.flatnonzero(of_date))}) has more than {int(days.max())} in the data. Remedy: data "
            f"that begins at least {needed - 1} trading days before the first date to be scored."
        )
    if not len(reported):
        return None
    return (
        f"too little history for {len(reported)} of the {np.count_nonzero(of_date)} dates scored "
        f"({_period(panel, reported)}; {int(lacking[reported].sum()):,} rows): the features look at {needed} days, and "
        f"what lies before the data was filled in. These scores are not to be relied on. Remedy: data that begins at "
        f"least {needed - 1} trading days earlier, or a later start."
    )


def _period(panel: Panel, date_codes: np.ndarray) -> str:
    first, last = (date_text(panel.datetimes[int(code)]) for code in (date_codes[0], date_codes[-1]))
    return first if first == last else f"{first} to {last}"


def _days_available(handler: Any, panel: Panel, rows: np.ndarray) -> np.ndarray:
    """int64 days from the first one of the row's instrument in the data up to the row, both included.

    Days without trading count: holes were in the training data as well.
    """
    source = getattr(handler, "prices", None)
    if not isinstance(source, Panel):
        source = panel
    known = source.live_rows()
    if "price" in source.blocks:
        known = known[np.isfinite(source.column("close", "price")[known])]
    first = np.full(len(source.instruments), len(source.datetimes), dtype=np.int64)
    np.minimum.at(first, source.instrument_codes[known], source.date_codes[known])
    instruments = np.searchsorted(source.instruments, panel.instruments)[panel.instrument_codes[rows]]
    dates = source.datetimes.searchsorted(panel.datetimes)[panel.date_codes[rows]]
    return np.maximum(dates.astype(np.int64) - first[instruments] + 1, 0)
