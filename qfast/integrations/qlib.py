"""qfast's models in Qlib's own workflow: its data handlers, its datasets, its records, its recorder.

There are two ways. `qrun` runs a workflow file whose model has the module path `qfast.models` (or
`qfast.models.ts` in place of a `_ts` module) instead of `qlib.contrib.model...`; nothing else changes. And
`qfast run --engine qlib` runs the file as it is, and puts that path in itself.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qfast import registry
from qfast.errors import ConfigError
from qfast.workflow.config import load_config
from qfast.workflow.validation import check_model, register_all

__all__ = ["QlibResult", "run", "with_our_model"]


@dataclass(frozen=True)
class QlibResult:
    """What a run in Qlib leaves.

    Attributes
    ----------
    recorder : qlib.workflow.recorder.Recorder
        Qlib's own, with its artifacts.
    metrics : dict
        Name -> value, as the recorder lists them.
    """

    recorder: Any
    metrics: dict[str, float]


def with_our_model(task: dict[str, Any]) -> dict[str, Any]:
    """A task whose model is ours: the reference's module path replaced, all else as it was.

    Parameters
    ----------
    task : dict
        The section "task" of a workflow file.

    Raises
    ------
    ConfigError
        A model that qfast has not.

    Examples
    --------
    >>> task = {"model": {"class": "LSTM", "module_path": "qlib.contrib.model.pytorch_lstm_ts", "kwargs": {}}}
    >>> with_our_model(task)["model"]["module_path"]
    'qfast.models.ts'
    """
    register_all()
    spec = task["model"]
    factory, _ = registry.MODELS.resolve(
        {key: spec[key] for key in ("class", "module_path") if key in spec}, "task.model"
    )
    module = "qfast.models.ts" if factory.__module__.endswith(".ts") else "qfast.models"
    return {**task, "model": {**spec, "class": factory.__name__, "module_path": module}}


def run(
    config_path: str | os.PathLike[str],
    sets: Sequence[str] = (),
    *,
    device: str | None = None,
    seed: int | None = None,
    folder: str | os.PathLike[str] = "mlruns",
) -> QlibResult:
    """Run a workflow file by pyqlib with our model in it.

    Parameters
    ----------
    config_path, sets, device, seed
        As for `qfast.workflow.run.run`.
    folder : path
        Where the recorder writes, unless `qlib_init.exp_manager` says so.

    Raises
    ------
    ConfigError
        pyqlib is not installed; a file that cannot be read or says what is not known; no provider_uri.

    Source
    ------
    `qrun` of pyqlib 0.9.7, qlib/cli/run.py.
    """
    if importlib.util.find_spec("qlib") is None:
        raise ConfigError(
            "--engine qlib needs pyqlib, which is not installed. Remedy: pip install 'qfast-models[qlib]'."
        )
    values = load_config(config_path, sets).values
    settings = dict(values.get("qlib_init") or {})
    if settings.get("provider_uri") is None:
        raise ConfigError("qlib_init.provider_uri is missing; Qlib's engine reads its own data folder.")
    # Handlers, strategies and records are Qlib's here, which has more of them: the model alone is looked at.
    if not isinstance(values.get("task"), dict) or "model" not in values["task"]:
        raise ConfigError(f"{config_path}: task.model is missing.")
    given = {key: value for key, value in (("device", device), ("seed", seed)) if value is not None}
    kwargs = check_model(values["task"]["model"]) | given
    task = with_our_model(values["task"])
    task["model"]["kwargs"] = kwargs

    qlib = importlib.import_module("qlib")
    trainer = importlib.import_module("qlib.model.trainer")
    if "exp_manager" not in settings:
        manager = dict(qlib.config.C["exp_manager"])
        place = Path(folder).resolve()
        manager["kwargs"] = {**manager["kwargs"], "uri": f"file:{place}"}
        settings["exp_manager"] = manager
        # mlflow asks for this where its records are files, which is what Qlib does by default
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    qlib.init(**settings)
    recorder = trainer.task_train(task, experiment_name=str(values.get("experiment_name", "workflow")))
    recorder.save_objects(config={**values, "task": task})
    return QlibResult(recorder, dict(recorder.list_metrics()))
