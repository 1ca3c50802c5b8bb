"""Constructors of GATs, flat and time-series, with days as batches, pretrained base models and attention tables."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from qfast.data.adapt import windows_of
from qfast.data.batching import Batches, BatchOrder, NumpyOrder, SequenceOrder, UnshuffledLoaderOrder
from qfast.data.protocols import Dataset
from qfast.data.windows import WindowSet
from qfast.dates import DateLike, date_text
from qfast.errors import ConfigError, DataError
from qfast.models.attention import neighbours, plot_attention
from qfast.models.pretrained import BaseWeights, read_base, select_base
from qfast.nn.graph import BASES, GATModel
from qfast.training.base import network_alias
from qfast.training.distributed import Gathered, Replicated, SharedWindows
from qfast.training.estimator import Estimator
from qfast.training.overrides import default, is_overridden, name_of

if TYPE_CHECKING:
    from typing_extensions import Self

FIT_ARGUMENTS = ("evals_result", "save_path", "reweighter", "callbacks", "checkpoint_dir", "resume", "init_from")

__all__ = ["GraphEstimator", "GraphTimeSeriesEstimator"]


class GraphEstimator(Estimator):
    """Estimator with the arguments of Qlib's flat GATs, in Qlib's order. Every batch is a day.

    Attributes
    ----------
    pretrained_ : dict
        Where the weights of the base model come from: the source and its keys that were loaded, not loaded or absent.
        Empty if they were drawn.
    """

    network_class = GATModel
    base_estimators: ClassVar[dict[str, type[Estimator]]]
    """The estimator that trains a base model, by `base_model`."""
    options: ClassVar[tuple[str, ...]] = (*Estimator.options, "shuffle_days")
    rows_per_call: ClassVar[int] = 8192
    mixes_samples: ClassVar[bool] = True
    batches_are_days: ClassVar[bool] = True
    GAT_model = network_alias()

    def __init__(
        self,
        d_feat: int = 6,
        hidden_size: int = 64,
        num_layers: int = 2,
        dropout: float = 0.0,
        n_epochs: int = 200,
        lr: float = 0.001,
        metric: str | Callable[..., Any] = "",
        early_stop: int = 20,
        loss: str | Callable[..., Any] = "mse",
        base_model: str = "GRU",
        model_path: str | os.PathLike[str] | None = None,
        optimizer: str = "adam",
        GPU: int | None = 0,
        seed: int | None = None,
        **options: Any,
    ) -> None:
        ignored_batch_size = options.pop("batch_size", None)
        shuffle_days = options.pop("shuffle_days", True)
        extra = {
            "model_path": os.fspath(model_path) if isinstance(model_path, os.PathLike) else model_path,
            "shuffle_days": shuffle_days,
            **options.pop("extra", {}),
        }
        super().__init__(
            {
                "d_feat": d_feat,
                "hidden_size": hidden_size,
                "num_layers": num_layers,
                "dropout": dropout,
                "base_model": base_model,
            },
            n_epochs=n_epochs,
            lr=lr,
            metric=metric,
            early_stop=early_stop,
            loss=loss,
            optimizer=optimizer,
            GPU=GPU,
            seed=seed,
            extra=extra,
            **options,
        )
        self.pretrained_: dict[str, Any] = {}
        self.base_is_set_ = False
        self.base_is_trained_ = False  # True after `pretrain`
        if ignored_batch_size is not None:
            self.logger.info(
                "batch_size=%r has no effect: every batch of %s is a day", ignored_batch_size, type(self).__name__
            )
        if model_path is not None and Path(model_path).expanduser().exists():
            read_base(Path(model_path), self.network)  # raises before data is loaded if the file does not fit

    def _check_arguments(self, params: Mapping[str, Any]) -> None:
        super()._check_arguments(params)
        if not isinstance(params["shuffle_days"], bool):
            raise ConfigError(f"shuffle_days must be True or False, got {params['shuffle_days']!r}.")
        if params["model_path"] is not None and not isinstance(params["model_path"], (str, os.PathLike)):
            raise ConfigError(f"model_path must be a path or None, got {params['model_path']!r}.")

    # ---------------------------------------------------------------- days
    @default
    def get_daily_inter(self, df: pd.DataFrame, shuffle: bool = False) -> tuple[Any, Any]:
        """First row and number of rows of each day of a frame, under Qlib's name.

        If a subclass overrides it, flat models take their days from it in every pass, as in Qlib. Time-series models do
        not call it, as in Qlib.

        Parameters
        ----------
        df : DataFrame
            Sorted by date, the first level of its index.
        shuffle : bool
            Shuffle the days with NumPy's global generator.

        Returns
        -------
        tuple
            Two sequences of one number per day.
        """
        counts = df.groupby(level=0).size().to_numpy()
        firsts = np.cumsum(counts) - counts
        if not shuffle:
            return firsts, counts
        order = np.arange(len(counts))
        np.random.shuffle(order)  # noqa: NPY002 - the draws of Qlib
        return firsts[order], counts[order]

    def loader_batch(self, data: Tensor, weight: Tensor) -> Any:
        """One day as [1, N, T, F + 1], as Qlib's loader yields it."""
        return data.unsqueeze(0)

    @property
    def day_order(self) -> BatchOrder:
        """The order of the days in each pass."""
        return NumpyOrder() if self._params["shuffle_days"] else SequenceOrder()

    def days(self, windows: WindowSet) -> Batches:
        """The days of a segment as batches, dates ascending."""
        return windows.days

    def batches(self, windows: WindowSet, stage: str) -> Batches:
        """As `Estimator.batches`. Days without a finite label are left out of training, except with compat="qlib"."""
        if windows.step_len is None and is_overridden(self, "get_daily_inter"):
            days = self._users_days(windows, stage)
            keep = stage == "train" and self._params["compat"] != "qlib"
            return days.select(torch.nonzero(windows.has_label(days)).flatten()) if keep else days
        days = self.days(windows)
        order: Tensor = getattr(self.day_order, stage)(len(days))
        if stage == "train" and self._params["compat"] != "qlib":
            order = order[windows.has_label(days)[order]]
        return days.select(order)

    def _users_days(self, windows: WindowSet, stage: str) -> Batches:
        """The days that an overridden `get_daily_inter` returns for the features of a segment."""
        features = windows.batch(torch.arange(len(windows), device=windows.device)).flatten(1).cpu().numpy()
        frame = pd.DataFrame(features, index=windows.keys())
        if len(windows.columns) == frame.shape[1]:
            frame.columns = pd.Index(windows.columns)
        function = name_of(self.get_daily_inter)
        try:
            firsts, counts = self.get_daily_inter(frame, shuffle=stage == "train" and self._params["shuffle_days"])
            starts, sizes = (torch.from_numpy(np.array(part, dtype=np.int64)) for part in (firsts, counts))
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"{function} must return the first row and the number of rows of each day, two sequences of integers "
                f"({error})."
            ) from error
        if starts.shape != sizes.shape or not len(sizes) or bool(((sizes < 1) | (starts < 0)).any()):
            raise ConfigError(
                f"{function} must return a first row from 0 and a number of rows from 1 for each day, got {firsts!r} "
                f"and {counts!r}."
            )
        bounds = torch.cat((torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)))
        order = torch.arange(int(bounds[-1])) + torch.repeat_interleave(starts - bounds[:-1], sizes)
        is_complete = len(order) == len(windows) and bool((order.sort().values == torch.arange(len(windows))).all())
        if int(order.max()) >= len(windows) or (stage == "predict" and not is_complete):
            raise ConfigError(
                f"{function} must return days within the {len(windows)} rows of the frame"
                + (", and each row once for a prediction." if stage == "predict" else f", got row {int(order.max())}.")
            )
        return Batches(order.to(windows.device), bounds, len(sizes))

    def run_network(self, windows: WindowSet, samples: Tensor, offsets: Tensor | None = None) -> Tensor:
        """As `Estimator.run_network`, except that stocks with NaN or infinity are left out of their day when scoring.

        Their prediction is NaN. In Qlib, and with compat="qlib", they make every prediction of the day NaN.
        """
        x = windows.batch(samples)
        if self.network.training or self._params["compat"] == "qlib" or bool(torch.isfinite(x.sum())):
            prediction: Tensor = self.network(x, offsets)
            return prediction
        finite = _finite_windows(x)
        bounds = torch.tensor([0, len(x)]) if offsets is None else offsets.cpu()
        before = torch.cat((torch.zeros(1, dtype=torch.int64), finite.cpu().cumsum(0)))
        prediction = x.new_full((len(x),), float("nan"))
        prediction[finite] = self.network(x[finite], before[bounds])
        return prediction

    def run_shared(self, windows: SharedWindows, samples: Tensor, offsets: Tensor | None = None) -> Tensor:
        """As `Estimator.run_shared`. Every rank computes the hidden states of its stocks, and the attention of all.

        The hidden states are gathered. The attention after them is a small part of the work, so it is computed on every
        rank, and its backward needs no communication.
        """
        ranks, owner = windows.ranks, windows.owner[samples]
        own = windows.number[samples[owner == ranks.rank]]
        network = cast(GATModel, self.network)
        hidden = Gathered.apply(self._own_hidden(windows, own), ranks, owner, float(ranks.size))
        finite = torch.isfinite(hidden).all(1)
        if self.network.training or self._params["compat"] == "qlib" or bool(finite.all()):
            return cast(Tensor, Replicated.apply(network.attend(hidden, offsets), ranks.size))
        bounds = torch.tensor([0, len(hidden)]) if offsets is None else offsets.cpu()
        before = torch.cat((torch.zeros(1, dtype=torch.int64), finite.cpu().cumsum(0)))
        prediction = hidden.new_full((len(hidden),), float("nan"))
        prediction[finite] = network.attend(hidden[finite], before[bounds])
        return prediction

    def _own_hidden(self, windows: SharedWindows, own: Tensor) -> Tensor:
        """Hidden states [n, H] of this rank's samples; when scoring, NaN for windows with NaN or infinity."""
        weight = cast(GATModel, self.network).fc.weight
        if len(own) == 0:  # a layer of torch may refuse an empty batch
            return weight.new_empty((0, weight.shape[1]))
        x = windows.own.batch(own)
        hidden = cast(GATModel, self.network).encode(x)
        return hidden if self.network.training else hidden.masked_fill(~_finite_windows(x).unsqueeze(1), float("nan"))

    # ---------------------------------------------------------------- the base
    def prepare_network(self) -> None:
        """Set the initial weights of the base model at the first fit; with compat="qlib" at every fit, as Qlib does.

        New weights are drawn even if `model_path` replaces them, because Qlib's random generators advance in the same
        way. Weights from `pretrain` are never replaced.
        """
        if self.base_is_trained_ or (self.base_is_set_ and self._params["compat"] != "qlib"):
            return
        params = self._params
        base = BASES[params["base_model"]](params["d_feat"], params["hidden_size"], params["num_layers"])
        tensors = base.state_dict()
        if params["model_path"] is not None:
            base_weights = read_base(params["model_path"], self.network)
            tensors |= base_weights.tensors
            self._log_base(base_weights)
        self._load_base(tensors)

    def pretrain(self, dataset: Dataset, **training: Any) -> Estimator:
        """Train a base model of the same size on `dataset`, and load its recurrent and output layers.

        The next `fit` continues from these weights instead of drawing new ones.

        Parameters
        ----------
        dataset : Dataset
            As in `fit`.
        **training
            Arguments of the base model (`n_epochs`, `lr`, `batch_size`, `dropout`, ...) and of its `fit` (`callbacks`,
            `checkpoint_dir`, `resume`, ...). Seed, device, compat, progress, cuda_graphs and precision default to the
            values of this model, all others to the defaults of the base model.

        Returns
        -------
        Estimator
            The fitted base model, an `LSTM` or `GRU` of the same module.

        Raises
        ------
        ConfigError
            An unknown argument, one of the sizes, or this model has a `model_path`.
        DataError, CheckpointError
            As in `fit` of the base model.

        Examples
        --------
        >>> from qfast.data import TSDatasetH, synthetic
        >>> from qfast.models.ts import GATs
        >>> frame = synthetic.factors(8, 40, 3, missing=0.0)
        >>> dataset = TSDatasetH(handler=frame, segments={"train": (None, None)}, step_len=5)
        >>> model = GATs(d_feat=3, hidden_size=4, n_epochs=1, base_model="LSTM", seed=0)
        >>> model.pretrain(dataset, n_epochs=2, batch_size=64).history_.shape[0]
        2
        >>> model.fit(dataset).pretrained_["source"]
        'pre-training of LSTM'
        """
        params = self._params
        if params["model_path"] is not None:
            raise ConfigError(
                f"the base model already comes from model_path={params['model_path']!r}. Remedy: model_path=None to "
                "train it here, or do not call pretrain."
            )
        sizes = {name: params[name] for name in ("d_feat", "hidden_size", "num_layers")}
        size = next((name for name in sizes if name in training), None)
        if size is not None:
            raise ConfigError(
                f"pretrain has no argument {size!r}, got {training[size]!r}: the base model has the sizes {sizes} of "
                "this model."
            )
        fit = {name: training.pop(name) for name in FIT_ARGUMENTS if name in training}
        shared = {name: params[name] for name in ("GPU", "seed", "compat", "progress", "cuda_graphs", "precision")}
        kind = self.base_estimators[params["base_model"]]
        base = cast(Any, kind)(**sizes, **{**shared, "device": str(self.device), **training})
        base.fit(dataset, **fit)
        self._log_base(select_base(base.network.state_dict(), self.network, f"pre-training of {kind.__name__}"))
        self._load_base(base.network.state_dict())
        self.base_is_trained_ = True
        self.train_optimizer = self._build_optimizer(params["optimizer"], params["lr"], params["weight_decay"])
        return cast(Estimator, base)

    # ---------------------------------------------------------------- attention
    @torch.no_grad()
    def attention(
        self,
        dataset: Dataset,
        date: DateLike,
        instruments: str | Iterable[str] | None = None,
        top: int = 10,
        segment: str | slice | None = None,
    ) -> pd.DataFrame:
        """Table of the largest attention weights of one day. Memory is linear in the number of stocks.

        Parameters
        ----------
        dataset : Dataset
            As in `predict`.
        date : str, date or Timestamp
            A date, or the time stamp of one cross-section.
        instruments : str or sequence of str, optional
            Stocks whose neighbours are listed; None means all stocks of the day.
        top : int
            Number of neighbours per stock.
        segment : str or slice, optional
            Segment that contains the day. By default only the day itself is read.

        Returns
        -------
        DataFrame
            Columns instrument, rank, neighbour, weight and score, as in `qfast.models.attention.neighbours`.

        Raises
        ------
        NotFittedError
            The model has neither been fitted nor loaded.
        DataError
            No stock or not every requested stock has a row on that date, or the date has several cross-sections.

        Examples
        --------
        >>> from qfast.data import TSDatasetH, synthetic
        >>> from qfast.models.ts import GATs
        >>> frame = synthetic.factors(8, 40, 3, missing=0.0)
        >>> dataset = TSDatasetH(handler=frame, segments={"train": (None, None)}, step_len=5)
        >>> model = GATs(d_feat=3, hidden_size=4, n_epochs=1, seed=0).fit(dataset)
        >>> table = model.attention(dataset, frame.index[-1][0], top=3)
        >>> list(table), table["rank"].unique().tolist()
        (['instrument', 'rank', 'neighbour', 'weight', 'score'], [1, 2, 3])
        """
        self._require_fitted()
        stamp = _time_stamp(date)
        # As the end of a slice, a date written as text covers its whole day.
        bounds = slice(stamp, date_text(stamp)) if segment is None else segment
        windows = windows_of(dataset, bounds, "infer", with_label=False).to(self.device)
        samples = _cross_section(windows, stamp)
        x = windows.batch(samples)
        finite = _finite_windows(x)
        names = windows.keys_of(windows.rows[samples].cpu().numpy()).get_level_values(1)
        if not bool(finite.all()):
            left_out = list(names[~finite.cpu().numpy()])
            self.logger.warning("left out because their features contain NaN or infinity: %s", left_out)
            x, names = x[finite], names[finite.cpu().numpy()]
        self.network.eval()
        query, key = cast(GATModel, self.network).scores(x)
        return neighbours(query, key, names, [instruments] if isinstance(instruments, str) else instruments, top)

    def plot_attention(
        self,
        dataset: Dataset,
        date: DateLike,
        path: str | os.PathLike[str],
        instruments: str | Iterable[str] | None = None,
        top: int = 10,
    ) -> Path:
        """Draw the table of `attention(dataset, date, instruments, top)` as a heat map.

        Parameters
        ----------
        dataset, date, instruments, top
            As in `attention`.
        path : path
            A .png, .pdf or .svg file.

        Returns
        -------
        Path
            The file.

        Raises
        ------
        ConfigError
            Another suffix.
        NotFittedError, DataError
            As in `attention`.
        """
        table = self.attention(dataset, date, instruments, top)
        return plot_attention(table, path, f"Attention on {pd.Timestamp(date):%Y-%m-%d}")

    def _load_base(self, tensors: dict[str, Tensor]) -> None:
        """Replace the weights that `tensors` contains."""
        state = self.network.state_dict()  # a network of the user may lack some keys
        self.network.load_state_dict({**state, **{key: value for key, value in tensors.items() if key in state}})
        self.base_is_set_ = True

    def _log_base(self, base: BaseWeights) -> None:
        """Store and log where the weights of the base model come from."""
        self.pretrained_ = base.facts()
        self.logger.info(
            "base model from %s: loaded %s; not loaded %s; absent %s",
            base.source,
            sorted(base.tensors),
            base.not_taken or "none",
            base.absent or "none",
        )

    # ---------------------------------------------------------------- state
    def load_weights(self, path: str | Path) -> Self:
        """As `Estimator.load_weights`. The next `fit` continues from these weights."""
        super().load_weights(path)
        self.base_is_set_ = True
        return self

    def checkpoint_facts(self) -> dict[str, Any]:
        """The origin of the base model's weights."""
        return {"pretrained": self.pretrained_, "base_is_trained": self.base_is_trained_}

    def restore_facts(self, facts: dict[str, Any]) -> None:
        """Restore the origin of the base model's weights, which are part of the checkpoint."""
        self.pretrained_ = facts.get("pretrained", {})
        self.base_is_set_, self.base_is_trained_ = True, facts.get("base_is_trained", False)


class GraphTimeSeriesEstimator(GraphEstimator):
    """`GraphEstimator` with d_feat=20 and `n_jobs` after `GPU`. The loss has the dtype of the label."""

    loss_dtype: ClassVar[torch.dtype | None] = None

    def __init__(
        self,
        d_feat: int = 20,
        hidden_size: int = 64,
        num_layers: int = 2,
        dropout: float = 0.0,
        n_epochs: int = 200,
        lr: float = 0.001,
        metric: str | Callable[..., Any] = "",
        early_stop: int = 20,
        loss: str | Callable[..., Any] = "mse",
        base_model: str = "GRU",
        model_path: str | os.PathLike[str] | None = None,
        optimizer: str = "adam",
        GPU: int | None = 0,
        n_jobs: int = 10,
        seed: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            d_feat,
            hidden_size,
            num_layers,
            dropout,
            n_epochs,
            lr,
            metric,
            early_stop,
            loss,
            base_model,
            model_path,
            optimizer,
            GPU,
            seed,
            extra={"n_jobs": n_jobs},
            **options,
        )

    @property
    def day_order(self) -> BatchOrder:
        """The order of the days in each pass; with compat="qlib" the order of an unshuffled DataLoader."""
        return UnshuffledLoaderOrder() if self._params["compat"] == "qlib" else super().day_order

    def days(self, windows: WindowSet) -> Batches:
        """As in `GraphEstimator`; with compat="qlib" consecutive samples, ordered by instrument, in batches with the
        sizes of the days.
        """
        days = super().days(windows)
        if self._params["compat"] != "qlib":
            return days
        return Batches(torch.arange(len(windows), device=windows.device), days.bounds, days.whole)


def _finite_windows(x: Tensor) -> Tensor:
    """bool [B]: windows without NaN or infinity."""
    return torch.isfinite(x).flatten(1).all(1)


def _time_stamp(date: DateLike) -> pd.Timestamp:
    try:
        stamp = pd.Timestamp(date)
    except (ValueError, TypeError) as error:
        raise DataError(f"date must be a date or a time stamp, got {date!r} ({error}).") from None
    if stamp is pd.NaT:
        raise DataError(f"date must be a date or a time stamp, got {date!r}.")
    return stamp


def _cross_section(windows: WindowSet, stamp: pd.Timestamp) -> Tensor:
    """Samples of the one cross-section at `stamp`. At midnight, `stamp` means the whole day."""
    days = windows.days
    firsts = windows.rows[days.order[days.bounds[:-1].to(windows.device)]].cpu().numpy()
    dates = pd.DatetimeIndex(windows.keys_of(firsts).get_level_values(0)) if len(firsts) else pd.DatetimeIndex([])
    if dates.tz is not None:
        stamp = stamp.tz_localize(dates.tz) if stamp.tz is None else stamp.tz_convert(dates.tz)
    elif stamp.tz is not None:
        stamp = stamp.tz_localize(None)
    matches = np.flatnonzero(dates == stamp)
    if len(matches) == 0 and stamp == stamp.normalize():
        matches = np.flatnonzero(dates.normalize() == stamp)
    if len(matches) == 0:
        raise DataError(f"date {date_text(stamp)!r} has no row in the data.")
    if len(matches) > 1:
        raise DataError(f"date {date_text(stamp)!r} has {len(matches)} cross-sections. Remedy: the full time stamp.")
    day = int(matches[0])
    return days.order[int(days.bounds[day]) : int(days.bounds[day + 1])]
