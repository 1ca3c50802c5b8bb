"""The linear layer with tanh compared with float64: values, gradients, strides, bits, torch's machinery, errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qfast.errors import DataError
from qfast.nn import ALSTMModel
from qfast.ops import linear_tanh
from qfast.ops.linear_tanh import self_test
from support.linear_tanh import LINEAR_TANH_CASES, LinearTanhCase
from support.operator_case import F32, F64, errors_above, exact_results, relative_error, results
from support.tensors import LAYOUTS

KERNELS = torch._C._dispatch_has_kernel_for_dispatch_key("qfast::linear_tanh", "CPU")


# ---------------------------------------------------------------- values and gradients
@pytest.mark.parametrize("case", LINEAR_TANH_CASES, ids=lambda case: case.name)
def test_values_and_gradients_are_those_of_the_definition(case: LinearTanhCase, isa: str) -> None:
    true, of_torch = exact_results(case)
    result = results(case.operator, case.inputs())
    assert [part.shape for part in result] == [part.shape for part in true]
    assert errors_above(result, true, 1e-13) == []
    for a, b, torch_error in zip(results(case.operator, case.inputs(F32)), true, of_torch, strict=True):
        assert relative_error(a, b) <= max(3 * torch_error, 1e-6)


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "plain"])
@pytest.mark.parametrize("steps", [1, 6])
def test_any_strides(layout: str, steps: int, dtype: torch.dtype, isa: str) -> None:
    case, bound = LinearTanhCase(40, steps, 12, 9, layout), 1e-13 if dtype == F64 else 2e-6
    assert errors_above(results(case.operator, case.inputs(dtype)), exact_results(case)[0], bound) == []


def test_windows_that_overlap_or_repeat(isa: str) -> None:
    _, weight, bias = LinearTanhCase(1, 1, 4, 9).inputs()
    rows = torch.randn(120, 4, dtype=F64)
    for x in (rows.unfold(0, 20, 1).transpose(1, 2), rows[:1].expand(50, 7, 4), rows.t()[:4, :40].T.expand(3, 40, 4)):
        expected = LinearTanhCase(1, 1, 4, 9).reference((x, weight, bias))
        assert errors_above([linear_tanh(x, weight, bias)], [expected], 1e-13) == []


def test_parameters_and_incoming_gradients_of_any_strides(isa: str) -> None:
    case = LinearTanhCase(6, 8, 5, 4)
    x, weight, bias = case.inputs()
    odd = [x, weight.t().contiguous().t(), bias.repeat_interleave(2)[::2]]
    for view in (lambda y: y.transpose(0, 1), lambda y: y[..., ::2], lambda y: y[:, :1].expand(6, 3, 4)):
        result = results(lambda t, view=view: view(linear_tanh(*t)), odd)
        expected = results(lambda t, view=view: view(case.reference(t)), [x, weight, bias])
        assert errors_above(result, expected, 1e-13) == []


@settings(deadline=None, max_examples=40)
@given(st.tuples(st.integers(0, 30), st.integers(1, 30), st.integers(1, 70), st.integers(1, 140)))
def test_any_shape(sizes: tuple[int, int, int, int]) -> None:
    case = LinearTanhCase(*sizes)
    tensors = case.inputs()
    assert errors_above(results(case.operator, tensors), results(case.reference, tensors), 1e-12) == []


def test_gradients_by_finite_differences(isa: str) -> None:
    tensors = [tensor.requires_grad_() for tensor in LinearTanhCase(3, 4, 3, 2).inputs()]
    assert torch.autograd.gradcheck(linear_tanh, tensors)


def test_gradients_of_any_part_alone(isa: str) -> None:
    case = LinearTanhCase(5, 7, 6, 4)
    tensors = case.inputs()
    for which, expected in enumerate(results(case.operator, tensors)[1:]):
        leaves = [tensor.detach() for tensor in tensors]
        leaves[which].requires_grad_()
        out = linear_tanh(*leaves)
        # As support.operator_case.results draws it.
        out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(F64))
        assert relative_error(leaves[which].grad, expected) < 1e-13


def test_kernels_agree_with_plain_torch(isa: str) -> None:
    self_test(torch.device("cpu"))


@pytest.mark.skipif(not KERNELS, reason="plain torch does not guarantee equal bits")
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_the_same_bits_again_and_for_any_number_of_threads(dtype: torch.dtype, isa: str) -> None:
    case = LinearTanhCase(230, 20, 21, 67)
    before, tensors, runs = torch.get_num_threads(), case.inputs(dtype), []
    try:
        for threads in (1, 1, 2, 3, 2):
            torch.set_num_threads(threads)
            runs.append(results(case.operator, tensors))
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_values_stay_in_their_row(value: float, isa: str) -> None:
    x, weight, bias = LinearTanhCase(9, 8, 5, 4).inputs(F32)
    clean = linear_tanh(x, weight, bias)
    x = x.contiguous().clone()
    x[4, 7, 2] = value
    result = linear_tanh(x, weight, bias)
    expected = torch.tanh(x[4, 7] @ weight.t() + bias)
    torch.testing.assert_close(result[4, 7], expected, equal_nan=True)
    result[4, 7] = clean[4, 7]
    assert torch.equal(result, clean)


# ---------------------------------------------------------------- in torch: compile, export, transforms
@pytest.mark.parametrize("shape", [(3, 4, 3, 2), (0, 4, 3, 2)], ids=str)
def test_opcheck(shape: tuple[int, ...]) -> None:
    leaves = [tensor.requires_grad_() for tensor in LinearTanhCase(*shape).inputs()]
    torch.library.opcheck(torch.ops.qfast.linear_tanh, (*leaves, True))
    tensors = [leaf.detach() for leaf in leaves]
    out = torch.ops.qfast.linear_tanh(*tensors, True)
    for input_grad in (True, False):
        torch.library.opcheck(torch.ops.qfast.linear_tanh_backward, (torch.ones_like(out), *tensors, out, input_grad))


def test_double_backward_is_refused_by_name() -> None:
    leaves = [tensor.requires_grad_() for tensor in LinearTanhCase(3, 4, 3, 2).inputs()]
    (first,) = torch.autograd.grad(linear_tanh(*leaves).square().sum(), leaves[0], create_graph=True)
    with pytest.raises(NotImplementedError, match=r"linear_tanh: double backward is not supported.*torch\.func\.grad"):
        first.sum().backward()


def test_transforms_and_forward_mode() -> None:
    case = LinearTanhCase(3, 4, 3, 2)
    x, weight, bias = case.inputs()
    along = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).double()

    def ours(x: torch.Tensor) -> torch.Tensor:
        return linear_tanh(x, weight, bias).pow(3).sum()

    def torchs(x: torch.Tensor) -> torch.Tensor:
        return case.reference((x, weight, bias)).pow(3).sum()

    torch.testing.assert_close(torch.func.hessian(ours)(x), torch.func.hessian(torchs)(x))
    slopes = [torch.func.jvp(function, (x,), (along,))[1] for function in (ours, torchs)]
    torch.testing.assert_close(*slopes)
    torch.testing.assert_close(torch.vmap(ours)(torch.stack((x, along))), torch.stack((torchs(x), torchs(along))))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(dynamic: bool) -> None:
    torch.compiler.reset()
    compiled = torch.compile(linear_tanh, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for batch in (5, 6):
        case = LinearTanhCase(batch, 4, 3, 2)
        tensors = case.inputs()
        assert errors_above(results(lambda t: compiled(*t), tensors), results(case.operator, tensors), 1e-13) == []
    torch.compiler.reset()


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_rounded_once(half: torch.dtype) -> None:
    tensors = [tensor.to(half) for tensor in LinearTanhCase(5, 7, 6, 4).inputs(F32)]
    expected = linear_tanh(*(tensor.float() for tensor in tensors)).to(half)
    assert torch.equal(linear_tanh(*tensors), expected)


# ---------------------------------------------------------------- errors
def test_wrong_arguments_are_named() -> None:
    x, weight, bias = LinearTanhCase(3, 4, 5, 2).inputs()
    for arguments, message in (
        ((x[0], weight, bias), r"x: expected shape \[B, T, F\] with F of at least 1, got \(4, 5\)"),
        ((x[..., :0], weight[:, :0], bias), r"x: expected shape \[B, T, F\]"),
        ((x.long(), weight, bias), "x: expected dtype float32 or float64"),
        ((x, weight[:, :3], bias), r"weight: expected shape \[H, 5\], got \(2, 3\)"),
        ((x, weight, bias[:1]), r"bias: expected shape \(2,\), got \(1,\)"),
        ((x, weight.float(), bias), "weight: expected dtype and device of x"),
        ((x, weight, None), "bias: expected a tensor, got NoneType"),
    ):
        with pytest.raises(DataError, match=message):
            linear_tanh(*arguments)


def test_the_operator_checks_its_arguments_too() -> None:
    x, weight, bias = LinearTanhCase(3, 4, 5, 2).inputs()
    if not KERNELS:
        pytest.skip("torch checks the arguments of its own operations")
    with pytest.raises(ValueError, match=r"linear_tanh: weight and bias: expected \[H, 5\]"):
        torch.ops.qfast.linear_tanh(x, weight[:, :3], bias, False)
    with pytest.raises(ValueError, match=r"linear_tanh_backward: grad: expected shape \(3, 4, 2\)"):
        torch.ops.qfast.linear_tanh_backward(x, x, weight, bias, torch.zeros(3, 4, 2, dtype=F64), True)


# ---------------------------------------------------------------- in ALSTM
def test_alstm_calls_the_operator_only_for_an_unchanged_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr("qfast.nn.alstm.linear_tanh", lambda *tensors: calls.append(1) or linear_tanh(*tensors))
    x = torch.randn(3, 5, 6)
    network = ALSTMModel(d_feat=6)
    expected = network(x)
    used = len(calls)
    network.net[0].register_forward_hook(lambda *_: None)
    torch.testing.assert_close(network(x), expected)
    without_bias = ALSTMModel(d_feat=6)
    without_bias.net[0] = torch.nn.Linear(6, 64, bias=False)
    without_bias(x).sum().backward()
    assert len(calls) == used
    assert used == (1 if torch._C._dispatch_has_kernel_for_dispatch_key("qfast::gru", "CPU") else used)
