"""`qfast check`: look for problems in a workflow and its data before training.

The checks run in this order: the workflow file, the data, the weights that the training starts from, what expressions
state about themselves, the segments, a rehearsal of the portfolio backtest, and experiments with an untrained model on
a sample of the instruments.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from qfast._renamed import renamed_names
from qfast.data.handlers.prices import priced_handler
from qfast.data.protocols import HandlerDataset
from qfast.data.source_notes import collected_notes
from qfast.errors import QfastError
from qfast.read_options import ReadOptions, ReadSettings
from qfast.workflow import pretraining, resumption, starting
from qfast.workflow.check.data import check_data, require_raw_labels
from qfast.workflow.check.epoch_time import check_epoch_time
from qfast.workflow.check.expressions import check_expressions
from qfast.workflow.check.findings import CheckReport, Finding
from qfast.workflow.check.invariance import check_later_start, check_second_half
from qfast.workflow.check.look_ahead import check_future_change
from qfast.workflow.check.meaning import check_meaning
from qfast.workflow.check.portfolio import check_portfolio
from qfast.workflow.check.segments import check_segments
from qfast.workflow.check.trial import Trial, feature_source, source_argument
from qfast.workflow.check.weights import check_starting_weights
from qfast.workflow.config import load_config
from qfast.workflow.dataset import DataInput, build_dataset
from qfast.workflow.schema import Workflow
from qfast.workflow.user_code import AllowCode, allowed_code
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
    data: DataInput | None = None,
    sets: Sequence[str] = (),
    *,
    device: str | None = "cpu",
    experiments: bool = True,
    allow_code: AllowCode = None,
    read_options: ReadSettings = None,
) -> CheckReport:
    """Look for problems in a workflow and its data without training.

    Parameters
    ----------
    config_path, data, sets, device, allow_code, read_options
        As for `qfast.run`.
    experiments : bool
        False skips everything that needs the model: the time of an epoch, look-ahead, window invariance.

    Returns
    -------
    CheckReport
        Findings about missing values by column and by day, constant columns, duplicate rows, the label horizon and the
        fit windows compared with the segments, the portfolio backtest, memory and time, look-ahead, and window
        invariance. An exception of one check becomes an error finding, and the other checks continue.

    Raises
    ------
    ConfigError
        The workflow file cannot be read or is invalid.

    Examples
    --------
    >>> from qfast.workflow.demo import DEMO, demo_prices
    >>> report = check(DEMO, demo_prices(20, 560))
    >>> report.ok, [f.level for f in report.findings if f.topic == "look-ahead"]
    (True, ['ok', 'ok'])
    """
    report = CheckReport()
    with allowed_code(allow_code):
        _check(report, config_path, data, sets, device, experiments, ReadOptions.of(read_options))
    return report


def _check(
    report: CheckReport,
    config_path: str | os.PathLike[str],
    data: DataInput | None,
    sets: Sequence[str],
    device: str | None,
    experiments: bool,
    read_options: ReadOptions,
) -> None:
    with report.attempt("workflow", reraise=(QfastError,)):
        workflow = check_workflow(load_config(config_path, sets).values, str(config_path))
        pretraining.absolute_model_path(workflow.task.model, Path(config_path), optional=True)
        starting.absolute_origin(workflow, Path(config_path))
        resumption.locate_sources(workflow, config_path)
    if not report.ok:
        return
    if device is not None:
        workflow.task.model.kwargs["device"] = device
    workflow.task.model.kwargs.setdefault("seed", 0)
    report.add("ok", "workflow", f"{config_path}: keys, classes and arguments are valid")
    require_raw_labels(report, workflow)
    started = time.perf_counter()
    dataset = None
    with collected_notes() as source_notes, report.attempt("data"):
        # Duplicate rows, wrong columns and empty periods are errors of the handler.
        if data is None:
            recorded = resumption.recorded_data(config_path)
            data, read_options = recorded.data, read_options.over(recorded.read_options)
        dataset = build_dataset(workflow, data, read_options)
    for note in source_notes:
        if (note.warning or dataset is not None) and not note.is_repeated_by_check:
            report.add("warning" if note.warning else "note", "source", note.text)
    if dataset is None:
        return
    seconds = time.perf_counter() - started
    with report.attempt("data"):
        check_data(report, dataset, seconds)
    with report.attempt("weights"):
        check_starting_weights(report, workflow, dataset)
    with report.attempt("look-ahead"):
        check_expressions(report, dataset.handler)
    with report.attempt("segments"):
        check_segments(report, dataset)
    check_meaning(report, workflow, dataset)
    if any(f.level == "error" and f.topic == "segments" for f in report.findings):
        report.add("note", "experiments", "skipped, because they need valid segments")
        return
    with _warnings_off():  # the checks above have reported these already
        with report.attempt("portfolio"):
            check_portfolio(report, workflow, dataset)
        if experiments:
            run_experiments(report, workflow, dataset)


def run_experiments(report: CheckReport, workflow: Workflow, dataset: HandlerDataset) -> None:
    """Time a few batches, change future data, and request fewer dates. Exceptions become findings.

    Parameters
    ----------
    report : CheckReport
        Receives the findings.
    workflow : Workflow
    dataset : DatasetH
        The dataset of the workflow. Every segment must contain rows.
    """
    with report.attempt("time"):
        check_epoch_time(report, workflow, dataset)
    trial: Trial | None = None
    with report.attempt("look-ahead"):
        source = feature_source(dataset.handler)
        name = type(dataset.handler).__name__
        if source is None:
            report.add("note", "look-ahead", f"skipped: {name} has discarded its prices or factors (drop_raw)")
        elif source_argument(workflow) is None:
            report.add("note", "look-ahead", f"skipped: {name} accepts neither data nor source")
        else:
            trial = Trial.of(workflow, dataset, source)
            check_future_change(report, trial)
    with report.attempt("invariance"):
        check_second_half(report, workflow, dataset)
    with report.attempt("invariance"):
        if trial is not None and priced_handler(dataset.handler) is not None:
            check_later_start(report, trial)


@contextlib.contextmanager
def _warnings_off() -> Iterator[None]:
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
