"""Temporal convolution stacks: non-finite values, gradients, torch's transforms, error messages."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from qfast.ops import BlockWeights, temporal_block, temporal_conv_net
from qfast.ops.temporal_conv_twin import backward_twin, forward_twin
from support.operator_case import relative_error
from support.temporal_conv import NATIVE, flat, like, oracle, results, same_bits, stack, stack_errors_above
from support.tensors import randn

INF, NAN = torch.inf, torch.nan
OPS = torch.ops.qfast


# ---------------------------------------------------------------- non-finite values
@pytest.mark.parametrize("all_steps", [False, True])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_non_finite_values_spread_as_in_plain_torch(value: float, all_steps: bool, isa: str) -> None:
    """Result and gradients, element by element. The bits of other rows do not change."""
    x, blocks = randn(30, 5, 12), stack(5, [9, 9, 7], 3, norm=False)
    grad = randn(30, 7, 12, seed=1) if all_steps else randn(30, 7, seed=1)
    clean = results(lambda *t: temporal_conv_net(*t, all_steps=all_steps), x, blocks, grad)
    x[13, 2, -1] = value  # the last step: only what the last step sees of it, in any implementation
    result, exact = (
        results(lambda *t, of=of: of(*t, all_steps=all_steps), x, blocks, grad) for of in (temporal_conv_net, oracle)
    )
    for a, b in zip(result, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11, equal_nan=True)
    assert not result[0][13].isfinite().all()
    others = [i for i in range(30) if i != 13]
    for number in (0, 1):
        assert same_bits(result[number][others], clean[number][others])


@pytest.mark.parametrize("all_steps", [False, True])
@pytest.mark.parametrize("value", [NAN, INF])
def test_a_gradient_that_is_not_finite(value: float, all_steps: bool, isa: str) -> None:
    """It passes only where the ReLUs are open, and stays in its row of the gradient of x."""
    x, blocks = randn(30, 5, 12), stack(5, [9, 7], 3, norm=False)
    out = oracle(x, blocks, all_steps=all_steps)
    grad = randn(*out.shape, seed=1)
    where = (13, *(out[13] > 0).nonzero()[0].tolist())
    clean = results(lambda *t: temporal_conv_net(*t, all_steps=all_steps), x, blocks, grad)
    grad[where] = value
    result, exact = (
        results(lambda *t, of=of: of(*t, all_steps=all_steps), x, blocks, grad) for of in (temporal_conv_net, oracle)
    )
    assert result[1][13].isnan().any() or result[1][13].isinf().any()
    others = [i for i in range(30) if i != 13]
    assert same_bits(result[1][others], clean[1][others])
    for a, b in zip(result[2:], exact[2:], strict=True):
        assert bool(a.isfinite().all()) == bool(b.isfinite().all())
    closed = (13, *(out[13] <= 0).nonzero()[0].tolist())
    grad[where], grad[closed] = 1.0, value
    result = results(lambda *t: temporal_conv_net(*t, all_steps=all_steps), x, blocks, grad)
    assert all(part.isfinite().all() for part in result)


@pytest.mark.parametrize("value", [NAN, INF])
def test_unread_steps_may_have_any_value(value: float, isa: str) -> None:
    """Steps outside the receptive field or between taps are not read."""
    for steps, dilations in ((30, [1, 2]), (30, [5, 5])):
        blocks = stack(5, [9, 9], 3, norm=False)
        plan = temporal_conv_net.plan(steps, 3, dilations)
        x, grad = randn(6, 5, steps), randn(6, 9, seed=1)
        clean = results(lambda x, b, d=dilations: temporal_conv_net(x, b, dilations=d), x, blocks, grad)
        outside = [t for t in range(steps) if t not in plan.blocks[0].input]
        assert outside
        x[:, :, outside] = value
        result = results(lambda x, b, d=dilations: temporal_conv_net(x, b, dilations=d), x, blocks, grad)
        assert all(same_bits(a, b) for a, b in zip(result, clean, strict=True))
        assert not result[1][:, :, outside].any()


@pytest.mark.skipif(not NATIVE, reason="plain torch multiplies the padding")
@pytest.mark.parametrize("all_steps", [False, True])
def test_taps_before_the_window_may_have_any_value(all_steps: bool, isa: str) -> None:
    """Weights are not multiplied by the zeros of the padding, so an infinite weight there has no effect."""
    x, blocks = randn(4, 5, 3), stack(5, [9], 7, norm=False)
    out = temporal_conv_net(x, blocks, all_steps=all_steps)
    for v in (blocks[0].weight_v1, blocks[0].weight_v2):
        v[:, :, :4] = INF
    assert same_bits(temporal_conv_net(x, blocks, all_steps=all_steps), out)


@pytest.mark.parametrize("where", ["weight_v1", "bias1", "weight_v2", "bias2", "downsample_weight", "downsample_bias"])
def test_a_weight_that_is_nan(where: str, isa: str) -> None:
    """Its channel is NaN in every row, and so are values that depend on it."""
    x, blocks = randn(20, 5, 12), stack(5, [9], 3, norm=False)
    part = getattr(blocks[0], where)
    part[4] = NAN
    result, exact = (results(of, x, blocks, randn(20, 9, seed=1)) for of in (temporal_conv_net, oracle))
    assert torch.equal(result[0].isnan(), exact[0].isnan())
    assert result[0].isnan().all(0).sum() == (1 if where in ("weight_v2", "bias2") or where[0] == "d" else 9)
    torch.testing.assert_close(result[0], exact[0], rtol=1e-11, atol=1e-11, equal_nan=True)


# ---------------------------------------------------------------- gradients, schemas
def small(norm: bool = True, channels: tuple[int, ...] = (4, 3)) -> tuple[Tensor, list[BlockWeights]]:
    x, blocks = randn(3, 2, 7, seed=2), stack(2, channels, 3, norm=norm, seed=3)
    return x.requires_grad_(), like(blocks, [part.requires_grad_() for part in flat(blocks)])


def of_parts(blocks: list[BlockWeights], **settings: object) -> Callable[..., Tensor]:
    """A function of x and the tensors of `blocks`, for tools that accept tensors."""
    return lambda x, *parts: temporal_conv_net(x, like(blocks, parts), **settings)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("all_steps", [False, True])
def test_gradients_by_finite_differences(all_steps: bool, norm: bool, isa: str) -> None:
    x, blocks = small(norm)
    assert torch.autograd.gradcheck(of_parts(blocks, all_steps=all_steps), (x, *flat(blocks)))


def test_any_set_of_tensors_may_require_a_gradient(isa: str) -> None:
    """Tensors that require no gradient get none; the gradients of the others are the same."""
    x, blocks = small()
    tensors = [x, *flat(blocks)]
    full = results(temporal_conv_net, x, blocks, randn(3, 3, seed=1))[1:]
    for wanted in range(len(tensors)):
        leaves = [t.detach().requires_grad_(i == wanted) for i, t in enumerate(tensors)]
        of_parts(blocks)(*leaves).backward(randn(3, 3, seed=1))
        assert [leaf.grad is not None for leaf in leaves] == [i == wanted for i in range(len(leaves))]
        assert torch.equal(leaves[wanted].grad, full[wanted])


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("all_steps", [False, True])
@pytest.mark.parametrize("batch", [0, 3])
def test_opcheck(batch: int, all_steps: bool, dropout: float) -> None:
    x, blocks = small(norm=False)
    steps = x.detach()[:batch].transpose(1, 2)
    seed = torch.tensor([5]) if dropout else None
    for keep in (True, False):
        leaves = [t.detach().requires_grad_(keep) for t in (steps, *flat(blocks))]
        torch.library.opcheck(OPS.temporal_conv_net, (leaves[0], leaves[1:], [1, 2], dropout, seed, all_steps, keep))
    weights = [t.detach() for t in flat(blocks)]
    inputs = (steps, weights, [1, 2], dropout, seed, all_steps)
    saved = OPS.temporal_conv_net(*inputs, True)
    for input_grad in (True, False):
        back = (randn(*saved[0].shape), *inputs, *saved, input_grad)
        torch.library.opcheck(OPS.temporal_conv_net_backward, back)
        assert OPS.temporal_conv_net_backward(*back)[0].shape[0] == (batch if input_grad else 0)


@pytest.mark.parametrize("all_steps", [False, True])
def test_the_twin_normalizes_weights_with_gains(all_steps: bool) -> None:
    """As the definition does, in the form that only the CUDA operator accepts: gains after the last block."""
    x, blocks = randn(5, 2, 7), stack(2, [4, 3, 3], 3)
    grad = randn(*oracle(x, blocks, all_steps=all_steps).shape, seed=1)
    names = ("weight_v1", "bias1", "weight_v2", "bias2", "downsample_weight", "downsample_bias")
    order = [(number, name) for number in range(3) for name in names if getattr(blocks[number], name) is not None]
    order += [(number, name) for number in range(3) for name in ("weight_g1", "weight_g2")]
    weights = [getattr(blocks[number], name) for number, name in order]
    steps = x.transpose(1, 2)
    inputs = steps, weights, [1, 2, 4], 0.0, None, all_steps
    saved = forward_twin(*inputs, True)
    out_grad = grad.transpose(1, 2) if all_steps else grad
    of_x, of_weights = backward_twin(out_grad, *inputs, *saved, True)
    out, exact_x, *exact = results(lambda x, blocks: oracle(x, blocks, all_steps=all_steps), x, blocks, grad)
    by_name = {
        (number, name): part
        for number, block in enumerate(like(blocks, exact))
        for name, part in block._asdict().items()
    }
    torch.testing.assert_close(saved[0].transpose(1, 2) if all_steps else saved[0], out)
    torch.testing.assert_close(of_x.transpose(1, 2), exact_x)
    assert len(of_weights) == len(order)
    for place, part in zip(order, of_weights, strict=True):
        torch.testing.assert_close(part, by_name[place])


def test_double_backward_is_refused_by_name() -> None:
    x, blocks = small()
    for call in (temporal_conv_net, lambda x, b: temporal_block(x, b[0])):
        (grad,) = torch.autograd.grad(call(x, blocks).square().sum(), x, create_graph=True)
        with pytest.raises(NotImplementedError, match=r"temporal_conv_net: double backward .*torch\.func\.grad"):
            grad.sum().backward()


def test_saved_tensors_have_no_gradient_and_need_keep() -> None:
    x, blocks = small(norm=False)
    inputs = (x.transpose(1, 2), flat(blocks), [1, 2], 0.0, None, False)
    assert [t.requires_grad for t in OPS.temporal_conv_net(*inputs, True)] == [True, False, False]
    with pytest.raises(ValueError, match="keep: must be True if a gradient is needed"):
        OPS.temporal_conv_net(*inputs, False)


def test_the_result_and_the_inputs_are_guarded_against_changes_in_place() -> None:
    """torch raises an error if a tensor that the backward pass reads has been changed since the forward pass."""
    for change in (lambda x, out: out.mul_(2), lambda x, out: x.add_(1)):
        leaf, blocks = small()
        x = leaf * 1
        out = temporal_conv_net(x, blocks)
        change(x, out)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()


# ---------------------------------------------------------------- torch's transforms, compile, autocast, meta
@pytest.mark.parametrize("all_steps", [False, True])
def test_transforms_and_forward_mode(all_steps: bool) -> None:
    x, blocks = small()
    tensors = tuple(t.detach() for t in (x, *flat(blocks)))
    along = tuple(randn(*t.shape, seed=8) for t in tensors)
    ours = of_parts(blocks, all_steps=all_steps)
    close = {"rtol": 1e-11, "atol": 1e-11}

    def theirs(x: Tensor, *parts: Tensor) -> Tensor:
        return oracle(x, like(blocks, parts), all_steps=all_steps)

    expected = torch.func.jvp(theirs, tensors, along)
    assert expected[1].norm() > 0.1
    torch.testing.assert_close(torch.func.jvp(ours, tensors, along), expected, **close)
    with torch.autograd.forward_ad.dual_level():  # nothing requires a gradient: torch would drop the tangent silently
        duals = map(torch.autograd.forward_ad.make_dual, tensors, along)
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(ours(*duals))[1], expected[1], **close)

    def slopes(f: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, ...]]:
        return torch.func.grad(lambda *t: f(*t).square().sum(), argnums=(0, 1, 2, 3))

    torch.testing.assert_close(slopes(ours)(*tensors), slopes(theirs)(*tensors), **close)
    twice = [
        torch.func.grad(lambda *t, f=f: sum(g.square().sum() for g in slopes(f)(*t)))(*tensors) for f in (ours, theirs)
    ]
    torch.testing.assert_close(*twice, **close)
    each = torch.vmap(ours)(*(torch.stack([t, 2 * t]) for t in tensors))
    torch.testing.assert_close(each, torch.stack([theirs(*tensors), theirs(*(2 * t for t in tensors))]), **close)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("all_steps", [False, True])
def test_compiled(all_steps: bool, dynamic: bool) -> None:
    blocks = small()[1]
    compiled = torch.compile(
        of_parts(blocks, all_steps=all_steps), backend="aot_eager", fullgraph=True, dynamic=dynamic
    )
    for batch in (3, 5):
        x = randn(batch, 2, 7, seed=batch)
        grad = randn(batch, 3, 7, seed=5) if all_steps else randn(batch, 3, seed=5)
        result, exact = (
            results(call, x, blocks, grad)
            for call in (
                lambda x, blocks: compiled(x, *flat(blocks)),
                lambda x, blocks: oracle(x, blocks, all_steps=all_steps),
            )
        )
        assert stack_errors_above(result, exact, 1e-12) == []
        parts = [part.detach() for part in flat(blocks)]
        torch.testing.assert_close(compiled(x, *parts), temporal_conv_net(x, blocks, all_steps=all_steps))
    torch.compiler.reset()


def test_compiled_with_dropout() -> None:
    """Every call draws a new seed, as without torch.compile."""
    blocks = small()[1]
    compiled = torch.compile(of_parts(blocks, dropout=0.5, training=True), backend="aot_eager", fullgraph=True)
    x, parts = randn(50, 2, 7), [part.detach() for part in flat(blocks)]
    torch.manual_seed(3)
    first, second = compiled(x, *parts), compiled(x, *parts)
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(compiled(x, *parts), first)
    torch.compiler.reset()


def test_autocast_leaves_float32_alone(isa: str) -> None:
    x, blocks = randn(5, 4, 9, dtype=torch.float32), stack(4, [8, 8], 3, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = temporal_conv_net(x, blocks)
    assert result.dtype == torch.float32
    # the twin's convolutions are torch's, which autocast computes in bfloat16
    torch.testing.assert_close(result, temporal_conv_net(x, blocks), rtol=0, atol=0 if NATIVE else 5e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precisions_are_computed_in_float32(dtype: torch.dtype) -> None:
    x, blocks = randn(6, 3, 9).to(dtype), stack(3, [5, 5], 3, dtype=dtype)
    wide = like(blocks, [part.float() for part in flat(blocks)])
    grad = randn(6, 5, seed=1).to(dtype)
    result, exact = (
        results(temporal_conv_net, x, blocks, grad),
        results(temporal_conv_net, x.float(), wide, grad.float()),
    )
    assert all(a.dtype == dtype for a in result)
    for a, b in zip(result, exact, strict=True):
        assert torch.equal(a, b.to(dtype))


def test_meta_tensors_have_shapes() -> None:
    x, blocks = small()
    x, blocks = x.detach().to("meta").requires_grad_(), like(blocks, [p.detach().to("meta") for p in flat(blocks)])
    for all_steps, shape in ((False, (3, 3)), (True, (3, 3, 7))):
        out = temporal_conv_net(x, blocks, all_steps=all_steps)
        assert (out.device.type, tuple(out.shape)) == ("meta", shape)
        out.sum().backward()
        assert x.grad.shape == x.shape
    huge = temporal_conv_net(torch.empty(2**33, 2, 7, device="meta"), like(blocks, [p.float() for p in flat(blocks)]))
    assert huge.shape == (2**33, 3)


def test_a_stack_in_pieces_is_the_stack(isa: str) -> None:
    """Blocks called one by one at all steps, compared with the whole stack at the last step."""
    x, blocks = randn(9, 4, 20), stack(4, [6, 6, 11], 3)
    y = x
    for number, block in enumerate(blocks):
        y = temporal_block(y, block, dilation=2**number)
    assert relative_error(temporal_conv_net(x, blocks), y[:, :, -1]) < 1e-14
    assert relative_error(temporal_conv_net(x, blocks, all_steps=True), y) < 1e-14


# ---------------------------------------------------------------- refusals
def test_refusals_of_x() -> None:
    x, blocks = randn(3, 2, 7), stack(2, [4, 3], 3)
    for bad, message in (
        ([1.0], "x: expected a tensor, got list"),
        (x.long(), r"x: expected dtype float32 or float64, got torch\.int64"),
        (x[0], r"x: expected shape \[B, F, T\] with F and T of at least 1, got \(2, 7\)"),
        (x[None], r"x: expected shape \[B, F, T\] .* got \(1, 3, 2, 7\)"),
        (x[:, :0], r"x: expected shape \[B, F, T\] .* got \(3, 0, 7\)"),
        (x[:, :, :0], r"x: expected shape \[B, F, T\] .* got \(3, 2, 0\)"),
    ):
        with pytest.raises(ValueError, match=f"temporal_conv_net: {message}"):
            temporal_conv_net(bad, blocks)
    with pytest.raises(ValueError, match=r"blocks\[0\]\.weight_v1: expected shape \(4, 5, 3\), got \(4, 2, 3\)"):
        temporal_conv_net(randn(3, 5, 7), blocks)


def test_refusals_of_settings() -> None:
    x, blocks = randn(3, 2, 7), stack(2, [4, 3], 3)
    for dropout in (-0.1, 1.5, NAN, "0.5", None):
        with pytest.raises(
            ValueError, match=rf"temporal_conv_net: dropout must be a number in \[0, 1\], got {dropout!r}"
        ):
            temporal_conv_net(x, blocks, dropout=dropout, training=True)
    with pytest.raises(ValueError, match="blocks: expected at least one block, got none"):
        temporal_conv_net(x, [])
    with pytest.raises(ValueError, match="dilations: expected one for each of 2 blocks, got 3"):
        temporal_conv_net(x, blocks, dilations=[1, 2, 4])
    for bad in (0, -1, 1.5, True, "2"):
        with pytest.raises(ValueError, match=rf"dilations: expected whole numbers .*, got {bad!r}"):
            temporal_conv_net(x, blocks, dilations=[1, bad])
    with pytest.raises(ValueError, match=r"dilations: expected whole numbers .*, got 0"):
        temporal_block(x, blocks[0], dilation=0)


# A wrong tensor of the second block, which maps 4 channels to 3, and the error message.
WEIGHTS_REFUSED: dict[str, tuple[str, Callable[[Tensor], object], str]] = {
    "two axes": ("weight_v1", lambda w: w[0], r"expected shape \[C, 4, k\], got \(4, 3\)"),
    "no taps": ("weight_v1", lambda w: w[:, :, :0], r"expected shape \[C, 4, k\], got \(3, 4, 0\)"),
    "no tensor": ("weight_v1", lambda w: 1.0, r"expected shape \[C, 4, k\], got float"),
    "other kernel": ("weight_v2", lambda w: w[:, :, :2], "expected kernel size 3, got 2"),
    "other width": ("weight_v2", lambda w: w[:2], r"expected shape \(3, 3, 3\), got \(2, 3, 3\)"),
    "no weight": ("weight_v2", lambda w: None, "expected a tensor, got None"),
    "flat gain": ("weight_g1", lambda g: g.flatten(), r"expected shape \(3, 1, 1\), got \(3,\)"),
    "short bias": ("bias2", lambda b: b[:2], r"expected shape \(3,\), got \(2,\)"),
    "no bias": ("bias1", lambda b: None, "expected a tensor, got None"),
    "other dtype": ("bias1", lambda b: b.float(), r"expected dtype and device of x \(torch\.float64 on cpu\), got"),
    "other device": ("bias2", lambda b: b.to("meta"), r"expected dtype .* got torch\.float64 on meta.* Remedy: x\.to"),
    "1x1 missing": ("downsample_weight", lambda w: None, r".*widths 4 and 3 differ: .* of shape \(3, 4, 1\)"),
    "its bias missing": ("downsample_bias", lambda b: None, r".*widths 4 and 3 differ: .* of shape \(3,\)"),
    "1x1 of 3 taps": ("downsample_weight", lambda w: w.repeat(1, 1, 3), r"expected shape \(3, 4, 1\), got \(3, 4, 3\)"),
}


@pytest.mark.parametrize("what", WEIGHTS_REFUSED)
def test_refusals_of_weights(what: str) -> None:
    where, change, message = WEIGHTS_REFUSED[what]
    x, blocks = randn(3, 2, 7), stack(2, [4, 3], 3)
    blocks[1] = blocks[1]._replace(**{where: change(getattr(blocks[1], where))})
    with pytest.raises(ValueError, match=rf"temporal_conv_net: blocks\[1\]\.{where}: {message}"):
        temporal_conv_net(x, blocks)


def test_a_1x1_convolution_is_refused_where_widths_are_equal() -> None:
    (block,) = stack(4, [4], 3)
    block = block._replace(downsample_weight=randn(4, 4, 1), downsample_bias=randn(4))
    with pytest.raises(ValueError, match=r"blocks\[0\]\.downsample_weight: .*widths .* 4.*: expected none"):
        temporal_conv_net(randn(3, 4, 7), [block])


@pytest.mark.skipif(not NATIVE, reason="the checks of the kernels themselves")
def test_the_kernels_reject_out_of_bounds_arguments() -> None:
    """After torch.compile no Python code checks the arguments of the raw operators."""
    x, blocks = randn(3, 7, 2), stack(2, [4, 3], 3, norm=False)
    weights = flat(blocks)

    def forward(x: Tensor, weights: list[Tensor], dilations: list[int], dropout: float = 0.0, seed=None) -> object:
        return OPS.temporal_conv_net(x, weights, dilations, dropout, seed, False, True)

    for bad in (
        lambda: forward(x[0], weights, [1, 2]),
        lambda: forward(x, weights, [1]),
        lambda: forward(x, weights, [1, 0]),
        lambda: forward(x, weights, [1, -2]),
        lambda: forward(x, weights[:-1], [1, 2]),
        lambda: forward(x, [], []),
        lambda: forward(x, [weights[0][:, :1], *weights[1:]], [1, 2]),
        lambda: forward(x, [*weights, *(x.new_ones(width, 1, 1) for width in (4, 4, 3, 3))], [1, 2]),  # CUDA only
        lambda: forward(x, [weights[0], weights[1][:2], *weights[2:]], [1, 2]),
        lambda: forward(x, [weights[0], weights[1].float(), *weights[2:]], [1, 2]),
        lambda: forward(x.float(), weights, [1, 2]),
        lambda: forward(x, weights, [1, 2], 0.5, None),
        lambda: forward(x, weights, [1, 2], 1.5, torch.tensor([1])),
        lambda: forward(x, weights, [1, 2], 0.5, torch.tensor([1.0])),
        lambda: forward(x, weights, [1, 2], 0.5, torch.tensor([], dtype=torch.int64)),
    ):
        with pytest.raises((ValueError, RuntimeError), match=r"temporal_conv_net|weights|dilations|seed|dropout|x:"):
            bad()
    out, activations, signs = forward(x, weights, [1, 2])
    inputs = (x, weights, [1, 2], 0.0, None, False)
    for bad in (
        (out[:2], *inputs, out, activations, signs, True),
        (out, *inputs, out[:, :2], activations, signs, True),
        (out, *inputs, out, activations[:-1], signs, True),
        (out, *inputs, out, activations, signs[:-1], True),
        (out.reshape(1, 9), *inputs, out, activations, signs, True),  # as many elements in another shape
        (out, *inputs, out.reshape(1, 9), activations, signs, True),
        (out, *inputs, out, activations[None], signs, True),
        (out, *inputs, out, activations, signs.float(), True),
    ):
        with pytest.raises((ValueError, RuntimeError), match=r"temporal_conv_net|grad|output|activations|signs"):
            OPS.temporal_conv_net_backward(*bad)
    # Strides of saved tensors are arbitrary.
    spread = [torch.stack([part, part], -1)[..., 0] for part in (out, activations, signs)]
    expected, computed = (
        OPS.temporal_conv_net_backward(out, *inputs, *saved, True) for saved in ((out, activations, signs), spread)
    )
    for ours, theirs in zip([computed[0], *computed[1]], [expected[0], *expected[1]], strict=True):
        assert torch.equal(ours, theirs)
