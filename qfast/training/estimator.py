"""The training loop that all models share. A model adds a network, its defaults and an order of batches.

`fit` calls `load_segment` for each segment and, unless it resumes, `prepare_network`. In every epoch it calls
`train_pass` (`batches`, `train_step`, `run_network`, `loss_fn`), `score_segment` and the callbacks. A subclass may
override any of them, and the functions of Qlib's models in functions.py.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial, wraps
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
import torch
from torch import Tensor

from qfast.data.adapt import windows_of
from qfast.data.batching import Batches, BatchOrder, NumpyOrder
from qfast.data.protocols import Dataset, Segment
from qfast.data.windows import WindowSet
from qfast.device import explain_out_of_memory, release_memory
from qfast.errors import ConfigError, DataError
from qfast.files import require_file_target
from qfast.training import distributed
from qfast.training.base import GRADIENT_LIMIT, FitProgress
from qfast.training.callbacks import Callback, Checkpoint, EarlyStopping, Progress, epoch_text
from qfast.training.distributed import SharedWindows, Sharing, over_ranks
from qfast.training.functions import EpochFunctions, QlibFunctions
from qfast.training.optim import ClippedAdam
from qfast.training.origin import Origin, read_origin
from qfast.training.ranks import Ranks, writes_files
from qfast.training.segments import Reweighter, learning_samples
from qfast.training.step_graphs import GraphedStep, graphed_step

GPU_ROWS = 8192  # rows scored per call on a GPU, because small batches would leave it idle

ROWS_READ = 1 << 14  # rows of features that are checked at once

__all__ = ["Estimator", "FitProgress"]


class Estimator(QlibFunctions):
    """Base class of all models: trains one network and predicts with it.

    A subclass sets `network_class`, `order` and the other class attributes in which Qlib's models differ. It passes its
    constructor's arguments to `__init__`. A model whose batches are not of equal size overrides `batches` and ignores
    `batch_size`.

    Parameters
    ----------
    network : dict
        Arguments of `build_network`. They also become attributes of the estimator.
    n_epochs : int
        Maximum number of epochs.
    lr : float
        Learning rate.
    metric : {"", "loss", "mse", "ic", "rank_ic"} or callable
        Score that selects the epoch, higher is better: minus the loss for "" and "loss", minus the mean squared error
        for "mse", and the mean daily IC or rank IC of the segment for "ic" and "rank_ic". A function of predictions and
        labels, both [B] and without missing labels, returns the score of a batch.
    batch_size : int, optional
        Samples per batch. None for models without this argument.
    early_stop : int
        Training stops after this number of consecutive epochs without a better validation score.
    loss : {"mse", "ic", "rank_ic", "listnet", "mse+ic"} or callable
        Training loss, see docs/training.md. All except "mse" need batches of whole days. A function of predictions and
        labels, both [B] and without missing labels, and of their weights if it accepts a third argument, returns a 0-d
        tensor.
    optimizer : {"adam", "gd"}
        `ClippedAdam`, or plain stochastic gradient descent.
    GPU : int or None
        Number of the GPU for device="auto". A negative number or None selects the CPU.
    seed : int, optional
        Seeds the global generators of NumPy and torch before the network is built, as Qlib does.
    weight_decay : float
        L2 penalty, added to the gradient.
    device : str or torch.device
        "auto" selects GPU number `GPU` if torch sees one and the CPU otherwise. Any other value is passed to
        torch.device.
    compat : {None, "qlib"}
        "qlib" restores Qlib behaviour that qfast deliberately changes (docs/parity.md). With dropout it falls back to
        torch's layers to reproduce Qlib's masks.
    progress : bool, "auto" or "lines"
        Progress bar or one line per epoch, see `Progress`. False shows nothing.
    cuda_graphs : bool
        On a GPU, capture the training step as a CUDA graph and replay it. The results are bitwise equal to those
        of eager steps. A custom
        `loss_fn` or `train_step` is captured too, and must depend only on its arguments, weights and buffers. Off by
        default; see docs/gpu.md.
    batch_by : {None, "sample", "day"}
        "day": a batch is one day, or several days with at most `batch_size` samples. None and "sample" are shuffled
        samples, except for models whose batches are always days.
    train_score : {"pass", "running", "never"}
        How the score of the training segment is computed after each epoch. "pass": a second pass over the segment, as
        in Qlib. "running": minus the mean loss of the training batches, without a second pass; the metric must be minus
        the loss. "never": there is no such score. The trained weights are the same.
    precision : {"float32", "bf16", "bf16-if-available"}
        On a CPU, "bf16" rounds the operands of the operators' products to bfloat16; everything else is float32
        (docs/precision.md). "bf16-if-available" computes in float32, with a warning, where the CPU lacks the
        instructions. TCN always computes in float32.
    extra : dict, optional
        Further arguments of the subclass's constructor, for `get_params`.

    Attributes
    ----------
    network : torch.nn.Module
    train_optimizer : torch.optim.Optimizer
    fitted : bool
        Whether the model can predict.
    epoch_ : int
        The current epoch, from 0.
    evals_result_ : dict
        The score lists "train" and "valid" of the last fit.
    origin_ : dict
        "source", "sha256" and "model" of the weights that the last fit with `init_from` started from.

    Raises
    ------
    ConfigError
        An unknown argument, or a value that is not allowed.
    BackendError
        The device is not available, or precision is "bf16" and the CPU lacks the instructions.

    Examples
    --------
    A model with its own loss, which also selects the epoch:

    >>> from qfast.data import DatasetH, synthetic
    >>> from qfast.models import LSTM
    >>> class AbsoluteErrorLSTM(LSTM):
    ...     def loss_fn(self, pred, label):
    ...         return (pred - label).abs().nanmean()
    >>> dataset = DatasetH(handler=synthetic.factors(8, 40, 3, missing=0.0), segments={"train": (None, None)})
    >>> model = AbsoluteErrorLSTM(d_feat=3, hidden_size=4, n_epochs=2, batch_size=64, seed=0).fit(dataset)
    >>> len(model.history_)
    2
    """

    order: ClassVar[BatchOrder] = NumpyOrder()
    rows_per_call: ClassVar[int] = 0
    """Rows that the network scores per call, in whole batches. 0: one batch on the CPU, `GPU_ROWS` rows on a GPU."""
    drops_incomplete_rows: ClassVar[bool] = False
    """Whether flat training rows with NaN are left out. By default NaN in the features raises an error."""
    mixes_samples: ClassVar[bool] = False
    """Whether a prediction depends on the other samples of its batch. `run_shared` must then be overridden."""
    _graphed_step: GraphedStep | None = None  # while a fit with cuda_graphs runs
    _sharing: Sharing | None = None  # while a fit over several ranks loads its data

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        run_network = cls.run_network
        overridden = cls.features_of is not Estimator.features_of
        if not overridden or "run_network" in cls.__dict__ or hasattr(run_network, "reads_features_of"):
            return
        warnings.warn(
            f"{cls.__name__} overrides features_of, which will be removed in the next release. Override run_network "
            "instead, which passes windows.batch(samples) to the network.",
            DeprecationWarning,
            stacklevel=2,
        )
        cls.run_network = _reading_features_of(run_network)  # type: ignore[method-assign]

    def features_of(self, windows: WindowSet, samples: Tensor) -> Tensor:
        """Deprecated: override `run_network`. The features of samples int64 [B], as `windows.batch` returns them."""
        return windows.batch(samples)

    # ---------------------------------------------------------------- fit
    @over_ranks
    def fit(
        self,
        dataset: Dataset,
        evals_result: dict[str, Any] | None = None,
        save_path: str | Path | None = None,
        reweighter: Reweighter | None = None,
        *,
        callbacks: Sequence[Callback] = (),
        checkpoint_dir: str | Path | None = None,
        resume: bool = False,
        init_from: str | Path | None = None,
    ) -> Estimator:
        """Train on segment "train" and load the weights of the epoch with the best score on segment "valid".

        Without a segment "valid" all epochs run and the last weights remain. A second `fit` continues with the current
        weights and optimizer. In an initialized process group of torch.distributed, all processes call `fit` with the
        same arguments and share the work (docs/distributed.md).

        Parameters
        ----------
        dataset : Dataset
            A dataset of `qfast.data` or of Qlib, or an object with the same `prepare`.
        evals_result : dict, optional
            Receives the score lists "train" and "valid", one value per epoch, higher is better. Other keys are left
            unchanged.
        save_path : path, optional
            The final weights are written to this file: as safetensors if it ends in .safetensors, otherwise in torch's
            format.
        reweighter : Reweighter, optional
            Object with a method `reweight(samples) -> array [n]`, which computes the sample weights of the training
            loss.
        callbacks : sequence of Callback
        checkpoint_dir : path, optional
            After every epoch the state of the fit is written to `last.safetensors` in this directory.
        resume : bool
            Continue from the checkpoint in `checkpoint_dir`. The result equals that of an uninterrupted fit.
        init_from : path, optional
            A run folder, whose best weights the training starts from, or a weight file. The optimizer is not read. The
            attribute `origin_` records the file and its hash.

        Returns
        -------
        Estimator
            The estimator itself.

        Raises
        ------
        ConfigError
            `resume` without `checkpoint_dir`, a `reweighter` without the method, an overridden function that does not
            accept Qlib's arguments, an optimizer without the network's parameters, or `init_from` with `resume`.
        DataError
            An empty segment, NaN or infinity in the features, no label or more than one, no finite label, or a loss
            that is not finite.
        CheckpointError
            `resume` without a checkpoint, or with one that belongs to another fit. Weights of `init_from` that do not
            fit the network.
        RankError
            Another process of the group has failed or died.

        Examples
        --------
        >>> from qfast.data import TSDatasetH, synthetic
        >>> from qfast.models.ts import LSTM
        >>> frame = synthetic.factors(8, 40, 3, missing=0.0)
        >>> dataset = TSDatasetH(handler=frame, segments={"train": (None, None)}, step_len=5)
        >>> model = LSTM(d_feat=3, hidden_size=4, n_epochs=2, batch_size=64, seed=0).fit(dataset)
        >>> model.history_.shape[0], model.predict(dataset, "train").dtype
        (2, dtype('float32'))
        """
        ranks = Ranks.current()
        self._require_trained_network()
        self._apply_precision()
        self._require_float32_training()
        if evals_result is not None and not isinstance(evals_result, dict):
            raise ConfigError(f"evals_result must be a dict, got {type(evals_result).__name__}: {evals_result!r}.")
        if ranks is not None:
            distributed.begin(self, ranks)
        if save_path is not None:
            require_file_target(Path(save_path), "save_path")
        origin = self._origin(init_from, resume, checkpoint_dir)
        train, valid = self._load_segments(dataset, reweighter)
        self._require_ranked_days(train, valid)
        functions = EpochFunctions(self, train, valid)
        self._require_running_score()
        scores: dict[str, Any] = {} if evals_result is None else evals_result
        scores["train"], scores["valid"] = [], []
        self.progress_ = FitProgress(logged={})
        self.callbacks_ = self._fit_callbacks(callbacks, checkpoint_dir)
        self._set_starting_weights(train, origin, Path(checkpoint_dir) if resume and checkpoint_dir else None)
        if ranks is not None:
            distributed.align(self, ranks)
        self.stop_training = self.progress_.finished
        self.fitted = self.fitted or bool(self.progress_.records)
        self._notify("on_fit_start")
        try:
            while len(self.progress_.records) < self._params["n_epochs"] and not self.stop_training:
                self.epoch_ = len(self.progress_.records)
                self._notify("on_epoch_start")
                started = time.perf_counter()
                loss = functions.train() if functions.overrides_training else self.train_pass(train)
                train_seconds = time.perf_counter() - started
                scores_now = self._epoch_scores(train, valid, functions, loss)
                record = {} if loss is None else {"train_loss": loss}
                record |= {**scores_now, "train_seconds": train_seconds, "seconds": time.perf_counter() - started}
                self._end_epoch(record)
            self.fitted = True
        finally:
            self.progress_.logged = None
            for name in ("train", "valid"):
                scores[name].extend(r[name] for r in self.progress_.records if r.get(name) is not None)
            self.evals_result_ = scores
            self._graphed_step = None  # releases the memory of its graphs
            self._release_memory()
            self._notify("on_fit_end")
        if save_path is not None and writes_files():
            self.save_weights(save_path)
        return self

    def _release_memory(self) -> None:
        release_memory()

    def prepare_network(self) -> None:
        """Set initial weights. `fit` calls it after loading the data, unless the fit is resumed or starts from other
        weights; the default does nothing.
        """

    def _set_starting_weights(self, train: WindowSet, origin: Origin | None, interrupted: Path | None) -> None:
        """Load the state of an interrupted fit or the weights of `init_from`, or draw weights."""
        if interrupted is not None:
            self.load_checkpoint(interrupted / "last.safetensors")
        elif origin is not None:
            origin.require_order(train.columns)
            self.load_weights(origin.file)
            self.origin_ = origin.facts()
            self.logger.info("training starts from the weights of %s", origin.file)
        else:
            self.prepare_network()

    def _origin(self, init_from: str | Path | None, resume: bool, checkpoint_dir: str | Path | None) -> Origin | None:
        """The checked weights of `init_from`, None without it. Checks `resume` too."""
        if resume and checkpoint_dir is None:
            raise ConfigError(
                f"resume=True needs checkpoint_dir, the directory of the interrupted fit, got {checkpoint_dir!r}."
            )
        if init_from is None:
            return None
        if resume:
            raise ConfigError(
                f"init_from={str(init_from)!r} cannot be combined with resume=True, because the checkpoint contains "
                "the weights. Remedy: pass only one of them."
            )
        return read_origin(init_from, self)

    def _load_segments(self, dataset: Dataset, reweighter: Reweighter | None) -> tuple[WindowSet, WindowSet | None]:
        """Training and validation samples on the device, after all checks."""
        bounds = getattr(dataset, "segments", {})
        ranks = Ranks.current()
        self._sharing = None if ranks is None else Sharing(ranks, is_training=True)
        train = self.load_segment(dataset, "train", reweighter)
        if len(train) == 0:
            raise DataError(
                f"segment 'train' has no samples: its dates are {bounds.get('train')}. Remedy: dates that the data has."
            )
        valid = None
        if "valid" in getattr(dataset, "segments", ("valid",)):
            valid = self.load_segment(dataset, "valid", reweighter)
            if len(valid) == 0:
                raise DataError(
                    f"segment 'valid' has no samples: its dates are {bounds.get('valid')}. Remedy: dates that the data "
                    "has, or no segment 'valid' to train without validation."
                )
        if self._sharing is not None:  # a load_segment of the user does not know it
            train = self._sharing.once(train)
            valid = None if valid is None else self._sharing.once(valid)
            self._sharing = None
        for windows in filter(None, (train, valid)):
            self._batch_size(len(windows))  # raises before the first epoch rather than after it
        self.data_ = {
            "train": len(train),
            "valid": None if valid is None else len(valid),
            "columns": list(train.columns),
        }
        moved: dict[Any, Tensor] = {}
        with self._device_memory("the panel"):
            return train.to(self.device, moved), None if valid is None else valid.to(self.device, moved)

    def load_segment(self, dataset: Dataset, segment: str, reweighter: Reweighter | None = None) -> WindowSet:
        """Samples of one segment for training or validation, checked by `learning_samples`.

        Functions of the user receive labels in the dtype of the data, as in Qlib.
        """
        own = self._has_own_functions()
        return learning_samples(
            dataset,
            segment,
            reweighter,
            label_dtype=None if own else self.loss_dtype,
            weight_dtype=torch.float64 if own else None,
            drop_incomplete=self.drops_incomplete_rows,
            sharing=self._sharing,
        )

    def train_pass(self, windows: WindowSet) -> float:
        """Train on every full batch once.

        Parameters
        ----------
        windows : WindowSet
            The training samples.

        Returns
        -------
        float
            Mean loss of the batches.

        Raises
        ------
        DataError
            The loss is not finite. On the CPU this is checked after every batch, on a GPU at the end of the epoch.
        """
        self.network.train()
        batches = self.batches(windows, "train")
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        with self._device_memory("a training batch"), self._training_step(windows) as step:
            for number, samples in enumerate(windows.read_ahead(batches), start=1):
                total += step(samples)
                if self.device.type == "cpu":  # on a GPU the check would wait for the device at every step
                    self._require_finite(total, number)
                self._notify("on_batch_end")
        self._require_finite(total, batches.whole)
        return float(total) / batches.whole

    @contextmanager
    def _training_step(self, windows: WindowSet) -> Iterator[Callable[[Tensor], Tensor]]:
        """The training step of one epoch: `train_step` bound to `windows`, or its CUDA graphs."""
        if self._params["cuda_graphs"] and (self._graphed_step is None or self._graphed_step.windows is not windows):
            self._graphed_step = graphed_step(self, windows)
        if isinstance(windows, SharedWindows):
            with distributed.own_random_numbers(windows, self.epoch_):
                yield partial(self.train_step, windows)
        elif self._graphed_step is None:
            yield partial(self.train_step, windows)
        else:
            with self._graphed_step.epoch():
                yield self._graphed_step

    def _epoch_scores(
        self, train: WindowSet, valid: WindowSet | None, functions: EpochFunctions, train_loss: float | None
    ) -> dict[str, float]:
        """Scores of the current weights on the training and the validation segment."""
        how = self._params["train_score"]
        if how != "pass":
            self.batches(train, "train_score")  # the random draws of the pass, on which later batches depend
        if functions.overrides_scoring:
            segments = [name for name in functions.arguments if name != "train" or how == "pass"]
            return {segment: functions.score(segment) for segment in segments}
        scores: dict[str, float] = {}
        if how == "pass":
            scores["train"], _ = self.score_segment(train, "train")
        elif how == "running":
            assert train_loss is not None
            scores["train"] = -train_loss
        if valid is not None:
            scores["valid"], over_all = self.score_segment(valid, "valid")
            scores |= {} if over_all is None else {"valid_all": over_all}
        if self._has_daily_metric():
            scores |= {f"{segment}_{self._params['metric']}": score for segment, score in scores.items()}
        return scores

    def _end_epoch(self, record: dict[str, float]) -> None:
        """Store and log the record of an epoch, and notify the callbacks."""
        record |= self.progress_.logged or {}
        self.progress_.records.append(record)
        self.progress_.logged = record  # values that callbacks log from now on belong to this epoch
        self.fitted = True
        self.logger.info("epoch %d: %s", self.epoch_, epoch_text(record))
        self._notify("on_valid_end")
        self._agree_to_stop()
        self.progress_.finished = self.stop_training
        self._notify("on_epoch_end")
        self._agree_to_stop()
        self.progress_.logged = {}

    def _agree_to_stop(self) -> None:
        """Stop on all ranks if one of them stops, for example because of a callback."""
        ranks = Ranks.current()
        if ranks is not None:
            self.stop_training = ranks.any(self.stop_training)

    def batches(self, windows: WindowSet, stage: str) -> Batches:
        """The batches of one pass over a segment.

        Parameters
        ----------
        windows : WindowSet
        stage : {"train", "train_score", "valid_score", "predict"}

        Returns
        -------
        Batches
            Sample numbers in the order of the pass. Training passes have no incomplete batch.

        Notes
        -----
        With batch_by="day", `order` permutes the days instead of the samples, from the same random draws. Consecutive
        days form a batch as long as they have at most `batch_size` samples. No day is divided, and only days without a
        finite label are left out, of training passes.
        """
        if self._params["batch_by"] == "day":
            days = windows.days
            chosen: Tensor = getattr(self.order, stage)(len(days))
            chosen = chosen[windows.has_label(days)[chosen]] if stage == "train" else chosen
            return days.select(chosen).merged(self._params.get("batch_size"))
        order: Tensor = getattr(self.order, stage)(len(windows)).to(windows.device)
        size = self._params["batch_size"] if stage == "predict" else self._batch_size(len(windows))
        return Batches.of_size(order, size, drop_last=stage in ("train", "train_score"))

    def run_network(self, windows: WindowSet, samples: Tensor, offsets: Tensor | None = None) -> Tensor:
        """Gather the features of some samples and compute their predictions.

        Parameters
        ----------
        windows : WindowSet
        samples : Tensor
            int64 [B], sample numbers.
        offsets : Tensor, optional
            int64 [batches + 1] on the CPU: the boundaries of several batches within `samples`. None means one batch.

        Returns
        -------
        Tensor
            [B].
        """
        prediction: Tensor = self.network(windows.batch(samples))
        return prediction

    def run_shared(self, windows: SharedWindows, samples: Tensor, offsets: Tensor | None = None) -> Tensor:
        """Compute the predictions of a batch whose samples are spread over the ranks of a process group.

        Parameters
        ----------
        windows : SharedWindows
        samples : Tensor
            int64 [B], sample numbers, the same on every rank.
        offsets : Tensor, optional
            As in `run_network`.

        Returns
        -------
        Tensor
            [B], on every rank. Backward computes this rank's part of the gradients.
        """
        return distributed.run_own_samples(self, windows, samples)

    def train_step(self, windows: WindowSet, samples: Tensor) -> Tensor:
        """Forward, backward, gradient clipping and optimizer step for one batch.

        Parameters
        ----------
        windows : WindowSet
        samples : Tensor
            int64 [B], sample numbers.

        Returns
        -------
        Tensor
            The detached loss, 0-d.
        """
        assert windows.label is not None
        weight = None if windows.weight is None else windows.weight[samples]
        label = windows.label[samples]
        shared = windows if isinstance(windows, SharedWindows) else None
        prediction = self.run_network(windows, samples) if shared is None else self.run_shared(shared, samples)
        loss = self._call_loss(prediction, label, weight, self._days_of(windows, samples))
        self.train_optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if shared is not None:
            distributed.sum_gradients(self.network, shared.ranks)
        if not isinstance(self.train_optimizer, ClippedAdam):  # ClippedAdam clips in its own step
            torch.nn.utils.clip_grad_value_(self.network.parameters(), GRADIENT_LIMIT)
        self.train_optimizer.step()
        return loss.detach()

    @torch.no_grad()
    def score_segment(self, windows: WindowSet, segment: str) -> tuple[float, float | None]:
        """Score the current weights on one segment.

        Parameters
        ----------
        windows : WindowSet
        segment : {"train", "valid"}

        Returns
        -------
        tuple of float
            The mean score of the full batches, which decides early stopping as in Qlib; and the score over all samples,
            for information, or None if a loss or metric of the user scores batches only. Higher is better.
        """
        self.network.eval()
        batches = self.batches(windows, f"{segment}_score")
        return self._scores(windows, batches, self._all_predictions(windows, batches))

    def _all_predictions(self, windows: WindowSet, batches: Batches) -> Tensor:
        """As `_predictions`, also if the samples are spread over ranks."""
        if not isinstance(windows, SharedWindows):
            return self._predictions(windows, batches)
        if not self.mixes_samples:
            return distributed.shared_predictions(self, windows, batches)
        calls = batches.calls(self.rows_per_call)
        parts = (self.run_shared(windows, batches.order[call.rows], call.offsets) for call in calls)
        return _joined(parts, len(batches.order), self.device)

    def _predictions(self, windows: WindowSet, batches: Batches) -> Tensor:
        """Predictions of the samples in `batches.order`, in that order."""
        rows = self.rows_per_call or (GPU_ROWS if self.device.type == "cuda" else 0)
        calls = list(batches.calls(rows))
        samples = windows.read_ahead(batches.order[call.rows] for call in calls)
        parts = (self.run_network(windows, part, call.offsets) for part, call in zip(samples, calls, strict=True))
        return _joined(parts, len(batches.order), self.device)

    # ---------------------------------------------------------------- predict
    @over_ranks
    @torch.no_grad()
    def predict(self, dataset: Dataset, segment: Segment = "test") -> pd.Series:
        """Predict the label of every sample of a segment, including samples without a label.

        Parameters
        ----------
        dataset : Dataset
            As in `fit`. It does not need a label column.
        segment : str or slice
            Name of a segment, or `slice(start, end)`.

        Returns
        -------
        Series
            float32, indexed (datetime, instrument). As in Qlib, flat datasets are ordered by date and time-series
            datasets by instrument. Samples with NaN in their features are NaN, with a warning. Empty for an empty
            segment.

        Raises
        ------
        NotFittedError
            The model has neither been fitted nor loaded.
        DataError
            The feature columns have another order or number than in training, or the data does not fit into memory.
        """
        self._require_fitted()
        ranks = Ranks.current()
        with self._device_memory("the panel"):
            windows = windows_of(dataset, segment, "infer", with_label=False)
            windows = windows if ranks is None else Sharing(ranks, is_training=False)(windows)
            windows = windows.to(self.device)
        self._compare_columns(list(windows.columns))
        self._report_infinite(windows)
        self.network.eval()
        self._apply_precision()
        batches = self.batches(windows, "predict")
        out = torch.empty(len(windows), dtype=torch.float32, device=self.device)
        with self._device_memory("a prediction batch"):
            out[batches.order] = self._all_predictions(windows, batches)
        missing = int(torch.isnan(out).sum())
        if missing:
            self.logger.warning("%d of %d predictions are NaN because their features contain NaN", missing, len(out))
        return pd.Series(out.cpu().numpy(), index=windows.keys())

    __call__ = predict

    def _report_infinite(self, windows: WindowSet) -> None:
        """Report infinite features, from which a network may compute scores that look like others."""
        windows = windows.own if isinstance(windows, SharedWindows) else windows  # no rank has the features of all
        table = windows.features
        if not isinstance(table, Tensor):
            return
        infinite = sum(int(torch.isinf(table[rows]).flatten(1).any(1).sum()) for rows in windows.rows.split(ROWS_READ))
        if infinite:
            self.logger.warning(
                "%d of %d samples have infinite features, so their scores are not meaningful. Remedy: the processor "
                "ProcessInf",
                *(infinite, len(windows)),
            )

    def _compare_columns(self, columns: list[str]) -> None:
        """Refuse features that training had in other positions or in another number. Report other names.

        Qlib ignores names, and code for Qlib renames columns between training and prediction, so this is not an error.
        """
        trained = self.data_.get("columns", [])
        if not trained or columns == trained:
            return
        if len(columns) != len(trained):
            raise DataError(
                f"the dataset has {len(columns)} feature columns, but the model was trained on {len(trained)}."
            )
        renamed = [place for place, name in enumerate(columns) if name != trained[place]]
        if any(columns[place] in trained for place in renamed):
            raise DataError(
                "the dataset has feature columns of the training data in another order, which would change the "
                f"predictions: {columns[:4]}... instead of {trained[:4]}... Remedy: reorder the columns."
            )
        self.logger.warning(
            "%d of %d feature columns have other names than in training, for example %r instead of %r at position %d. "
            "The scores are only meaningful if the columns contain the same features in the same order",
            *(len(renamed), len(columns), columns[renamed[0]], trained[renamed[0]], renamed[0]),
        )

    # ---------------------------------------------------------------- helpers
    def _batch_size(self, n: int) -> int:
        """The batch size for a segment of n samples: all n if there are fewer than `batch_size`.

        Qlib fails in that case, after training and with an unrelated error; `compat="qlib"` raises an error at once.
        """
        size: int = self._params.get("batch_size", n)
        if n >= size:
            return size
        if self._params["compat"] == "qlib":
            raise DataError(f"batch_size is {size} but the segment has {n} samples: no full batch.")
        return n

    def _require_finite(self, total: Tensor, batches: int) -> None:
        """Check the sum of the losses of the first `batches` batches of the epoch."""
        if not bool(torch.isfinite(total)):
            if self._has_own_loss() and batches == 1 and self.epoch_ == 0:
                remedy = "no step has been made yet, so the loss function itself returns it, or features are too large"
            elif batches == 1 and self.epoch_ == 0:
                remedy = "no step has been made yet, so features or labels are too large: scale them"
            else:
                remedy = f"the steps were too large: lower lr (now {self._params['lr']}) or scale the features"
            raise DataError(
                f"the training loss became {float(total)} at batch {batches} of epoch {self.epoch_}. Features, labels "
                f"and weights were finite; {remedy}."
            )

    def _fit_callbacks(self, callbacks: Sequence[Callback], checkpoint_dir: str | Path | None) -> list[Callback]:
        """The callbacks of a fit, in the order in which they are called. Only rank 0 writes and shows progress."""
        if not writes_files():
            return [EarlyStopping(), *callbacks, Progress(False)]
        checkpoints = [] if checkpoint_dir is None else [Checkpoint(checkpoint_dir)]
        return [EarlyStopping(), *callbacks, *checkpoints, Progress(self._params["progress"])]

    def _notify(self, moment: str) -> None:
        for callback in self.callbacks_:
            getattr(callback, moment)(self)

    def _device_memory(self, what: str) -> AbstractContextManager[None]:
        size = self._params.get("batch_size")
        return explain_out_of_memory(what, self.device, "" if size is None else f"a smaller batch_size (now {size}), ")


def _joined(parts: Iterable[Tensor], rows: int, device: torch.device) -> Tensor:
    """Concatenate predictions of `rows` samples in all, one part after the other.

    Each part is copied immediately and then freed. If small parts stayed alive between the large tensors of successive
    calls, the C library could not reuse the memory of one call for the next, and the process would grow.
    """
    result = torch.empty(0, device=device)
    begin = 0
    for part in parts:
        if begin == 0:
            result = part.new_empty((rows, *part.shape[1:]))
        result[begin : begin + len(part)] = part
        begin += len(part)
    return result[:begin]


class _FeaturesOf:
    """Windows whose `batch` is the `features_of` of an estimator."""

    def __init__(self, estimator: Estimator, windows: WindowSet) -> None:
        self.estimator, self.windows = estimator, windows

    def batch(self, samples: Tensor) -> Tensor:
        return self.estimator.features_of(self.windows, samples)

    def __getattr__(self, name: str) -> object:
        return getattr(self.windows, name)


def _reading_features_of(run_network: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`run_network` of subclasses that still override `features_of`."""

    @wraps(run_network)
    def run(self: Estimator, windows: WindowSet, samples: Tensor, offsets: Tensor | None = None) -> Tensor:
        return run_network(self, _FeaturesOf(self, windows), samples, offsets)

    run.reads_features_of = True  # type: ignore[attr-defined]
    return run
