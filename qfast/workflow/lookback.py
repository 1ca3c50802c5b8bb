"""Do the rows to be scored have the earlier days that their features look back on?

Features that look back beyond the first row of the data are missing, and processors replace missing values with a
constant. Without this check, data that begins too late would be scored incorrectly and silently.
"""

from __future__ import annotations

import numpy as np

from qfast._renamed import renamed_names
from qfast.data.handlers.prices import priced_handler
from qfast.data.panel import Panel
from qfast.data.protocols import Handler, HandlerDataset
from qfast.dates import DateLike, date_text
from qfast.errors import DataError

__all__ = ["check_lookback", "days_needed", "short_fraction"]

__getattr__ = renamed_names(
    __name__,
    {
        "check_history": "qfast.workflow.lookback.check_lookback",
        "short_share": "qfast.workflow.lookback.short_fraction",
    },
)

# A date is reported if the fraction of its rows with too few earlier days exceeds both this value and twice the
# fraction in the training data. New listings always lack earlier days.
TOLERATED = 0.1


def days_needed(dataset: HandlerDataset) -> int:
    """Number of days that the features of one sample depend on, including its own."""
    return int(getattr(dataset.handler, "lookback", 1)) + int(getattr(dataset, "step_len", 1)) - 1


def short_fraction(dataset: HandlerDataset, segment: str = "train") -> float:
    """Fraction of the rows of a segment whose instrument has fewer than `days_needed` days of data up to that row."""
    panel = dataset.handler.panel("infer")
    rows = panel.rows_between(*dataset.segments[segment])
    needed = days_needed(dataset)
    if needed == 1 or not len(rows):
        return 0.0
    return float(np.mean(_days_available(dataset.handler, panel, rows) < needed))


def check_lookback(
    dataset: HandlerDataset, start: DateLike | None, end: DateLike | None, trained: float = 0.0
) -> str | None:
    """Describe the dates whose rows lack earlier days, for a warning.

    Parameters
    ----------
    dataset : DatasetH
        Dataset of the new data.
    start, end : date-like or None
        The dates to score, both inclusive.
    trained : float
        `short_fraction` of the training rows.

    Returns
    -------
    str or None
        None if all dates have enough earlier days.

    Raises
    ------
    DataError
        No row has as many days as the features need.
    """
    needed = days_needed(dataset)
    panel = dataset.handler.panel("infer")
    rows = panel.rows_between(start, end)
    if needed == 1 or not len(rows):
        return None
    days = _days_available(dataset.handler, panel, rows)
    short = days < needed
    codes = panel.date_codes[rows]
    n_dates = len(panel.datetimes)
    rows_of_date = np.bincount(codes, minlength=n_dates)
    short_of_date = np.bincount(codes, weights=short, minlength=n_dates)
    reported = np.flatnonzero(short_of_date > max(TOLERATED, 2 * trained) * rows_of_date)
    if short.all():
        raise DataError(
            f"the data begins too late: the features of one score need {needed} days, but no row to be scored "
            f"({_period(panel, np.flatnonzero(rows_of_date))}) has more than {int(days.max())}. Remedy: data that "
            f"begins at least {needed - 1} trading days before the first date to score."
        )
    if not len(reported):
        return None
    return (
        f"the data begins too late for {len(reported)} of the {np.count_nonzero(rows_of_date)} scored dates "
        f"({_period(panel, reported)}; {int(short_of_date[reported].sum()):,} rows): the features need {needed} days, "
        f"and missing days were filled in, so these scores are unreliable. Remedy: data that begins at least "
        f"{needed - 1} trading days earlier, or a later start."
    )


def _period(panel: Panel, date_codes: np.ndarray) -> str:
    first, last = (date_text(panel.datetimes[int(code)]) for code in (date_codes[0], date_codes[-1]))
    return first if first == last else f"{first} to {last}"


def _days_available(handler: Handler, panel: Panel, rows: np.ndarray) -> np.ndarray:
    """Number of days, int64, from the first row of each row's instrument up to the row, including both.

    Days without trading count, because the training data has such gaps, too. So do days of prices on which the
    instrument is not a member of the market, because features read them.
    """
    source = getattr(handler, "prices", None)
    if not isinstance(source, Panel):
        source = panel
    if "price" in source.blocks:
        present = np.flatnonzero(np.isfinite(source.column("close", "price")))
    else:
        present = source.live_rows()
    first = np.full(len(source.instruments), len(source.datetimes), dtype=np.int64)
    np.minimum.at(first, source.instrument_codes[present], source.date_codes[present])
    priced = priced_handler(handler)
    if priced is not None:
        first[priced.priced_earlier()] = 0
    instruments = np.searchsorted(source.instruments, panel.instruments)[panel.instrument_codes[rows]]
    dates = source.datetimes.searchsorted(panel.datetimes)[panel.date_codes[rows]]
    return np.maximum(dates.astype(np.int64) - first[instruments] + 1, 0)
