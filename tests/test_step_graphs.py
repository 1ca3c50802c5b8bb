"""Recorded training steps on the CPU, with a recorder that replays torch's operations instead of running Python.

It behaves like a CUDA graph: recording has no side effects, a replay runs no Python, reads and
writes the memory of the recorded step, and cannot hand a number to the host.
"""

from __future__ import annotations

import copy
import logging
import weakref
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from qfast.data.batching import Batches
from qfast.models import GRU, LSTM, GATs, ts
from qfast.precision import using_precision
from qfast.training import step_graphs
from qfast.training.callbacks import Callback
from qfast.training.step_graphs import CudaRecorder, GraphedStep, fingerprint
from support.fits import assert_states_equal, dataset_for, device_model, parametrize_estimators
from support.frames import flat, rolling

TO_THE_HOST = ("aten._local_scalar_dense", "aten.nonzero", "aten.equal", "aten.is_nonzero", "aten.unique")


def tensors_of(tree) -> list[torch.Tensor]:
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, torch.Tensor)]


class Tape(TorchDispatchMode):
    """Records every operation with its inputs and outputs. Tensors that it writes are restored at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.played: list[tuple] = []
        self.before: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = str(func)
        if name.startswith(TO_THE_HOST):
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
        for argument, arguments in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for tensor in tensors_of(arguments):
                    self.before.setdefault(id(tensor), (tensor, tensor.detach().clone()))
        out = func(*args, **kwargs)
        self.played.append((func, args, kwargs, out))
        return out

    def replay(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, out in self.played:
                again = func(*args, **kwargs)
                for saved, fresh in zip(tensors_of(out), tensors_of(again), strict=True):
                    if saved.data_ptr() != fresh.data_ptr():
                        saved.copy_(fresh)


class TapeRecorder:
    """Records torch's operations on the CPU.

    `run` reports a line that waited for the device in its first `waits` calls, or always if `waits` is None.
    """

    def __init__(self, waits: int | None = 0) -> None:
        self.tried = self.recorded = self.replayed = 0
        self.waits = waits

    def work(self):
        return nullcontext()

    def run(self, step, samples):
        self.tried += 1
        waits = self.waits is None or self.tried <= self.waits
        return step.run_eagerly(samples), "losses.py:7" if waits else None

    def capture(self, step, samples):
        generator = torch.get_rng_state()
        tape = Tape()
        try:
            with tape:
                loss = step.run_eagerly(samples)
        finally:
            torch.set_rng_state(generator)
            for tensor, value in tape.before.values():
                tensor.detach().copy_(value)
        self.recorded += 1

        def replay() -> None:
            self.replayed += 1
            tape.replay()

        return replay, loss


@pytest.fixture
def recorder(monkeypatch):
    made = TapeRecorder()
    monkeypatch.setattr(step_graphs, "recorder_for", lambda device: made)
    return made


# ---------------------------------------------------------------- models
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@parametrize_estimators()
def test_recorded_steps_train_to_the_same_bits(kind, dropout, recorder):
    plain = device_model(kind, "cpu", dropout=dropout).fit(dataset_for(kind))
    assert recorder.recorded == 0
    model = device_model(kind, "cpu", dropout=dropout, cuda_graphs=True).fit(dataset_for(kind))
    assert_states_equal(model, plain)
    assert recorder.replayed > recorder.recorded > 0
    sizes = 1 if not issubclass(kind, GATs | ts.GATs) else recorder.recorded  # days differ in size
    assert recorder.recorded == recorder.tried == sizes


def test_plain_gradient_descent_is_recorded_as_well(recorder):
    pair = [device_model(GRU, "cpu", optimizer="gd", cuda_graphs=on).fit(flat()) for on in (False, True)]
    assert_states_equal(*pair)
    assert recorder.replayed > 0


def test_a_resumed_fit_uses_recorded_steps(recorder, tmp_path):
    whole = device_model(ts.LSTM, "cpu", n_epochs=3, dropout=0.3, cuda_graphs=True).fit(rolling())
    device_model(ts.LSTM, "cpu", n_epochs=1, dropout=0.3).fit(rolling(), checkpoint_dir=tmp_path)
    resumed = device_model(ts.LSTM, "cpu", n_epochs=3, dropout=0.3, cuda_graphs=True)
    resumed.fit(rolling(), checkpoint_dir=tmp_path, resume=True)
    assert_states_equal(resumed, whole)


def test_sample_weights_are_recorded(recorder):
    class Growing:
        def reweight(self, samples):
            return np.linspace(0.1, 2.0, len(samples))

    pair = [device_model(ts.LSTM, "cpu", cuda_graphs=on).fit(rolling(), reweighter=Growing()) for on in (False, True)]
    assert_states_equal(*pair)
    assert recorder.replayed > 0


# ---------------------------------------------------------------- changes during a fit
class EachEpoch(Callback):
    def __init__(self, change) -> None:
        self.change = change

    def on_epoch_start(self, estimator):
        self.change(estimator)


class EachBatch(Callback):
    def __init__(self, change) -> None:
        self.change, self.seen = change, 0

    def on_batch_end(self, estimator):
        self.seen += 1
        self.change(estimator, self.seen)


def halve(estimator) -> None:
    for group in estimator.train_optimizer.param_groups:
        group["lr"] *= 0.5


def freeze_later(estimator, batch) -> None:
    estimator.network.fc_out.weight.requires_grad_(batch < 3)


def other_weights(estimator, batch) -> None:
    if batch == 4:
        with torch.no_grad():
            estimator.network.fc_out.bias.add_(1.0)
    if batch == 6:
        estimator.network.fc_out.bias.data = torch.full((1,), 0.5)


def other_state(estimator, batch) -> None:
    if batch == 4:
        state = copy.deepcopy(estimator.train_optimizer.state_dict())
        for entries in state["state"].values():
            entries["exp_avg"] *= 0.5
        estimator.train_optimizer.load_state_dict(state)


@pytest.mark.parametrize(
    "callback",
    [
        lambda: EachEpoch(halve),
        lambda: EachBatch(freeze_later),
        lambda: EachBatch(other_weights),
        lambda: EachBatch(lambda e, batch: e.network.train(batch % 5 > 0)),
        lambda: EachBatch(other_state),
    ],
    ids=["lr", "freezing", "weights", "mode", "optimizer state"],
)
def test_changes_by_a_callback_take_effect(callback, recorder):
    pair = []
    for on in (False, True):
        model = device_model(ts.LSTM, "cpu", n_epochs=3, dropout=0.4, cuda_graphs=on)
        pair.append(model.fit(rolling(), callbacks=[callback()]))
    assert_states_equal(*pair)
    assert recorder.recorded > 1


class Gradients(Callback):
    def __init__(self) -> None:
        self.norms: list[float] = []

    def on_batch_end(self, estimator):
        self.norms += [float(p.grad.norm()) for p in estimator.network.parameters()]


@parametrize_estimators([ts.GATs, LSTM])
def test_a_callback_sees_the_gradients_of_its_step(kind, recorder):
    """Also where days of different sizes alternate."""
    seen = []
    for on in (False, True):
        seen.append(Gradients())
        device_model(kind, "cpu", n_epochs=3, cuda_graphs=on).fit(dataset_for(kind), callbacks=[seen[-1]])
    assert recorder.replayed > 0
    assert seen[0].norms == seen[1].norms


def test_hooks_are_called_at_every_step(recorder):
    calls = []
    model = device_model(ts.LSTM, "cpu", cuda_graphs=True)
    handle = model.network.fc_out.register_forward_hook(lambda *_: calls.append(1))
    model.fit(rolling())
    steps = model.data_["train"] // 32
    assert recorder.recorded == 0
    assert len(calls) > 2 * steps
    handle.remove()
    model.train_optimizer.register_step_post_hook(lambda *_: calls.append(1))
    model.fit(rolling())
    assert recorder.recorded == 0


def test_a_step_that_waits_is_not_recorded(monkeypatch, caplog):
    made = TapeRecorder(waits=None)
    monkeypatch.setattr(step_graphs, "recorder_for", lambda device: made)
    plain = device_model(LSTM, "cpu").fit(flat())
    with caplog.at_level(logging.WARNING, "qfast"):
        model = device_model(LSTM, "cpu", cuda_graphs=True).fit(flat())
    assert_states_equal(model, plain)
    assert made.recorded == 0
    assert made.tried == 2
    warning = (
        "training steps are launched kernel by kernel, not as CUDA graphs: they synchronize with the host (losses.py:7)"
    )
    assert [r.message for r in caplog.records].count(warning) == 1


@parametrize_estimators()
def test_a_wait_in_the_first_step_is_initialization(kind, monkeypatch, caplog):
    """cuDNN initializes dropout in the first step after a seed was set, and waits for the device."""
    made = TapeRecorder(waits=1)
    monkeypatch.setattr(step_graphs, "recorder_for", lambda device: made)
    plain = device_model(kind, "cpu", n_epochs=4, dropout=0.4).fit(dataset_for(kind))
    with caplog.at_level(logging.WARNING, "qfast"):
        model = device_model(kind, "cpu", n_epochs=4, dropout=0.4, cuda_graphs=True).fit(dataset_for(kind))
    assert_states_equal(model, plain)
    assert made.replayed > made.recorded > 0
    assert made.tried == made.recorded + 1  # only the first batch size runs eagerly twice
    assert "not as CUDA graphs" not in caplog.text


def test_each_batch_size_may_wait_once():
    table = torch.arange(12.0)
    recorder = TapeRecorder(waits=2)
    plain, graphed = Accumulator(table), GraphedStep(Accumulator(table), None, recorder)
    batches = [torch.arange(3), torch.arange(4)] * 3
    expected = [float(plain.train_step(None, samples)) for samples in batches]
    with graphed.epoch():
        assert [float(graphed(samples)) for samples in batches] == expected
    assert (recorder.tried, recorder.recorded, recorder.replayed) == (4, 2, 2)


class Curious(ts.LSTM):
    """A custom loss that reads values on the host."""

    def loss_fn(self, prediction, label, weight):
        loss = super().loss_fn(prediction, label, weight)
        return loss * 2 if float(loss.detach()) > 1 else loss


def test_a_step_that_cannot_be_recorded_runs_as_it_is_written(recorder, caplog):
    kwargs = {"d_feat": 3, "hidden_size": 8, "n_epochs": 2, "batch_size": 32, "seed": 1, "device": "cpu"}
    plain = Curious(**kwargs).fit(rolling())
    with caplog.at_level(logging.WARNING, "qfast"):
        model = Curious(**kwargs, cuda_graphs=True).fit(rolling())
    assert_states_equal(model, plain)
    assert recorder.replayed == 0
    assert sum("not as CUDA graphs: operation not permitted" in r.message for r in caplog.records) == 1


def test_recordings_go_with_the_fit(recorder):
    model = device_model(ts.LSTM, "cpu", cuda_graphs=True)
    model.fit(rolling())
    assert model._graphed_step is None


class Accumulator:
    """An estimator whose step halves its one state and adds the chosen numbers of a table to it."""

    def __init__(self, table: torch.Tensor) -> None:
        self.table, self.state = table, torch.zeros(())
        self.network, self.callbacks_ = torch.nn.Linear(1, 1), []
        self.train_optimizer = torch.optim.SGD(self.network.parameters(), lr=0.1)

    def train_step(self, windows, samples):
        self.state.mul_(0.5).add_(self.table[samples].sum())
        return self.state.detach() * 2


# ---------------------------------------------------------------- a capture that fails on CUDA
class FakeCuda:
    """What torch.cuda does around a capture, without a device.

    As in torch 2.11, ending an invalid capture raises an error and leaves the pool and the generator in the state of a
    capture. `invalid` makes the next capture invalid.
    """

    def __init__(self, monkeypatch) -> None:
        self.invalid = self.generator_captures = False
        self.serving: dict[object, object] = {}  # graph of each pool
        self.released: list[object] = []
        self.captures = 0
        fake = self

        class CUDAGraph:
            def replay(self) -> None:
                pass

        class Capture:
            def __init__(self, graph, pool="pool of its own", stream=None) -> None:
                self.graph, self.pool = graph, pool

            def __enter__(self) -> None:
                assert self.pool not in fake.serving, "beginAllocateToPool: already recording to mempool_id"
                fake.captures += 1
                fake.serving[self.pool] = weakref.ref(self.graph)
                fake.generator_captures = True

            def __exit__(self, *error: object) -> None:
                if fake.invalid:
                    fake.invalid = False
                    raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
                del fake.serving[self.pool]
                fake.generator_captures = False

        def end_allocate(index: int, pool: object) -> None:
            if pool not in fake.serving:
                raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
            del fake.serving[pool]

        for name, value in {
            "CUDAGraph": CUDAGraph,
            "graph": Capture,
            "Stream": object,
            "graph_pool_handle": lambda: "shared pool",
            "device": lambda device: nullcontext(),
            "current_device": lambda: 0,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end_allocate, raising=False)
        release = lambda index, pool: self.released.append(pool)  # noqa: E731
        monkeypatch.setattr(torch._C, "_cuda_releasePool", release, raising=False)
        monkeypatch.setattr(CudaRecorder, "failed", [])
        monkeypatch.setattr(CudaRecorder, "work", lambda self: nullcontext())
        monkeypatch.setattr(CudaRecorder, "run", lambda self, step, samples: (step.run_eagerly(samples), None))

    def random(self) -> None:
        """As a random operation outside of a capture."""
        if self.generator_captures:
            raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")


class Drawing(Accumulator):
    """Draws a random number in each step; `fail` is called in captures."""

    def __init__(self, table, cuda, fail) -> None:
        super().__init__(table)
        self.cuda, self.fail = cuda, fail

    def train_step(self, windows, samples):
        if self.cuda.serving:
            self.fail()
        else:
            self.cuda.random()
        return super().train_step(windows, samples)


@pytest.fixture
def cuda(monkeypatch):
    return FakeCuda(monkeypatch)


def test_a_failed_capture_leaves_the_process_usable(cuda, caplog):
    def nonzero() -> None:
        cuda.invalid = True
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nCUDA kernel errors might")

    plain, recorder = Accumulator(torch.arange(12.0)), CudaRecorder(torch.device("cuda"))
    graphed = GraphedStep(Drawing(torch.arange(12.0), cuda, nonzero), None, recorder)
    batches = list(Batches.of_size(torch.arange(12), 3, drop_last=True))
    expected = [float(plain.train_step(None, samples)) for samples in batches]
    with caplog.at_level(logging.WARNING, "qfast"), graphed.epoch():
        assert [float(graphed(samples)) for samples in batches] == expected
    assert cuda.serving == {}
    assert cuda.released == ["shared pool"]
    assert cuda.captures == 2  # the second is empty
    assert len(CudaRecorder.failed) == 1  # torch's host allocator may point to it
    assert "not as CUDA graphs: CUDA error: operation not permitted when stream is capturing" in caplog.text
    cuda.random()


def test_an_error_of_a_step_in_a_valid_capture(cuda):
    """torch has ended the capture, so nothing is released a second time."""

    def interrupted() -> None:
        raise KeyboardInterrupt

    recorder = CudaRecorder(torch.device("cuda"))
    graphed = GraphedStep(Drawing(torch.arange(12.0), cuda, interrupted), None, recorder)
    with graphed.epoch():
        graphed(torch.arange(3))
        with pytest.raises(KeyboardInterrupt):
            graphed(torch.arange(3))
    assert cuda.captures == 1
    assert cuda.released == []
    cuda.random()


# ---------------------------------------------------------------- the step alone
def test_more_batch_sizes_than_graphs(monkeypatch):
    monkeypatch.setattr(step_graphs, "MAX_GRAPHS", 2)
    table = torch.arange(40.0)
    bounds = torch.tensor([0, 5, 8, 12, 17, 20, 24, 29, 32, 36, 40])
    batches = Batches(torch.randperm(40), bounds, len(bounds) - 1)
    recorder = TapeRecorder()
    plain, estimator = Accumulator(table), Accumulator(table)
    graphed = GraphedStep(estimator, None, recorder)
    for _ in range(2):
        expected = [float(plain.train_step(None, samples)) for samples in batches]
        with graphed.epoch():
            assert [float(graphed(samples)) for samples in batches] == expected
        assert torch.equal(estimator.state, plain.state)
    assert recorder.recorded == 2
    assert recorder.replayed > 4


def test_an_interrupted_epoch_leaves_nothing_behind():
    table = torch.arange(12.0)
    batches = list(Batches.of_size(torch.arange(12), 3, drop_last=True))
    plain, graphed = Accumulator(table), GraphedStep(Accumulator(table), None, TapeRecorder())

    def interrupted() -> None:
        with graphed.epoch():
            for samples in batches[:3]:
                graphed(samples)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    expected = [float(plain.train_step(None, samples)) for samples in (*batches[:3], batches[0])]
    with graphed.epoch():
        assert float(graphed(batches[0])) == expected[-1]


def test_a_fit_without_cuda_graphs_calls_train_step_directly(monkeypatch):
    monkeypatch.setattr(step_graphs, "recorder_for", lambda device: pytest.fail("no recorder is needed"))
    model = device_model(LSTM, "cpu", n_epochs=1).fit(flat())
    assert len(model.history_) == 1


def test_how_products_are_computed_is_part_of_a_recording():
    model = device_model(LSTM, "cpu")
    seen = {fingerprint(model.network, model.train_optimizer)}
    with using_precision("tf32"):
        seen.add(fingerprint(model.network, model.train_optimizer))
    before = torch.get_float32_matmul_precision()
    try:
        for name in ("high", "medium"):
            torch.set_float32_matmul_precision(name)
            with using_precision("ieee"):
                seen.add(fingerprint(model.network, model.train_optimizer))
    finally:
        torch.set_float32_matmul_precision(before)
    assert len(seen) == 4
    assert fingerprint(model.network, model.train_optimizer) in seen


@pytest.mark.parametrize(
    ("owner", "name", "value"),
    [
        (torch.backends.cudnn, "allow_tf32", False),
        (torch.backends.cudnn.rnn, "fp32_precision", "ieee"),
        (torch.backends.cudnn, "deterministic", True),
        (torch.backends.cudnn, "benchmark", True),
        (torch.backends.cudnn, "enabled", False),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_choices_of_cudnn_are_part_of_a_recording(owner, name, value, monkeypatch):
    model = device_model(LSTM, "cpu")
    before = fingerprint(model.network, model.train_optimizer)
    monkeypatch.setattr(owner, name, value)
    assert fingerprint(model.network, model.train_optimizer) != before


def test_autocast_is_part_of_a_recording():
    model = device_model(LSTM, "cpu")
    before = fingerprint(model.network, model.train_optimizer)
    torch.set_autocast_enabled("cuda", True)
    try:
        assert fingerprint(model.network, model.train_optimizer) != before
    finally:
        torch.set_autocast_enabled("cuda", False)


@parametrize_estimators()
def test_dropout_is_part_of_a_recording(kind):
    model = device_model(kind, "cpu", dropout=0.4)
    before = fingerprint(model.network, model.train_optimizer)
    for part in model.network.modules():
        for name in ("p", "dropout"):
            if isinstance(getattr(part, name, None), float):
                setattr(part, name, 0.2)
    assert fingerprint(model.network, model.train_optimizer) != before


def test_the_option_is_checked():
    with pytest.raises(ValueError, match=r"cuda_graphs must be True or False, got 'yes'"):
        device_model(LSTM, "cpu", cuda_graphs="yes")
