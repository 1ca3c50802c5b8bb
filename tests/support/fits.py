"""Small estimators of every kind, their datasets, and comparisons of fits."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import pytest
import torch

from qfast.data import DatasetH, TSDatasetH
from qfast.models import ALSTM, GRU, LSTM, TCN, GATs, LocalformerModel, TransformerModel, ts
from qfast.training.callbacks import Callback
from support.frames import flat, make_frame, rolling

FLAT = [LSTM, GRU, ALSTM, GATs, TCN, TransformerModel, LocalformerModel]
TIME_SERIES = [ts.LSTM, ts.GRU, ts.ALSTM, ts.GATs, ts.TCN, ts.TransformerModel, ts.LocalformerModel]
ESTIMATORS = [*FLAT, *TIME_SERIES]
SMALL = {"d_feat": 3, "hidden_size": 8, "n_epochs": 3, "batch_size": 32, "lr": 0.01, "seed": 1}


def estimator_name(kind: type) -> str:
    """Test id of an estimator: "LSTM" for the flat one, "ts.LSTM" for time series."""
    return f"ts.{kind.__name__}" if is_time_series(kind) else kind.__name__


def is_time_series(kind: type) -> bool:
    """Whether `kind` is, or derives from, an estimator of qfast.models.ts."""
    return any(base.__module__ == "qfast.models.ts" for base in kind.__mro__)


def parametrize_estimators(kinds: Sequence[type] = ESTIMATORS) -> pytest.MarkDecorator:
    """Runs a test once for each estimator, which it receives as `kind`."""
    return pytest.mark.parametrize("kind", kinds, ids=estimator_name)


def small_arguments(kind: type, **changes) -> dict:
    """Constructor arguments of a network of a few hundred weights, which trains in a fraction of a second."""
    arguments = dict(SMALL)
    if issubclass(kind, GATs | ts.GATs):
        del arguments["batch_size"]  # each day is a batch
    if issubclass(kind, TCN | ts.TCN):
        arguments |= {"n_chans": arguments.pop("hidden_size"), "kernel_size": 2, "num_layers": 2}
    if issubclass(kind, TransformerModel | LocalformerModel | ts.TransformerModel | ts.LocalformerModel):
        arguments |= {"d_model": arguments.pop("hidden_size"), "num_layers": 1, "nhead": 2, "lr": 1e-3}
    return {**arguments, **changes}


def small_model(kind: type, **changes):
    """An estimator with `small_arguments`."""
    return kind(**small_arguments(kind, **changes))


def dataset_for(kind: type, **kwargs):
    """A small dataset of the sort that `kind` is fitted to: rolling windows for time-series models, else flat."""
    return rolling(**kwargs) if is_time_series(kind) else flat(**kwargs)


def frame_for(kind: type, n_dates: int = 70, n_instruments: int = 9, **kwargs) -> pd.DataFrame:
    """The frame of `dataset_for`. Flat models get 3 features at 4 steps, which is 12 columns."""
    return make_frame(n_dates, n_instruments, 3 if is_time_series(kind) else 12, **kwargs)


def laid_out_flat(dataset: TSDatasetH) -> DatasetH:
    """The same windows as the columns of a flat dataset, feature by feature."""
    frames = []
    for segment in ("train", "valid", "test"):
        windows = dataset.windows(segment, "learn")
        table = windows.batch(torch.arange(len(windows))).transpose(1, 2).flatten(1).numpy()
        columns = pd.MultiIndex.from_product([["feature"], [f"F{j}" for j in range(table.shape[1])]])
        frame = pd.DataFrame(table, index=windows.keys(), columns=columns)
        frame[("label", "LABEL0")] = windows.label.numpy()
        frames.append(frame)
    return flat(frame=pd.concat(frames).sort_index())


def weights(model) -> dict[str, torch.Tensor]:
    """A copy of the network's state dict."""
    return {k: v.clone() for k, v in model.network.state_dict().items()}


def same_weights(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether all tensors of `a` are bitwise equal to those of `b`."""
    return all(torch.equal(a[k], b[k]) for k in a)


class NetworkCalls:
    """Records the number of windows of each network call, and whether they were a view of the panel.

    `time_axis` is the axis of the steps in the network's input. In a view its stride is that of the windows.
    """

    def __init__(self, model, time_axis: int) -> None:
        self.sizes: list[tuple[int, bool]] = []
        self.time_axis = time_axis
        model.network.register_forward_pre_hook(self._record)

    def _record(self, network, inputs) -> None:
        x = inputs[0]
        self.sizes.append((len(x), x.stride(0) == x.stride(self.time_axis)))

    def viewed(self) -> int:
        return sum(size for size, is_view in self.sizes if is_view)


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


def device_model(kind: type, device: str, **changes):
    """An estimator without dropout, for comparisons of devices and of eager with recorded steps."""
    arguments = small_arguments(kind, n_epochs=2, lr=1e-3, seed=3, num_layers=2, dropout=0.0)
    for name, value in {"kernel_size": 5, "nhead": 4}.items():
        if name in arguments:
            arguments[name] = value
    return kind(**{**arguments, **changes}, device=device)


def assert_states_equal(a, b) -> None:
    """Asserts that two fitted models have bitwise equal weights, optimizer states and histories."""
    for key, value in a.network.state_dict().items():
        assert torch.equal(value, b.network.state_dict()[key]), key
    for ours, theirs in zip(a.train_optimizer.state.values(), b.train_optimizer.state.values(), strict=True):
        for key, value in ours.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(theirs[key])), key
    columns = ["train_loss", "train", "valid"]
    pd.testing.assert_frame_equal(a.history_[columns], b.history_[columns], check_exact=True)
