"""Estimators in model files, which `Estimator.save` writes and `qfast.load` reads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from qfast.errors import CheckpointError
from qfast.training.whole_model import read_estimator_file, restore_estimator
from qfast.workflow.saved_facts import EstimatorFacts, require_structure
from qfast.workflow.saved_model import build_model
from qfast.workflow.validation import register_all

if TYPE_CHECKING:
    from qfast.training.estimator import Estimator

__all__ = ["load_estimator"]


def load_estimator(path: Path, device: str) -> Estimator:
    """Build the estimator of a model file and restore its state.

    Only registered classes are built, and those that the caller permits.

    Parameters
    ----------
    path : Path
    device : str

    Raises
    ------
    ConfigError
        The file names an unknown class or argument.
    CheckpointError
        The file is missing or damaged, or is not a model file.
    """
    facts, tensors = read_estimator_file(path)
    require_structure(EstimatorFacts, facts, path, CheckpointError)
    register_all()
    spec: dict[str, Any] = facts["model"]
    model = build_model(spec, device, str(path), progress=spec["kwargs"].get("progress", "auto"))
    restore_estimator(model, facts, tensors, path)
    return model
