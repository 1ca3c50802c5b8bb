"""Small estimators of every kind, what they are fitted to, and comparisons of fits."""

from __future__ import annotations

import pandas as pd
import torch

import qfast.models
import qfast.models.ts
from qfast.data import DatasetH, TSDatasetH
from qfast.training.callbacks import Callback
from support.frames import SEGMENTS, flat, make_frame, rolling

SMALL = {"d_feat": 3, "hidden_size": 8, "n_epochs": 3, "batch_size": 32, "lr": 0.01, "seed": 1}


def is_time_series(kind: type) -> bool:
    """Whether `kind` is, or derives from, an estimator of qfast.models.ts."""
    return any(base.__module__ == "qfast.models.ts" for base in kind.__mro__)


def dataset_for(kind: type, **kwargs):
    """A small dataset of the sort that `kind` is fitted to: rolling windows for time-series models, else flat."""
    return rolling(**kwargs) if is_time_series(kind) else flat(**kwargs)


def weights(model) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.network.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[k], b[k]) for k in a)


class StopAt(Callback):
    """Ctrl-C at the end of an epoch, or in the middle of one."""

    def __init__(self, epoch: int, moment: str) -> None:
        self.epoch, self.moment = epoch, moment

    def on_batch_end(self, estimator):
        if self.moment == "batch" and estimator.epoch_ == self.epoch:
            raise KeyboardInterrupt

    def on_checkpoint(self, estimator):
        if self.moment == "checkpoint" and estimator.epoch_ == self.epoch:
            raise KeyboardInterrupt


ENCODERS = ("TransformerModel", "LocalformerModel")
NAMES = ("LSTM", "GRU", "ALSTM", "GATs", "TCN", *ENCODERS)
CASES = [(name, suffix) for suffix in ("", "_ts") for name in NAMES]
IDS = [name + suffix for name, suffix in CASES]


def model_of(name: str, suffix: str, device: str, **changes):
    width = {"TCN": "n_chans", **dict.fromkeys(ENCODERS, "d_model")}.get(name, "hidden_size")
    kwargs = {"d_feat": 3, width: 8, "num_layers": 2, "n_epochs": 2, "lr": 1e-3, "seed": 3, "dropout": 0.0}
    if name != "GATs":
        kwargs["batch_size"] = 32
    if name in ENCODERS:
        kwargs["nhead"] = 4
    return getattr(qfast.models.ts if suffix else qfast.models, name)(**{**kwargs, **changes}, device=device)


def data_of(suffix: str):
    if suffix:
        return TSDatasetH(handler=make_frame(70, 9, 3, holes=0.1), segments=SEGMENTS, step_len=5)
    return DatasetH(handler=make_frame(70, 9, 12, holes=0.1), segments=SEGMENTS)


def states_equal(a, b) -> None:
    for key, value in a.network.state_dict().items():
        assert torch.equal(value, b.network.state_dict()[key]), key
    for ours, theirs in zip(a.train_optimizer.state.values(), b.train_optimizer.state.values(), strict=True):
        for key, value in ours.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(theirs[key])), key
    columns = ["train_loss", "train", "valid"]
    pd.testing.assert_frame_equal(a.history_[columns], b.history_[columns], check_exact=True)
