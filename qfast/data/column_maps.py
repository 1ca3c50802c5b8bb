"""Maps of one value with constants for each column: what most processors do to the values of a panel.

A map is applied to an array at once, or stored by `PriceWindows` and applied whenever values are read.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from qfast.ops.price_windows import FILL, LIMIT, SCALE, SHIFT, neutral_stage

__all__ = ["ColumnMap", "Fill", "Normalize", "ShiftedTanh"]


class ColumnMap(Protocol):
    """A function of the values of some columns."""

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """New values [rows, c] of the c columns."""

    def select(self, numbers: np.ndarray) -> ColumnMap:
        """The map of some of the c columns."""

    def stage(self, positions: np.ndarray, columns: int) -> Tensor | None:
        """The map as a stage [1, 4, columns] of `qfast.ops.price_windows`; None if it is not of this form."""


@dataclass(frozen=True, eq=False)
class Normalize:
    """(x - shift) / scale, limited to [-limit, limit].

    Attributes
    ----------
    shift, scale : ndarray
        [c], with the dtype of the values.
    limit : float
        Infinity: no limit.

    >>> Normalize(np.float32([1]), np.float32([2]), 3.0)(np.float32([[5], [99]])).tolist()
    [[2.0], [3.0]]
    """

    shift: np.ndarray
    scale: np.ndarray
    limit: float = np.inf

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """New values [rows, c]."""
        with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
            out = values - self.shift
            out /= self.scale
        return out if np.isinf(self.limit) else np.clip(out, -self.limit, self.limit, out=out)

    def select(self, numbers: np.ndarray) -> Normalize:
        """The map of some of the c columns."""
        return replace(self, shift=self.shift[numbers], scale=self.scale[numbers])

    def stage(self, positions: np.ndarray, columns: int) -> Tensor:
        """The map as a stage; other columns are not changed."""
        out = neutral_stage(columns)
        places = torch.from_numpy(positions.astype(np.int64))
        out[0, SHIFT, places] = torch.from_numpy(self.shift.astype(np.float32))
        out[0, SCALE, places] = torch.from_numpy(self.scale.astype(np.float32))
        out[0, LIMIT, places] = self.limit
        return out


@dataclass(frozen=True, eq=False)
class Fill:
    """`value` in place of NaN.

    >>> Fill(0.5)(np.float32([[np.nan, 2]])).tolist()
    [[0.5, 2.0]]
    """

    value: float

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """New values [rows, c]."""
        return np.where(np.isnan(values), values.dtype.type(self.value), values)

    def select(self, numbers: np.ndarray) -> Fill:
        """The same map."""
        return self

    def stage(self, positions: np.ndarray, columns: int) -> Tensor:
        """The map as a stage; other columns are not changed."""
        out = neutral_stage(columns)
        out[0, FILL, torch.from_numpy(positions.astype(np.int64))] = float(np.float32(self.value))
        return out


@dataclass(frozen=True)
class ShiftedTanh:
    """tanh(x - 1).

    >>> ShiftedTanh()(np.float32([[1.0]])).tolist()
    [[0.0]]
    """

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """New values [rows, c]."""
        return np.tanh(values - 1)

    def select(self, numbers: np.ndarray) -> ShiftedTanh:
        """The same map."""
        return self

    def stage(self, positions: np.ndarray, columns: int) -> None:
        """None: the stages of the operator do not include tanh."""
