"""Segments without rows, overlaps, the label's horizon, the fit windows of processors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from qfast.data.panel import Panel
from qfast.dates import date_text
from qfast.workflow.check.findings import CheckReport
from qfast.workflow.schema import Workflow

__all__ = ["check_segments"]


def check_segments(report: CheckReport, workflow: Workflow, dataset: Any) -> None:
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
