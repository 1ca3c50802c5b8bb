"""Window sets from any dataset a user brings: ours, Qlib's own, or anything that answers `prepare`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import torch

from qfast.data.protocols import Dataset, Segment
from qfast.data.windows import WindowSet
from qfast.errors import DataError
from qfast.ops import build_window_index

__all__ = ["windows_of"]


def windows_of(dataset: Dataset, segment: Segment, data_key: str, *, with_label: bool = True) -> WindowSet:
    """Samples of one segment of `dataset`.

    Parameters
    ----------
    dataset
        A `qfast.data` dataset (its panel is shared), or an object with the reference's
        `prepare(segment, col_set=..., data_key=...)` that returns a frame or a TSDataSampler; Qlib's
        `DatasetH` and `TSDatasetH` do. A float32 sampler's array is used as it is.
    segment : str or slice
    data_key : str
        "learn" for training, "infer" for prediction.
    with_label : bool
        False asks a frame dataset for features only, so that rows without a label column can be scored.

    Raises
    ------
    DataError
        The dataset gives something else, or more than one label column.
    """
    if hasattr(dataset, "windows"):
        found: WindowSet = dataset.windows(segment, data_key, with_label=with_label)
        return found
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
        f"{type(dataset).__name__}.prepare({segment!r}) gave {type(prepared).__name__}; a DataFrame or a "
        "TSDataSampler is needed."
    )


def _one_label(count: int, name: str) -> None:
    if count != 1:
        raise DataError(f"segment {name!r} has {count} label columns; a model is trained on exactly one.")


def _from_frame(frame: pd.DataFrame, name: str) -> WindowSet:
    """Flat samples: each row of the frame."""
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


def _from_sampler(sampler: Any, name: str) -> WindowSet:
    """Rolling samples of the reference's TSDataSampler; its last column is the label.

    The sampler does not tell column groups apart, so a second label would silently become a feature;
    it cannot be noticed here.
    """
    array = sampler.data_arr
    table = array if array.dtype == np.float32 else np.asarray(array, dtype=np.float32)
    data = torch.from_numpy(table)
    grid = sampler.idx_arr  # dates x instruments -> row number, NaN where there is no row
    date_of, instrument_of = np.nonzero(~np.isnan(grid))
    row_of = grid[date_of, instrument_of].astype(np.int64)
    date_codes = np.zeros(len(table) - 1, dtype=np.int32)
    instrument_codes = np.zeros(len(table) - 1, dtype=np.int32)
    date_codes[row_of], instrument_codes[row_of] = date_of, instrument_of

    def keys_of(rows: np.ndarray) -> pd.MultiIndex:
        keys = [sampler.idx_df.index[date_codes[rows]], sampler.idx_df.columns[instrument_codes[rows]]]
        return pd.MultiIndex.from_arrays(keys, names=["datetime", "instrument"])

    where = np.asarray(sampler.idx_map, dtype=np.int64).reshape(-1, 2)
    rows = torch.from_numpy(grid[where[:, 0], where[:, 1]].astype(np.int64))
    return WindowSet(
        features=data[:-1, :-1],
        rows=rows,
        label=torch.from_numpy(np.array(array[:, -1]))[rows],
        columns=[f"column {j}" for j in range(table.shape[1] - 1)],
        keys_of=keys_of,
        source=lambda: sampler,
        history=lambda: np.arange(len(table) - 1),
        index=build_window_index(instrument_codes, date_codes),
        step_len=int(sampler.step_len),
        name=name,
    )
