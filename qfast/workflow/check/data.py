"""Missing values by column and by day, constant columns, labels, dropped raw data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from qfast.data.panel import Panel
from qfast.dates import date_text
from qfast.errors import some
from qfast.workflow.check.findings import CheckReport
from qfast.workflow.schema import Workflow

__all__ = ["check_data", "require_raw_labels"]


MANY_MISSING = 0.2  # share from which a column's or a day's missing values are a warning


def require_raw_labels(report: CheckReport, workflow: Workflow) -> None:
    """A run compares its scores with raw labels; the rest of the check goes on as if they were kept."""
    own = workflow.task.dataset.kwargs.handler.kwargs.model_extra or {}
    if own.get("drop_raw"):
        report.add(
            "error", "data",
            "task.dataset.kwargs.handler.kwargs.drop_raw is true, and `qfast run` needs the raw labels: it will stop "
            "with RawDataDroppedError. Remedy: leave drop_raw out",
        )  # fmt: skip
        own["drop_raw"] = False


def check_data(report: CheckReport, dataset: Any, seconds: float) -> None:
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
