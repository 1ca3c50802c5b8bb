"""Operators with few rows and wide layers, whose kernels pack no weights in advance, compared with torch in float64.

The shapes are on both sides of the limits of these kernels, and panels, vectors and chunks of steps are incomplete.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from qfast import _backend
from qfast.ops import encoder_layer, feed_forward, gru, lstm, window_conv
from qfast.ops.recurrent_twin import GRU, LSTM, Cell, backward_twin, forward_twin
from support.operator_case import F32, F64, relative_error

Call = Callable[[Tensor], Tensor]

NATIVE = pytest.mark.skipif(_backend.native is None, reason="plain torch does not guarantee equal bits")


def gradients_of(call: Call, x: Tensor, parameters: Sequence[Tensor], grad: Tensor) -> list[Tensor]:
    x = x.detach().clone().requires_grad_()
    result = call(x)
    return [result.detach(), *torch.autograd.grad(result, [x, *parameters], grad.to(x.dtype))]


def assert_equals_torch(
    module: nn.Module, operator: Callable[[nn.Module, Tensor], Tensor], torch_call: Call, x: Tensor
) -> None:
    """The operator equals the float64 module to 1e-12, and in float32 to 2e-5."""
    grad = torch.randn_like(torch_call(x))
    expected = gradients_of(torch_call, x, list(module.parameters()), grad)
    for dtype, bound in ((F64, 1e-12), (F32, 2e-5)):
        cast = module.to(dtype)
        result = gradients_of(lambda y, cast=cast: operator(cast, y), x.to(dtype), list(cast.parameters()), grad)
        assert max(map(relative_error, result, expected)) <= bound
        with torch.no_grad():
            assert relative_error(operator(cast, x.to(dtype)), expected[0]) <= bound
        module.to(F64)


def fix_active_units(bias: Tensor) -> None:
    """Switch every other ReLU on, the others off. A unit near 0 may differ in float32, and with it its gradients."""
    with torch.no_grad():
        bias.copy_(torch.tensor([5.0, -5.0]).repeat(len(bias))[: len(bias)])


def layers_of(module: nn.Module) -> list[list[Tensor]]:
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    return [[getattr(module, f"{name}_l{layer}") for name in names] for layer in range(2)]


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
@pytest.mark.parametrize(("hidden", "features", "steps"), [(264, 20, 7), (192, 300, 3), (290, 5, 1), (64, 9, 12)])
@pytest.mark.parametrize("rows", [1, 5, 17])
def test_recurrent_layers(kind: str, hidden: int, features: int, steps: int, rows: int, isa: str) -> None:
    torch.manual_seed(rows)
    module = getattr(nn, kind)(features, hidden, 2, batch_first=True, dtype=F64)
    operator = {"LSTM": lstm, "GRU": gru}[kind]
    x = torch.randn(rows, steps, features, dtype=F64)
    assert_equals_torch(
        module,
        lambda net, y: operator(y, layers_of(net), all_steps=True)[0],  # type: ignore[operator]
        lambda y: module(y)[0],
        x,
    )


@NATIVE
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_a_row_has_the_same_bits_in_a_large_batch(kind: str, isa: str) -> None:
    """The number of steps that a wide layer computes before the next layer depends on the rows; results do not."""
    torch.manual_seed(0)
    operator, module = {"LSTM": lstm, "GRU": gru}[kind], getattr(nn, kind)(7, 272, 2, batch_first=True)
    x = torch.randn(60, 9, 7)
    with torch.no_grad():
        whole = operator(x, layers_of(module))[0]  # type: ignore[operator]
        for first, last in ((0, 1), (3, 8), (10, 40)):
            assert torch.equal(operator(x[first:last], layers_of(module))[0], whole[first:last])  # type: ignore[operator]


@pytest.mark.parametrize("cell", [LSTM, GRU], ids=["LSTM", "GRU"])
@pytest.mark.parametrize("rows", [1, 6, 20])
def test_dropout_and_initial_states_of_wide_recurrent_layers(cell: Cell, rows: int, isa: str) -> None:
    """Values and gradients equal the definition in plain torch."""
    torch.manual_seed(rows)
    module = getattr(nn, cell.name.upper())(6, 264, 2, batch_first=True, dtype=F64)
    weights, n = [part for layer in layers_of(module) for part in layer], len(cell.state_names)
    x, seed = torch.randn(rows, 11, 6, dtype=F64), torch.tensor([3])
    state = [torch.randn(2, rows, 264, dtype=F64) for _ in range(n)]
    with torch.no_grad():
        arguments = (x, weights, *state, 0.4, seed, True)
        results = getattr(torch.ops.qfast, cell.name)(*arguments, True)
        expected = forward_twin(cell, x, weights, state, 0.4, seed, True, True)
        assert max(map(relative_error, results[: 1 + n], expected[: 1 + n])) <= 1e-12
        grads = [torch.randn_like(part) for part in results[: 1 + n]]
        backward = getattr(torch.ops.qfast, f"{cell.name}_backward")
        *states, ours = backward(*grads, *arguments, *results[1 + n :], True, True)
        *twin_states, twin = backward_twin(
            cell, grads[0], grads[1:], x, weights, state, 0.4, seed, True, *expected[1 + n :], True, True
        )
    assert max(map(relative_error, [*states, *ours], [*twin_states, *twin])) <= 1e-12


@pytest.mark.parametrize(("width", "hidden", "heads"), [(72, 300, 2), (128, 256, 4), (20, 83, 1)])
@pytest.mark.parametrize(("windows", "steps"), [(1, 1), (1, 10), (3, 20), (2, 130), (9, 40)])
@pytest.mark.parametrize("last_step", [False, True], ids=["all", "last"])
def test_encoder_layer(
    width: int, hidden: int, heads: int, windows: int, steps: int, last_step: bool, isa: str
) -> None:
    torch.manual_seed(windows)
    module = nn.TransformerEncoderLayer(width, heads, hidden, 0.0, batch_first=True, dtype=F64)
    fix_active_units(module.linear1.bias)
    x = torch.randn(windows, steps, width, dtype=F64)
    assert_equals_torch(
        module,
        lambda net, y: encoder_layer(y, list(net.parameters()), heads=heads, last_step=last_step),
        lambda y: module(y)[:, -1] if last_step else module(y),
        x,
    )


def test_an_encoder_layer_with_one_large_group(isa: str) -> None:
    """Up to 360 rows are one group if the feed-forward block has at least 2**18 weights in a matrix."""
    torch.manual_seed(0)
    module = nn.TransformerEncoderLayer(128, 2, 2048, 0.0, batch_first=True, dtype=F64)
    fix_active_units(module.linear1.bias)
    for windows in (17, 19):
        assert_equals_torch(
            module,
            lambda net, y: encoder_layer(y, list(net.parameters()), heads=2),
            module,
            torch.randn(windows, 20, 128, dtype=F64),
        )


@pytest.mark.parametrize(
    ("width", "hidden", "out"), [(70, 300, 130), (64, 64, 64), (256, 600, 5), (512, 520, 5), (584, 72, 3)]
)
@pytest.mark.parametrize("rows", [1, 12, 40, 64, 65, 241, 700])
def test_feed_forward(width: int, hidden: int, out: int, rows: int, isa: str) -> None:
    torch.manual_seed(rows)
    module = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, out)).to(F64)
    fix_active_units(module[0].bias)
    assert_equals_torch(
        module, lambda net, y: feed_forward(y, *net.parameters()), module, torch.randn(rows, width, dtype=F64)
    )


@pytest.mark.parametrize(("width", "out", "taps"), [(100, 130, 3), (200, 61, 5), (70, 500, 1), (40, 40, 3)])
@pytest.mark.parametrize(("windows", "steps"), [(1, 1), (1, 2), (1, 10), (3, 21), (1, 64), (1, 65), (5, 50)])
def test_window_conv(width: int, out: int, taps: int, windows: int, steps: int, isa: str) -> None:
    torch.manual_seed(steps)
    module = nn.Conv1d(width, out, taps, padding=taps // 2, dtype=F64)
    x = torch.randn(windows, steps, width, dtype=F64)
    assert_equals_torch(
        module,
        lambda net, y: window_conv(y, *net.parameters()),
        lambda y: module(y.transpose(1, 2)).transpose(1, 2),
        x,
    )


@NATIVE
def test_the_memory_layout_of_x_does_not_change_the_bits(isa: str) -> None:
    """Three taps of contiguous rows are interleaved in registers, and those of other layouts element by element."""
    torch.manual_seed(0)
    conv, grad = nn.Conv1d(105, 107, 3, padding=1), torch.randn(3, 9, 107)
    x = torch.randn(3, 9, 105)
    turned, apart = x.transpose(1, 2).contiguous().transpose(1, 2), torch.randn(3, 18, 210)[:, ::2, :105].copy_(x)

    def call(y: Tensor) -> Tensor:
        return window_conv(y, *conv.parameters())

    expected = gradients_of(call, x, list(conv.parameters()), grad)
    for other in (turned, apart):
        leaf = other.detach().requires_grad_()
        results = [call(leaf), *torch.autograd.grad(call(leaf), [leaf, *conv.parameters()], grad)]
        assert all(map(torch.equal, results, expected))


@NATIVE
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_the_same_bits_for_any_number_of_threads(threads: int, isa: str) -> None:
    torch.manual_seed(0)
    conv, x = nn.Conv1d(128, 128, 3, padding=1), torch.randn(2, 30, 128)
    before = torch.get_num_threads()

    def call(y: Tensor) -> Tensor:
        return window_conv(y, *conv.parameters())

    grad = torch.randn(2, 30, 128)
    torch.set_num_threads(1)
    try:
        expected = gradients_of(call, x, list(conv.parameters()), grad)
        torch.set_num_threads(threads)
        assert all(map(torch.equal, gradients_of(call, x, list(conv.parameters()), grad), expected))
    finally:
        torch.set_num_threads(before)
