"""Feed-forward block and encoder layer on a GPU: the CUDA kernels beside their definition in float64.

Sizes go through every form (csrc/feed_forward_launch.cuh, csrc/encoder_launch.cuh): results in one or two 64s of
columns, blocks too wide for shared memory, hidden in parts of 32 MB, windows in parts of 256 MB, all queries of a head
at once or some, keys in shared memory or not.
"""

from __future__ import annotations

import importlib

import pytest
import torch
from encoder_definition import (
    EPS,
    F64,
    SEED,
    Block,
    Layer,
    block_inputs,
    by_definition,
    define_layer,
    layer_inputs,
    seed_for,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from qfast import _backend
from qfast.ops import encoder_layer, feed_forward

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no usable GPU"),
    pytest.mark.skipif(
        not _backend.status()["cuda"]["loaded"], reason=f"qfast._cuda: {_backend.status()['cuda']['reason']}"
    ),
]
DEVICE = "cuda"
F32 = torch.float32
OPS = torch.ops.qfast
NAMES = ("feed_forward", "encoder_layer")

BLOCKS = [
    Block(0, 4, 5, 6),
    Block(1, 1, 1, 1),
    Block(3, 7, 33, 5, 0.3),
    Block(70, 64, 100, 64, 0.3),
    Block(131, 10, 64, 70, 0.2),
    Block(300, 16, 300, 8),
    Block(65, 128, 70, 128, 0.3),
    Block(13, 130, 40, 200, 0.4),
    Block(9, 512, 256, 512, 0.1),
    Block(9, 300, 9, 3, 0.3),
    Block(140, 24, 37, 130, 1.0),
    Block(5000, 64, 2048, 64, 0.1),
    Block(20000, 8, 300, 3),
]
LAYERS = [
    Layer(0, 3, 8, 2, 5),
    Layer(1, 1, 8, 4, 16),
    Layer(2, 5, 8, 2, 33),
    Layer(5, 7, 10, 5, 12, 0.3, "steps first"),
    Layer(6, 20, 16, 2, 40, 0.2, "features first"),
    Layer(3, 33, 24, 3, 100, 0.0, "part of a larger tensor"),
    Layer(9, 20, 64, 2, 2048, 0.5),
    Layer(3, 61, 36, 4, 20, 0.1),
    Layer(2, 130, 8, 1, 9, 0.1),
    Layer(2, 512, 64, 2, 70, 0.2),
    Layer(1, 3000, 8, 2, 9, 0.2),
    Layer(5, 4, 136, 2, 30, 0.2),
    Layer(2, 9, 512, 8, 64, 0.3),
    Layer(3, 5, 512, 1, 20),
    Layer(259, 5, 12, 3, 9, 0.3),
]
BOTH_FORMS = [case._replace(last=last) for case in LAYERS for last in (False, True)]
LAYOUTS = ["plain", "steps first", "features first", "part of a larger tensor"]


def block_both_ways(tensors: list[Tensor], grad: Tensor, dropout: float, seed: Tensor | None) -> list[Tensor]:
    """Result and five gradients, by the raw operators."""
    found = OPS.feed_forward(*tensors, dropout, seed)
    return [found, *OPS.feed_forward_backward(grad, *tensors[:4], dropout, seed, True)]


def layer_both_ways(tensors: list[Tensor], grad: Tensor, case: Layer, seed: Tensor | None) -> list[Tensor]:
    """Result and thirteen gradients, by the raw operators."""
    x, *weights = tensors
    found, *kept = OPS.encoder_layer(x, weights, case.heads, EPS, case.dropout, seed, case.last, True)
    rest = (x, weights, case.heads, case.dropout, seed, case.last, *kept, True)
    of_x, of_weights = OPS.encoder_layer_backward(grad, *rest)
    return [found, of_x, *of_weights]


def on_gpu(case: Block | Layer, dtype: torch.dtype, seed: int = SEED) -> list[Tensor]:
    given = seed_for(case.dropout, DEVICE, seed)
    if isinstance(case, Block):
        return block_both_ways(*block_inputs(case, dtype, DEVICE), case.dropout, given)
    return layer_both_ways(*layer_inputs(case, dtype, DEVICE), case, given)


def relative(found: Tensor, exact: Tensor) -> float:
    assert found.shape == exact.shape
    error, size = float((found.cpu().double() - exact).norm()), float(exact.norm())
    return error / size if size > 1e-9 else error


@pytest.mark.parametrize("name", NAMES)
def test_self_test(name: str) -> None:
    importlib.import_module(f"qfast.ops.{name}").self_test(torch.device(DEVICE))


@pytest.mark.parametrize("name", NAMES)
def test_the_kernels_serve_and_not_the_twins(name: str) -> None:
    for which in (name, f"{name}_backward"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"qfast::{which}", "CUDA")


# ---------------------------------------------------------------- accuracy
@pytest.mark.parametrize("case", [*BLOCKS, *BOTH_FORMS], ids=str)
def test_float64(case: Block | Layer) -> None:
    found, exact = on_gpu(case, F64), by_definition(case, F64)
    assert [error for error in map(relative, found, exact) if not error <= 1e-12] == []


@pytest.mark.parametrize("case", [*BLOCKS, *BOTH_FORMS], ids=str)
def test_float32_beside_plain_torch(case: Block | Layer) -> None:
    """Within five times what plain torch is off from float64 on the CPU, or a few roundings, and 2e-5 always."""
    found, plain, exact = on_gpu(case, F32), by_definition(case, F32), by_definition(case, F64)
    for number, (ours, theirs, true) in enumerate(zip(found, plain, exact, strict=True)):
        error = relative(ours, true)
        assert error <= 2e-5, (number, error)
        assert error <= max(5 * relative(theirs, true), 2e-6), (number, error)


@pytest.mark.parametrize("last", [False, True])
def test_beside_torchs_own_layer(last: bool) -> None:
    """The public function with autograd, against torch.nn on the CPU."""
    torch.manual_seed(0)
    module = nn.TransformerEncoderLayer(24, 3, 50, 0.0, batch_first=True).double()
    x = torch.randn(11, 9, 24, dtype=F64)
    leaves = [x.clone().requires_grad_(), *module.parameters()]
    exact = module(leaves[0])
    exact = exact[:, -1] if last else exact
    grad = torch.randn(exact.shape, dtype=F64)
    expected = [exact, *torch.autograd.grad(exact, leaves, grad)]
    there = [leaf.detach().to(DEVICE).requires_grad_() for leaf in leaves]
    ours = encoder_layer(there[0], there[1:], heads=3, last_step=last)
    found = [ours.detach(), *torch.autograd.grad(ours, there, grad.to(DEVICE))]
    assert [error for error in map(relative, found, [part.detach() for part in expected]) if not error <= 1e-12] == []


@settings(max_examples=60, deadline=None)
@given(
    st.builds(
        Block, st.integers(0, 300), st.integers(1, 140), st.integers(1, 140), st.integers(1, 140),
        st.sampled_from([0.0, 0.3, 1.0]),
    )
)  # fmt: skip
def test_any_block(case: Block) -> None:
    for ours, true in zip(on_gpu(case, F64), by_definition(case, F64), strict=True):
        torch.testing.assert_close(ours.cpu(), true, rtol=1e-10, atol=1e-11)


@settings(max_examples=60, deadline=None)
@given(
    st.builds(
        lambda batch, steps, heads, width, *rest: Layer(batch, steps, heads * width, heads, *rest),
        st.integers(0, 13), st.integers(1, 70), st.integers(1, 6), st.integers(1, 20), st.integers(1, 70),
        st.sampled_from([0.0, 0.3, 1.0]), st.sampled_from(LAYOUTS), st.booleans(),
    )
)  # fmt: skip
def test_any_layer_in_any_layout(case: Layer) -> None:
    if case.width == 1:  # a norm over one feature gives zeros
        case = case._replace(width=2)
    for ours, true in zip(on_gpu(case, F64), by_definition(case, F64), strict=True):
        torch.testing.assert_close(ours.cpu(), true, rtol=1e-8, atol=1e-8)  # few features: large scales of the norm


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("last", [False, True])
def test_layouts_do_not_change_a_bit(layout: str, last: bool) -> None:
    case = Layer(20, 9, 24, 3, 50, 0.0, layout, last)
    (x, *weights), grad = layer_inputs(case, F32, DEVICE)
    moved = layer_both_ways([x, *weights], grad, case, None)
    easy = layer_both_ways([x.contiguous(), *weights], grad, case, None)
    assert all(torch.equal(a, b) for a, b in zip(moved, easy, strict=True))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_last_step_is_that_of_the_full_form(dropout: float) -> None:
    case = Layer(50, 21, 64, 2, 300, dropout)
    (x, *weights), _ = layer_inputs(case, F64, DEVICE)
    given = (x, weights, case.heads, EPS, dropout, seed_for(dropout, DEVICE))
    full, last = OPS.encoder_layer(*given, False, False)[0], OPS.encoder_layer(*given, True, False)[0]
    torch.testing.assert_close(last, full[:, -1], rtol=1e-12, atol=1e-12)


def test_only_what_is_asked_is_made() -> None:
    case = Layer(7, 6, 8, 2, 20)
    (x, *weights), grad = layer_inputs(case, F64, DEVICE)
    given = x, weights, case.heads
    kept, none = (OPS.encoder_layer(*given, EPS, 0.0, None, False, keep) for keep in (True, False))
    assert torch.equal(kept[0], none[0])
    assert [tuple(part.shape) for part in none[1:]] == [(2, 0, 6, 8), (2, 0, 6)]
    whole, part = (
        OPS.encoder_layer_backward(grad, *given, 0.0, None, False, *kept[1:], wanted) for wanted in (True, False)
    )
    assert tuple(part[0].shape) == (0, 6, 8)
    assert all(torch.equal(a, b) for a, b in zip(whole[1], part[1], strict=True))
    tensors, grad = block_inputs(Block(9, 4, 20, 3), F64, DEVICE)
    whole, part = (OPS.feed_forward_backward(grad, *tensors[:4], 0.0, None, wanted) for wanted in (True, False))
    assert tuple(part[0].shape) == (0, 4)
    assert all(torch.equal(a, b) for a, b in zip(whole[1:], part[1:], strict=True))


def test_a_batch_in_parts() -> None:
    """Windows in two parts, and the hidden of each in several."""
    case = Layer(2100, 20, 64, 4, 600, 0.2)
    found, exact = on_gpu(case, F64), by_definition(case, F64)
    assert [error for error in map(relative, found, exact) if not error <= 1e-12] == []


def test_attention_that_is_all_on_one_step() -> None:
    """Weights of the projection times 100."""
    case = Layer(9, 12, 16, 2, 20)
    (x, in_weight, *others), grad = layer_inputs(case, F64, "cpu")
    tensors = [x, in_weight * 100, *others]
    leaves = [part.clone().requires_grad_() for part in tensors]
    out = define_layer(leaves[0], leaves[1:], case.heads, 0.0, None)
    exact = [out.detach(), *torch.autograd.grad(out, leaves, grad)]
    for dtype, limit in ((F32, 1e-2), (F64, 1e-10)):
        found = layer_both_ways([part.to(DEVICE, dtype) for part in tensors], grad.to(DEVICE, dtype), case, None)
        assert all(part.isfinite().all() for part in found)
        assert [error for error in map(relative, found, exact) if not error <= limit] == []


# ---------------------------------------------------------------- dropout
@pytest.mark.parametrize("seed", [0, 1, -1, 2**62 + 12345])
@pytest.mark.parametrize("dropout", [1e-9, 0.5, 1.0])
@pytest.mark.parametrize("last", [False, True])
def test_the_masks_are_those_of_the_definition(seed: int, dropout: float, last: bool) -> None:
    for case in (Layer(27, 6, 20, 4, 40, dropout, "plain", last), Layer(6, 19, 16, 2, 130, dropout, "plain", last)):
        for ours, true in zip(on_gpu(case, F64, seed), by_definition(case, F64, seed), strict=True):
            torch.testing.assert_close(ours.cpu(), true, rtol=1e-10, atol=1e-11)
    block = Block(99, 20, 70, 30, dropout)
    for ours, true in zip(on_gpu(block, F64, seed), by_definition(block, F64, seed), strict=True):
        torch.testing.assert_close(ours.cpu(), true, rtol=1e-10, atol=1e-11)


def test_manual_seed_makes_it_repeat() -> None:
    (x, *weights), _ = layer_inputs(Layer(40, 9, 32, 2, 64), F32, DEVICE)

    def once(seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        return [
            encoder_layer(x, weights, heads=2, dropout=0.3, training=True),
            feed_forward(x, *weights[4:8], dropout=0.3, training=True),
        ]

    assert all(torch.equal(a, b) for a, b in zip(once(5), once(5), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(once(5), once(6), strict=True))


# ---------------------------------------------------------------- gradients, schemas, what is not finite
def test_gradients_by_finite_differences() -> None:
    tensors, _ = block_inputs(Block(5, 4, 9, 3), F64, DEVICE)
    assert torch.autograd.gradcheck(feed_forward, [part.requires_grad_() for part in tensors])
    for last in (False, True):
        tensors, _ = layer_inputs(Layer(3, 5, 4, 2, 6), F64, DEVICE)
        leaves = [part.requires_grad_() for part in tensors]
        assert torch.autograd.gradcheck(lambda x, *w, last=last: encoder_layer(x, w, heads=2, last_step=last), leaves)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_opcheck(dropout: float) -> None:
    for rows in (0, 5):
        tensors, grad = block_inputs(Block(rows, 4, 9, 3), F64, DEVICE)
        rest = dropout, seed_for(dropout, DEVICE)
        torch.library.opcheck(OPS.feed_forward, (*(part.clone().requires_grad_() for part in tensors), *rest))
        for wanted in (False, True):
            torch.library.opcheck(OPS.feed_forward_backward, (grad, *tensors[:4], *rest, wanted))
    for case in (
        Layer(0, 3, 4, 2, 5, dropout),
        Layer(3, 5, 4, 2, 6, dropout),
        Layer(3, 5, 4, 2, 6, dropout, last=True),
    ):
        (x, *weights), grad = layer_inputs(case, F64, DEVICE)
        seed = seed_for(dropout, DEVICE)
        forward = case.heads, EPS, dropout, seed, case.last
        torch.library.opcheck(OPS.encoder_layer, (x, weights, *forward, False))
        leaves = [part.clone().requires_grad_() for part in weights]
        torch.library.opcheck(OPS.encoder_layer, (x.clone().requires_grad_(), leaves, *forward, True))
        kept = OPS.encoder_layer(x, weights, *forward, True)[1:]
        for wanted in (False, True):
            rest = x, weights, case.heads, dropout, seed, case.last, *kept, wanted
            torch.library.opcheck(OPS.encoder_layer_backward, (grad, *rest))


@pytest.mark.parametrize("hidden", [50, 3000])
def test_autocast_casts_nothing_inside(hidden: int) -> None:
    case, block = Layer(9, 6, 24, 3, hidden), Block(70, 140, hidden, 140)
    plain = on_gpu(case, F32) + on_gpu(block, F32)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        found = on_gpu(case, F32) + on_gpu(block, F32)
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("last", [False, True])
def test_what_is_not_finite_stays_in_its_window(value: float, last: bool) -> None:
    case = Layer(30, 9, 24, 3, 70, 0.2, "plain", last)
    tensors, grad = layer_inputs(case, F64, DEVICE)
    seed = seed_for(case.dropout, DEVICE)
    clean = layer_both_ways(tensors, grad, case, seed)
    tensors[0][13, 2, 4] = value
    found = layer_both_ways(tensors, grad, case, seed)
    others = [i for i in range(30) if i != 13]
    for number in (0, 1):  # the result, the gradient of x
        assert torch.equal(found[number][others], clean[number][others])
    assert found[0][13].isnan().all()


@pytest.mark.parametrize("width", [24, 140])
def test_what_is_not_finite_stays_in_its_row(width: int) -> None:
    tensors, grad = block_inputs(Block(70, width, 50, 9), F64, DEVICE)
    clean = block_both_ways(tensors, grad, 0.0, None)
    tensors[0][13, 2] = torch.nan
    found = block_both_ways(tensors, grad, 0.0, None)
    others = [i for i in range(70) if i != 13]
    for number in (0, 1):
        assert torch.equal(found[number][others], clean[number][others])
    assert found[0][13].isnan().all()


# ---------------------------------------------------------------- repeats, graphs, memory, size
def test_the_same_bits_come_again() -> None:
    cases = Layer(500, 20, 64, 2, 512, 0.2), Layer(500, 20, 64, 2, 512, 0.2, last=True), Block(9000, 64, 512, 64, 0.2)
    for case in cases:
        first = on_gpu(case, F32)
        for _ in range(3):
            assert all(torch.equal(a, b) for a, b in zip(on_gpu(case, F32), first, strict=True))


def test_nothing_waits_for_the_device() -> None:
    case = Layer(70, 9, 24, 3, 64, 0.2)
    tensors, grad = layer_inputs(case, F32, DEVICE)
    block, of_block = block_inputs(Block(70, 24, 64, 20), F32, DEVICE)
    seed = torch.tensor([3], device=DEVICE)
    layer_both_ways(tensors, grad, case, seed)
    block_both_ways(block, of_block, 0.2, seed)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer_both_ways(tensors, grad, case, seed)
        block_both_ways(block, of_block, 0.2, seed)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("last", [False, True])
def test_a_cuda_graph_captures_both_operators(last: bool) -> None:
    """Replayed on new numbers in the same memory, the seed's too."""
    case = Layer(70, 9, 24, 3, 64, 0.2, "plain", last)
    tensors, grad = layer_inputs(case, F32, DEVICE)
    block, of_block = block_inputs(Block(70, 24, 64, 20), F32, DEVICE)
    seed = torch.tensor([3], device=DEVICE)

    def both() -> list[Tensor]:
        return layer_both_ways(tensors, grad, case, seed) + block_both_ways(block, of_block, 0.2, seed)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        both()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = both()
    for number in (3, 4):
        seed.fill_(number)
        tensors[0].mul_(0.5)
        block[0].mul_(0.5)
        graph.replay()
        torch.cuda.synchronize()
        for a, b in zip(found, both(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)  # cuBLAS has other workspaces under capture


def peak_bytes(hidden: int) -> int:
    """Of a forward and a backward pass, beside what there was before it, weights and their gradients taken off."""
    case = Layer(1000, 20, 64, 2, hidden)
    tensors, grad = layer_inputs(case, F32, DEVICE)
    layer_both_ways(tensors, grad, case, None)  # cuBLAS' workspace
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    layer_both_ways(tensors, grad, case, None)
    of_weights = sum(part.numel() * part.element_size() for part in tensors[1:])
    return torch.cuda.max_memory_allocated() - before - 5 * of_weights


def test_memory_does_not_grow_with_the_hidden() -> None:
    assert peak_bytes(8192) < 1.1 * peak_bytes(1024)


@pytest.mark.slow
def test_more_than_two_to_the_31_elements() -> None:
    if torch.cuda.get_device_properties(0).total_memory < 64 << 30:
        pytest.skip("needs 64 GB on the GPU")
    (_, *weights), _ = layer_inputs(Layer(1, 1, 64, 2, 64), F32, DEVICE)
    x = torch.randn(1_150_000, 30, 64, generator=torch.Generator(DEVICE).manual_seed(0), device=DEVICE)
    assert x.numel() > 2**31
    whole = OPS.encoder_layer(x, weights, 2, EPS, 0.0, None, False, False)[0]
    few = OPS.encoder_layer(x[-5:], weights, 2, EPS, 0.0, None, False, False)[0]
    torch.testing.assert_close(whole[-5:], few, rtol=1e-4, atol=1e-4)
    del whole
    rows = x.flatten(0, 1)
    whole = OPS.feed_forward(rows, *weights[4:8], 0.0, None)
    few = OPS.feed_forward(rows[-5:], *weights[4:8], 0.0, None)
    torch.testing.assert_close(whole[-5:], few, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- refusals
def test_refusals_of_the_kernels() -> None:
    case = Layer(3, 5, 4, 2, 6)
    (x, *weights), grad = layer_inputs(case, F32, DEVICE)
    with pytest.raises(ValueError, match="seed: expected one int64 on the device of x"):
        OPS.encoder_layer(x, weights, 2, EPS, 0.5, None, False, False)
    with pytest.raises(ValueError, match=r"dropout: expected 0 to 1, got 1\.5"):
        OPS.encoder_layer(x, weights, 2, EPS, 1.5, None, False, False)
    with pytest.raises(ValueError, match="heads: expected a divisor of D = 4, got 3"):
        OPS.encoder_layer(x, weights, 3, EPS, 0.0, None, False, False)
    with pytest.raises(ValueError, match="weights: expected 12, got 11"):
        OPS.encoder_layer(x, weights[1:], 2, EPS, 0.0, None, False, False)
    with pytest.raises(ValueError, match="x: expected at least one step"):
        OPS.encoder_layer(x[:, :0], weights, 2, EPS, 0.0, None, False, False)
    kept = OPS.encoder_layer(x, weights, 2, EPS, 0.0, None, False, False)[1:]
    with pytest.raises(ValueError, match=r"normalised: expected shape \(2, 3, 5, 4\), got \(2, 0, 5, 4\)"):
        OPS.encoder_layer_backward(grad, x, weights, 2, 0.0, None, False, *kept, True)
    tensors, of_block = block_inputs(Block(5, 4, 9, 3), F32, DEVICE)
    with pytest.raises(ValueError, match=r"bias_in: expected shape \(9\), got \(8,\)"):
        OPS.feed_forward(*tensors[:2], tensors[2][1:], *tensors[3:], 0.0, None)
    with pytest.raises(ValueError, match=r"grad: expected shape \(5, 3\), got \(4, 3\)"):
        OPS.feed_forward_backward(of_block[1:], *tensors[:4], 0.0, None, True)


def test_tensors_of_another_device_are_refused() -> None:
    (x, *weights), _ = layer_inputs(Layer(3, 5, 4, 2, 6), F32, DEVICE)
    with pytest.raises(ValueError, match="in_proj_weight: expected the device of x, got another"):
        OPS.encoder_layer(x, [weights[0].cpu(), *weights[1:]], 2, EPS, 0.0, None, False, False)
    with pytest.raises(ValueError, match="seed: expected the device of x, got another"):
        OPS.feed_forward(x[:, 0], *weights[4:8], 0.5, torch.tensor([3]))
