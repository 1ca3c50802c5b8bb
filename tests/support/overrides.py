"""Overrides of Qlib's functions, written once and applied to Qlib's and to qfast's classes. They record their calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pandas as pd
import torch
from torch.nn import functional

Calls = list[tuple[Any, ...]]

NETWORK_NAMES = (
    *("lstm_model", "gru_model", "LSTM_model", "GRU_model", "ALSTM_model"),
    *("GAT_model", "tcn_model", "TCN_model", "model"),
)


def network_of(model: Any) -> torch.nn.Module:
    """The network under Qlib's name."""
    return next(getattr(model, name) for name in NETWORK_NAMES if hasattr(model, name))


def note(calls: Calls, name: str, *arguments: Any) -> None:
    """Record a call: its name, and copies of tensors and frames. Loaders are recorded by class."""
    kept = []
    for value in arguments:
        if isinstance(value, torch.Tensor):
            kept.append(value.detach().clone())
        elif isinstance(value, pd.DataFrame | pd.Series):
            kept.append(value.copy())
        else:
            kept.append(value if value is None else "loader")
    calls.append((name, *kept))


def information_coefficient(pred: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Correlation of predictions and labels."""
    known = torch.isfinite(label)
    return torch.corrcoef(torch.stack([pred[known].double(), label[known].double()]))[0, 1]


def own_metric(kind: type, calls: Calls) -> type:
    """`metric_fn` is an information coefficient."""

    class OwnMetric(kind):
        def metric_fn(self, pred, label):
            note(calls, "metric_fn", pred, label)
            return information_coefficient(pred, label)

    return OwnMetric


def own_loss(kind: type, calls: Calls, *, weights: bool = False) -> type:
    """`loss_fn` is Huber's loss, with the number of arguments of Qlib's model."""

    class OwnLoss(kind):
        def loss_fn(self, pred, label):
            note(calls, "loss_fn", pred, label)
            known = ~torch.isnan(label)
            return functional.huber_loss(pred[known], label[known].to(pred.dtype), delta=0.1)

    class OwnWeightedLoss(kind):
        def loss_fn(self, pred, label, weight=None):
            note(calls, "loss_fn", pred, label, weight)
            known = ~torch.isnan(label)
            loss = functional.huber_loss(pred[known], label[known].to(pred.dtype), delta=0.1, reduction="none")
            return (loss if weight is None else weight[known] * loss).mean()

    return OwnWeightedLoss if weights else OwnLoss


def own_days(kind: type, calls: Calls) -> type:
    """`get_daily_inter` of flat GATs splits each day into two halves."""

    class OwnDays(kind):
        def get_daily_inter(self, df, shuffle=False):
            note(calls, "get_daily_inter", df)
            firsts, counts = super().get_daily_inter(df, shuffle)
            halves = [
                (start, size)
                for first, count in zip(firsts, counts, strict=True)
                for start, size in ((first, count // 2), (first + count // 2, count - count // 2))
            ]
            return tuple(zip(*halves, strict=True))

    return OwnDays


def own_test_epoch(kind: type, calls: Calls) -> type:
    """`test_epoch` prefers a certain loss to the smallest one, so it selects another epoch."""

    class OwnTestEpoch(kind):
        def test_epoch(self, *data):
            note(calls, "test_epoch", *data)
            loss, _ = super().test_epoch(*data)
            return loss, -abs(float(loss) - 0.98)

    return OwnTestEpoch


def own_train_epoch(kind: type, calls: Calls) -> type:
    """`train_epoch` is a loop of the user's over frames or over the batches of a loader."""

    class OwnTrainEpoch(kind):
        def train_epoch(self, *data):
            note(calls, "train_epoch", *data)
            network = network_of(self)
            network.train()
            for feature, label, *batch in _batches(self, data):
                note(calls, "batch", feature, label, *batch)
                loss = (network(feature).reshape(-1) - label.float()).abs().nanmean()
                self.train_optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_value_(network.parameters(), 3.0)
                self.train_optimizer.step()

    return OwnTrainEpoch


def _batches(model: Any, data: tuple[Any, ...]):
    """Features, labels and, from a loader, everything that it yields."""
    if len(data) == 2:
        x, y = data
        size = getattr(model, "batch_size", 16)
        for begin in range(0, len(x) - size + 1, size):
            part = slice(begin, begin + size)
            yield torch.tensor(x.values[part]).float(), torch.tensor(y.values[part, 0]).float()
        return
    for batch in data[0]:
        parts = list(batch) if isinstance(batch, (tuple, list)) else [batch]
        values = parts[0].squeeze(0)
        feature, label = values[:, :, :-1].float(), values[:, -1, -1]
        yield (feature.transpose(1, 2) if hasattr(model, "TCN_model") else feature), label, *parts


def wrapped(kind: type, calls: Calls) -> Callable[..., Any]:
    """`train_epoch` and `test_epoch` are wrapped on the model."""

    def build(**arguments: Any) -> Any:
        model = kind(**arguments)

        def wrap(name: str) -> None:
            inner = getattr(model, name)

            def wrapper(*data):
                note(calls, name, *data)
                return inner(*data)

            setattr(model, name, wrapper)

        wrap("train_epoch")
        wrap("test_epoch")
        return model

    return build


def own_fit(kind: type, calls: Calls) -> type:
    """`fit` calls `train_epoch` and `test_epoch` itself, and stops after two epochs."""

    class OwnFit(kind):
        def fit(self, dataset, evals_result, save_path=None):
            evals_result |= {"train": [], "valid": []}
            data = {name: _arguments(self, dataset, name) for name in ("train", "valid")}
            for _ in range(2):
                note(calls, "train_epoch")
                self.train_epoch(*data["train"])
                for name, arguments in data.items():
                    evals_result[name].append(float(self.test_epoch(*arguments)[1]))
            self.fitted = True

    return OwnFit


def _arguments(model: Any, dataset: Any, segment: str) -> tuple[Any, ...]:
    prepared = dataset.prepare(segment, col_set=["feature", "label"], data_key="learn")
    if isinstance(prepared, pd.DataFrame):
        return prepared["feature"], prepared["label"]
    prepared.config(fillna_type="ffill+bfill")
    samples: Any = prepared
    if hasattr(model, "LSTM_model") or hasattr(model, "GRU_model") or hasattr(model, "ALSTM_model"):
        samples = [(prepared[i], 1.0) for i in range(len(prepared))]
    size = getattr(model, "batch_size", None)
    if size is None:  # GATs: a batch is a day
        return ([torch.as_tensor(prepared[list(range(i, i + 5))])[None] for i in range(0, len(prepared) - 5, 5)],)
    return (torch.utils.data.DataLoader(samples, batch_size=size, shuffle=segment == "train", drop_last=True),)


def attributes_set(kind: type, calls: Calls) -> Callable[..., Any]:
    """Arguments are changed after the model is built."""

    def build(**arguments: Any) -> Any:
        model = kind(**arguments)
        model.n_epochs, model.early_stop = 4, 1
        if hasattr(model, "batch_size"):
            model.batch_size = 24
        return model

    return build
