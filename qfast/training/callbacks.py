"""Callbacks of the training loop: early stopping, checkpoints and the progress bar."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

if TYPE_CHECKING:
    from qfast.training.estimator import Estimator

__all__ = ["Callback", "Checkpoint", "EarlyStopping", "Progress"]


class Callback:
    """Base class of all callbacks. Its methods do nothing.

    `fit` calls the methods below with the estimator, whose attributes a callback may read and change. Setting
    `estimator.stop_training = True` ends the fit after the current epoch.

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
    patience : int
        Consecutive epochs without a better score.
    """

    def __init__(self, patience: int) -> None:
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
        if progress.stop_steps >= self.patience:
            estimator.stop_training = True

    def on_fit_end(self, estimator: Estimator) -> None:
        """Load the best weights."""
        best = estimator.progress_.best_weights
        if best is not None:
            estimator.network.load_state_dict(best)


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
    """Show a tqdm progress bar over the epochs.

    Parameters
    ----------
    enabled : bool or "auto"
        "auto" shows the bar only on a terminal.
    """

    def __init__(self, enabled: bool | str = "auto") -> None:
        self.disable = None if enabled == "auto" else not enabled  # None: tqdm checks whether the output is a terminal
        self.bar: Any = None

    def on_fit_start(self, estimator: Estimator) -> None:
        """Open the bar."""
        done = len(estimator.progress_.records)
        self.bar = tqdm(
            total=estimator.get_params()["n_epochs"], initial=done, unit="epoch", disable=self.disable, leave=False
        )

    def on_epoch_end(self, estimator: Estimator) -> None:
        """Advance the bar by one epoch and show its scores."""
        record = estimator.progress_.records[-1]
        shown = {name: f"{record[name]:.6f}" for name in ("train", "valid") if record.get(name) is not None}
        self.bar.set_postfix(shown)
        self.bar.update()

    def on_fit_end(self, estimator: Estimator) -> None:
        """Close the bar and release torch's cached GPU memory."""
        self.bar.close()
        if torch.cuda.is_available() and estimator.device.type == "cuda":
            torch.cuda.empty_cache()
