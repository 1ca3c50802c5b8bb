"""Callbacks of the training loop: early stopping, checkpoint, progress.

A callback sees the estimator at named moments and may read everything on it; `stop_training = True`
ends the fit after the running epoch.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

if TYPE_CHECKING:
    from qfast.training.estimator import Estimator

__all__ = ["Callback", "Checkpoint", "EarlyStopping", "Progress"]


class Callback:
    """Base class: every moment does nothing until overridden.

    Examples
    --------
    >>> class PrintScore(Callback):
    ...     def on_epoch_end(self, estimator):
    ...         print(estimator.history_.iloc[-1]["valid"])
    """

    def on_fit_start(self, estimator: Estimator) -> None:
        """Data is checked and resident; nothing is trained yet."""

    def on_epoch_start(self, estimator: Estimator) -> None:
        """`estimator.epoch_` is about to run."""

    def on_batch_end(self, estimator: Estimator) -> None:
        """One optimiser step is done."""

    def on_valid_end(self, estimator: Estimator) -> None:
        """The epoch's scores stand in the last row of `estimator.history_`."""

    def on_epoch_end(self, estimator: Estimator) -> None:
        """After every other callback has seen the scores."""

    def on_checkpoint(self, estimator: Estimator) -> None:
        """A checkpoint file was written."""

    def on_fit_end(self, estimator: Estimator) -> None:
        """The best weights are loaded. Also called when the fit is interrupted."""


class EarlyStopping(Callback):
    """Keep the weights of the best validation score; stop after `patience` epochs without a gain.

    As in the reference, a score must be strictly better, and a patience of 0 acts like 1. Without a
    validation segment nothing is compared and the last weights stay.
    """

    def __init__(self, patience: int) -> None:
        self.patience = patience

    def on_fit_start(self, estimator: Estimator) -> None:
        progress = estimator.progress_
        if progress.best_weights is None:
            progress.stop_steps, progress.best_epoch, progress.best_score = 0, None, -float("inf")

    def on_valid_end(self, estimator: Estimator) -> None:
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
        best = estimator.progress_.best_weights
        if best is not None:
            estimator.network.load_state_dict(best)


class Checkpoint(Callback):
    """Write everything a resumed fit needs to `directory/last.safetensors` after each epoch."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)

    def on_epoch_end(self, estimator: Estimator) -> None:
        estimator.save_checkpoint(self.directory / "last.safetensors")
        for callback in estimator.callbacks_:
            callback.on_checkpoint(estimator)


class Progress(Callback):
    """One tqdm bar over epochs; silent when the output is not a terminal."""

    def __init__(self, enabled: bool | str = "auto") -> None:
        self.disable = None if enabled == "auto" else not enabled  # None: tqdm asks whether it is a terminal
        self.bar: Any = None

    def on_fit_start(self, estimator: Estimator) -> None:
        done = len(estimator.progress_.records)
        self.bar = tqdm(
            total=estimator.get_params()["n_epochs"], initial=done, unit="epoch", disable=self.disable, leave=False
        )

    def on_epoch_end(self, estimator: Estimator) -> None:
        record = estimator.progress_.records[-1]
        shown = {name: f"{record[name]:.6f}" for name in ("train", "valid") if record.get(name) is not None}
        self.bar.set_postfix(shown)
        self.bar.update()

    def on_fit_end(self, estimator: Estimator) -> None:
        self.bar.close()
        if torch.cuda.is_available() and estimator.device.type == "cuda":
            torch.cuda.empty_cache()
