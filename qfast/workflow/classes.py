"""The classes that a workflow file may name, under Qlib's module paths and under qfast's.

Importing this module fills the registries. Handlers, processors and records register themselves.
"""

from __future__ import annotations

from typing import TypeVar

from qfast.data import DatasetH, TSDatasetH, handlers, processors
from qfast.errors import ConfigError
from qfast.models import ALSTM, GRU, LSTM, TCN, GATs, LocalformerModel, TransformerModel, ts
from qfast.registry import DATASETS, MODELS, REWEIGHTERS
from qfast.training.estimator import Estimator
from qfast.workflow import records

__all__ = ["handlers", "processors", "records", "register_model"]

Model = TypeVar("Model", bound=type[Estimator])


def register_model(model: Model, *, name: str | None = None, module_path: str | None = None) -> Model:
    """Let workflow files and run folders name a model class of your own, in this process.

    `qfast.run`, `check`, `predict` and `load` then build it. The command line has no such process: it imports the class
    from a file that `--allow-code` permits.

    Parameters
    ----------
    model : type
        A subclass of `qfast.training.estimator.Estimator`.
    name, module_path : str, optional
        `class` and `module_path` in workflow files. Default: the name of the class and its module.

    Returns
    -------
    type
        `model`, so the function can be used as a decorator.

    Raises
    ------
    ConfigError
        `model` is something else.

    Examples
    --------
    >>> from qfast.models import LSTM
    >>> @register_model
    ... class SmallLSTM(LSTM):
    ...     def __init__(self, hidden_size=8, **kwargs):
    ...         super().__init__(hidden_size=hidden_size, **kwargs)
    >>> MODELS.build({"class": "SmallLSTM", "kwargs": {"d_feat": 3}}).hidden_size
    8
    """
    if not (isinstance(model, type) and issubclass(model, Estimator)):
        raise ConfigError(f"a registered model must derive from {Estimator.__module__}.Estimator, got {model!r}.")
    MODELS.add(model, name or model.__name__, modules=(module_path or model.__module__,))
    return model


def _register() -> None:
    MODELS.base, DATASETS.base, REWEIGHTERS.base = Estimator, DatasetH, object
    for flat, rolling, stem in (
        (LSTM, ts.LSTM, "pytorch_lstm"),
        (GRU, ts.GRU, "pytorch_gru"),
        (ALSTM, ts.ALSTM, "pytorch_alstm"),
        (GATs, ts.GATs, "pytorch_gats"),
        (TCN, ts.TCN, "pytorch_tcn"),
        (TransformerModel, ts.TransformerModel, "pytorch_transformer"),
        (LocalformerModel, ts.LocalformerModel, "pytorch_localformer"),
    ):
        name = flat.__name__
        MODELS.add(flat, name, modules=(f"qlib.contrib.model.{stem}", "qfast.models"))
        MODELS.add(rolling, name, modules=(f"qlib.contrib.model.{stem}_ts", "qfast.models.ts"))
    for dataset in (DatasetH, TSDatasetH):
        DATASETS.add(dataset, modules=("qlib.data.dataset", "qfast.data", "qfast.data.dataset"))


_register()
