"""Feed-forward block and encoder layer on a GPU: the CUDA kernels compared with the definition in float64.

Sizes cover every form (feed_forward_launch.cuh, encoder_layer_launch.cuh): results in one or two 64s of
columns, blocks too wide for shared memory, hidden in parts of 32 MB, windows in parts of 256 MB, all queries of a head
at once or some, keys in shared memory or not.
"""

from __future__ import annotations

import importlib
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from qfast.ops import encoder_layer, feed_forward
from support.devices import DEVICE, assert_no_synchronization, needs_gpu, needs_kernels
from support.encoder import BlockCase, LayerCase, block_of_masks, layer_of_masks
from support.operator_case import F32, F64, errors_above, relative_error, results
from support.tensors import LAYOUTS

pytestmark = needs_kernels
OPS = torch.ops.qfast
SEED = 12345678901
NAMES = ("feed_forward", "encoder_layer")

# Sizes and dropout.
BLOCKS = [
    (BlockCase((0,), 4, 5, 6), 0.0),
    (BlockCase((1,), 1, 1, 1), 0.0),
    (BlockCase((3,), 7, 33, 5), 0.3),
    (BlockCase((70,), 64, 100, 64), 0.3),
    (BlockCase((131,), 10, 64, 70), 0.2),
    (BlockCase((300,), 16, 300, 8), 0.0),
    (BlockCase((65,), 128, 70, 128), 0.3),
    (BlockCase((13,), 130, 40, 200), 0.4),
    (BlockCase((9,), 512, 256, 512), 0.1),
    (BlockCase((9,), 300, 9, 3), 0.3),
    (BlockCase((140,), 24, 37, 130), 1.0),
    (BlockCase((5000,), 64, 2048, 64), 0.1),
    (BlockCase((20000,), 8, 300, 3), 0.0),
]
LAYERS = [
    (LayerCase(0, 3, 8, 2, 5), 0.0),
    (LayerCase(1, 1, 8, 4, 16), 0.0),
    (LayerCase(2, 5, 8, 2, 33), 0.0),
    (LayerCase(5, 7, 10, 5, 12, layout="time first"), 0.3),
    (LayerCase(6, 20, 16, 2, 40, layout="features first"), 0.2),
    (LayerCase(3, 33, 24, 3, 100, layout="inner"), 0.0),
    (LayerCase(9, 20, 64, 2, 2048), 0.5),
    (LayerCase(3, 61, 36, 4, 20), 0.1),
    (LayerCase(2, 130, 8, 1, 9), 0.1),
    (LayerCase(2, 512, 64, 2, 70), 0.2),
    (LayerCase(1, 3000, 8, 2, 9), 0.2),
    (LayerCase(5, 4, 136, 2, 30), 0.2),
    (LayerCase(2, 9, 512, 8, 64), 0.3),
    (LayerCase(3, 5, 512, 1, 20), 0.0),
    (LayerCase(259, 5, 12, 3, 9), 0.3),
]
BOTH_FORMS = [(replace(case, last=last), dropout) for case, dropout in LAYERS for last in (False, True)]


def named(parts: object) -> str:
    return parts.name if isinstance(parts, (BlockCase, LayerCase)) else str(parts)


def moved(tensor: Tensor, device: str) -> Tensor:
    """A copy on the device with the same strides."""
    whole = tensor.new_empty(0).set_(tensor.untyped_storage()).to(device)
    return whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def given_to(case: BlockCase | LayerCase, dtype: torch.dtype, device: str) -> list[Tensor]:
    """x and the parameters."""
    inputs = case.inputs(dtype)
    return [moved(part, device) for part in inputs]


def seed_for(dropout: float, device: str, seed: int = SEED) -> Tensor | None:
    return torch.tensor([seed], device=device) if dropout else None


def gradient_like(out: Tensor) -> Tensor:
    """The gradient that `results` uses."""
    return torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out)


def forward_and_backward(
    case: BlockCase | LayerCase,
    tensors: list[Tensor],
    dropout: float,
    seed: Tensor | None,
    grad: Tensor | None = None,
) -> list[Tensor]:
    """Result and gradients of the raw operators; by default the gradient is drawn on the host."""
    if isinstance(case, BlockCase):
        result = OPS.feed_forward(*tensors, dropout, seed)
        entering = gradient_like(result) if grad is None else grad
        return [result, *OPS.feed_forward_backward(entering, *tensors[:4], dropout, seed, True)]
    x, *weights = tensors
    result, *saved = OPS.encoder_layer(x, weights, case.heads, case.eps, dropout, seed, case.last, True)
    entering = gradient_like(result) if grad is None else grad
    rest = (x, weights, case.heads, dropout, seed, case.last, *saved, True)
    of_x, of_weights = OPS.encoder_layer_backward(entering, *rest)
    return [result, of_x, *of_weights]


def on_gpu(case: BlockCase | LayerCase, dtype: torch.dtype, dropout: float = 0.0, seed: int = SEED) -> list[Tensor]:
    return forward_and_backward(case, given_to(case, dtype, DEVICE), dropout, seed_for(dropout, DEVICE, seed))


def by_definition(
    case: BlockCase | LayerCase, dtype: torch.dtype, dropout: float = 0.0, seed: int = SEED
) -> list[Tensor]:
    """The definition on the CPU, with gradients by autograd."""
    if isinstance(case, BlockCase):
        call = partial(block_of_masks, dropout=dropout, seed=seed) if dropout else case.reference
    else:
        call = partial(layer_of_masks, case, dropout=dropout, seed=seed) if dropout else case.reference
    return results(call, given_to(case, dtype, "cpu"))


def to_cpu(result: list[Tensor]) -> list[Tensor]:
    return [part.cpu() for part in result]


@pytest.mark.parametrize("name", NAMES)
def test_self_test(name: str) -> None:
    importlib.import_module(f"qfast.ops.{name}").self_test(torch.device(DEVICE))


@pytest.mark.parametrize("name", NAMES)
def test_the_cuda_kernels_are_registered(name: str) -> None:
    for which in (name, f"{name}_backward"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"qfast::{which}", DEVICE.upper())


# ---------------------------------------------------------------- accuracy
@pytest.mark.parametrize(("case", "dropout"), [*BLOCKS, *BOTH_FORMS], ids=named)
def test_float64(case: BlockCase | LayerCase, dropout: float) -> None:
    assert errors_above(to_cpu(on_gpu(case, F64, dropout)), by_definition(case, F64, dropout), 1e-12) == []


@pytest.mark.parametrize(("case", "dropout"), [*BLOCKS, *BOTH_FORMS], ids=named)
def test_float32_compared_with_plain_torch(case: BlockCase | LayerCase, dropout: float) -> None:
    """The error is at most five times that of plain torch in float32, or a few roundings; always below 2e-5."""
    exact, plain = (by_definition(case, dtype, dropout) for dtype in (F64, F32))
    result = to_cpu(on_gpu(case, F32, dropout))
    assert errors_above(result, exact, 2e-5) == []
    for number, (ours, theirs, true) in enumerate(zip(result, plain, exact, strict=True)):
        error = relative_error(ours, true)
        assert error <= max(5 * relative_error(theirs, true), 2e-6), (number, error)


@pytest.mark.parametrize("last", [False, True])
def test_the_public_function_with_autograd(last: bool) -> None:
    case = LayerCase(11, 9, 24, 3, 50, last)
    there = [part.requires_grad_() for part in given_to(case, F64, DEVICE)]
    ours = encoder_layer(there[0], there[1:], heads=3, last_step=last)
    result = [ours.detach(), *torch.autograd.grad(ours, there, gradient_like(ours.detach()))]
    assert errors_above(to_cpu(result), by_definition(case, F64), 1e-12) == []


@settings(max_examples=60, deadline=None)
@given(
    st.builds(
        lambda rows, *sizes: BlockCase((rows,), *sizes),
        st.integers(0, 300),
        st.integers(1, 140),
        st.integers(1, 140),
        st.integers(1, 140),
    ),
    st.sampled_from([0.0, 0.3, 1.0]),
)
def test_any_block(case: BlockCase, dropout: float) -> None:
    assert errors_above(to_cpu(on_gpu(case, F64, dropout)), by_definition(case, F64, dropout), 1e-12) == []


@settings(max_examples=60, deadline=None)
@given(
    st.builds(
        lambda batch, steps, heads, width, *rest: LayerCase(batch, steps, heads * width, heads, *rest),
        st.integers(0, 13),
        st.integers(1, 70),
        st.integers(1, 6),
        st.integers(2, 20),
        st.integers(1, 70),
        st.booleans(),
        st.sampled_from(LAYOUTS),
    ),
    st.sampled_from([0.0, 0.3, 1.0]),
)
@example(LayerCase(0, 3, 4, 2, 5), 0.3)
def test_any_layer_in_any_layout(case: LayerCase, dropout: float) -> None:
    result, exact = to_cpu(on_gpu(case, F64, dropout)), by_definition(case, F64, dropout)
    for ours, true in zip(result, exact, strict=True):  # few features: large scales of the norm
        torch.testing.assert_close(ours, true, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("last", [False, True])
def test_layouts_do_not_change_a_bit(layout: str, last: bool) -> None:
    case = LayerCase(20, 9, 24, 3, 50, last, layout)
    x, *weights = given_to(case, F32, DEVICE)
    strided, easy = (forward_and_backward(case, [inputs, *weights], 0.0, None) for inputs in (x, x.contiguous()))
    assert all(torch.equal(a, b) for a, b in zip(strided, easy, strict=True))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_last_step_is_that_of_the_full_form(dropout: float) -> None:
    x, *weights = given_to(LayerCase(50, 21, 64, 2, 300), F64, DEVICE)
    inputs = (x, weights, 2, 1e-5, dropout, seed_for(dropout, DEVICE))
    full, last = OPS.encoder_layer(*inputs, False, False)[0], OPS.encoder_layer(*inputs, True, False)[0]
    torch.testing.assert_close(last, full[:, -1], rtol=1e-12, atol=1e-12)


def test_only_requested_gradients_are_computed() -> None:
    x, *weights = given_to(LayerCase(7, 6, 8, 2, 20), F64, DEVICE)
    inputs = x, weights, 2
    saved, none = (OPS.encoder_layer(*inputs, 1e-5, 0.0, None, False, keep) for keep in (True, False))
    assert torch.equal(saved[0], none[0])
    assert [tuple(part.shape) for part in none[1:]] == [(2, 0, 6, 8), (2, 0, 6)]
    rest = gradient_like(saved[0]), *inputs, 0.0, None, False, *saved[1:]
    whole, part = (OPS.encoder_layer_backward(*rest, wanted) for wanted in (True, False))
    assert tuple(part[0].shape) == (0, 6, 8)
    assert all(torch.equal(a, b) for a, b in zip(whole[1], part[1], strict=True))
    tensors = given_to(BlockCase((9,), 4, 20, 3), F64, DEVICE)
    grad = gradient_like(OPS.feed_forward(*tensors, 0.0, None))
    whole, part = (OPS.feed_forward_backward(grad, *tensors[:4], 0.0, None, wanted) for wanted in (True, False))
    assert tuple(part[0].shape) == (0, 4)
    assert all(torch.equal(a, b) for a, b in zip(whole[1:], part[1:], strict=True))


def test_a_batch_in_parts() -> None:
    """The windows are processed in two parts, and the hidden values of each in several."""
    case = LayerCase(2100, 20, 64, 4, 600)
    assert errors_above(to_cpu(on_gpu(case, F64, 0.2)), by_definition(case, F64, 0.2), 1e-12) == []


def test_attention_that_is_all_on_one_step() -> None:
    """The weights of queries, keys and values are multiplied by 100."""
    case = LayerCase(9, 12, 16, 2, 20)
    exact = results(case.reference, case.inputs(F64, 100.0))
    for dtype, limit in ((F32, 1e-2), (F64, 1e-10)):
        result = forward_and_backward(case, [part.to(DEVICE) for part in case.inputs(dtype, 100.0)], 0.0, None)
        assert all(part.isfinite().all() for part in result)
        assert errors_above(to_cpu(result), exact, limit) == []


# ---------------------------------------------------------------- dropout
@pytest.mark.parametrize("seed", [0, 1, -1, 2**62 + 12345])
@pytest.mark.parametrize("dropout", [1e-9, 0.5, 1.0])
def test_the_masks_are_those_of_the_definition(seed: int, dropout: float) -> None:
    cases: list[BlockCase | LayerCase] = [BlockCase((99,), 20, 70, 30)]
    cases += [LayerCase(*sizes, last) for sizes in ((27, 6, 20, 4, 40), (6, 19, 16, 2, 130)) for last in (False, True)]
    for case in cases:
        exact = by_definition(case, F64, dropout, seed)
        for ours, true in zip(to_cpu(on_gpu(case, F64, dropout, seed)), exact, strict=True):
            torch.testing.assert_close(ours, true, rtol=1e-10, atol=1e-11)


def test_manual_seed_makes_it_repeat() -> None:
    x, *weights = given_to(LayerCase(40, 9, 32, 2, 64), F32, DEVICE)

    def once(seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        return [
            encoder_layer(x, weights, heads=2, dropout=0.3, training=True),
            feed_forward(x, *weights[4:8], dropout=0.3, training=True),
        ]

    assert all(torch.equal(a, b) for a, b in zip(once(5), once(5), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(once(5), once(6), strict=True))


# ---------------------------------------------------------------- gradients, schemas, non-finite values
def test_gradients_by_finite_differences() -> None:
    leaves = [part.requires_grad_() for part in given_to(BlockCase((5,), 4, 9, 3), F64, DEVICE)]
    assert torch.autograd.gradcheck(feed_forward, leaves)
    for last in (False, True):
        leaves = [part.requires_grad_() for part in given_to(LayerCase(3, 5, 4, 2, 6), F64, DEVICE)]
        assert torch.autograd.gradcheck(lambda x, *w, last=last: encoder_layer(x, w, heads=2, last_step=last), leaves)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_opcheck(dropout: float) -> None:
    seed = seed_for(dropout, DEVICE)
    for rows in (0, 5):
        tensors = given_to(BlockCase((rows,), 4, 9, 3), F64, DEVICE)
        rest = dropout, seed
        torch.library.opcheck(OPS.feed_forward, (*(part.clone().requires_grad_() for part in tensors), *rest))
        grad = gradient_like(OPS.feed_forward(*tensors, *rest))
        for wanted in (False, True):
            torch.library.opcheck(OPS.feed_forward_backward, (grad, *tensors[:4], *rest, wanted))
    for case in (
        LayerCase(0, 3, 4, 2, 5),
        LayerCase(3, 5, 4, 2, 6),
        LayerCase(3, 5, 4, 2, 6, True),
    ):
        x, *weights = given_to(case, F64, DEVICE)
        forward = case.heads, case.eps, dropout, seed, case.last
        torch.library.opcheck(OPS.encoder_layer, (x, weights, *forward, False))
        leaves = [part.clone().requires_grad_() for part in weights]
        torch.library.opcheck(OPS.encoder_layer, (x.clone().requires_grad_(), leaves, *forward, True))
        out, *saved = OPS.encoder_layer(x, weights, *forward, True)
        for wanted in (False, True):
            rest = x, weights, case.heads, dropout, seed, case.last, *saved, wanted
            torch.library.opcheck(OPS.encoder_layer_backward, (gradient_like(out), *rest))


@pytest.mark.parametrize("hidden", [50, 3000])
def test_autocast_casts_nothing_inside(hidden: int) -> None:
    for case in (LayerCase(9, 6, 24, 3, hidden), BlockCase((70,), 140, hidden, 140)):
        plain = on_gpu(case, F32)
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            result = on_gpu(case, F32)
        assert all(torch.equal(a, b) for a, b in zip(result, plain, strict=True))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("last", [False, True])
def test_non_finite_values_stay_in_their_window(value: float, last: bool) -> None:
    case, seed = LayerCase(30, 9, 24, 3, 70, last), torch.tensor([SEED], device=DEVICE)
    tensors = given_to(case, F64, DEVICE)
    clean = forward_and_backward(case, tensors, 0.2, seed)
    tensors[0][13, 2, 4] = value
    result = forward_and_backward(case, tensors, 0.2, seed)
    others = [i for i in range(30) if i != 13]
    for number in (0, 1):  # the result, the gradient of x
        assert torch.equal(result[number][others], clean[number][others])
    assert result[0][13].isnan().all()


@pytest.mark.parametrize("width", [24, 140])
def test_non_finite_values_stay_in_their_row(width: int) -> None:
    case = BlockCase((70,), width, 50, 9)
    tensors = given_to(case, F64, DEVICE)
    clean = forward_and_backward(case, tensors, 0.0, None)
    tensors[0][13, 2] = torch.nan
    result = forward_and_backward(case, tensors, 0.0, None)
    others = [i for i in range(70) if i != 13]
    for number in (0, 1):
        assert torch.equal(result[number][others], clean[number][others])
    assert result[0][13].isnan().all()


# ---------------------------------------------------------------- repeats, graphs, memory, size
def test_the_same_bits_come_again() -> None:
    for case in (
        LayerCase(500, 20, 64, 2, 512),
        LayerCase(500, 20, 64, 2, 512, True),
        BlockCase((9000,), 64, 512, 64),
    ):
        first = on_gpu(case, F32, 0.2)
        for _ in range(3):
            assert all(torch.equal(a, b) for a, b in zip(on_gpu(case, F32, 0.2), first, strict=True))


GRAPHED = [
    LayerCase(70, 9, 24, 3, 64),
    LayerCase(70, 9, 24, 3, 64, True),
    BlockCase((70,), 24, 64, 20),
]


@needs_gpu
@pytest.mark.parametrize("case", GRAPHED, ids=named)
def test_no_synchronization_with_the_host(case: BlockCase | LayerCase) -> None:
    tensors, seed = given_to(case, F32, DEVICE), torch.tensor([3], device=DEVICE)
    grad = gradient_like(forward_and_backward(case, tensors, 0.2, seed)[0])
    assert_no_synchronization(lambda: forward_and_backward(case, tensors, 0.2, seed, grad))


@needs_gpu
@pytest.mark.parametrize("case", GRAPHED, ids=named)
def test_a_cuda_graph_captures_it(case: BlockCase | LayerCase) -> None:
    """The graph is replayed on new values, including a new seed, in the same memory."""
    tensors, seed = given_to(case, F32, DEVICE), torch.tensor([3], device=DEVICE)
    grad = gradient_like(forward_and_backward(case, tensors, 0.2, seed)[0])
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        forward_and_backward(case, tensors, 0.2, seed, grad)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = forward_and_backward(case, tensors, 0.2, seed, grad)
    for number in (3, 4):
        seed.fill_(number)
        tensors[0].mul_(0.5)
        graph.replay()
        torch.cuda.synchronize()
        for a, b in zip(result, forward_and_backward(case, tensors, 0.2, seed, grad), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)  # cuBLAS uses other workspaces during capture


def peak_bytes(hidden: int) -> int:
    """Peak memory of a forward and a backward pass, without the memory before, the weights and their gradients."""
    case = LayerCase(1000, 20, 64, 2, hidden)
    tensors = given_to(case, F32, DEVICE)
    forward_and_backward(case, tensors, 0.0, None)  # cuBLAS' workspace
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    forward_and_backward(case, tensors, 0.0, None)
    of_weights = sum(part.numel() * part.element_size() for part in tensors[1:])
    return torch.cuda.max_memory_allocated() - before - 5 * of_weights  # packed weights, gradients, gradients of a part


@needs_gpu
def test_memory_does_not_grow_with_the_hidden() -> None:
    assert peak_bytes(8192) < 1.1 * peak_bytes(1024)


@needs_gpu
@pytest.mark.slow
def test_more_than_two_to_the_31_elements() -> None:
    if torch.cuda.get_device_properties(0).total_memory < 64 << 30:
        pytest.skip("needs 64 GB on the GPU")
    _, *weights = given_to(LayerCase(1, 1, 64, 2, 64), F32, DEVICE)
    x = torch.randn(1_150_000, 30, 64, generator=torch.Generator(DEVICE).manual_seed(0), device=DEVICE)
    assert x.numel() > 2**31
    whole, few = (OPS.encoder_layer(part, weights, 2, 1e-5, 0.0, None, False, False)[0] for part in (x, x[-5:]))
    torch.testing.assert_close(whole[-5:], few, rtol=1e-4, atol=1e-4)
    del whole
    rows = x.flatten(0, 1)
    whole, few = (OPS.feed_forward(part, *weights[4:8], 0.0, None) for part in (rows, rows[-5:]))
    torch.testing.assert_close(whole[-5:], few, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- refusals
def test_refusals_of_the_kernels() -> None:
    x, *weights = given_to(LayerCase(3, 5, 4, 2, 6), F32, DEVICE)
    rest = 2, 1e-5, 0.0, None, False, False
    with pytest.raises(ValueError, match="seed: expected one int64 on the device of x"):
        OPS.encoder_layer(x, weights, 2, 1e-5, 0.5, None, False, False)
    with pytest.raises(ValueError, match=r"dropout: expected 0 to 1, got 1\.5"):
        OPS.encoder_layer(x, weights, 2, 1e-5, 1.5, None, False, False)
    with pytest.raises(ValueError, match="heads: expected a divisor of D = 4, got 3"):
        OPS.encoder_layer(x, weights, 3, *rest[1:])
    with pytest.raises(ValueError, match=r"weights: expected 12.*got 11"):
        OPS.encoder_layer(x, weights[1:], *rest)
    with pytest.raises(ValueError, match="x: expected at least one step"):
        OPS.encoder_layer(x[:, :0], weights, *rest)
    saved = OPS.encoder_layer(x, weights, *rest)[1:]
    with pytest.raises(ValueError, match=r"normalised: expected shape \(2, 3, 5, 4\), got \(2, 0, 5, 4\)"):
        OPS.encoder_layer_backward(x, x, weights, 2, 0.0, None, False, *saved, True)
    tensors = given_to(BlockCase((5,), 4, 9, 3), F32, DEVICE)
    with pytest.raises(ValueError, match=r"bias_in: expected shape \(9\), got \(8,\)"):
        OPS.feed_forward(*tensors[:2], tensors[2][1:], *tensors[3:], 0.0, None)
    with pytest.raises(ValueError, match=r"grad: expected shape \(5, 3\), got \(5, 4\)"):
        OPS.feed_forward_backward(tensors[0], *tensors[:4], 0.0, None, True)


@needs_gpu
def test_tensors_of_another_device_are_refused() -> None:
    x, *weights = given_to(LayerCase(3, 5, 4, 2, 6), F32, DEVICE)
    with pytest.raises(ValueError, match="in_proj_weight: expected the device of x"):
        OPS.encoder_layer(x, [weights[0].cpu(), *weights[1:]], 2, 1e-5, 0.0, None, False, False)
    with pytest.raises(ValueError, match="seed: expected the device of x"):
        OPS.feed_forward(x[:, 0], *weights[4:8], 0.5, torch.tensor([3]))
