"""The one training loop. A model brings a network, its defaults and a batch order; the rest is here.

`fit` runs named stages, top to bottom: load_segment -> run_epoch -> train_step -> network, then
score_segment -> record -> callbacks. Every stage may be overridden alone.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from qfast.data.adapt import windows_of
from qfast.data.batching import Batches, BatchOrder, NumpyOrder
from qfast.data.protocols import Dataset, Segment
from qfast.data.windows import WindowSet
from qfast.device import choose_device, explain_out_of_memory
from qfast.errors import ConfigError, DataError, NotFittedError, suggest
from qfast.nn.plain import PlainTorch
from qfast.training import checkpoint
from qfast.training.arguments import check_training_arguments
from qfast.training.callbacks import Callback, Checkpoint, EarlyStopping, Progress
from qfast.training.losses import batch_scores, loss_function
from qfast.training.optim import ClippedAdam
from qfast.training.segments import Reweighter, learning_samples
from qfast.training.step_graphs import GraphedStep, graphed_step

GRADIENT_LIMIT = 3.0  # the reference clips every gradient element to +-3
GPU_ROWS = 8192  # that are scored in one call on a GPU, which small batches would leave idle

__all__ = ["Estimator", "FitProgress"]


@dataclass
class FitProgress:
    """What a fit has reached; everything a resumed fit needs besides weights and optimiser."""

    records: list[dict[str, float]] = field(default_factory=list)
    best_score: float = -float("inf")
    best_epoch: int | None = None
    best_weights: dict[str, Tensor] | None = None
    stop_steps: int = 0
    finished: bool = False  # stopped early: a resumed fit has nothing left to do


class Estimator:
    """Fit and predict for one network; subclasses only name their parts.

    Subclasses set `network_class`, `order` and, where the reference differs, the flags below, and
    hand their constructor's arguments to `__init__`. A model whose batches are not equal pieces of samples
    overrides `batches` and takes no `batch_size`.

    Parameters
    ----------
    network : dict
        Arguments of `build_network`, which hands them to `network_class`; also stored as attributes.
    n_epochs, lr, metric, batch_size, early_stop, loss, optimizer, GPU, seed
        As in the reference: `optimizer` "adam" or "gd" (plain SGD); `metric` "" or "loss" (minus the
        loss); `seed` seeds NumPy's and torch's global generators before the network is built.
    weight_decay : float
        L2 added to the gradient.
    device : str or torch.device
        "auto": the GPU number `GPU` if torch sees one and GPU >= 0, otherwise the CPU. Any other
        value is taken literally, and refused where it cannot be had.
    compat : str, optional
        "qlib" brings back what the reference does and we changed on purpose (docs/parity.md); with dropout it
        computes by torch's own layers, at their speed, for the reference's masks.
    progress : bool or "auto"
        Progress bar; "auto" shows it only on a terminal.
    cuda_graphs : bool
        On a GPU, record the training step once and repeat it with one launch; the numbers stay the same. Off until
        it has been seen to work (docs/gpu.md). A `loss_fn` or `train_step` of your own is recorded with it and must
        not depend on anything but its arguments, weights and buffers.

    Attributes
    ----------
    network : torch.nn.Module
    history_ : DataFrame of one row per epoch
    evals_result_ : dict with the score lists "train" and "valid"
    best_epoch_ : int or None
    """

    network_class: ClassVar[type[nn.Module]]
    order: ClassVar[BatchOrder] = NumpyOrder()
    loss_dtype: ClassVar[torch.dtype | None] = torch.float32  # None: that of the label
    rows_per_call: ClassVar[int] = (
        0  # rows of batches that one call of the network scores; 0: each batch alone, many on a GPU
    )
    drops_incomplete_rows: ClassVar[bool] = False  # training rows with any NaN are left out, not refused
    options: ClassVar[tuple[str, ...]] = ("device", "compat", "progress", "cuda_graphs")
    decay_name: ClassVar[str] = "weight_decay"  # what the model's own constructor calls it
    _graphed_step: GraphedStep | None = None  # while a fit with cuda_graphs runs

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        if "features_of" in cls.__dict__:
            raise TypeError(
                f"{cls.__name__} overrides features_of, which is no longer called. Remedy: override run_network, which "
                "passes windows.batch(samples) to the network."
            )

    def __init__(
        self,
        network: Mapping[str, object],
        *,
        n_epochs: int,
        lr: float,
        metric: str,
        batch_size: int | None = None,
        early_stop: int,
        loss: str,
        optimizer: str,
        GPU: int | None = 0,
        seed: int | None = None,
        weight_decay: float = 0.0,
        device: str | torch.device = "auto",
        compat: str | None = None,
        progress: bool | str = "auto",
        cuda_graphs: bool = False,
        extra: Mapping[str, object] | None = None,
        **unknown: object,
    ) -> None:
        training: dict[str, object] = {
            "n_epochs": n_epochs,
            "lr": lr,
            "metric": metric,
            "batch_size": batch_size,
            "early_stop": early_stop,
            "loss": loss,
            "optimizer": optimizer,
            "GPU": GPU,
            "seed": seed,
        }
        if batch_size is None:
            del training["batch_size"]
        options: dict[str, object] = {
            self.decay_name: weight_decay,
            "device": device,
            "compat": compat,
            "progress": progress,
            "cuda_graphs": cuda_graphs,
        }
        self._params: dict[str, Any] = {**network, **training, **(extra or {}), **options}
        if unknown:
            name = next(iter(unknown))
            raise ConfigError(f"{type(self).__name__} has no argument {name!r}." + suggest(name, self._params))
        check_training_arguments(self._params, self.decay_name)
        for name, value in self._params.items():
            if name != "device":
                setattr(self, name, value)
        self.logger = logging.getLogger("qfast")
        self.device = choose_device(device, GPU)
        if seed is not None:
            np.random.seed(seed)  # noqa: NPY002 - the reference seeds the global generators here
            torch.manual_seed(seed)
        built = self.build_network(**network)
        if compat == "qlib" and isinstance(built, PlainTorch) and network.get("dropout"):
            built = built.to_reference()  # whose dropout draws as the reference's
        self.network: nn.Module = built.to(self.device)
        self.train_optimizer = self._build_optimizer(optimizer, lr, weight_decay)
        self.fitted = False
        self.stop_training = False
        self.epoch_ = 0
        self.data_: dict[str, Any] = {}
        self.progress_ = FitProgress()
        self.callbacks_: list[Callback] = []

    def build_network(self, **network: Any) -> nn.Module:
        """The network of these arguments, on the CPU; for a network whose own arguments have other names."""
        return self.network_class(**network)

    # ---------------------------------------------------------------- fit
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
    ) -> Estimator:
        """Train on segment "train", choose the epoch on segment "valid" (if there is one).

        Parameters
        ----------
        dataset
            A `qfast.data` dataset or one of Qlib's own.
        evals_result : dict, optional
            Filled with the score lists "train" and "valid" (higher is better); other keys are kept.
        save_path : path, optional
            Where the best weights go: safetensors for that suffix, otherwise torch's format.
        reweighter : object with `reweight(samples) -> array [n]`, optional
            Sample weights of the training loss.
        callbacks : sequence of Callback
        checkpoint_dir : path, optional
            Directory of `last.safetensors`, written after every epoch.
        resume : bool
            Continue from the checkpoint in `checkpoint_dir`; the result is that of an unbroken fit.

        Raises
        ------
        DataError
            Empty training segment, NaN in features, more than one label, loss that is not finite.
        CheckpointError
            `resume` without a usable checkpoint.
        """
        train, valid = self._load_segments(dataset, reweighter)
        scores: dict[str, Any] = {} if evals_result is None else evals_result
        scores["train"], scores["valid"] = [], []
        self.progress_ = FitProgress()
        self.callbacks_ = self._fit_callbacks(callbacks, checkpoint_dir)
        if resume:
            if checkpoint_dir is None:
                raise ConfigError("resume=True needs checkpoint_dir, the directory of the interrupted fit.")
            self.load_checkpoint(Path(checkpoint_dir) / "last.safetensors")
        else:
            self.prepare_network()
        self.stop_training = self.progress_.finished
        self.fitted = self.fitted or bool(self.progress_.records)
        self._notify("on_fit_start")
        try:
            for epoch in range(len(self.progress_.records), self._params["n_epochs"]):
                if self.stop_training:
                    break
                self.epoch_ = epoch
                self._notify("on_epoch_start")
                started = time.perf_counter()
                train_loss = self.train_epoch(train)
                train_seconds = time.perf_counter() - started
                record = {"train_loss": train_loss, **self._epoch_scores(train, valid), "train_seconds": train_seconds}
                self._end_epoch(record | {"seconds": time.perf_counter() - started})
            self.fitted = True
        finally:
            for name in ("train", "valid"):
                scores[name].extend(r[name] for r in self.progress_.records if r.get(name) is not None)
            self.evals_result_ = scores
            self._graphed_step = None  # releases the memory of its graphs
            self._notify("on_fit_end")
        if save_path is not None:
            self.save_weights(save_path)
        return self

    def prepare_network(self) -> None:
        """Called once the data of a fit is checked, unless it is resumed; a model may set initial weights here."""

    def _load_segments(self, dataset: Dataset, reweighter: Reweighter | None) -> tuple[WindowSet, WindowSet | None]:
        """Training and validation samples, checked and resident on the device."""
        train = self.load_segment(dataset, "train", reweighter)
        if len(train) == 0:
            raise DataError("segment 'train' has no samples: check its dates against those of the data.")
        valid = None
        if "valid" in getattr(dataset, "segments", ("valid",)):
            valid = self.load_segment(dataset, "valid", reweighter)
            if len(valid) == 0:
                raise DataError(
                    "segment 'valid' has no samples: check its dates, or leave the segment out to train without "
                    "validation."
                )
        for windows in filter(None, (train, valid)):
            self._batch_size(len(windows))  # refuses before the first pass, not after it
        self.data_ = {
            "train": len(train),
            "valid": None if valid is None else len(valid),
            "columns": list(train.columns),
        }
        moved: dict[Any, Tensor] = {}
        with self._device_memory("the panel"):
            return train.to(self.device, moved), None if valid is None else valid.to(self.device, moved)

    def load_segment(self, dataset: Dataset, segment: str, reweighter: Reweighter | None = None) -> WindowSet:
        """Learning samples of one segment, with finite features and their weights."""
        return learning_samples(
            dataset, segment, reweighter, label_dtype=self.loss_dtype, drop_incomplete=self.drops_incomplete_rows
        )

    def train_epoch(self, windows: WindowSet) -> float:
        """One pass over the shuffled batches, short tail dropped; returns their mean loss."""
        self.network.train()
        batches = self.batches(windows, "train")
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        with self._device_memory("a training batch"), self._training_step(windows) as step:
            for number, samples in enumerate(batches, start=1):
                total += step(samples)
                if self.device.type == "cpu":  # on a GPU the check would synchronize at every step
                    self._require_finite(total, number)
                self._notify("on_batch_end")
        self._require_finite(total, batches.whole)
        return float(total) / batches.whole

    @contextmanager
    def _training_step(self, windows: WindowSet) -> Iterator[Callable[[Tensor], Tensor]]:
        """The step of one epoch: `train_step` bound to `windows`, or the CUDA graphs of it."""
        if self._params["cuda_graphs"] and (self._graphed_step is None or self._graphed_step.windows is not windows):
            self._graphed_step = graphed_step(self, windows)
        if self._graphed_step is None:
            yield partial(self.train_step, windows)
        else:
            with self._graphed_step.epoch():
                yield self._graphed_step

    def _epoch_scores(self, train: WindowSet, valid: WindowSet | None) -> dict[str, float]:
        """Scores of the current weights on the training and the validation segment."""
        scores = {"train": self.score_segment(train, "train")[0]}
        if valid is not None:
            scores["valid"], scores["valid_all"] = self.score_segment(valid, "valid")
        return scores

    def _end_epoch(self, record: dict[str, float]) -> None:
        """Store and log the record of an epoch, and notify the callbacks."""
        self.progress_.records.append(record)
        self.fitted = True
        self.logger.info("epoch %d: %s", self.epoch_, _shown(record))
        self._notify("on_valid_end")
        self.progress_.finished = self.stop_training
        self._notify("on_epoch_end")

    def batches(self, windows: WindowSet, stage: str) -> Batches:
        """The batches of one pass; `stage` is "train", "train_score", "valid_score" or "predict"."""
        order: Tensor = getattr(self.order, stage)(len(windows)).to(windows.device)
        size = self._params["batch_size"] if stage == "predict" else self._batch_size(len(windows))
        return Batches.of_size(order, size, drop_last=stage in ("train", "train_score"))

    def run_network(self, windows: WindowSet, samples: Tensor, offsets: Tensor | None = None) -> Tensor:
        """Predictions [B] for samples int64 [B]; `offsets` cuts them into batches, None: they are one."""
        prediction: Tensor = self.network(windows.batch(samples))
        return prediction

    def train_step(self, windows: WindowSet, samples: Tensor) -> Tensor:
        """Forward, backward, value clipping and optimiser step for samples int64 [B]; the detached loss."""
        assert windows.label is not None
        weight = None if windows.weight is None else windows.weight[samples]
        label = windows.label[samples]
        prediction = self.run_network(windows, samples).to(label.dtype)
        loss = self.loss_fn(prediction, label, weight)
        self.train_optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if not isinstance(self.train_optimizer, ClippedAdam):  # which clips in its step
            torch.nn.utils.clip_grad_value_(self.network.parameters(), GRADIENT_LIMIT)
        self.train_optimizer.step()
        return loss.detach()

    def loss_fn(self, prediction: Tensor, label: Tensor, weight: Tensor | None) -> Tensor:
        """Training loss of one batch, a 0-d tensor."""
        return loss_function(self._params["loss"])(prediction, label, weight)

    @torch.no_grad()
    def score_segment(self, windows: WindowSet, segment: str) -> tuple[float, float]:
        """Mean over full batches of the batch score, as in the reference, and the score over all samples.

        The first drops the short tail and weighs batches alike: it decides early stopping. The second
        is taken over the tail too, for reading.
        """
        self.network.eval()
        batches = self.batches(windows, f"{segment}_score")
        assert windows.label is not None
        labels = windows.label[batches.order]
        predictions = self._predictions(windows, batches).to(labels.dtype)
        skip_unlabelled = self._params["compat"] != "qlib"
        return batch_scores(predictions, labels, batches, self._params["metric"], skip_unlabelled=skip_unlabelled)

    def _predictions(self, windows: WindowSet, batches: Batches) -> Tensor:
        """Of the samples in `batches.order`, in that order."""
        rows = self.rows_per_call or (GPU_ROWS if self.device.type == "cuda" else 0)
        parts = [self.run_network(windows, batches.order[call.rows], call.offsets) for call in batches.calls(rows)]
        return torch.cat(parts) if parts else torch.empty(0, device=self.device)

    # ---------------------------------------------------------------- predict
    @torch.no_grad()
    def predict(self, dataset: Dataset, segment: Segment = "test") -> pd.Series:
        """Scores of every sample of a segment, rows without a label included.

        Parameters
        ----------
        dataset
            As in `fit`; a label column is not needed.
        segment : str or slice(start, end)

        Returns
        -------
        Series
            float32, indexed (datetime, instrument): date by date for flat datasets, instrument by
            instrument for time-series ones (the reference's orders). Empty for an empty segment.

        Raises
        ------
        NotFittedError
            Neither `fit` nor `load_weights` was called.
        """
        self._require_fitted()
        with self._device_memory("the panel"):
            windows = windows_of(dataset, segment, "infer", with_label=False).to(self.device)
        trained = self.data_.get("columns", [])
        if list(windows.columns) != trained and sorted(windows.columns) == sorted(trained):
            raise DataError(
                "the dataset has the feature columns of the training data in another order, which would give other "
                f"scores: {list(windows.columns)[:4]}... instead of {trained[:4]}... Remedy: reorder the columns."
            )
        self.network.eval()
        batches = self.batches(windows, "predict")
        out = torch.empty(len(windows), dtype=torch.float32, device=self.device)
        with self._device_memory("a prediction batch"):
            out[batches.order] = self._predictions(windows, batches)
        missing = int(torch.isnan(out).sum())
        if missing:
            self.logger.warning("%d of %d predictions are NaN: their features hold NaN", missing, len(out))
        return pd.Series(out.cpu().numpy(), index=windows.keys())

    __call__ = predict

    # ---------------------------------------------------------------- state
    @property
    def history_(self) -> pd.DataFrame:
        """One row per epoch: scores `train`, `valid`, `valid_all` (higher is better), `train_loss`, seconds."""
        frame = pd.DataFrame(self.progress_.records)
        frame.index.name = "epoch"
        return frame

    @property
    def best_epoch_(self) -> int | None:
        """Epoch whose weights are loaded after `fit`; None without validation."""
        return self.progress_.best_epoch

    @property
    def use_gpu(self) -> bool:
        """True when the network lives on a GPU."""
        return self.device.type != "cpu"

    def get_params(self) -> dict[str, Any]:
        """The constructor's arguments, by name."""
        return dict(self._params)

    def save_weights(self, path: str | Path) -> None:
        """Write the network's weights: safetensors for that suffix, otherwise torch's format. Atomic."""
        checkpoint.save_weights(self.network, Path(path))

    def load_weights(self, path: str | Path) -> Estimator:
        """Read weights written by us or by the reference (.safetensors, .pkl, .pt, .bin); no code is run."""
        checkpoint.load_weights(self.network, Path(path))
        self.fitted = True
        return self

    def save_checkpoint(self, path: Path) -> None:
        """Write weights, best weights, optimiser, generators and records to one file, atomically."""
        checkpoint.save_fit(self, path)

    def load_checkpoint(self, path: Path) -> None:
        """Restore what `save_checkpoint` wrote."""
        checkpoint.load_fit(self, path)

    def checkpoint_facts(self) -> dict[str, Any]:
        """What a checkpoint keeps of a model besides weights and parameters, as JSON can hold it."""
        return {}

    def restore_facts(self, facts: dict[str, Any]) -> None:
        """Take back what `checkpoint_facts` gave."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "callbacks_": [], "_graphed_step": None}

    # ---------------------------------------------------------------- helpers
    def _build_optimizer(self, name: str, lr: float, weight_decay: float) -> torch.optim.Optimizer:
        parameters = self.network.parameters()
        if str(name).lower() == "adam":
            return ClippedAdam(parameters, lr=lr, weight_decay=weight_decay, limit=GRADIENT_LIMIT)
        if str(name).lower() == "gd":
            return torch.optim.SGD(parameters, lr=lr, weight_decay=weight_decay)
        raise ConfigError(f"optimizer must be 'adam' or 'gd', got {name!r}." + suggest(name, ("adam", "gd")))

    def _batch_size(self, n: int) -> int:
        """The batch size for n samples; the reference fails later, and unclearly, when n is smaller."""
        asked: int = self._params.get("batch_size", n)
        if n >= asked:
            return asked
        if self._params["compat"] == "qlib":
            raise DataError(f"batch_size is {asked} but the segment has {n} samples: no full batch.")
        return n

    def _require_finite(self, total: Tensor, batches: int) -> None:
        if not bool(torch.isfinite(total)):
            if batches == 1 and self.epoch_ == 0:
                remedy = "no step was made yet, so features or labels are too large: scale them"
            else:
                remedy = f"the steps were too large: lower lr (now {self._params['lr']}) or scale the features"
            raise DataError(
                f"the training loss became {float(total)} at batch {batches} of epoch {self.epoch_}. Features, labels "
                f"and weights were finite; {remedy}."
            )

    def _require_fitted(self) -> None:
        if not self.fitted:
            raise NotFittedError("model is not fitted yet! Remedy: call fit(dataset) or load_weights(path) first.")

    def _fit_callbacks(self, callbacks: Sequence[Callback], checkpoint_dir: str | Path | None) -> list[Callback]:
        """The callbacks of a fit in the order of their calls."""
        own = [] if checkpoint_dir is None else [Checkpoint(checkpoint_dir)]
        return [EarlyStopping(self._params["early_stop"]), *callbacks, *own, Progress(self._params["progress"])]

    def _notify(self, moment: str) -> None:
        for callback in self.callbacks_:
            getattr(callback, moment)(self)

    def _device_memory(self, what: str) -> AbstractContextManager[None]:
        size = self._params.get("batch_size")
        return explain_out_of_memory(what, self.device, "" if size is None else f"a smaller batch_size (now {size}), ")


def _shown(record: dict[str, float]) -> str:
    return ", ".join(f"{k} {v:.6f}" if "seconds" not in k else f"{k} {v:.2f}" for k, v in record.items())
