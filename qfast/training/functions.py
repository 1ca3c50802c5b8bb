"""The functions of Qlib's models that users override: `train_epoch`, `test_epoch`, `loss_fn`, `metric_fn` and `mse`.

`fit` calls an overridden function as Qlib's `fit` does, with the same arguments. Functions that are not overridden cost
nothing: the training loop then computes the same results without them.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from qfast.data.batching import Batches
from qfast.data.windows import WindowSet
from qfast.errors import ConfigError, DataError
from qfast.training.base import BaseEstimator
from qfast.training.daily import Days
from qfast.training.daily_losses import DAILY_LOSSES, DAILY_METRICS, DaySamples, daily_scores
from qfast.training.loaders import WindowLoader, frames_of, windows_of_batch, windows_of_frames
from qfast.training.losses import batch_scores, loss_function, masked_mse, metric_function
from qfast.training.overrides import (
    FUNCTIONS,
    accepts,
    as_number,
    default,
    is_overridden,
    name_of,
    require_arguments,
)

if TYPE_CHECKING:
    from qfast.training.estimator import Estimator

__all__ = ["EpochFunctions", "QlibFunctions"]


class QlibFunctions(BaseEstimator):
    """Part of `Estimator`: the functions that a subclass may override as in Qlib, and calls of overridden ones."""

    loss_dtype: ClassVar[torch.dtype | None] = torch.float32
    """Predictions, labels and weights are converted to this dtype for the loss. None: to that of the label."""
    weights_in_batches: ClassVar[bool] = False
    """Whether loaders yield weights and `loss_fn` receives them, as in Qlib's time-series LSTM, GRU and ALSTM."""

    if TYPE_CHECKING:  # members of Estimator

        def train_pass(self, windows: WindowSet) -> float: ...
        def train_step(self, windows: WindowSet, samples: Tensor) -> Tensor: ...
        def run_network(self, windows: WindowSet, samples: Tensor) -> Tensor: ...
        def batches(self, windows: WindowSet, stage: str) -> Batches: ...
        def _all_predictions(self, windows: WindowSet, batches: Batches) -> Tensor: ...

    # ---------------------------------------------------------------- the functions
    @default
    def train_epoch(self, x_train: pd.DataFrame | Iterable[Any], y_train: Any = None) -> float:
        """Train on every full batch once, as Qlib's method of the same name.

        Parameters
        ----------
        x_train : DataFrame, or iterable of batches
            Flat models: the features, indexed (datetime, instrument). Time-series models: a loader of batches, such as
            the one that `fit` passes or a DataLoader over a TSDataSampler.
        y_train : DataFrame or Series
            Flat models: the labels, in the order of `x_train`.

        Returns
        -------
        float
            Mean loss of the batches.

        Raises
        ------
        DataError
            The loss is not finite, or a batch has a wrong shape.
        """
        if y_train is not None:
            return self.train_pass(windows_of_frames(_frame(x_train), y_train).to(self.device))
        if isinstance(x_train, WindowLoader):
            return self.train_pass(x_train.windows)
        self.network.train()
        losses = [float(self.train_step(*self._whole_batch(batch))) for batch in x_train]
        return float(np.mean(losses)) if losses else float("nan")

    @default
    @torch.no_grad()
    def test_epoch(self, data_x: pd.DataFrame | Iterable[Any], data_y: Any = None) -> tuple[float, float]:
        """Compute loss and score of the current weights, as Qlib's method of the same name.

        Parameters
        ----------
        data_x, data_y
            As in `train_epoch`.

        Returns
        -------
        tuple of float
            Means of `loss_fn` and of `metric_fn` over the full batches. A higher score is better.
        """
        if data_y is not None:
            windows = windows_of_frames(_frame(data_x), data_y).to(self.device)
            return self._test_pass(windows, "valid")
        if isinstance(data_x, WindowLoader):
            return self._test_pass(data_x.windows, data_x.segment)
        self.network.eval()
        losses, scores = [], []
        for batch in data_x:
            windows, samples = self._whole_batch(batch)
            prediction, label = self.run_network(windows, samples), _labels(windows)
            losses.append(as_number(self._call_loss(prediction, label, windows.weight), "the result of loss_fn"))
            scores.append(as_number(self.metric_fn(prediction, label), "the result of metric_fn"))
        return _mean(losses), _mean(scores)

    @default
    def loss_fn(
        self, pred: Tensor, label: Tensor, weight: Tensor | None = None, day: DaySamples | None = None
    ) -> Tensor:
        """Training loss of one batch, by default the argument `loss`.

        Parameters
        ----------
        pred, label : Tensor
            [B]. Labels may be missing (NaN).
        weight : Tensor, optional
            [B], the sample weights.
        day : DaySamples, optional
            The days of the samples, for a loss of whole days. None: the batch is one day, if the batches of the model
            are single days.

        Returns
        -------
        Tensor
            0-d.
        """
        loss = self._params["loss"]
        if self._has_daily_loss():
            dtype = self.loss_dtype or label.dtype
            weight = None if weight is None else weight.to(dtype)
            return DAILY_LOSSES[loss](pred.to(dtype), label.to(dtype), weight, day or self._one_day(pred, "loss"))
        if callable(loss) or is_overridden(self, "mse"):
            labelled = torch.isfinite(label) if callable(loss) else ~torch.isnan(label)
            function = loss if callable(loss) else self.mse
            return _with_weight(function, pred, label, weight, labelled, self.weights_in_batches and not callable(loss))
        dtype = self.loss_dtype or label.dtype
        weight = None if weight is None else weight.to(dtype)
        return loss_function(loss)(pred.to(dtype), label.to(dtype), weight)

    @default
    def metric_fn(self, pred: Tensor, label: Tensor) -> Tensor:
        """Score of one batch, by default the argument `metric`: minus the loss. Higher is better.

        Parameters
        ----------
        pred, label : Tensor
            [B]. Labels may be missing (NaN).

        Returns
        -------
        Tensor
            0-d. NaN if no label is finite.
        """
        metric = self._params["metric"]
        labelled = torch.isfinite(label)
        if isinstance(metric, str) and metric in DAILY_METRICS:
            return _mean_score(daily_scores(pred, label, self._one_day(pred, "metric"), metric))
        if callable(metric):
            result: Tensor = metric(pred[labelled], label[labelled])
            return result
        if metric == "mse" and is_overridden(self, "mse"):
            weight = (torch.ones_like(label[labelled]),) if self.weights_in_batches else ()
            return -self.mse(pred[labelled], label[labelled], *weight)
        if metric != "mse" and self._has_daily_loss() and not is_overridden(self, "loss_fn"):
            return -self.loss_fn(pred, label)
        if metric != "mse" and self._has_own_loss():
            return -self._loss_of_metric(pred[labelled], label[labelled])
        dtype = self.loss_dtype or label.dtype
        return metric_function(metric)(pred.to(dtype), label.to(dtype))

    @default
    def mse(self, pred: Tensor, label: Tensor, weight: Tensor | None = None) -> Tensor:
        """Mean of weight * (pred - label)^2: the loss of the samples that have a label, all [B]."""
        return masked_mse(pred, label, weight)

    # ---------------------------------------------------------------- calls
    def loader_batch(self, data: Tensor, weight: Tensor) -> Any:
        """One batch of a loader, from windows [B, T, F + 1] and weights [B], in the form of Qlib's model."""
        return (data, weight) if self.weights_in_batches else data

    def _has_own_loss(self) -> bool:
        own_mse = is_overridden(self, "mse") and not self._has_daily_loss()
        return callable(self._params["loss"]) or is_overridden(self, "loss_fn") or own_mse

    def _has_other_loss(self) -> bool:
        """Whether the training loss is another one than the mean squared error."""
        return self._params["loss"] != "mse" or is_overridden(self, "loss_fn")

    def _has_daily_loss(self) -> bool:
        """Whether the argument `loss` is a loss of whole days. An overridden `loss_fn` takes precedence."""
        return isinstance(self._params["loss"], str) and self._params["loss"] in DAILY_LOSSES

    def _has_daily_metric(self) -> bool:
        """Whether the mean IC or rank IC of the days selects the epoch."""
        metric = self._params["metric"]
        return isinstance(metric, str) and metric in DAILY_METRICS and not is_overridden(self, "metric_fn")

    def _days_of(self, windows: WindowSet, samples: Tensor) -> DaySamples | None:
        """The days of some samples, if the loss needs them and the samples have dates."""
        if not self._has_daily_loss() or windows.day_numbers is None:
            return None
        return DaySamples(windows.day_numbers[samples], windows.largest_day)

    def _one_day(self, pred: Tensor, argument: str) -> DaySamples:
        """All samples of a batch as one day, if the batches of the model are single days."""
        if not self.batches_are_days and self._params.get("batch_size") != 1:
            raise ConfigError(
                f"{argument}={self._params[argument]!r} needs the day of each of {len(pred)} samples, which a batch "
                "without dates does not have. Remedy: batch_by='day' with batch_size=1, which makes every batch a day."
            )
        return DaySamples(torch.zeros(len(pred), dtype=torch.int64, device=pred.device), len(pred))

    def _require_ranked_days(self, train: WindowSet, valid: WindowSet | None) -> None:
        """Raise an error if the loss or the metric of whole days is not defined on any day of its segment."""
        if self._has_daily_loss() and not is_overridden(self, "loss_fn"):
            _require_ranked_day(train, f"loss={self._params['loss']!r}")
        if self._has_daily_metric() and not is_overridden(self, "test_epoch"):
            metric = f"metric={self._params['metric']!r}"
            if valid is None:
                raise ConfigError(
                    f"{metric} selects the epoch by the segment 'valid', which the dataset does not have. Remedy: add "
                    "the segment, or metric='loss'."
                )
            _require_ranked_day(valid, metric)

    def _require_running_score(self) -> None:
        """Raise a ConfigError if train_score="running" cannot give the score: the metric must be minus the loss."""
        if self._params["train_score"] != "running":
            return
        other = None
        if is_overridden(self, "train_epoch"):
            other = f"{name_of(self.train_epoch)} computes no loss that qfast knows"
        elif not self.scores_are_losses or (self._params["metric"] == "mse" and self._has_other_loss()):
            overridden = next((name for name in ("test_epoch", "metric_fn") if is_overridden(self, name)), None)
            metric = self._params["metric"]
            text = name_of(metric) if callable(metric) else f"metric={metric!r}"
            other = f"{name_of(getattr(self, overridden)) if overridden else text} computes another score"
        if other is not None:
            raise ConfigError(
                f"train_score='running' reports minus the mean training loss, but {other}. Remedy: train_score='never' "
                "or 'pass'."
            )

    def _has_own_functions(self) -> bool:
        """Whether anything other than qfast's own functions trains or scores."""
        own = any(is_overridden(self, name) for name in FUNCTIONS)
        return own or callable(self._params["loss"]) or callable(self._params["metric"])

    @property
    def scores_are_losses(self) -> bool:
        """Whether the scores `train` and `valid` are minus the loss, because neither a metric nor `test_epoch` is the
        user's, and the metric is not that of days.
        """
        own = callable(self._params["metric"]) or is_overridden(self, "metric_fn") or is_overridden(self, "test_epoch")
        return not (own or self._has_daily_metric())

    def _call_loss(self, pred: Tensor, label: Tensor, weight: Tensor | None, day: DaySamples | None = None) -> Tensor:
        """Call `loss_fn` with as many arguments as Qlib does, or as it accepts."""
        if not is_overridden(self, "loss_fn"):
            loss = self.loss_fn(pred, label, weight, day)
            return _checked_loss(loss, self._params["loss"], pred) if callable(self._params["loss"]) else loss
        if weight is None and self.weights_in_batches:
            weight = torch.ones(len(label), dtype=torch.float64, device=label.device)
        with_weight = accepts(self.loss_fn, 3) if self.weights_in_batches or weight is not None else False
        if with_weight or not accepts(self.loss_fn, 2):
            return _checked_loss(self.loss_fn(pred, label, weight), self.loss_fn, pred)
        return _checked_loss(self.loss_fn(pred, label), self.loss_fn, pred)

    def _loss_of_metric(self, pred: Tensor, label: Tensor) -> Tensor:
        """Call `loss_fn` without weights, as Qlib's `metric_fn` does."""
        if self.weights_in_batches and accepts(self.loss_fn, 2, "weight"):
            return self.loss_fn(pred, label, weight=None)
        if accepts(self.loss_fn, 2):
            return self.loss_fn(pred, label)
        return self.loss_fn(pred, label, None)

    def _check_functions(self, *, weighted: bool) -> None:
        """Raise a ConfigError if an overridden function cannot be called as `fit` will call it."""
        if is_overridden(self, "metric_fn"):
            require_arguments(self, "metric_fn", ("pred", "label"))
        if is_overridden(self, "loss_fn") and not accepts(self.loss_fn, 2):
            require_arguments(self, "loss_fn", ("pred", "label", "weight"))
        loss = self._params["loss"] if callable(self._params["loss"]) else None
        for function in [self.loss_fn] if loss is None else [loss]:
            if weighted and not accepts(function, 3):
                raise ConfigError(
                    f"a reweighter is passed, but {name_of(function)} does not accept weights. Remedy: accept "
                    "(pred, label, weight)."
                )

    # ---------------------------------------------------------------- passes
    def _whole_batch(self, batch: Any) -> tuple[WindowSet, Tensor]:
        """The samples of a batch of a loader, and their numbers."""
        windows = windows_of_batch(batch, self.device)
        return windows, torch.arange(len(windows), device=self.device)

    def _test_pass(self, windows: WindowSet, segment: str) -> tuple[float, float]:
        """Loss and score of all full batches of a segment."""
        self.network.eval()
        batches = self.batches(windows, f"{segment}_score")
        predictions = self._all_predictions(windows, batches)
        weights = None if windows.weight is None else windows.weight[batches.order]
        losses = []
        for begin, end in pairwise(batches.bounds[: batches.whole + 1].tolist()):
            part = slice(begin, end)
            weight = None if weights is None else weights[part]
            samples = batches.order[part]
            label, day = _labels(windows)[samples], self._days_of(windows, samples)
            losses.append(as_number(self._call_loss(predictions[part], label, weight, day), "the result of loss_fn"))
        return _mean(losses), self._scores(windows, batches, predictions, with_loss=False)[0]

    def _scores(
        self: Any, windows: WindowSet, batches: Batches, predictions: Tensor, *, with_loss: bool = True
    ) -> tuple[float, float | None]:
        """Mean score of the full batches, and the score over all samples, or None with functions of the user.

        As Qlib's `test_epoch`, it calls an overridden `loss_fn` before every `metric_fn`, unless `with_loss` is False.
        """
        labels = _labels(windows)[batches.order]
        skip_unlabelled = self._params["compat"] != "qlib"
        own_loss, own_metric = self._has_own_loss(), is_overridden(self, "metric_fn")
        if self._has_daily_metric() and windows.day_numbers is not None:
            days = DaySamples(windows.day_numbers[batches.order], windows.largest_day)
            return float(_mean_score(daily_scores(predictions, labels, days, self._params["metric"]))), None
        if self._has_daily_loss() and self._params["metric"] in ("", "loss") and not (own_loss or own_metric):
            return -float(self._call_loss(predictions, labels, None, self._days_of(windows, batches.order))), None
        if not (own_loss or own_metric or callable(self._params["metric"])):
            dtype = self.loss_dtype or labels.dtype
            metric = self._params["metric"]
            return batch_scores(
                predictions.to(dtype), labels.to(dtype), batches, metric, skip_unlabelled=skip_unlabelled
            )
        scores = []
        for begin, end in pairwise(batches.bounds[: batches.whole + 1].tolist()):
            prediction, label = predictions[begin:end], labels[begin:end]
            if own_loss and with_loss:
                weight = None if windows.weight is None else windows.weight[batches.order[begin:end]]
                self._call_loss(prediction, label, weight)
            score = as_number(self.metric_fn(prediction, label), "the result of metric_fn")
            if not skip_unlabelled or bool(torch.isfinite(label).any()):
                scores.append(score)
        return _mean(scores), None


class EpochFunctions:
    """Calls of `train_epoch` and `test_epoch` in one fit, if they are overridden.

    Parameters
    ----------
    estimator : Estimator
    train, valid : WindowSet
        The samples of the segments; `valid` may be None.

    Raises
    ------
    ConfigError
        A function does not accept Qlib's arguments, or the data has another form than the model's.
    """

    def __init__(self, estimator: Estimator, train: WindowSet, valid: WindowSet | None) -> None:
        self.estimator = estimator
        self.overrides_training = is_overridden(estimator, "train_epoch")
        self.overrides_scoring = is_overridden(estimator, "test_epoch")
        self.arguments: dict[str, tuple[Any, ...]] = {}
        estimator._check_functions(weighted=train.weight is not None)
        if self.overrides_training or self.overrides_scoring:
            self._check(train)
            segments = {"train": train} if valid is None else {"train": train, "valid": valid}
            self.arguments = {name: self._arguments(windows, name) for name, windows in segments.items()}

    def train(self) -> float | None:
        """Call `train_epoch`. Return its result if that is a number.

        Raises
        ------
        ConfigError
            A weight is not finite afterwards.
        """
        first = self.estimator.epoch_ == 0
        before = [value.detach().clone() for value in self.estimator.network.parameters()] if first else []
        result: object = self.estimator.train_epoch(*self.arguments["train"])
        if before and all(map(torch.equal, before, self.estimator.network.parameters())):
            self.estimator.logger.warning(
                "%s has not changed any weight of this model in epoch 0. If the model is a copy, the function may "
                "still be that of the original",
                name_of(self.estimator.train_epoch),
            )
        bad = [name for name, value in self.estimator.network.named_parameters() if not _is_finite(value)]
        if bad:
            raise ConfigError(
                f"{name_of(self.estimator.train_epoch)} made weights NaN or infinite in epoch "
                f"{self.estimator.epoch_}: {bad[:4]}. Remedy: lower lr, or check the loss and the data it reads."
            )
        return (
            None
            if result is None or isinstance(result, (tuple, list, dict))
            else as_number(result, "the result of train_epoch")
        )

    def score(self, segment: str) -> float:
        """Call `test_epoch` and return its score.

        Raises
        ------
        ConfigError
            It does not return a pair of numbers.
        """
        arguments = self.arguments[segment]
        if isinstance(arguments[0], WindowLoader):
            arguments[0].stage = f"{segment}_score"
        try:
            result = self.estimator.test_epoch(*arguments)
        finally:
            if isinstance(arguments[0], WindowLoader) and segment == "train":
                arguments[0].stage = "train"
        try:
            _, score = result
        except (TypeError, ValueError):
            raise ConfigError(
                f"{name_of(self.estimator.test_epoch)} must return (loss, score) as in Qlib, got {result!r}."
            ) from None
        return as_number(score, "the score of test_epoch")

    def _check(self, windows: WindowSet) -> None:
        estimator, is_rolling = self.estimator, windows.step_len is not None
        for name, flat in (("train_epoch", ("x_train", "y_train")), ("test_epoch", ("data_x", "data_y"))):
            if is_overridden(estimator, name):
                require_arguments(estimator, name, ("data_loader",) if is_rolling else flat)
        if self.overrides_training and windows.weight is not None and not estimator.weights_in_batches:
            raise ConfigError(
                f"a reweighter is passed, but {name_of(estimator.train_epoch)} receives no sample weights: "
                f"{type(estimator).__name__} has none in Qlib. Remedy: fit without reweighter, or override train_step."
            )

    def _arguments(self, windows: WindowSet, segment: str) -> tuple[Any, ...]:
        if windows.step_len is None:
            return frames_of(windows, complete=self.estimator.drops_incomplete_rows)
        return (WindowLoader(self.estimator, windows, segment),)


def _with_weight(
    function: Any, pred: Tensor, label: Tensor, weight: Tensor | None, labelled: Tensor, always: bool
) -> Tensor:
    """Call a loss with the labelled samples, and with their weights if there are any or if it `always` has them."""
    if weight is None and always:
        weight = torch.ones_like(label)
    arguments = (
        (pred[labelled], label[labelled]) if weight is None else (pred[labelled], label[labelled], weight[labelled])
    )
    if weight is None and not accepts(function, 2):
        arguments = (*arguments, None)
    result: Tensor = function(*arguments)
    return result


def _checked_loss(loss: Any, function: Any, pred: Tensor) -> Tensor:
    """The result of a loss of the user. Raises a ConfigError if the network cannot be trained with it."""
    if isinstance(loss, Tensor) and loss.numel() == 1 and (loss.requires_grad or not pred.requires_grad):
        return loss
    got = f"a tensor {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"{type(loss).__name__} {loss!r}"
    if isinstance(loss, Tensor) and loss.numel() == 1:
        got = "a tensor without a gradient. Compute it with torch from pred, without detach, item or numpy"
    raise ConfigError(f"the loss {name_of(function)} must return a 0-d tensor that depends on pred, got {got}.")


def _mean_score(daily: Tensor) -> Tensor:
    """Mean of the scores of the days; NaN without days."""
    return daily.mean() if len(daily) else daily.new_tensor(float("nan"))


def _require_ranked_day(windows: WindowSet, argument: str) -> None:
    """Raise a DataError if no day of a segment has two different finite labels."""
    if windows.day_numbers is None:
        return
    order, days = Days.of(windows.day_numbers, windows.largest_day)
    label = _labels(windows)[order]
    valid = torch.isfinite(label)
    if not bool((days.range(torch.where(valid, label, 0.0), valid) > 0).any()):
        raise DataError(
            f"{argument} compares the stocks of each day, but no day of segment {windows.name!r} has two different "
            f"labels (at most {windows.largest_day} stocks a day). Remedy: data with several stocks, or 'mse'."
        )


def _labels(windows: WindowSet) -> Tensor:
    assert windows.label is not None
    return windows.label


def _frame(x: object) -> pd.DataFrame:
    if not isinstance(x, pd.DataFrame):
        raise ConfigError(f"the features of a flat model must be a DataFrame, got {type(x).__name__}.")
    return x


def _mean(values: list[float]) -> float:
    return float(np.mean(values)) if values else float("nan")


def _is_finite(value: Tensor) -> bool:
    return bool(torch.isfinite(value.detach().sum()))
