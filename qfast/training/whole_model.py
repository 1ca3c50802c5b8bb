"""Whole estimators in one file: class, arguments, weights, optimizer and history. Reading one runs no code from it.

The file is in the safetensors format. Its metadata contains the entry `qfast.estimator`, a JSON text. A checksum
protects all of it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from qfast.errors import CheckpointError, ConfigError, QfastError, shown
from qfast.files import require_file_target
from qfast.tensor_files import KEY, REMEDY, read_metadata
from qfast.training import checkpoint
from qfast.training.overrides import name_of

if TYPE_CHECKING:
    from qfast.training.base import BaseEstimator

ENTRY = "qfast.estimator"
FORMAT = 1
# Arguments that are not stored: the reader chooses the device, and every weight is in the file.
NOT_STORED = ("device", "model_path")

__all__ = ["ENTRY", "FORMAT", "read_estimator_file", "restore_estimator", "save_estimator"]


def save_estimator(estimator: BaseEstimator, path: Path) -> None:
    """Write an estimator, fitted or not, to a file that appears complete or not at all.

    Raises
    ------
    ConfigError
        An argument has a type that JSON does not have, or the path cannot be written to.
    """
    kind = type(estimator)
    functions = {k: name_of(v) for k, v in estimator.get_params().items() if callable(v)}
    arguments = {
        k: _plain(f"{kind.__name__}: {k}", v)
        for k, v in estimator.get_params().items()
        if k not in NOT_STORED and k not in functions
    }
    progress = estimator.progress_
    facts = {
        "format": FORMAT,
        "model": {"class": kind.__name__, "module_path": kind.__module__.removesuffix(".flat"), "kwargs": arguments},
        "functions": functions,
        "fitted": estimator.fitted,
        "data": estimator.data_,
        "records": progress.records,
        "best_score": progress.best_score,
        "best_epoch": progress.best_epoch,
        "optimizer": type(estimator.train_optimizer).__name__,
        "model_facts": estimator.checkpoint_facts() if estimator.fitted else None,
        "origin": estimator.origin_,
    }
    tensors = {f"network.{name}": value for name, value in estimator.network.state_dict().items()}
    tensors |= checkpoint.optimizer_tensors(estimator)
    require_file_target(path, "path")
    checkpoint.write_tensors(path, tensors, {ENTRY: json.dumps(facts)})


def _plain(name: str, value: Any) -> Any:
    """A value as JSON represents it."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, (list, tuple)):
        return [_plain(name, entry) for entry in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(name, entry) for key, entry in value.items()}
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    raise ConfigError(
        f"{name} is {shown(value)} of type {type(value).__name__}, which a model file cannot contain. Remedy: a "
        "number, a text or a list of them, or save_weights, which stores the weights only."
    )


def read_estimator_file(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The facts and the tensors of a file that `save_estimator` has written.

    Raises
    ------
    CheckpointError
        The file is missing, damaged, or something else.
    """
    if not path.is_file():
        raise CheckpointError(f"model file {str(path)!r} does not exist.")
    with path.open("rb") as file:
        start = file.read(9)
    if start[8:] != b"{":
        raise CheckpointError(
            f"{str(path)!r} is not a model file: it begins with {start[:8]!r}. Remedy: a file that model.save wrote, a "
            "run folder, or model.load_weights(path) for weights in torch's format."
        )
    metadata = read_metadata(path)
    text = metadata.get(ENTRY)
    if text is not None and KEY not in metadata:
        raise CheckpointError(f"{str(path)!r} is damaged: it has no checksum {KEY!r}. {REMEDY}")
    tensors = checkpoint.read_safetensors(path)
    if text is None:
        raise CheckpointError(
            f"{str(path)!r} contains weights but not the model that they belong to. Remedy: build the model and call "
            "its load_weights(path), or pass the run folder."
        )
    try:
        facts = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{str(path)!r} is damaged: {ENTRY} is not JSON ({error}).") from None
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        found = facts.get("format") if isinstance(facts, dict) else facts
        raise CheckpointError(f"{str(path)!r} has format {shown(found)}; this version reads {FORMAT}.")
    return facts, tensors


def restore_estimator(
    estimator: BaseEstimator, facts: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path
) -> None:
    """Set the state of a newly built estimator from the content of a model file.

    Raises
    ------
    CheckpointError
        The content is incomplete or belongs to another network.
    """
    try:
        _restore(estimator, facts, tensors, path)
    except QfastError:
        raise
    except checkpoint.DAMAGE as error:
        raise CheckpointError(
            f"{str(path)!r} cannot be used: its content is incomplete ({type(error).__name__}: "
            f"{shown(str(error), 200)}). Remedy: restore the file from a copy."
        ) from None


def _restore(estimator: BaseEstimator, facts: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path) -> None:
    weights = checkpoint.part(tensors, "network.")
    dtypes = {value.dtype for value in weights.values() if value.is_floating_point()}
    if len(dtypes) == 1 and dtypes != {torch.get_default_dtype()}:
        estimator.network.to(dtypes.pop())
    estimator.network.load_state_dict(checkpoint.fitting_state(estimator.network, weights, path))
    optimizer = checkpoint.part(tensors, "optimizer.")
    if facts["optimizer"] == type(estimator.train_optimizer).__name__:
        checkpoint.load_optimizer(estimator, optimizer)
    elif optimizer:
        estimator.logger.warning(
            "%s was saved with the optimizer %s, which is not restored: training continues with a new %s",
            *(path, facts["optimizer"], type(estimator.train_optimizer).__name__),
        )
    for name, function in facts["functions"].items():
        estimator.logger.warning(
            "%s was saved with the function %s as %s, which a file cannot contain; set model.%s before fit",
            *(path, function, name, name),
        )
    progress = estimator.progress_
    progress.records, progress.best_epoch = facts["records"], facts["best_epoch"]
    progress.best_score = facts["best_score"]
    estimator.data_, estimator.origin_ = facts["data"], facts["origin"]
    estimator.fitted = facts["fitted"]
    if facts["model_facts"] is not None:
        estimator.restore_facts(facts["model_facts"])
