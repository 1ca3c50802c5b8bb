"""LSTM and GRU stacks on a GPU: the CUDA kernels compared with the definition in float64.

Sizes cover every form of the kernels (recurrent_launch.cuh): weights in registers up to 64 units of float32,
beyond that in shared memory up to about 110, else in L2; tiles of 8 rows, or 16 from 2,112 rows on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from qfast.ops import gru, lstm
from qfast.ops.recurrent import self_test
from qfast.ops.recurrent_twin import GRU, LSTM, Cell, backward_twin, forward_twin
from support.devices import DEVICE, assert_no_synchronization, long_on_host, needs_gpu, needs_kernels

pytestmark = needs_kernels
CELLS = {"lstm": LSTM, "gru": GRU}
CALLS: dict[str, Callable[..., Any]] = {"lstm": lstm, "gru": gru}
F32, F64 = torch.float32, torch.float64


class Case(NamedTuple):
    batch: int
    steps: int
    features: int
    hidden: int
    layers: int = 1
    all_steps: bool = False
    state: bool = False
    dropout: float = 0.0
    layout: str = "plain"

    def __str__(self) -> str:
        sizes = "-".join(map(str, self[:5]))
        flags = [name for name in ("all_steps", "state", "dropout") if getattr(self, name)]
        return "-".join([sizes, *flags, self.layout])


CASES = [
    Case(0, 3, 2, 5, 2, True, True),
    Case(3, 0, 2, 5, 2, False, True),
    Case(1, 1, 1, 1),
    Case(2, 7, 6, 2, 3, True, True, 0.3),
    Case(13, 20, 6, 7, 2, False, False, 0.3, "features first"),
    Case(9, 5, 20, 16, 1, True, False, 0.0, "windows"),
    Case(33, 20, 20, 32, 2, False, False, 0.2),
    Case(17, 6, 3, 33, 2, True, True, 0.5, "windows"),
    Case(100, 20, 20, 64, 2, False, False, 0.2),
    Case(5, 9, 158, 65, 2, True, True),
    Case(13, 8, 6, 100, 2, False, False, 0.0, "steps of a larger tensor"),
    Case(20, 6, 6, 128, 2, True, False, 0.3, "repeated"),
    Case(9, 4, 20, 256, 2, False, True),
    Case(5, 3, 6, 512, 1, True, True),
    Case(2120, 3, 4, 66, 2, False, True, 0.3),
    Case(7, 250, 6, 19, 1, False, False, 0.0, "windows"),
]


def draw(rng: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=rng, dtype=F64)


def input_like(rng: torch.Generator, case: Case, dtype: torch.dtype, device: str) -> Tensor:
    """[B, T, F] in the case's layout, the same numbers in float32 and float64."""
    batch, steps, features = case[:3]

    def numbers(*shape: int) -> Tensor:
        return draw(rng, *shape).float().to(device, dtype)

    if case.layout == "windows":
        return numbers(batch + max(steps, 1), features).unfold(0, max(steps, 1), 1)[:batch].transpose(1, 2)[:, :steps]
    if case.layout == "features first":
        return numbers(batch, features * steps).view(batch, features, steps).transpose(1, 2)
    if case.layout == "steps of a larger tensor":
        return numbers(batch, steps + 3, features + 2)[:, 1 : steps + 1, 2:]
    if case.layout == "repeated":
        return numbers(1, 1, features).expand(batch, steps, features)
    return numbers(batch, steps, features)


class Given(NamedTuple):
    """Arguments of the raw operators."""

    x: Tensor
    weights: list[Tensor]
    state: list[Tensor]
    dropout: float
    seed: Tensor | None
    all_steps: bool

    def flat(self, cell: Cell) -> tuple[Any, ...]:
        return self.x, self.weights, *(*self.state, None, None)[: len(cell.state_names)], *self[3:]


def arguments(
    cell: Cell, case: Case, dtype: torch.dtype, device: str, seed: int = 12345678901, scale: float = 1.0
) -> Given:
    rng = torch.Generator().manual_seed(case.batch + 7 * case.hidden + case.steps)
    x = input_like(rng, case, dtype, device)
    gates, weights = cell.gates * case.hidden, []
    for layer in range(case.layers):
        columns = case.features if layer == 0 else case.hidden
        shapes = (gates, columns), (gates, case.hidden), (gates,), (gates,)
        weights += [draw(rng, *shape) / case.hidden**0.5 * scale for shape in shapes]
    state = [draw(rng, case.layers, case.batch, case.hidden) for _ in cell.state_names] if case.state else []
    weights, state = ([part.float().to(device, dtype) for part in parts] for parts in (weights, state))
    dropout = case.dropout if case.layers > 1 else 0.0
    return Given(x, weights, state, dropout, torch.tensor([seed], device=device) if dropout else None, case.all_steps)


def gradients_like(values: list[Tensor]) -> list[Tensor]:
    rng = torch.Generator().manual_seed(1)
    return [draw(rng, *value.shape).float().to(value.device, value.dtype) for value in values]


def forward_and_backward(cell: Cell, arguments: Given) -> list[Tensor]:
    """Output, states, gradients of x, of the initial state and of the weights, by the raw operators."""
    ops, n = torch.ops.qfast, 1 + len(cell.state_names)
    flat = arguments.flat(cell)
    result = getattr(ops, cell.name)(*flat, True)
    back = getattr(ops, f"{cell.name}_backward")(*gradients_like(result[:n]), *flat, *result[n:], True, True)
    return [*result[:n], *back[:-1], *back[-1]]


def by_definition(cell: Cell, arguments: Given) -> list[Tensor]:
    n, inputs = 1 + len(cell.state_names), arguments[:3]
    dropout, seed, all_steps = arguments[3:]
    result = forward_twin(cell, *inputs, dropout, seed, all_steps, True)
    grads = gradients_like(list(result[:n]))
    saved = result[n], result[n + 1]
    back = backward_twin(cell, grads[0], grads[1:], *inputs, dropout, seed, all_steps, *saved, True, True)
    return [*result[:n], *back[:-1], *back[-1]]


def relative(result: Tensor, exact: Tensor) -> float:
    assert result.shape == exact.shape
    result, exact = result.detach().cpu().double(), exact.detach()
    error, size = float((result - exact).norm()), float(exact.norm())
    return error / size if size > 1e-12 else error  # after 250 steps the influence of the initial state is small


@pytest.fixture(params=CELLS)
def cell(request: pytest.FixtureRequest) -> Cell:
    return CELLS[request.param]


@pytest.fixture(params=[20, 64, 100, 130])
def hidden(request: pytest.FixtureRequest) -> int:
    return request.param


def test_self_test(cell: Cell) -> None:
    self_test(cell.name, torch.device(DEVICE))


def test_the_cuda_kernels_are_registered(cell: Cell) -> None:
    for name in (cell.name, f"{cell.name}_backward"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"qfast::{name}", DEVICE.upper())


# ---------------------------------------------------------------- accuracy
@pytest.mark.parametrize("case", CASES, ids=str)
def test_float64(cell: Cell, case: Case) -> None:
    exact = by_definition(cell, arguments(cell, case, F64, "cpu"))
    result = forward_and_backward(cell, arguments(cell, case, F64, DEVICE))
    assert [error for error in map(relative, result, exact) if not error <= 1e-12] == []


@pytest.mark.parametrize("case", CASES, ids=str)
def test_float32_compared_with_plain_torch(cell: Cell, case: Case) -> None:
    """The error is at most five times that of plain torch in float32, or a few roundings; always below 1e-5."""
    exact = by_definition(cell, arguments(cell, case, F64, "cpu"))
    plain = by_definition(cell, arguments(cell, case, F32, "cpu"))
    result = forward_and_backward(cell, arguments(cell, case, F32, DEVICE))
    for number, (ours, theirs, true) in enumerate(zip(result, plain, exact, strict=True)):
        error = relative(ours, true)
        assert error <= 1e-5, (number, error)
        assert error <= max(5 * relative(theirs, true), 2e-6), (number, error)


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("all_steps", [False, True])
def test_compared_with_torchs_layers(name: str, all_steps: bool) -> None:
    """The public functions with autograd, against torch.nn on the CPU."""
    torch.manual_seed(0)
    module = {"lstm": nn.LSTM, "gru": nn.GRU}[name](6, 32, 2, batch_first=True).double()
    x = torch.randn(11, 9, 6, dtype=F64)
    leaves = [x.clone().requires_grad_(), *module.parameters()]
    output = module(leaves[0])[0]
    exact = output if all_steps else output[:, -1]
    grad = torch.randn(exact.shape, dtype=F64)
    expected = [exact, *torch.autograd.grad(exact, leaves, grad)]
    there = [leaf.detach().to(DEVICE).requires_grad_() for leaf in leaves]
    layers = [there[1 + at : 5 + at] for at in (0, 4)]
    ours = CALLS[name](there[0], layers, all_steps=all_steps)[0]
    result = [ours, *torch.autograd.grad(ours, there, grad.to(DEVICE))]
    assert [error for error in map(relative, result, expected) if not error <= 1e-12] == []


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(list(CELLS)),
    st.builds(
        Case,
        st.integers(0, 40),
        st.integers(0, 8),
        st.integers(1, 9),
        st.integers(1, 70),
        st.integers(1, 3),
        st.booleans(),
        st.booleans(),
        st.sampled_from([0.0, 0.3, 1.0]),
        st.sampled_from(["plain", "windows", "features first", "steps of a larger tensor", "repeated"]),
    ),
    st.sampled_from([F32, F64]),
)
def test_any_stack_in_any_layout(name: str, case: Case, dtype: torch.dtype) -> None:
    cell, limit = CELLS[name], 1e-5 if dtype == F32 else 1e-12
    exact = by_definition(cell, arguments(cell, case, F64, "cpu"))
    result = forward_and_backward(cell, arguments(cell, case, dtype, DEVICE))
    assert [error for error in map(relative, result, exact) if not error <= limit] == []


@long_on_host
def test_a_batch_in_parts(cell: Cell) -> None:
    """A part is at least one wave of thread blocks: 528 rows on a device of 132 multiprocessors, here three parts."""
    case = Case(1100, 62, 3, 130, 2, True, True, 0.2)
    exact = by_definition(cell, arguments(cell, case, F64, "cpu"))
    result = forward_and_backward(cell, arguments(cell, case, F64, DEVICE))
    assert [error for error in map(relative, result, exact) if not error <= 1e-12] == []


def test_gates_that_are_full_or_shut(cell: Cell, hidden: int) -> None:
    """Weights are multiplied by 100. More than two steps would amplify any rounding error."""
    case = Case(9, 2, 5, hidden, 1, True, True)
    exact = by_definition(cell, arguments(cell, case, F64, "cpu", scale=100.0))
    for dtype, limit in ((F32, 1e-3), (F64, 1e-11)):
        result = forward_and_backward(cell, arguments(cell, case, dtype, DEVICE, scale=100.0))
        assert all(ours.isfinite().all() for ours in result)
        assert [error for error in map(relative, result, exact) if not error <= limit] == []


def test_bias_gradients_are_equal_and_separate() -> None:
    """The two biases of an LSTM are added, so their gradients are equal. Optimizers update them in place."""
    inputs = arguments(LSTM, Case(9, 3, 5, 16, 2), F32, DEVICE)
    weights = [part.requires_grad_() for part in inputs.weights]
    lstm(inputs.x, [weights[:4], weights[4:]])[0].sum().backward()
    for of_input, of_hidden in ((weights[2].grad, weights[3].grad), (weights[6].grad, weights[7].grad)):
        assert of_input is not None
        assert of_hidden is not None
        assert torch.equal(of_input, of_hidden)
        assert of_input.data_ptr() != of_hidden.data_ptr()


def test_only_some_gradients_are_requested(cell: Cell) -> None:
    """An absent incoming gradient is None, and gradients that are not requested are not computed."""
    inputs = arguments(cell, Case(7, 6, 4, 20, 2, False, True), F64, DEVICE)
    ops, n, flat = torch.ops.qfast, 1 + len(cell.state_names), inputs.flat(cell)
    result = getattr(ops, cell.name)(*flat, True)
    grads = gradients_like(result[:n])
    for wanted in range(n):
        some = [grad if i == wanted else None for i, grad in enumerate(grads)]
        zeros = [grad if i == wanted else torch.zeros_like(grad) for i, grad in enumerate(grads)]
        backward = getattr(ops, f"{cell.name}_backward")
        whole = backward(*zeros, *flat, *result[n:], True, True)
        part = backward(*some, *flat, *result[n:], False, False)
        assert [len(t) for t in part[:-1]] == [0] * n
        for a, b in zip(part[-1], whole[-1], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------- dropout
@pytest.mark.parametrize("seed", [0, 1, -1, 2**62 + 12345])
@pytest.mark.parametrize("dropout", [1e-9, 0.5, 1.0])
def test_the_mask_is_that_of_the_definition(cell: Cell, seed: int, dropout: float, hidden: int) -> None:
    """Word b % 4 of the counter (unit, step, layer, b // 4): the same elements as on the CPU."""
    case = Case(27, 5, 4, hidden, 3, True, False, dropout)
    exact = by_definition(cell, arguments(cell, case, F64, "cpu", seed))
    result = forward_and_backward(cell, arguments(cell, case, F64, DEVICE, seed))
    assert [error for error in map(relative, result, exact) if not error <= 1e-12] == []


def test_manual_seed_makes_it_repeat(cell: Cell, hidden: int) -> None:
    inputs = arguments(cell, Case(40, 6, 4, hidden, 2), F32, DEVICE)
    layers = [inputs.weights[at : at + 4] for at in (0, 4)]

    def once(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return CALLS[cell.name](inputs.x, layers, dropout=0.3, training=True)[0]

    assert torch.equal(once(5), once(5))
    assert not torch.equal(once(5), once(6))


# ---------------------------------------------------------------- schemas, autocast, non-finite values
@pytest.mark.parametrize("case", [Case(0, 3, 2, 5, 2, True, True), Case(3, 4, 2, 9, 2, False, False, 0.4)], ids=str)
def test_opcheck(cell: Cell, case: Case) -> None:
    inputs, ops, n = arguments(cell, case, F64, DEVICE), torch.ops.qfast, 1 + len(cell.state_names)
    flat = inputs.flat(cell)
    forward, backward = getattr(ops, cell.name), getattr(ops, f"{cell.name}_backward")
    torch.library.opcheck(forward, (*flat, False))
    leaves = [part.clone().requires_grad_() for part in inputs.weights]
    torch.library.opcheck(forward, (inputs.x.clone().requires_grad_(), leaves, *flat[2:], True))
    result = forward(*flat, True)
    grads = gradients_like(result[:n])
    for wanted in (False, True):
        torch.library.opcheck(backward, (*grads, *flat, *result[n:], wanted, wanted))


def test_gradients_by_finite_differences(cell: Cell) -> None:
    inputs = arguments(cell, Case(3, 4, 2, 5, 2, True, True), F64, DEVICE)
    leaves = [part.requires_grad_() for part in (inputs.x, *inputs.weights)]
    call = CALLS[cell.name]
    assert torch.autograd.gradcheck(lambda x, *w: call(x, [w[:4], w[4:]], all_steps=True)[0], leaves)


def test_autocast_casts_nothing_inside(cell: Cell, hidden: int) -> None:
    inputs = arguments(cell, Case(9, 6, 5, hidden, 2, False, True), F32, DEVICE)
    plain = forward_and_backward(cell, inputs)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        result = forward_and_backward(cell, inputs)
    assert all(torch.equal(a, b) for a, b in zip(result, plain, strict=True))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_values_stay_in_their_row(cell: Cell, value: float, hidden: int) -> None:
    inputs = arguments(cell, Case(30, 7, 5, hidden, 2, True), F32, DEVICE)
    clean = forward_and_backward(cell, inputs)
    inputs.x[13, 2, 4] = value
    result = forward_and_backward(cell, inputs)
    exact = by_definition(cell, Given(inputs.x.cpu(), [w.cpu() for w in inputs.weights], *inputs[2:]))
    others = [i for i in range(30) if i != 13]
    assert torch.equal(result[0][others], clean[0][others])
    assert torch.equal(result[1 + len(cell.state_names)][others], clean[1 + len(cell.state_names)][others])
    assert torch.equal(result[0].isnan().cpu(), exact[0].isnan())


# ---------------------------------------------------------------- repeats, streams, graphs
@long_on_host
def test_the_same_bits_come_again(cell: Cell, hidden: int) -> None:
    inputs = arguments(cell, Case(1500, 9, 6, hidden, 2, True, True, 0.2), F32, DEVICE)
    first = forward_and_backward(cell, inputs)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(forward_and_backward(cell, inputs), first, strict=True))


def test_without_keep_the_bits_are_the_same(cell: Cell, hidden: int) -> None:
    flat = arguments(cell, Case(50, 9, 6, hidden, 2, True, True, 0.2), F32, DEVICE).flat(cell)
    run, n = getattr(torch.ops.qfast, cell.name), 1 + len(cell.state_names)
    for saved, plain in zip(run(*flat, True)[:n], run(*flat, False)[:n], strict=True):
        assert torch.equal(saved, plain)


@needs_gpu
def test_no_synchronization_with_the_host(cell: Cell, hidden: int) -> None:
    inputs = arguments(cell, Case(70, 9, 6, hidden, 2, True, True, 0.2), F32, DEVICE)
    flat, ops, n = inputs.flat(cell), torch.ops.qfast, 1 + len(cell.state_names)

    def once() -> None:
        result = getattr(ops, cell.name)(*flat, True)
        getattr(ops, f"{cell.name}_backward")(*result[:n], *flat, *result[n:], True, True)

    assert_no_synchronization(once)


@needs_gpu
def test_a_cuda_graph_captures_both_operators(cell: Cell, hidden: int) -> None:
    """The graph is replayed on new values, including a new seed, in the same memory."""
    case, n = Case(70, 9, 6, hidden, 2, True, True, 0.2), 1 + len(cell.state_names)
    inputs, fresh = (arguments(cell, case, F32, DEVICE, seed) for seed in (1, 2))
    fresh.x.mul_(0.5)

    def once(inputs: Given) -> list[Tensor]:
        flat = inputs.flat(cell)
        result = getattr(torch.ops.qfast, cell.name)(*flat, True)
        back = getattr(torch.ops.qfast, f"{cell.name}_backward")(*result[:n], *flat, *result[n:], True, True)
        return [*result, *back[:-1], *back[-1]]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        once(inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = once(inputs)
    for numbers in (None, fresh):
        if numbers is not None:
            for to, new in ((inputs.x, numbers.x), (inputs.seed, numbers.seed)):
                to.copy_(new)  # type: ignore[union-attr,arg-type]
        graph.replay()
        torch.cuda.synchronize()
        for a, b in zip(result, once(inputs), strict=True):
            torch.testing.assert_close(a, b)  # cuBLAS uses other workspaces during capture


# ---------------------------------------------------------------- size
@needs_gpu
def test_memory_of_a_training_step() -> None:
    """2 x 64 units, T = 20, 5,000 rows: 250 MB of saved tensors, and at most 250 MB of gradients and intermediates."""
    inputs = arguments(LSTM, Case(5000, 20, 20, 64, 2), F32, DEVICE)
    leaves = [part.requires_grad_() for part in inputs.weights]
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    lstm(inputs.x, [leaves[:4], leaves[4:]])[0].sum().backward()
    extra = torch.cuda.max_memory_allocated() - before
    assert extra <= 500 << 20, f"{extra / 2**20:.0f} MB"


@needs_gpu
@pytest.mark.slow
def test_more_than_two_to_the_31_elements() -> None:
    """The last rows of a batch with more than 2^31 saved gate values, compared with the same rows alone."""
    if torch.cuda.get_device_properties(0).total_memory < 64 << 30:
        pytest.skip("needs 64 GB on the GPU")
    inputs = arguments(GRU, Case(300_000, 30, 1, 64, 1, True), F32, DEVICE)
    whole = torch.ops.qfast.gru(*inputs.flat(GRU), True)
    assert whole[2].numel() > 2**31
    few = torch.ops.qfast.gru(inputs.x[-5:], *inputs.flat(GRU)[1:], True)
    torch.testing.assert_close(whole[0][-5:], few[0])
    grad = torch.zeros_like(whole[0])
    grad[-5:] = 1.0
    result = torch.ops.qfast.gru_backward(grad, None, *inputs.flat(GRU), *whole[2:], True, False)
    alone = torch.ops.qfast.gru_backward(grad[-5:], None, inputs.x[-5:], *inputs.flat(GRU)[1:], *few[2:], True, False)
    torch.testing.assert_close(result[0][-5:], alone[0])
    assert not result[0][:-5].any()
    for a, b in zip(result[2], alone[2], strict=True):
        torch.testing.assert_close(a, b)


# ---------------------------------------------------------------- refusals
def test_refusals_of_the_kernels() -> None:
    inputs = arguments(LSTM, Case(3, 4, 2, 5, 2, False, True), F32, DEVICE)
    x, weights, h0, c0 = inputs.flat(LSTM)[:4]
    run = torch.ops.qfast.lstm
    with pytest.raises(ValueError, match="seed: expected one int64 on the device of x"):
        run(x, weights, h0, c0, 0.5, None, False, False)
    with pytest.raises(ValueError, match=r"dropout: expected 0 to 1, got 1\.5"):
        run(x, weights, h0, c0, 1.5, None, False, False)
    with pytest.raises(ValueError, match=r"weights: expected four tensors for each layer, got 7"):
        run(x, weights[:-1], h0, c0, 0.0, None, False, False)
    with pytest.raises(ValueError, match=r"weight_hh: expected shape \(20, 5\), got"):
        run(x, [*weights[:5], weights[4][:, :2], *weights[6:]], h0, c0, 0.0, None, False, False)
    with pytest.raises(ValueError, match=r"h0: expected shape \(2, 3, 5\), got \(1, 3, 5\)"):
        run(x, weights, h0[:1], c0, 0.0, None, False, False)
    result = run(x, weights, h0, c0, 0.0, None, False, True)
    with pytest.raises(ValueError, match="gates: expected shape"):
        torch.ops.qfast.lstm_backward(
            None, None, None, x, weights, h0, c0, 0.0, None, False, result[3][:, :-1], result[4], True, True
        )
    wide = arguments(LSTM, Case(1, 1, 1, 5000), F32, DEVICE).flat(LSTM)
    with pytest.raises(ValueError, match="units do not fit into this GPU's shared memory"):
        run(*wide, False)


@needs_gpu
def test_tensors_of_another_device_are_refused() -> None:
    inputs = arguments(LSTM, Case(3, 4, 2, 5, 2, False, True), F32, DEVICE)
    x, weights, h0, c0 = inputs.flat(LSTM)[:4]
    with pytest.raises(ValueError, match="weight_ih: expected the device of x"):
        torch.ops.qfast.lstm(x, [weights[0].cpu(), *weights[1:]], h0, c0, 0.0, None, False, False)
    with pytest.raises(ValueError, match="seed: expected the device of x"):
        torch.ops.qfast.lstm(x, weights, h0, c0, 0.5, torch.tensor([3]), False, False)
