"""The feed-forward block compared with Linear, ReLU, Linear in float64: values, gradients, dropout, bits, errors,
memory."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qfast.errors import ConfigError, DataError
from qfast.ops import feed_forward
from qfast.ops.feed_forward import self_test
from support.encoder import BLOCK_CASES, KERNELS, BlockCase, block_of_masks
from support.operator_case import F32, F64, errors_above, exact_results, relative_error, results


def seeded(tensors: list[Tensor], dropout: float, seed: int) -> list[Tensor]:
    """Result and gradients of the raw operators, for the incoming gradient that `results` uses."""
    rows, (w1, b1, w2, b2), number = tensors[0].flatten(0, -2), tensors[1:], torch.tensor([seed])
    out = torch.ops.qfast.feed_forward(rows, w1, b1, w2, b2, dropout, number)
    shape = (*tensors[0].shape[:-1], len(w2))
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(9)).to(out.dtype).flatten(0, -2)
    of_x, *others = torch.ops.qfast.feed_forward_backward(grad, rows, w1, b1, w2, dropout, number, True)
    return [out.view(shape), of_x.view(tensors[0].shape), *others]


# ---------------------------------------------------------------- values and gradients
@pytest.mark.parametrize("case", BLOCK_CASES, ids=lambda case: case.name)
def test_values_and_gradients_are_those_of_torchs_layers(case: BlockCase, isa: str) -> None:
    """float64 to 1e-12; float32 to 2e-5, and within 2 (gradients 3) times torch's float32 error."""
    exact, of_torch = exact_results(case)
    assert errors_above(results(case.operator, case.inputs()), exact, 1e-12) == []
    narrow = results(case.operator, case.inputs(F32))
    for i, (result, true, plain) in enumerate(zip(narrow, exact, of_torch, strict=True)):
        limit = max(2 * plain, 5e-7) if i == 0 else max(3 * plain, 1e-6)
        assert relative_error(result, true) <= min(limit, 2e-5), (i, relative_error(result, true), plain)


@settings(deadline=None, max_examples=40)
@given(
    lead=st.lists(st.integers(0, 12), max_size=3),
    sizes=st.tuples(st.integers(1, 70), st.integers(1, 300), st.integers(1, 70)),
)
def test_any_shape(lead: list[int], sizes: tuple[int, int, int]) -> None:
    case = BlockCase(tuple(lead), *sizes)
    tensors = case.inputs()
    assert errors_above(results(case.operator, tensors), results(case.reference, tensors), 1e-12) == []


def test_gradients_by_finite_differences(isa: str) -> None:
    leaves = [t.requires_grad_() for t in BlockCase((3, 2), 3, 5, 2).inputs()]
    assert torch.autograd.gradcheck(feed_forward, leaves)


def test_gradients_of_any_part_alone(isa: str) -> None:
    case = BlockCase((9, 2), 12, 33, 5)
    tensors = case.inputs()
    grad = torch.randn(9, 2, 5, generator=torch.Generator().manual_seed(9)).double()
    for which, expected in enumerate(results(case.operator, tensors)[1:]):
        leaves = [t.detach() for t in tensors]
        leaves[which].requires_grad_()
        feed_forward(*leaves).backward(grad)
        assert relative_error(leaves[which].grad, expected) < 1e-13


def test_parameters_and_incoming_gradients_of_any_strides(isa: str) -> None:
    case = BlockCase((9, 4), 12, 33, 6)
    tensors = case.inputs()
    odd = [t.t().contiguous().t() if t.dim() == 2 else torch.stack((t, t), 1)[:, 0] for t in tensors[1:]]
    for view in (lambda out: out.transpose(0, 1), lambda out: out[..., ::2], lambda out: out[:, :1].expand(9, 3, 6)):
        result = results(lambda t, view=view: view(feed_forward(*t)), [tensors[0], *odd])
        assert errors_above(result, results(lambda t, view=view: view(case.reference(t)), tensors), 1e-12) == []


def test_kernels_agree_with_plain_torch(isa: str) -> None:
    self_test(torch.device("cpu"))


def test_data_that_requires_no_gradient_gets_none(isa: str) -> None:
    case = BlockCase((9,), 12, 33, 5)
    tensors = case.inputs()
    grad = torch.ones(9, 5, dtype=F64)
    whole, without = (
        torch.ops.qfast.feed_forward_backward(grad, *tensors[:4], 0.0, None, wanted) for wanted in (True, False)
    )
    assert without[0].shape == (0, 12)
    assert errors_above(without[1:], whole[1:], 1e-13) == []


# ---------------------------------------------------------------- the same bits
@pytest.mark.skipif(not KERNELS, reason="plain torch does not guarantee equal bits")
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_the_same_bits_again_and_for_any_number_of_threads(dtype: torch.dtype, isa: str) -> None:
    before, tensors, runs = torch.get_num_threads(), BlockCase((1500,), 20, 150, 9).inputs(dtype), []
    try:
        for threads in (1, 1, 2, 3, 2):
            torch.set_num_threads(threads)
            torch.manual_seed(4)
            runs.append(results(lambda t: feed_forward(*t, dropout=0.2, training=True), tensors))
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


# ---------------------------------------------------------------- extreme values
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_values_spread_as_in_torch_and_stay_in_their_row(value: float, isa: str) -> None:
    case = BlockCase((60,), 12, 33, 6)
    tensors = case.inputs(F32)
    clean = results(case.operator, tensors)
    tensors[0][7, 3] = value
    result, others = results(case.operator, tensors), torch.arange(60) != 7
    torch.testing.assert_close(result[0], case.reference(tensors), equal_nan=True, rtol=1e-4, atol=1e-5)
    assert not torch.isfinite(result[0][7]).any()
    for ours, before in zip(result[:2], clean[:2], strict=True):
        if KERNELS:
            assert torch.equal(ours[others], before[others])
        assert torch.isfinite(ours[others]).all()


def test_nan_hidden_values_and_their_gradients_pass_as_in_torch(isa: str) -> None:
    case = BlockCase((5,), 8, 6, 4)
    tensors = case.inputs()
    tensors[2][2] = torch.nan
    result, exact = results(case.operator, tensors), results(case.reference, tensors)
    for ours, plain in zip(result, exact, strict=True):
        torch.testing.assert_close(ours, plain, equal_nan=True, rtol=1e-12, atol=1e-12)


def test_a_hidden_value_of_exactly_zero_passes_no_gradient(isa: str) -> None:
    x, weight, ones = torch.ones(3, 4, dtype=F64), torch.zeros(5, 4, dtype=F64), torch.ones(2, 5, dtype=F64)
    tensors = [x, weight, torch.zeros(5, dtype=F64), ones, torch.zeros(2, dtype=F64)]
    _, of_x, of_in, of_bias, of_out, of_shift = results(BlockCase((3,), 4, 5, 2).operator, tensors)
    assert not any(part.any() for part in (of_x, of_in, of_bias, of_out))
    assert of_shift.any()


# ---------------------------------------------------------------- dropout
@pytest.mark.parametrize("dropout", [1e-9, 0.1, 0.5, 0.9, 1.0])
def test_the_mask_is_that_of_the_definition(dropout: float, isa: str) -> None:
    """Word n % 4 of the counter (unit, 0, 1, n // 4): forward and backward, in float64."""
    for case, seed in (
        (BlockCase((1,), 4, 5, 2), 0),
        (BlockCase((3, 2), 7, 17, 3), -1),
        (BlockCase((131,), 6, 99, 8), 2**63 - 1),
        (BlockCase((26,), 3, 2048, 3), -(2**61) + 12345),
    ):
        tensors = case.inputs()
        exact = results(lambda t, seed=seed: block_of_masks(t, dropout, seed), tensors)
        assert errors_above(seeded(tensors, dropout, seed), exact, 1e-12) == []


def test_the_mask_depends_neither_on_the_dtype_nor_on_other_rows(isa: str) -> None:
    case = BlockCase((600,), 12, 70, 6)
    wide, narrow = (seeded(case.inputs(dtype), 0.3, 7) for dtype in (F64, F32))
    assert errors_above(narrow, wide, 1e-5) == []
    x, *others = case.inputs()
    for rows in (1, 5, 481):
        assert relative_error(seeded([x[:rows], *others], 0.3, 7)[0], wide[0][:rows]) < 1e-13


@pytest.mark.parametrize("p", [0.05, 0.3, 0.8])
def test_rate_and_scale(p: float, isa: str) -> None:
    """Hidden values of 1 pass unchanged, so the result is the mask. Its rate is within five standard errors of p."""
    width = 128
    eye, zero = torch.eye(width), torch.zeros(width)
    torch.manual_seed(1)
    result = feed_forward(torch.ones(400, width), eye, zero, eye, zero, dropout=p, training=True)
    saved = result != 0
    torch.testing.assert_close(result[saved], torch.full((int(saved.sum()),), 1 / (1 - p)))
    assert abs(float(saved.double().mean()) - (1 - p)) < 5 * (p * (1 - p) / result.numel()) ** 0.5
    rates = saved.double().mean(0), saved.double().mean(1)  # no column and no row differs from the others
    assert all(float((rate - (1 - p)).abs().max()) < 6 * (p * (1 - p) / 128) ** 0.5 for rate in rates)


def test_dropout_follows_the_generator_and_training(isa: str) -> None:
    case = BlockCase((8, 3), 12, 70, 6)
    tensors = case.inputs()
    state = torch.get_rng_state()
    assert torch.equal(feed_forward(*tensors, dropout=0.5), feed_forward(*tensors))
    assert torch.equal(feed_forward(*tensors, dropout=0.0, training=True), feed_forward(*tensors))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(4)
    first, second = (feed_forward(*tensors, dropout=0.5, training=True) for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(4)
    wanted = feed_forward(*[t.detach().requires_grad_() for t in tensors], dropout=0.5, training=True)
    assert relative_error(wanted.detach(), first) < 1e-13
    everything = feed_forward(*tensors, dropout=1.0, training=True)
    assert torch.equal(everything, tensors[4].expand(8, 3, 6))


def test_gradients_by_finite_differences_under_one_mask(isa: str) -> None:
    def dropped(*inputs: Tensor) -> Tensor:
        torch.manual_seed(3)
        return feed_forward(*inputs, dropout=0.4, training=True)

    assert torch.autograd.gradcheck(dropped, [t.requires_grad_() for t in BlockCase((5,), 3, 7, 2).inputs()])


# ---------------------------------------------------------------- in torch: compile, export, transforms
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("rows", [0, 5])
def test_opcheck(rows: int, dropout: float) -> None:
    leaves = [t.requires_grad_() for t in BlockCase((rows,), 4, 6, 3).inputs()]
    seed = torch.tensor([7]) if dropout else None
    torch.library.opcheck(torch.ops.qfast.feed_forward, (*leaves, dropout, seed))
    plain = [t.detach() for t in leaves[:4]]
    for wanted in (True, False):
        inputs = (torch.ones(rows, 3, dtype=F64), *plain, dropout, seed, wanted)
        torch.library.opcheck(torch.ops.qfast.feed_forward_backward, inputs)


def test_double_backward_is_refused_by_name() -> None:
    leaves = [t.requires_grad_() for t in BlockCase((3,), 4, 5, 2).inputs()]
    (first,) = torch.autograd.grad(feed_forward(*leaves).square().sum(), leaves[0], create_graph=True)
    with pytest.raises(NotImplementedError, match=r"feed_forward: double backward is not supported.*torch\.func\.grad"):
        first.sum().backward()


def test_transforms_and_forward_mode() -> None:
    case = BlockCase((3, 2), 4, 7, 2)
    x, *others = case.inputs()
    along = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).double()

    def ours(x: Tensor) -> Tensor:
        return feed_forward(x, *others).square().sum()

    def plain(x: Tensor) -> Tensor:
        return case.reference([x, *others]).square().sum()

    torch.testing.assert_close(torch.func.grad(ours)(x), torch.func.grad(plain)(x))
    torch.testing.assert_close(torch.func.hessian(ours)(x), torch.func.hessian(plain)(x))
    slope = torch.func.jvp(plain, (x,), (along,))[1]
    torch.testing.assert_close(torch.func.jvp(ours, (x,), (along,))[1], slope)
    torch.testing.assert_close(torch.vmap(ours)(torch.stack((x, along))), torch.stack((plain(x), plain(along))))
    with torch.autograd.forward_ad.dual_level():
        dual = ours(torch.autograd.forward_ad.make_dual(x, along))
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(dual).tangent, slope)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(dynamic: bool) -> None:
    torch.compiler.reset()
    compiled = torch.compile(feed_forward, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (5, 6):
        case = BlockCase((rows, 2), 4, 6, 3)
        tensors = case.inputs()
        result = results(lambda t: compiled(*t), tensors)
        assert errors_above(result, results(case.operator, tensors), 1e-13) == []
    torch.compiler.reset()


def test_exported() -> None:
    class Network(torch.nn.Module):
        def forward(self, *inputs: Tensor) -> Tensor:
            return feed_forward(*inputs)

    case = BlockCase((5, 2), 4, 6, 3)
    tensors = case.inputs()
    program = torch.export.export(Network(), tuple(tensors))
    assert "qfast.feed_forward" in str(program.graph)
    assert relative_error(program.module()(*tensors), feed_forward(*tensors)) < 1e-13


def test_autocast_leaves_float32_alone() -> None:
    case = BlockCase((5,), 12, 33, 6)
    tensors = case.inputs(F32)
    expected = results(case.operator, tensors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = results(case.operator, tensors)
    assert all(torch.equal(ours, plain) for ours, plain in zip(result, expected, strict=True))


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
def test_halves_are_computed_in_float32(half: torch.dtype) -> None:
    case = BlockCase((5, 3), 12, 33, 6)
    tensors = case.inputs(half)
    expected = feed_forward(*(t.float() for t in tensors)).to(half)
    for parts in (tensors, [tensors[0], *(t.float() for t in tensors[1:])]):
        result = feed_forward(*parts)
        assert result.dtype == half
        assert torch.equal(result, expected)


def test_meta_tensors_have_shapes() -> None:
    weights = [t.to("meta") for t in BlockCase((1,), 64, 2048, 3).inputs()[1:]]
    x = torch.empty(2**16, 2**16, 64, device="meta", dtype=F64)  # more rows than a 32-bit integer can count
    assert feed_forward(x, *weights).shape == (2**16, 2**16, 3)


# ---------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": [[1.0]]}, DataError, "x: expected a tensor, got list"),
        (
            {"x": torch.zeros(2, 4, dtype=torch.int64)},
            DataError,
            "x: expected dtype float32 or float64, got torch.int64",
        ),
        ({"x": torch.tensor(1.0)}, DataError, r"x: expected shape \[..., D\] with D of at least 1, got \(\)"),
        ({"x": torch.zeros(2, 0)}, DataError, r"x: .* at least 1, got \(2, 0\)"),
        ({"x": torch.zeros(2, 3)}, DataError, r"weight_in: expected shape \(5, 3\), got \(5, 4\)"),
        ({"weight_in": None}, DataError, "weight_in: expected .*, got NoneType"),
        ({"weight_in": torch.zeros(0, 4)}, DataError, r"weight_in: expected .* at least one row, got \(0, 4\)"),
        ({"weight_in": torch.zeros(5, 4).double()}, DataError, r"weight_in: expected dtype and device of x .*Remedy"),
        ({"bias_in": torch.zeros(4)}, DataError, r"bias_in: expected shape \(5,\), got \(4,\)"),
        ({"bias_in": None}, DataError, "bias_in: expected a tensor, got NoneType"),
        ({"weight_out": torch.zeros(3, 4)}, DataError, r"weight_out: expected shape \(3, 5\), got \(3, 4\)"),
        ({"weight_out": torch.zeros(5)}, DataError, r"weight_out: expected a matrix .*, got \(5,\)"),
        ({"bias_out": torch.zeros(3, 1)}, DataError, r"bias_out: expected shape \(3,\), got \(3, 1\)"),
        ({"dropout": 1.5}, ConfigError, r"dropout must be a number in \[0, 1\], got 1.5"),
        ({"dropout": float("nan"), "training": True}, ConfigError, r"dropout must be a number in \[0, 1\], got nan"),
        ({"dropout": True}, ConfigError, r"dropout must be a number in \[0, 1\], got True"),
        ({"dropout": "a"}, ConfigError, r"dropout must be a number in \[0, 1\], got 'a'"),
    ],
)
def test_refusals(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {
        "x": torch.zeros(2, 4),
        "weight_in": torch.zeros(5, 4),
        "bias_in": torch.zeros(5),
        "weight_out": torch.zeros(3, 5),
        "bias_out": torch.zeros(3),
    }
    with pytest.raises(error, match=f"feed_forward: {message}"):
        feed_forward(**{**arguments, **change})
    assert issubclass(error, ValueError)


@pytest.mark.skipif(not KERNELS, reason="the checks of the kernels themselves")
def test_the_kernels_reject_out_of_bounds_arguments() -> None:
    x, w1, b1, w2, b2 = BlockCase((3,), 4, 6, 2).inputs()
    forward, backward = torch.ops.qfast.feed_forward, torch.ops.qfast.feed_forward_backward
    for arguments, message in (
        ((x, w1[:, :3], b1, w2, b2, 0.0, None), r"weight_in: expected .*6, 4"),
        ((x, w1, b1[:5], w2, b2, 0.0, None), r"bias_in: expected .*6"),
        ((x, w1, b1, w2[:, :5], b2, 0.0, None), r"weight_out: expected .*2, 6"),
        ((x, w1, b1, w2, b2[:1], 0.0, None), r"bias_out: expected .*2"),
        ((x.float(), w1, b1, w2, b2, 0.0, None), "weight_in: expected the dtype of x"),
        ((x[None], w1, b1, w2, b2, 0.0, None), r"x: expected .*\[N, D\]"),
        ((x, w1, b1, w2, b2, 0.5, None), "seed: expected one int64"),
    ):
        with pytest.raises((ValueError, RuntimeError), match=f"feed_forward: {message}"):
            forward(*arguments)
    grad = torch.ones(3, 2, dtype=F64)
    with pytest.raises((ValueError, RuntimeError), match=r"grad: expected .*3, 2"):
        backward(grad[:, :1], x, w1, b1, w2, 0.0, None, True)


# ---------------------------------------------------------------- memory
@pytest.mark.skipif(not KERNELS or sys.platform != "linux", reason="memory use of the kernels, read from Linux")
def test_the_hidden_values_are_never_all_in_memory() -> None:
    program = (
        "import torch, qfast.ops as ops\n"
        "from qfast.benchmarks.memory import peak_memory\n"
        "torch.set_num_threads(1)\n"
        "x = torch.randn(30000, 8, requires_grad=True)\n"
        "w = [torch.randn(s, requires_grad=True) for s in ((2048, 8), (2048,), (8, 2048), (8,))]\n"
        "ops.feed_forward(x[:8], *w, dropout=0.1, training=True).sum().backward()\n"
        "with peak_memory() as peak:\n"
        "    ops.feed_forward(x, *w, dropout=0.1, training=True).sum().backward()\n"
        "print(peak.megabytes)\n"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    assert float(ran.stdout) < 40  # MiB; [N, M] alone needs 234


def test_the_block_of_a_torch_layer() -> None:
    layer = torch.nn.TransformerEncoderLayer(12, 2, 40, dropout=0.0, batch_first=True)
    x = torch.randn(4, 5, 12)
    result = feed_forward(x, layer.linear1.weight, layer.linear1.bias, layer.linear2.weight, layer.linear2.bias)
    torch.testing.assert_close(result, layer._ff_block(x))
