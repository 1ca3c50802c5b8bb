"""Dropout between recurrent layers: the masks of the definition, their distribution, and the backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import pytest
import torch
from torch import Tensor

from qfast.ops.philox import draw_seed, dropout_mask
from qfast.ops.recurrent import _Function
from support.operator_case import F32, errors_above, relative_error, results
from support.recurrent import CELLS, NAMES, NATIVE, RecurrentCase
from support.tensors import philox_mask

SEEDS = [0, 1, -1, 2**31, 2**32, 2**63 - 1, -(2**63), 0x9E3779B97F4A7C15 - 2**64]


def seeded(
    case: RecurrentCase, tensors: Sequence[Tensor], dropout: float, seed: int, all_steps: bool | None = None
) -> list[Tensor]:
    """The operator with the given seed instead of one drawn from torch's generator."""
    number = torch.tensor([seed])
    if torch.is_grad_enabled():
        x, *others = tensors
        n_states, all_steps = case.split(tensors).n_states, case.all_steps if all_steps is None else all_steps
        return list(_Function.apply(CELLS[case.cell], n_states, dropout, number, all_steps, 0, x, *others))
    out = getattr(torch.ops.qfast, case.cell)(*case.raw(tensors, dropout, number, all_steps), False)
    return list(out[: case.n_outputs])


# ---------------------------------------------------------------- the mask of the definition
@pytest.mark.parametrize("dropout", [1e-9, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("name", NAMES)
def test_the_mask_is_that_of_the_definition(name: str, dropout: float, isa: str) -> None:
    """Word b % 4 of the counter (unit, step, layer, b // 4): forward and backward, in float64."""
    cases = [
        RecurrentCase(name, 1, 4, 3, 5, 2),
        RecurrentCase(name, 3, 5, 3, 17, 3, True, True),
        RecurrentCase(name, 5, 3, 4, 64, 2, True),
        RecurrentCase(name, 26, 7, 3, 9, 4),
        RecurrentCase(name, 131, 3, 3, 33, 2, False, True),
    ]
    for number, case in enumerate(cases):
        inputs, seed = case.inputs(), SEEDS[number]
        result = results(partial(seeded, case, dropout=dropout, seed=seed, all_steps=case.all_steps), inputs)
        exact = results(partial(case.reference, dropout=dropout, seed=seed, all_steps=case.all_steps), inputs)
        assert errors_above(result, exact, 1e-12) == []
        with torch.no_grad():
            bare = seeded(case, inputs, dropout, seed, case.all_steps)
        assert errors_above(bare, exact[: len(bare)], 1e-12) == []


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", NAMES)
def test_all_64_bits_of_the_seed_count(name: str, seed: int, isa: str) -> None:
    case = RecurrentCase(name, 9, 5, 3, 12, 2, True)
    inputs = case.inputs()
    result = seeded(case, inputs, 0.4, seed, True)[0]
    assert relative_error(result, case.reference(inputs, dropout=0.4, seed=seed, all_steps=True)[0]) < 1e-13
    for other in {seed ^ 1, (seed ^ 1 << 62)} - {seed}:
        assert relative_error(seeded(case, inputs, 0.4, other, True)[0], result) > 0.01


@pytest.mark.parametrize("name", NAMES)
def test_float32_drops_the_same_elements(name: str, isa: str) -> None:
    case = RecurrentCase(name, 30, 6, 4, 20, 3)
    result = seeded(case, case.inputs(F32), 0.3, 7)
    assert errors_above(result, seeded(case, case.inputs(), 0.3, 7), 1e-6) == []


@pytest.mark.parametrize("rows", [1, 2, 5, 24, 25, 97])
@pytest.mark.parametrize("name", NAMES)
def test_the_mask_of_a_row_does_not_depend_on_other_rows(name: str, rows: int, isa: str) -> None:
    """The mask depends on the number of the row, not on the tiles: a shorter batch has the same first rows."""
    case = RecurrentCase(name, 200, 4, 4, 16, 2)
    whole = case.inputs()
    all_rows = seeded(case, whole, 0.5, 11)[0]
    assert relative_error(seeded(case, [whole.x[:rows], *whole.weights], 0.5, 11)[0], all_rows[:rows]) < 1e-13
    moved = seeded(case, [whole.x[7 : 7 + rows], *whole.weights], 0.5, 11)[0]
    assert relative_error(moved, all_rows[7 : 7 + rows]) > 0.01


@pytest.mark.parametrize("name", NAMES)
def test_windows_of_consecutive_rows_have_different_masks(name: str, isa: str) -> None:
    case = RecurrentCase(name, 60, 9, 4, 9, 2, layout="windows")
    inputs = case.inputs()
    with torch.no_grad():
        assert errors_above(seeded(case, inputs, 0.5, 3), case.reference(inputs, dropout=0.5, seed=3), 1e-13) == []


# ---------------------------------------------------------------- distribution of the masks
def test_the_plain_form_draws_the_same_mask() -> None:
    for batch, steps, hidden, layer, p in ((5, 3, 7, 0, 0.3), (16, 1, 1, 2, 0.9), (1, 9, 20, 1, 1.0)):
        like = torch.zeros(batch, steps, hidden, dtype=torch.float64)
        drawn = philox_mask(17, batch, hidden, steps, layer, p).transpose(1, 2)
        assert torch.equal(dropout_mask(like, layer, p, torch.tensor([17])), drawn)


@pytest.mark.parametrize("p", [0.05, 0.3, 0.5, 0.8])
def test_rate_and_scale_of_the_operator(p: float, isa: str) -> None:
    """The second layer of the LSTM passes its input through, so the result is the mask.

    Its rate is within five standard errors of p.
    """
    hidden, batch, steps, big = 40, 50, 30, 1e4
    zero, eye = torch.zeros(4 * hidden, hidden), torch.eye(hidden)
    shut = torch.tensor([big, -big, 0.0, big]).repeat_interleave(hidden)  # i = 1, f = 0, o = 1: h = tanh(tanh(g))
    level = shut.clone()
    level[2 * hidden : 3 * hidden] = 0.5  # the first layer's h is the same everywhere
    second = torch.cat([zero[: 2 * hidden], eye, zero[:hidden]])
    weights = [zero[:, :1], zero, level, zero[:, 0], second, zero, shut, zero[:, 0]]
    case = RecurrentCase("lstm", batch, steps, 1, hidden, 2, all_steps=True)
    with torch.no_grad():
        result = seeded(case, [torch.zeros(batch, steps, 1), *(w.clone() for w in weights)], p, 17)[0]
    saved = result != 0
    h = torch.tensor(0.5).tanh().tanh()
    torch.testing.assert_close(result[saved], (h / (1 - p)).tanh().tanh().expand(int(saved.sum())))
    rate = float(saved.double().mean())
    assert abs(rate - (1 - p)) < 5 * (p * (1 - p) / result.numel()) ** 0.5


# ---------------------------------------------------------------- torch's generator
@pytest.mark.parametrize("name", NAMES)
def test_manual_seed_makes_it_repeat(name: str, isa: str) -> None:
    case = RecurrentCase(name, 20, 5, 4, 16, 2)
    inputs = case.inputs()
    torch.manual_seed(5)
    first, second = (case.operator(inputs, dropout=0.5, training=True)[0] for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(5)
    seed = int(draw_seed(inputs.x.device))
    assert relative_error(first, case.reference(inputs, dropout=0.5, seed=seed)[0]) < 1e-13
    leaves = [w.detach().requires_grad_() for w in inputs.weights]
    torch.manual_seed(5)  # the same draw with and without gradients
    wanted = case.operator([inputs.x, *leaves], dropout=0.5, training=True)[0]
    assert torch.equal(wanted, first) if NATIVE else relative_error(wanted, first) < 1e-13


@pytest.mark.parametrize("name", NAMES)
def test_no_seed_is_drawn_without_dropout(name: str, isa: str) -> None:
    case, one_layer = RecurrentCase(name, 20, 5, 4, 16, 2), RecurrentCase(name, 20, 5, 4, 16, 1)
    inputs, single = case.inputs(), one_layer.inputs()
    state = torch.get_rng_state()
    plain = case.operator(inputs)[0]
    assert torch.equal(case.operator(inputs, dropout=0.5)[0], plain)  # not training
    assert torch.equal(case.operator(inputs, dropout=0.0, training=True)[0], plain)
    assert torch.equal(
        one_layer.operator(single, dropout=0.5, training=True)[0], one_layer.operator(single)[0]
    )  # no second layer
    assert torch.equal(torch.get_rng_state(), state)
    case.operator(inputs, dropout=0.5, training=True)
    assert not torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("all_steps", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_all_dropped(name: str, all_steps: bool, isa: str) -> None:
    """The last layer sees zeros, so neither its input weights nor the layers below get a gradient from the output."""
    case = RecurrentCase(name, 6, 5, 4, 9, 2)
    inputs = case.inputs()
    used = [True] + [False] * len(CELLS[name].state_names)
    whole = partial(case.operator, dropout=1.0, training=True, all_steps=all_steps)
    result = results(whole, inputs, used=used)
    assert all(torch.isfinite(part).all() for part in result)
    n = len(used)
    assert not any(part.any() for part in result[n : n + 6])  # x, the first layer, the second's weight_ih
    assert result[n + 6].any()
    zeros = [torch.zeros(6, 5, 9, dtype=torch.float64), *inputs.weights[4:]]
    assert relative_error(result[0], case.reference(zeros, all_steps=all_steps)[0]) < 1e-13


# ---------------------------------------------------------------- backward
@pytest.mark.parametrize("all_steps", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_by_finite_differences_under_one_mask(name: str, all_steps: bool, isa: str) -> None:
    case = RecurrentCase(name, 3, 3, 2, 3, 2, state=True)
    inputs = case.inputs()
    leaves = [t.detach().requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(lambda *t: tuple(seeded(case, t, 0.4, 21, all_steps)), leaves)


@pytest.mark.parametrize("name", NAMES)
def test_the_public_function_differentiates_the_mask_it_drew(name: str, isa: str) -> None:
    """Two calls are made before their backward passes, which run in the opposite order. Each has its own seed."""
    case = RecurrentCase(name, 20, 5, 4, 16, 2)
    inputs = case.inputs()
    leaves = [[t.detach().requires_grad_() for t in inputs] for _ in range(2)]
    torch.manual_seed(8)
    outs = [case.operator(ours, dropout=0.5, training=True)[0] for ours in leaves]
    torch.manual_seed(8)
    seeds = [int(draw_seed(inputs.x.device)) for _ in range(2)]
    for which in (1, 0):
        exact = [t.detach().requires_grad_() for t in inputs]
        case.reference(exact, dropout=0.5, seed=seeds[which])[0].square().sum().backward()
        outs[which].square().sum().backward()
        assert errors_above([a.grad for a in leaves[which]], [b.grad for b in exact], 1e-12) == []


@pytest.mark.parametrize("name", NAMES)
def test_under_transforms_the_mask_is_the_same(name: str, isa: str) -> None:
    case = RecurrentCase(name, 6, 4, 3, 5, 2)
    inputs = case.inputs()
    torch.manual_seed(3)
    expected = case.operator(inputs, dropout=0.5, training=True)[0]
    along = torch.zeros_like(inputs.x)
    torch.manual_seed(3)

    def call(x: Tensor) -> Tensor:
        return case.operator([x, *inputs.weights], dropout=0.5, training=True)[0]

    result, tangent = torch.func.jvp(call, (inputs.x,), (along,))
    assert relative_error(result, expected) < 1e-13
    assert not tangent.any()
