"""Missing values by column and by day, constant columns, labels, discarded raw data."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qfast.data.handlers.alpha360 import Alpha360
from qfast.data.handlers.prices import PriceHandler, priced_handler
from qfast.data.panel import Panel
from qfast.data.protocols import HandlerDataset
from qfast.dates import date_text
from qfast.errors import some
from qfast.workflow.check.findings import CheckReport
from qfast.workflow.schema import Workflow

__all__ = ["check_data", "require_raw_labels"]

MANY_MISSING = 0.2  # fraction of missing values in a column or on a day above which the finding is a warning


def require_raw_labels(report: CheckReport, workflow: Workflow) -> None:
    """Report an error if the file sets `drop_raw`, then reset it in `workflow` so the other checks can continue."""
    arguments = workflow.task.dataset.kwargs.handler.kwargs.model_extra or {}
    if arguments.get("drop_raw"):
        report.add(
            "error",
            "data",
            "task.dataset.kwargs.handler.kwargs.drop_raw is true, but `qfast run` needs the raw labels and would raise "
            "RawDataDroppedError. Remedy: remove drop_raw",
        )
        arguments["drop_raw"] = False


def check_data(report: CheckReport, dataset: HandlerDataset, seconds: float) -> None:
    """Report the size of the data, missing values, constant columns and missing labels.

    Parameters
    ----------
    report : CheckReport
        Receives the findings.
    dataset : DatasetH
    seconds : float
        Time in which the dataset was built.
    """
    handler = dataset.handler
    if handler.drop_raw:
        report.add(
            "error",
            "data",
            f"{type(handler).__name__} discards the raw data, but `qfast run` needs the raw labels and would raise "
            "RawDataDroppedError. Remedy: build it with drop_raw=False",
        )
    infer = handler.panel("infer")
    codes = infer.date_codes[infer.live_rows()]
    report.add(
        "ok",
        "data",
        f"{infer.n_live:,} rows, {len(infer.instruments)} instruments, {date_text(infer.datetimes[codes.min()])} to "
        f"{date_text(infer.datetimes[codes.max()])}; no duplicate rows; loaded and processed in {seconds:.1f} s",
    )
    raw = infer if handler.drop_raw else handler.panel("raw")
    values, rows = raw.table("feature"), raw.live_rows()
    positions = kept_columns(raw.columns("feature"), infer.columns("feature"))
    columns = [raw.columns("feature")[position] for position in positions]
    missing_of_column = np.zeros(len(columns))
    missing_of_row = np.zeros(len(rows), dtype=np.int32)
    constant = []
    for number, (position, name) in enumerate(zip(positions, columns, strict=True)):
        column = values[rows, position]
        missing = ~np.isfinite(column)
        missing_of_column[number] = missing.mean() if len(rows) else 0.0
        missing_of_row += missing
        present = column[~missing]
        if len(present) and present.min() == present.max():
            constant.append(str(name))
    _report_columns(report, columns, missing_of_column)
    _report_days(report, raw, rows, missing_of_row / max(1, len(columns)))
    if constant == ["CLOSE0"] and isinstance(priced_handler(handler), Alpha360):
        report.add("note", "constant", "CLOSE0 contains a single value: it is today's close divided by itself")
    elif constant:
        report.add("warning", "constant", f"{len(constant)} column(s) contain a single value: {some(constant)}")
    else:
        report.add("ok", "constant", "no column is constant")
    priced = priced_handler(handler)
    if priced is not None and not handler.drop_raw:
        _report_halts(report, priced)
    label = infer.values("label")[infer.live_rows()] if handler.drop_raw else raw.values("label")[rows]
    report.add("note", "label", f"{np.mean(~np.isfinite(label)):.2%} of the rows have no label")


def kept_columns(raw: Sequence[str], processed: Sequence[str]) -> list[int]:
    """Positions of the raw columns that FilterCol and DropCol keep.

    >>> kept_columns(["KMID", "VWAP0", "STD5"], ["KMID", "STD5"])
    [0, 2]
    """
    if not set(processed) <= set(raw):  # a processor renames columns
        return list(range(len(raw)))
    wanted = set(processed)
    return [position for position, name in enumerate(raw) if name in wanted]


def _report_halts(report: CheckReport, handler: PriceHandler) -> None:
    cells = handler.cells_unlike_qlib()
    if cells:
        listed = ", ".join(f"{name} {count:,}" for name, count in list(cells.items())[:5])
        report.add(
            "note",
            "halts",
            f"{sum(cells.values()):,} cells of {len(cells)} column(s) differ between the exact values and Qlib's, by "
            f"column: {listed}. This run has {'the exact values' if handler.compat is None else 'those of Qlib'}; "
            "`compat: qlib` of the handler selects Qlib's (docs/factors.md)",
        )


def _report_columns(report: CheckReport, columns: Sequence[str], missing: np.ndarray) -> None:
    empty = [str(columns[int(i)]) for i in np.flatnonzero(missing == 1)]
    if empty:
        report.add("warning", "missing", f"{len(empty)} column(s) contain no value: {some(empty)}")
    worst = [i for i in np.argsort(-missing, kind="stable") if 0 < missing[i] < 1][:5]
    none = "the other columns have no missing values" if empty else "no missing values"
    listed = ", ".join(f"{columns[int(i)]} {missing[i]:.1%}" for i in worst) or none
    many = any(missing[i] > MANY_MISSING for i in worst)
    report.add("warning" if many else "ok", "missing", f"by column, before processors: {listed}")


def _report_days(report: CheckReport, raw: Panel, rows: np.ndarray, missing: np.ndarray) -> None:
    """`missing` is the fraction of missing values in each of `rows`."""
    codes = raw.date_codes[rows]
    counts = np.bincount(codes, minlength=len(raw.datetimes))
    total = np.bincount(codes, weights=missing, minlength=len(raw.datetimes))
    fraction = np.divide(total, counts, out=np.zeros(len(counts)), where=counts > 0)
    bad = np.flatnonzero(fraction > MANY_MISSING)
    if not len(bad):
        report.add("ok", "missing", f"by day: at most {fraction.max():.1%} of the values of a day")
        return
    worst = bad[np.argsort(-fraction[bad])][:3]
    listed = ", ".join(f"{date_text(raw.datetimes[code])} {fraction[code]:.0%}" for code in worst)
    report.add(
        "warning",
        "missing",
        f"by day: {len(bad)} of {np.count_nonzero(counts)} days lack more than {MANY_MISSING:.0%} of their values: "
        f"{listed}",
    )
