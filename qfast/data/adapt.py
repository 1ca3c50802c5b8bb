"""Turns any dataset (qfast's, Qlib's or a user's own class with `prepare`) into a `WindowSet`."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import pandas as pd
import torch

from qfast.data.protocols import Dataset, Segment
from qfast.data.windows import WindowSet
from qfast.errors import DataError
from qfast.ops import build_window_index

__all__ = ["windows_of"]


def windows_of(dataset: Dataset, segment: Segment, data_key: str, *, with_label: bool = True) -> WindowSet:
    """The samples of one segment of a dataset.

    Parameters
    ----------
    dataset : Dataset
        A dataset of `qfast.data`, whose panel is shared, or an object whose
        `prepare(segment, col_set=..., data_key=...)` returns a frame or a TSDataSampler, such as Qlib's `DatasetH` and
        `TSDatasetH`. The array of a float32 sampler is not copied.
    segment : str, slice or (start, end)
    data_key : str
        "learn" for training, "infer" for prediction.
    with_label : bool
        False requests only the features, which allows predictions for data without a label column.

    Raises
    ------
    DataError
        The object has no `prepare`, `prepare` returns another type, or the data has several label columns.

    Examples
    --------
    >>> from qfast.data import TSDatasetH, synthetic
    >>> dataset = TSDatasetH(handler=synthetic.factors(3, 20, 4), segments={"test": (None, None)}, step_len=5)
    >>> windows_of(dataset, "test", "infer").batch(torch.tensor([0, 1])).shape
    torch.Size([2, 5, 4])
    """
    if hasattr(dataset, "windows"):
        windows: WindowSet = dataset.windows(segment, data_key, with_label=with_label)
        return windows
    if not hasattr(dataset, "prepare"):
        raise DataError(
            f"dataset must be a qfast or Qlib dataset (an object with `prepare`), got {type(dataset).__name__}. "
            "Remedy: qfast.data.DatasetH(handler, segments)."
        )
    rolling = hasattr(dataset, "step_len")
    col_set = ["feature", "label"] if with_label or rolling else "feature"
    prepared = dataset.prepare(segment, col_set=col_set, data_key=data_key)
    if isinstance(prepared, pd.DataFrame):
        return _from_frame(prepared, str(segment))
    if hasattr(prepared, "idx_arr") and hasattr(prepared, "data_arr"):
        return _from_sampler(prepared, str(segment))
    raise DataError(
        f"{type(dataset).__name__}.prepare({segment!r}) must return a DataFrame or a TSDataSampler, got "
        f"{type(prepared).__name__}."
    )


def _one_label(count: int, name: str) -> None:
    if count != 1:
        raise DataError(
            f"segment {name!r} has {count} label columns, but a model is trained on exactly one. Remedy: keep one "
            "label in the handler."
        )


def _from_frame(frame: pd.DataFrame, name: str) -> WindowSet:
    """Flat samples, one for each row of the frame."""
    features, label = frame, None
    if frame.columns.nlevels == 2:
        features = pd.DataFrame(frame["feature"])
        if "label" in frame.columns.get_level_values(0):
            _one_label(frame["label"].shape[1], name)
            label = torch.from_numpy(frame["label"].to_numpy(dtype=np.float32, copy=True)[:, 0])
    table = np.array(features.to_numpy(), dtype=np.float32, order="C", copy=True)
    return WindowSet(
        features=torch.from_numpy(table),
        rows=torch.arange(len(frame)),
        label=label,
        columns=[str(c) for c in features.columns],
        keys_of=lambda rows: frame.index[rows],
        source=lambda: frame,
        name=name,
    )


class _QlibSampler(Protocol):
    """The members of Qlib's TSDataSampler that are read here."""

    data_arr: np.ndarray
    """[R + 1, F + 1]: features and label of each row; the last row is NaN."""
    idx_df: pd.DataFrame
    """Dates by instruments."""
    idx_arr: np.ndarray
    """The values of `idx_df`: row numbers of `data_arr`, NaN where no row exists."""
    idx_map: Any
    """[n, 2]: date and instrument position of each sample."""
    step_len: int


def _from_sampler(sampler: _QlibSampler, name: str) -> WindowSet:
    """Windows of Qlib's TSDataSampler, whose last column is the label.

    The sampler has no column groups. If the data has two label columns, the first one is used as a feature, which
    cannot be detected here.
    """
    array = sampler.data_arr
    table = array if array.dtype == np.float32 else np.asarray(array, dtype=np.float32)
    data = torch.from_numpy(table)
    grid = sampler.idx_arr
    date_of, instrument_of = np.nonzero(~np.isnan(grid))
    row_of = grid[date_of, instrument_of].astype(np.int64)
    date_codes = np.zeros(len(table) - 1, dtype=np.int32)
    instrument_codes = np.zeros(len(table) - 1, dtype=np.int32)
    date_codes[row_of], instrument_codes[row_of] = date_of, instrument_of

    def keys_of(rows: np.ndarray) -> pd.MultiIndex:
        keys = [sampler.idx_df.index[date_codes[rows]], sampler.idx_df.columns[instrument_codes[rows]]]
        return pd.MultiIndex.from_arrays(keys, names=["datetime", "instrument"])

    cells = np.asarray(sampler.idx_map, dtype=np.int64).reshape(-1, 2)
    rows = torch.from_numpy(grid[cells[:, 0], cells[:, 1]].astype(np.int64))
    labels = torch.from_numpy(np.array(array[:, -1]))
    return WindowSet(
        features=data[:-1, :-1],
        rows=rows,
        label=labels[rows],
        columns=[f"column {j}" for j in range(table.shape[1] - 1)],
        keys_of=keys_of,
        source=lambda: sampler,
        history=lambda: np.arange(len(table) - 1),
        index=build_window_index(instrument_codes, date_codes),
        step_len=int(sampler.step_len),
        name=name,
        label_table=labels[:-1],
    )
