"""Callbacks that record a fit in TensorBoard or MLflow, extras that are imported only when a callback is created."""

from __future__ import annotations

import importlib
import math
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qfast.errors import ConfigError
from qfast.training.callbacks import Callback
from qfast.training.overrides import name_of
from qfast.training.ranks import writes_files

if TYPE_CHECKING:
    from qfast.training.estimator import Estimator

PARAMETER_LENGTH = 500  # characters of a parameter that every store of MLflow accepts

__all__ = ["MLflowCallback", "TensorBoardCallback"]


class TensorBoardCallback(Callback):
    """Write every column of the history to TensorBoard, and the arguments of the model as text.

    Each class of models writes to its own folder in `folder`, so a base model and its GATs do not mix. A resumed fit
    continues the curves. Needs the extra `tensorboard`.

    Parameters
    ----------
    folder : path
        Show it with `tensorboard --logdir FOLDER`.

    Raises
    ------
    ConfigError
        tensorboard is not installed.

    Examples
    --------
    ::

        qfast.run("workflow.yaml", callbacks=[TensorBoardCallback("tensorboard/first")])
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self._writer: Any = None
        _ = _imported("torch.utils.tensorboard", "tensorboard", type(self).__name__)

    def on_fit_start(self, estimator: Estimator) -> None:
        """Open the file. Values of epochs that the fit will repeat are hidden."""
        if not writes_files():
            return
        module = _imported("torch.utils.tensorboard", "tensorboard", type(self).__name__)
        epochs = len(estimator.progress_.records)
        folder = self.folder / type(estimator).__name__
        self._writer = module.SummaryWriter(str(folder), purge_step=epochs or None)
        lines = [f"| {name} | {value} |" for name, value in _arguments(estimator).items()]
        self._writer.add_text("arguments", "\n".join(["| argument | value |", "| --- | --- |", *lines]), epochs)

    def on_epoch_end(self, estimator: Estimator) -> None:
        """Write the values of the epoch."""
        if self._writer is not None:
            for name, value in _values(estimator).items():
                self._writer.add_scalar(name, value, estimator.epoch_)
            self._writer.flush()

    def on_fit_end(self, estimator: Estimator) -> None:
        """Close the file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class MLflowCallback(Callback):
    """Record every fit as a run of MLflow: arguments, every column of the history, the best epoch and the outcome.

    The callback uses a client of its own and leaves MLflow's active run and tracking URI unchanged. Needs the extra
    `mlflow`.

    Parameters
    ----------
    experiment : str
        Created if it does not exist.
    tracking_uri : str
        A database or a server. By default a SQLite file in the working directory; show it with
        `mlflow ui --backend-store-uri sqlite:///mlflow.db`.
    run_name : str, optional
        Default: the class of the model.

    Raises
    ------
    ConfigError
        mlflow is not installed, or `tracking_uri` is a folder: MLflow does not write to folders any more.

    Examples
    --------
    ::

        qfast.run("workflow.yaml", callbacks=[MLflowCallback("first", "sqlite:////data/mlflow.db")])
    """

    def __init__(
        self, experiment: str = "qfast", tracking_uri: str = "sqlite:///mlflow.db", run_name: str | None = None
    ) -> None:
        if "://" not in tracking_uri or tracking_uri.startswith("file:"):
            folder = tracking_uri.removeprefix("file:").removeprefix("//")
            raise ConfigError(
                f"tracking_uri must be a database or a server, got the folder {tracking_uri!r}, to which MLflow does "
                f"not write any more. Remedy: 'sqlite:///{Path(folder) / 'mlflow.db'}'."
            )
        self.experiment, self.tracking_uri, self.run_name = experiment, tracking_uri, run_name
        self._client: Any = None
        self._run_id = ""
        _ = _imported("mlflow", "mlflow", type(self).__name__)

    def on_fit_start(self, estimator: Estimator) -> None:
        """Create the run and record the arguments."""
        if not writes_files():
            return
        self._client = _imported("mlflow.tracking", "mlflow", type(self).__name__).MlflowClient(self.tracking_uri)
        existing = self._client.get_experiment_by_name(self.experiment)
        number = self._client.create_experiment(self.experiment) if existing is None else existing.experiment_id
        run = self._client.create_run(number, run_name=self.run_name or type(estimator).__name__)
        self._run_id = run.info.run_id
        for name, value in _arguments(estimator).items():
            self._client.log_param(self._run_id, name, value[:PARAMETER_LENGTH])

    def on_epoch_end(self, estimator: Estimator) -> None:
        """Record the values of the epoch."""
        if self._client is not None:
            stamp = int(1000 * time.time())
            for name, value in _values(estimator).items():
                self._client.log_metric(self._run_id, name, value, timestamp=stamp, step=estimator.epoch_)

    def on_fit_end(self, estimator: Estimator) -> None:
        """Record the best epoch, and whether the fit has finished, failed or been interrupted."""
        if self._client is None:
            return
        if estimator.best_epoch_ is not None:
            self._client.set_tag(self._run_id, "best_epoch", str(estimator.best_epoch_))
        error = sys.exc_info()[0]  # `fit` calls this method while its exception propagates
        interrupted = error is not None and not issubclass(error, Exception)
        self._client.set_terminated(self._run_id, "KILLED" if interrupted else "FAILED" if error else "FINISHED")
        self._client = None


def _imported(module: str, extra: str, user: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"{user} needs the package {extra}, which cannot be imported ({error}). Remedy: pip install "
            f"'qfast-models[{extra}]'."
        ) from None


def _arguments(estimator: Estimator) -> dict[str, str]:
    """The arguments of a model as text."""
    return {k: name_of(v) if callable(v) else str(v) for k, v in estimator.get_params().items()}


def _values(estimator: Estimator) -> dict[str, float]:
    """The finite values of the last epoch."""
    return {name: float(v) for name, v in estimator.progress_.records[-1].items() if math.isfinite(v)}
