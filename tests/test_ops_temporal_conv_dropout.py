"""Dropout of temporal convolution stacks: the masks of the definition, their distribution, and the backward pass."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from qfast.ops import BlockWeights, temporal_block, temporal_conv_net
from qfast.ops.philox import draw_seed
from support.operator_case import relative_error
from support.temporal_conv import flat, like, oracle, results, same_bits, stack, stack_errors_above
from support.tensors import SEEDS, philox_mask, philox_words, randn


class _WithSeed:
    """The operator with the given seed instead of one drawn from torch's generator."""

    def __init__(self, seed: int, dropout: float, all_steps: bool = False, dilations: list[int] | None = None) -> None:
        self.seed, self.dropout, self.all_steps = torch.tensor([seed]), dropout, all_steps
        self.dilations = dilations

    def __call__(self, x: Tensor, blocks: list[BlockWeights]) -> Tensor:
        """Blocks without weight normalisation."""
        dilations = self.dilations or [2**i for i in range(len(blocks))]
        inputs = (x.transpose(1, 2), flat(blocks), dilations, self.dropout, self.seed, self.all_steps)
        out = torch.ops.qfast.temporal_conv_net(*inputs, torch.is_grad_enabled() and x.requires_grad)[0]
        return out.transpose(1, 2) if self.all_steps else out

    def expected(self, x: Tensor, blocks: list[BlockWeights]) -> Tensor:
        settings = {"all_steps": self.all_steps, "dropout": self.dropout, "seed": int(self.seed)}
        return oracle(x, blocks, self.dilations, **settings)


# ---------------------------------------------------------------- the mask of the definition
@pytest.mark.parametrize("all_steps", [False, True])
@pytest.mark.parametrize("dropout", [1e-9, 0.1, 0.5, 0.9, 1.0])
def test_the_mask_is_that_of_the_definition(dropout: float, all_steps: bool, isa: str) -> None:
    """Word b % 4 of the counter (channel, step, convolution, b // 4): forward and backward, in float64."""
    for batch, channels in ((1, [5, 5]), (3, [16, 17]), (4, [33, 8, 8]), (5, [64]), (26, [9, 9])):
        x, blocks = randn(batch, 4, 11, seed=batch), stack(4, channels, 3, norm=False)
        grad = randn(batch, channels[-1], 11, seed=1) if all_steps else randn(batch, channels[-1], seed=1)
        call = _WithSeed(SEEDS[batch % len(SEEDS)], dropout, all_steps)
        assert stack_errors_above(results(call, x, blocks, grad), results(call.expected, x, blocks, grad), 1e-12) == []


@pytest.mark.parametrize("seed", SEEDS)
def test_all_64_bits_of_the_seed_count(seed: int, isa: str) -> None:
    x, blocks = randn(9, 3, 7), stack(3, [12], 3, norm=False)
    call = _WithSeed(seed, 0.4, all_steps=True)
    assert relative_error(call(x, blocks), call.expected(x, blocks)) < 1e-13
    for other in {seed ^ 1, (seed ^ 1 << 62)} - {seed}:
        assert relative_error(_WithSeed(other, 0.4, all_steps=True)(x, blocks), call(x, blocks)) > 0.1


def test_float32_drops_the_same_elements(isa: str) -> None:
    x, blocks = randn(30, 4, 9), stack(4, [20, 20], 3, norm=False)
    call = _WithSeed(7, 0.3)
    narrow = call(x.float(), like(blocks, [part.float() for part in flat(blocks)]))
    assert relative_error(narrow, call(x, blocks)) < 1e-6


def test_long_windows_and_wide_layers(isa: str) -> None:
    for batch, steps, all_steps in ((6, 250, False), (1, 700, True), (5, 300, True)):
        x, blocks = randn(batch, 3, steps), stack(3, [130, 5], 9, norm=False)
        grad = randn(batch, 5, steps, seed=1) if all_steps else randn(batch, 5, seed=1)
        call = _WithSeed(5, 0.25, all_steps, dilations=[3, 7])
        assert stack_errors_above(results(call, x, blocks, grad), results(call.expected, x, blocks, grad), 1e-12) == []


@pytest.mark.parametrize("rows", [1, 2, 5, 24, 25, 97])
def test_the_mask_of_a_row_does_not_depend_on_other_rows(rows: int, isa: str) -> None:
    """The mask depends on the number of the row, not on the tiles: a shorter batch has the same first rows."""
    x, blocks = randn(200, 4, 9), stack(4, [16, 16], 3, norm=False)
    call = _WithSeed(11, 0.5)
    assert relative_error(call(x[:rows], blocks), call(x, blocks)[:rows]) < 1e-13
    assert relative_error(call(x[7 : 7 + rows], blocks), call(x, blocks)[7 : 7 + rows]) > 0.1


def test_the_last_step_alone_drops_what_all_steps_drop(isa: str) -> None:
    x, blocks = randn(13, 4, 30), stack(4, [16, 16], 3, norm=False)
    assert relative_error(_WithSeed(3, 0.5)(x, blocks), _WithSeed(3, 0.5, all_steps=True)(x, blocks)[:, :, -1]) < 1e-13


def test_windows_of_consecutive_rows_share_nothing_under_dropout(isa: str) -> None:
    """Each window has its own mask, with and without a gradient."""
    windows, blocks = randn(80, 4).unfold(0, 20, 1), stack(4, [9, 9], 3, norm=False)
    call = _WithSeed(3, 0.5)
    with torch.no_grad():
        assert relative_error(call(windows, blocks), call.expected(windows, blocks)) < 1e-13


# ---------------------------------------------------------------- distribution of the masks
def dropped_both(p: float, batch: int, channels: int, steps: int, seed: int) -> Tensor:
    """The ones that remain after the two dropouts of a block that otherwise passes them through."""
    eye = torch.eye(channels, dtype=torch.float64).unsqueeze(2)
    block = BlockWeights(eye, None, torch.zeros(channels).double(), eye, None, torch.zeros(channels).double())
    x = torch.ones(batch, channels, steps, dtype=torch.float64)
    call = _WithSeed(seed, p, all_steps=True, dilations=[1])
    return call(x, [block]) - 1  # the block adds its input


@pytest.mark.parametrize("p", [0.05, 0.3, 0.5, 0.8])
def test_rate_and_scale_of_the_operator(p: float) -> None:
    """A one survives both dropouts of a block with probability (1 - p)^2 and is scaled by the inverse; five standard
    errors."""
    result = dropped_both(p, 60, 50, 40, seed=17)
    keep = (1 - p) ** 2
    assert set((result * keep).round(decimals=12).unique().tolist()) == {0.0, 1.0}
    rate = float((result > 0).double().mean())
    assert abs(rate - keep) < 5 * (keep * (1 - keep) / result.numel()) ** 0.5
    assert abs(float(result.mean()) - 1) < 5 * ((1 / keep - 1) / result.numel()) ** 0.5


def neighbours() -> Iterator[tuple[str, Tensor, Tensor]]:
    """Masks of 120,000 elements and those of the next row, channel, step, convolution and seed."""
    shape, p = (50, 40, 60), 0.3
    whole = philox_mask(17, *shape, 4, p)
    for axis, name in enumerate(("row", "channel", "step")):
        for far in (1, 2, 4, 16):
            yield f"{name} +{far}", whole.narrow(axis, 0, shape[axis] - far), whole.narrow(axis, far, shape[axis] - far)
    yield "convolution", whole, philox_mask(17, *shape, 5, p)
    yield "block", whole, philox_mask(17, *shape, 6, p)
    yield "seed", whole, philox_mask(18, *shape, 4, p)
    yield "high half of the seed", whole, philox_mask(17 + 2**32, *shape, 4, p)
    yield "channel and step changed over", whole[:, :, :40], whole[:, :, :40].transpose(1, 2)


@pytest.mark.parametrize(("a", "b"), [pytest.param(a, b, id=name) for name, a, b in neighbours()])
def test_elements_are_independent(a: Tensor, b: Tensor) -> None:
    """The masks of the definition, which the tests above compare with the operator's: no correlation beyond five
    standard errors."""
    x, y = ((m > 0).double() - 0.7 for m in (a, b))
    if torch.equal(x, y.transpose(1, 2)):  # overlapping elements: each pair counts once, and none with itself
        x, y = (m.triu(1) for m in (x, y))
    correlation = float((x * y).sum() / (0.3 * 0.7))
    count = int((x * y != 0).sum())
    assert count > 10_000
    assert abs(correlation) < 5 * count**0.5


def test_words_are_uniform() -> None:
    """Chi-squared over 256 cells of each word: its 1 - 1e-6 quantile with 255 degrees of freedom is about 376."""
    counter = (
        torch.arange(20).view(-1, 1, 1).numpy(),
        torch.arange(50).view(1, -1, 1).numpy(),
        3,
        torch.arange(100).numpy(),
    )
    for word in philox_words(99, counter):
        for shift in (0, 8, 16, 24):
            cells = torch.from_numpy((word >> shift & 255).astype("int64")).flatten().bincount(minlength=256)
            even = word.size / 256
            assert float(((cells - even) ** 2 / even).sum()) < 376


# ---------------------------------------------------------------- torch's generator
def test_manual_seed_makes_it_repeat(isa: str) -> None:
    x, blocks = randn(20, 4, 9), stack(4, [16, 16], 3)
    torch.manual_seed(5)
    first, second = (temporal_conv_net(x, blocks, dropout=0.5, training=True) for _ in range(2))
    assert not same_bits(first, second)
    torch.manual_seed(5)
    seed = int(draw_seed(x.device))
    assert relative_error(first, oracle(x, blocks, dropout=0.5, seed=seed)) < 1e-13
    torch.manual_seed(5)
    with torch.no_grad():  # the same draw with and without gradients
        assert same_bits(temporal_conv_net(x, blocks, dropout=0.5, training=True), first)
    torch.manual_seed(5)
    block = blocks[:1]
    assert same_bits(
        temporal_block(x, block[0], dropout=0.5, training=True),
        _reseeded(lambda: temporal_conv_net(x, block, dropout=0.5, training=True, all_steps=True)),
    )


def _reseeded(call):
    torch.manual_seed(5)
    return call()


def test_no_seed_is_drawn_without_dropout(isa: str) -> None:
    x, blocks = randn(20, 4, 9), stack(4, [16, 16], 3)
    state = torch.get_rng_state()
    plain = temporal_conv_net(x, blocks)
    assert torch.equal(temporal_conv_net(x, blocks, dropout=0.5), plain)  # not training
    assert torch.equal(temporal_conv_net(x, blocks, dropout=0.0, training=True), plain)
    assert torch.equal(torch.get_rng_state(), state)
    temporal_conv_net(x, blocks, dropout=0.5, training=True)
    assert not torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("all_steps", [False, True])
def test_all_dropped(all_steps: bool, isa: str) -> None:
    """Only the residual path remains, and no convolution gets a gradient."""
    x, blocks = randn(6, 4, 9), stack(4, [5, 5], 3, norm=False)
    grad = randn(6, 5, 9, seed=1) if all_steps else randn(6, 5, seed=1)
    result = results(
        lambda x, b: temporal_conv_net(x, b, dropout=1.0, training=True, all_steps=all_steps), x, blocks, grad
    )
    residual = torch.nn.functional.conv1d(x, blocks[0].downsample_weight, blocks[0].downsample_bias).relu()
    assert relative_error(result[0], residual if all_steps else residual[:, :, -1]) < 1e-14
    grads = like(blocks, result[2:])
    for block in grads:
        for part in block[:6]:
            assert part is None or not part.any()
    assert grads[0].downsample_weight.any()


# ---------------------------------------------------------------- backward
@pytest.mark.parametrize("all_steps", [False, True])
def test_gradients_by_finite_differences_under_one_mask(all_steps: bool, isa: str) -> None:
    x, blocks = randn(5, 2, 6, seed=2), stack(2, [3, 4], 2, norm=False, seed=3)
    call = _WithSeed(21, 0.4, all_steps)
    leaves = [t.requires_grad_() for t in (x, *flat(blocks))]
    assert torch.autograd.gradcheck(lambda x, *parts: call(x, like(blocks, parts)), leaves)


def test_the_public_function_differentiates_the_mask_it_drew(isa: str) -> None:
    """Two calls are made before their backward passes, which run in the opposite order. Each has its own seed."""
    x, blocks = randn(20, 4, 9), stack(4, [16, 16], 3)
    grad = randn(20, 16, seed=1)
    leaves = [[t.clone().requires_grad_() for t in (x, *flat(blocks))] for _ in range(2)]
    torch.manual_seed(8)
    outs = [temporal_conv_net(a, like(blocks, rest), dropout=0.5, training=True) for a, *rest in leaves]
    torch.manual_seed(8)
    seeds = [int(draw_seed(x.device)) for _ in range(2)]
    for which in (1, 0):
        outs[which].backward(grad)
        exact = results(lambda x, b, s=seeds[which]: oracle(x, b, dropout=0.5, seed=s), x, blocks, grad)
        assert stack_errors_above([outs[which].detach(), *(leaf.grad for leaf in leaves[which])], exact, 1e-12) == []


def test_dropout_keeps_the_expected_result() -> None:
    """With positive values no ReLU is active, so the mean over many masks is the result without dropout."""
    block = stack(3, [4], 2, norm=False)[0]
    positive = BlockWeights(*(None if part is None else part.abs() for part in block))
    x = randn(1, 3, 5).abs().expand(40_000, 3, 5)
    torch.manual_seed(1)
    result = temporal_conv_net(x, [positive], dropout=0.3, training=True)
    exact = temporal_conv_net(x[:1], [positive])
    error = result.std(0) / len(result) ** 0.5
    assert ((result.mean(0) - exact[0]).abs() < 5 * error).all()
