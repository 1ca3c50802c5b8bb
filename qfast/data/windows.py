"""Samples of one segment as the training loop sees them: tensors, row numbers, no copies.

A `WindowSet` is the meeting point of every data source (our datasets, Qlib's, plain frames) and every
model. A flat sample is one row of F*T columns; a rolling sample is a window of T rows that the gather
operator cuts out of the panel when a batch is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from qfast.errors import DataError
from qfast.ops import WindowIndex, gather_windows

SCAN_ROWS = 1 << 15  # rows looked at together when features are scanned for NaN

__all__ = ["WindowSet"]


@dataclass
class WindowSet:
    """n samples over a feature table of R rows.

    Attributes
    ----------
    features : Tensor
        float32 [R, D]; any row stride. D is F for rolling windows and F*T for flat ones.
    rows : Tensor
        int64 [n], the feature row of each sample (of its last step), in sample order.
    label : Tensor or None
        float32 or float64 [n], NaN or infinite where there is none; None when the data has no label.
    columns : sequence of str
        D feature names, for messages.
    keys : callable
        `keys()` gives the (datetime, instrument) index of the n samples.
    index : WindowIndex or None
        Window tables over the R rows; None for flat samples.
    step_len : int or None
        T of a rolling window; None for flat samples.
    fill : str
        How missing steps are filled: "none", "ffill" or "ffill+bfill".
    first_position : int
        Rows before this date position do not exist for these samples.
    used_rows : callable
        `used_rows()` gives the rows that any window can read.
    source : callable
        `source()` gives what a reweighter is shown: the sampler or the frame of the samples.
    """

    features: Tensor
    rows: Tensor
    label: Tensor | None
    columns: Sequence[str]
    keys: Callable[[], pd.MultiIndex]
    used_rows: Callable[[], np.ndarray]
    source: Callable[[], Any]
    index: WindowIndex | None = None
    step_len: int | None = None
    fill: str = "ffill+bfill"
    first_position: int = 0
    name: str = ""
    _weight: Tensor | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def device(self) -> torch.device:
        """Where the features live."""
        return self.features.device

    def to(self, device: torch.device, shared: dict[int, Any] | None = None) -> WindowSet:
        """The same samples with every tensor on `device`; nothing is copied if it is there already.

        `shared` maps id(tensor) -> moved tensor, so that segments cut from one panel share one copy.
        """
        if device == self.device:
            return self
        shared = {} if shared is None else shared

        def move(value: Any) -> Any:
            if value is None:
                return None
            if id(value) not in shared:
                shared[id(value)] = (
                    value,
                    value.to(device),
                )  # the original is kept so that its id stays taken
            return shared[id(value)][1]

        moved = {name: move(getattr(self, name)) for name in ("features", "rows", "label", "index", "_weight")}
        return WindowSet(**{**self.__dict__, **moved})

    def batch(self, samples: Tensor) -> Tensor:
        """Features of some samples (int64 [B], on the features' device): [B, T, F], or [B, F*T] if flat."""
        rows = self.rows[samples]
        if self.index is None or self.step_len is None:
            return gather_windows(self.features, rows.unsqueeze(1)).squeeze(1)
        return gather_windows(
            self.features, self.index, rows, self.step_len, fill=self.fill, first_position=self.first_position
        )

    def select(self, mask: np.ndarray) -> WindowSet:
        """Only the samples with mask[i]; the tables are shared."""
        keep = torch.from_numpy(np.flatnonzero(mask))
        keys = self.keys
        return WindowSet(
            **{
                **self.__dict__,
                "rows": self.rows[keep],
                "label": None if self.label is None else self.label[keep],
                "keys": lambda: keys()[mask],
            }
        )

    def non_finite_features(self) -> list[tuple[str, int, int, int]]:
        """(column, bad values, rows looked at, first bad row) of each column with NaN or infinity."""
        rows = torch.from_numpy(self.used_rows())
        bad = torch.zeros(self.features.shape[1], dtype=torch.int64)
        first = torch.full_like(bad, -1)
        for start in range(0, len(rows), SCAN_ROWS):
            part = rows[start : start + SCAN_ROWS]
            low, high = int(part[0]), int(part[-1]) + 1
            table = self.features[low:high] if high - low == len(part) else self.features[part.to(self.device)]
            if bool(torch.isfinite(table.sum())):  # one cheap reduction settles the usual case
                continue
            wrong = ~torch.isfinite(table)
            counts = wrong.sum(0).cpu()
            fresh = (counts > 0) & (first < 0)
            first[fresh] = part[wrong.to(torch.int8).argmax(0).cpu()[fresh]]
            bad += counts
        return [(self.columns[j], int(bad[j]), len(rows), int(first[j])) for j in torch.nonzero(bad)[:, 0].tolist()]

    def require_finite_features(self) -> None:
        """Raise before time is wasted: one NaN in one training row turns every weight into NaN.

        Raises
        ------
        DataError
            Names the columns, their share of bad values and the first bad row.
        """
        found = self.non_finite_features()
        if not found:
            return
        lines = [
            f"  {column!r}: {count} of {total} rows ({count / total:.2%}), first in row {row}"
            for column, count, total, row in found[:8]
        ]
        if len(found) > 8:
            lines.append(f"  ... and {len(found) - 8} more columns")
        raise DataError(
            f"features of segment {self.name!r} hold NaN or infinity in {len(found)} of {len(self.columns)} columns, "
            "which would turn the weights into NaN:\n" + "\n".join(lines) + "\nRemedy: add the processors ProcessInf "
            "and Fillna (fields_group: feature) to infer_processors, or drop these columns."
        )
