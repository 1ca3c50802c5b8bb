"""Training steps as CUDA graphs: all kernel launches of a step are captured once and replayed with a single call.

A training step of these models launches tens to hundreds of kernels that take a few microseconds each. Launched one by
one from Python, they leave the GPU idle most of the time.

The first batch of each size runs eagerly, which also detects host synchronization. The second is captured as a CUDA
graph and replayed from then on: the sample numbers are copied into the graph's input, and one call repeats the step.
Libraries may synchronize once to initialize themselves: cuDNN's dropout does so in the first step after a seed was set.
If the first batch of a size synchronizes, the second therefore runs eagerly too, and the third is captured.

A replay runs no Python. Everything in Python that can change a step is therefore part of its `fingerprint`, and a new
fingerprint discards all graphs. Steps with hooks, which Python must call every time, always run eagerly. So do steps
that synchronize with the host (for example, a `loss_fn` that calls `.item()`) or that cannot be captured, with a
warning.

Source: "whole network capture" in the CUDA semantics notes of PyTorch.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from qfast import _backend
from qfast.nn.plain import has_hooks
from qfast.precision import precision, torch_precision
from qfast.training.callbacks import Callback

if TYPE_CHECKING:
    from qfast.data.windows import WindowSet
    from qfast.training.estimator import Estimator

Fingerprint = Hashable

_DROPOUT = ("p", "dropout")  # attributes of torch's modules with the probability of dropout

MAX_GRAPHS = 64  # batch sizes captured at the same time; batches of further sizes run eagerly

__all__ = ["CudaRecorder", "Fingerprint", "GraphedStep", "Recorder", "fingerprint", "graphed_step"]


class Recorder(Protocol):
    """Captures the work of a device and replays it."""

    def work(self) -> AbstractContextManager[None]:
        """Context in which all steps of an epoch run."""
        ...

    def run(self, step: GraphedStep, samples: Tensor) -> tuple[Tensor, str | None]:
        """Run the step eagerly. Return its loss and the source line that synchronized with the host, if any."""
        ...

    def capture(self, step: GraphedStep, samples: Tensor) -> tuple[Callable[[], None], Tensor]:
        """Capture the step without effect. Return a function that replays it and the loss that a replay overwrites."""
        ...


class CudaRecorder:
    """A CUDA stream for captures, and a memory pool that all its graphs share.

    Sharing the pool is safe because replays run one after another on one stream. `GraphedStep` holds references to the
    losses and gradients, which must outlive a replay, so no other graph reuses their memory.

    Parameters
    ----------
    device : torch.device
        A CUDA device.
    """

    # torch's allocators may hold pointers to a graph whose capture failed, so it must live as long as the process.
    failed: ClassVar[list[torch.cuda.CUDAGraph]] = []

    def __init__(self, device: torch.device) -> None:
        self.device = device
        with torch.cuda.device(device):
            self.stream = torch.cuda.Stream()
            self.pool = torch.cuda.graph_pool_handle()

    @contextmanager
    def work(self) -> Iterator[None]:
        """Run the block on the recorder's stream, ordered with the stream around it."""
        with torch.cuda.device(self.device):
            outside = torch.cuda.current_stream()
            self.stream.wait_stream(outside)
            try:
                with torch.cuda.stream(self.stream):
                    yield
            finally:
                outside.wait_stream(self.stream)

    def run(self, step: GraphedStep, samples: Tensor) -> tuple[Tensor, str | None]:
        """As `Recorder.run`, by torch's debug mode for synchronizing operations; other warnings are passed on."""
        previous_mode = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                loss = step.run_eagerly(samples)
            finally:
                torch.cuda.set_sync_debug_mode(previous_mode)
        synchronizing = [w for w in caught if "synchronizing CUDA operation" in str(w.message)]
        for other in caught:
            if other not in synchronizing:
                warnings.warn_explicit(other.message, other.category, other.filename, other.lineno)
        return loss, f"{synchronizing[0].filename}:{synchronizing[0].lineno}" if synchronizing else None

    def capture(self, step: GraphedStep, samples: Tensor) -> tuple[Callable[[], None], Tensor]:
        """As `Recorder.capture`. After a failure the device works as before."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
                loss = step.run_eagerly(samples)
        except BaseException:
            self._end_failed_capture(graph)
            raise
        return graph.replay, loss

    def _end_failed_capture(self, graph: torch.cuda.CUDAGraph) -> None:
        """Do what `CUDAGraph.capture_end` leaves out if the capture is invalid.

        Without this, the allocator still serves the graph's pool, and torch's generator still expects a capture, which
        makes the next random operation fail.
        """
        self.failed.append(graph)
        index = torch.cuda.current_device()
        try:
            torch._C._cuda_endAllocateToPool(index, self.pool)
        except RuntimeError:  # capture_end was complete: the step failed, not the capture
            return
        with suppress(RuntimeError):  # the error of the step must not be replaced by another one
            torch._C._cuda_releasePool(index, self.pool)
        with suppress(RuntimeError), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns that the graph is empty
            with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=self.stream):
                pass  # the end of a valid capture resets the generator


class CapturedStep(NamedTuple):
    """The graph of one batch size, with the tensors it reads and writes.

    Attributes
    ----------
    samples : Tensor
        int64 [B], the graph's input: sample numbers are copied here before a replay.
    replay : callable
        Repeats the step.
    loss : Tensor
        0-d, the detached loss of the last replay.
    gradients : list of (parameter, gradient)
        The gradients that a replay writes, to be attached to the parameters afterwards.
    """

    samples: Tensor
    replay: Callable[[], None]
    loss: Tensor
    gradients: Sequence[tuple[nn.Parameter, Tensor | None]]


class GraphedStep:
    """The training step of an estimator, captured once per batch size and replayed from then on.

    Call it like a plain step, in `with step.epoch():`. `step(samples)` accepts sample numbers, int64 [B], and returns
    the detached loss, 0-d. The next call with the same batch size overwrites that tensor.

    Parameters
    ----------
    estimator : Estimator
        Its `train_step` must depend only on its arguments, on weights and buffers, and on what `fingerprint` covers.
    windows : WindowSet
        The training samples.
    recorder : Recorder
    """

    def __init__(self, estimator: Estimator, windows: WindowSet, recorder: Recorder) -> None:
        self.estimator, self.windows, self.recorder = estimator, windows, recorder
        self.logger = logging.getLogger("qfast")
        self.sizes_ready: set[int] = set()  # batch sizes that have run eagerly without synchronization
        self.sizes_synchronized: set[int] = set()  # batch sizes whose first batch synchronized
        self.captured: dict[int, CapturedStep] = {}  # by batch size, all for `captured_for`
        self.captured_for: Fingerprint = None
        self.refusal: str | None = None  # why no step is captured any more
        self.watched = False  # callbacks run between steps and may change the fingerprint

    @contextmanager
    def epoch(self) -> Iterator[None]:
        """Context for the steps of one epoch."""
        self.watched = any(type(c).on_batch_end is not Callback.on_batch_end for c in self.estimator.callbacks_)
        with self.recorder.work():
            self._check_fingerprint()
            yield

    def __call__(self, samples: Tensor) -> Tensor:
        if self.watched:
            self._check_fingerprint()
        size = len(samples)
        if size in self.captured or (size in self.sizes_ready and self._may_capture() and self._capture(samples)):
            return self._replay(self.captured[size], samples)
        if size not in self.sizes_ready and self._may_capture():
            loss = self._run_observed(samples)
        else:
            loss = self.run_eagerly(samples)
        self._check_fingerprint()  # the first step of a fit creates the optimizer's state
        return loss

    def run_eagerly(self, samples: Tensor) -> Tensor:
        """Run the estimator's step kernel by kernel and return its loss."""
        return self.estimator.train_step(self.windows, samples)

    def _check_fingerprint(self) -> None:
        """Discard all graphs if anything they depend on has changed."""
        current = fingerprint(self.estimator.network, self.estimator.train_optimizer)
        if current != self.captured_for:
            self.captured.clear()
            self.captured_for = current

    def _may_capture(self) -> bool:
        return self.refusal is None and self.captured_for is not None and len(self.captured) < MAX_GRAPHS

    def _run_observed(self, samples: Tensor) -> Tensor:
        """Run a batch eagerly. Refuse to capture if it is the second of its size that synchronizes with the host."""
        loss, line = self.recorder.run(self, samples)
        size = len(samples)
        if line is None:
            self.sizes_ready.add(size)
        elif size in self.sizes_synchronized:
            self._refuse(f"they synchronize with the host ({line})")
        else:
            self.sizes_synchronized.add(size)
        return loss

    def _capture(self, samples: Tensor) -> bool:
        """Capture the step for this batch size. Returns False if that fails; then no part of the step has run."""
        graph_samples = samples.clone()
        try:
            replay, loss = self.recorder.capture(self, graph_samples)
        except RuntimeError as error:
            self._refuse(str(_first_error(error)).splitlines()[0])
            return False
        gradients = [(parameter, parameter.grad) for parameter in self.estimator.network.parameters()]
        self.captured[len(samples)] = CapturedStep(graph_samples, replay, loss, gradients)
        return True

    def _replay(self, captured: CapturedStep, samples: Tensor) -> Tensor:
        captured.samples.copy_(samples)
        captured.replay()
        for parameter, gradient in captured.gradients:
            parameter.grad = gradient
        return captured.loss

    def _refuse(self, reason: str) -> None:
        self.refusal = reason
        self.captured.clear()
        self.logger.warning("training steps are launched kernel by kernel, not as CUDA graphs: %s", reason)


def graphed_step(estimator: Estimator, windows: WindowSet) -> GraphedStep | None:
    """The estimator's training step as CUDA graphs; None if its device cannot record them."""
    recorder = recorder_for(estimator.device)
    if recorder is None:
        return None
    for group in estimator.train_optimizer.param_groups:
        if "capturable" in group:
            group["capturable"] = True  # keeps the number of steps on the device
    # Without this torch warns at every step that a capturable optimizer runs outside of a graph.
    estimator.train_optimizer._warned_capturable_if_run_uncaptured = True
    return GraphedStep(estimator, windows, recorder)


def _first_error(error: BaseException) -> BaseException:
    """The error that occurred first: an invalid capture raises another one when it ends."""
    while error.__context__ is not None:
        error = error.__context__
    return error


def recorder_for(device: torch.device) -> Recorder | None:
    """The recorder of a device; None for the CPU."""
    return CudaRecorder(device) if device.type == "cuda" else None


def fingerprint(network: nn.Module, optimizer: torch.optim.Optimizer) -> Fingerprint:
    """Returns a hashable key for everything the captured step depends on, or None if the step must not be captured.

    The key covers the modes and dropout probabilities of all modules, the addresses of parameters, buffers and
    optimizer state, which parameters require a gradient, the optimizer's settings, the precision of matrix products,
    autocast, and the choices of cuDNN. A step with hooks, or in torch's anomaly mode, must not be captured.
    """
    if _has_step_hooks(network, optimizer):
        return None
    parameters = [
        (p.data_ptr(), p.requires_grad, tuple(_hashable(value) for value in optimizer.state.get(p, {}).values()))
        for p in network.parameters()
    ]
    buffers = tuple(buffer.data_ptr() for buffer in network.buffers())
    settings = [
        tuple((name, _hashable(value)) for name, value in group.items() if name != "params")
        for group in optimizer.param_groups
    ]
    modes = tuple((part.training, *(_hashable(getattr(part, n, None)) for n in _DROPOUT)) for part in network.modules())
    cudnn: Any = torch.backends.cudnn
    choices = (
        cudnn.enabled,
        cudnn.deterministic,
        cudnn.benchmark,
        cudnn.conv.fp32_precision,  # cudnn.allow_tf32 sets both and raises an error if they differ
        cudnn.rnn.fp32_precision,
    )
    autocast = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    arithmetic = precision(), torch_precision(), _backend.cuda_layers, choices, autocast
    return id(optimizer), tuple(parameters), buffers, tuple(settings), modes, arithmetic


def _hashable(value: object) -> Hashable:
    if isinstance(value, Tensor):
        return value.data_ptr()
    return value if isinstance(value, (str, int, float, tuple, type(None))) else id(value)


def _has_step_hooks(network: nn.Module, optimizer: torch.optim.Optimizer) -> bool:
    """Whether Python code runs within each step, which a replay would skip."""
    if any(has_hooks(part) for part in network.modules()):
        return True
    if any(p._backward_hooks or p._post_accumulate_grad_hooks for p in network.parameters()):
        return True
    return (
        bool(optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks) or torch.is_anomaly_enabled()
    )
