"""Temporal convolution stacks compared with the definition in float64: shapes, strides, threads, saved tensors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qfast.ops import BlockWeights, temporal_block, temporal_conv_net
from qfast.ops.philox import draw_seed
from support.operator_case import F32, relative_error
from support.temporal_conv import (
    LAYOUTS,
    NATIVE,
    STACK_CASES,
    StackCase,
    expected,
    flat,
    like,
    nan_like,
    oracle,
    results,
    same_bits,
    stack,
    stack_errors_above,
    stacks,
)
from support.tensors import philox_mask, randn

F64 = torch.float64


# ---------------------------------------------------------------- accuracy
@pytest.mark.parametrize("case", STACK_CASES, ids=lambda case: case.name)
def test_float32_compared_with_plain_torch(case: StackCase, isa: str) -> None:
    """The error is at most three times that of plain torch in float32, or a few roundings; always below 1e-5."""
    exact = expected(case)
    (x, blocks), grad = case.split(case.inputs(F32, exact.seed)), case.grad(F32, exact.seed)
    result = results(case.call, x, blocks, grad)
    assert result[0].dtype == torch.float32
    for number, (ours, true, theirs) in enumerate(zip(result, exact.values, exact.of_plain, strict=True)):
        error = relative_error(ours, true)
        assert error <= 1e-5
        assert error <= max(3 * theirs, 2e-6 if number else 5e-7), (number, error, theirs)
    with torch.no_grad():
        assert same_bits(case.call(x, blocks), result[0])  # nothing is saved, and the values are the same


@pytest.mark.parametrize("case", STACK_CASES, ids=lambda case: case.name)
def test_float64(case: StackCase, isa: str) -> None:
    exact = expected(case)
    (x, blocks), grad = case.split(case.inputs(F32, exact.seed)), case.grad(F32, exact.seed)
    wide = like(blocks, [part.double() for part in flat(blocks)])
    result = results(case.call, x.double(), wide, grad.double())
    assert stack_errors_above(result, exact.values, 1e-12) == []


def test_one_block_at_all_steps(isa: str) -> None:
    for dilation, (block,) in ((1, stack(6, [6], 3)), (4, stack(5, [7], 2)), (3, stack(1, [33], 5, norm=False))):
        x = randn(5, block.weight_v1.shape[1], 23, seed=3)
        grad = randn(5, block.bias1.shape[0], 23, seed=4)
        ours = results(lambda x, blocks, d=dilation: temporal_block(x, blocks[0], dilation=d), x, [block], grad)
        exact = results(lambda x, blocks, d=dilation: oracle(x, blocks, [d], all_steps=True), x, [block], grad)
        assert stack_errors_above(ours, exact, 1e-12) == []


def test_steps_before_the_receptive_field_have_no_effect(isa: str) -> None:
    blocks = stack(4, [9, 9], 3)
    reach = temporal_conv_net.plan(50, 3, 2).receptive_field
    assert reach == 13
    x = randn(6, 4, 50)
    assert same_bits(temporal_conv_net(x[:, :, -reach:], blocks), temporal_conv_net(x, blocks))


@settings(max_examples=60, deadline=None)
@given(stacks())
def test_any_stack_in_any_layout(drawn: tuple[StackCase, str, float]) -> None:
    """Float64, with dropout, result and all gradients."""
    case, layout, dropout = drawn
    (x, blocks), grad = case.split(case.inputs(F32)), case.grad(F32)
    x, grad, blocks = x.double(), grad.double(), like(blocks, [part.double() for part in flat(blocks)])
    torch.manual_seed(case.batch)
    seed = int(draw_seed(x.device)) if dropout else 0
    given_twice = {"dilations": case.dilations, "all_steps": case.all_steps, "dropout": dropout}

    def ours(x: Tensor, blocks: list[BlockWeights]) -> Tensor:
        torch.manual_seed(case.batch)
        return temporal_conv_net(LAYOUTS[layout](x), blocks, training=True, **given_twice)

    exact = results(lambda x, blocks: oracle(x, blocks, seed=seed, **given_twice), x, blocks, grad)
    assert stack_errors_above(results(ours, x, blocks, grad), exact, 1e-11) == []


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("all_steps", [False, True])
def test_layouts(layout: str, all_steps: bool, isa: str) -> None:
    """The layout of x changes no bit of the result, and its gradient is correct for every layout."""
    x, blocks = randn(7, 6, 11, dtype=torch.float32), stack(6, [9, 9], 3, dtype=torch.float32)
    grad = randn(7, 9, 11, seed=1, dtype=torch.float32) if all_steps else randn(7, 9, seed=1, dtype=torch.float32)
    easy, moved = (
        results(lambda x, blocks, lay=lay: temporal_conv_net(lay(x), blocks, all_steps=all_steps), x, blocks, grad)
        for lay in (LAYOUTS["windows of rows"], LAYOUTS[layout])
    )
    assert all(same_bits(a, b) for a, b in zip(moved, easy, strict=True))


def test_gradients_in_any_layout_and_repeated_inputs(isa: str) -> None:
    blocks = stack(4, [5, 5], 3)
    x, grad = randn(6, 4, 9), randn(6, 5, 9, seed=2)

    def call(x: Tensor, blocks: list[BlockWeights]) -> Tensor:
        return temporal_conv_net(x, blocks, all_steps=True)

    exact = results(call, x, blocks, grad)
    for strange in (
        grad.permute(1, 2, 0).contiguous().permute(2, 0, 1),
        torch.stack([grad, grad + 1], 3).flatten(2)[:, :, ::2],
    ):
        result = results(call, x, blocks, strange)
        assert all(same_bits(a, b) for a, b in zip(result, exact, strict=True))
    ones = torch.ones(1, 1, 1, dtype=F64)
    result = results(call, x, blocks, ones.expand_as(grad))  # the gradient of sum(), with strides of 0
    assert (
        stack_errors_above(
            result, results(lambda *t: oracle(*t, all_steps=True), x, blocks, torch.ones_like(grad)), 1e-12
        )
        == []
    )
    one_row = randn(1, 4, 1, seed=5)
    for shape in ((6, 4, 9), (6, 4, 1), (1, 4, 9)):  # one row, one step or both, repeated without memory
        repeated = one_row.expand(shape)
        assert relative_error(call(repeated, blocks), oracle(repeated, blocks, all_steps=True)) < 1e-12


def test_weights_in_any_layout(isa: str) -> None:
    x, blocks = randn(6, 4, 9), stack(4, [5, 5], 3, norm=False)
    grad = randn(6, 5, seed=2)
    exact = results(temporal_conv_net, x, blocks, grad)

    def strange(part: Tensor) -> Tensor:
        backwards = part.permute(*range(part.dim() - 1, -1, -1)).contiguous()
        spread = torch.stack([backwards, nan_like(backwards)], -1)[..., 0]
        return spread.permute(*range(part.dim() - 1, -1, -1))

    moved = like(blocks, [strange(part) for part in flat(blocks)])
    assert not any(part.is_contiguous() for part in flat(moved))
    result = results(temporal_conv_net, x, moved, grad)
    assert all(same_bits(a, b) for a, b in zip(result, exact, strict=True))
    ones = torch.ones(1, dtype=F64).expand(5)
    repeated = [block._replace(bias1=ones, bias2=ones) for block in blocks]
    assert relative_error(temporal_conv_net(x, repeated), oracle(x, repeated)) < 1e-13


def test_inference_mode(isa: str) -> None:
    x, blocks = randn(6, 4, 9), stack(4, [5, 5], 3)
    with torch.inference_mode():
        result = temporal_conv_net(x, blocks, dropout=0.5)
    assert same_bits(result, temporal_conv_net(x, blocks))


# ---------------------------------------------------------------- windows of consecutive rows
@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("all_steps", [False, True])
@pytest.mark.parametrize(
    ("rows", "steps", "kernel", "channels"),
    [
        (1, 1, 3, (8,)),
        (40, 1, 3, (8, 8)),
        (60, 60, 3, (16, 16)),  # one window
        (61, 60, 3, (16, 16)),
        (200, 60, 3, (16,) * 5),
        (90, 20, 7, (12, 12, 12)),
        (333, 7, 2, (9, 17)),
        (600, 20, 3, (8, 8)),
        (50, 30, 2, (8, 8)),  # longer than the receptive field: all positions except the first ones are shared
        (100, 12, 1, (8, 4)),
    ],
)
def test_windows_of_consecutive_rows(
    rows: int, steps: int, kernel: int, channels: tuple[int, ...], all_steps: bool, dtype: torch.dtype, isa: str
) -> None:
    """rows.unfold without a gradient may share the work of overlapping windows.

    The values equal those of copied windows.
    """
    series = randn(rows, 9, dtype=dtype)[:, 2:7]
    windows = series.unfold(0, steps, 1)
    blocks = stack(5, channels, kernel, dtype=dtype)
    wide = like(blocks, [part.double() for part in flat(blocks)])
    exact = oracle(windows.double(), wide, all_steps=all_steps)
    with torch.no_grad():
        shared = temporal_conv_net(windows, blocks, all_steps=all_steps)
        copied = temporal_conv_net(windows.clone(), blocks, all_steps=all_steps)
    assert relative_error(shared, exact) <= (1e-6 if dtype == torch.float32 else 1e-13)
    assert relative_error(copied, exact) <= (1e-6 if dtype == torch.float32 else 1e-13)


@settings(max_examples=60, deadline=None)
@given(stacks(), st.integers(1, 70), st.integers(0, 3))
def test_any_stack_over_consecutive_rows(drawn: tuple[StackCase, str, float], windows: int, extra_columns: int) -> None:
    case, *_ = drawn
    series = randn(windows + case.steps - 1, case.features + extra_columns)[:, : case.features]
    blocks = case.split(case.inputs())[1]
    x = series.unfold(0, case.steps, 1)
    with torch.no_grad():
        result = case.call(x, blocks)
    assert relative_error(result, oracle(x, blocks, case.dilations, all_steps=case.all_steps)) < 1e-12


def test_gradients_of_windows_of_consecutive_rows(isa: str) -> None:
    """Overlapping memory is only read. The gradient of each row of the series is the sum over its windows."""
    series, blocks = randn(30, 4), stack(4, [6, 6], 3)
    grad = randn(22, 6, seed=1)
    result, exact = (
        results(lambda s, blocks, of=of: of(s.unfold(0, 9, 1), blocks), series, blocks, grad)
        for of in (temporal_conv_net, oracle)
    )
    assert stack_errors_above(result, exact, 1e-12) == []


def test_strides_that_are_nearly_those_of_consecutive_rows(isa: str) -> None:
    memory, blocks = randn(400), stack(3, [8, 8], 3)
    for strides in ((4, 1, 3), (3, 1, 4), (6, 1, 3), (3, 1, 6), (1, 5, 1), (1, 1, 1), (0, 1, 3), (3, 1, 0), (3, 0, 3)):
        x = memory.as_strided((20, 3, 9), strides)
        with torch.no_grad():
            assert relative_error(temporal_conv_net(x, blocks), oracle(x, blocks)) < 1e-13, strides


@pytest.mark.parametrize("rows", [90, 700])
def test_a_row_that_is_nan_reaches_the_windows_that_can_see_it(rows: int, isa: str) -> None:
    steps, blocks = 20, stack(4, [8, 8], 3)
    seen = temporal_conv_net.plan(steps, 3, 2).blocks[0].input
    series = randn(rows, 4)
    with torch.no_grad():
        clean = temporal_conv_net(series.unfold(0, steps, 1), blocks)
        series[50, 1] = torch.nan
        spoiled = temporal_conv_net(series.unfold(0, steps, 1), blocks)
    hit = spoiled.isnan().all(1).nonzero().flatten().tolist()
    assert hit == sorted(50 - position for position in seen)
    whole = [i for i in range(len(clean)) if i not in hit]
    torch.testing.assert_close(spoiled[whole], clean[whole], rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------- bits, threads, saved tensors
def on_threads(threads: int, call: Callable[[], list[Tensor]]) -> list[Tensor]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return call()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("all_steps", [False, True])
@pytest.mark.parametrize("batch", [3, 130, 500])
def test_the_same_bits_for_any_number_of_threads(batch: int, all_steps: bool, isa: str) -> None:
    x = randn(batch, 6, 15, dtype=torch.float32)
    blocks = stack(6, [20, 20, 33], 3, dtype=torch.float32)
    grad = randn(batch, 33, 15, seed=1, dtype=torch.float32)
    grad = grad if all_steps else grad[:, :, 0]

    def once() -> list[Tensor]:
        torch.manual_seed(4)
        return results(
            lambda x, blocks: temporal_conv_net(x, blocks, dropout=0.2, training=True, all_steps=all_steps),
            x,
            blocks,
            grad,
        )

    first = on_threads(1, once)
    for threads in (2, 3):
        again = on_threads(threads, once)
        assert [i for i, (a, b) in enumerate(zip(again, first, strict=True)) if not same_bits(a, b)] == [], threads


def test_the_same_bits_for_consecutive_windows_and_any_number_of_threads(isa: str) -> None:
    windows, blocks = randn(700, 6, dtype=torch.float32).unfold(0, 20, 1), stack(6, [24] * 3, 3, dtype=torch.float32)
    with torch.no_grad():
        first, *others = (on_threads(n, lambda: [temporal_conv_net(windows, blocks)])[0] for n in (1, 2, 3))
    assert all(same_bits(other, first) for other in others)


def test_a_row_is_the_same_alone_and_among_others(isa: str) -> None:
    x, blocks = randn(100, 5, 12), stack(5, [16, 16], 3)
    whole = temporal_conv_net(x, blocks)
    for rows in (slice(0, 1), slice(37, 38), slice(90, 100), slice(3, 60)):
        assert relative_error(temporal_conv_net(x[rows], blocks), whole[rows]) < 1e-14


@pytest.mark.parametrize("all_steps", [False, True])
def test_only_the_cone_is_saved(all_steps: bool) -> None:
    """The number of elements saved for the backward pass; none are saved without one."""
    channels, x = (16, 16, 24), randn(10, 60, 5)
    blocks = stack(5, channels, 3, norm=False)
    weights = flat(blocks)
    plan = temporal_conv_net.plan(60, 3, 3, all_steps=all_steps)
    for keep in (True, False):
        given_to = (x, weights, [1, 2, 4], 0.0, None, all_steps, keep)
        _, activations, signs = torch.ops.qfast.temporal_conv_net(*given_to)
        between = sum(len(block.between) * width for block, width in zip(plan.blocks, channels, strict=True))
        outputs = sum(len(block.output) * width for block, width in zip(plan.blocks[:-1], channels, strict=False))
        bits = sum(len(block.output) * width // 8 for block, width in zip(plan.blocks, channels, strict=True))
        assert activations.numel() == keep * 10 * (between + outputs)
        assert signs.numel() == keep * 10 * bits
        assert signs.dtype == torch.uint8


def test_steps_outside_the_cone_get_no_gradient(isa: str) -> None:
    """Their gradients are exactly 0, and so are those of taps that only read the padding before the window."""
    x, blocks = randn(8, 4, 60), stack(4, [12] * 3, 3, norm=False)
    result = results(temporal_conv_net, x, blocks, randn(8, 12, seed=1))
    seen = temporal_conv_net.plan(60, 3, 3).blocks[0].input
    assert result[1].abs().amax((0, 1)).nonzero().flatten().tolist() == list(seen)
    result = results(temporal_conv_net, x[:, :, :3], blocks, randn(8, 12, seed=1))
    exact = results(oracle, x[:, :, :3], blocks, randn(8, 12, seed=1))
    for ours, true in zip(result, exact, strict=True):
        assert torch.equal(ours == 0, true == 0)
    assert any((grad == 0).any() and grad.dim() == 3 for grad in exact[2:])


# ---------------------------------------------------------------- parameters without influence
def test_inactive_channels_have_a_gradient_of_exactly_zero(isa: str) -> None:
    """A gradient that is 0 must be 0: Adam turns rounding noise into full steps."""
    x, grad = randn(50, 6, 14, dtype=torch.float32), randn(50, 20, seed=1, dtype=torch.float32)
    off, on = [3, 7, 19], [i for i in range(20) if i not in (3, 7, 19)]
    for norm in (True, False):
        blocks = stack(6, [20, 20], 3, norm=norm, dtype=torch.float32)
        blocks[1].bias1[off] = -1e3
        _, grads = like(blocks, results(temporal_conv_net, x, blocks, grad)[2:])
        of_first = [part for part in (grads.bias1, grads.weight_v1, grads.weight_g1) if part is not None]
        assert not any(part[off].any() for part in of_first)
        assert all(part[on].flatten(1 if part.dim() > 1 else 0).any() for part in of_first)
        assert norm or not grads.weight_v2[:, off].any()


def test_the_gradient_of_v_is_orthogonal_to_v(isa: str) -> None:
    """weight = g v / |v| does not depend on the length of v, so the gradient of v is orthogonal to v."""
    x, blocks = randn(300, 6, 14, dtype=torch.float32), stack(6, [20, 20], 3, dtype=torch.float32)
    result = results(temporal_conv_net, x, blocks, randn(300, 20, seed=1, dtype=torch.float32) + 0.5)
    grads = like(blocks, result[2:])
    for block, grad in zip(blocks, grads, strict=True):
        for v, of_v in ((block.weight_v1, grad.weight_v1), (block.weight_v2, grad.weight_v2)):
            v, of_v = v.double().flatten(1), of_v.double().flatten(1)
            along = (v * of_v).sum(1).abs() / (v.norm(dim=1) * of_v.norm(dim=1)).clamp_min(1e-30)
            assert along.max() < 1e-6
            assert of_v.norm() > 0


def test_sums_over_many_rows_stay_accurate(isa: str) -> None:
    """Gradients that are sums of 80,000 terms of one sign, and of the same terms without their mean."""
    x, blocks = randn(4000, 6, 20, dtype=torch.float32) + 0.5, stack(6, [16], 3, norm=False, dtype=torch.float32)
    blocks = [blocks[0]._replace(bias1=blocks[0].bias1 + 8, bias2=blocks[0].bias2 + 30)]  # all ReLUs open
    wide = like(blocks, [part.double() for part in flat(blocks)])
    grad = randn(4000, 16, 20, seed=1, dtype=torch.float32) + 1
    limit = 1e-6 if NATIVE else 1e-5
    for given_grad in (grad, grad - grad.mean((0, 2), keepdim=True)):
        result = results(lambda *t: temporal_conv_net(*t, all_steps=True), x, blocks, given_grad)[2:]
        exact = results(lambda *t: oracle(*t, all_steps=True), x.double(), wide, given_grad.double())[2:]
        sizes = results(lambda *t: oracle(*t, all_steps=True), x.double(), wide, grad.double())[2:]
        shares = [float((a - b).norm() / c.norm()) for a, b, c in zip(result, exact, sizes, strict=True)]
        assert max(shares) < limit


# ---------------------------------------------------------------- large strides
@pytest.mark.slow
def test_rows_beyond_two_to_the_31_elements(isa: str) -> None:
    """Offsets are 64 bits wide. The memory between the rows is never touched."""
    stride = 2**30 + 64
    memory = torch.empty(3 * stride, dtype=torch.float32)
    x = memory.as_strided((3, 4, 9), (stride, 1, 4))
    x.copy_(randn(3, 4, 9))
    blocks = stack(4, [8, 8], 3, dtype=torch.float32)
    near = x.clone()
    assert torch.equal(temporal_conv_net(x, blocks), temporal_conv_net(near, blocks))


def test_the_mask_of_the_oracle_scales() -> None:
    """The dropout of the oracle, which the property-based test relies on."""
    result = philox_mask(5, 40, 30, 50, 3, 0.25)
    assert set(result.unique().tolist()) == {0.0, 1 / 0.75}
    assert abs(float(result.mean()) - 1) < 0.01
