"""`qfast check`: what is wrong with a workflow and its data, before hours are spent on it.

What can be read off the data, the segments and the expressions is looked at here, and a portfolio backtest is
rehearsed; the experiments with a changed future and with other questions are in `qfast.workflow.experiments`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from qfast import registry
from qfast.data.panel import Panel
from qfast.dates import date_text
from qfast.errors import DataError, QfastError, some
from qfast.workflow import pretraining
from qfast.workflow.config import fill_placeholders, load_config
from qfast.workflow.experiments import experiment, look_at_expressions
from qfast.workflow.findings import CheckReport, Finding
from qfast.workflow.portfolio import PortfolioPlan
from qfast.workflow.records import PortAnaRecord
from qfast.workflow.schema import Workflow, check_workflow
from qfast.workflow.scoring import build_dataset

__all__ = ["CheckReport", "Finding", "check"]

log = logging.getLogger("qfast")

MANY_MISSING = 0.2  # share from which a column's or a day's missing values are a warning
TRADED = 20  # instruments of a rehearsed backtest


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
    with report.attempt("workflow", goes_on=(QfastError,)):
        workflow = check_workflow(load_config(config_path, sets).values, str(config_path))
        pretraining.absolute_model_path(workflow.task.model, Path(config_path), optional=True)
    if not report.ok:
        return report
    if device is not None:
        workflow.task.model.kwargs["device"] = device
    workflow.task.model.kwargs.setdefault("seed", 0)
    report.add("ok", "workflow", f"{config_path}: keys, classes and arguments are known")
    _keep_raw(report, workflow)
    started = time.perf_counter()
    dataset = None
    with report.attempt("data"):  # duplicate rows, wrong columns, empty periods: each says what and where
        dataset = build_dataset(workflow, data)
    if dataset is None:
        return report
    seconds = time.perf_counter() - started
    with report.attempt("data"):
        _look_at_data(report, dataset, seconds)
    with report.attempt("look-ahead"):
        look_at_expressions(report, dataset.handler)
    with report.attempt("segments"):
        _look_at_segments(report, workflow, dataset)
    if any(f.level == "error" and f.topic == "segments" for f in report.findings):
        report.add("note", "experiments", "left out: the segments come first")
        return report
    with _silence():  # what is said of the data has been said once
        with report.attempt("portfolio"):
            _look_at_portfolio(report, workflow, dataset)
        if experiments:
            experiment(report, workflow, dataset)
    return report


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


# ---------------------------------------------------------------- data
def _keep_raw(report: CheckReport, workflow: Workflow) -> None:
    """A run compares its scores with raw labels; the rest of the check goes on as if they were kept."""
    own = workflow.task.dataset.kwargs.handler.kwargs.model_extra or {}
    if own.get("drop_raw"):
        report.add(
            "error", "data",
            "task.dataset.kwargs.handler.kwargs.drop_raw is true, and `qfast run` needs the raw labels: it will stop "
            "with RawDataDroppedError. Remedy: leave drop_raw out",
        )  # fmt: skip
        own["drop_raw"] = False


def _look_at_data(report: CheckReport, dataset: Any, seconds: float) -> None:
    handler = dataset.handler
    if handler.drop_raw:
        report.add(
            "error", "data",
            f"{type(handler).__name__} drops the raw data, and `qfast run` needs the raw labels: it will stop with "
            "RawDataDroppedError. Remedy: build it with drop_raw=False",
        )  # fmt: skip
    infer = handler.panel("infer")
    codes = infer.date_codes[infer.live_rows()]
    report.add(
        "ok", "data",
        f"{infer.n_live:,} rows, {len(infer.instruments)} instruments, {date_text(infer.datetimes[codes.min()])} to "
        f"{date_text(infer.datetimes[codes.max()])}; no key occurs twice; read and processed in "
        f"{seconds:.1f} s",
    )  # fmt: skip
    raw = infer if handler.drop_raw else handler.panel("raw")
    values, columns, rows = raw.values("feature"), raw.columns("feature"), raw.live_rows()
    missing = np.zeros(len(columns))
    by_row = np.zeros(len(rows), dtype=np.int32)
    constant = []
    for place, name in enumerate(columns):
        column = values[rows, place]
        lacking = ~np.isfinite(column)
        missing[place] = lacking.mean() if len(rows) else 0.0
        by_row += lacking
        known = column[~lacking]
        if len(known) and known.min() == known.max():
            constant.append(str(name))
    _say_missing_columns(report, columns, missing)
    _say_missing_days(report, raw, rows, by_row / max(1, len(columns)))
    if constant:
        report.add("warning", "constant", f"{len(constant)} column(s) hold one value only: {some(constant)}")
    else:
        report.add("ok", "constant", "no column is constant")
    label = infer.values("label")[infer.live_rows()] if handler.drop_raw else raw.values("label")[rows]
    report.add("note", "label", f"{np.mean(~np.isfinite(label)):.2%} of the rows have none")


def _say_missing_columns(report: CheckReport, columns: Sequence[str], missing: np.ndarray) -> None:
    empty = [str(columns[int(i)]) for i in np.flatnonzero(missing == 1)]
    if empty:
        report.add("warning", "missing", f"{len(empty)} column(s) hold no value at all: {some(empty)}")
    worst = [i for i in np.argsort(-missing, kind="stable") if 0 < missing[i] < 1][:5]
    text = ", ".join(f"{columns[int(i)]} {missing[i]:.1%}" for i in worst) or "nothing is missing"
    much = any(missing[i] > MANY_MISSING for i in worst)
    report.add("warning" if much else "ok", "missing", f"by column, before any processor: {text}")


def _say_missing_days(report: CheckReport, raw: Panel, rows: np.ndarray, share: np.ndarray) -> None:
    codes = raw.date_codes[rows]
    counts = np.bincount(codes, minlength=len(raw.datetimes))
    total = np.bincount(codes, weights=share, minlength=len(raw.datetimes))
    found = np.divide(total, counts, out=np.zeros(len(counts)), where=counts > 0)
    bad = np.flatnonzero(found > MANY_MISSING)
    if not len(bad):
        report.add("ok", "missing", f"by day: at most {found.max():.1%} of a day's values")
        return
    worst = ", ".join(f"{date_text(raw.datetimes[i])} {found[i]:.0%}" for i in bad[np.argsort(-found[bad])][:3])
    report.add(
        "warning", "missing",
        f"by day: {len(bad)} of {np.count_nonzero(counts)} days miss more than {MANY_MISSING:.0%} of their values, "
        f"{worst}",
    )  # fmt: skip


# ---------------------------------------------------------------- segments
def _look_at_segments(report: CheckReport, workflow: Workflow, dataset: Any) -> None:
    panel = dataset.handler.panel("infer")
    spans: dict[str, tuple[int, int]] = {}
    for name, bounds in dataset.segments.items():
        rows = panel.rows_between(*bounds)
        if not len(rows):
            report.add("error", "segments", f"{name} ({bounds[0]} to {bounds[1]}) holds no rows of the data")
            continue
        codes = panel.date_codes[rows]
        spans[name] = int(codes.min()), int(codes.max())
        report.add(
            "note", "segments",
            f"{name}: {len(rows):,} rows on {len(np.unique(codes)):,} days, {date_text(panel.datetimes[codes.min()])} "
            f"to {date_text(panel.datetimes[codes.max()])}",
        )  # fmt: skip
    if "train" not in spans:
        return
    for name, (first, last) in spans.items():
        if name != "train" and first <= spans["train"][1] and last >= spans["train"][0]:
            report.add("error", "segments", f"{name} overlaps train: what is learnt is tested on itself")
    _look_at_horizon(report, dataset, panel, spans)
    _look_at_fit_windows(report, dataset, panel, spans)


def _look_at_horizon(report: CheckReport, dataset: Any, panel: Panel, spans: Mapping[str, tuple[int, int]]) -> None:
    horizon = getattr(dataset.handler, "label_horizon", None)
    if horizon is None:
        report.add("note", "horizon", "the label is the user's own; how far it looks ahead is not known")
        return
    later = [first for name, (first, _) in spans.items() if name != "train" and first > spans["train"][1]]
    if not later:
        return
    gap = min(later) - spans["train"][1] - 1
    if gap >= horizon:
        report.add("ok", "horizon", f"labels look {horizon} days ahead; {gap} days lie between train and what follows")
        return
    report.add(
        "warning", "horizon",
        f"labels look {horizon} days ahead, and {gap} days lie between train and the next segment: the last "
        f"{horizon - gap} days of train are learnt from prices of that segment. Remedy: end train {horizon - gap} "
        "trading days earlier (the reference does not)",
    )  # fmt: skip


def _look_at_fit_windows(report: CheckReport, dataset: Any, panel: Panel, spans: Mapping[str, tuple[int, int]]) -> None:
    others = [first for name, (first, _) in spans.items() if name != "train"]
    for stage in ("shared", "infer"):
        for processor in getattr(dataset.handler, f"{stage}_processors"):
            end = getattr(processor, "fit_end_time", None)
            if end is None or not others:
                continue
            after = panel.date_code_range(None, end)[1]
            name = type(processor).__name__
            if after > min(others):
                report.add(
                    "error", "fit window",
                    f"{name} is fitted up to {end}, which lies in a segment that is scored: its statistics know the "
                    "future. Remedy: fit_end_time at the end of train",
                )  # fmt: skip
            else:
                report.add("ok", "fit window", f"{name} is fitted up to {end}, before what is scored")


# ---------------------------------------------------------------- portfolio
def _look_at_portfolio(report: CheckReport, workflow: Workflow, dataset: Any) -> None:
    """The backtest that the file asks for, on scores drawn at random."""
    objects = {"<MODEL>": None, "<DATASET>": dataset, "<PRED>": "<PRED>"}
    task = workflow.resolved()["task"]
    plans = []
    for position, spec in enumerate(workflow.task.record):
        record = registry.RECORDS.build(fill_placeholders(spec.given(), objects, task), path=f"task.record.{position}")
        plans += [record.plan] if isinstance(record, PortAnaRecord) else []
    if not plans:
        return
    for plan in plans:
        plan.check_prices(dataset.handler, workflow.qlib_init.region)
    with report.attempt("portfolio", "`qfast run` will leave the backtest out: "):
        _rehearse(report, plans[0], workflow, dataset)  # the first one is the one that is run


def _rehearse(report: CheckReport, plan: PortfolioPlan, workflow: Workflow, dataset: Any) -> None:
    if "test" not in dataset.segments:
        raise DataError("there is no segment test, whose scores it trades on.")
    panel = dataset.handler.panel("infer")
    rows = panel.rows_between(*dataset.segments["test"])
    there = np.unique(panel.instrument_codes[rows])
    rows = rows[np.isin(panel.instrument_codes[rows], there[:: -(-len(there) // TRADED)])]
    score = pd.Series(np.random.default_rng(0).standard_normal(len(rows)), panel.index(rows), name="score")
    found = plan.run(score, dataset.handler, workflow.qlib_init.region)
    days = found.backtest.report.index
    report.add(
        "ok", "portfolio",
        f"{len(days)} days can be traded, {date_text(days[0])} to {date_text(days[-1])} (tried on "
        f"{min(len(there), TRADED)} instruments)",
    )  # fmt: skip
    for note in found.notes:
        report.add("note", "portfolio", note)
