"""Times one model: rounds of one epoch by qfast and one by the reference, over a sample of the batches."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from qfast.benchmarks.clock import EpochTimes, epoch_timers
from qfast.benchmarks.memory import peak_memory
from qfast.benchmarks.qlib_epoch import QlibEpoch, qlib_class
from qfast.benchmarks.rates import training_multiply_adds
from qfast.benchmarks.sample import Sample, Segments
from qfast.benchmarks.torch_epoch import TorchEpoch
from qfast.benchmarks.trust import Watch
from qfast.data.protocols import Bounds, HandlerDataset
from qfast.data.windows import WindowSet
from qfast.device import release_memory
from qfast.errors import ConfigError
from qfast.nn.plain import PlainTorch
from qfast.training.estimator import Estimator
from qfast.training.overrides import is_overridden

__all__ = ["ModelTimes", "measure"]

LARGEST_BATCH = 2048  # larger batches are timed with this size, so slow models need no minute for a step
ROUNDS = 3  # planned, and the fewest unless the first one already exceeds the time
MOST_BATCHES = 32


@dataclass
class ModelTimes:
    """Figures of one model. Times are seconds of a whole epoch.

    Attributes
    ----------
    name : str
    batch_size : int
        Samples of a timed batch; for days, of an average day.
    notes : list of str
        What differs from a fit with the model's arguments.
    batches, rounds : float, int
        Training batches of the sample, and how often it was timed.
    epoch : float
        CPU time of qfast on one thread, the lowest of the rounds.
    parts : dict
        Its division into `clock.PARTS`.
    reference : float or None
        CPU time of the reference on one thread, the lowest of the rounds.
    reference_name : str
        "Qlib", "torch's layers", or "" if the model has neither.
    threads, threads_epoch : int, float or None
        Wall time of qfast on several threads.
    threads_gain : float or None
        Wall time of qfast on one thread divided by `threads_epoch`. The epochs of both alternate.
    memory, reference_memory : float or None
        Peak in megabytes of a training pass over one batch with its scores.
    products, copies : float or None
        Multiply-adds per second of forward and backward, and bytes per second of the gather.
    """

    name: str
    batch_size: int = 0
    notes: list[str] = field(default_factory=list)
    batches: float = 0.0
    rounds: int = 0
    epoch: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)
    reference: float | None = None
    reference_name: str = ""
    threads: int = 1
    threads_epoch: float | None = None
    threads_gain: float | None = None
    memory: float | None = None
    reference_memory: float | None = None
    products: float | None = None
    copies: float | None = None

    @property
    def ratio(self) -> float | None:
        """Time of the reference relative to qfast."""
        return None if self.reference is None else self.reference / self.epoch


class Reference(Protocol):
    """Another implementation of the epoch."""

    title: str

    def seconds(self) -> float:
        """CPU seconds of a whole epoch, extrapolated from the sample."""


def measure(
    name: str, estimator: Estimator, dataset: HandlerDataset, seconds: float, watch: Watch, threads: int
) -> ModelTimes:
    """Time a model.

    Parameters
    ----------
    name : str
    estimator : Estimator
        Its weights change.
    dataset : DatasetH
        With segments "train" and "valid".
    seconds : float
        Wall time that the rounds may take.
    watch : Watch
        Receives the times of the process, for its verdict.
    threads : int
        Threads of the second figure of qfast. 1: none.

    Raises
    ------
    ConfigError
        The model has its own `train_epoch` or `test_epoch`, whose parts cannot be timed.
    DataError
        The data does not fit the model, or a segment has too few samples.
    """
    deadline = time.perf_counter() + seconds
    _require_own_loop(name, estimator)
    times = ModelTimes(name)
    train_score = estimator.get_params().get("train_score", "pass")
    if train_score != "pass":
        times.notes.append(f"train_score={train_score!r}: only the reference scores the training segment")
    precision = estimator.get_params().get("precision", "float32")
    if precision != "float32":
        times.notes.append(f"precision={precision!r} of qfast; the reference computes in float32")
    segments = _segments(estimator, dataset, times)
    with _threads(1):
        sample, reference, round_s = _pilot(estimator, segments, times)
        batches = min(MOST_BATCHES, int((deadline - time.perf_counter()) / (ROUNDS + 1) / max(round_s, 1e-3)))
        if batches > 1 and not sample.is_whole:
            sample = segments.sample(batches)
            reference = _reference(estimator, sample, times)
        times.batches = sample.batches
        _rounds(estimator, sample, reference, times, watch, deadline)
    if threads > 1:
        times.threads = threads
        times.threads_epoch, times.threads_gain = _threads_epoch(estimator, sample, threads)
    _add_rates(estimator, segments, times)
    release_memory()
    return times


def _require_own_loop(name: str, estimator: Estimator) -> None:
    overridden = [method for method in ("train_epoch", "test_epoch") if is_overridden(estimator, method)]
    if overridden:
        raise ConfigError(
            f"model {name!r} has its own {overridden[0]}, so qfast bench cannot time the parts of its epochs. Remedy: "
            "--models with a model of qfast."
        )


def _segments(estimator: Estimator, dataset: HandlerDataset, times: ModelTimes) -> Segments:
    train, valid = (estimator.load_segment(dataset, segment) for segment in ("train", "valid"))
    segments = Segments.of(estimator, train, valid)
    if not segments.by_day:
        wanted = segments.batch_size
        timed = min(wanted, LARGEST_BATCH, len(train), len(valid))
        if timed != wanted:
            setattr(estimator, "batch_size", timed)  # noqa: B010 - mypy does not know the attributes of arguments
            times.notes.append(f"batches of {timed:,} instead of {wanted:,} samples")
            segments = Segments.of(estimator, train, valid)
    times.batch_size = segments.batch_size
    return segments


def _reference(estimator: Estimator, sample: Sample, times: ModelTimes) -> Reference | None:
    """Qlib's model if it is installed and has the loss of the model, otherwise torch's layers.

    `times.reference_name` is set after the first call and restricts the choice of the next ones.
    """
    params = estimator.get_params()
    if params.get("loss") != "mse" or params.get("batch_by") == "day":
        return None
    kind = None if times.reference_name == TorchEpoch.title else qlib_class(estimator)
    if kind is not None:
        return QlibEpoch(kind, estimator, sample)
    return TorchEpoch(estimator, sample) if isinstance(estimator.network, PlainTorch) else None


def _pilot(estimator: Estimator, segments: Segments, times: ModelTimes) -> tuple[Sample, Reference | None, float]:
    """Run one batch on both sides, which warms up and measures memory. Returns the wall seconds of such a round too."""
    sample = segments.sample(1)
    start = time.perf_counter()
    with peak_memory() as peak:
        _our_epoch(estimator, sample, time.process_time)
    times.memory = peak.megabytes
    try:
        reference = _run_reference(estimator, sample, times)
    except Exception as error:  # raised by Qlib's code
        if qlib_class(estimator) is None:
            raise
        message = str(error).strip().splitlines() or [""]
        times.notes.append(
            f"Qlib's {type(estimator).__name__} fails with these arguments ({type(error).__name__}: {message[0]}), so "
            f"the reference is {TorchEpoch.title}"
        )
        times.reference_name = TorchEpoch.title
        reference = _run_reference(estimator, sample, times)
    return sample, reference, time.perf_counter() - start


def _run_reference(estimator: Estimator, sample: Sample, times: ModelTimes) -> Reference | None:
    """Build the reference, run it once, and measure its memory."""
    reference = _reference(estimator, sample, times)
    if reference is None:
        times.notes.append("no reference: its loss or network is not one of Qlib")
        return None
    with peak_memory() as peak:
        reference.seconds()
    times.reference_memory, times.reference_name = peak.megabytes, reference.title
    return reference


def _rounds(
    estimator: Estimator,
    sample: Sample,
    reference: Reference | None,
    times: ModelTimes,
    watch: Watch,
    deadline: float,
) -> None:
    """Alternate both sides until the time is over, and keep the lowest time of each."""
    ours: list[tuple[float, dict[str, float]]] = []
    theirs: list[float] = []
    while len(ours) < ROUNDS or time.perf_counter() < deadline:
        started = time.perf_counter()
        cpu = time.process_time()
        ours.append(_our_epoch(estimator, sample, time.process_time))
        if reference is not None:
            theirs.append(reference.seconds())
        wall = time.perf_counter() - started
        watch.add(time.process_time() - cpu, wall)
        if time.perf_counter() + wall > deadline and len(ours) > 1:
            break
    times.rounds = len(ours)
    times.epoch, times.parts = min(ours, key=lambda pair: pair[0])
    times.reference = min(theirs) if theirs else None


def _our_epoch(estimator: Estimator, sample: Sample, clock: Callable[[], float]) -> tuple[float, dict[str, float]]:
    """Seconds of a whole epoch by `fit`, and its parts."""
    windows = {"train": sample.train, "valid": sample.valid}

    def load_segment(dataset: Any, segment: str, reweighter: Any = None) -> WindowSet:
        return windows[segment]

    before = {name: getattr(estimator, name) for name in ("n_epochs", "progress")}
    loaded, epoch = EpochTimes(), {"n_epochs": 1, "progress": False}
    try:
        for name, value in epoch.items():
            setattr(estimator, name, value)
        with (
            _replaced(estimator, "load_segment", load_segment),
            _replaced(estimator, "_release_memory", lambda: None),  # a batch reuses the memory of the one before
            epoch_timers(estimator, sample.train, loaded, clock),
        ):
            estimator.fit(_Segments())
    finally:
        for name, value in before.items():
            setattr(estimator, name, value)
    parts = loaded.parts(sample.scale["train"], sample.scale)
    return sum(parts.values()), parts


def _threads_epoch(estimator: Estimator, sample: Sample, threads: int) -> tuple[float, float]:
    """Wall seconds of a whole epoch on several threads, and how many times longer one thread takes."""
    seconds: dict[int, list[float]] = {1: [], threads: []}
    for _ in range(ROUNDS):
        for count, epochs in seconds.items():
            with _threads(count):
                epochs.append(_our_epoch(estimator, sample, time.perf_counter)[0])
    one, several = map(min, seconds.values())
    return several, one / several


class _Segments:
    """A dataset of which `fit` reads only the names of the segments."""

    segments: Mapping[str, Bounds] = {"train": (None, None), "valid": (None, None)}

    def prepare(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("load_segment of the estimator is replaced")


@contextlib.contextmanager
def _replaced(target: object, name: str, value: object) -> Iterator[None]:
    """Set an attribute of an object that its class defines, for the time of the block."""
    setattr(target, name, value)
    try:
        yield
    finally:
        delattr(target, name)


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _add_rates(estimator: Estimator, segments: Segments, times: ModelTimes) -> None:
    """Multiply-adds per second of forward and backward, and bytes per second of the gather."""
    train = segments.train
    features, steps = _window_shape(estimator, train)
    work = training_multiply_adds(estimator.network, steps)
    calculating = times.parts["forward"] + times.parts["backward"]
    if work is not None and calculating > 0:
        times.products = work * len(train) / calculating
    if isinstance(train.features, Tensor) and times.parts["gather"] > 0:
        times.copies = 4.0 * len(train) * features * steps / times.parts["gather"]


def _window_shape(estimator: Estimator, windows: WindowSet) -> tuple[int, int]:
    """F and T."""
    columns = windows.features.shape[1]
    if windows.step_len is not None:
        return columns, windows.step_len
    features = int(estimator.get_params().get("d_feat", columns))
    return features, columns // features
