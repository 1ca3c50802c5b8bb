"""LSTM and GRU operators: values and gradients compared with torch's layers in float64, by relative norm."""

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
from support.operator_case import F32, F64, errors_above, exact_results, relative_error, results
from support.recurrent import CELLS, NAMES, NATIVE, RECURRENT_CASES, RecurrentCase
from support.tensors import LAYOUTS, laid_out


# ---------------------------------------------------------------- values and gradients
@pytest.mark.parametrize("case", RECURRENT_CASES, ids=lambda case: case.name)
def test_values_and_gradients_are_those_of_torchs_layers(case: RecurrentCase, isa: str) -> None:
    """float64 to 1e-12. float32 to 1e-5, and within 2 (gradients 3) times torch's float32
    error or 5e-7 (1e-6, plain torch 2e-6), whichever is larger. Sums of hundreds of products round more than the cells
    do, and in plain torch a weight gradient is one sum over all rows and steps."""
    exact, of_torch = exact_results(case)
    assert errors_above(results(case.operator, case.inputs()), exact, 1e-12) == []
    narrow, n = results(case.operator, case.inputs(F32)), case.n_outputs
    floor = 1e-6 if _backend.native is not None else 2e-6
    for i, (result, true, plain) in enumerate(zip(narrow, exact, of_torch, strict=True)):
        limit = max(2 * plain, 5e-7) if i < n else max(3 * plain, floor)
        assert relative_error(result, true) <= min(limit, 1e-5), (i, relative_error(result, true), plain)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("all_steps", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_without_a_gradient(name: str, all_steps: bool, layout: str, isa: str) -> None:
    """For consecutive windows the kernels share the products of common rows. The results are equal up to rounding."""
    for batch, steps, features, hidden in (
        (1, 5, 3, 4),
        (2, 2, 3, 4),
        (70, 9, 6, 33),
        (150, 20, 20, 16),
        (7, 30, 6, 9),
    ):
        for state in (False, True):
            case = RecurrentCase(name, batch, steps, features, hidden, 2, all_steps, state, layout)
            inputs = case.inputs()
            with torch.no_grad():
                result = case.operator(inputs, all_steps=all_steps)
            assert errors_above(result, case.reference(inputs, all_steps=all_steps), 1e-12) == []


@pytest.mark.parametrize("used", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_any_of_the_results_may_be_used(name: str, used: tuple[int, ...], isa: str) -> None:
    used = used[: 1 + len(CELLS[name].state_names)]
    if not any(used):
        pytest.skip("a GRU has no c")
    for all_steps in (False, True):
        case = RecurrentCase(name, 5, 4, 3, 9, 2, state=True)
        inputs = case.inputs()
        result, exact = (
            results(partial(of, all_steps=all_steps), inputs, used=list(map(bool, used)))
            for of in (case.operator, case.reference)
        )
        assert errors_above(result, exact, 1e-12) == []


@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_any_part_alone(name: str, isa: str) -> None:
    case = RecurrentCase(name, 9, 4, 3, 17, 2, state=True)
    inputs = case.inputs()
    whole = results(case.operator, inputs)[case.n_outputs :]
    rng = torch.Generator().manual_seed(9)
    for which, expected in enumerate(whole):
        tensors = [t.detach() for t in inputs]
        tensors[which].requires_grad_()
        result = case.operator(tensors)
        rng.manual_seed(9)
        total = sum((part * torch.randn(part.shape, generator=rng).to(part.dtype)).sum() for part in result)
        assert relative_error(torch.autograd.grad(total, tensors[which])[0], expected) < 1e-13


@settings(deadline=None, max_examples=30)
@given(
    name=st.sampled_from(NAMES),
    sizes=st.tuples(st.integers(0, 60), st.integers(0, 9), st.integers(1, 40), st.integers(1, 70), st.integers(1, 3)),
    all_steps=st.booleans(),
    state=st.booleans(),
    layout=st.sampled_from(LAYOUTS),
)
def test_any_shape(name: str, sizes: tuple[int, ...], all_steps: bool, state: bool, layout: str) -> None:
    case = RecurrentCase(name, *sizes, all_steps, state, "plain" if sizes[1] == 0 else layout)
    inputs = case.inputs()
    result, exact = (results(partial(of, all_steps=all_steps), inputs) for of in (case.operator, case.reference))
    assert errors_above(result, exact, 1e-12) == []


@pytest.mark.parametrize("all_steps", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_by_finite_differences(name: str, all_steps: bool) -> None:
    case = RecurrentCase(name, 3, 4, 2, 3, 2, state=True)
    inputs = case.inputs()
    leaves = [t.detach().requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(lambda *t: tuple(case.operator(t, all_steps=all_steps)), leaves)


@pytest.mark.parametrize("name", NAMES)
def test_kernels_agree_with_plain_torch(name: str, isa: str) -> None:
    """Also the saved tensors and the gradients computed from them, with dropout.

    Saving changes no bit of the results.
    """
    self_test(name, torch.device("cpu"))
    cell, case = CELLS[name], RecurrentCase(name, 30, 6, 5, 33, 2, state=True)
    inputs = case.inputs()
    n, seed = 1 + len(cell.state_names), torch.tensor([77])
    for all_steps in (False, True):
        args = case.raw(inputs, 0.3, seed, all_steps)
        result = getattr(torch.ops.qfast, name)(*args, True)
        expected = forward_twin(cell, inputs.x, inputs.weights, inputs.state, 0.3, seed, all_steps, True)
        assert errors_above(result, expected, 1e-13) == []
        bare = getattr(torch.ops.qfast, name)(*args, False)
        assert all(torch.equal(a, b) for a, b in zip(bare[:n], result[:n], strict=True))
        grads = [*result[:n]]
        *front, of_weights = getattr(torch.ops.qfast, f"{name}_backward")(*grads, *args, *result[n:], True, True)
        rest = (inputs.x, inputs.weights, inputs.state, 0.3, seed, all_steps, *expected[n:], True, True)
        *twin_front, twin_weights = backward_twin(cell, grads[0], grads[1:], *rest)
        assert errors_above([*front, *of_weights], [*twin_front, *twin_weights], 1e-12) == []


# ---------------------------------------------------------------- the same bits
@pytest.mark.skipif(not NATIVE, reason="plain torch does not guarantee equal bits")
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_the_same_bits_again_and_for_any_number_of_threads(name: str, dtype: torch.dtype, isa: str) -> None:
    cases = [
        RecurrentCase(name, 259, 7, 20, 64, 2),
        RecurrentCase(name, 50, 6, 6, 19, 2, True, True),
        RecurrentCase(name, 400, 9, 6, 16, 1, layout="windows"),
    ]
    before = torch.get_num_threads()
    try:
        for case in cases:
            inputs = case.inputs(dtype)
            result = {}
            for run, threads in enumerate((1, 1, 2, 3, 2)):
                torch.set_num_threads(threads)
                torch.manual_seed(4)
                result[run] = results(partial(case.operator, dropout=0.2, training=True), inputs)
                with torch.no_grad():
                    result[run] += case.operator(inputs)
            for again in (1, 2, 3, 4):
                assert [torch.equal(a, b) for a, b in zip(result[0], result[again], strict=True)].count(False) == 0
    finally:
        torch.set_num_threads(before)


# ---------------------------------------------------------------- extreme values
@pytest.mark.parametrize("name", NAMES)
def test_saturated_gates(name: str, isa: str) -> None:
    """Weights are multiplied by 100: gates are 0, 1 and -1, and most gradients vanish."""
    case = RecurrentCase(name, 13, 9, 6, 20, 2, all_steps=True, state=True)
    exact = results(partial(case.reference, all_steps=True), case.inputs(scale=100))
    result = results(partial(case.operator, all_steps=True), case.inputs(scale=100))
    n = case.n_outputs
    assert errors_above(result[:n], exact[:n], 1e-12) == []
    assert errors_above(result[n:], exact[n:], 1e-9) == []
    narrow = results(partial(case.operator, all_steps=True), case.inputs(F32, scale=1e4))
    assert all(torch.isfinite(part).all() for part in narrow)


@pytest.mark.parametrize("what", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", NAMES)
def test_non_finite_values_stay_in_their_row(name: str, what: float, isa: str) -> None:
    for batch, row, layout in ((1, 0, "plain"), (9, 4, "plain"), (61, 0, "features first"), (61, 60, "plain")):
        case = RecurrentCase(name, batch, 4, 3, 20, 2, all_steps=True, layout=layout)
        inputs = case.inputs(F32)
        clean = results(partial(case.operator, all_steps=True), inputs)
        inputs.x[row, 1, 2] = what
        result = results(partial(case.operator, all_steps=True), inputs)
        exact = case.reference(inputs, all_steps=True)
        n, others = len(exact), torch.arange(batch) != row
        for a, b in zip(result[:n], exact, strict=True):
            torch.testing.assert_close(a, b, equal_nan=True, rtol=1e-4, atol=1e-5)
        assert torch.equal(result[0][others], clean[0][others])
        assert torch.equal(result[0][row, 0], clean[0][row, 0])  # the step before it
        assert torch.equal(result[n][others], clean[n][others])  # the gradient of x
        with torch.no_grad():
            bare = case.operator(inputs, all_steps=True)
        torch.testing.assert_close(bare, list(exact), equal_nan=True, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_windows_with_a_row_of_nan(name: str, isa: str) -> None:
    """Only windows that contain the row are affected, also where the products of rows are shared."""
    rng = torch.Generator().manual_seed(0)
    x = laid_out(rng, "windows", 60, 10, 4, F64)
    case = RecurrentCase(name, 60, 10, 4, 16, 2)
    inputs = case.inputs()
    x[0, 9] = torch.nan
    with torch.no_grad():
        result = case.operator([x, *inputs.weights])[0]
    assert torch.isnan(result).all(1).tolist() == [True] * 10 + [False] * 50
    assert not torch.isnan(result[10:]).any()


def test_a_gradient_that_is_zero_is_zero(isa: str) -> None:
    """One step from a zero state: the forget gate and the recurrent weights have no influence."""
    case = RecurrentCase("lstm", 9, 1, 4, 18)
    inputs = case.inputs(F32)
    of_ih, of_hh, *of_bias = results(case.operator, inputs)[4:]
    assert not of_hh.any()
    assert all(not part[18:36].any() for part in (of_ih, *of_bias))
    case = RecurrentCase("gru", 9, 1, 4, 18)
    inputs = case.inputs(F32)
    assert not results(case.operator, inputs)[4].any()


@pytest.mark.parametrize("name", NAMES)
def test_biases_that_only_matter_together_get_the_same_gradient(name: str, isa: str) -> None:
    """b_ih and b_hh are added except at the reset gate. Adam must not separate them by rounding noise."""
    case = RecurrentCase(name, 300, 20, 6, 33)
    *_, of_ih, of_hh = results(case.operator, case.inputs(F32))
    same = 4 * 33 if name == "lstm" else 2 * 33
    assert torch.equal(of_ih[:same], of_hh[:same])


@pytest.mark.parametrize("name", NAMES)
def test_gradients_that_cancel_are_as_accurate_as_torchs(name: str, isa: str) -> None:
    """Two halves of a batch have opposite gradients. The rounding noise of the sum is at most about that of torch."""
    case = RecurrentCase(name, 200, 12, 6, 32)
    inputs = case.inputs(F32)
    x = torch.cat([inputs.x, inputs.x])
    grad = torch.randn(200, 32, generator=torch.Generator().manual_seed(1)) + 0.5
    left, size = {}, 0.0
    for side, call in (("ours", case.operator), ("torch", case.reference)):
        weights = [w.detach().requires_grad_() for w in inputs.weights]
        output = call([x, *weights])[0]
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
    case = RecurrentCase(name, 3, 4, 5, 9)
    inputs = case.inputs(F32)
    x.copy_(inputs.x)
    result, expected = (results(case.operator, [at, *inputs.weights]) for at in (x, inputs.x))
    assert errors_above(result, expected, 1e-6) == []


# ---------------------------------------------------------------- activations
def activations(x: Tensor, hidden: int) -> tuple[Tensor, Tensor]:
    """Sigmoid and tanh of x from the gates of one LSTM step with pre-activations x."""
    eye = torch.eye(hidden, dtype=x.dtype).repeat(4, 1)
    zeros = torch.zeros(4 * hidden, hidden, dtype=x.dtype)
    weights = [eye, zeros, zeros[:, 0].clone(), zeros[:, 0].clone()]
    gates = torch.ops.qfast.lstm(x.reshape(-1, 1, hidden), weights, None, None, 0.0, None, False, True)[3]
    return gates[0, 0, :, 0].reshape(-1), gates[0, 0, :, 2].reshape(-1)


def ulps(result: Tensor, exact: np.ndarray) -> float:
    """Largest error in units of the last place of the exact result, or of the smallest normal number near zero."""
    narrow = result.numpy().dtype
    place = np.spacing(np.maximum(np.abs(exact), np.finfo(narrow).tiny).astype(narrow)).astype(np.longdouble)
    return float(np.max(np.abs(result.numpy().astype(np.longdouble) - exact) / place))


@pytest.mark.skipif(not NATIVE, reason="plain torch's activations are torch's")
@pytest.mark.parametrize("hidden", [1, 16])  # the remainder of a vector; whole vectors
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
