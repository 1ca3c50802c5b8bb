"""`qfast check`: what is wrong with a workflow and its data, before hours are spent on it.

What can be read off the data, the segments and the expressions is looked at first, and a portfolio backtest is
rehearsed; then experiments with a changed future and with other questions are made on a sample of the instruments.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from qfast._renamed import renamed_names
from qfast.data.handlers.prices import PriceHandler
from qfast.errors import QfastError
from qfast.workflow import pretraining
from qfast.workflow.check.data import check_data, require_raw_labels
from qfast.workflow.check.epoch_time import check_epoch_time
from qfast.workflow.check.expressions import check_expressions
from qfast.workflow.check.findings import CheckReport, Finding
from qfast.workflow.check.invariance import check_later_start, check_second_half
from qfast.workflow.check.look_ahead import check_future_change
from qfast.workflow.check.portfolio import check_portfolio
from qfast.workflow.check.segments import check_segments
from qfast.workflow.check.trial import Trial, feature_source, source_argument
from qfast.workflow.config import load_config
from qfast.workflow.dataset import build_dataset
from qfast.workflow.schema import Workflow
from qfast.workflow.validation import check_workflow

__all__ = ["CheckReport", "Finding", "check", "run_experiments"]

__getattr__ = renamed_names(
    __name__,
    {
        "experiment": "qfast.workflow.check.run_experiments",
        "look_at_expressions": "qfast.workflow.check.expressions.check_expressions",
        "rows_ahead": "qfast.workflow.check.expressions.rows_ahead",
        "scored": "qfast.workflow.check.scores.scored_segment",
    },
)
log = logging.getLogger("qfast")


def check(
    config_path: str | os.PathLike[str],
    data: Any = None,
    sets: Sequence[str] = (),
    *,
    device: str | None = "cpu",
    experiments: bool = True,
) -> CheckReport:
    """Look a workflow and its data over without training.

    Parameters
    ----------
    config_path, data, sets, device
        As for `qfast.workflow.run.run`.
    experiments : bool
        False leaves out what needs the model: look-ahead, window invariance, time of an epoch.

    Returns
    -------
    CheckReport
        Missing values by column and by day, constant columns, duplicate rows, label horizon and fit windows against
        the segments, what a portfolio backtest needs, memory and time, look-ahead, window invariance. An error that
        breaks one of them off is a finding, too.

    Raises
    ------
    ConfigError
        A workflow file that cannot be read or says what is not known.

    Examples
    --------
    >>> from qfast.workflow.demo import DEMO, demo_prices
    >>> report = check(DEMO, demo_prices(20, 560))
    >>> report.ok, [f.level for f in report.findings if f.topic == "look-ahead"]
    (True, ['ok', 'ok'])
    """
    report = CheckReport()
    with report.attempt("workflow", reraise=(QfastError,)):
        workflow = check_workflow(load_config(config_path, sets).values, str(config_path))
        pretraining.absolute_model_path(workflow.task.model, Path(config_path), optional=True)
    if not report.ok:
        return report
    if device is not None:
        workflow.task.model.kwargs["device"] = device
    workflow.task.model.kwargs.setdefault("seed", 0)
    report.add("ok", "workflow", f"{config_path}: keys, classes and arguments are known")
    require_raw_labels(report, workflow)
    started = time.perf_counter()
    dataset = None
    with report.attempt("data"):  # duplicate rows, wrong columns, empty periods: each says what and where
        dataset = build_dataset(workflow, data)
    if dataset is None:
        return report
    seconds = time.perf_counter() - started
    with report.attempt("data"):
        check_data(report, dataset, seconds)
    with report.attempt("look-ahead"):
        check_expressions(report, dataset.handler)
    with report.attempt("segments"):
        check_segments(report, workflow, dataset)
    if any(f.level == "error" and f.topic == "segments" for f in report.findings):
        report.add("note", "experiments", "left out: the segments come first")
        return report
    with _silence():  # what is said of the data has been said once
        with report.attempt("portfolio"):
            check_portfolio(report, workflow, dataset)
        if experiments:
            run_experiments(report, workflow, dataset)
    return report


def run_experiments(report: CheckReport, workflow: Workflow, dataset: Any) -> None:
    """Time a few batches, change the future, ask for less; what breaks off is a finding.

    Parameters
    ----------
    report : CheckReport
        Findings are added to it.
    workflow : Workflow
    dataset : DatasetH
        The workflow's, with every segment holding rows.
    """
    with report.attempt("time"):
        check_epoch_time(report, workflow, dataset)
    trial: Trial | None = None
    with report.attempt("look-ahead"):
        source = feature_source(dataset.handler)
        if source is None:
            report.add("note", "look-ahead", "left out: the prices or factors were given up (drop_raw)")
        elif source_argument(workflow) is None:
            named = type(dataset.handler).__name__
            report.add("note", "look-ahead", f"left out: {named} takes neither data nor source")
        else:
            trial = Trial.of(workflow, dataset, source)
            check_future_change(report, trial)
    with report.attempt("invariance"):
        check_second_half(report, workflow, dataset)
    with report.attempt("invariance"):
        if trial is not None and isinstance(dataset.handler, PriceHandler):
            check_later_start(report, trial)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)
