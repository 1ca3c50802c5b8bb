"""Callbacks of the training loop: early stopping, checkpoints and the progress bar."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from qfast.training.daily_losses import DAILY_METRICS

if TYPE_CHECKING:
    from qfast.training.estimator import Estimator

__all__ = ["Callback", "Checkpoint", "EarlyStopping", "Progress", "epoch_text"]


class Callback:
    """Base class of all callbacks. Its methods do nothing.

    `fit` calls the methods below with the estimator, whose attributes a callback may read and change. Setting
    `estimator.stop_training = True` ends the fit after the current epoch. `estimator.log(name=value)` records a value
    of the epoch in `history_`.

    Examples
    --------
    >>> from qfast.data import DatasetH, synthetic
    >>> from qfast.models import LSTM
    >>> class CountBatches(Callback):
    ...     batches = 0
    ...     def on_batch_end(self, estimator):
    ...         self.batches += 1
    >>> dataset = DatasetH(handler=synthetic.factors(8, 40, 3, missing=0.0), segments={"train": (None, None)})
    >>> counter = CountBatches()
    >>> model = LSTM(d_feat=3, hidden_size=4, n_epochs=2, batch_size=64).fit(dataset, callbacks=[counter])
    >>> counter.batches
    8
    """

    def on_fit_start(self, estimator: Estimator) -> None:
        """Called when the data has been checked and is on the device, before the first epoch."""

    def on_epoch_start(self, estimator: Estimator) -> None:
        """Called before epoch `estimator.epoch_`."""

    def on_batch_end(self, estimator: Estimator) -> None:
        """Called after every optimizer step."""

    def on_valid_end(self, estimator: Estimator) -> None:
        """Called when the scores of the epoch are in the last row of `estimator.history_`."""

    def on_epoch_end(self, estimator: Estimator) -> None:
        """Called at the end of an epoch, after `on_valid_end` of all callbacks."""

    def on_checkpoint(self, estimator: Estimator) -> None:
        """Called after a checkpoint file has been written."""

    def on_fit_end(self, estimator: Estimator) -> None:
        """Called when the best weights have been loaded, and also if the fit is interrupted."""


class EarlyStopping(Callback):
    """Load the weights with the best validation score, and stop after `patience` epochs without a better one.

    As in Qlib, only a strictly better score counts, and a patience of 0 acts like 1. Without a validation segment the
    callback does nothing. Every fit uses it, with the argument `early_stop` as patience.

    Parameters
    ----------
    patience : int, optional
        Consecutive epochs without a better score. None: the estimator's current `early_stop`.
    """

    def __init__(self, patience: int | None = None) -> None:
        self.patience = patience

    def on_fit_start(self, estimator: Estimator) -> None:
        """Reset the best score, unless the fit is resumed."""
        progress = estimator.progress_
        if progress.best_weights is None:
            progress.stop_steps, progress.best_epoch, progress.best_score = 0, None, -float("inf")

    def on_valid_end(self, estimator: Estimator) -> None:
        """Compare the score of the epoch with the best one."""
        progress = estimator.progress_
        score = progress.records[-1].get("valid")
        if score is None:
            return
        if score > progress.best_score:
            progress.best_score, progress.best_epoch, progress.stop_steps = score, estimator.epoch_, 0
            progress.best_weights = {k: v.detach().clone() for k, v in estimator.network.state_dict().items()}
            return
        progress.stop_steps += 1
        if progress.stop_steps >= (estimator.get_params()["early_stop"] if self.patience is None else self.patience):
            estimator.stop_training = True

    def on_fit_end(self, estimator: Estimator) -> None:
        """Load the best weights. Report a score that was NaN in every epoch."""
        progress = estimator.progress_
        if progress.best_weights is not None:
            estimator.network.load_state_dict(progress.best_weights)
        elif progress.records and progress.records[-1].get("valid") is not None:
            estimator.logger.warning(
                "the score of segment 'valid' is NaN in all %d epochs, so no epoch was selected and the last weights "
                "remain. Remedy: a metric that is a number on every batch",
                len(progress.records),
            )


class Checkpoint(Callback):
    """Write the state of the fit to `last.safetensors` after every epoch. `fit` uses it if it has a `checkpoint_dir`.

    Parameters
    ----------
    directory : path
        Created if it does not exist.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)

    def on_epoch_end(self, estimator: Estimator) -> None:
        """Write the file and notify the other callbacks."""
        estimator.save_checkpoint(self.directory / "last.safetensors")
        for callback in estimator.callbacks_:
            callback.on_checkpoint(estimator)


class Progress(Callback):
    """Show the progress of a fit: a tqdm bar over the epochs, or one line per epoch.

    Parameters
    ----------
    enabled : bool, "auto" or "lines"
        "auto" shows a bar on a terminal. Elsewhere it writes one line per epoch to stderr, unless the program handles
        log messages, which contain the same text. True is always a bar, "lines" always lines.
    """

    def __init__(self, enabled: bool | str = "auto") -> None:
        self.enabled = enabled
        self.bar: Any = None

    def on_fit_start(self, estimator: Estimator) -> None:
        """Open the bar."""
        done, total = len(estimator.progress_.records), estimator.get_params()["n_epochs"]
        # None: tqdm checks whether the output is a terminal.
        disable = None if self.enabled == "auto" else self.enabled is not True
        self.bar = tqdm(total=total, initial=done, unit="epoch", disable=disable, leave=False)

    def on_epoch_end(self, estimator: Estimator) -> None:
        """Advance the bar by one epoch and show its scores, or write a line."""
        record = estimator.progress_.records[-1]
        if self._writes_lines(estimator):
            print(f"epoch {estimator.epoch_}: {epoch_text(record)}", file=sys.stderr, flush=True)
        shown = {name: f"{record[name]:.6f}" for name in ("train", "valid") if record.get(name) is not None}
        self.bar.set_postfix(shown)
        self.bar.update()

    def on_fit_end(self, estimator: Estimator) -> None:
        """Close the bar, write which epoch is the best one, and release torch's cached GPU memory."""
        self.bar.close()
        best = estimator.progress_
        if self._writes_lines(estimator) and best.best_epoch is not None:
            print(f"best epoch {best.best_epoch}: score {best.best_score:.6f}", file=sys.stderr, flush=True)
        if torch.cuda.is_available() and estimator.device.type == "cuda":
            torch.cuda.empty_cache()

    def _writes_lines(self, estimator: Estimator) -> bool:
        return self.enabled == "lines" or (
            self.enabled == "auto" and self.bar.disable and not estimator.logger.hasHandlers()
        )


def epoch_text(record: Mapping[str, float]) -> str:
    """The record of an epoch as one line of text.

    >>> epoch_text({"train_loss": 0.5, "train": -0.4, "valid": -0.6, "train_seconds": 1.0, "seconds": 1.25})
    'loss 0.500000; score (higher is better): train -0.400000, valid -0.600000; 1.25 s'
    >>> epoch_text({"train": 0.05, "valid": 0.04, "train_ic": 0.05, "valid_ic": 0.04, "seconds": 1.25})
    'mean daily IC (higher is better): train 0.050000, valid 0.040000; 1.25 s'
    """
    names = {"train": "train", "valid": "valid", "valid_all": "all of valid"}
    scores = ", ".join(f"{text} {record[name]:.6f}" for name, text in names.items() if name in record)
    parts = [f"loss {record['train_loss']:.6f}"] if "train_loss" in record else []
    metric = next((metric for metric in DAILY_METRICS if {f"train_{metric}", f"valid_{metric}"} & set(record)), None)
    title = "score" if metric is None else f"mean daily {DAILY_METRICS[metric]}"
    parts += [f"{title} (higher is better): {scores}"] if scores else []
    known = {"train_loss", "train_seconds", "seconds", *names, f"train_{metric}", f"valid_{metric}"}
    logged = ", ".join(f"{name} {value:.6g}" for name, value in record.items() if name not in known)
    parts += [logged] if logged else []
    return "; ".join([*parts, f"{record['seconds']:.2f} s"])
