"""The files that scoring needs besides the weights: model.json and processors.safetensors.

`save_scoring` writes what is needed beside the weights: `model.json` (classes, arguments, columns) and
`processors.safetensors` (what the processors learnt). No code is loaded from the files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import safetensors.numpy

from qfast import registry
from qfast.data.factors import depends_on_the_start
from qfast.data.panel import Panel
from qfast.dates import date_text
from qfast.errors import CheckpointError, DataError
from qfast.files import atomic_write
from qfast.workflow.folder import BEST, RunFolder
from qfast.workflow.lookback import short_fraction
from qfast.workflow.schema import Workflow

__all__ = ["MODEL", "first_day", "load_model", "load_processors", "save_scoring", "source_columns"]


FORMAT = 1
MODEL = "model.json"
PROCESSORS = "processors.safetensors"
NOT_SCORING = ("device", "progress", "cuda_graphs", "model_path")  # of a model's arguments: all weights are in BEST
STAGES = ("shared", "infer")  # learn processors have no part in scoring
# Of the training run only: scoring takes all rows of the new data and fits nothing.
TRAINING_ONLY = (
    "instruments", "start_time", "end_time", "fit_start_time", "fit_end_time", "data", "provider_uri", "source",
    "shared_processors", "infer_processors", "learn_processors", "drop_raw", "filter_pipe", "cache",
)  # fmt: skip


def save_scoring(run_folder: RunFolder, workflow: Workflow, model: Any, dataset: Any) -> None:
    """Write model.json and processors.safetensors: all that `predict` needs besides the weights."""
    handler = dataset.handler
    arrays: dict[str, np.ndarray] = {}
    stages: dict[str, list[dict[str, Any]]] = {}
    for stage in STAGES:
        stages[stage] = []
        for position, processor in enumerate(getattr(handler, f"{stage}_processors")):
            state = processor.state()
            arrays |= {f"{stage}.{position}.{name}": np.ascontiguousarray(value) for name, value in state.items()}
            stages[stage].append({"class": type(processor).__name__, "kwargs": _constructor_arguments(processor)})
    handler_spec = workflow.task.dataset.kwargs.handler.given()
    kept = {k: v for k, v in handler_spec.get("kwargs", {}).items() if k not in TRAINING_ONLY}
    dataset_spec = workflow.task.dataset.given()
    dataset_kwargs = {k: v for k, v in dataset_spec["kwargs"].items() if k not in ("handler", "segments")}
    parameters = {k: v for k, v in model.get_params().items() if k not in NOT_SCORING}
    facts = {
        "format": FORMAT,
        "model": {**workflow.task.model.given(), "kwargs": parameters},
        "dataset": {**dataset_spec, "kwargs": dataset_kwargs},
        "handler": {**handler_spec, "kwargs": kept},
        "processors": stages,
        "columns": list(handler.get_cols("feature", "infer")),
        "raw_columns": _raw_columns(handler),
        "source_columns": source_columns(handler),
        "short_history": short_fraction(dataset),
        "start": _start_that_counts(handler),
    }
    # A file without any array is not readable everywhere, hence the marker.
    arrays["format"] = np.array([FORMAT], dtype=np.int64)
    atomic_write(run_folder / PROCESSORS, lambda file: safetensors.numpy.save_file(arrays, file))
    run_folder.write_json(MODEL, facts)


def source_columns(handler: Any) -> list[str] | None:
    """Price columns that hold values; a column without any would turn into features without any."""
    prices = getattr(handler, "prices", None)
    if not isinstance(prices, Panel):
        return None
    return [c for c in prices.columns("price") if bool(np.isfinite(prices.column(c, "price")).any())]


def _raw_columns(handler: Any) -> list[str] | None:
    """Feature columns of factors of the user's own, before any processor."""
    if isinstance(getattr(handler, "prices", None), Panel) or getattr(handler, "drop_raw", False):
        return None
    return [str(c) for c in handler.get_cols("feature", "raw")]


def _start_that_counts(handler: Any) -> str | None:
    """The first day of training, if features look back without end, as EMA does; else None."""
    if not any(depends_on_the_start(text) for text in getattr(handler, "feature_expressions", [])):
        return None
    return date_text(first_day(handler))


def first_day(handler: Any) -> pd.Timestamp:
    panel = handler.panel("infer")
    return panel.datetimes[int(panel.date_codes.min())]


def _constructor_arguments(processor: Any) -> dict[str, Any]:
    """Constructors of processors only store, so their arguments stand as attributes."""
    out = {}
    for name in registry.parameters(type(processor)):
        value = getattr(processor, name)
        out[name] = list(value) if isinstance(value, tuple) else value
    return out


def load_model(run_folder: RunFolder, facts: Mapping[str, Any], device: str) -> Any:
    spec = facts["model"]
    kwargs = {**spec["kwargs"], "device": device, "progress": False}
    model = registry.MODELS.build({**spec, "kwargs": kwargs}, path="model.json")
    return model.load_weights(run_folder / BEST)


def load_processors(run_folder: RunFolder, stages: Mapping[str, Any]) -> dict[str, list[Any]]:
    file = run_folder / PROCESSORS
    if not file.is_file():
        raise CheckpointError(f"{str(file)!r} is missing; without it new data cannot be prepared as in training.")
    try:
        arrays = safetensors.numpy.load_file(file)
    except Exception as error:  # the reader raises its own kinds for a damaged file
        raise CheckpointError(f"{str(file)!r} is not readable, it may be truncated ({error}).") from None
    built: dict[str, list[Any]] = {}
    for stage, specs in stages.items():
        built[stage] = []
        for position, spec in enumerate(specs):
            processor = registry.PROCESSORS.build(spec, path=f"{MODEL}: processors.{stage}.{position}")
            prefix = f"{stage}.{position}."
            state = {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
            try:
                processor.load_state(state)
            except DataError as error:
                raise CheckpointError(f"{str(file)!r} does not fit {MODEL}: {error}") from None
            built[stage].append(processor)
    return built
