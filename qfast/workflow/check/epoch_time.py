"""Memory of the data, and the time of an epoch, extrapolated from a few batches."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from qfast.data.panel import Panel, Table
from qfast.data.protocols import HandlerDataset
from qfast.errors import QfastError
from qfast.training.callbacks import Callback
from qfast.workflow.check.findings import CheckReport
from qfast.workflow.check.trial import build_model
from qfast.workflow.schema import Workflow

if TYPE_CHECKING:
    from qfast.training.estimator import Estimator

__all__ = ["check_epoch_time"]

TIMED_BATCHES = 6


class _EnoughError(Exception):
    """Ends a timed fit."""


class _Stopwatch(Callback):
    """Times the first batches of a fit, then ends it."""

    def __init__(self) -> None:
        self.moments: list[float] = []

    def on_epoch_start(self, estimator: Estimator) -> None:
        self.moments.append(time.perf_counter())

    def on_batch_end(self, estimator: Estimator) -> None:
        self.moments.append(time.perf_counter())
        if len(self.moments) > TIMED_BATCHES:
            raise _EnoughError

    def on_epoch_end(self, estimator: Estimator) -> None:  # the epoch has fewer batches
        raise _EnoughError

    @property
    def seconds(self) -> float:
        """Median time of a batch. The first batch also allocates memory and starts threads, so it is excluded."""
        steps = np.diff(self.moments)
        return float(np.median(steps[1:] if len(steps) > 1 else steps))


def check_epoch_time(report: CheckReport, workflow: Workflow, dataset: HandlerDataset) -> None:
    """Report the memory of the data and the estimated time of a training pass."""
    panel = dataset.handler.panel("infer")
    n_bytes = sum(table.nbytes for table in _distinct([panel, dataset.handler.panel("learn")]))
    report.add("note", "memory", f"features and labels occupy {n_bytes / 2**20:,.0f} MB, without copies")
    model, watch = build_model(workflow, n_epochs=1, progress=False), _Stopwatch()
    try:
        model.fit(dataset, callbacks=[watch])
    except _EnoughError:
        pass
    except QfastError as error:
        report.add("error", "training", str(error))
        return
    if len(watch.moments) < 2:
        report.add("note", "time", f"{type(model).__name__} overrides train_epoch, so the time of a batch is unknown")
        return
    rows = panel.rows_between(*dataset.segments["train"])
    batch_size = model.get_params().get("batch_size")
    n_days = len(np.unique(panel.date_codes[rows]))
    batches = n_days if batch_size is None else max(1, len(rows) // batch_size)  # None: each batch is one day
    epoch, epochs = watch.seconds * batches, workflow.task.model.kwargs.get("n_epochs", 200)
    report.add(
        "note",
        "time",
        f"a training pass takes about {_duration(epoch)} ({batches:,} batches of {watch.seconds * 1e3:,.0f} ms, "
        f"{model.device}); {epochs} epochs with evaluation take at most {_duration(1.5 * epoch * int(epochs))}",
    )


def _distinct(panels: Sequence[Panel]) -> Iterator[Table]:
    """The tables of several panels; a table that panels have in common is yielded once."""
    seen: set[int] = set()
    for panel in panels:
        for block in panel.blocks.values():
            if id(block.table) not in seen:
                seen.add(id(block.table))
                yield block.table


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
