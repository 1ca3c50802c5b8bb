"""Do scores depend on what else is asked for? Less is asked for, and prices begin later."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np

from qfast.data.panel import Panel
from qfast.data.rows import take_rows
from qfast.dates import date_text
from qfast.errors import some
from qfast.workflow.check.expressions import start_dependent_features
from qfast.workflow.check.findings import CheckReport
from qfast.workflow.check.scores import NEAR, NEARBY, compare_scores, scored_days, scored_segment
from qfast.workflow.check.trial import STAGES, Trial, named_instruments, rebuild_dataset, untrained_model
from qfast.workflow.lookback import days_needed
from qfast.workflow.schema import Workflow

__all__ = ["check_later_start", "check_second_half"]


def check_second_half(report: CheckReport, workflow: Workflow, dataset: Any) -> None:
    """Scores of the second half of a segment, asked for with the first half and without."""
    name = scored_segment(dataset)
    days = scored_days(dataset)
    middle = days[len(days) // 2]
    model = untrained_model(workflow)
    whole, part = model.predict(dataset, name), model.predict(dataset, slice(middle, dataset.segments[name][1]))
    said = f"asked for from {date_text(middle)} on and with what lies before"
    compare_scores(report, "invariance", said, whole.loc[part.index], part)


def check_later_start(report: CheckReport, trial: Trial) -> None:
    """Scores from prices that begin as late as the lookback of the features allows, processors as they are."""
    handler = trial.dataset.handler
    endless = start_dependent_features(handler)
    if endless:
        report.add(
            "note", "invariance",
            f"{len(endless)} feature(s) depend on the first day of the data: {some(endless, most=3)} (EMA, windows of "
            "all rows so far); scores from prices of another start, or with another start_time, differ",
        )  # fmt: skip
        return
    days = scored_days(trial.dataset)
    place = len(days) // 2
    segment = slice(days[place], days[min(place + 2 * NEARBY, len(days) - 1)])
    first = int(trial.source.datetimes.searchsorted(segment.start)) + 1 - days_needed(trial.dataset)
    if first <= 0:
        return  # they begin so late as it is
    start = trial.source.datetimes[first]
    shorter = rebuild_dataset(
        trial.workflow,
        _from_day(trial.source, first, named_instruments(handler)),
        {"later": (segment.start, segment.stop)},
        learn_processors=[],
        **{f"{stage}_processors": _frozen(handler, stage) for stage in STAGES},
    )
    whole, part = trial.model.predict(trial.dataset, segment), trial.model.predict(shorter, "later")
    said = f"asked for from {date_text(segment.start)} on, with prices from {date_text(start)} on {trial.size}"
    compare_scores(report, "invariance", said, whole, part.reindex(whole.index), NEAR, "warning")


def _from_day(panel: Panel, first: int, named: Sequence[str]) -> Panel:
    """Rows from date code `first` on, and all rows of `named` instruments that end before: expressions need them."""
    last = np.zeros(len(panel.instruments), dtype=np.int64)
    np.maximum.at(last, panel.instrument_codes, panel.date_codes)
    lower = [str(name).lower() for name in panel.instruments]
    ended = (last < first) & np.isin(lower, [name.lower() for name in named])
    return take_rows(panel, np.flatnonzero((panel.date_codes >= first) | ended[panel.instrument_codes]))


def _frozen(handler: Any, stage: str) -> list[Any]:
    """Copies of fitted processors that are not fitted again."""
    found = [copy.deepcopy(processor) for processor in getattr(handler, f"{stage}_processors")]
    for processor in found:
        processor.frozen = True
    return found
