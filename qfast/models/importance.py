"""Which features a model uses: how much its IC falls when a feature is permuted between the stocks of a day."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import takewhile
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from qfast.data.adapt import windows_of
from qfast.data.protocols import Dataset, Segment
from qfast.data.windows import WindowSet
from qfast.errors import ConfigError, DataError, suggest, whole_number
from qfast.metrics import daily_ic
from qfast.training.estimator import Estimator

__all__ = ["feature_importance"]


def feature_importance(
    model: Estimator,
    dataset: Dataset,
    segment: Segment = "test",
    *,
    features: Sequence[str] | None = None,
    repeats: int = 1,
    seed: int = 0,
) -> pd.DataFrame:
    """Permutation importance: the fall of the mean daily IC when stocks exchange a feature with others of their day.

    A stock receives the whole window of the feature from another stock, so the feature keeps its distribution on each
    day and its course in time. Features that carry the same information hide each other: permuting one of them changes
    little, because the model reads the other.

    Parameters
    ----------
    model : Estimator
        A fitted model.
    dataset : Dataset
        With labels, as in `fit`.
    segment : str or slice
    features : sequence of str, optional
        Features to permute. Default: all. A flat sample of F * T columns (Alpha360) has F features, named by what
        their columns have in common.
    repeats : int
        Permutations of each feature, over which the result is averaged. Each one is a prediction of the segment.
    seed : int
        Seed of the permutations.

    Returns
    -------
    DataFrame
        One row per feature, indexed by "feature", the most important one first. "IC" and "Rank IC" are the falls of the
        mean over days. "standard error" is the standard error of the "Rank IC" column, estimated over days. `attrs`
        contains "IC" and "Rank IC" of the unchanged data.

    Raises
    ------
    ConfigError
        An unknown feature, or `repeats` is not a positive whole number.
    DataError
        The segment has no day with an IC.
    NotFittedError
        The model has been neither fitted nor loaded.

    Notes
    -----
    Source: Breiman, Random Forests, Machine Learning 45, 2001, section 10, with the daily IC as the score and
    permutations within days.

    Examples
    --------
    >>> from qfast.data import TSDatasetH, synthetic
    >>> from qfast.models.ts import GRU
    >>> frame = synthetic.factors(12, 60, 3, ic=0.5, missing=0.0)
    >>> dataset = TSDatasetH(frame, {"train": (None, "2015-03-01"), "test": ("2015-03-02", None)}, step_len=3)
    >>> model = GRU(d_feat=3, hidden_size=4, n_epochs=1, batch_size=64, seed=0, progress=False).fit(dataset)
    >>> feature_importance(model, dataset).columns.tolist()
    ['IC', 'Rank IC', 'standard error']
    """
    whole_number("repeats", repeats)
    windows = windows_of(dataset, segment, "infer")
    label = _labels(windows, segment)
    groups = _feature_columns(windows, model)
    chosen = list(groups) if features is None else list(features)
    unknown = next((name for name in chosen if name not in groups), None)
    if unknown is not None:
        raise ConfigError(f"features has no {unknown!r}; the features are {list(groups)}." + suggest(unknown, groups))
    ic, rank_ic = daily_ic(model.predict(dataset, segment), label)
    if not ic.notna().any():
        raise DataError(f"segment {segment!r} has no day with two different labels and scores, so it has no IC.")
    generator = np.random.default_rng(seed)
    rows = {}
    for name in chosen:
        falls = []
        for _ in range(repeats):
            permuted = _Permuted.of(windows, groups[name], _exchanged_within_days(windows, generator))
            new_ic, new_rank_ic = daily_ic(model.predict(_WindowDataset(permuted), segment), label)
            falls.append(pd.DataFrame({"IC": ic - new_ic, "Rank IC": rank_ic - new_rank_ic}))
        daily = sum(falls) / repeats
        rows[name] = {**daily.mean(), "standard error": daily["Rank IC"].sem()}
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("feature")
    table.attrs = {"IC": float(ic.mean()), "Rank IC": float(rank_ic.mean())}
    return table.sort_values("Rank IC", ascending=False, kind="stable")


@dataclass
class _Permuted(WindowSet):
    """Windows in which sample i has some columns of sample `partner[i]`."""

    partner: Tensor | None = None
    exchanged: Sequence[int] = ()

    @classmethod
    def of(cls, windows: WindowSet, columns: Sequence[int], partner: Tensor) -> _Permuted:
        """The samples of `windows` with the columns of their partners."""
        values = {item.name: getattr(windows, item.name) for item in fields(WindowSet)}
        return cls(**values, partner=partner, exchanged=columns)

    def batch(self, samples: Tensor) -> Tensor:
        """As in `WindowSet`."""
        assert self.partner is not None
        x = super().batch(samples).clone()
        x[..., self.exchanged] = super().batch(self.partner.to(samples.device)[samples])[..., self.exchanged]
        return x

    def view(self, samples: Tensor) -> Tensor | None:
        """No window is a part of the table."""
        return None

    def consecutive(self, shortest: int) -> list[Tensor]:
        """No windows overlap."""
        return []

    def with_views(self) -> WindowSet:
        """The samples themselves."""
        return self


class _WindowDataset:
    """A dataset of given samples."""

    def __init__(self, samples: WindowSet) -> None:
        self.segments: dict[str, Any] = {}
        self._samples = samples

    def windows(self, segment: Segment, data_key: str, *, with_label: bool = True) -> WindowSet:
        """The samples, whatever the segment."""
        return self._samples

    def prepare(self, segments: Any, **options: Any) -> Any:
        """Not available."""
        raise NotImplementedError("the samples are read through `windows`.")


def _labels(windows: WindowSet, segment: Segment) -> pd.Series:
    if windows.label is None:
        raise DataError(f"segment {segment!r} has no label, so its scores have no IC.")
    return pd.Series(windows.label.cpu().numpy(), index=windows.keys())


def _feature_columns(windows: WindowSet, model: Estimator) -> Mapping[str, list[int]]:
    """Columns of each feature: one column of windows, or all T columns of a feature of flat samples."""
    names = list(windows.columns)
    n_features = getattr(model.network, "d_feat", model.get_params().get("d_feat", len(names)))
    if windows.index is not None or not isinstance(n_features, int) or len(names) % n_features:
        n_features = len(names)
    width = len(names) // n_features
    groups = {}
    for start in range(0, len(names), width):
        part = names[start : start + width]
        groups[part[0] if width == 1 else _common_start(part)] = list(range(start, start + width))
    return groups


def _common_start(names: Sequence[str]) -> str:
    """What all names begin with, or the first name if they have nothing in common.

    >>> _common_start(["CLOSE59", "CLOSE1", "CLOSE0"])
    'CLOSE'
    """
    equal = takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    return "".join(letters[0] for letters in equal) or names[0]


def _exchanged_within_days(windows: WindowSet, generator: np.random.Generator) -> Tensor:
    """int64 [n]: a random sample of the same day for each sample. Every sample occurs once."""
    order = windows.days.order.cpu().numpy()
    day = np.repeat(np.arange(len(windows.days)), windows.days.bounds.diff().numpy())
    shuffled = order[np.lexsort((generator.random(len(order)), day))]
    partner = np.empty_like(order)
    partner[order] = shuffled
    return torch.from_numpy(partner)
