"""Dropout of the encoder layer: the masks of the definition, their distribution, and the backward pass."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from qfast.ops import encoder_layer
from qfast.ops.encoder_layer_twin import backward_twin, forward_twin
from qfast.ops.philox import draw_seed
from support.encoder import NAMES, LayerCase, layer_of_masks, raw_gradients
from support.operator_case import F32, F64, errors_above, relative_error, results

SEEDS = [0, -1, 2**31, 2**32, 2**63 - 1, -(2**63), 0x9E3779B97F4A7C15 - 2**64]
CASES = [
    *(LayerCase(3, t, 8, 2, 5, last) for t in (1, 2, 3, 4, 5, 9) for last in (False, True)),
    *(LayerCase(b, 6, 12, 3, 17, last) for b in (1, 2, 5, 26, 131) for last in (False, True)),
    *(LayerCase(5, t, 24, 3, 70, last) for t in (20, 37, 130) for last in (False, True)),
    *(LayerCase(2, 7, 20, 20, 300, last) for last in (False, True)),
    LayerCase(6, 20, 64, 2, 2048),
    LayerCase(6, 20, 64, 2, 2048, True),
    *(LayerCase(0, 6, 12, 3, 17, last) for last in (False, True)),
]
BY_NAME = {case.name: case for case in CASES}


def seeded(case: LayerCase, tensors: list[Tensor], dropout: float, seed: int) -> list[Tensor]:
    """Result and gradients with the given seed instead of one drawn from torch's generator."""
    out, *_, gradients = raw_gradients(case, tensors, dropout, seed)
    return [out, *gradients]


def far_apart(result: list[Tensor], exact: list[Tensor], limit: float) -> list[tuple[str, float]]:
    """Whether the relative errors are large.

    Vanishing gradients are compared with the largest one, since dropout may leave none.
    """
    size = max(float(part.norm()) for part in exact[1:])
    misses = []
    for name, ours, true in zip(["out", "x", *NAMES], result, exact, strict=True):
        error = float((ours.double() - true).norm())
        if error > limit * float(true.norm()) + 1e-2 * limit * size:
            misses.append((name, error))
    return misses


# ---------------------------------------------------------------- the masks of the definition
@pytest.mark.parametrize("case", BY_NAME)
def test_the_masks_are_those_of_the_definition(case: str, isa: str) -> None:
    """All four masks at once, forward and backward, in float64."""
    inputs = BY_NAME[case]
    number, tensors = CASES.index(inputs), inputs.inputs()
    seed, dropout = SEEDS[number % len(SEEDS)], (0.1, 0.5, 0.9)[number % 3]
    exact = results(partial(layer_of_masks, inputs, dropout=dropout, seed=seed), tensors)
    assert far_apart(seeded(inputs, tensors, dropout, seed), exact, 1e-12) == []


@pytest.mark.parametrize("dropout", [1e-9, 1.0])
@pytest.mark.parametrize("last", [False, True])
def test_dropout_near_zero_and_one(last: bool, dropout: float, isa: str) -> None:
    case = LayerCase(9, 6, 12, 3, 17, last)
    tensors = case.inputs()
    result = seeded(case, tensors, dropout, 5)
    exact = results(partial(layer_of_masks, case, dropout=dropout, seed=5), tensors)
    assert far_apart(result, exact, 1e-12) == []
    assert all(torch.isfinite(part).all() for part in result)
    if dropout == 1:  # only the residual passes both norms; attention and block have no gradient
        assert not any(part.any() for part in result[2:10])
    else:
        assert errors_above(result[:1], [case.reference(tensors)], 1e-8) == []


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 6, 7, 8, 21])
def test_the_last_step_alone_has_the_masks_it_has_among_all(steps: int, isa: str) -> None:
    case, last = LayerCase(11, steps, 24, 3, 70), LayerCase(11, steps, 24, 3, 70, True)
    tensors = case.inputs()
    whole, alone = (
        results(call, tensors)
        for call in (lambda t: operator_under(13, case, t)[:, -1], lambda t: operator_under(13, last, t))
    )
    assert errors_above(alone, whole, 1e-13) == []


def operator_under(torch_seed: int, case: LayerCase, tensors: list[Tensor], dropout: float = 0.4) -> Tensor:
    torch.manual_seed(torch_seed)
    return case.operator(tensors, dropout=dropout, training=True)


@pytest.mark.parametrize("last", [False, True])
def test_all_64_bits_of_the_seed_count(last: bool, isa: str) -> None:
    case = LayerCase(9, 5, 12, 2, 20, last)
    tensors = case.inputs()
    for seed in SEEDS:
        result = seeded(case, tensors, 0.4, seed)[0]
        assert relative_error(result, layer_of_masks(case, tensors, 0.4, seed)) < 1e-13
        for other in {seed ^ 1, (seed ^ 1 << 62)} - {seed}:
            assert relative_error(seeded(case, tensors, 0.4, other)[0], result) > 0.01


@pytest.mark.parametrize("last", [False, True])
def test_float32_drops_the_same_elements(last: bool, isa: str) -> None:
    case = LayerCase(30, 7, 20, 2, 50, last)
    narrow, wide = (seeded(case, case.inputs(dtype), 0.3, 7) for dtype in (F32, F64))
    assert far_apart(narrow, wide, 2e-5) == []


@pytest.mark.parametrize("last", [False, True])
def test_the_mask_of_a_window_does_not_depend_on_other_windows(last: bool, isa: str) -> None:
    """The mask depends on the number of the window, not on the tiles: a shorter batch has the same first windows."""
    x, *weights = LayerCase(200, 5, 16, 2, 40, last).inputs()
    whole = seeded(LayerCase(200, 5, 16, 2, 40, last), [x, *weights], 0.5, 11)[0]
    for count in (1, 2, 5, 24, 97):
        case = LayerCase(count, 5, 16, 2, 40, last)
        assert relative_error(seeded(case, [x[:count], *weights], 0.5, 11)[0], whole[:count]) < 1e-13
        moved = seeded(case, [x[7 : 7 + count], *weights], 0.5, 11)[0]
        assert relative_error(moved, whole[7 : 7 + count]) > 0.01


@pytest.mark.parametrize("last", [False, True])
def test_kernels_save_the_same_tensors_as_plain_torch(last: bool, isa: str) -> None:
    case = LayerCase(30, 7, 20, 2, 50, last)
    tensors, seed = case.inputs(), torch.tensor([77])
    out, normalised, scales, hidden, gradients = raw_gradients(case, tensors, 0.3, 77)
    expected = forward_twin(tensors[0], tensors[1:], 2, 1e-5, 0.3, seed, last)
    assert hidden.numel() == 0
    assert errors_above([out, normalised, scales], expected, 1e-13) == []
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(F64)
    of_x, of_weights = backward_twin(grad, tensors[0], tensors[1:], 2, 0.3, seed, last, *expected[1:])
    assert far_apart([out, *gradients], [expected[0], of_x, *of_weights], 1e-12) == []


# ---------------------------------------------------------------- distribution of the masks
def before_the_norms(changes: dict[str, Tensor], batch: int, steps: int, width: int, p: float) -> Tensor:
    """Inputs of both norms [2, B, T, D] without the mean of each row, for a layer of zeros except for `changes`.

    An eps of 1e12 makes the norms divide by a million, whatever their inputs; the influence of the first on the second
    is nothing.
    """
    sizes = ((3 * width, width), (3 * width,), (width, width), (width,), (8, width), (8,), (width, 8))
    weights = dict(zip(NAMES, [torch.zeros(size) for size in (*sizes, *[(width,)] * 5)], strict=True))
    weights.update(changes)
    x, seed = torch.zeros(batch, steps, width), draw_seed(torch.device("cpu"))
    inputs = (x, list(weights.values()), 2, 1e12, p, seed, False, True)
    return torch.ops.qfast.encoder_layer(*inputs)[1] * 1e6


@pytest.mark.parametrize("p", [0.05, 0.3, 0.8])
@pytest.mark.parametrize("place", ["out_proj.bias", "linear2.bias"])
def test_rate_and_scale_after_the_attention_and_the_block(place: str, p: float, isa: str) -> None:
    """Features of +1 and -1: 1 / (1 - p) or 0, minus an irrelevant mean."""
    torch.manual_seed(1)
    sign = torch.ones(256)
    sign[1::2] = -1
    result = before_the_norms({place: sign}, 30, 10, 256, p)[NAMES.index(place) // 4]
    dropped = 0.5 * (result.max(2, keepdim=True).values + result.min(2, keepdim=True).values)  # in the middle of both
    values = (result - dropped) * sign
    saved = values > 0.5
    torch.testing.assert_close(values, saved / (1 - p), rtol=1e-4, atol=1e-4)
    assert abs(float(saved.double().mean()) - (1 - p)) < 5 * (p * (1 - p) / saved.numel()) ** 0.5


@pytest.mark.parametrize("p", [0.05, 0.3, 0.8])
def test_rate_and_scale_of_the_attention_weights(p: float, isa: str) -> None:
    """Values of 1 and equal weights: each head counts the keys that are not dropped for its query."""
    torch.manual_seed(1)
    steps, width = 32, 256
    sign = torch.ones(width)
    sign[1::2] = -1
    values = {"in_proj_bias": torch.tensor([0.0, 0.0, 1.0]).repeat_interleave(width), "out_proj.weight": sign.diag()}
    heads = before_the_norms(values, 50, steps, width, p)[0].unflatten(2, (2, width // 2))
    size = (heads.max(3).values - heads.min(3).values) / 2  # the values that remain after the attention, of either sign
    counts = size.double() * steps * (1 - p) ** 2
    torch.testing.assert_close(counts, counts.round(), rtol=0, atol=1e-2)
    rows, spread = counts.numel(), steps * p * (1 - p)
    assert abs(float(counts.mean()) - steps * (1 - p)) < 5 * (spread / rows) ** 0.5
    assert abs(float(counts.var()) / spread - 1) < 6 * (2 / rows) ** 0.5
    together = torch.corrcoef(counts.flatten(0, 1).t())[0, 1]  # the masks of the heads are independent
    assert abs(float(together)) < 5 / (rows / 2) ** 0.5


# ---------------------------------------------------------------- torch's generator
@pytest.mark.parametrize("last", [False, True])
def test_manual_seed_makes_it_repeat(last: bool, isa: str) -> None:
    case = LayerCase(20, 5, 16, 2, 40, last)
    tensors = case.inputs()
    torch.manual_seed(5)
    first, second = (case.operator(tensors, dropout=0.5, training=True) for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(5)
    seed = int(draw_seed(torch.device("cpu")))
    assert relative_error(first, layer_of_masks(case, tensors, 0.5, seed)) < 1e-13
    torch.manual_seed(5)  # the same draw with and without gradients
    wanted = case.operator([t.detach().requires_grad_() for t in tensors], dropout=0.5, training=True)
    assert relative_error(wanted.detach(), first) < 1e-13


def test_no_seed_is_drawn_without_dropout(isa: str) -> None:
    case = LayerCase(20, 5, 16, 2, 40)
    tensors, state = case.inputs(), torch.get_rng_state()
    plain = case.operator(tensors)
    assert torch.equal(case.operator(tensors, dropout=0.5), plain)  # not training
    assert torch.equal(case.operator(tensors, dropout=0.0, training=True), plain)
    assert torch.equal(torch.get_rng_state(), state)
    case.operator(tensors, dropout=0.5, training=True)
    assert not torch.equal(torch.get_rng_state(), state)


def test_on_average_it_is_the_layer_of_torch(isa: str) -> None:
    """Means over many identical windows equal those of torch's dropout within a few standard errors."""
    count = 4000
    x, *weights = LayerCase(1, 5, 8, 2, 20).inputs(F32)
    layer = torch.nn.TransformerEncoderLayer(8, 2, 20, 0.3, batch_first=True)
    with torch.no_grad():
        for parameter, inputs in zip(layer.parameters(), weights, strict=True):
            parameter.copy_(inputs)
        torch.manual_seed(0)
        many = x.expand(count, 5, 8)
        theirs, ours = layer(many), encoder_layer(many, weights, heads=2, dropout=0.3, training=True)
    error = (theirs.var(0) / count + ours.var(0) / count).sqrt()
    assert float(((theirs.mean(0) - ours.mean(0)) / error).abs().max()) < 5
    assert float((theirs.std(0) / ours.std(0) - 1).abs().max()) < 0.1


# ---------------------------------------------------------------- backward
@pytest.mark.parametrize("last", [False, True])
def test_gradients_by_finite_differences_under_one_mask(last: bool, isa: str) -> None:
    case = LayerCase(2, 3, 4, 2, 5, last)
    leaves = [t.requires_grad_() for t in case.inputs()]
    assert torch.autograd.gradcheck(lambda *t: operator_under(21, case, list(t)), leaves)


@pytest.mark.parametrize("last", [False, True])
def test_the_public_function_differentiates_the_masks_it_drew(last: bool, isa: str) -> None:
    """Two calls are made before their backward passes, which run in the opposite order. Each has its own seed."""
    case = LayerCase(20, 5, 16, 2, 40, last)
    tensors = case.inputs()
    leaves = [[t.detach().requires_grad_() for t in tensors] for _ in range(2)]
    torch.manual_seed(8)
    outs = [case.operator(ours, dropout=0.5, training=True) for ours in leaves]
    torch.manual_seed(8)
    seeds = [int(draw_seed(torch.device("cpu"))) for _ in range(2)]
    for which in (1, 0):
        exact = [t.detach().requires_grad_() for t in tensors]
        layer_of_masks(case, exact, 0.5, seeds[which]).square().sum().backward()
        outs[which].square().sum().backward()
        grads = [[t.grad for t in side] for side in (leaves[which], exact)]
        assert far_apart([outs[which].detach(), *grads[0]], [outs[which].detach(), *grads[1]], 1e-11) == []


def test_under_transforms_the_masks_are_the_same(isa: str) -> None:
    case = LayerCase(6, 4, 8, 2, 10)
    x, *weights = case.inputs()
    expected = operator_under(3, case, [x, *weights])
    along = torch.zeros_like(x)
    result, tangent = torch.func.jvp(lambda x: operator_under(3, case, [x, *weights]), (x,), (along,))
    assert relative_error(result, expected) < 1e-13
    assert not tangent.any()
