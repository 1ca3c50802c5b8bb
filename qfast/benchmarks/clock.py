"""CPU seconds of the parts of an epoch: gather, forward, backward, optimizer, evaluation, and the rest."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ParamSpec, TypeVar
from unittest import mock

import torch

from qfast.data.windows import WindowSet
from qfast.training.estimator import Estimator

__all__ = ["PARTS", "Clock", "EpochTimes", "epoch_timers"]

PARTS = ("gather", "forward", "backward", "optimizer", "evaluation", "python")

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
Clock = Callable[[], float]


@dataclass
class EpochTimes:
    """Seconds of one epoch over a sample.

    Attributes
    ----------
    training, evaluation : float
        The training pass, and the scores of both segments.
    gather, backward, optimizer, network : float
        Parts of `training`; `network` is `run_network`, which includes the gather.
    """

    training: float = 0.0
    evaluation: float = 0.0
    gather: float = 0.0
    network: float = 0.0
    backward: float = 0.0
    optimizer: float = 0.0
    scored: dict[str, float] = field(default_factory=dict)

    def parts(self, training_scale: float, scored_scale: dict[str, float]) -> dict[str, float]:
        """Seconds of each part of PARTS in a whole epoch.

        Parameters
        ----------
        training_scale : float
            Batches of the epoch per batch of the sample.
        scored_scale : dict
            Samples of each segment per sample that was scored.
        """
        forward = self.network - self.gather
        rest = self.training - self.network - self.backward - self.optimizer
        scaled = {"gather": self.gather, "forward": forward, "backward": self.backward, "optimizer": self.optimizer}
        parts = {name: seconds * training_scale for name, seconds in scaled.items()}
        evaluation = sum(seconds * scored_scale[segment] for segment, seconds in self.scored.items())
        return {**parts, "evaluation": evaluation, "python": max(rest, 0.0) * training_scale}


@contextlib.contextmanager
def epoch_timers(
    estimator: Estimator, train: WindowSet, times: EpochTimes, clock: Clock = time.process_time
) -> Iterator[None]:
    """Add the seconds of the fits in the block to `times`.

    Methods are replaced on the objects for the time of the block. The hooks of torch.nn are not used, because a network
    with hooks runs torch's layers.

    Parameters
    ----------
    estimator : Estimator
    train : WindowSet
        The training samples, whose `batch` gathers.
    times : EpochTimes
    clock : callable
        CPU time for one thread, wall time for several.
    """

    def timed(name: str, call: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        def timed_call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
            start = clock()
            try:
                return call(*args, **kwargs)
            finally:
                setattr(times, name, getattr(times, name) + clock() - start)

        return timed_call

    train_pass, score_segment = estimator.train_pass, estimator.score_segment

    def timed_train_pass(windows: WindowSet) -> float:
        optimizer = estimator.train_optimizer
        with contextlib.ExitStack() as patches:
            for target, name, part in (
                (train, "batch", "gather"),
                (estimator, "run_network", "network"),
                (optimizer, "step", "optimizer"),
                (optimizer, "zero_grad", "optimizer"),
                (torch.Tensor, "backward", "backward"),
            ):
                replacement = timed(part, getattr(target, name))
                patches.enter_context(mock.patch.object(target, name, replacement))
            return timed("training", train_pass)(windows)

    def timed_score_segment(windows: WindowSet, segment: str) -> Any:
        start = clock()
        try:
            return score_segment(windows, segment)
        finally:
            times.scored[segment] = times.scored.get(segment, 0.0) + clock() - start

    with (
        mock.patch.object(estimator, "train_pass", timed_train_pass),
        mock.patch.object(estimator, "score_segment", timed_score_segment),
    ):
        yield
