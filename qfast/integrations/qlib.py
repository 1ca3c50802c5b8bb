"""Run qfast's models inside Qlib, with Qlib's data handlers, datasets, records and recorder.

There are two ways:

- `qrun` runs a workflow file whose model has the module path `qfast.models.ts` (for a `_ts` module of Qlib) or
  `qfast.models` (for any other) instead of `qlib.contrib.model...`. Nothing else changes.
- `qfast run --engine qlib` runs the unmodified file and replaces the module path itself.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qfast import registry
from qfast._renamed import renamed_names
from qfast.errors import ConfigError
from qfast.workflow.config import load_config
from qfast.workflow.validation import check_model, register_all

__all__ = ["QlibResult", "run", "with_qfast_model"]

__getattr__ = renamed_names(__name__, {"with_our_model": "qfast.integrations.qlib.with_qfast_model"})


@dataclass(frozen=True)
class QlibResult:
    """The result of a run in Qlib.

    Attributes
    ----------
    recorder : qlib.workflow.recorder.Recorder
        Qlib's recorder, which stores the artifacts of the run.
    metrics : dict
        Metric of the recorder -> value.
    """

    recorder: Any
    metrics: dict[str, float]


def with_qfast_model(task: dict[str, Any]) -> dict[str, Any]:
    """Copy a task with Qlib's model replaced by qfast's. Only `class` and `module_path` of the model change.

    Parameters
    ----------
    task : dict
        The section `task` of a workflow file.

    Raises
    ------
    ConfigError
        qfast does not have the model.

    Examples
    --------
    >>> task = {"model": {"class": "LSTM", "module_path": "qlib.contrib.model.pytorch_lstm_ts", "kwargs": {}}}
    >>> with_qfast_model(task)["model"]["module_path"]
    'qfast.models.ts'
    """
    register_all()
    spec = task["model"]
    factory, _ = registry.MODELS.resolve(
        {key: spec[key] for key in ("class", "module_path") if key in spec}, "task.model"
    )
    module = "qfast.models.ts" if factory.__module__.endswith(".ts") else "qfast.models"
    return {**task, "model": {**spec, "class": factory.__name__, "module_path": module}}


def _extend_module_path(settings: object, config_path: Path) -> None:
    """Append the folders of the section `sys` to the module search path, as qrun does.

    `path` is a folder or a list of them, `rel_path` the same relative to the folder of the workflow file.

    Raises
    ------
    ConfigError
        The section has another form.
    """
    if settings is None:
        return
    if not isinstance(settings, dict) or not set(settings) <= {"path", "rel_path"}:
        raise ConfigError(f"{config_path}: sys must be a mapping with path and rel_path, got {settings!r}.")
    for name, base in (("path", Path()), ("rel_path", config_path.resolve().parent)):
        folders = settings.get(name) or []
        for folder in [folders] if isinstance(folders, str) else folders:
            target = str((base / folder).expanduser().absolute())
            if target not in sys.path:
                sys.path.append(target)


class _ImmediateCaller:
    """Qlib's `AsyncCaller` without its thread.

    Qlib logs metrics in a thread while the next record loads an artifact. MLflow reads all metrics of the run for that.
    In a folder, it raises an error if the thread has created the file of a metric and not yet written it.
    """

    def __call__(self, function: Callable[..., object], *args: object, **kwargs: object) -> None:
        function(*args, **kwargs)

    def wait(self, close: bool = True) -> None:
        """Every call has ended."""


@contextmanager
def _immediate_logging() -> Iterator[None]:
    """Recorders that start in the block log parameters and metrics before the call returns."""
    recorders: Any = importlib.import_module("qlib.workflow.recorder")
    original = recorders.AsyncCaller
    recorders.AsyncCaller = _ImmediateCaller
    try:
        yield
    finally:
        recorders.AsyncCaller = original


def run(
    config_path: str | os.PathLike[str],
    sets: Sequence[str] = (),
    *,
    device: str | None = None,
    seed: int | None = None,
    folder: str | os.PathLike[str] = "mlruns",
) -> QlibResult:
    """Run a workflow file in pyqlib with qfast's model.

    Parameters
    ----------
    config_path, sets, device, seed
        As for `qfast.run`. As in qrun, the folders of the section `sys` are added to the module search path, and
        classes of Qlib or of your own are imported by name.
    folder : path
        Folder of the recorder, unless `qlib_init.exp_manager` specifies another.

    Raises
    ------
    ConfigError
        pyqlib is not installed, the file cannot be read, its model is invalid, or it has no provider_uri.

    Source
    ------
    `qrun` of pyqlib 0.9.7, qlib/cli/run.py.
    """
    if importlib.util.find_spec("qlib") is None:
        raise ConfigError(
            "--engine qlib requires pyqlib, which is not installed. Remedy: pip install 'qfast-models[qlib]'."
        )
    values = load_config(config_path, sets).values
    settings = dict(values.get("qlib_init") or {})
    if settings.get("provider_uri") is None:
        raise ConfigError("qlib_init.provider_uri is missing; --engine qlib reads the data from that folder.")
    # Only the model is checked. Handlers, strategies and records are Qlib's, including those that qfast does not have.
    if not isinstance(values.get("task"), dict) or "model" not in values["task"]:
        raise ConfigError(f"{config_path}: task.model is missing.")
    extensions = [key for key in ("init_from", "pretrain") if values["task"].get(key) not in (None, False)]
    if extensions:
        raise ConfigError(
            f"{config_path}: --engine qlib does not support task.{extensions[0]}, which is an extension of qfast. "
            "Remedy: --engine qfast, or remove the key."
        )
    overrides = {key: value for key, value in (("device", device), ("seed", seed)) if value is not None}
    kwargs = check_model(values["task"]["model"]) | overrides
    task = with_qfast_model(values["task"])
    task["model"]["kwargs"] = kwargs

    _extend_module_path(values.get("sys"), Path(config_path))
    qlib = importlib.import_module("qlib")
    trainer = importlib.import_module("qlib.model.trainer")
    if "exp_manager" not in settings:
        manager = dict(qlib.config.C["exp_manager"])
        manager["kwargs"] = {**manager["kwargs"], "uri": f"file:{Path(folder).resolve()}"}
        settings["exp_manager"] = manager
        # mlflow requires this variable for records in files, Qlib's default
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    qlib.init(**settings)
    with _immediate_logging():
        recorder = trainer.task_train(task, experiment_name=str(values.get("experiment_name", "workflow")))
    recorder.save_objects(config={**values, "task": task})
    return QlibResult(recorder, dict(recorder.list_metrics()))
