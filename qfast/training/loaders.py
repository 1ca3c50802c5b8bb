"""The arguments with which Qlib calls `train_epoch` and `test_epoch`: frames, or a loader of batches of windows.

Flat models receive two frames, features and label. Time-series models receive a loader. Both contain the samples that
the training loop reads, in the same batches and from the same random draws.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from qfast.data.windows import WindowSet
from qfast.errors import DataError
from qfast.ops import gather_windows

if TYPE_CHECKING:
    from qfast.training.estimator import Estimator

__all__ = ["WeightedSamples", "WindowLoader", "frames_of", "windows_of_batch", "windows_of_frames"]


def frames_of(windows: WindowSet, *, complete: bool = False) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Features and label of flat samples as frames, indexed (datetime, instrument), in the order of the samples.

    Parameters
    ----------
    windows : WindowSet
        Flat samples of a segment.
    complete : bool
        Leave out rows with NaN.
    """
    frame = windows.source()
    if not isinstance(frame, pd.DataFrame) or frame.columns.nlevels != 2:
        assert windows.label is not None
        index = windows.keys()
        values = windows.batch(torch.arange(len(windows), device=windows.device)).cpu().numpy()
        x = pd.DataFrame(values, index=index, columns=list(windows.columns))
        return x, pd.DataFrame({"label": windows.label.cpu().numpy()}, index=index)
    frame = frame.dropna() if complete else frame
    return pd.DataFrame(frame["feature"]), pd.DataFrame(frame["label"])


def windows_of_frames(x: pd.DataFrame, y: pd.DataFrame | pd.Series) -> WindowSet:
    """Flat samples of a frame of features and a frame or series with their labels. The values are copied.

    Raises
    ------
    DataError
        The frames differ in length, or `y` has several columns.
    """
    labels = np.asarray(y, dtype=np.float32)
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.shape != (len(x),):
        raise DataError(f"expected one label for each of {len(x)} rows of features, got an array {labels.shape}.")
    index = x.index
    return WindowSet(
        features=torch.from_numpy(np.array(x, dtype=np.float32, order="C", copy=True)),
        rows=torch.arange(len(x)),
        label=torch.from_numpy(labels.copy()),
        columns=[str(column) for column in x.columns],
        keys_of=lambda rows: index[rows],
        source=lambda: pd.concat({"feature": x, "label": pd.DataFrame(y)}, axis=1),
    )


class WindowLoader:
    """The batches of one segment, as Qlib's DataLoader yields them.

    A batch is a tensor [B, T, F + 1] whose last column is the label, on the device of the model. LSTM, GRU and ALSTM
    yield a pair of it and the sample weights, float64 [B]. GATs yields [1, N, T, F + 1], one day at a time. Every
    iteration is a new pass, which draws a new order of the training samples. Training passes omit the last, incomplete
    batch.

    Parameters
    ----------
    estimator : Estimator
        Its `batches` determines the batches.
    windows : WindowSet
        Rolling windows with labels.
    segment : {"train", "valid"}

    Attributes
    ----------
    stage : str
        The kind of pass of the next iteration, as in `Estimator.batches`.
    """

    drop_last = True
    num_workers = 0

    def __init__(self, estimator: Estimator, windows: WindowSet, segment: str) -> None:
        self.estimator, self.windows, self.segment = estimator, windows, segment
        self.stage = "train" if segment == "train" else "valid_score"

    def __iter__(self) -> Iterator[Any]:
        for samples in self.estimator.batches(self.windows, self.stage):
            data = torch.cat((self._features(samples), self._labels(samples)), dim=2)
            yield self.estimator.loader_batch(data, self._weights(samples))

    def __len__(self) -> int:
        """Number of batches of a pass. Draws no random numbers."""
        numpy_state = np.random.get_state()  # noqa: NPY002 - the source of batch orders
        try:
            with torch.random.fork_rng(devices=[]):
                return self.estimator.batches(self.windows, self.stage).whole
        finally:
            np.random.set_state(numpy_state)  # noqa: NPY002

    @property
    def batch_size(self) -> int | None:
        """Samples of a batch; None if batches are days."""
        params = self.estimator.get_params()
        size: int | None = None if params["batch_by"] == "day" else params.get("batch_size")
        return size

    @property
    def dataset(self) -> Any:
        """The sampler of the segment, with missing rows filled; for LSTM, GRU and ALSTM together with the weights."""
        sampler = self.windows.source()
        sampler.config(fillna_type=self.windows.fill)
        if not self.estimator.weights_in_batches:
            return sampler
        return WeightedSamples(sampler, self._weights(torch.arange(len(self.windows))).cpu().numpy())

    def _features(self, samples: Tensor) -> Tensor:
        assert self.windows.label is not None
        return self.windows.batch(samples).to(self.windows.label.dtype)

    def _labels(self, samples: Tensor) -> Tensor:
        """Labels [B, T, 1] of all steps of the windows."""
        windows = self.windows
        if windows.label_table is None or windows.index is None:
            raise DataError(
                "the dataset does not provide the labels of all steps of its windows. Remedy: set label_table of the "
                "WindowSet."
            )
        if windows.label_table.device != windows.device:
            windows.label_table = windows.label_table.to(windows.device)
        return gather_windows(
            windows.label_table.unsqueeze(1),
            windows.index,
            windows.rows[samples],
            windows.step_len,
            fill=windows.fill,
            first_position=windows.first_position,
        )

    def _weights(self, samples: Tensor) -> Tensor:
        weight = self.windows.weight
        if weight is None:
            return torch.ones(len(samples), dtype=torch.float64, device=self.windows.device)
        return weight[samples]


class WeightedSamples:
    """Samples and their weights as pairs, the dataset behind the loaders of LSTM, GRU and ALSTM.

    Parameters
    ----------
    sampler : TSDataSampler
        n windows.
    weights : array [n]
    """

    def __init__(self, sampler: Any, weights: np.ndarray) -> None:
        self.datasets = (sampler, weights)

    def __getitem__(self, number: int) -> tuple[Any, ...]:
        return tuple(part[number] for part in self.datasets)

    def __len__(self) -> int:
        return len(self.datasets[1])


def windows_of_batch(batch: Any, device: torch.device) -> WindowSet:
    """The samples of one batch of any loader.

    Parameters
    ----------
    batch : Tensor, or (Tensor, weights)
        [B, T, F + 1] or [1, B, T, F + 1], the label in the last column; weights [B].
    device : torch.device

    Returns
    -------
    WindowSet
        B samples whose `batch` returns their features [B, T, F], float32.

    Raises
    ------
    DataError
        The batch has another shape.
    """
    data, weight = batch if isinstance(batch, (tuple, list)) and len(batch) == 2 else (batch, None)
    data = torch.as_tensor(data)
    if data.dim() == 4 and len(data) == 1:
        data = data[0]
    if data.dim() != 3:
        raise DataError(
            f"a batch must be a tensor [B, T, F + 1] or a pair of it and weights [B], got {tuple(data.shape)}."
        )
    return _BatchWindows(
        features=data[:, :, :-1].to(device).float(),
        rows=torch.arange(len(data), device=device),
        label=data[:, -1, -1].to(device),
        columns=[f"column {j}" for j in range(data.shape[2] - 1)],
        keys_of=_no_keys,
        source=lambda: batch,
        step_len=data.shape[1],
        weight=None if weight is None else torch.as_tensor(weight).to(device),
    )


class _BatchWindows(WindowSet):
    """Samples whose feature table contains one window [T, F] per row."""

    day_numbers = None

    def batch(self, samples: Tensor) -> Tensor:
        assert isinstance(self.features, Tensor)
        return self.features[samples]


def _no_keys(rows: np.ndarray) -> pd.MultiIndex:
    raise DataError("a batch of a loader has no dates and instruments.")
