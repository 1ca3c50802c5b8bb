"""Temporal convolution stacks on a GPU: the CUDA kernels compared with the definition in float64.

Narrow stacks run in one launch in shared memory, wide ones in one launch per convolution in global memory
(csrc/temporal_conv/temporal_conv.cu). NARROW and WIDE are examples of both.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from qfast.ops import BlockWeights, temporal_conv, temporal_conv_net
from qfast.ops.philox import draw_seed
from qfast.ops.temporal_conv import self_test
from support.devices import DEVICE, assert_no_synchronization, needs_gpu, needs_kernels
from support.operator_case import F32, relative_error
from support.temporal_conv import (
    LAYOUTS,
    STACK_CASES,
    StackCase,
    expected,
    flat,
    like,
    oracle,
    results,
    stack,
    stack_errors_above,
    stacks,
)
from support.tensors import SEEDS, philox_mask, randn

pytestmark = needs_kernels
NARROW, WIDE = [20, 20, 33], [20, 130, 128]
OPS = torch.ops.qfast
INF, NAN = torch.inf, torch.nan

Blocks = list[BlockWeights]


@pytest.fixture(autouse=True)
def _operator_normalizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels normalize the weights, also if they are built as host code for CPU tensors."""
    monkeypatch.setattr(temporal_conv, "_normalizes", lambda device: device.type == DEVICE)


@pytest.fixture(params=[NARROW, WIDE], ids=["narrow", "wide"])
def channels(request: pytest.FixtureRequest) -> list[int]:
    return request.param


@pytest.fixture(params=[False, True], ids=["last-step", "all-steps"])
def all_steps(request: pytest.FixtureRequest) -> bool:
    return request.param


def on_gpu(call: Callable[..., Tensor], x: Tensor, blocks: Blocks, grad: Tensor) -> list[Tensor]:
    """Result and gradients of `call`, computed on the GPU and copied to the CPU."""
    there = like(blocks, [part.to(DEVICE) for part in flat(blocks)])
    return [t.cpu() for t in results(call, x.to(DEVICE), there, grad.to(DEVICE))]


def grad_for(batch: int, channels: int, steps: int, all_steps: bool, dtype: torch.dtype = torch.float64) -> Tensor:
    grad = randn(batch, channels, steps, seed=1, dtype=dtype)
    return grad if all_steps else grad[:, :, 0]


def test_self_test() -> None:
    self_test(torch.device(DEVICE))


def test_the_cuda_kernels_are_registered() -> None:
    for name in ("temporal_conv_net", "temporal_conv_net_backward"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"qfast::{name}", DEVICE.upper())


# ---------------------------------------------------------------- accuracy
@pytest.mark.parametrize("case", STACK_CASES, ids=lambda case: case.name)
def test_float32_compared_with_plain_torch(case: StackCase) -> None:
    """The error is at most five times that of plain torch in float32, or a few roundings; always below 1e-5.

    On the CPU the factor is three: there a sum has several accumulators, here one thread adds all terms.
    """
    exact = expected(case)
    (x, blocks), grad = case.split(case.inputs(F32, exact.seed)), case.grad(F32, exact.seed)
    result = on_gpu(case.call, x, blocks, grad)
    assert result[0].dtype == torch.float32
    for number, (ours, true, theirs) in enumerate(zip(result, exact.values, exact.of_plain, strict=True)):
        error = relative_error(ours, true)
        assert error <= 1e-5
        assert error <= max(5 * theirs, 2e-6 if number else 5e-7), (number, error, theirs)
    with torch.no_grad():  # nothing is saved, and the bits are the same
        there = like(blocks, [part.to(DEVICE) for part in flat(blocks)])
        assert torch.equal(case.call(x.to(DEVICE), there).cpu(), result[0])


@pytest.mark.parametrize("case", STACK_CASES, ids=lambda case: case.name)
def test_float64(case: StackCase) -> None:
    exact = expected(case)
    (x, blocks), grad = case.split(case.inputs(F32, exact.seed)), case.grad(F32, exact.seed)
    wide = like(blocks, [part.double() for part in flat(blocks)])
    assert stack_errors_above(on_gpu(case.call, x.double(), wide, grad.double()), exact.values, 1e-12) == []


@settings(max_examples=60, deadline=None)
@given(stacks())
def test_any_stack_in_any_layout(drawn: tuple[StackCase, str, float]) -> None:
    """Float64, with dropout by the definition, result and all gradients."""
    case, layout, dropout = drawn
    (x, blocks), grad = case.split(case.inputs(F32)), case.grad(F32)
    x, grad, blocks = x.double(), grad.double(), like(blocks, [part.double() for part in flat(blocks)])
    given_twice = {"dilations": case.dilations, "all_steps": case.all_steps, "dropout": dropout}
    torch.manual_seed(case.batch)
    seed = int(draw_seed(torch.device(DEVICE))) if dropout else 0

    def ours(x: Tensor, blocks: Blocks) -> Tensor:
        torch.manual_seed(case.batch)
        return temporal_conv_net(LAYOUTS[layout](x), blocks, training=True, **given_twice)

    exact = results(lambda x, blocks: oracle(x, blocks, seed=seed, **given_twice), x, blocks, grad)
    assert stack_errors_above(on_gpu(ours, x, blocks, grad), exact, 1e-11) == []


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_do_not_change_a_bit(layout: str, channels: list[int], all_steps: bool) -> None:
    x, blocks = randn(7, 6, 11, dtype=torch.float32), stack(6, channels, 3, dtype=torch.float32)
    grad = grad_for(7, channels[-1], 11, all_steps, torch.float32)
    easy, moved = (
        on_gpu(lambda x, blocks, lay=lay: temporal_conv_net(lay(x), blocks, all_steps=all_steps), x, blocks, grad)
        for lay in (LAYOUTS["windows of rows"], LAYOUTS[layout])
    )
    assert all(torch.equal(a, b) for a, b in zip(moved, easy, strict=True))


def test_gradients_of_any_strides_and_repeated_rows(channels: list[int]) -> None:
    x, blocks = randn(6, 4, 9), stack(4, channels, 3)

    def call(x: Tensor, blocks: Blocks) -> Tensor:
        return temporal_conv_net(x, blocks, all_steps=True)

    ones = torch.ones(1, 1, 1, dtype=x.dtype).expand(6, channels[-1], 9)  # the gradient of sum()
    exact = results(lambda *t: oracle(*t, all_steps=True), x, blocks, ones.contiguous())
    assert stack_errors_above(on_gpu(call, x, blocks, ones), exact, 1e-12) == []
    windows = randn(40, 4).unfold(0, 9, 1)
    exact = results(lambda *t: oracle(*t, all_steps=True), windows, blocks, randn(32, channels[-1], 9, seed=1))
    assert stack_errors_above(on_gpu(call, windows, blocks, randn(32, channels[-1], 9, seed=1)), exact, 1e-12) == []


@pytest.mark.parametrize("batch", [0, 1, 3, 5, 63, 64, 65, 1100, 5000])
def test_tiles_of_rows(batch: int, channels: list[int]) -> None:
    """Tiles of 4 to 64 rows, the last one short. Without rows all gradients are 0."""
    x, blocks = randn(batch, 4, 7), stack(4, channels, 3)
    grad = grad_for(batch, channels[-1], 7, False)
    assert stack_errors_above(on_gpu(temporal_conv_net, x, blocks, grad), results(oracle, x, blocks, grad), 1e-12) == []


def test_a_row_has_the_same_bits_alone_and_among_others(channels: list[int]) -> None:
    x, blocks = randn(5000, 5, 12, dtype=torch.float32).to(DEVICE), stack(5, channels, 3, dtype=torch.float32)
    blocks = like(blocks, [part.to(DEVICE) for part in flat(blocks)])
    whole = temporal_conv_net(x, blocks)
    for rows in (slice(0, 1), slice(37, 38), slice(90, 100), slice(3, 1600)):
        assert torch.equal(temporal_conv_net(x[rows], blocks), whole[rows])


# ---------------------------------------------------------------- weight normalization
def test_the_operator_normalizes_the_weights(channels: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without torch's operation, with any magnitude and strides of the weights, and an odd number of channels."""
    channels = [*channels, 7]
    x, grad = randn(9, 5, 12), grad_for(9, 7, 12, False)
    blocks = stack(5, channels, 3)
    scales = [10.0 ** (number % 5 - 2) for number in range(len(flat(blocks)))]
    blocks = like(blocks, [part * scale for part, scale in zip(flat(blocks), scales, strict=True)])
    exact = results(oracle, x, blocks, grad)
    monkeypatch.delattr(torch, "_weight_norm")

    def with_strides(x: Tensor, blocks: Blocks) -> Tensor:
        return temporal_conv_net(x, like(blocks, [p.movedim(0, -1).contiguous().movedim(-1, 0) for p in flat(blocks)]))

    for call in (temporal_conv_net, with_strides):
        assert stack_errors_above(on_gpu(call, x, blocks, grad), exact, 1e-12) == []


def test_a_stack_that_is_normalized_in_part(channels: list[int]) -> None:
    """With a gain for some convolutions only, torch normalizes them."""
    x, grad, blocks = randn(9, 5, 12), grad_for(9, channels[-1], 12, False), stack(5, channels, 3)
    blocks[1] = blocks[1]._replace(weight_g2=None)
    assert stack_errors_above(on_gpu(temporal_conv_net, x, blocks, grad), results(oracle, x, blocks, grad), 1e-12) == []


def test_a_weight_of_zeros_has_no_direction(channels: list[int]) -> None:
    """0 / 0 is NaN, as in torch, and stays in its channel."""
    blocks, x, grad = stack(5, channels, 3), randn(9, 5, 12), grad_for(9, channels[-1], 12, False)
    blocks[-1].weight_v2[3] = 0
    result = on_gpu(temporal_conv_net, x, blocks, grad)
    others = [i for i in range(channels[-1]) if i != 3]
    assert result[0][:, 3].isnan().all()
    assert result[0][:, others].isfinite().all()


@pytest.mark.parametrize("batch", [0, 3])
def test_opcheck_with_gains(batch: int, all_steps: bool) -> None:
    x, blocks = randn(batch, 7, 2).to(DEVICE), stack(2, [4, 3], 3)
    there = like(blocks, [part.to(DEVICE) for part in flat(blocks)])
    weights, _ = temporal_conv._checked(x.transpose(1, 2), there, None)
    assert [part.dim() for part in weights[-4:]] == [3] * 4  # the gains
    inputs = [1, 2], 0.0, None, all_steps
    leaves = [part.clone().requires_grad_() for part in weights]
    torch.library.opcheck(OPS.temporal_conv_net, (x.clone().requires_grad_(), leaves, *inputs, True))
    saved = OPS.temporal_conv_net(x, weights, *inputs, True)
    grad = randn(*saved[0].shape).to(DEVICE)
    torch.library.opcheck(OPS.temporal_conv_net_backward, (grad, x, weights, *inputs, *saved, True))


# ---------------------------------------------------------------- dropout
class _WithSeed:
    """The operator with the given seed instead of one drawn from torch's generator; blocks without normalisation."""

    def __init__(self, seed: int, dropout: float, all_steps: bool) -> None:
        self.seed, self.dropout, self.all_steps = seed, dropout, all_steps

    def __call__(self, x: Tensor, blocks: Blocks) -> Tensor:
        seed, dilations = torch.tensor([self.seed], device=x.device), [2**i for i in range(len(blocks))]
        inputs = (x.transpose(1, 2), flat(blocks), dilations, self.dropout, seed, self.all_steps)
        out = OPS.temporal_conv_net(*inputs, x.requires_grad)[0]
        return out.transpose(1, 2) if self.all_steps else out

    def expected(self, x: Tensor, blocks: Blocks) -> Tensor:
        return oracle(x, blocks, all_steps=self.all_steps, dropout=self.dropout, seed=self.seed)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dropout", [1e-9, 0.5, 1.0])
def test_the_mask_is_that_of_the_definition(seed: int, dropout: float, channels: list[int], all_steps: bool) -> None:
    """Word b % 4 of the counter (channel, step, convolution, b // 4): the same elements as on the CPU."""
    x, blocks = randn(27, 4, 11), stack(4, channels, 3, norm=False)
    grad = grad_for(27, channels[-1], 11, all_steps)
    call = _WithSeed(seed, dropout, all_steps)
    exact = results(call.expected, x, blocks, grad)
    assert stack_errors_above(on_gpu(call, x, blocks, grad), exact, 1e-12) == []
    assert stack_errors_above(results(call, x, blocks, grad), exact, 1e-12) == []  # on the CPU


def test_manual_seed_makes_it_repeat(channels: list[int]) -> None:
    x, blocks = randn(40, 4, 9).to(DEVICE), stack(4, channels, 3)
    blocks = like(blocks, [part.to(DEVICE) for part in flat(blocks)])

    def once(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return temporal_conv_net(x, blocks, dropout=0.3, training=True)

    assert torch.equal(once(5), once(5))
    assert not torch.equal(once(5), once(6))


def test_the_dropout_rate_of_the_oracle() -> None:
    assert abs(float((philox_mask(1, 64, 32, 20, 0, 0.3) == 0).double().mean()) - 0.3) < 0.02


# ---------------------------------------------------------------- gradients, schemas, non-finite values
def test_gradients_by_finite_differences(all_steps: bool) -> None:
    x, blocks = randn(3, 2, 7).to(DEVICE).requires_grad_(), stack(2, [4, 3], 3)
    parts = [part.to(DEVICE).requires_grad_() for part in flat(blocks)]
    assert torch.autograd.gradcheck(
        lambda x, *parts: temporal_conv_net(x, like(blocks, parts), all_steps=all_steps), (x, *parts)
    )


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("batch", [0, 3])
def test_opcheck(batch: int, dropout: float, all_steps: bool) -> None:
    x = randn(batch, 7, 2).to(DEVICE)
    weights = [part.to(DEVICE) for part in flat(stack(2, [4, 3], 3, norm=False))]
    rest = [1, 2], dropout, torch.tensor([3], device=DEVICE) if dropout else None, all_steps
    leaves = [part.clone().requires_grad_() for part in weights]
    torch.library.opcheck(OPS.temporal_conv_net, (x.clone().requires_grad_(), leaves, *rest, True))
    torch.library.opcheck(OPS.temporal_conv_net, (x, weights, *rest, False))
    saved = OPS.temporal_conv_net(x, weights, *rest, True)
    grad = randn(*saved[0].shape).to(DEVICE)
    for input_grad in (False, True):
        torch.library.opcheck(OPS.temporal_conv_net_backward, (grad, x, weights, *rest, *saved, input_grad))


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_non_finite_values_spread_as_in_plain_torch(value: float, channels: list[int], all_steps: bool) -> None:
    """Result and gradients, element by element. The bits of other rows do not change."""
    x, blocks = randn(30, 5, 12), stack(5, channels, 3, norm=False)
    grad = grad_for(30, channels[-1], 12, all_steps)

    def ours(x: Tensor, blocks: Blocks) -> Tensor:
        return temporal_conv_net(x, blocks, all_steps=all_steps)

    clean = on_gpu(ours, x, blocks, grad)
    x[13, 2, -1] = value
    result = on_gpu(ours, x, blocks, grad)
    exact = results(lambda *t: oracle(*t, all_steps=all_steps), x, blocks, grad)
    for a, b in zip(result, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11, equal_nan=True)
    others = [i for i in range(30) if i != 13]
    for number in (0, 1):
        assert torch.equal(result[number][others], clean[number][others])


@pytest.mark.parametrize("value", [NAN, INF])
def test_unread_steps_may_have_any_value(value: float, channels: list[int]) -> None:
    blocks = stack(5, channels[:2], 3, norm=False)
    x, grad = randn(6, 5, 30), randn(6, channels[1], seed=1)
    clean = on_gpu(lambda *t: temporal_conv_net(*t, dilations=[5, 5]), x, blocks, grad)
    outside = [t for t in range(30) if t not in temporal_conv_net.plan(30, 3, [5, 5]).blocks[0].input]
    x[:, :, outside] = value
    result = on_gpu(lambda *t: temporal_conv_net(*t, dilations=[5, 5]), x, blocks, grad)
    assert all(torch.equal(a, b) for a, b in zip(result, clean, strict=True))
    assert not result[1][:, :, outside].any()


def test_inactive_channels_have_a_gradient_of_exactly_zero() -> None:
    """A gradient that is 0 must be 0: Adam turns rounding noise into full steps."""
    x, grad = randn(50, 6, 14, dtype=torch.float32), randn(50, 20, seed=1, dtype=torch.float32)
    blocks = stack(6, [20, 20], 3, dtype=torch.float32)
    off = [3, 7, 19]
    blocks[1].bias1[off] = -1e3
    _, grads = like(blocks, on_gpu(temporal_conv_net, x, blocks, grad)[2:])
    assert not any(part[off].any() for part in (grads.bias1, grads.weight_v1, grads.weight_g1) if part is not None)


def test_sums_over_many_rows_stay_accurate() -> None:
    """A common part of all rows costs no accuracy in the sums of the weight gradients."""
    x, blocks = randn(60_000, 3, 5, dtype=torch.float32) + 1, stack(3, [9], 3, norm=False, dtype=torch.float32)
    grad = randn(60_000, 9, seed=1, dtype=torch.float32) + 1
    result = on_gpu(temporal_conv_net, x, blocks, grad)
    wide = like(blocks, [part.double() for part in flat(blocks)])
    exact = results(oracle, x.double(), wide, grad.double())
    assert [error for error in map(relative_error, result[2:], exact[2:]) if error > 2e-5] == []


# ---------------------------------------------------------------- repeats, streams, graphs
def direct_inputs(channels: list[int], batch: int, seed: int = 0) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
    """x [B, T, F], weights, a gradient and a seed, all on the GPU."""
    weights = flat(stack(6, channels, 3, norm=False, seed=seed, dtype=torch.float32))
    x, grad = randn(batch, 15, 6, seed=seed), randn(batch, channels[-1], seed=seed + 1)
    tensors = [t.float().to(DEVICE) for t in (x, *weights, grad)]
    return tensors[0], tensors[1:-1], tensors[-1], torch.tensor([seed + 1], device=DEVICE)


def forward_and_backward(x: Tensor, weights: list[Tensor], grad: Tensor, seed: Tensor) -> list[Tensor]:
    inputs = x, weights, [1, 2, 4], 0.2, seed, False
    saved = OPS.temporal_conv_net(*inputs, True)
    of_x, grads = OPS.temporal_conv_net_backward(grad, *inputs, *saved, True)
    return [*saved, of_x, *grads]


@needs_gpu
def test_the_same_bits_come_again(channels: list[int]) -> None:
    inputs = direct_inputs(channels, 1500)
    first = forward_and_backward(*inputs)
    side = torch.cuda.Stream()
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(forward_and_backward(*inputs), first, strict=True))
        with torch.cuda.stream(side):
            side.wait_stream(torch.cuda.default_stream())
            again = forward_and_backward(*inputs)
        side.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))


@needs_gpu
def test_no_synchronization_with_the_host(channels: list[int]) -> None:
    inputs = direct_inputs(channels, 70)
    assert_no_synchronization(lambda: forward_and_backward(*inputs))


@needs_gpu
def test_a_cuda_graph_captures_both_operators(channels: list[int]) -> None:
    """The graph is replayed on new values, including a new seed, in the same memory."""
    inputs, changed = direct_inputs(channels, 70), direct_inputs(channels, 70, seed=8)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        forward_and_backward(*inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = forward_and_backward(*inputs)
    static, fresh = ([of[0], *of[1], *of[2:]] for of in (inputs, changed))
    for numbers in ([t.clone() for t in static], fresh):
        for a, b in zip(static, numbers, strict=True):
            a.copy_(b)
        graph.replay()
        torch.cuda.synchronize()
        wanted = forward_and_backward(numbers[0], numbers[1:-2], *numbers[-2:])
        assert all(torch.equal(a, b) for a, b in zip(result, wanted, strict=True))


# ---------------------------------------------------------------- size
@needs_gpu
def test_memory_of_a_training_step() -> None:
    """T = 60, kernel 3, 5 x 128 channels, 2,000 rows: saved tensors, their gradients and sums within 512 MB."""
    blocks = stack(6, [128] * 5, 3, norm=False, dtype=torch.float32)
    parts = [part.to(DEVICE).requires_grad_() for part in flat(blocks)]
    x = torch.randn(2000, 6, 60, device=DEVICE)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    temporal_conv_net(x, like(blocks, parts)).sum().backward()
    extra = torch.cuda.max_memory_allocated() - before
    assert extra <= 512 << 20, f"{extra / 2**20:.0f} MB"


@needs_gpu
@pytest.mark.slow
def test_more_than_two_to_the_31_elements() -> None:
    """The last rows of a batch with more than 2^31 saved activations, compared with the same rows alone."""
    if torch.cuda.get_device_properties(0).total_memory < 64 << 30:
        pytest.skip("needs 64 GB on the GPU")
    weights = [part.float().to(DEVICE) for part in flat(stack(1, [64], 2, norm=False))]
    x = torch.randn(1_200_000, 30, 1, generator=torch.Generator(DEVICE).manual_seed(0), device=DEVICE)
    inputs = weights, [1], 0.0, None, True
    whole = OPS.temporal_conv_net(x, *inputs, True)
    assert whole[1].numel() > 2**31
    few = OPS.temporal_conv_net(x[-5:], *inputs, True)
    assert torch.equal(whole[0][-5:], few[0])
    grad = torch.zeros_like(whole[0])
    grad[-5:] = 1.0
    result = OPS.temporal_conv_net_backward(grad, x, *inputs, *whole, True)
    alone = OPS.temporal_conv_net_backward(grad[-5:], x[-5:], *inputs, *few, True)
    assert torch.equal(result[0][-5:], alone[0])
    assert not result[0][:-5].any()
    for a, b in zip(result[1], alone[1], strict=True):
        torch.testing.assert_close(a, b)


# ---------------------------------------------------------------- refusals
@needs_gpu
def test_refusals_of_the_kernels() -> None:
    x, weights, grad, seed = direct_inputs(NARROW, 3)
    with pytest.raises(ValueError, match="seed: expected one int64 on the device of x"):
        OPS.temporal_conv_net(x, weights, [1, 2, 4], 0.5, None, False, False)
    with pytest.raises(ValueError, match="seed: expected the device of x"):
        OPS.temporal_conv_net(x, weights, [1, 2, 4], 0.5, seed.cpu(), False, False)
    with pytest.raises(ValueError, match=r"dropout: expected 0 to 1, got 1\.5"):
        OPS.temporal_conv_net(x, weights, [1, 2, 4], 1.5, seed, False, False)
    with pytest.raises(ValueError, match="first weight: expected the device of x"):
        OPS.temporal_conv_net(x, [weights[0].cpu(), *weights[1:]], [1, 2, 4], 0.0, None, False, False)
    with pytest.raises(ValueError, match="dilations: expected one for each of 3 blocks, got 2"):
        OPS.temporal_conv_net(x, weights, [1, 2], 0.0, None, False, False)
    gains = [x.new_ones(width, 1, 1) for width in NARROW for _ in range(2)]
    with pytest.raises(ValueError, match=r"second gain of block 2: expected shape \(33, 1, 1\) and the dtype of x"):
        OPS.temporal_conv_net(x, [*weights, *gains[:-1], gains[0]], [1, 2, 4], 0.0, None, False, False)
    inputs = x, weights, [1, 2, 4], 0.0, None, False
    out, activations, signs = OPS.temporal_conv_net(*inputs, True)
    with pytest.raises(ValueError, match="grad: expected the shape and dtype of the output"):
        OPS.temporal_conv_net_backward(grad[:2], *inputs, out, activations, signs, True)
    with pytest.raises(ValueError, match="activations: expected those of a forward pass with keep"):
        OPS.temporal_conv_net_backward(grad, *inputs, out, activations[:-1], signs, True)
