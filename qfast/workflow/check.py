"""`qfast check`: what is wrong with a workflow and its data, before hours are spent on it.

Besides looking at the data it makes two experiments. The future is changed, all else left alone, and the features
and the scores of the past must not move; and scores are asked for in a shorter period, and must be the same. Both
are made on the processed features and on a network with its first weights, so no training is needed: what leaks
leaks through data and processors, or through what a network does with a batch, and both are there.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from qfast import registry
from qfast.callbacks import Callback
from qfast.data.handlers.prices import PriceHandler
from qfast.data.panel import Panel
from qfast.data.rows import restrict_rows
from qfast.dates import date_text
from qfast.errors import QfastError, some
from qfast.workflow import pretraining
from qfast.workflow.config import load_config
from qfast.workflow.schema import Workflow, check_workflow
from qfast.workflow.scoring import build_dataset

__all__ = ["CheckReport", "Finding", "check"]

log = logging.getLogger("qfast")

SAMPLE = 60  # instruments of the experiments
MANY_MISSING = 0.2  # share from which a column's or a day's missing values are a warning
TIMED_BATCHES = 6
SAME = 1e-5  # scores of one row, asked for in two ways, differ by less, beside their spread


@dataclass(frozen=True)
class Finding:
    """One thing found. `level` is "ok", "note", "warning" or "error"."""

    level: str
    topic: str
    text: str


@dataclass
class CheckReport:
    """All findings of a check."""

    findings: list[Finding] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """True if nothing was found that must be mended."""
        return all(finding.level != "error" for finding in self.findings)

    def add(self, level: str, topic: str, text: str) -> None:
        """Append a finding."""
        self.findings.append(Finding(level, topic, text))

    def lines(self) -> list[str]:
        """The findings as lines of text."""
        wide = max((len(f.topic) for f in self.findings), default=0)
        return [f"{f.level:<8}{f.topic:<{wide + 2}}{f.text}" for f in self.findings]


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
        the segments, memory and time, look-ahead, window invariance.

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
    workflow = check_workflow(load_config(config_path, sets).values, str(config_path))
    pretraining.absolute_model_path(workflow.task.model, Path(config_path), optional=True)
    if device is not None:
        workflow.task.model.kwargs["device"] = device
    workflow.task.model.kwargs.setdefault("seed", 0)
    report = CheckReport([Finding("ok", "workflow", f"{config_path}: keys, classes and arguments are known")])
    started = time.perf_counter()
    try:
        dataset = build_dataset(workflow, data)
    except QfastError as error:  # duplicate rows, wrong columns, empty periods: each says what and where
        report.add("error", "data", str(error))
        return report
    _look_at_data(report, dataset, time.perf_counter() - started)
    _look_at_segments(report, workflow, dataset)
    if experiments and not any(f.level == "error" and f.topic == "segments" for f in report.findings):
        with _silence():  # what is said of the data has been said once
            _try(report, "time", lambda: _time_an_epoch(report, workflow, dataset))
            _try(report, "look-ahead", lambda: _change_the_future(report, workflow, dataset))
            _try(report, "invariance", lambda: _ask_for_less(report, workflow, dataset))
    elif experiments:
        report.add("note", "experiments", "left out: the segments come first")
    return report


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


def _try(report: CheckReport, topic: str, experiment: Callable[[], None]) -> None:
    try:
        experiment()
    except QfastError as error:
        report.add("error", topic, str(error))


# ---------------------------------------------------------------- data
def _look_at_data(report: CheckReport, dataset: Any, seconds: float) -> None:
    handler = dataset.handler
    infer = handler.panel("infer")
    dates = infer.datetimes[infer.date_codes[[0, -1]]] if infer.n_rows else infer.datetimes
    report.add(
        "ok", "data",
        f"{infer.n_live:,} rows, {len(infer.instruments)} instruments, {date_text(dates.min())} to "
        f"{date_text(infer.datetimes[int(infer.date_codes.max())])}; no key occurs twice; read and processed in "
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


# ---------------------------------------------------------------- experiments
class _EnoughError(Exception):
    """Ends a timed fit."""


class _Stopwatch(Callback):
    """Times the first batches of a fit and ends it."""

    def __init__(self) -> None:
        self.moments: list[float] = []

    def on_epoch_start(self, estimator: Any) -> None:
        self.moments.append(time.perf_counter())

    def on_batch_end(self, estimator: Any) -> None:
        self.moments.append(time.perf_counter())
        if len(self.moments) > TIMED_BATCHES:
            raise _EnoughError

    def on_epoch_end(self, estimator: Any) -> None:  # fewer batches than that
        raise _EnoughError

    @property
    def seconds(self) -> float:
        """Of a batch; the first one pays for memory and threads."""
        steps = np.diff(self.moments)
        return float(np.median(steps[1:] if len(steps) > 1 else steps))


def _build_model(workflow: Workflow, **changes: Any) -> Any:
    spec = workflow.task.model.given()
    return registry.MODELS.build({**spec, "kwargs": {**spec.get("kwargs", {}), **changes}}, path="task.model")


def _time_an_epoch(report: CheckReport, workflow: Workflow, dataset: Any) -> None:
    panel = dataset.handler.panel("infer")
    size = sum(p.nbytes for p in _distinct([dataset.handler.panel("infer"), dataset.handler.panel("learn")]))
    report.add("note", "memory", f"features and labels take {size / 2**20:,.0f} MB and are held once")
    model, watch = _build_model(workflow, n_epochs=1, progress=False), _Stopwatch()
    try:
        model.fit(dataset, callbacks=[watch])
    except _EnoughError:
        pass
    except QfastError as error:
        report.add("error", "training", str(error))
        return
    rows = panel.rows_between(*dataset.segments["train"])
    size = model.get_params().get("batch_size")
    batches = len(np.unique(panel.date_codes[rows])) if size is None else max(1, len(rows) // size)  # None: a day each
    epoch, epochs = watch.seconds * batches, workflow.task.model.kwargs.get("n_epochs", 200)
    report.add(
        "note", "time",
        f"a training pass takes about {_duration(epoch)} ({batches:,} batches of {watch.seconds * 1e3:,.0f} ms, "
        f"{model.device}); {epochs} epochs, with their evaluation, at most {_duration(1.5 * epoch * int(epochs))}",
    )  # fmt: skip


def _distinct(panels: Sequence[Panel]) -> Iterator[Any]:
    seen: set[int] = set()
    for panel in panels:
        for block in panel.blocks.values():
            if id(block.values) not in seen:
                seen.add(id(block.values))
                yield block.values


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _change_the_future(report: CheckReport, workflow: Workflow, dataset: Any) -> None:
    """Prices after a day in the middle of what is scored are changed; features and scores up to it must not move."""
    name = _scored(dataset)
    panel = dataset.handler.panel("infer")
    codes = np.unique(panel.date_codes[panel.rows_between(*dataset.segments[name])])
    if len(codes) < 4:
        report.add("note", "look-ahead", f"{name} has too few days for the experiment")
        return
    cut = panel.datetimes[int(codes[len(codes) // 2])]
    source = _source(dataset.handler)
    if source is None:
        report.add("note", "look-ahead", "the prices or factors were given up (drop_raw), so nothing can be changed")
        return
    some_names = [str(n) for n in panel.instruments[:: -(-len(panel.instruments) // SAMPLE)]]
    source = restrict_rows(source, [n for n in source.instruments if str(n) in set(some_names)], None, None)
    sets = [_rebuilt(workflow, prices) for prices in (source, _with_another_future(source, cut))]
    frames = [s.handler.fetch(slice(None, cut), col_set="feature", data_key="infer") for s in sets]
    moved = [str(c) for c in frames[0] if not np.array_equal(frames[0][c], frames[1][c], equal_nan=True)]
    said = f"with every price after {date_text(cut)} changed ({len(source.instruments)} instruments)"
    if moved:
        report.add("error", "look-ahead", f"{said}, {len(moved)} feature(s) of earlier days move: {some(moved)}")
    else:
        report.add("ok", "look-ahead", f"{said}, no feature of that day or before moves by a bit")
    one, other = (_with_first_weights(workflow).predict(part, name).sort_index() for part in sets)
    keep = one.index.get_level_values("datetime") <= cut
    _say_difference(report, "look-ahead", said, one[keep], other.reindex(one.index[keep]))


def _ask_for_less(report: CheckReport, workflow: Workflow, dataset: Any) -> None:
    """Scores of the second half of a segment, asked for with the first half and without."""
    name = _scored(dataset)
    panel = dataset.handler.panel("infer")
    codes = np.unique(panel.date_codes[panel.rows_between(*dataset.segments[name])])
    middle = panel.datetimes[int(codes[len(codes) // 2])]
    end = dataset.segments[name][1]
    model = _with_first_weights(workflow)
    whole, part = model.predict(dataset, name), model.predict(dataset, slice(middle, end))
    _say_difference(
        report,
        "invariance",
        f"asked for from {date_text(middle)} on and with what lies before",
        whole.loc[part.index],
        part,
    )


def _scored(dataset: Any) -> str:
    return next((name for name in ("test", "valid") if name in dataset.segments), "train")


def _source(handler: Any) -> Panel | None:
    """What the handler's features are computed from: prices, or the user's own factors."""
    if isinstance(handler, PriceHandler):
        return handler.prices
    return None if handler.drop_raw else handler.panel("raw")


def _with_another_future(panel: Panel, cut: pd.Timestamp) -> Panel:
    rng = np.random.default_rng(0)
    later = np.asarray(panel.datetimes > cut)[panel.date_codes]
    blocks = {}
    for group, block in panel.blocks.items():
        values = block.values.copy()
        factor = np.exp(0.3 * rng.standard_normal((int(later.sum()), values.shape[1])))
        values[later] = (values[later] * factor + 0.01).astype(values.dtype)
        blocks[group] = replace(block, values=values)
    return replace(panel, blocks=blocks)


def _rebuilt(workflow: Workflow, source: Panel) -> Any:
    """The workflow's dataset over other prices or factors."""
    spec = workflow.task.dataset.given()
    own = spec["kwargs"]["handler"].setdefault("kwargs", {})
    for name in ("instruments", "cache"):
        own.pop(name, None)
    return build_dataset(workflow.model_copy(update={"task": _task(workflow, spec)}), source)


def _task(workflow: Workflow, spec: Mapping[str, Any]) -> Any:
    return workflow.task.model_copy(update={"dataset": type(workflow.task.dataset).model_validate(spec)})


def _with_first_weights(workflow: Workflow) -> Any:
    model = _build_model(workflow, progress=False)
    model.fitted = True
    return model


def _say_difference(report: CheckReport, topic: str, said: str, one: pd.Series, other: pd.Series) -> None:
    apart = np.abs(one.to_numpy(dtype=float) - other.to_numpy(dtype=float))
    spread = float(np.nanstd(one.to_numpy(dtype=float))) or 1.0
    unlike = ~(apart <= SAME * spread) & ~(np.isnan(one.to_numpy()) & np.isnan(other.to_numpy()))
    if unlike.any():
        first = one.index[int(np.argmax(unlike))]
        report.add(
            "error", topic,
            f"{said}, {int(unlike.sum()):,} of {len(one):,} scores differ, first {first[1]} on {date_text(first[0])}",
        )  # fmt: skip
    else:
        report.add("ok", topic, f"{said}, all {len(one):,} scores are the same")
