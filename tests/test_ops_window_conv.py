"""Convolution over the steps of windows compared with torch's conv1d in float64: values, gradients, bits, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qfast.errors import DataError
from qfast.ops import window_conv
from qfast.ops.window_conv import self_test
from support.operator_case import F32, F64, errors_above, exact_results, relative_error, results
from support.tensors import LAYOUTS
from support.window_conv import LARGE_WINDOW_CONV_CASES, WINDOW_CONV_CASES, WindowConvCase

KERNELS = torch._C._dispatch_has_kernel_for_dispatch_key("qfast::window_conv", "CPU")

cases = pytest.mark.parametrize(
    "case",
    [*WINDOW_CONV_CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in LARGE_WINDOW_CONV_CASES)],
    ids=lambda case: case.name,
)


# ---------------------------------------------------------------- values and gradients
@cases
def test_values_and_gradients_are_those_of_torchs_convolution(case: WindowConvCase, isa: str) -> None:
    """float64 to 1e-12; float32 to 2e-5, and within three times torch's float32 error."""
    true, of_torch = exact_results(case)
    result = results(case.operator, case.inputs())
    assert [part.shape for part in result] == [part.shape for part in true]
    assert errors_above(result, true, 1e-12) == []
    for a, b, torch_error in zip(results(case.operator, case.inputs(F32)), true, of_torch, strict=True):
        assert relative_error(a, b) <= min(2e-5, max(3 * torch_error, 1e-6))


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "plain"])
def test_any_strides(layout: str, dtype: torch.dtype, isa: str) -> None:
    case, bound = WindowConvCase(14, 6, 12, 9, 3, layout), 1e-12 if dtype == F64 else 2e-6
    assert errors_above(results(case.operator, case.inputs(dtype)), exact_results(case)[0], bound) == []


def test_parameters_and_incoming_gradients_of_any_strides(isa: str) -> None:
    case = WindowConvCase(6, 8, 5, 4, 3)
    tensors = case.inputs()
    odd = [tensors[0], tensors[1].permute(2, 1, 0).contiguous().permute(2, 1, 0), tensors[2].repeat_interleave(2)[::2]]
    for view in (lambda y: y.transpose(0, 1), lambda y: y[..., ::2], lambda y: y[:, :1].expand(6, 3, 4)):
        result = results(lambda t, view=view: view(window_conv(*t)), odd)
        assert errors_above(result, results(lambda t, view=view: view(case.reference(t)), tensors), 1e-12) == []


@settings(deadline=None, max_examples=40)
@given(
    sizes=st.tuples(st.integers(0, 12), st.integers(1, 40), st.integers(1, 40), st.integers(1, 40)),
    side=st.integers(0, 4),
)
def test_any_shape(sizes: tuple[int, int, int, int], side: int) -> None:
    case = WindowConvCase(*sizes, 2 * side + 1)
    tensors = case.inputs()
    assert errors_above(results(case.operator, tensors), results(case.reference, tensors), 1e-12) == []


def test_gradients_by_finite_differences(isa: str) -> None:
    for shape in ((3, 4, 3, 2, 3), (2, 1, 2, 3, 5)):
        assert torch.autograd.gradcheck(window_conv, [t.requires_grad_() for t in WindowConvCase(*shape).inputs()])


def test_gradients_of_any_part_alone(isa: str) -> None:
    case = WindowConvCase(5, 7, 6, 4, 3)
    tensors = case.inputs()
    grad = torch.randn(5, 7, 4, generator=torch.Generator().manual_seed(9)).double()
    for which, expected in enumerate(results(case.operator, tensors)[1:]):
        leaves = [t.detach() for t in tensors]
        leaves[which].requires_grad_()
        window_conv(*leaves).backward(grad)
        assert relative_error(leaves[which].grad, expected) < 1e-13


def test_data_that_requires_no_gradient_gets_none(isa: str) -> None:
    x, weight, _ = WindowConvCase(5, 7, 6, 4, 3).inputs()
    grad = torch.ones(5, 7, 4, dtype=F64)
    whole, without = (torch.ops.qfast.window_conv_backward(grad, x, weight, wanted) for wanted in (True, False))
    assert without[0].shape == (0, 7, 6)
    assert errors_above(without[1:], whole[1:], 1e-13) == []


def test_kernels_agree_with_plain_torch(isa: str) -> None:
    self_test(torch.device("cpu"))


# ---------------------------------------------------------------- the same bits
@pytest.mark.skipif(not KERNELS, reason="plain torch does not guarantee equal bits")
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_the_same_bits_again_and_for_any_number_of_threads(dtype: torch.dtype, isa: str) -> None:
    case = WindowConvCase(230, 20, 21, 19, 3)
    before, tensors, runs = torch.get_num_threads(), case.inputs(dtype), []
    try:
        for threads in (1, 1, 2, 3, 2):
            torch.set_num_threads(threads)
            runs.append(results(case.operator, tensors))
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


@pytest.mark.skipif(not KERNELS, reason="plain torch does not guarantee equal bits")
def test_a_window_does_not_depend_on_its_neighbours(isa: str) -> None:
    x, weight, bias = WindowConvCase(50, 9, 11, 13, 5).inputs(F32)
    together = window_conv(x, weight, bias)
    assert torch.equal(window_conv(x[17:18], weight, bias), together[17:18])
    assert torch.equal(window_conv(x.flip(0), weight, bias), together.flip(0))


# ---------------------------------------------------------------- extreme values
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_values_reach_neighbouring_steps_only(value: float, isa: str) -> None:
    case = WindowConvCase(9, 8, 5, 4, 3)
    tensors = case.inputs(F32)
    clean = results(case.operator, tensors)
    tensors[0][4, 7, 2] = value
    result = results(case.operator, tensors)
    touched = torch.zeros(9, 8, dtype=torch.bool)
    touched[4, 6:] = True
    assert not torch.isfinite(result[0][touched]).any()
    assert torch.equal(result[0][~touched], clean[0][~touched])
    assert torch.equal(result[1], clean[1])  # the gradient of x, which is linear in the incoming gradient
    assert torch.equal(result[2][:, [0, 1, 3, 4]], clean[2][:, [0, 1, 3, 4]])
    assert not torch.isfinite(result[2][:, 2, 1:]).any()  # its step and the one before it are inside the window
    assert torch.equal(result[3], clean[3])


def test_a_gradient_that_is_not_finite_stays_in_its_window(isa: str) -> None:
    x, weight, _ = WindowConvCase(9, 8, 5, 4, 3).inputs(F32)
    grad = torch.ones(9, 8, 4)
    clean = torch.ops.qfast.window_conv_backward(grad, x, weight, True)[0]
    grad[4, 0, 1] = torch.nan
    result = torch.ops.qfast.window_conv_backward(grad, x, weight, True)[0]
    touched = torch.zeros(9, 8, dtype=torch.bool)
    touched[4, :2] = True
    assert result[touched].isnan().all()
    assert torch.equal(result[~touched], clean[~touched])


# ---------------------------------------------------------------- in torch: compile, export, transforms
@pytest.mark.parametrize("shape", [(3, 4, 3, 2, 3), (0, 4, 3, 2, 3), (2, 1, 3, 2, 5)], ids=str)
def test_opcheck(shape: tuple[int, ...]) -> None:
    leaves = [t.requires_grad_() for t in WindowConvCase(*shape).inputs()]
    torch.library.opcheck(torch.ops.qfast.window_conv, tuple(leaves))
    x, weight, _ = (t.detach() for t in leaves)
    grad = torch.ones(*shape[:2], shape[3], dtype=F64)
    for wanted in (True, False):
        torch.library.opcheck(torch.ops.qfast.window_conv_backward, (grad, x, weight, wanted))


def test_double_backward_is_refused_by_name() -> None:
    leaves = [t.requires_grad_() for t in WindowConvCase(3, 4, 3, 2, 3).inputs()]
    (first,) = torch.autograd.grad(window_conv(*leaves).square().sum(), leaves[0], create_graph=True)
    with pytest.raises(NotImplementedError, match=r"window_conv: double backward is not supported.*torch\.func\.grad"):
        first.sum().backward()


def test_transforms_and_forward_mode() -> None:
    case = WindowConvCase(3, 4, 3, 2, 3)
    x, weight, bias = case.inputs()
    along = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).double()

    def ours(x: Tensor) -> Tensor:
        return window_conv(x, weight, bias).pow(3).sum()

    def torchs(x: Tensor) -> Tensor:
        return case.reference([x, weight, bias]).pow(3).sum()

    torch.testing.assert_close(torch.func.grad(ours)(x), torch.func.grad(torchs)(x))
    torch.testing.assert_close(torch.func.hessian(ours)(x), torch.func.hessian(torchs)(x))
    slope = torch.func.jvp(torchs, (x,), (along,))[1]
    torch.testing.assert_close(torch.func.jvp(ours, (x,), (along,))[1], slope)
    torch.testing.assert_close(torch.vmap(ours)(torch.stack((x, along))), torch.stack((torchs(x), torchs(along))))
    with torch.autograd.forward_ad.dual_level():
        dual = ours(torch.autograd.forward_ad.make_dual(x, along))
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(dual).tangent, slope)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(dynamic: bool) -> None:
    torch.compiler.reset()
    compiled = torch.compile(window_conv, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for batch in (5, 6):
        case = WindowConvCase(batch, 4, 3, 2, 3)
        tensors = case.inputs()
        assert errors_above(results(lambda t: compiled(*t), tensors), results(case.operator, tensors), 1e-13) == []
    torch.compiler.reset()


def test_exported() -> None:
    class Network(torch.nn.Module):
        def forward(self, *inputs: Tensor) -> Tensor:
            return window_conv(*inputs)

    case = WindowConvCase(5, 4, 3, 2, 3)
    tensors = case.inputs()
    program = torch.export.export(Network(), tuple(tensors))
    assert "qfast.window_conv" in str(program.graph)
    assert relative_error(program.module()(*tensors), window_conv(*tensors)) < 1e-13


def test_autocast_leaves_float32_alone() -> None:
    case = WindowConvCase(5, 4, 3, 2, 3)
    tensors = case.inputs(F32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = window_conv(*tensors)
    assert torch.equal(result, window_conv(*tensors))


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
def test_halves_are_computed_in_float32(half: torch.dtype) -> None:
    case = WindowConvCase(5, 4, 6, 7, 3)
    tensors = case.inputs(half)
    expected = window_conv(*(t.float() for t in tensors)).to(half)
    for parts in (tensors, [tensors[0], *(t.float() for t in tensors[1:])]):
        result = window_conv(*parts)
        assert result.dtype == half
        assert torch.equal(result, expected)


def test_meta_tensors_have_shapes() -> None:
    _, weight, bias = (t.to("meta") for t in WindowConvCase(1, 1, 64, 3, 3).inputs())
    x = torch.empty(2**20, 2**12, 64, device="meta", dtype=F64)  # more rows than a 32-bit integer can count
    assert window_conv(x, weight, bias).shape == (2**20, 2**12, 3)


# ---------------------------------------------------------------- kernels wider than the windows
@pytest.mark.parametrize("steps", [0, 1, 2, 7])
def test_taps_that_meet_only_zeros_have_no_effect(steps: int, isa: str) -> None:
    """Their gradient is 0, and the other results are those of a kernel that is as wide as two windows."""
    case = WindowConvCase(3, steps, 4, 5, 31)
    x, weight, bias = case.inputs(F32)
    spoiled, reach = weight.clone(), max(steps - 1, 0)
    spoiled[:, :, : 15 - reach] = torch.nan
    spoiled[:, :, 16 + reach :] = torch.inf
    out, of_x, of_weight, of_bias = results(case.operator, [x, spoiled, bias])
    if steps:
        expected = results(case.reference, case.inputs())
        for ours, exact in zip((out, of_x, of_weight, of_bias), expected, strict=True):
            assert relative_error(ours, exact) <= 2e-5
    assert of_weight.shape == weight.shape
    assert not of_weight[:, :, : 15 - reach].any()
    assert not of_weight[:, :, 16 + reach :].any()


def test_wide_kernels_cost_no_more_than_the_windows_need(monkeypatch: pytest.MonkeyPatch) -> None:
    """10,001 taps over 20 steps took seven times as long as torch's convolution."""
    widths = []
    forward = torch.ops.qfast.window_conv.default
    monkeypatch.setattr(
        torch.ops.qfast,
        "window_conv",
        lambda x, weight, *rest: widths.append(weight.shape[2]) or forward(x, weight, *rest),
    )
    window_conv(*WindowConvCase(2, 20, 3, 4, 10001).inputs(F32))
    assert widths == [39]


# ---------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": [[[1.0]]]}, "x: expected a tensor, got list"),
        ({"x": torch.zeros(2, 4, 3, dtype=torch.int64)}, "x: expected dtype float32 or float64, got torch.int64"),
        ({"x": torch.zeros(2, 3)}, r"x: expected shape \[B, T, D\] with D of at least 1, got \(2, 3\)"),
        ({"x": torch.zeros(2, 4, 0)}, r"x: expected .* at least 1, got \(2, 4, 0\)"),
        ({"x": torch.zeros(2, 4, 5)}, r"weight: expected shape \(2, 5, 3\), got \(2, 3, 3\)"),
        ({"weight": None}, r"weight: expected shape \[O, D, K\] .*, got NoneType"),
        ({"weight": torch.zeros(2, 3)}, r"weight: expected shape \[O, D, K\] .*, got \(2, 3\)"),
        ({"weight": torch.zeros(2, 3, 4)}, r"weight: .* odd K .*, got \(2, 3, 4\)"),
        ({"weight": torch.zeros(0, 3, 3)}, r"weight: .* O of at least 1, got \(0, 3, 3\)"),
        ({"weight": torch.zeros(2, 3, 3).double()}, "weight: expected dtype and device of x .*Remedy"),
        ({"bias": torch.zeros(3)}, r"bias: expected shape \(2,\), got \(3,\)"),
        ({"bias": None}, "bias: expected a tensor, got NoneType"),
        ({"bias": torch.zeros(2, device="meta")}, "bias: expected dtype and device of x .*Remedy"),
    ],
)
def test_refusals(change: dict[str, Any], message: str) -> None:
    arguments = {"x": torch.zeros(2, 4, 3), "weight": torch.zeros(2, 3, 3), "bias": torch.zeros(2)}
    with pytest.raises(DataError, match=f"window_conv: {message}"):
        window_conv(**{**arguments, **change})


@pytest.mark.skipif(not KERNELS, reason="the checks of the kernels themselves")
def test_the_kernels_reject_out_of_bounds_arguments() -> None:
    x, weight, bias = WindowConvCase(3, 4, 5, 2, 3).inputs()
    for arguments, message in (
        ((x[0], weight, bias), r"x: expected .*\[B, T, D\]"),
        ((x, weight[:, :4], bias), r"weight: expected .*2, 5, 3"),
        ((x, weight[:, :, :2], bias), "weight: expected an odd number of taps, got 2"),
        ((x, weight, bias[:1]), r"bias: expected .*2"),
        ((x.float(), weight, bias), "weight: expected the dtype of x"),
    ):
        with pytest.raises((ValueError, RuntimeError), match=f"window_conv: {message}"):
            torch.ops.qfast.window_conv(*arguments)
    with pytest.raises((ValueError, RuntimeError), match=r"grad: expected .*3, 4, 2"):
        torch.ops.qfast.window_conv_backward(x, x, weight, True)
