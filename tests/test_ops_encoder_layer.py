"""The encoder layer compared with torch.nn.TransformerEncoderLayer in float64."""

from __future__ import annotations

import sys
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qfast.ops import encoder_layer
from qfast.ops.encoder_layer import self_test
from support.encoder import KERNELS, LAYER_CASES, LONG_LAYER_CASES, NAMES, LayerCase, raw_gradients
from support.operator_case import F32, F64, errors_above, exact_results, relative_error, results
from support.tensors import LAYOUTS


def check(case: LayerCase) -> None:
    """float64 to 1e-12; float32 to 2e-5, and within 2 (gradients 3) times torch's float32 error.

    The gradient of the key bias is rounding noise and is compared with the gradient of the query bias.
    """
    exact, of_torch = exact_results(case)
    for dtype, limits in (
        (F64, [1e-12] * 14),
        (F32, [min(2e-5, max(2 * of_torch[0], 5e-7)), *(min(2e-5, max(3 * e, 1e-6)) for e in of_torch[1:])]),
    ):
        result = results(case.operator, case.inputs(dtype))
        for name, ours, true, limit in zip(["out", "x", *NAMES], result, exact, limits, strict=True):
            at, width = true, case.width
            if case.steps == 1 and name.startswith(
                "in_proj"
            ):  # with one step the attention weight is 1 for any queries and keys
                assert not ours[: 2 * width].any()
                ours, at = ours[2 * width :], at[2 * width :]
            assert relative_error(ours, at) <= limit, (dtype, name, relative_error(ours, at), limit)


# ---------------------------------------------------------------- values and gradients
@pytest.mark.parametrize("case", LAYER_CASES, ids=lambda case: case.name)
def test_values_and_gradients_are_those_of_torchs_layer(case: LayerCase, isa: str) -> None:
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", LONG_LAYER_CASES, ids=lambda case: case.name)
def test_more_values_and_gradients(case: LayerCase, isa: str) -> None:
    check(case)


@pytest.mark.parametrize("steps", [1, 2, 6, 20, 37])
def test_the_last_step_alone_is_that_of_all_steps(steps: int, isa: str) -> None:
    case, last = LayerCase(11, steps, 24, 3, 70), LayerCase(11, steps, 24, 3, 70, last=True)
    tensors = case.inputs()
    whole = results(lambda t: case.operator(t)[:, -1], tensors)
    assert errors_above(results(last.operator, tensors), whole, 1e-13) == []


def test_the_parameters_of_a_torch_layer_are_in_the_expected_order() -> None:
    layer = torch.nn.TransformerEncoderLayer(12, 3, 20, dropout=0.0, batch_first=True).double()
    x = torch.randn(4, 5, 12, dtype=F64)
    torch.testing.assert_close(encoder_layer(x, list(layer.parameters()), heads=3), layer(x), rtol=1e-12, atol=1e-12)
    assert torch.equal(
        encoder_layer(x, tuple(layer.parameters()), heads=3), encoder_layer(x, list(layer.parameters()), heads=3)
    )


@settings(deadline=None, max_examples=40)
@given(
    batch=st.integers(0, 40),
    steps=st.integers(1, 30),
    head=st.integers(1, 20),
    heads=st.integers(1, 5),
    hidden=st.integers(1, 150),
    last=st.booleans(),
    layout=st.sampled_from(LAYOUTS),
)
def test_any_shape(batch: int, steps: int, head: int, heads: int, hidden: int, last: bool, layout: str) -> None:
    case = LayerCase(batch, steps, head * heads, heads, hidden, last, layout)
    tensors = case.inputs()
    result, exact = (results(of, tensors) for of in (case.operator, case.reference))
    if case.width == 1:  # a norm of one feature returns its bias: everything before it is 0, in torch rounding noise
        result, exact = [result[0], *result[9:]], [exact[0], *exact[9:]]
        assert errors_above(result[:1], exact[:1], 1e-12) == []
        return
    # the gradients of queries and keys are small where the attention weights hardly depend on them
    size = max(float(part.norm()) for part in exact[1:])
    limit = (
        1e-12 if case.width >= 8 else 1e-9
    )  # with few features the variance may be near eps, which amplifies rounding
    for ours, true in zip(result, exact, strict=True):
        assert float((ours - true).norm()) <= limit * (float(true.norm()) + 0.1 * size)


@pytest.mark.parametrize("last", [False, True])
def test_gradients_by_finite_differences(last: bool, isa: str) -> None:
    case = LayerCase(2, 3, 4, 2, 5, last)
    leaves = [t.requires_grad_() for t in case.inputs()]
    assert torch.autograd.gradcheck(lambda *t: case.operator(t), leaves)


@pytest.mark.parametrize("last", [False, True])
def test_gradients_of_any_part_alone(last: bool, isa: str) -> None:
    case = LayerCase(9, 4, 12, 3, 17, last)
    tensors = case.inputs()
    whole = results(case.operator, tensors)[1:]
    for which, expected in enumerate(whole):
        inputs = [t.detach() for t in tensors]
        inputs[which].requires_grad_()
        out = case.operator(inputs)
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(F64)
        assert relative_error(torch.autograd.grad(out, inputs[which], grad)[0], expected) < 1e-13


@pytest.mark.parametrize("last", [False, True])
def test_data_that_requires_no_gradient_gets_none(last: bool, isa: str) -> None:
    case = LayerCase(9, 4, 12, 3, 17, last)
    tensors = case.inputs()
    *_, whole = raw_gradients(case, tensors, 0.0, 1)
    *_, without = raw_gradients(case, tensors, 0.0, 1, input_grad=False)
    assert without[0].shape == (0, 4, 12)
    assert errors_above(without[1:], whole[1:], 1e-13) == []


@pytest.mark.parametrize("last", [False, True])
def test_without_a_gradient_nothing_is_saved_and_the_values_are_the_same(last: bool, isa: str) -> None:
    case = LayerCase(30, 6, 20, 2, 33, last)
    tensors = case.inputs()
    x, weights = tensors[0], tensors[1:]
    saved = torch.ops.qfast.encoder_layer(x, weights, 2, 1e-5, 0.0, None, last, True)
    bare = torch.ops.qfast.encoder_layer(x, weights, 2, 1e-5, 0.0, None, last, False)
    rows = 1 if last else 6
    assert [tuple(part.shape) for part in saved[1:]] == [(2, 30, rows, 20), (2, 30, rows), (0, rows, 33)]
    assert [tuple(part.shape) for part in bare[1:]] == [(2, 0, rows, 20), (2, 0, rows), (0, rows, 33)]
    assert torch.equal(bare[0], saved[0])
    with torch.no_grad():
        assert torch.equal(case.operator(tensors), saved[0])
    assert relative_error(saved[0], case.reference(tensors)) < 1e-13


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(
    "case",
    [
        LayerCase(0, 5, 8, 2, 256),
        LayerCase(1, 3, 8, 2, 512),
        LayerCase(90, 20, 20, 2, 512),
        LayerCase(1000, 4, 12, 3, 256, True),
    ],
    ids=lambda case: case.name,
)
def test_kept_hidden_values_do_not_change_the_bits(case, dropout, dtype, isa) -> None:
    x, *weights = case.inputs(dtype)
    steps = 1 if case.last else case.steps
    seed = torch.tensor([3]) if dropout else None
    results_of = {}
    for keep in (False, True):
        settings = (case.heads, case.eps, dropout, seed, case.last)
        out, *saved = torch.ops.qfast.encoder_layer(x, weights, *settings, True, 0, keep)
        assert saved[2].shape == (case.batch if keep else 0, steps, case.hidden)
        arguments = (case.heads, dropout, seed, case.last, *saved, True)
        grad_x, grads = torch.ops.qfast.encoder_layer_backward(torch.ones_like(out), x, weights, *arguments)
        results_of[keep] = [out, grad_x, *grads]
    assert all(torch.equal(a, b) for a, b in zip(results_of[False], results_of[True], strict=True))


@pytest.mark.skipif(not KERNELS, reason="plain torch keeps nothing")
def test_hidden_values_are_kept_if_there_is_memory(monkeypatch) -> None:
    kept = []

    def fits(n_bytes: int, threads: int, reusable: int) -> bool:
        kept.append(n_bytes)
        return n_bytes == 3 * 5 * 256 * 4

    monkeypatch.setattr(sys.modules["qfast.ops.encoder_layer"], "may_keep", fits)
    for case, windows in (
        (LayerCase(3, 5, 32, 2, 256), 3),
        (LayerCase(6, 5, 32, 2, 256), 0),  # too large
        (LayerCase(3, 5, 32, 2, 255), 0),  # not a multiple of a slice
        (LayerCase(3, 5, 31, 1, 256), 0),  # computing them takes less time
    ):
        x, *weights = (tensor.requires_grad_() for tensor in case.inputs(F32))
        out = case.operator([x, *weights])
        saved = [tensor for tensor in out.grad_fn.saved_tensors if tensor is not None]
        assert [len(tensor) for tensor in saved if tensor.shape[1:] == (5, case.hidden)] == [windows]
    assert kept == [3 * 5 * 256 * 4, 6 * 5 * 256 * 4]
    with torch.no_grad():
        LayerCase(3, 5, 32, 2, 256).operator(LayerCase(3, 5, 32, 2, 256).inputs(F32))
    assert len(kept) == 2


def test_kernels_agree_with_plain_torch(isa: str) -> None:
    self_test(torch.device("cpu"))


def test_weights_of_any_strides(isa: str) -> None:
    case = LayerCase(9, 5, 12, 3, 17)
    tensors = case.inputs()
    expected = results(case.operator, tensors)
    odd = [t.t().contiguous().t() if t.dim() == 2 else torch.stack((t, t), 1)[:, 0] for t in tensors[1:]]
    assert errors_above(results(case.operator, [tensors[0], *odd]), expected, 1e-13) == []


@pytest.mark.parametrize("last", [False, True])
def test_incoming_gradients_of_any_strides(last: bool, isa: str) -> None:
    case = LayerCase(7, 4, 12, 3, 9, last)
    for view in (
        lambda out: out.sum().expand(3).sum(),
        lambda out: out.transpose(0, 1).square(),
        lambda out: out[..., ::2].square(),
        lambda out: out[:0].sum() + out[2:5].sum(),
    ):
        result, exact = (
            results(lambda t, of=of, view=view: view(of(t)), case.inputs()) for of in (case.operator, case.reference)
        )
        size = max(float(part.norm()) for part in exact[1:])
        for ours, true in zip(result, exact, strict=True):
            assert float((ours - true).norm()) <= 1e-12 * float(true.norm()) + 1e-13 * size


# ---------------------------------------------------------------- the same bits
@pytest.mark.skipif(not KERNELS, reason="plain torch does not guarantee equal bits")
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_the_same_bits_again_and_for_any_number_of_threads(dtype: torch.dtype, last: bool, isa: str) -> None:
    before = torch.get_num_threads()
    try:
        for case in (LayerCase(259, 5, 24, 3, 70, last), LayerCase(40, 60, 16, 2, 33, last)):
            tensors, runs = case.inputs(dtype), []
            for threads in (1, 1, 2, 3, 2):
                torch.set_num_threads(threads)
                torch.manual_seed(4)
                runs.append(results(partial(case.operator, dropout=0.2, training=True), tensors))
                with torch.no_grad():
                    runs[-1].append(case.operator(tensors))
            for run in runs[1:]:
                assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(not KERNELS, reason="plain torch's products depend on the number of rows")
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_a_window_does_not_depend_on_the_other_windows(dtype: torch.dtype, last: bool, isa: str) -> None:
    case = LayerCase(200, 7, 24, 3, 70, last)
    x, *weights = case.inputs(dtype)
    whole = case.operator([x, *weights])
    for part in (slice(0, 1), slice(3, 20), slice(150, 200)):
        assert relative_error(case.operator([x[part], *weights]), whole[part]) <= (1e-14 if dtype == F64 else 1e-6)


# ---------------------------------------------------------------- extreme values
@pytest.mark.parametrize("last", [False, True])
def test_weights_that_saturate(last: bool, isa: str) -> None:
    """Queries and keys are multiplied by 100: one key gets all the attention, and scores exceed the range of exp."""
    case = LayerCase(13, 9, 20, 2, 33, last)
    exact = results(case.reference, case.inputs(scale=100))
    result = results(case.operator, case.inputs(scale=100))
    assert errors_above(result[:1], exact[:1], 1e-11) == []
    size = float(exact[2].norm())
    for ours, true in zip(result[1:], exact[1:], strict=True):
        assert float((ours - true).norm()) <= 1e-9 * float(true.norm()) + 1e-12 * size
    narrow = results(case.operator, case.inputs(F32, scale=1e4))
    assert all(torch.isfinite(part).all() for part in narrow)


@pytest.mark.parametrize("what", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("last", [False, True])
def test_non_finite_values_stay_in_their_window(last: bool, what: float, isa: str) -> None:
    for batch, window in ((1, 0), (9, 4), (61, 0), (61, 60)):
        case = LayerCase(batch, 5, 12, 3, 20, last)
        tensors = case.inputs(F32)
        clean = results(case.operator, tensors)
        tensors[0][window, 2, 7] = what
        result, others = results(case.operator, tensors), torch.arange(batch) != window
        torch.testing.assert_close(result[0], case.reference(tensors), equal_nan=True, rtol=1e-4, atol=1e-5)
        assert not torch.isfinite(result[0][window]).any()
        for ours, before in zip(result[:2], clean[:2], strict=True):
            if KERNELS:
                assert torch.equal(ours[others], before[others])
            assert torch.isfinite(ours[others]).all()


def test_nan_hidden_values_pass_as_in_torch(isa: str) -> None:
    case = LayerCase(3, 4, 8, 2, 6)
    tensors = case.inputs()
    tensors[5][2] = torch.nan  # a row of linear1.weight; a ReLU that returned 0 would hide it
    assert torch.isnan(case.operator(tensors)).all()
    assert torch.isnan(case.reference(tensors)).all()


def test_equal_features_are_scaled_by_eps(isa: str) -> None:
    """With variance 0 the norm divides by the square root of eps, like torch's."""
    case = LayerCase(4, 3, 16, 2, 10)
    for dtype, limit in ((F64, 1e-9), (F32, 1e-2)):
        x, *weights = case.inputs(dtype)
        x, weights[2] = torch.full_like(x, 3.0), torch.zeros_like(weights[2])
        weights[3] = torch.zeros_like(weights[3])
        result, exact = (of([x, *weights]) for of in (case.operator, case.reference))
        assert torch.isfinite(result).all()
        assert relative_error(result, exact) <= limit


@pytest.mark.parametrize("common", [10.0, 1000.0])
def test_a_level_that_all_features_share_costs_no_more_than_in_torch(common: float, isa: str) -> None:
    """The mean is subtracted before squaring."""
    case = LayerCase(40, 6, 24, 3, 33)
    inputs = case.inputs(F32)
    inputs[0] = inputs[0] + common
    inputs[1] = inputs[1] / common
    inputs[6] = inputs[6] + 20  # no hidden value near 0, where rounding would decide its sign
    exact = results(case.reference, [t.double() for t in inputs])
    result, theirs = (results(of, inputs) for of in (case.operator, case.reference))
    for ours, plain, true in zip(result, theirs, exact, strict=True):
        assert float((ours - true).norm()) <= 3 * float((plain - true).norm()) + 1e-6 * float(true.norm())


def test_a_single_feature_is_normalised_to_zero(isa: str) -> None:
    case = LayerCase(5, 4, 1, 1, 3)
    tensors = case.inputs()
    result, *grads = results(case.operator, tensors)
    assert torch.equal(result, tensors[-1].expand(5, 4, 1))
    assert not any(part.any() for part in grads[:-1])


# ---------------------------------------------------------------- directions without a gradient
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("common", [0.0, 5.0, 50.0])
def test_zero_gradients_have_no_more_rounding_noise_than_in_torch(common: float, last: bool, isa: str) -> None:
    """Adam turns rounding noise into full steps.

    Adding a number to all keys of a query changes no weight, and the next norm subtracts the common part of a bias.
    norm behind it.
    """
    case = LayerCase(60, 20, 64, 2, 64, last)
    tensors = case.inputs(F32)
    tensors[0] = tensors[0] + common
    shares = []
    for of in (case.operator, case.reference):
        grads = dict(zip(NAMES, (part.double() for part in results(of, tensors)[2:]), strict=True))
        queries, keys, _ = grads["in_proj_bias"].chunk(3)
        levels = [float(grads[name].sum().abs() / grads[name].norm()) for name in ("out_proj.bias", "linear2.bias")]
        shares.append([float(keys.norm() / queries.norm()), *levels])
    for ours, theirs in zip(*shares, strict=True):
        assert ours <= max(2 * theirs, 1e-6)


def test_with_one_step_queries_and_keys_have_no_gradient(isa: str) -> None:
    case = LayerCase(30, 1, 24, 3, 40)
    _, _, of_in, of_bias, *_ = results(case.operator, case.inputs(F32))
    assert not of_in[: 2 * 24].any()
    assert not of_bias[: 2 * 24].any()
