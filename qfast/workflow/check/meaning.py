"""Runs that cannot mean anything: misspelled segments, labels without information, wrong prices, odd calendars.

`qfast check` and `qfast run` both report these findings, the latter before training.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from qfast.data.panel import Panel
from qfast.data.protocols import Handler, HandlerDataset
from qfast.dates import date_text
from qfast.errors import nearest, some
from qfast.workflow.check.calendar import calendar_findings
from qfast.workflow.check.findings import CheckReport, Finding
from qfast.workflow.check.price_jumps import price_findings
from qfast.workflow.schema import Workflow

__all__ = ["check_meaning", "meaningless", "segment_name_findings"]

log = logging.getLogger("qfast")

ALIASES = {"valid": ("dev", "eval", "vaild"), "test": ("oos", "out_of_sample", "holdout")}
LEAK_SAMPLE = 20_000  # rows on which features are compared with the label
LEAK_ROWS = 50  # fewest of them
LEAK_CORRELATION = 0.9999


def check_meaning(report: CheckReport, workflow: Workflow, dataset: HandlerDataset) -> None:
    """Report what makes a run meaningless. The costs are a few passes over the labels and one price column.

    Parameters
    ----------
    report : CheckReport
        Receives the findings. An exception becomes an error finding.
    workflow : Workflow
    dataset : DatasetH
    """
    parts: tuple[tuple[str, Callable[[], Iterator[Finding]]], ...] = (
        ("segments", lambda: segment_name_findings(workflow, dataset)),
        ("segments", lambda: _span_findings(dataset)),
        ("segments", lambda: _window_findings(dataset)),
        ("label", lambda: _horizon_findings(dataset.handler)),
        ("label", lambda: _label_findings(dataset)),
        ("look-ahead", lambda: _leak_findings(dataset.handler)),
        ("prices", lambda: price_findings(dataset.handler)),
        ("calendar", lambda: calendar_findings(dataset.handler)),
        ("strategy", lambda: _topk_findings(workflow, dataset)),
        ("training", lambda: _training_findings(workflow)),
    )
    for topic, findings in parts:
        with report.attempt(topic):
            report.findings.extend(findings())


def meaningless(workflow: Workflow, dataset: HandlerDataset) -> list[str]:
    """Log and return the warnings and errors of `check_meaning`, for a run that is about to train."""
    report = CheckReport()
    check_meaning(report, workflow, dataset)
    texts = [f"{f.topic}: {f.text.rstrip('.')}." for f in report.findings if f.level in ("warning", "error")]
    for text in texts:
        log.warning("%s", text)
    return texts


# ---------------------------------------------------------------- segments
def segment_name_findings(workflow: Workflow, dataset: HandlerDataset) -> Iterator[Finding]:
    """Segments whose names training and backtest do not use, and the consequences of a missing segment valid."""
    names = list(dataset.segments)
    similar = {role: _similar(role, names) for role in ("valid", "test") if role not in names}
    arguments = workflow.task.model.kwargs
    if "valid" in similar:
        epochs = arguments.get("n_epochs", "default")
        without = sorted({"early_stop", "metric"} & {name for name, value in arguments.items() if value})
        effect = f"training runs n_epochs={epochs} epochs without early stopping and keeps the last weights"
        if without:
            effect += f"; {' and '.join(without)} {'have' if len(without) > 1 else 'has'} no effect"
        if similar["valid"] is None:
            yield Finding("note", "segments", f"there is no segment 'valid', so {effect}")
        else:
            yield Finding(
                "warning",
                "segments",
                f"training does not use the segment {similar['valid']!r}. Did you mean 'valid'? Without it, {effect}",
            )
    if similar.get("test") is not None:
        yield Finding(
            "warning",
            "segments",
            f"backtest and export do not use the segment {similar['test']!r}. Did you mean 'test'?",
        )


def _similar(role: str, names: list[str]) -> str | None:
    """The name that is probably a misspelling of `role`."""
    others = {name.strip().lower(): name for name in names if name not in ("train", "valid", "test")}
    known = next((others[name] for name in (*ALIASES.get(role, ()), role) if name in others), None)
    if known is not None:
        return known
    match = nearest(role, others)
    return None if match is None else others[match]


def _span_findings(dataset: HandlerDataset) -> Iterator[Finding]:
    """Segments that extend beyond the data, and segments other than train that overlap."""
    panel = dataset.handler.panel("infer")
    codes = np.unique(panel.date_codes[panel.live_rows()])
    first, last = panel.datetimes[codes[0]], panel.datetimes[codes[-1]]
    ranges = {name: panel.date_code_range(*bounds) for name, bounds in dataset.segments.items()}
    for name, (start, end) in dataset.segments.items():
        if ranges[name][0] >= ranges[name][1]:
            continue  # an empty segment is reported elsewhere
        before = start is not None and (first - panel.timestamp(start, "start")).days > MOST_BEYOND
        after = end is not None and (panel.timestamp(end, "end") - last).days > MOST_BEYOND
        if before or after:
            yield Finding(
                "note",
                "segments",
                f"{name} is from {start} to {end}, but the data is from {date_text(first)} to {date_text(last)}",
            )
    others = [name for name in ranges if name != "train"]
    for position, name in enumerate(others):
        for other in others[position + 1 :]:
            shared = min(ranges[name][1], ranges[other][1]) - max(ranges[name][0], ranges[other][0])
            if shared > 0:
                yield Finding("warning", "segments", f"{name} and {other} have {shared} days in common")


MOST_BEYOND = 30  # calendar days by which a segment may extend beyond the data without a note


def _window_findings(dataset: HandlerDataset) -> Iterator[Finding]:
    """Windows that are longer than the data, so every one contains filled rows."""
    step_len = getattr(dataset, "step_len", None)
    panel = dataset.handler.panel("infer")
    days = len(np.unique(panel.date_codes[panel.live_rows()]))
    if isinstance(step_len, int) and step_len > days:
        yield Finding(
            "warning",
            "segments",
            f"step_len is {step_len}, but the data has {days} days, so the beginning of each window is filled",
        )


# ---------------------------------------------------------------- labels
def _horizon_findings(handler: Handler) -> Iterator[Finding]:
    """Labels that are computed without later prices."""
    if getattr(handler, "label_horizon", None) == 0:
        texts = [str(text) for text in getattr(handler, "label_expressions", [])]
        yield Finding(
            "warning",
            "label",
            f"the label {some(texts, 1)} reads no later prices, so it is known when the features are. Remedy: Ref with "
            "a negative number, for example Ref($close, -2) / Ref($close, -1) - 1",
        )


def _label_findings(dataset: HandlerDataset) -> Iterator[Finding]:
    panel = dataset.handler.panel("learn")
    if "label" not in panel.blocks or len(panel.columns("label")) != 1:
        return
    label = panel.values("label")[:, 0]
    for name in ("train", "valid"):
        if name not in dataset.segments:
            continue
        rows = panel.rows_between(*dataset.segments[name])
        finite = rows[np.isfinite(label[rows])]
        if not len(finite):
            empty = "no rows" if not len(rows) else "no labels"
            if len(dataset.handler.panel("infer").rows_between(*dataset.segments[name])):
                yield Finding("error", "label", f"{name} has {empty} after the learn processors")
            continue
        yield from _constant_label(dataset.handler, panel, finite, label[finite], name)


def _constant_label(
    handler: Handler, panel: Panel, rows: np.ndarray, label: np.ndarray, name: str
) -> Iterator[Finding]:
    """Labels [n] of a segment that are all equal, or equal within a day."""
    counts, constant = _constant_days(panel.date_codes[rows], label)
    several = counts > 1
    if len(label) > 1 and label.min() == label.max():
        ranked = [type(p).__name__ for p in handler.learn_processors if type(p).__name__.startswith("CS")]
        cause = (
            f" There is one instrument per day, and {ranked[0]} compares the instruments of a day." if ranked else ""
        )
        yield Finding(
            "error" if name == "train" else "warning",
            "label",
            f"all {len(label):,} labels of {name} are {label[0]:.6g} after the learn processors, so there is nothing "
            f"to learn.{'' if several.any() else cause}",
        )
        return
    if several.any() and np.mean(constant[several]) > 0.5:
        yield Finding(
            "warning",
            "label",
            f"all instruments have the same label on {np.count_nonzero(constant & several):,} of "
            f"{np.count_nonzero(several):,} days of {name}, so the label does not rank them",
        )
    if not several.any():
        yield Finding(
            "note", "label", f"{name} has one instrument per day, so IC, rank IC and a choice of stocks are undefined"
        )


def _constant_days(date_codes: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Number of labels of each day, and whether they are equal."""
    order = np.argsort(date_codes, kind="stable")
    starts = np.flatnonzero(np.diff(date_codes[order], prepend=-1))
    low, high = (function.reduceat(label[order], starts) for function in (np.minimum, np.maximum))
    return np.diff(np.append(starts, len(order))), low == high


# ---------------------------------------------------------------- features that contain the label
def _leak_findings(handler: Handler) -> Iterator[Finding]:
    """Features that equal the label or a multiple of it. Expressions are analyzed elsewhere."""
    if getattr(handler, "prices", None) is not None or handler.drop_raw:
        return
    raw = handler.panel("raw")
    if "label" not in raw.blocks or "feature" not in raw.blocks:
        return
    rows = raw.live_rows()
    rows = rows[:: max(1, len(rows) // LEAK_SAMPLE)]
    label = raw.values("label")[rows, 0].astype(np.float64)
    features = raw.values("feature")[rows]
    leaks = []
    for position, column in enumerate(raw.columns("feature")):
        feature = features[:, position]
        both = np.isfinite(feature) & np.isfinite(label)
        x, y = feature[both].astype(np.float64), label[both]
        varies = len(x) >= LEAK_ROWS and x.min() < x.max() and y.min() < y.max()
        if varies and abs(np.corrcoef(x, y)[0, 1]) > LEAK_CORRELATION:
            leaks.append(str(column))
    if leaks:
        yield Finding(
            "error",
            "look-ahead",
            f"{len(leaks)} feature(s) equal the label or a linear function of it: {some(leaks)}. Remedy: drop them",
        )


# ---------------------------------------------------------------- training
def _training_findings(workflow: Workflow) -> Iterator[Finding]:
    """Arguments with which training changes no weight."""
    arguments = workflow.task.model.kwargs
    for name in ("n_epochs", "lr"):
        if arguments.get(name) == 0:
            origin = workflow.task.init_from
            weights = "untrained weights" if origin is None else f"the weights of {origin}"
            yield Finding(
                "warning", "training", f"{name} is 0, so nothing is trained and the scores are those of {weights}"
            )


# ---------------------------------------------------------------- portfolio
def _topk_findings(workflow: Workflow, dataset: HandlerDataset) -> Iterator[Finding]:
    """A portfolio that contains every instrument, so the scores do not matter."""
    if "test" not in dataset.segments:
        return
    panel = dataset.handler.panel("infer")
    rows = panel.rows_between(*dataset.segments["test"])
    counts = np.bincount(panel.date_codes[rows])
    counts = counts[counts > 0]
    for topk in _topk_values(workflow):
        if len(counts) and topk >= np.median(counts):
            yield Finding(
                "warning",
                "strategy",
                f"topk is {topk}, but test has {int(np.median(counts))} instruments per day, so the portfolio holds "
                "all of them whatever their scores",
            )


def _topk_values(workflow: Workflow) -> Iterator[int]:
    for record in workflow.task.record:
        value: object = record.kwargs.get("config")
        for key in ("strategy", "kwargs", "topk"):
            value = value.get(key) if isinstance(value, Mapping) else None
        if record.class_ == "PortAnaRecord" and isinstance(value, int):
            yield value
