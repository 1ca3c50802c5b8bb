"""The encoder layer beside torch.nn.TransformerEncoderLayer in float64: values, gradients, strides, threads, bits."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qfast.ops import encoder_layer
from qfast.ops.encoder_layer import self_test
from support.encoder import (
    F32,
    F64,
    KERNELS,
    NAMES,
    Case,
    definition,
    exact_layer,
    inputs_of,
    operator,
    raw_gradients,
    results,
)
from support.recurrent import LAYOUTS, apart
from support.temporal_conv import relative

# Every size of the models, and both sides of every vector, panel and tile.
CASES = [
    Case(0, 5, 8, 2),
    Case(0, 5, 8, 2, last=True),
    Case(1, 1, 4, 1, 1),
    Case(1, 1, 8, 4, 7),
    *(Case(b, 7, 16, 2, 64, last=b % 2 == 0) for b in (1, 2, 3, 5, 13, 100)),
    *(Case(5, t, 24, 3, 64, last=last) for t in (1, 2, 3, 20, 60, 130) for last in (False, True)),
    *(Case(6, 7, d, heads, 50, last=last) for d, heads in ((8, 4), (10, 5), (36, 6), (64, 2), (72, 8), (128, 1))
      for last in (False, True)),
    Case(3, 4, 64, 64, 40),
    Case(2, 3, 512, 8, 100),
    Case(2, 3, 512, 2, 100, last=True),
    *(Case(7, 5, 20, 2, m, last=m % 2 == 0) for m in (1, 7, 64, 100, 256, 2048)),
    # the models' own sizes, with few windows
    Case(26, 20, 64, 2, 2048),
    Case(26, 20, 64, 2, 2048, last=True),
    *(Case(14, 6, 12, 3, last=last, layout=layout) for layout in LAYOUTS if layout != "plain"
      for last in (False, True)),
    Case(9, 6, 12, 3, eps=1e-2),
    Case(9, 6, 12, 3, eps=1e-2, last=True),
]  # fmt: skip
LONG = [
    *(Case(b, t, d, h, m, last=last) for b, t, d, h, m in (
        (100, 20, 64, 2, 2048), (13, 60, 64, 4, 2048), (3, 512, 64, 2, 256), (2, 300, 128, 8, 100),
        (5, 20, 512, 8, 2048), (1000, 2, 8, 4, 64), (300, 3, 36, 6, 256),
    ) for last in (False, True)),
    *(Case(4, 33, d, h, 70, last=last) for d in (8, 16, 24, 36, 64, 72, 128, 250) for h in range(1, d + 1)
      if d % h == 0 for last in (False, True)),
]  # fmt: skip
BY_NAME = {case.name: case for case in CASES}
BY_NAME_LONG = {case.name: case for case in LONG}


def check(case: Case) -> None:
    """float64 to 1e-12; float32 to 2e-5, and within 2 (gradients 3) times torch's own float32 error.

    The gradient of the keys' bias is 0, whatever it is rounding alone: judged beside that of the queries' bias.
    """
    exact, of_torch = exact_layer(case)
    for dtype, limits in (
        (F64, [1e-12] * 14),
        (F32, [min(2e-5, max(2 * of_torch[0], 5e-7)), *(min(2e-5, max(3 * e, 1e-6)) for e in of_torch[1:])]),
    ):
        found = results(partial(operator, case), inputs_of(case, dtype))
        for name, ours, true, limit in zip(["out", "x", *NAMES], found, exact, limits, strict=True):
            at, width = true, case.width
            if case.steps == 1 and name.startswith("in_proj"):  # one step: a weight of 1 whatever queries and keys are
                assert not ours[: 2 * width].any()
                ours, at = ours[2 * width :], at[2 * width :]
            assert relative(ours, at) <= limit, (dtype, name, relative(ours, at), limit)


# ---------------------------------------------------------------- values and gradients
@pytest.mark.parametrize("case", BY_NAME)
def test_values_and_gradients_are_those_of_torchs_layer(case: str, isa: str) -> None:
    check(BY_NAME[case])


@pytest.mark.slow
@pytest.mark.parametrize("case", BY_NAME_LONG)
def test_more_values_and_gradients(case: str, isa: str) -> None:
    check(BY_NAME_LONG[case])


@pytest.mark.parametrize("steps", [1, 2, 6, 20, 37])
def test_the_last_step_alone_is_that_of_all_steps(steps: int, isa: str) -> None:
    case, last = Case(11, steps, 24, 3, 70), Case(11, steps, 24, 3, 70, last=True)
    tensors = inputs_of(case)
    whole = results(lambda t: operator(case, t)[:, -1], tensors)
    assert apart(results(partial(operator, last), tensors), whole, 1e-13) == []


def test_the_parameters_of_a_layer_stand_in_the_order_that_is_wanted() -> None:
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
    case = Case(batch, steps, head * heads, heads, hidden, last, layout)
    tensors = inputs_of(case)
    found, exact = (results(partial(of, case), tensors) for of in (operator, definition))
    if case.width == 1:  # a norm of one feature is its bias: everything before is 0, and rounding in torch
        found, exact = [found[0], *found[9:]], [exact[0], *exact[9:]]
        assert apart(found[:1], exact[:1], 1e-12) == []
        return
    # the gradients of queries and keys are small where the weights do not depend on them
    size = max(float(part.norm()) for part in exact[1:])
    limit = 1e-12 if case.width >= 8 else 1e-9  # a few features may have a variance near eps, which magnifies rounding
    for ours, true in zip(found, exact, strict=True):
        assert float((ours - true).norm()) <= limit * (float(true.norm()) + 0.1 * size)


@pytest.mark.parametrize("last", [False, True])
def test_gradients_by_finite_differences(last: bool, isa: str) -> None:
    case = Case(2, 3, 4, 2, 5, last)
    leaves = [t.requires_grad_() for t in inputs_of(case)]
    assert torch.autograd.gradcheck(lambda *t: operator(case, t), leaves)


@pytest.mark.parametrize("last", [False, True])
def test_gradients_of_any_part_alone(last: bool, isa: str) -> None:
    case = Case(9, 4, 12, 3, 17, last)
    tensors = inputs_of(case)
    whole = results(partial(operator, case), tensors)[1:]
    for which, expected in enumerate(whole):
        given = [t.detach() for t in tensors]
        given[which].requires_grad_()
        out = operator(case, given)
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(F64)
        assert relative(torch.autograd.grad(out, given[which], grad)[0], expected) < 1e-13


@pytest.mark.parametrize("last", [False, True])
def test_data_that_wants_no_gradient_gets_none(last: bool, isa: str) -> None:
    case = Case(9, 4, 12, 3, 17, last)
    tensors = inputs_of(case)
    *_, whole = raw_gradients(case, tensors, 0.0, 1)
    *_, without = raw_gradients(case, tensors, 0.0, 1, input_grad=False)
    assert without[0].shape == (0, 4, 12)
    assert apart(without[1:], whole[1:], 1e-13) == []


@pytest.mark.parametrize("last", [False, True])
def test_without_a_gradient_nothing_is_kept_and_the_values_are_the_same(last: bool, isa: str) -> None:
    case = Case(30, 6, 20, 2, 33, last)
    tensors = inputs_of(case)
    x, weights = tensors[0], tensors[1:]
    kept = torch.ops.qfast.encoder_layer(x, weights, 2, 1e-5, 0.0, None, last, True)
    bare = torch.ops.qfast.encoder_layer(x, weights, 2, 1e-5, 0.0, None, last, False)
    rows = 1 if last else 6
    assert [tuple(part.shape) for part in kept[1:]] == [(2, 30, rows, 20), (2, 30, rows)]
    assert [tuple(part.shape) for part in bare[1:]] == [(2, 0, rows, 20), (2, 0, rows)]
    assert torch.equal(bare[0], kept[0])
    with torch.no_grad():
        assert torch.equal(operator(case, tensors), kept[0])
    assert relative(kept[0], definition(case, tensors)) < 1e-13


def test_kernels_agree_with_plain_torch(isa: str) -> None:
    self_test(torch.device("cpu"))


def test_weights_of_any_strides(isa: str) -> None:
    case = Case(9, 5, 12, 3, 17)
    tensors = inputs_of(case)
    expected = results(partial(operator, case), tensors)
    odd = [t.t().contiguous().t() if t.dim() == 2 else torch.stack((t, t), 1)[:, 0] for t in tensors[1:]]
    assert apart(results(partial(operator, case), [tensors[0], *odd]), expected, 1e-13) == []


@pytest.mark.parametrize("last", [False, True])
def test_incoming_gradients_of_any_strides(last: bool, isa: str) -> None:
    case = Case(7, 4, 12, 3, 9, last)
    for view in (
        lambda out: out.sum().expand(3).sum(),
        lambda out: out.transpose(0, 1).square(),
        lambda out: out[..., ::2].square(),
        lambda out: out[:0].sum() + out[2:5].sum(),
    ):
        found, exact = (
            results(lambda t, of=of, view=view: view(of(case, t)), inputs_of(case)) for of in (operator, definition)
        )
        size = max(float(part.norm()) for part in exact[1:])
        for ours, true in zip(found, exact, strict=True):
            assert float((ours - true).norm()) <= 1e-12 * float(true.norm()) + 1e-13 * size


# ---------------------------------------------------------------- the same bits
@pytest.mark.skipif(not KERNELS, reason="plain torch promises no bits")
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_the_same_bits_again_and_for_any_number_of_threads(dtype: torch.dtype, last: bool, isa: str) -> None:
    before = torch.get_num_threads()
    try:
        for case in (Case(259, 5, 24, 3, 70, last), Case(40, 60, 16, 2, 33, last)):
            tensors, runs = inputs_of(case, dtype), []
            for threads in (1, 1, 2, 3, 2):
                torch.set_num_threads(threads)
                torch.manual_seed(4)
                runs.append(results(partial(operator, case, dropout=0.2, training=True), tensors))
                with torch.no_grad():
                    runs[-1].append(operator(case, tensors))
            for run in runs[1:]:
                assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(not KERNELS, reason="plain torch's products depend on the number of rows")
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_a_window_does_not_see_which_others_stand_beside_it(dtype: torch.dtype, last: bool, isa: str) -> None:
    case = Case(200, 7, 24, 3, 70, last)
    x, *weights = inputs_of(case, dtype)
    whole = operator(case, [x, *weights])
    for part in (slice(0, 1), slice(3, 20), slice(150, 200)):
        assert relative(operator(case, [x[part], *weights]), whole[part]) <= (1e-14 if dtype == F64 else 1e-6)


# ---------------------------------------------------------------- numbers at the ends
@pytest.mark.parametrize("last", [False, True])
def test_weights_that_saturate(last: bool, isa: str) -> None:
    """Queries and keys a hundred times as large: one key takes all, and scores far beyond what exp holds."""
    case = Case(13, 9, 20, 2, 33, last)
    exact = results(partial(definition, case), inputs_of(case, scale=100))
    found = results(partial(operator, case), inputs_of(case, scale=100))
    assert apart(found[:1], exact[:1], 1e-11) == []
    size = float(exact[2].norm())
    for ours, true in zip(found[1:], exact[1:], strict=True):
        assert float((ours - true).norm()) <= 1e-9 * float(true.norm()) + 1e-12 * size
    narrow = results(partial(operator, case), inputs_of(case, F32, scale=1e4))
    assert all(torch.isfinite(part).all() for part in narrow)


@pytest.mark.parametrize("what", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("last", [False, True])
def test_what_is_not_finite_stays_in_its_window(last: bool, what: float, isa: str) -> None:
    for batch, window in ((1, 0), (9, 4), (61, 0), (61, 60)):
        case = Case(batch, 5, 12, 3, 20, last)
        tensors = inputs_of(case, F32)
        clean = results(partial(operator, case), tensors)
        tensors[0][window, 2, 7] = what
        found, others = results(partial(operator, case), tensors), torch.arange(batch) != window
        torch.testing.assert_close(found[0], definition(case, tensors), equal_nan=True, rtol=1e-4, atol=1e-5)
        assert not torch.isfinite(found[0][window]).any()
        for ours, before in zip(found[:2], clean[:2], strict=True):
            if KERNELS:
                assert torch.equal(ours[others], before[others])
            assert torch.isfinite(ours[others]).all()


def test_nan_hidden_values_pass_as_in_torch(isa: str) -> None:
    case = Case(3, 4, 8, 2, 6)
    tensors = inputs_of(case)
    tensors[5][2] = torch.nan  # a row of linear1.weight: a relu that made 0 of it would hide it
    assert torch.isnan(operator(case, tensors)).all()
    assert torch.isnan(definition(case, tensors)).all()


def test_features_that_are_all_alike_are_scaled_by_eps(isa: str) -> None:
    """Variance 0: the norm divides by the root of eps alone, as torch's."""
    case = Case(4, 3, 16, 2, 10)
    for dtype, limit in ((F64, 1e-9), (F32, 1e-2)):
        x, *weights = inputs_of(case, dtype)
        x, weights[2] = torch.full_like(x, 3.0), torch.zeros_like(weights[2])
        weights[3] = torch.zeros_like(weights[3])
        found, exact = (of(case, [x, *weights]) for of in (operator, definition))
        assert torch.isfinite(found).all()
        assert relative(found, exact) <= limit


@pytest.mark.parametrize("common", [10.0, 1000.0])
def test_a_level_that_all_features_share_costs_no_more_than_in_torch(common: float, isa: str) -> None:
    """The mean is taken off before the squares."""
    case = Case(40, 6, 24, 3, 33)
    given = inputs_of(case, F32)
    given[0] = given[0] + common
    given[1] = given[1] / common
    given[6] = given[6] + 20  # no hidden value near 0: rounding would decide which side of it
    exact = results(partial(definition, case), [t.double() for t in given])
    found, theirs = (results(partial(of, case), given) for of in (operator, definition))
    for ours, plain, true in zip(found, theirs, exact, strict=True):
        assert float((ours - true).norm()) <= 3 * float((plain - true).norm()) + 1e-6 * float(true.norm())


def test_a_single_feature_is_normalised_to_nothing(isa: str) -> None:
    case = Case(5, 4, 1, 1, 3)
    tensors = inputs_of(case)
    found, *grads = results(partial(operator, case), tensors)
    assert torch.equal(found, tensors[-1].expand(5, 4, 1))
    assert not any(part.any() for part in grads[:-1])


# ---------------------------------------------------------------- directions without a gradient
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("common", [0.0, 5.0, 50.0])
def test_what_has_no_gradient_gets_no_more_than_torch_leaves(common: float, last: bool, isa: str) -> None:
    """Adam makes whole steps of what rounding leaves.

    The same number on all keys of a query changes no weight, and what all features of a bias share is taken off by the
    norm behind it.
    """
    case = Case(60, 20, 64, 2, 64, last)
    tensors = inputs_of(case, F32)
    tensors[0] = tensors[0] + common
    shares = []
    for of in (operator, definition):
        grads = dict(zip(NAMES, (part.double() for part in results(partial(of, case), tensors)[2:]), strict=True))
        queries, keys, _ = grads["in_proj_bias"].chunk(3)
        levels = [float(grads[name].sum().abs() / grads[name].norm()) for name in ("out_proj.bias", "linear2.bias")]
        shares.append([float(keys.norm() / queries.norm()), *levels])
    for ours, theirs in zip(*shares, strict=True):
        assert ours <= max(2 * theirs, 1e-6)


def test_one_step_moves_no_query_and_no_key(isa: str) -> None:
    case = Case(30, 1, 24, 3, 40)
    _, _, of_in, of_bias, *_ = results(partial(operator, case), inputs_of(case, F32))
    assert not of_in[: 2 * 24].any()
    assert not of_bias[: 2 * 24].any()
