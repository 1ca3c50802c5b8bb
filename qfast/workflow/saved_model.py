"""The files that `predict` needs in addition to the weights: model.json and processors.safetensors.

`model.json` contains the classes, their arguments and the columns of the data. `processors.safetensors` contains the
statistics of the fitted processors. Neither contains code.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pandas as pd
import safetensors.numpy

from qfast import registry
from qfast.data.factors import depends_on_the_start
from qfast.data.panel import Panel
from qfast.data.prices import Instruments
from qfast.data.processors import Processor
from qfast.data.protocols import Handler, HandlerDataset
from qfast.dates import date_text
from qfast.errors import CheckpointError, DataError, QfastError, shown
from qfast.tensor_files import require_intact, write_checked
from qfast.workflow.folder import BEST, CONFIG, RunFolder
from qfast.workflow.lookback import short_fraction
from qfast.workflow.saved_facts import RESTORE, ModelFacts, require_structure
from qfast.workflow.schema import Workflow

if TYPE_CHECKING:
    from qfast.training.estimator import Estimator

__all__ = [
    "build_model",
    "first_day",
    "load_facts",
    "load_model",
    "load_processors",
    "run_instruments",
    "save_scoring",
    "source_columns",
    "time_steps",
]

# Errors of a constructor whose arguments have been damaged.
UNUSABLE = (TypeError, ValueError, KeyError, AttributeError, RuntimeError, OverflowError, MemoryError, IndexError)
FORMAT = 1
MODEL = "model.json"
PROCESSORS = "processors.safetensors"
# Arguments of a model that scoring does not need. Every weight is in BEST, so model_path is one of them.
NOT_SCORING = ("device", "progress", "cuda_graphs", "model_path")
STAGES = ("shared", "infer")  # learn processors do not affect scores
# Arguments of a handler that concern training only: scoring uses all rows of the new data and fits nothing.
TRAINING_ONLY = {
    *("instruments", "start_time", "end_time", "fit_start_time", "fit_end_time", "data", "provider_uri", "source"),
    *("shared_processors", "infer_processors", "learn_processors", "drop_raw", "filter_pipe", "cache"),
    *("memory_limit", "scratch"),
}


def save_scoring(run_folder: RunFolder, workflow: Workflow, model: Estimator, dataset: HandlerDataset) -> None:
    """Write model.json and processors.safetensors."""
    handler = dataset.handler
    arrays: dict[str, np.ndarray] = {}
    stages: dict[str, list[dict[str, Any]]] = {}
    for stage in STAGES:
        stages[stage] = []
        for position, processor in enumerate(getattr(handler, f"{stage}_processors")):
            state = processor.state()
            arrays |= {f"{stage}.{position}.{name}": np.ascontiguousarray(value) for name, value in state.items()}
            stages[stage].append({**_class_facts(processor), "kwargs": _constructor_arguments(processor)})
    handler_spec = workflow.task.dataset.kwargs.handler.description()
    handler_kwargs = {k: v for k, v in handler_spec.get("kwargs", {}).items() if k not in TRAINING_ONLY}
    dataset_spec = workflow.task.dataset.description()
    dataset_kwargs = {k: v for k, v in dataset_spec["kwargs"].items() if k not in ("handler", "segments")}
    # A function as loss or metric cannot be stored, and scoring does not need it.
    parameters = {k: v for k, v in model.get_params().items() if k not in NOT_SCORING and not callable(v)}
    # A machine without the instructions can score too, with a warning.
    precision = parameters.pop("precision", "float32")
    if precision != "float32":
        parameters["precision"] = "bf16-if-available"
    facts = {
        "format": FORMAT,
        "model": {**workflow.task.model.description(), "kwargs": parameters},
        "dataset": {**dataset_spec, "kwargs": dataset_kwargs},
        "handler": {**handler_spec, "kwargs": handler_kwargs},
        "processors": stages,
        "columns": list(handler.get_cols("feature", "infer")),
        "raw_columns": _raw_columns(handler),
        "source_columns": source_columns(handler),
        "short_history": short_fraction(dataset),
        "start": _start_of_endless_features(handler),
        "instruments": _instruments(handler_spec),
    }
    # Some readers reject a safetensors file without arrays, so the format is always one.
    arrays["format"] = np.array([FORMAT], dtype=np.int64)
    write_checked(
        run_folder / PROCESSORS, lambda file, entries: safetensors.numpy.save_file(arrays, file, metadata=entries)
    )
    run_folder.write_json(MODEL, facts)


def run_instruments(run_folder: RunFolder, facts: Mapping[str, Any]) -> Instruments:
    """The instruments that a run was trained on: a market, a list, {code: spans}, or None for all.

    Parameters
    ----------
    run_folder : RunFolder
    facts : mapping
        Content of model.json. The files of earlier versions lack the instruments, which are then read from config.yaml.

    Raises
    ------
    ConfigError
        config.yaml is missing or cannot be read.
    """
    if "instruments" in facts:
        return cast(Instruments, facts["instruments"])
    from qfast.workflow.config import load_config

    return _instruments(load_config(run_folder / CONFIG).values["task"]["dataset"]["kwargs"]["handler"])


def _instruments(handler_spec: Mapping[str, Any] | str) -> Instruments:
    """The instruments in the description of a handler, or the default of its class."""
    spec: Mapping[str, Any] = {"class": handler_spec} if isinstance(handler_spec, str) else handler_spec
    factory, _ = registry.HANDLERS.resolve({k: v for k, v in spec.items() if k != "kwargs"})
    parameter = registry.all_parameters(factory).get("instruments")
    default = None if parameter is None or parameter.default is parameter.empty else parameter.default
    instruments = (spec.get("kwargs") or {}).get("instruments", default)
    return None if instruments == "all" else instruments


def time_steps(dataset_spec: Mapping[str, Any]) -> int:
    """Number of days in a sample of a dataset, from its description in model.json; 0 for datasets of single rows."""
    factory, _ = registry.DATASETS.resolve({k: v for k, v in dataset_spec.items() if k != "kwargs"})
    parameter = registry.all_parameters(factory).get("step_len")
    return 0 if parameter is None else int(dataset_spec["kwargs"].get("step_len", parameter.default))


def source_columns(handler: Handler) -> list[str] | None:
    """Price columns that contain at least one value; None for a handler without prices."""
    prices = getattr(handler, "prices", None)
    if not isinstance(prices, Panel):
        return None
    return [c for c in prices.columns("price") if bool(np.isfinite(prices.column(c, "price")).any())]


def _raw_columns(handler: Handler) -> list[str] | None:
    """Feature columns before processing, if the handler loads factors instead of computing them."""
    if isinstance(getattr(handler, "prices", None), Panel) or getattr(handler, "drop_raw", False):
        return None
    return [str(c) for c in handler.get_cols("feature", "raw")]


def _start_of_endless_features(handler: Handler) -> str | None:
    """The first day of the training data if a feature, such as EMA, depends on it; otherwise None."""
    compat = getattr(handler, "compat", None)
    if not any(depends_on_the_start(text, compat) for text in getattr(handler, "feature_expressions", [])):
        return None
    return date_text(first_day(handler))


def first_day(handler: Handler) -> pd.Timestamp:
    """The first day of the processed data."""
    panel = handler.panel("infer")
    return panel.datetimes[int(panel.date_codes.min())]


def _class_facts(processor: Processor) -> dict[str, str]:
    """The description of the class. Only a class of the user needs the module path."""
    kind = type(processor)
    if kind.__name__ in registry.PROCESSORS.names():
        return {"class": kind.__name__}
    return {"class": kind.__name__, "module_path": kind.__module__}


def _constructor_arguments(processor: Processor) -> dict[str, object]:
    """Arguments of the constructor, which every processor stores as attributes of the same names."""
    arguments = {}
    for name in registry.parameters(type(processor)):
        value = getattr(processor, name)
        arguments[name] = list(value) if isinstance(value, tuple) else value
    return arguments


def load_facts(run_folder: RunFolder) -> dict[str, Any]:
    """The content of model.json.

    Raises
    ------
    CheckpointError
        The file is missing, cannot be read, or has another format.
    """
    facts: dict[str, Any] = run_folder.read_json(MODEL)
    file = run_folder / MODEL
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        found = facts.get("format") if isinstance(facts, dict) else facts
        raise CheckpointError(f"{file} has format {shown(found)}; this version reads {FORMAT}. {RESTORE}")
    require_structure(ModelFacts, facts, file, CheckpointError)
    # Scoring sets these itself. In a file that someone else has written, they could name other files of the user.
    for key, unused in (("model", NOT_SCORING), ("handler", TRAINING_ONLY), ("dataset", ("handler", "segments"))):
        kwargs = facts[key].get("kwargs", {})
        facts[key] = {**facts[key], "kwargs": {name: value for name, value in kwargs.items() if name not in unused}}
    return facts


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {shown(str(error), 200)}."


def load_model(
    run_folder: RunFolder, facts: Mapping[str, Any], device: str, weights: str | os.PathLike[str] | None = None
) -> Estimator:
    """Build the model of model.json and load the best weights, or those of the file `weights`.

    Raises
    ------
    CheckpointError
        The weight file is missing, truncated or belongs to another model.
    """
    model = build_model(facts["model"], device, str(run_folder / MODEL))
    return model.load_weights(run_folder / BEST if weights is None else Path(weights).expanduser())


def build_model(spec: Mapping[str, Any], device: str, file: str, progress: bool | str = False) -> Estimator:
    """Build the model that a file describes, with initial weights.

    Parameters
    ----------
    spec : mapping
        "class", "module_path" and "kwargs".
    device : str
    file : str
        For messages.
    progress : bool or str
        Replaces the argument `progress`.

    Raises
    ------
    ConfigError
        The class is not registered, or it has no such argument.
    CheckpointError
        The arguments have been damaged.
    """
    kwargs = {**spec["kwargs"], "device": device, "progress": progress}
    try:
        model: Estimator = registry.MODELS.build({**spec, "kwargs": kwargs}, path=Path(file).name)
    except QfastError:
        raise
    except UNUSABLE as error:
        raise CheckpointError(f"{file}: the model cannot be built: {_reason(error)} {RESTORE}") from None
    return model


def load_processors(
    run_folder: RunFolder, stages: Mapping[str, Sequence[Mapping[str, Any]]]
) -> dict[str, list[Processor]]:
    """Build the fitted processors of each stage, which are not fitted again.

    Raises
    ------
    CheckpointError
        processors.safetensors is missing, truncated or inconsistent with model.json.
    """
    file = run_folder / PROCESSORS
    if not file.is_file():
        raise CheckpointError(
            f"{str(file)!r} is missing, so new data cannot be processed as in training. Remedy: run again."
        )
    require_intact(file)
    try:
        arrays = safetensors.numpy.load_file(file)
    except Exception as error:  # safetensors has several exceptions for a damaged file
        raise CheckpointError(f"{str(file)!r} is not readable, it may be truncated ({error}).") from None
    built: dict[str, list[Processor]] = {}
    for stage, specs in stages.items():
        built[stage] = []
        for position, spec in enumerate(specs):
            try:
                processor = registry.PROCESSORS.build(spec, path=f"{MODEL}: processors.{stage}.{position}")
            except QfastError:
                raise
            except UNUSABLE as error:
                raise CheckpointError(
                    f"{run_folder / MODEL}: the processor {shown(spec)} cannot be built: {_reason(error)} {RESTORE}"
                ) from None
            prefix = f"{stage}.{position}."
            state = {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
            try:
                processor.load_state(state)
            except DataError as error:
                raise CheckpointError(f"{str(file)!r} does not fit {MODEL}: {error}") from None
            built[stage].append(processor)
    return built
