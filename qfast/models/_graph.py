"""GATs, flat and time-series: batches that are days, a base from elsewhere, and attention to look at."""

from __future__ import annotations

import os
from collections.abc import Iterable
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
from qfast.models.pretrained import BaseWeights, chosen, read_base
from qfast.nn.graph import BASES, GATModel
from qfast.training.estimator import Estimator

if TYPE_CHECKING:
    from typing_extensions import Self

FIT_ARGUMENTS = ("evals_result", "save_path", "reweighter", "callbacks", "checkpoint_dir", "resume")

__all__ = ["Graph", "GraphTimeSeries"]


class Graph(Estimator):
    """Arguments of the reference's flat GATs, positional order included.

    Attributes
    ----------
    pretrained_ : dict
        What was taken of a base: source, keys taken, not taken and absent. Empty without pre-training.
    """

    network_class = GATModel
    base_estimators: ClassVar[dict[str, type[Estimator]]]  # by base_model
    options: ClassVar[tuple[str, ...]] = (*Estimator.options, "shuffle_days", "batch_size")
    rows_per_call: ClassVar[int] = 8192
    GAT_model = property(lambda self: self.network, doc="The network, under the reference's name.")

    def __init__(
        self,
        d_feat: int = 6,
        hidden_size: int = 64,
        num_layers: int = 2,
        dropout: float = 0.0,
        n_epochs: int = 200,
        lr: float = 0.001,
        metric: str = "",
        early_stop: int = 20,
        loss: str = "mse",
        base_model: str = "GRU",
        model_path: str | os.PathLike[str] | None = None,
        optimizer: str = "adam",
        GPU: int | None = 0,
        seed: int | None = None,
        **options: Any,
    ) -> None:
        ignored = options.pop("batch_size", None)
        shuffle_days = options.pop("shuffle_days", True)
        if not isinstance(shuffle_days, bool):
            raise ConfigError(f"shuffle_days must be True or False, got {shuffle_days!r}.")
        if model_path is not None and not isinstance(model_path, (str, os.PathLike)):
            raise ConfigError(f"model_path must be a path or None, got {model_path!r}.")
        extra = {
            "model_path": None if model_path is None else os.fspath(model_path),
            "shuffle_days": shuffle_days,
            **options.pop("extra", {}),
        }
        super().__init__(
            {
                "d_feat": d_feat, "hidden_size": hidden_size, "num_layers": num_layers, "dropout": dropout,
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
        )  # fmt: skip
        self.pretrained_: dict[str, Any] = {}
        self.base_is_set_ = False
        self.base_is_trained_ = False  # by `pretrain`
        if ignored is not None:
            self.logger.info("batch_size=%r has no effect: every day is a batch of %s", ignored, type(self).__name__)
        if model_path is not None and Path(model_path).expanduser().exists():
            read_base(Path(model_path), self.network)  # a file that does not fit is refused before data is loaded

    # ---------------------------------------------------------------- days
    @property
    def day_order(self) -> BatchOrder:
        """In which order the days of each pass come."""
        return NumpyOrder() if self._params["shuffle_days"] else SequenceOrder()

    def days(self, windows: WindowSet) -> Batches:
        """The cross-sections of a segment, dates ascending."""
        return windows.days

    def batches(self, windows: WindowSet, stage: str) -> Batches:
        days = self.days(windows)
        order: Tensor = getattr(self.day_order, stage)(len(days))
        if stage == "train" and self._params["compat"] != "qlib":
            order = order[_labelled(windows, days)[order]]
        return days.select(order)

    def run_network(self, windows: WindowSet, samples: Tensor, offsets: Tensor | None = None) -> Tensor:
        """As in `Estimator`; a stock whose window is not finite gets NaN and is left out of its day.

        It would turn every prediction of that day into NaN, as it does in the reference and with compat="qlib".
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

    # ---------------------------------------------------------------- the base
    def prepare_network(self) -> None:
        """Set the base's initial weights, as the reference does at the head of each fit; here at the first only.

        A fresh base is drawn in any case, so that the generators stand where the reference's do; `model_path`
        then replaces its weights. A base from `pretrain` stays in any case.
        """
        if self.base_is_trained_ or (self.base_is_set_ and self._params["compat"] != "qlib"):
            return
        params = self._params
        base = BASES[params["base_model"]](params["d_feat"], params["hidden_size"], params["num_layers"])
        tensors = base.state_dict()
        if params["model_path"] is not None:
            found = read_base(params["model_path"], self.network)
            tensors |= found.tensors
            self._note(found)
        self._take(tensors)

    def pretrain(self, dataset: Dataset, **training: Any) -> Estimator:
        """Train a base model of the same sizes on `dataset` and take its recurrent weights and output layer.

        The `fit` that follows fine-tunes them instead of drawing new ones.

        Parameters
        ----------
        dataset
            As in `fit`.
        **training
            Arguments of the base model (`n_epochs`, `lr`, `batch_size`, `dropout`, ...; its own defaults, and this
            model's seed, device and compat) and of its `fit` (`callbacks`, `checkpoint_dir`, `resume`, ...).

        Returns
        -------
        Estimator
            The fitted base model: `LSTM` or `GRU` of the same module.

        Raises
        ------
        ConfigError
            An unknown argument, a size, or a `model_path` beside pre-training.
        DataError, CheckpointError
            As `fit` of the base model.

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
                f"the base is given by model_path={params['model_path']!r} already. Remedy: model_path=None to train "
                "it here, or no pretrain."
            )
        sizes = {name: params[name] for name in ("d_feat", "hidden_size", "num_layers")}
        given = [name for name in sizes if name in training]
        if given:
            raise ConfigError(f"pretrain takes no {given[0]!r}: the base has the size of the model, {sizes}.")
        fit = {name: training.pop(name) for name in FIT_ARGUMENTS if name in training}
        shared = {name: params[name] for name in ("GPU", "seed", "compat", "progress", "cuda_graphs")}
        kind = self.base_estimators[params["base_model"]]
        base = cast(Any, kind)(**sizes, **{**shared, "device": str(self.device), **training})
        base.fit(dataset, **fit)
        self._note(chosen(base.network.state_dict(), self.network, f"pre-training of {kind.__name__}"))
        self._take(base.network.state_dict())
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
        """Who attends to whom on a day: the neighbours with the largest weights, and these weights.

        Parameters
        ----------
        dataset
            As in `predict`.
        date
            Date, or time stamp, of one cross-section.
        instruments : str or sequence of str, optional
            Whose neighbours; None: of all stocks of that day.
        top : int
            How many neighbours of each.
        segment : str or slice, optional
            Take the day out of this segment; by default only the day itself is read.

        Returns
        -------
        DataFrame
            As `qfast.models.attention.neighbours`: instrument, rank, neighbour, weight, score. Nothing N x N is built.

        Raises
        ------
        NotFittedError
            Neither `fit` nor `load_weights` was called.
        DataError
            No stock has a row on that date, an instrument has none, or the date names more than one cross-section.

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
        wanted = _time_stamp(date)
        # as text a bare date covers its whole day
        bounds = slice(wanted, date_text(wanted)) if segment is None else segment
        windows = windows_of(dataset, bounds, "infer", with_label=False).to(self.device)
        samples = _cross_section(windows, wanted)
        x = windows.batch(samples)
        finite = _finite_windows(x)
        names = windows.keys_of(windows.rows[samples].cpu().numpy()).get_level_values(1)
        if not bool(finite.all()):
            left_out = list(names[~finite.cpu().numpy()])
            self.logger.warning("left out, their features hold NaN or infinity: %s", left_out)
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
        """Draw `attention(dataset, date, instruments, top)` into a .png, .pdf or .svg file; the file is returned."""
        table = self.attention(dataset, date, instruments, top)
        return plot_attention(table, path, f"Attention on {pd.Timestamp(date):%Y-%m-%d}")

    def _take(self, tensors: dict[str, Tensor]) -> None:
        self.network.load_state_dict({**self.network.state_dict(), **tensors})
        self.base_is_set_ = True

    def _note(self, found: BaseWeights) -> None:
        self.pretrained_ = found.facts()
        self.logger.info(
            "base from %s: taken %s; not taken %s; not there %s",
            found.source, sorted(found.tensors), found.not_taken or "none", found.absent or "none",
        )  # fmt: skip

    # ---------------------------------------------------------------- state
    def load_weights(self, path: str | Path) -> Self:
        """As `Estimator.load_weights`; a fit that follows goes on from these weights."""
        super().load_weights(path)
        self.base_is_set_ = True
        return self

    def checkpoint_facts(self) -> dict[str, Any]:
        return {"pretrained": self.pretrained_, "base_is_trained": self.base_is_trained_}

    def restore_facts(self, facts: dict[str, Any]) -> None:
        self.pretrained_ = facts.get("pretrained", {})
        self.base_is_set_, self.base_is_trained_ = True, facts.get("base_is_trained", False)


class GraphTimeSeries(Graph):
    """As `Graph` with d_feat=20 and `n_jobs` after `GPU`; the loss has the label's precision."""

    loss_dtype: ClassVar[torch.dtype | None] = None

    def __init__(
        self,
        d_feat: int = 20,
        hidden_size: int = 64,
        num_layers: int = 2,
        dropout: float = 0.0,
        n_epochs: int = 200,
        lr: float = 0.001,
        metric: str = "",
        early_stop: int = 20,
        loss: str = "mse",
        base_model: str = "GRU",
        model_path: str | os.PathLike[str] | None = None,
        optimizer: str = "adam",
        GPU: int | None = 0,
        n_jobs: int = 10,
        seed: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            d_feat, hidden_size, num_layers, dropout, n_epochs, lr, metric, early_stop, loss, base_model, model_path,
            optimizer, GPU, seed, extra={"n_jobs": n_jobs}, **options,
        )  # fmt: skip

    @property
    def day_order(self) -> BatchOrder:
        return UnshuffledLoaderOrder() if self._params["compat"] == "qlib" else super().day_order

    def days(self, windows: WindowSet) -> Batches:
        """With compat="qlib" consecutive samples, instrument by instrument, in pieces as long as the days are."""
        days = super().days(windows)
        if self._params["compat"] != "qlib":
            return days
        return Batches(torch.arange(len(windows), device=windows.device), days.bounds, days.whole)


def _finite_windows(x: Tensor) -> Tensor:
    """bool [B]: windows without NaN or infinity."""
    return torch.isfinite(x).flatten(1).all(1)


def _time_stamp(date: DateLike) -> pd.Timestamp:
    try:
        wanted = pd.Timestamp(date)
    except (ValueError, TypeError) as error:
        raise DataError(f"date must be a date or a time stamp, got {date!r} ({error}).") from None
    if wanted is pd.NaT:
        raise DataError(f"date must be a date or a time stamp, got {date!r}.")
    return wanted


def _cross_section(windows: WindowSet, wanted: pd.Timestamp) -> Tensor:
    """Samples of the one cross-section that `wanted` names."""
    days = windows.days
    firsts = windows.rows[days.order[days.bounds[:-1].to(windows.device)]].cpu().numpy()
    dates = pd.DatetimeIndex(windows.keys_of(firsts).get_level_values(0)) if len(firsts) else pd.DatetimeIndex([])
    found = np.flatnonzero(dates == wanted)
    if len(found) == 0 and wanted == wanted.normalize():  # a bare date covers that whole day
        found = np.flatnonzero(dates.normalize() == wanted)
    if len(found) != 1:
        why = f"names {len(found)} cross-sections, give the full time stamp" if len(found) else "has no row in the data"
        raise DataError(f"date {date_text(wanted)!r} {why}.")
    day = int(found[0])
    return days.order[int(days.bounds[day]) : int(days.bounds[day + 1])]


def _labelled(windows: WindowSet, days: Batches) -> Tensor:
    """bool [D]: days with at least one finite label; the others have nothing to train on."""
    assert windows.label is not None
    finite = torch.isfinite(windows.label[days.order]).cpu()
    counts = torch.cat((torch.zeros(1, dtype=torch.int64), finite.cumsum(0)))
    return counts[days.bounds].diff() > 0
