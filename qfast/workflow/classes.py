"""The classes that a workflow file may name, under Qlib's module paths and under qfast's.

Importing this module fills the registries. Handlers, processors and records register themselves.
"""

from __future__ import annotations

from qfast.data import DatasetH, TSDatasetH, handlers, processors
from qfast.models import ALSTM, GRU, LSTM, TCN, GATs, LocalformerModel, TransformerModel, ts
from qfast.registry import DATASETS, MODELS, REWEIGHTERS
from qfast.training.estimator import Estimator
from qfast.workflow import records

__all__ = ["handlers", "processors", "records"]


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
