"""LSTM and GRU operators: values and gradients beside torch's own layers in float64, by relative norm."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qfast import _backend
from qfast.ops.recurrent import self_test
from qfast.ops.recurrent_twin import backward_twin, forward_twin
from support.recurrent import (
    CELLS,
    F32,
    F64,
    LAYOUTS,
    NAMES,
    NATIVE,
    Case,
    Inputs,
    apart,
    both_bits,
    definition,
    exact_results,
    inputs_of,
    laid_out,
    operator,
    raw,
    results,
)
from support.temporal_conv import relative

CASES = [
    # nothing, one, and every remainder of the tiles of rows
    Case(0, 3, 2, 4, 2, state=True),
    Case(0, 3, 2, 4, 2, all_steps=True),
    Case(3, 0, 2, 5, 2, state=True),
    Case(3, 0, 2, 5, 1, all_steps=True),
    Case(1, 1, 1, 1),
    Case(1, 1, 1, 1, 3, all_steps=True, state=True),
    *(Case(b, 4, 6, 16, 2, state=b % 2 == 0, all_steps=b % 3 == 0) for b in (1, 2, 3, 4, 5, 7, 13, 23, 24, 25, 49)),
    Case(100, 7, 6, 19, 2, all_steps=True),
    Case(259, 5, 3, 16, 2),
    Case(530, 9, 5, 8, 2, all_steps=True, state=True),
    # time
    *(Case(5, t, 6, 16, 2, state=True) for t in (2, 3, 20, 60)),
    Case(3, 250, 6, 8, 2, all_steps=True),
    # the models' own sizes, with few rows
    Case(26, 20, 20, 64, 2),
    Case(9, 60, 6, 64, 2),
    Case(11, 20, 158, 64, 1, all_steps=True),
    # widths on both sides of every vector and panel length
    *(Case(7, 3, 5, h, 2, state=h % 2 == 1, all_steps=h % 3 == 0) for h in (1, 2, 3, 7, 8, 9, 15, 17, 19, 31, 32, 33)),
    *(Case(6, 3, 6, h, 2, state=True) for h in (47, 63, 65, 100, 127, 128, 130)),
    Case(5, 3, 20, 256, 2, all_steps=True),
    Case(1, 4, 20, 256, 1, state=True),
    Case(3, 2, 6, 512, 1, state=True),
    *(Case(6, 3, f, 9) for f in (1, 2, 6, 7, 16, 20, 33, 64, 158)),
    # depth
    Case(6, 5, 4, 12, 3, all_steps=True, state=True),
    Case(6, 5, 4, 12, 6),
    # strides
    *(Case(14, 6, 5, 12, 2, layout=layout, all_steps=layout < "m") for layout in LAYOUTS),
    Case(60, 20, 6, 32, 2, layout="windows"),
]
BY_NAME = {case.name: case for case in CASES}


# ---------------------------------------------------------------- values and gradients
@pytest.mark.parametrize("case", BY_NAME)
@pytest.mark.parametrize("name", NAMES)
def test_values_and_gradients_are_those_of_torchs_layers(name: str, case: str, isa: str) -> None:
    """float64 to 1e-12; float32 to 1e-5, and beside torch's own float32 within 2 (gradients 3) times its
    error, or 5e-7 (1e-6, plain torch 2e-6), whichever is more: sums of hundreds of products round more than the cells
    do, and in plain torch a gradient of a weight is one sum over all rows and steps."""
    of = BY_NAME[case]
    call = partial(operator, name, all_steps=of.all_steps)
    exact, of_torch = exact_results(name, of)
    assert apart(results(call, inputs_of(name, of)), exact, 1e-12) == []
    narrow, n = results(call, inputs_of(name, of, F32)), 1 + len(CELLS[name].state_names)
    floor = 1e-6 if _backend.native is not None else 2e-6
    for i, (found, true, plain) in enumerate(zip(narrow, exact, of_torch, strict=True)):
        limit = max(2 * plain, 5e-7) if i < n else max(3 * plain, floor)
        assert relative(found, true) <= min(limit, 1e-5), (i, relative(found, true), plain)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("all_steps", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_without_a_gradient(name: str, all_steps: bool, layout: str, isa: str) -> None:
    """Where windows follow each other the kernels share what their rows have in common: the same up to rounding."""
    for batch, steps, features, hidden in (
        (1, 5, 3, 4),
        (2, 2, 3, 4),
        (70, 9, 6, 33),
        (150, 20, 20, 16),
        (7, 30, 6, 9),
    ):
        for state in (False, True):
            case = Case(batch, steps, features, hidden, 2, all_steps, state, layout)
            inputs = inputs_of(name, case)
            with torch.no_grad():
                found = operator(name, inputs, all_steps=all_steps)
            assert apart(found, definition(name, inputs, all_steps=all_steps), 1e-12) == []


@pytest.mark.parametrize("used", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_any_of_the_results_may_be_used(name: str, used: tuple[int, ...], isa: str) -> None:
    used = used[: 1 + len(CELLS[name].state_names)]
    if not any(used):
        pytest.skip("a GRU has no c")
    for all_steps in (False, True):
        inputs = inputs_of(name, Case(5, 4, 3, 9, 2, state=True))
        found, exact = (
            results(partial(of, name, all_steps=all_steps), inputs, list(map(bool, used)))
            for of in (operator, definition)
        )
        assert apart(found, exact, 1e-12) == []


@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_any_part_alone(name: str, isa: str) -> None:
    inputs = inputs_of(name, Case(9, 4, 3, 17, 2, state=True))
    whole = both_bits(name, inputs)[1 + len(CELLS[name].state_names) :]
    rng = torch.Generator().manual_seed(9)
    for which, expected in enumerate(whole):
        tensors = [t.detach() for t in inputs.tensors]
        tensors[which].requires_grad_()
        found = operator(name, inputs.like(tensors))
        rng.manual_seed(9)
        total = sum((part * torch.randn(part.shape, generator=rng).to(part.dtype)).sum() for part in found)
        assert relative(torch.autograd.grad(total, tensors[which])[0], expected) < 1e-13


@settings(deadline=None, max_examples=30)
@given(
    name=st.sampled_from(NAMES),
    sizes=st.tuples(st.integers(0, 60), st.integers(0, 9), st.integers(1, 40), st.integers(1, 70), st.integers(1, 3)),
    all_steps=st.booleans(),
    state=st.booleans(),
    layout=st.sampled_from(LAYOUTS),
)
def test_any_shape(name: str, sizes: tuple[int, ...], all_steps: bool, state: bool, layout: str) -> None:
    case = Case(*sizes, all_steps, state, "plain" if sizes[1] == 0 else layout)
    inputs = inputs_of(name, case)
    found, exact = (results(partial(of, name, all_steps=all_steps), inputs) for of in (operator, definition))
    assert apart(found, exact, 1e-12) == []


@pytest.mark.parametrize("all_steps", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_by_finite_differences(name: str, all_steps: bool) -> None:
    inputs = inputs_of(name, Case(3, 4, 2, 3, 2, state=True))
    leaves = [t.detach().requires_grad_() for t in inputs.tensors]
    assert torch.autograd.gradcheck(lambda *t: tuple(operator(name, inputs.like(t), all_steps=all_steps)), leaves)


@pytest.mark.parametrize("name", NAMES)
def test_kernels_agree_with_plain_torch(name: str, isa: str) -> None:
    """What is kept and what comes of it too, with dropout; keeping changes no bit of the results."""
    self_test(name, torch.device("cpu"))
    cell, inputs = CELLS[name], inputs_of(name, Case(30, 6, 5, 33, 2, state=True))
    n, seed = 1 + len(cell.state_names), torch.tensor([77])
    for all_steps in (False, True):
        args = raw(name, inputs, 0.3, seed, all_steps)
        found = getattr(torch.ops.qfast, name)(*args, True)
        expected = forward_twin(cell, inputs.x, inputs.weights, inputs.state, 0.3, seed, all_steps, True)
        assert apart(found, expected, 1e-13) == []
        bare = getattr(torch.ops.qfast, name)(*args, False)
        assert all(torch.equal(a, b) for a, b in zip(bare[:n], found[:n], strict=True))
        grads = [*found[:n]]
        *front, of_weights = getattr(torch.ops.qfast, f"{name}_backward")(*grads, *args, *found[n:], True, True)
        rest = (inputs.x, inputs.weights, inputs.state, 0.3, seed, all_steps, *expected[n:], True, True)
        *twin_front, twin_weights = backward_twin(cell, grads[0], grads[1:], *rest)
        assert apart([*front, *of_weights], [*twin_front, *twin_weights], 1e-12) == []


# ---------------------------------------------------------------- the same bits
@pytest.mark.skipif(not NATIVE, reason="plain torch promises no bits")
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_the_same_bits_again_and_for_any_number_of_threads(name: str, dtype: torch.dtype, isa: str) -> None:
    cases = [Case(259, 7, 20, 64, 2), Case(50, 6, 6, 19, 2, True, True), Case(400, 9, 6, 16, 1, layout="windows")]
    before = torch.get_num_threads()
    try:
        for case in cases:
            inputs = inputs_of(name, case, dtype)
            found = {}
            for run, threads in enumerate((1, 1, 2, 3, 2)):
                torch.set_num_threads(threads)
                torch.manual_seed(4)
                found[run] = both_bits(name, inputs, all_steps=case.all_steps, dropout=0.2, training=True)
                with torch.no_grad():
                    found[run] += operator(name, inputs, all_steps=case.all_steps)
            for again in (1, 2, 3, 4):
                assert [torch.equal(a, b) for a, b in zip(found[0], found[again], strict=True)].count(False) == 0
    finally:
        torch.set_num_threads(before)


# ---------------------------------------------------------------- numbers at the ends
@pytest.mark.parametrize("name", NAMES)
def test_saturated_gates(name: str, isa: str) -> None:
    """Weights a hundred times as large: gates are 0, 1 and -1, and most gradients vanish."""
    case = Case(13, 9, 6, 20, 2, all_steps=True, state=True)
    exact = results(partial(definition, name, all_steps=True), inputs_of(name, case, scale=100))
    found = results(partial(operator, name, all_steps=True), inputs_of(name, case, scale=100))
    n = 1 + len(CELLS[name].state_names)
    assert apart(found[:n], exact[:n], 1e-12) == []
    assert apart(found[n:], exact[n:], 1e-9) == []
    narrow = results(partial(operator, name, all_steps=True), inputs_of(name, case, F32, scale=1e4))
    assert all(torch.isfinite(part).all() for part in narrow)


@pytest.mark.parametrize("what", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_finite_stays_in_its_row(name: str, what: float, isa: str) -> None:
    for batch, row, layout in ((1, 0, "plain"), (9, 4, "plain"), (61, 0, "features first"), (61, 60, "plain")):
        inputs = inputs_of(name, Case(batch, 4, 3, 20, 2, all_steps=True, layout=layout), F32)
        clean = results(partial(operator, name, all_steps=True), inputs)
        inputs.x[row, 1, 2] = what
        found = results(partial(operator, name, all_steps=True), inputs)
        exact = definition(name, inputs, all_steps=True)
        n, others = len(exact), torch.arange(batch) != row
        for a, b in zip(found[:n], exact, strict=True):
            torch.testing.assert_close(a, b, equal_nan=True, rtol=1e-4, atol=1e-5)
        assert torch.equal(found[0][others], clean[0][others])
        assert torch.equal(found[0][row, 0], clean[0][row, 0])  # what came before it
        assert torch.equal(found[n][others], clean[n][others])  # the gradient of x
        with torch.no_grad():
            bare = operator(name, inputs, all_steps=True)
        torch.testing.assert_close(bare, list(exact), equal_nan=True, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_windows_with_a_row_of_nan(name: str, isa: str) -> None:
    """Only the windows that hold the row see it, also where the products of rows are shared."""
    rng = torch.Generator().manual_seed(0)
    x = laid_out(rng, "windows", 60, 10, 4, F64)
    inputs = inputs_of(name, Case(60, 10, 4, 16, 2))
    x[0, 9] = torch.nan
    with torch.no_grad():
        found = operator(name, Inputs(x, inputs.weights, []))[0]
    assert torch.isnan(found).all(1).tolist() == [True] * 10 + [False] * 50
    assert not torch.isnan(found[10:]).any()


def test_a_gradient_that_is_zero_is_zero(isa: str) -> None:
    """One step from nothing: the forget gate and what multiplies the state before do not count."""
    inputs = inputs_of("lstm", Case(9, 1, 4, 18), F32)
    of_ih, of_hh, *of_bias = both_bits("lstm", inputs)[4:]
    assert not of_hh.any()
    assert all(not part[18:36].any() for part in (of_ih, *of_bias))
    inputs = inputs_of("gru", Case(9, 1, 4, 18), F32)
    assert not both_bits("gru", inputs)[4].any()


@pytest.mark.parametrize("name", NAMES)
def test_biases_that_only_matter_together_get_the_same_gradient(name: str, isa: str) -> None:
    """b_ih and b_hh are added wherever no reset gate stands between: Adam must not part them by rounding."""
    *_, of_ih, of_hh = both_bits(name, inputs_of(name, Case(300, 20, 6, 33), F32))
    same = 4 * 33 if name == "lstm" else 2 * 33
    assert torch.equal(of_ih[:same], of_hh[:same])


@pytest.mark.parametrize("name", NAMES)
def test_gradients_that_cancel_are_as_accurate_as_torchs(name: str, isa: str) -> None:
    """Two halves of a batch with opposite gradients: what rounding leaves of zero is no more than torch leaves."""
    inputs = inputs_of(name, Case(200, 12, 6, 32), F32)
    x = torch.cat([inputs.x, inputs.x])
    grad = torch.randn(200, 32, generator=torch.Generator().manual_seed(1)) + 0.5
    left, size = {}, 0.0
    for side, call in (("ours", operator), ("torch", definition)):
        weights = [w.detach().requires_grad_() for w in inputs.weights]
        output = call(name, Inputs(x, weights, []))[0]
        sums = torch.autograd.grad(
            (output[:200] * grad).sum() - (output[200:] * grad).sum(), weights, retain_graph=True
        )
        left[side] = [float(part.norm()) for part in sums]
        size = [float(part.norm()) for part in torch.autograd.grad((output * torch.cat([grad, grad])).sum(), weights)]
    for ours, plain, whole in zip(left["ours"], left["torch"], size, strict=True):
        assert ours <= max(3 * plain, 1e-6 * whole)


@pytest.mark.parametrize("name", NAMES)
def test_strides_beyond_2_to_the_31(name: str) -> None:
    """Three rows 8.6 GB apart in address space; only their pages are touched."""
    far = 2**31 + 64
    try:
        room = torch.empty(2 * far + 64)
    except RuntimeError:
        pytest.skip("the system does not hand out address space before it is used")
    x = room.as_strided((3, 4, 5), (far, 6, 1))
    inputs = inputs_of(name, Case(3, 4, 5, 9), F32)
    x.copy_(inputs.x)
    found, expected = (both_bits(name, Inputs(at, inputs.weights, [])) for at in (x, inputs.x))
    assert apart(found, expected, 1e-6) == []


# ---------------------------------------------------------------- activations
def activations(x: Tensor, hidden: int) -> tuple[Tensor, Tensor]:
    """Sigmoid and tanh of x as the cell computes them: gates of one LSTM step whose pre-activations are x."""
    eye = torch.eye(hidden, dtype=x.dtype).repeat(4, 1)
    zeros = torch.zeros(4 * hidden, hidden, dtype=x.dtype)
    weights = [eye, zeros, zeros[:, 0].clone(), zeros[:, 0].clone()]
    gates = torch.ops.qfast.lstm(x.reshape(-1, 1, hidden), weights, None, None, 0.0, None, False, True)[3]
    return gates[0, 0, :, 0].reshape(-1), gates[0, 0, :, 2].reshape(-1)


def ulps(found: Tensor, exact: np.ndarray) -> float:
    """Largest error in units of the last place of the exact result, of the smallest normal number near zero."""
    narrow = found.numpy().dtype
    place = np.spacing(np.maximum(np.abs(exact), np.finfo(narrow).tiny).astype(narrow)).astype(np.longdouble)
    return float(np.max(np.abs(found.numpy().astype(np.longdouble) - exact) / place))


@pytest.mark.skipif(not NATIVE, reason="plain torch's activations are torch's")
@pytest.mark.parametrize("hidden", [1, 16])  # what is left of a vector; whole vectors
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_activations_within_three_ulp(dtype: torch.dtype, hidden: int, isa: str) -> None:
    """Over all magnitudes where the results are normal numbers."""
    rng = np.random.default_rng(0)
    magnitude = np.concatenate([np.exp(rng.uniform(-40, 7, 60_000)), np.linspace(0, 25, 40_000)])
    x = torch.from_numpy(np.concatenate([magnitude, -magnitude])).to(dtype)
    wide = x.numpy().astype(np.longdouble)
    sigmoid, tanh = activations(x, hidden)
    with np.errstate(over="ignore"):
        exact = 1 / (1 + np.exp(-wide))
    normal = exact >= np.finfo(x.numpy().dtype).tiny
    assert ulps(sigmoid[torch.from_numpy(normal)], exact[normal]) <= 3
    assert (sigmoid[torch.from_numpy(~normal)] <= torch.finfo(dtype).tiny).all()
    assert ulps(tanh, np.tanh(wide)) <= 3


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_activations_at_the_ends(dtype: torch.dtype, isa: str) -> None:
    x = torch.tensor([0.0, 1e5, -1e5, torch.inf, -torch.inf, torch.nan, 1e-30, -1e-30], dtype=dtype)
    sigmoid, tanh = activations(x, 1)
    assert sigmoid.tolist()[:5] == [0.5, 1.0, 0.0, 1.0, 0.0]
    assert tanh.tolist()[:5] == [0.0, 1.0, -1.0, 1.0, -1.0]
    assert torch.isnan(sigmoid[5])
    assert torch.isnan(tanh[5])
    assert torch.equal(tanh[6:], x[6:])
