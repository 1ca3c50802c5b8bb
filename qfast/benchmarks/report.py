"""The results of `qfast bench` as a table, a picture and JSON."""

from __future__ import annotations

import datetime
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qfast import _backend
from qfast.benchmarks.clock import PARTS
from qfast.benchmarks.measure import ModelTimes
from qfast.benchmarks.trust import Watch
from qfast.files import atomic_write
from qfast.workflow.folder import versions
from qfast.workflow.plots import figure_axes, png

__all__ = ["BenchResult"]

COLOURS = ("#0e7490", "#1d4ed8", "#6d28d9", "#047857", "#d97706", "#6b7280")  # of PARTS
REFERENCE_COLOUR = "#cbd5e1"


@dataclass(frozen=True)
class BenchResult:
    """Everything that a run of `qfast bench` has measured.

    Attributes
    ----------
    models : list of ModelTimes
    data : dict
        Source, size and "load_seconds" of the data.
    watch : Watch
        Rates of the processor, and its verdict on the figures.
    seconds : float
        Wall time of the whole run.
    json, png : Path
        The files, once `write` has been called.
    """

    models: list[ModelTimes]
    data: dict[str, Any]
    watch: Watch
    seconds: float
    json: Path
    png: Path
    created: str = field(
        default_factory=lambda: datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    )

    def write(self) -> None:
        """Write the files. Existing ones are replaced."""
        text = json.dumps(self.facts(), indent=1) + "\n"
        atomic_write(self.json, lambda file: file.write_text(text, encoding="utf-8"))
        image = self.picture()
        atomic_write(self.png, lambda file: file.write_bytes(image))

    def facts(self) -> dict[str, Any]:
        """All figures with their conditions, as plain data."""
        return {
            "created": self.created,
            "seconds": round(self.seconds, 1),
            "versions": {**versions(), "pyqlib": _pyqlib_version()},
            "platform": platform.platform(),
            "cores": os.cpu_count(),
            "instruction_set": _instruction_set(),
            "data": self.data,
            "product_rates": self.watch.products,
            "copy_rates": self.watch.copies,
            "share_of_a_core": self.watch.share,
            "load_before": self.watch.load,
            "not_trusted_because": self.watch.reasons(),
            "models": [{**asdict(model), "ratio": model.ratio} for model in self.models],
        }

    # ---------------------------------------------------------------- table
    def lines(self) -> list[str]:
        """The report as lines of text."""
        data, products, copies = self.data, max(self.watch.products), max(self.watch.copies)
        windows = "" if data["step_len"] is None else f", windows of {data['step_len']} steps"
        reference = ", ".join(sorted({model.reference_name for model in self.models if model.reference_name}))
        return [
            f"data: {data['source']}: {data['rows']:,} rows, {data['instruments']:,} instruments, {data['first']} to "
            f"{data['last']}, {data['features']} features{windows}; read and processed in {data['load_seconds']:.1f} s",
            f"machine: {os.cpu_count()} cores, {_instruction_set()} kernels; one thread: {products / 1e9:.1f}e9 "
            f"multiply-adds/s of torch.mm, copies of {copies / 1e9:.1f} GB/s",
            f"compared with: {reference or 'nothing'}",
            "",
            *_aligned(self._rows()),
            "",
            "epoch: CPU seconds on one thread of a training pass and the scores of both segments, extrapolated from a "
            "sample of the batches.",
            "products, copies: forward and backward relative to torch.mm, the gather relative to copies, in this run.",
            "memory: peak of one batch and its scores, without the data.",
            *(f"{model.name}: {note}" for model in self.models for note in model.notes),
            *(f"not to be trusted: {reason}" for reason in self.watch.reasons()),
        ]

    def _rows(self) -> list[list[str]]:
        threads = max(model.threads for model in self.models)
        head = ["model", "batch", "epoch, s", "reference, s", "ratio"]
        head += [*PARTS, "products", "copies", "memory, MB", "reference, MB"]
        head += [f"{threads} threads, wall s"] if threads > 1 else []
        rows = [head]
        for model in self.models:
            shares = [f"{model.parts[part] / model.epoch:.0%}" for part in PARTS]
            row = [model.name, f"{model.batch_size:,}", f"{model.epoch:.3g}", _number(model.reference, ".3g")]
            row += [_number(model.ratio, ".2f", "x"), *shares]
            row += [_share(model.products, self.watch.products), _share(model.copies, self.watch.copies)]
            row += [_number(model.memory, ",.0f"), _number(model.reference_memory, ",.0f")]
            rows.append(row + ([_number(model.threads_epoch, ".3g")] if threads > 1 else []))
        return rows

    # ---------------------------------------------------------------- picture
    def picture(self) -> bytes:
        """Seconds of an epoch by model: the parts of qfast's epoch, and the reference, relative to the latter."""
        figure, axes = figure_axes()
        names = [model.name for model in self.models]
        whole = [model.reference or model.epoch for model in self.models]
        for place, (model, total) in enumerate(zip(self.models, whole, strict=True)):
            bottom = 0.0
            for part, colour in zip(PARTS, COLOURS, strict=True):
                height = model.parts[part] / total
                axes.bar(place + 0.2, height, 0.36, bottom, color=colour, label=None if place else part)
                bottom += height
            if model.reference is not None:
                label = None if place else (model.reference_name or "reference")
                axes.bar(place - 0.2, 1.0, 0.36, color=REFERENCE_COLOUR, label=label)
            ratio = _number(model.ratio, ".1f", "x ")
            axes.text(place + 0.2, bottom + 0.02, ratio if model.ratio else "", ha="center", fontsize=8)
        axes.set_xticks(range(len(names)), names, fontsize=8)
        suffix = "" if not self.watch.reasons() else " (the machine was busy: not to be trusted)"
        axes.set(ylabel="time of an epoch, reference = 1", title=f"qfast bench: one thread{suffix}")
        axes.legend(frameon=False, fontsize=7, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.12))
        return png(figure)


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"


def _share(rate: float | None, rates: Sequence[float]) -> str:
    return "-" if rate is None else f"{rate / max(rates):.0%}"


def _instruction_set() -> str:
    return "plain torch" if _backend.native is None else str(_backend.native.isa())


def _pyqlib_version() -> str:
    from importlib import metadata

    try:
        return metadata.version("pyqlib")
    except metadata.PackageNotFoundError:
        return "not installed"
