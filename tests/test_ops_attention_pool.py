"""Attention over time compared with plain torch in float64: values, gradients, dropout, threads, memory."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qfast import _backend
from qfast.ops import attention_pool
from qfast.ops.philox import philox
from support.attention_pool import ATTENTION_POOL_CASES, AttentionPoolCase
from support.operator_case import results

NATIVE = _backend.native is not None
NAMES = ("h", "weight", "bias", "score")


def close(result: Tensor, expected: Tensor, bound: float) -> None:
    assert result.shape == expected.shape
    error, size = (result.double() - expected).norm(), expected.norm()
    assert error <= bound * size + 1e-14, (float(error), float(size))


def same(result: Tensor, expected: Tensor) -> None:
    """Asserts bitwise equality, or closeness in plain torch, whose products depend on the strides."""
    if NATIVE:
        assert torch.equal(result, expected)
    else:
        torch.testing.assert_close(result, expected)


# ---------------------------------------------------------------- values and gradients
@pytest.mark.parametrize("case", ATTENTION_POOL_CASES, ids=lambda case: case.name)
def test_float64_equals_torch(case: AttentionPoolCase, isa: str) -> None:
    inputs, grad = case.inputs(), case.grad()
    for result, expected in zip(
        results(case.operator, inputs, grad=grad), results(case.reference, inputs, grad=grad), strict=True
    ):
        close(result, expected, 1e-12)


@pytest.mark.parametrize("case", ATTENTION_POOL_CASES, ids=lambda case: case.name)
def test_float32_is_no_less_accurate_than_torch(case: AttentionPoolCase, isa: str) -> None:
    inputs, grad = case.inputs(torch.float32), case.grad(torch.float32)
    exact = results(case.reference, [t.double() for t in inputs], grad=grad.double())
    theirs = results(case.reference, inputs, grad=grad)
    for result, plain, expected in zip(results(case.operator, inputs, grad=grad), theirs, exact, strict=True):
        close(result, expected, 1e-5)
        # On some processors the few sums of a small case have an error near 0 in torch, by chance.
        assert (result - expected).norm() <= max(3 * (plain - expected).norm(), 2e-6 * expected.norm()) + 1e-9


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(0, 40),
    steps=st.integers(1, 40),
    hidden=st.integers(1, 70),
    width=st.integers(0, 70),
    wide=st.booleans(),
)
def test_any_shape(batch: int, steps: int, hidden: int, width: int, wide: bool) -> None:
    dtype, bound = (torch.float64, 1e-11) if wide else (torch.float32, 2e-5)
    case = AttentionPoolCase(batch, steps, hidden, width)
    inputs, grad = case.inputs(dtype), case.grad(dtype)
    expected = results(case.reference, [t.double() for t in inputs], grad=grad.double())
    out, *gradients = results(case.operator, inputs, grad=grad)
    close(out, expected[0], bound)
    for result, true in zip(gradients, expected[1:], strict=True):
        # a single step has only the gradient of the mean; plain torch leaves rounding noise
        assert (result.double() - true).norm() <= bound * true.norm() + 1e-6 * (0 if wide else 1) + 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("view", ["permuted", "sliced", "expanded", "overlapping", "every other feature"])
def test_strides(view: str, dtype: torch.dtype, isa: str) -> None:
    case = AttentionPoolCase(9, 12, 20, 7)
    inputs, grad = case.inputs(dtype), case.grad(dtype)
    rng = torch.Generator().manual_seed(5)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=dtype)

    h = {
        "permuted": randn(9, 20, 12).transpose(1, 2),
        "sliced": randn(11, 15, 25)[1:10, 2:14, 3:23],
        "expanded": randn(1, 12, 20).expand(9, 12, 20),
        "overlapping": randn(20, 20).unfold(0, 12, 1).transpose(1, 2),
        "every other feature": randn(9, 12, 40)[..., ::2],
    }[view]
    assert h.shape == (9, 12, 20)
    assert not h.is_contiguous()
    leaves = [t.detach().clone().requires_grad_() for t in inputs[1:]]
    out = attention_pool(h, *leaves)
    result = [out.detach(), *torch.autograd.grad(out, leaves, grad)]
    expected = results(case.operator, [h.contiguous(), *inputs[1:]], grad=grad)
    for ours, dense in zip(result, [expected[0], *expected[2:]], strict=True):
        same(ours, dense)
    odd = inputs[1].t().contiguous().t(), torch.stack((inputs[2],) * 2, 1)[:, 0], inputs[3].view(1, -1)
    same(attention_pool(h, *odd), out.detach())


def test_gradients_by_finite_differences(isa: str) -> None:
    case = AttentionPoolCase(5, 4, 3, 2)
    inputs = case.inputs()
    leaves = [t.requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(attention_pool, leaves)

    def dropped(*arguments: Tensor) -> Tensor:
        torch.manual_seed(3)
        return attention_pool(*arguments, dropout=0.4, training=True)

    assert torch.autograd.gradcheck(dropped, leaves)


@pytest.mark.parametrize("which", NAMES)
def test_any_one_tensor_may_require_a_gradient(which: str, isa: str) -> None:
    case = AttentionPoolCase(6, 5, 9, 4)
    inputs, grad = case.inputs(), case.grad()
    expected = results(case.operator, inputs, grad=grad)[1 + NAMES.index(which)]
    inputs[NAMES.index(which)].requires_grad_()
    attention_pool(*inputs).backward(grad)
    assert torch.equal(inputs[NAMES.index(which)].grad, expected)


def test_one_step_is_its_own_mean_and_the_weights_have_no_gradient(isa: str) -> None:
    case = AttentionPoolCase(30, 1, 64, 32)
    inputs, grad = case.inputs(torch.float32), case.grad(torch.float32)
    out, of_h, *others = results(case.operator, inputs, grad=grad)
    assert torch.equal(out, inputs[0][:, 0])
    assert torch.equal(of_h[:, 0], grad)
    assert not any(bool(part.any()) for part in others)


@pytest.mark.parametrize(("common", "times"), [(10.0, 1.5), (1000.0, 100.0)])
def test_a_common_part_of_the_steps_costs_less_than_in_torch(common: float, times: float, isa: str) -> None:
    """Scores do not depend on the common part, and Adam would turn the rounding noise into full steps."""
    case = AttentionPoolCase(40, 20, 64, 32)
    inputs, grad = case.inputs(torch.float32), case.grad(torch.float32)
    inputs[0] += common
    inputs[1] /= common
    exact = results(case.reference, [t.double() for t in inputs], grad=grad.double())
    result, theirs = results(case.operator, inputs, grad=grad), results(case.reference, inputs, grad=grad)
    for ours, plain, true in zip(result[2:], theirs[2:], exact[2:], strict=True):
        assert (ours - true).norm() <= (plain - true).norm() / times


def test_large_scores_saturate_as_in_torch(isa: str) -> None:
    case = AttentionPoolCase(12, 9, 16, 8)
    inputs, grad = case.inputs(torch.float32), case.grad(torch.float32)
    inputs[1] *= 100
    inputs[3] *= 100
    exact = results(case.reference, [t.double() for t in inputs], grad=grad.double())
    result, theirs = results(case.operator, inputs, grad=grad), results(case.reference, inputs, grad=grad)
    for ours, plain, true in zip(result, theirs, exact, strict=True):
        assert torch.isfinite(ours).all()
        assert (ours - true).norm() <= 3 * (plain - true).norm() + 1e-6 * true.norm()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_values_spread_as_in_torch_and_stay_in_their_row(value: float, isa: str) -> None:
    case = AttentionPoolCase(11, 6, 19, 9)
    inputs, grad = case.inputs(), case.grad()
    inputs[0][4, 2, 3] = value
    result, expected = attention_pool(*inputs), case.reference(inputs)
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12, equal_nan=True)
    assert torch.isfinite(result[[*range(4), *range(5, 11)]]).all()
    assert not torch.isfinite(result[4]).all()
    of_h = results(case.operator, inputs, grad=grad)[1]
    assert torch.isfinite(of_h[[*range(4), *range(5, 11)]]).all()


# ---------------------------------------------------------------- determinism
@pytest.mark.skipif(not NATIVE, reason="torch's own products do not promise it")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_same_bits_every_time_and_with_any_number_of_threads(dtype: torch.dtype, dropout: float, isa: str) -> None:
    case = AttentionPoolCase(301, 7, 40, 20)
    inputs, grad = case.inputs(dtype), case.grad(dtype)
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 1, 3):
            torch.set_num_threads(threads)
            torch.manual_seed(8)
            runs.append(results(partial(case.operator, dropout=dropout, training=True), inputs, grad=grad))
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


# ---------------------------------------------------------------- dropout
def mask_of(seed: int, batch: int, steps: int, width: int, dropout: float) -> Tensor:
    """The mask of the definition, one element at a time."""
    mask = torch.zeros(batch, steps, width, dtype=torch.float64)
    key = torch.tensor([seed])
    for b in range(batch):
        for t in range(steps):
            for a in range(width):
                word = philox(key, tuple(torch.tensor([n]) for n in (a, t, 2**31, b // 4)))[b % 4]
                mask[b, t, a] = int(word) >= round(dropout * 2**32)
    return mask / (1 - dropout)


def test_dropout_is_that_of_the_definition(isa: str) -> None:
    case = AttentionPoolCase(6, 5, 9, 18)
    inputs, grad = case.inputs(), case.grad()
    seed = torch.tensor([-(2**61) + 12345])
    mask = mask_of(int(seed), 6, 5, 18, 0.3)
    out, attention = torch.ops.qfast.attention_pool(*inputs, 0.3, seed)
    expected = results(partial(case.reference, mask=mask), inputs, grad=grad)
    close(out, expected[0], 1e-12)
    gradients = torch.ops.qfast.attention_pool_backward(grad, *inputs, 0.3, seed, attention, out)
    for result, true in zip(gradients, expected[1:], strict=True):
        close(result, true, 1e-12)


def test_the_mask_depends_neither_on_the_dtype_nor_on_the_rest_of_the_batch(isa: str) -> None:
    case = AttentionPoolCase(23, 5, 9, 18)
    inputs = case.inputs()
    seed = torch.tensor([99])
    whole, narrow = (
        torch.ops.qfast.attention_pool(*(t.to(d) for t in inputs), 0.3, seed)[0] for d in (torch.float64, torch.float32)
    )
    close(narrow, whole, 1e-5)
    part = torch.ops.qfast.attention_pool(inputs[0][:5], *inputs[1:], 0.3, seed)[0]
    assert torch.equal(part, whole[:5])


def test_dropout_follows_the_generator_and_training(isa: str) -> None:
    case = AttentionPoolCase(8, 6, 10, 40)
    inputs = case.inputs()
    torch.manual_seed(4)
    first, second = (attention_pool(*inputs, dropout=0.5, training=True) for _ in range(2))
    torch.manual_seed(4)
    assert torch.equal(attention_pool(*inputs, dropout=0.5, training=True), first)
    assert not torch.equal(first, second)
    assert torch.equal(attention_pool(*inputs, dropout=0.5), attention_pool(*inputs))
    everything = attention_pool(*inputs, dropout=1.0, training=True)
    torch.testing.assert_close(everything, inputs[0].mean(1))  # all scores are equal


# ---------------------------------------------------------------- in torch: compile, export, transforms
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("batch", [0, 5])
def test_opcheck(batch: int, dropout: float) -> None:
    case = AttentionPoolCase(batch, 4, 6, 3)
    inputs = case.inputs()
    seed = torch.tensor([7]) if dropout else None
    torch.library.opcheck(torch.ops.qfast.attention_pool, (*[t.requires_grad_() for t in inputs], dropout, seed))


def test_double_backward_is_refused_by_name() -> None:
    case = AttentionPoolCase(3, 4, 5, 2)
    inputs = case.inputs()
    h = inputs[0].requires_grad_()
    (first,) = torch.autograd.grad(attention_pool(*inputs).sum(), h, create_graph=True)
    with pytest.raises(NotImplementedError, match="attention_pool: double backward is not supported"):
        first.sum().backward()


def test_transforms_and_forward_mode() -> None:
    case = AttentionPoolCase(3, 4, 5, 2)
    inputs = case.inputs()
    h, *others = inputs
    along = torch.randn_like(h)

    def of_h(h: Tensor) -> Tensor:
        return attention_pool(h, *others).square().sum()

    def plain(h: Tensor) -> Tensor:
        return case.reference([h, *others]).square().sum()

    torch.testing.assert_close(torch.func.grad(of_h)(h), torch.func.grad(plain)(h))
    slope = torch.func.jvp(plain, (h,), (along,))[1]
    torch.testing.assert_close(torch.func.jvp(of_h, (h,), (along,))[1], slope)
    torch.testing.assert_close(torch.func.hessian(of_h)(h), torch.func.hessian(plain)(h))
    many = torch.stack((h, along))
    torch.testing.assert_close(torch.vmap(of_h)(many), torch.stack([plain(part) for part in many]))
    with torch.autograd.forward_ad.dual_level():
        dual = of_h(torch.autograd.forward_ad.make_dual(h, along))
        tangent = torch.autograd.forward_ad.unpack_dual(dual).tangent
        torch.testing.assert_close(tangent, slope)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(dynamic: bool) -> None:
    compiled = torch.compile(attention_pool, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for batch in (5, 6):
        case = AttentionPoolCase(batch, 4, 6, 3)
        inputs, grad = case.inputs(), case.grad()
        for a, b in zip(
            results(lambda t: compiled(*t), inputs, grad=grad), results(case.operator, inputs, grad=grad), strict=True
        ):
            torch.testing.assert_close(a, b)


def test_exported() -> None:
    class Pool(torch.nn.Module):
        def forward(self, *arguments: Tensor) -> Tensor:
            return attention_pool(*arguments)

    case = AttentionPoolCase(5, 4, 6, 3)
    inputs = case.inputs()
    program = torch.export.export(Pool(), tuple(inputs))
    torch.testing.assert_close(program.module()(*inputs), attention_pool(*inputs))


def test_autocast_leaves_float32_alone() -> None:
    case = AttentionPoolCase(5, 4, 6, 3)
    inputs = case.inputs(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(attention_pool(*inputs), attention_pool(*inputs).float())
        result = attention_pool(*inputs)
    assert torch.equal(result, attention_pool(*inputs))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precisions_are_computed_in_float32(dtype: torch.dtype) -> None:
    case = AttentionPoolCase(5, 4, 6, 3)
    inputs = case.inputs(dtype)
    expected = attention_pool(*(t.float() for t in inputs)).to(dtype)
    result = attention_pool(*inputs)
    assert result.dtype == dtype
    assert torch.equal(result, expected)


def test_meta_tensors_have_shapes() -> None:
    inputs = [t.to("meta") for t in AttentionPoolCase(5, 4, 6, 3).inputs()]
    assert attention_pool(*inputs).shape == (5, 6)


# ---------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"h": [[1.0]]}, "h: expected a tensor, got list"),
        ({"h": torch.zeros(2, 3, 4, dtype=torch.int64)}, "h: expected dtype float32 or float64, got torch.int64"),
        ({"h": torch.zeros(3, 4)}, r"h: expected shape \[B, T, H\] with T and H of at least 1, got \(3, 4\)"),
        ({"h": torch.zeros(2, 0, 4)}, r"at least 1, got \(2, 0, 4\)"),
        ({"weight": None}, "weight: expected a tensor, got NoneType"),
        ({"weight": torch.zeros(2, 5)}, r"weight: expected shape \[A, 4\], got \(2, 5\)"),
        ({"weight": torch.zeros(2, 4).double()}, r"weight: expected dtype and device of h .*Remedy: h.to\("),
        ({"bias": torch.zeros(3)}, r"bias: expected shape \(2,\), got \(3,\)"),
        ({"score": torch.zeros(2, 2)}, r"score: expected shape \(2,\), got \(2, 2\)"),
        ({"dropout": 1.5}, r"dropout must be a number in \[0, 1\], got 1.5"),
        ({"dropout": True}, r"dropout must be a number in \[0, 1\], got True"),
        ({"dropout": "a"}, r"dropout must be a number in \[0, 1\], got 'a'"),
    ],
)
def test_refusals(change: dict[str, Any], message: str) -> None:
    arguments = {
        "h": torch.zeros(2, 3, 4),
        "weight": torch.zeros(2, 4),
        "bias": torch.zeros(2),
        "score": torch.zeros(2),
    }
    with pytest.raises(ValueError, match=message):
        attention_pool(**{**arguments, **change})


@pytest.mark.skipif(not NATIVE, reason="the checks of the kernels themselves")
def test_the_kernels_reject_out_of_bounds_arguments() -> None:
    case = AttentionPoolCase(3, 4, 6, 2)
    inputs, grad = case.inputs(), case.grad()
    forward, backward = torch.ops.qfast.attention_pool, torch.ops.qfast.attention_pool_backward
    with pytest.raises(ValueError, match=r"attention_pool: weight: expected \[A, 6\]"):
        forward(inputs[0], inputs[1][:, :4], *inputs[2:], 0.0, None)
    with pytest.raises(ValueError, match=r"bias and score: expected \[2\]"):
        forward(*inputs[:3], inputs[3][:1], 0.0, None)
    with pytest.raises(ValueError, match="expected the dtype of h"):
        forward(inputs[0].float(), *inputs[1:], 0.0, None)
    with pytest.raises(ValueError, match="seed: expected one int64"):
        forward(*inputs, 0.5, None)
    out, attention = forward(*inputs, 0.0, None)
    with pytest.raises(ValueError, match=r"attention: expected shape \(3, 4\) .*, got \(2, 4\) and Double"):
        backward(grad, *inputs, 0.0, None, attention[:2], out)
    with pytest.raises(ValueError, match=r"grad: expected shape \(3, 6\) .*, got \(3, 3\) and Double"):
        backward(grad[:, :3], *inputs, 0.0, None, attention, out)


# ---------------------------------------------------------------- memory
@pytest.mark.skipif(not NATIVE or sys.platform != "linux", reason="memory use of the kernels, read from Linux")
def test_nothing_of_the_size_of_the_scores_layer_is_saved() -> None:
    program = (
        "import torch, qfast.ops as ops\n"
        "from qfast.benchmarks.memory import peak_memory\n"
        "h = torch.randn(4000, 50, 8, requires_grad=True)\n"
        "w, b, v = (torch.randn(s, requires_grad=True) for s in ((256, 8), (256,), (256,)))\n"
        "ops.attention_pool(h[:8], w, b, v).sum().backward()\n"
        "with peak_memory() as peak:\n"
        "    ops.attention_pool(h, w, b, v).sum().backward()\n"
        "print(peak.megabytes)\n"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    assert float(ran.stdout) < 60  # MiB; [B, T, A] alone needs 195
