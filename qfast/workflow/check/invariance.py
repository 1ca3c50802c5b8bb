"""The invariance experiments: the score of a row must not depend on the other requested dates or on earlier prices."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np

from qfast.data.handlers.prices import priced_handler
from qfast.data.panel import Panel
from qfast.data.processors import Processor
from qfast.data.protocols import Handler, HandlerDataset
from qfast.data.rows import take_rows
from qfast.dates import date_text
from qfast.errors import some
from qfast.workflow.check.expressions import start_dependent_features
from qfast.workflow.check.findings import CheckReport
from qfast.workflow.check.scores import NEARBY, ROUNDING_OF_SUMS, compare_scores, scored_days, scored_segment
from qfast.workflow.check.trial import STAGES, Trial, named_instruments, rebuild_dataset, untrained_model
from qfast.workflow.lookback import days_needed
from qfast.workflow.schema import Workflow

__all__ = ["check_later_start", "check_second_half"]


def check_second_half(report: CheckReport, workflow: Workflow, dataset: HandlerDataset) -> None:
    """Compare the scores of the second half of a segment, requested alone and with the first half."""
    name = scored_segment(dataset)
    days = scored_days(dataset)
    middle = days[len(days) // 2]
    model = untrained_model(workflow)
    whole, part = model.predict(dataset, name), model.predict(dataset, slice(middle, dataset.segments[name][1]))
    condition = f"requested from {date_text(middle)} on, with and without the earlier dates"
    compare_scores(report, "invariance", condition, whole.loc[part.index], part)


def check_later_start(report: CheckReport, trial: Trial) -> None:
    """Compare scores from all prices with scores from prices that begin as late as the lookback of the features allows.

    The fitted processors are the same in both cases.
    """
    handler = trial.dataset.handler
    priced = priced_handler(handler)
    assert priced is not None
    endless = start_dependent_features(priced)
    if endless:
        reason = "EMA or windows over all earlier rows" if priced.compat is None else "compat='qlib': running sums"
        report.add(
            "note",
            "invariance",
            f"{len(endless)} feature(s) depend on the first day of the data: {some(endless, most=3)} ({reason}); "
            "prices or a start_time that begin on another day change the scores",
        )
        return
    days = scored_days(trial.dataset)
    position = len(days) // 2
    start, end = days[position], days[min(position + 2 * NEARBY, len(days) - 1)]
    first = int(trial.source.datetimes.searchsorted(start)) + 1 - days_needed(trial.dataset)
    if first <= 0:
        return  # the prices already begin that late
    shorter = rebuild_dataset(
        trial.workflow,
        _from_day(trial.source, first, named_instruments(handler)),
        {"later": (start, end)},
        learn_processors=[],
        **{f"{stage}_processors": _frozen(handler, stage) for stage in STAGES},
    )
    whole, part = trial.model.predict(trial.dataset, slice(start, end)), trial.model.predict(shorter, "later")
    first_price = date_text(trial.source.datetimes[first])
    condition = f"requested from {date_text(start)} on, with prices from {first_price} on {trial.size}"
    compare_scores(
        report, "invariance", condition, whole, part.reindex(whole.index), tolerance=ROUNDING_OF_SUMS, level="warning"
    )


def _from_day(panel: Panel, first: int, named: Sequence[str]) -> Panel:
    """Rows from date code `first` on, and all rows of `named` instruments that end earlier, for `Mask` expressions."""
    last = np.zeros(len(panel.instruments), dtype=np.int64)
    np.maximum.at(last, panel.instrument_codes, panel.date_codes)
    lower = [str(name).lower() for name in panel.instruments]
    ended = (last < first) & np.isin(lower, [name.lower() for name in named])
    return take_rows(panel, np.flatnonzero((panel.date_codes >= first) | ended[panel.instrument_codes]))


def _frozen(handler: Handler, stage: str) -> list[Processor]:
    """Copies of the fitted processors of a stage that are not fitted again."""
    copies = [copy.deepcopy(processor) for processor in getattr(handler, f"{stage}_processors")]
    for processor in copies:
        processor.frozen = True
    return copies
