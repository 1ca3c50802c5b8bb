"""Training steps as CUDA graphs: the launches of a step are recorded once and then repeated with one call.

A step of the models here is tens to hundreds of kernels of a few microseconds, so what is asked of the GPU one by one
leaves it waiting. A batch size is run as it is written when it comes first, which shows whether the step waits for the
device, and recorded when it comes again; from then on a step is a copy of its sample numbers and a replay. Only what
Python did stays away from a replay: so whatever could change it is part of the `Fingerprint` under which a graph is
kept, and what must run each time (hooks) keeps a step from being recorded.

Source: CUDA graphs as in torch's notes on CUDA semantics, "whole network capture".
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from qfast import _backend
from qfast.data.batching import Batches
from qfast.nn.plain import has_hooks
from qfast.precision import precision, torchs_precision

if TYPE_CHECKING:
    from qfast.data.windows import WindowSet
    from qfast.training.estimator import Estimator

Step = Callable[[Tensor], Tensor]  # sample numbers int64 [B] -> detached loss, 0-d
Fingerprint = Hashable

MOST_GRAPHS = 64  # of different batch sizes; days of further sizes run as they are written

__all__ = ["CudaRecorder", "Recorder", "StepGraphs", "Steps", "fingerprint", "training_steps"]


class Recorder(Protocol):
    """What can record the work of a device and repeat it."""

    def work(self) -> AbstractContextManager[None]:
        """Everything of a training pass happens within it."""
        ...

    def waits(self, call: Callable[[], None]) -> str | None:
        """Make the call; where in it the host waited for the device, if it did."""
        ...

    def record(self, call: Callable[[], None]) -> Callable[[], None]:
        """What repeats the call's work; the call itself has no effect yet."""
        ...


class CudaRecorder:
    """A stream of its own, and graphs that share their memory.

    Sharing is safe: replays follow each other on the one stream, and what a graph leaves in its memory (the
    gradients) is held, so that no other is given that memory.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        with torch.cuda.device(device):
            self.stream = torch.cuda.Stream()
            self.pool = torch.cuda.graph_pool_handle()

    @contextmanager
    def work(self) -> Iterator[None]:
        with torch.cuda.device(self.device):
            outside = torch.cuda.current_stream()
            self.stream.wait_stream(outside)
            try:
                with torch.cuda.stream(self.stream):
                    yield
            finally:
                outside.wait_stream(self.stream)

    def waits(self, call: Callable[[], None]) -> str | None:
        before = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                call()
            finally:
                torch.cuda.set_sync_debug_mode(before)
        found = [w for w in caught if "synchronizing CUDA operation" in str(w.message)]
        for other in caught:
            if other not in found:
                warnings.warn_explicit(other.message, other.category, other.filename, other.lineno)
        return f"{found[0].filename}:{found[0].lineno}" if found else None

    def record(self, call: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
            call()
        return graph.replay


class Steps:
    """Training steps as they are written.

    Parameters
    ----------
    step : callable
        Runs a step for sample numbers int64 [B] and gives its loss, detached.
    device : torch.device
        Where the sample numbers live.
    """

    def __init__(self, step: Step, device: torch.device) -> None:
        self.step = step
        self.total = torch.zeros((), dtype=torch.float64, device=device)

    @contextmanager
    def training_pass(self, batches: Batches, watch: bool = False) -> Iterator[Callable[[int], Tensor]]:
        """Gives what runs the step of a batch, by its number, and returns the sum of the losses so far, [] float64.

        `watch`: what steps depend on may change between two of them, not only between two passes.
        """
        bounds = batches.bounds.tolist()
        self.total.zero_()

        def run(number: int) -> Tensor:
            self._make(batches.order[bounds[number] : bounds[number + 1]], watch)
            return self.total

        yield run

    def _make(self, samples: Tensor, watch: bool) -> None:
        self.total += self.step(samples)


class Recording(NamedTuple):
    """A step of one batch size: where its sample numbers go, what repeats it, where its gradients come."""

    samples: Tensor
    replay: Callable[[], None]
    gradients: list[tuple[Tensor, Tensor | None]]


class StepGraphs(Steps):
    """Training steps that are recorded once for each batch size.

    Parameters
    ----------
    step : callable
        As `Steps`. Must not depend on anything that neither the numbers nor `fingerprint` tell.
    fingerprint : callable
        What else a recorded step was recorded for, None while steps must not be recorded. Another one means new
        recordings.
    parameters : callable
        Gives the tensors that have the step's gradients afterwards.
    recorder : Recorder
    """

    def __init__(
        self,
        step: Step,
        device: torch.device,
        fingerprint: Callable[[], Fingerprint],
        parameters: Callable[[], Iterable[Tensor]],
        recorder: Recorder,
    ) -> None:
        super().__init__(step, device)
        self.fingerprint, self.parameters, self.recorder = fingerprint, parameters, recorder
        self.logger = logging.getLogger("qfast")
        self.tried: set[int] = set()  # batch sizes that ran as they are written
        self.replays: dict[int, Recording] = {}  # of the fingerprint, by batch size
        self.recorded_for: Fingerprint = None
        self.refusal: str | None = None  # why steps are not recorded any more

    @contextmanager
    def training_pass(self, batches: Batches, watch: bool = False) -> Iterator[Callable[[int], Tensor]]:
        with self.recorder.work(), super().training_pass(batches, watch) as run:
            self._look()
            yield run

    def _make(self, samples: Tensor, watch: bool) -> None:
        if watch:
            self._look()
        if not self._replay(samples):
            self._look()  # a first step makes the optimiser's state

    def _look(self) -> None:
        now = self.fingerprint()
        if now != self.recorded_for:
            self.replays.clear()
            self.recorded_for = now

    def _replay(self, samples: Tensor) -> bool:
        """Make the step; whether it was a replay."""
        size = len(samples)
        if size not in self.replays:
            fit = self.refusal is None and self.recorded_for is not None and len(self.replays) < MOST_GRAPHS
            if not fit or size not in self.tried:
                self._try(samples, fit)
                return False
            if not self._record(samples):
                self._add(samples)
                return False
        recording = self.replays[size]
        recording.samples.copy_(samples)
        recording.replay()
        for parameter, gradient in recording.gradients:
            parameter.grad = gradient
        return True

    def _add(self, samples: Tensor) -> None:
        self.total += self.step(samples)

    def _try(self, samples: Tensor, watched: bool) -> None:
        if not watched:
            return self._add(samples)
        where = self.recorder.waits(lambda: self._add(samples))
        self.tried.add(len(samples))
        if where is not None:
            self._refuse(f"they wait for the device ({where})")
        return None

    def _record(self, samples: Tensor) -> bool:
        numbers = samples.clone()
        try:
            replay = self.recorder.record(lambda: self._add(numbers))
        except RuntimeError as error:  # nothing of the step has run
            self._refuse(str(error).splitlines()[0])
            return False
        gradients = [(parameter, parameter.grad) for parameter in self.parameters()]
        self.replays[len(samples)] = Recording(numbers, replay, gradients)
        return True

    def _refuse(self, why: str) -> None:
        self.refusal = why
        self.replays.clear()
        self.logger.warning("training steps are launched kernel by kernel, not as CUDA graphs: %s", why)


def training_steps(estimator: Estimator, windows: WindowSet) -> Steps:
    """The steps of a fit: recorded ones where `cuda_graphs` asks for them and there is a GPU."""

    def step(samples: Tensor) -> Tensor:
        return estimator.train_step(windows, samples)

    recorder = recorder_for(estimator.device) if estimator.get_params()["cuda_graphs"] else None
    if recorder is None:
        return Steps(step, estimator.device)
    for group in estimator.train_optimizer.param_groups:
        if "capturable" in group:
            group["capturable"] = True  # the count of steps stays on the device
    # else it warns at each step that runs as it is written
    estimator.train_optimizer._warned_capturable_if_run_uncaptured = True
    return StepGraphs(
        step,
        estimator.device,
        fingerprint=lambda: fingerprint(estimator.network, estimator.train_optimizer),
        parameters=lambda: estimator.network.parameters(),
        recorder=recorder,
    )


def recorder_for(device: torch.device) -> Recorder | None:
    """What records on a device; None where nothing can."""
    return CudaRecorder(device) if device.type == "cuda" else None


def fingerprint(network: nn.Module, optimizer: torch.optim.Optimizer) -> Fingerprint:
    """What a recorded training step depends on.

    Modes, weights and their places, the optimiser's settings and state, and how products are computed.

    None where something in Python waits for each step.
    """
    if _has_step_hooks(network, optimizer):
        return None
    parameters = [
        (p.data_ptr(), p.requires_grad, tuple(_plain(value) for value in optimizer.state.get(p, {}).values()))
        for p in network.parameters()
    ]
    buffers = tuple(buffer.data_ptr() for buffer in network.buffers())
    settings = [
        tuple((name, _plain(value)) for name, value in group.items() if name != "params")
        for group in optimizer.param_groups
    ]
    modes = tuple(part.training for part in network.modules())
    how = precision(), torchs_precision(), _backend.cuda_layers
    return id(optimizer), tuple(parameters), buffers, tuple(settings), modes, how


def _plain(value: object) -> Hashable:
    if isinstance(value, Tensor):
        return value.data_ptr()
    return value if isinstance(value, (str, int, float, tuple, type(None))) else id(value)


def _has_step_hooks(network: nn.Module, optimizer: torch.optim.Optimizer) -> bool:
    """Whether something in Python waits for each step, which a replay would leave out."""
    if any(has_hooks(part) for part in network.modules()):
        return True
    if any(p._backward_hooks or p._post_accumulate_grad_hooks for p in network.parameters()):
        return True
    return (
        bool(optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks) or torch.is_anomaly_enabled()
    )
