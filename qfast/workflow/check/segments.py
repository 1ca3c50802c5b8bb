"""Empty and overlapping segments, the horizon of the label, and the fit windows of processors."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from qfast.data.panel import Panel
from qfast.data.protocols import HandlerDataset
from qfast.dates import date_text
from qfast.workflow.check.findings import CheckReport

__all__ = ["check_segments"]

Spans = Mapping[str, tuple[int, int]]
"""Segment -> date codes of its first and last row."""


def check_segments(report: CheckReport, dataset: HandlerDataset) -> None:
    """Report the rows of each segment, overlaps with train, the label horizon and the fit windows."""
    panel = dataset.handler.panel("infer")
    spans: dict[str, tuple[int, int]] = {}
    for name, bounds in dataset.segments.items():
        rows = panel.rows_between(*bounds)
        if not len(rows):
            report.add("error", "segments", f"{name} ({bounds[0]} to {bounds[1]}) contains no rows of the data")
            continue
        codes = panel.date_codes[rows]
        spans[name] = int(codes.min()), int(codes.max())
        report.add(
            "note",
            "segments",
            f"{name}: {len(rows):,} rows on {len(np.unique(codes)):,} days, {date_text(panel.datetimes[codes.min()])} "
            f"to {date_text(panel.datetimes[codes.max()])}",
        )
    if "train" not in spans:
        return
    for name, (first, last) in spans.items():
        if name != "train" and first <= spans["train"][1] and last >= spans["train"][0]:
            report.add("error", "segments", f"{name} overlaps train, so the model is evaluated on its training data")
    _check_horizon(report, dataset, spans)
    _check_fit_windows(report, dataset, panel, spans)


def _check_horizon(report: CheckReport, dataset: HandlerDataset, spans: Spans) -> None:
    horizon = getattr(dataset.handler, "label_horizon", None)
    if horizon is None:
        report.add("note", "horizon", "the data contains its own label, whose horizon is unknown")
        return
    later = [first for name, (first, _) in spans.items() if name != "train" and first > spans["train"][1]]
    if not later:
        return
    gap = min(later) - spans["train"][1] - 1
    if gap >= horizon:
        report.add("ok", "horizon", f"labels look {horizon} days ahead; the gap after train is {gap} days")
        return
    report.add(
        "warning",
        "horizon",
        f"labels look {horizon} days ahead, but the gap between train and the next segment is {gap} days, so the last "
        f"{horizon - gap} days of train have labels from that segment. Remedy: end train {horizon - gap} trading days "
        "earlier (Qlib's workflow files do not)",
    )


def _check_fit_windows(report: CheckReport, dataset: HandlerDataset, panel: Panel, spans: Spans) -> None:
    others = [first for name, (first, _) in spans.items() if name != "train"]
    handler = dataset.handler
    for processor in (*handler.shared_processors, *handler.infer_processors):
        end = getattr(processor, "fit_end_time", None)
        if end is None or not others:
            continue
        name = type(processor).__name__
        if panel.date_code_range(None, end)[1] > min(others):
            report.add(
                "error",
                "fit window",
                f"{name} is fitted up to {end}, which is inside a scored segment, so its statistics contain future "
                "data. Remedy: set fit_end_time to the end of train",
            )
        else:
            report.add("ok", "fit window", f"{name} is fitted up to {end}, before the scored segments")
