"""The samples of one segment in the form that every model reads: a feature table and row numbers.

Every data source (qfast's datasets, Qlib's, plain frames) becomes a `WindowSet`. A flat sample is one row of F*T
columns. Any other sample is a window of T rows, which the operator `gather_windows` reads for each batch.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, TypeAlias, cast

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from qfast.data.batching import Batches
from qfast.data.price_windows import PriceWindows
from qfast.data.read_ahead import ReadAhead
from qfast.errors import DataError
from qfast.ops import WindowIndex, gather_windows, window_rows

SCAN_ROWS = 1 << 12  # rows scanned for NaN at a time

FeatureTable: TypeAlias = Tensor | PriceWindows
"""Features [R, D]: in memory, or computed from prices when they are read."""

__all__ = ["ConsecutiveWindows", "FeatureTable", "WindowSet", "gather_rows"]


def gather_rows(features: FeatureTable, rows: Tensor) -> Tensor:
    """Rows (int64 [B, T], -1 for a row of NaN) of the features: [B, T, D]."""
    return gather_windows(features, rows) if isinstance(features, Tensor) else features.gather(rows)


@dataclass
class WindowSet:
    """n samples over a feature table of R rows.

    Attributes
    ----------
    features : Tensor or PriceWindows
        float32 [R, D] with any row stride. D is F for windows and F*T for flat samples.
    rows : Tensor
        int64 [n]: for each sample the feature row of its last step.
    label : Tensor or None
        float32 or float64 [n], NaN or infinite if unknown. None if the data has no label column.
    columns : sequence of str
        D feature names.
    keys_of : callable
        `keys_of(rows)` returns the (datetime, instrument) index of feature rows.
    source : callable
        `source()` returns the object passed to a reweighter: the sampler or the frame of the samples.
    history : callable or None
        `history()` returns all rows that the windows can read, ascending. None for flat samples.
    index : WindowIndex or None
        Window tables over the R rows. None for flat samples.
    step_len : int or None
        T. None for flat samples.
    fill : str
        How missing steps are filled: "none", "ffill" or "ffill+bfill".
    first_position : int
        Windows do not read rows before this date position.
    name : str
        Name of the segment, for messages.
    weight : Tensor or None
        [n] weights of the training loss.
    label_table : Tensor or None
        [R], the label of every feature row, for windows that contain labels. None for flat samples.
    """

    features: FeatureTable
    rows: Tensor
    label: Tensor | None
    columns: Sequence[str]
    keys_of: Callable[[np.ndarray], pd.MultiIndex]
    source: Callable[[], Any]
    history: Callable[[], np.ndarray] | None = None
    index: WindowIndex | None = None
    step_len: int | None = None
    fill: str = "ffill+bfill"
    first_position: int = 0
    name: str = ""
    weight: Tensor | None = None
    label_table: Tensor | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def keys(self) -> pd.MultiIndex:
        """(datetime, instrument) of the n samples, in sample order."""
        return self.keys_of(self.rows.cpu().numpy())

    @cached_property
    def days(self) -> Batches:
        """One batch per date, in ascending order of dates. Within a date, samples keep their order."""
        codes, dates = pd.factorize(self.keys().get_level_values(0), sort=True)
        order = torch.from_numpy(np.argsort(codes, kind="stable"))
        sizes = torch.from_numpy(np.bincount(codes, minlength=len(dates)))
        bounds = torch.cat((torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)))
        return Batches(order.to(self.device), bounds, len(dates))

    @cached_property
    def day_numbers(self) -> Tensor | None:
        """int64 [n] on the device: the number of each sample's date in ascending order. None without dates."""
        days = self.days
        dates = torch.repeat_interleave(torch.arange(len(days)), days.bounds.diff()).to(self.device)
        return torch.empty_like(dates).scatter_(0, days.order, dates)

    @cached_property
    def largest_day(self) -> int:
        """Number of samples of the date with most samples."""
        return int(self.days.bounds.diff().max()) if len(self.days) else 0

    def has_label(self, batches: Batches) -> Tensor:
        """bool [batches] on the CPU: True for batches with at least one finite label."""
        assert self.label is not None
        finite = torch.isfinite(self.label[batches.order]).cpu()
        counts = torch.cat((torch.zeros(1, dtype=torch.int64), finite.cumsum(0)))
        return counts[batches.bounds].diff() > 0

    @property
    def device(self) -> torch.device:
        """Device of the features."""
        return self.features.device

    def to(self, device: torch.device, moved: dict[Any, Any] | None = None) -> WindowSet:
        """The same samples with every tensor on `device`. Returns self if the features are already there.

        Parameters
        ----------
        device : torch.device
        moved : dict, optional
            Copies that exist already. Segments of one panel share its memory; passing the same dict for each of them
            makes them share one copy on the device too.
        """
        if device == self.device:
            return self
        copies = {} if moved is None else moved

        def move_windows(windows: PriceWindows) -> FeatureTable:
            if windows not in copies:
                copies[windows] = windows.to(device, move)
            return cast(FeatureTable, copies[windows])

        def move(tensor: Tensor) -> Tensor:
            key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
            if key not in copies:
                copies[key] = tensor.to(device)
            return cast(Tensor, copies[key])

        return replace(
            self,
            features=move_windows(self.features) if isinstance(self.features, PriceWindows) else move(self.features),
            rows=move(self.rows),
            label=None if self.label is None else move(self.label),
            index=None if self.index is None else WindowIndex(*map(move, self.index)),
            weight=None if self.weight is None else move(self.weight),
        )

    def batch(self, samples: Tensor) -> Tensor:
        """Features of samples (int64 [B], on the device of the features): [B, T, F], or [B, F*T] for flat samples."""
        rows = self.rows[samples]
        if not isinstance(self.features, Tensor):
            return self.features.gather(rows if self.index is None else self._window_rows(rows))
        if self.index is None or self.step_len is None:
            return gather_windows(self.features, rows.unsqueeze(1)).squeeze(1)
        return gather_windows(
            self.features, self.index, rows, self.step_len, fill=self.fill, first_position=self.first_position
        )

    def read_ahead(self, parts: Iterable[Tensor]) -> Iterable[Tensor]:
        """Sample numbers (int64 [B] each) unchanged, for a loop that reads their features.

        If the features are in a file that does not fit into memory, those of the next part are read from the disk while
        the current one is processed.
        """
        return parts if self._reader is None else self._reader.one_ahead(parts, self.request)

    def request(self, samples: Tensor) -> None:
        """Start to read the features of samples (int64 [B]) from the disk, if they are in a file larger than memory."""
        if self._reader is not None and len(samples):
            last = self.rows[samples].numpy()
            self._reader.request(last - ((self.step_len or 1) - 1), last)

    @cached_property
    def _reader(self) -> ReadAhead | None:
        return ReadAhead.of(self.features) if isinstance(self.features, Tensor) else None

    def _window_rows(self, rows: Tensor) -> Tensor:
        """Rows [B, T] of the windows that end at `rows`."""
        assert self.index is not None
        assert self.step_len is not None
        return window_rows(self.index, rows, self.step_len, fill=self.fill, first_position=self.first_position)

    def with_views(self) -> WindowSet:
        """The same samples, except that `batch` returns a `view` where one exists."""
        return _WindowViews(**{item.name: getattr(self, item.name) for item in fields(self)})

    def view(self, samples: Tensor) -> Tensor | None:
        """Features [B, T, F] without a copy, if the windows end at consecutive rows and each is T rows of the table.

        Parameters
        ----------
        samples : Tensor
            int64 [B].

        Returns
        -------
        Tensor or None
            None for flat samples and for any other windows. The windows overlap in memory and must not be written to.
        """
        if self.index is None or self.step_len is None or len(samples) == 0 or not isinstance(self.features, Tensor):
            return None
        rows = self.rows[samples]
        first, last = int(rows[0]), int(rows[-1])
        if last - first != len(rows) - 1 or bool((rows.diff() != 1).any()) or bool(self._has_holes(rows).any()):
            return None
        return self.features[first - self.step_len + 1 : last + 1].unfold(0, self.step_len, 1).transpose(1, 2)

    def consecutive(self, shortest: int) -> list[Tensor]:
        """Maximal sequences of consecutive windows, for which `view` returns a tensor.

        Parameters
        ----------
        shortest : int
            Shorter sequences are left out; at least 2.

        Returns
        -------
        list of int64 Tensor
            Sample numbers in the order of the rows. No sample occurs twice.
        """
        _, samples, bounds = self._sequences(shortest)
        return [samples[begin:end] for begin, end in bounds]

    def _sequences(self, shortest: int) -> tuple[Tensor, Tensor, list[tuple[int, int]]]:
        """The sequences of `consecutive` as bounds in the first two results, the sorted rows and their samples."""
        rows, samples = self.rows.sort()
        holes = self._has_holes(rows)
        starts = torch.ones_like(holes)
        starts[1:] = holes[1:] | holes[:-1] | (rows.diff() != 1)
        bounds = torch.cat((starts.nonzero()[:, 0], rows.new_tensor([len(rows)])))
        long = bounds.diff() >= shortest
        return rows, samples, list(zip(bounds[:-1][long].tolist(), bounds[1:][long].tolist(), strict=True))

    def consecutive_calls(self, shortest: int, most: int, *, join: bool) -> Iterator[ConsecutiveWindows]:
        """The windows of `consecutive`, divided into network calls.

        Parameters
        ----------
        shortest : int
            As in `consecutive`.
        most : int
            Largest number of windows of a call. A longer sequence is divided.
        join : bool
            Put several sequences into one call, which then has step_len - 1 superfluous windows between two sequences.
        """
        assert self.step_len is not None
        rows, samples, sequences = self._sequences(shortest)
        firsts = rows[[begin for begin, _ in sequences]].tolist()
        call = ConsecutiveWindows(self)
        for (begin, end), row in zip(sequences, firsts, strict=True):
            while begin < end:
                room = most - len(call) - (self.step_len - 1 if call.parts else 0)
                if call.parts and (room <= 0 or not join):
                    yield call
                    call, room = ConsecutiveWindows(self), most
                count = min(end - begin, room)
                call.add(row, samples[begin : begin + count])
                begin, row = begin + count, row + count
        if call.parts:
            yield call

    def stretches(self, fewest: int) -> list[Tensor]:
        """Earlier name of `consecutive`."""
        warnings.warn("WindowSet.stretches has been renamed to consecutive.", DeprecationWarning, stacklevel=2)
        return self.consecutive(fewest)

    def _read(self, rows: Tensor) -> Tensor:
        """Features [B, D] of rows (int64 [B]), without a copy if they are consecutive rows of a tensor."""
        rows = rows.to(self.device)
        if not isinstance(self.features, Tensor):
            return self.features.gather(rows)
        low, high = int(rows[0]), int(rows[-1]) + 1
        is_range = high - low == len(rows) and bool((rows.diff() == 1).all())
        return self.features[low:high] if is_range else self.features[rows]

    def _has_holes(self, rows: Tensor) -> Tensor:
        """bool [B]: True for windows that are not step_len consecutive rows of the table."""
        assert self.index is not None
        assert self.step_len is not None
        before = self.step_len - 1
        return (self.index.run[rows] < before) | (self.index.position[rows] - before < self.first_position)

    def select(self, keep: Tensor) -> WindowSet:
        """The samples i with keep[i], bool [n]. Feature table and index are shared."""
        return replace(
            self,
            rows=self.rows[keep],
            label=None if self.label is None else self.label[keep],
            weight=None if self.weight is None else self.weight[keep],
        )

    def complete_samples(self) -> Tensor:
        """bool [n]: True for flat samples without a NaN in features or label."""
        complete = torch.ones(len(self), dtype=torch.bool) if self.label is None else ~torch.isnan(self.label)
        if isinstance(self.features, PriceWindows) and self.features.never_nan():
            return complete
        for start in range(0, len(self), SCAN_ROWS):
            part = slice(start, start + SCAN_ROWS)
            complete[part] &= ~torch.isnan(self._read(self.rows[part])).any(1)
        return complete

    def non_finite_features(self) -> list[tuple[str, int, int, int]]:
        """Columns that contain NaN or infinity, as (column, number of such values, rows scanned, first such row)."""
        if isinstance(self.features, PriceWindows) and self.features.always_finite():
            return []
        rows = self.rows.sort().values if self.history is None else torch.from_numpy(self.history())
        bad = torch.zeros(self.features.shape[1], dtype=torch.int64)
        first = torch.full_like(bad, -1)
        for start in range(0, len(rows), SCAN_ROWS):
            part = rows[start : start + SCAN_ROWS]
            table = self._read(part)
            if bool(torch.isfinite(table.sum())):  # usually true, and cheaper than a look at every value
                continue
            wrong = ~torch.isfinite(table)
            counts = wrong.sum(0).cpu()
            fresh = (counts > 0) & (first < 0)
            first[fresh] = part[wrong.to(torch.int8).argmax(0).cpu()[fresh]]
            bad += counts
        return [(self.columns[j], int(bad[j]), len(rows), int(first[j])) for j in torch.nonzero(bad)[:, 0].tolist()]

    def require_finite_features(self) -> None:
        """Raise an error if any feature that training reads is NaN or infinite.

        A single NaN in one training row turns every weight into NaN.

        Raises
        ------
        DataError
            The message lists the columns, their percentage of such values and the first such row.
        """
        columns = self.non_finite_features()
        if not columns:
            return
        lines = []
        for column, count, total, row in columns[:8]:
            date, instrument = self.keys_of(np.array([row]))[0]
            lines.append(
                f"  {column!r}: {count} of {total} rows ({count / total:.2%}), first at {date}, {instrument!r}"
            )
        if len(columns) > 8:
            lines.append(f"  ... and {len(columns) - 8} more columns")
        raise DataError(
            f"features of segment {self.name!r} contain NaN or infinity in {len(columns)} of {len(self.columns)} "
            "columns, which would turn the weights into NaN:\n" + "\n".join(lines) + "\nRemedy: add the processors "
            "ProcessInf and Fillna (fields_group: feature) to infer_processors, or drop these columns."
        )


class ConsecutiveWindows:
    """Sequences of consecutive windows for one network call. `len` is the number of windows that the network receives.

    Attributes
    ----------
    parts : list of (int, Tensor)
        One for each sequence: the position of its first window in the call, and its sample numbers, int64.
    """

    def __init__(self, windows: WindowSet) -> None:
        self.parts: list[tuple[int, Tensor]] = []
        self._tables: list[Tensor] = []
        self._windows = windows
        self._steps_before = (windows.step_len or 1) - 1
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def add(self, row: int, samples: Tensor) -> None:
        """Append a sequence whose first window ends at this row of the table."""
        assert isinstance(self._windows.features, Tensor)
        begin = self._length + (self._steps_before if self.parts else 0)
        self.parts.append((begin, samples))
        self._tables.append(self._windows.features[row - self._steps_before : row + len(samples)])
        self._length = begin + len(samples)

    def windows(self) -> WindowSet:
        """All windows as samples of their own. Its `batch` returns a view of their rows, whichever are requested.

        The rows of a single sequence are a part of the table. The rows of several sequences are copied.
        """
        table = self._tables[0] if len(self._tables) == 1 else torch.cat(self._tables)
        settings = {item.name: getattr(self._windows, item.name) for item in fields(self._windows)}
        settings |= {"features": table, "rows": torch.arange(self._steps_before, len(table)), "label": None}
        return _EveryWindow(**{**settings, "weight": None})


class _EveryWindow(WindowSet):
    """All windows of a small table."""

    def batch(self, samples: Tensor) -> Tensor:
        assert isinstance(self.features, Tensor)
        assert self.step_len is not None
        return self.features.unfold(0, self.step_len, 1).transpose(1, 2)


class _WindowViews(WindowSet):
    """A `WindowSet` whose `batch` copies only windows without a view."""

    def batch(self, samples: Tensor) -> Tensor:
        x = self.view(samples)
        return super().batch(samples) if x is None else x
