"""The encoder layer in torch: schemas, error messages, compile, export, transforms, half precision, memory."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from qfast.errors import ConfigError, DataError
from qfast.ops import encoder_layer
from support.encoder import KERNELS, LayerCase
from support.operator_case import F32, F64, errors_above, relative_error, results

SMALL = LayerCase(4, 3, 8, 2, 6)


# ---------------------------------------------------------------- schemas
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(("batch", "dropout"), [(0, 0.0), (5, 0.0), (5, 0.3)])
def test_opcheck(batch: int, dropout: float, last: bool) -> None:
    """Schemas, fakes and gradients of the forward operator, with and without saved tensors, and of the backward
    operator."""
    x, *weights = LayerCase(batch, 3, 8, 2, 6, last).inputs()
    seed = torch.tensor([3]) if dropout else None
    rest = (2, 1e-5, dropout, seed, last)
    torch.library.opcheck(torch.ops.qfast.encoder_layer, (x, weights, *rest, False))
    leaves = [t.detach().requires_grad_() for t in (x, *weights)]
    torch.library.opcheck(torch.ops.qfast.encoder_layer, (leaves[0], leaves[1:], *rest, True))
    kept_x, *kept_weights = LayerCase(batch, 3, 8, 2, 256, last).inputs()
    torch.library.opcheck(torch.ops.qfast.encoder_layer, (kept_x, kept_weights, *rest, True, 0, True))
    out, *saved = torch.ops.qfast.encoder_layer(x, weights, *rest, True)
    for wanted in (True, False):
        inputs = (out, x, weights, 2, dropout, seed, last, *saved, wanted)
        torch.library.opcheck(torch.ops.qfast.encoder_layer_backward, inputs)


@pytest.mark.parametrize("last", [False, True])
def test_shapes_on_the_meta_device(last: bool) -> None:
    """The result has more than 2^32 elements."""
    weights = [t.to("meta") for t in LayerCase(1, 1, 64, 2, 2048).inputs()[1:]]
    x = torch.empty(2**20, 60, 64, device="meta", dtype=F64)
    result = encoder_layer(x, weights, heads=2, last_step=last)
    assert result.shape == ((2**20, 64) if last else (2**20, 60, 64))
    assert result.device.type == "meta"


# ---------------------------------------------------------------- refusals
def changed(which: int, tensor: Any) -> list[Any]:
    weights: list[Any] = SMALL.inputs()[1:]
    weights[which] = tensor
    return weights


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": [[1.0]]}, DataError, "x: expected a tensor, got list"),
        ({"x": torch.zeros(4, 8).double()}, DataError, r"x: expected shape \[B, T, D\].*, got \(4, 8\)"),
        ({"x": torch.zeros(4, 0, 8).double()}, DataError, r"x: .*T and D of at least 1, got \(4, 0, 8\)"),
        ({"x": torch.zeros(4, 3, 0).double()}, DataError, r"x: .*T and D of at least 1, got \(4, 3, 0\)"),
        ({"x": torch.zeros(4, 3, 8).long()}, DataError, "x: expected dtype float32 or float64, got torch.int64"),
        ({"x": torch.zeros(4, 3, 8)}, DataError, r"in_proj_weight: expected dtype and device of x .*32.*Remedy"),
        ({"x": torch.zeros(4, 3, 6).double()}, DataError, r"in_proj_weight: expected shape \(18, 6\), got \(24, 8\)"),
        ({"heads": 3}, ConfigError, "heads: expected a divisor of D = 8, got 3"),
        ({"heads": 0}, ConfigError, "heads: expected a divisor of D = 8, got 0"),
        ({"heads": -2}, ConfigError, "heads: expected a divisor of D = 8, got -2"),
        ({"heads": 16}, ConfigError, "heads: expected a divisor of D = 8, got 16"),
        ({"heads": 2.0}, ConfigError, "heads: expected a divisor of D = 8, got 2.0"),
        ({"heads": True}, ConfigError, "heads: expected a divisor of D = 8, got True"),
        ({"eps": -1e-5}, ConfigError, "eps must be a number of at least 0, got -1e-05"),
        ({"eps": float("nan")}, ConfigError, "eps must be a number of at least 0, got nan"),
        ({"eps": "a"}, ConfigError, "eps must be a number of at least 0, got 'a'"),
        ({"weights": None}, DataError, r"weights: expected 12 tensors .*got NoneType. Remedy: list\(layer.parameters"),
        ({"weights": changed(0, None)[:11]}, DataError, "weights: expected 12 tensors .*got 11. Remedy"),
        ({"weights": changed(1, None)}, DataError, "in_proj_bias: expected a tensor, got NoneType"),
        ({"weights": changed(2, torch.zeros(8, 9))}, DataError, "out_proj.weight: expected dtype and device of x"),
        ({"weights": changed(3, torch.zeros(9).double())}, DataError, r"out_proj.bias: expected shape \(8,\)"),
        ({"weights": changed(4, torch.zeros(0, 8).double())}, DataError, "linear1.weight: expected at least one row"),
        ({"weights": changed(4, torch.zeros(6, 9).double())}, DataError, r"linear1.weight: .*\(6, 8\), got \(6, 9\)"),
        ({"weights": changed(4, "a")}, DataError, "linear1.weight: expected a tensor, got str"),
        ({"weights": changed(5, torch.zeros(5).double())}, DataError, r"linear1.bias: .*\(6,\), got \(5,\)"),
        ({"weights": changed(6, torch.zeros(8, 5).double())}, DataError, r"linear2.weight: .*\(8, 6\), got \(8, 5\)"),
        ({"weights": changed(11, torch.zeros(1, 8).double())}, DataError, r"norm2.bias: .*\(8,\), got \(1, 8\)"),
        ({"dropout": 1.5}, ConfigError, r"dropout must be a number in \[0, 1\], got 1.5"),
        ({"dropout": float("nan"), "training": True}, ConfigError, r"dropout must be a number in \[0, 1\], got nan"),
        ({"dropout": True}, ConfigError, r"dropout must be a number in \[0, 1\], got True"),
        ({"dropout": "0.5"}, ConfigError, r"dropout must be a number in \[0, 1\], got '0.5'"),
    ],
)
def test_refusals(change: dict[str, Any], error: type[Exception], message: str) -> None:
    x, *weights = SMALL.inputs()
    with pytest.raises(error, match=f"encoder_layer: {message}"):
        encoder_layer(**{"x": x, "weights": weights, "heads": 2, **change})
    assert issubclass(error, ValueError)


@pytest.mark.skipif(not KERNELS, reason="plain torch has other messages")
def test_the_raw_operators_reject_out_of_bounds_arguments() -> None:
    """After torch.compile no Python code checks the arguments."""
    x, *weights = SMALL.inputs()
    forward, backward = torch.ops.qfast.encoder_layer, torch.ops.qfast.encoder_layer_backward
    rest = (2, 1e-5, 0.0, None, False)
    for inputs, match in (
        ((x[0], weights, *rest), r"x: expected .*\[B, T, D\]"),
        ((x.long(), weights, *rest), "x: expected dtype float32 or float64"),
        ((x[:, :0], weights, *rest), "x: expected at least one step"),
        ((x, weights[:11], *rest), r"weights: expected 12.*got 11"),
        ((x.float(), weights, *rest), "in_proj_weight: expected the dtype of x"),
        ((x[..., :6], weights, *rest), "in_proj_weight: expected shape"),
        ((x, weights, 3, *rest[1:]), "heads: expected a divisor of D = 8, got 3"),
        ((x, weights, 0, *rest[1:]), "heads: expected a divisor of D = 8, got 0"),
        ((x, changed(1, weights[1][:8]), *rest), "in_proj_bias: expected shape"),
        ((x, changed(6, weights[6][:, :5]), *rest), "linear2.weight: expected shape"),
        ((x, changed(8, weights[8][:5]), *rest), "norm1.weight: expected shape"),
        ((x, weights, 2, 1e-5, 0.5, None, False), "seed"),
        ((x, weights, 2, 1e-5, 1.5, torch.tensor([1]), False), "dropout"),
    ):
        with pytest.raises((RuntimeError, ValueError), match=f"encoder_layer: .*{match}|{match}"):
            forward(*inputs, False)
    with pytest.raises((RuntimeError, ValueError), match=r"keep_hidden: .* multiple of 256 .* got 6\. Remedy"):
        forward(x, weights, *rest, True, 0, True)
    out, normalised, scales, hidden = forward(x, weights, *rest, True)
    for grad, saved, match in (
        (out[:2], (normalised, scales, hidden), "grad: expected shape"),
        (out[:, -1], (normalised, scales, hidden), "grad: expected shape"),
        (out, (normalised[:, :2], scales, hidden), "normalised: expected shape"),
        (out, (normalised, scales[:1], hidden), "scales: expected shape"),
        (out, (normalised, scales, torch.zeros(4, 3, 6).double()), "keep_hidden: expected a multiple of 256"),
    ):
        with pytest.raises((RuntimeError, ValueError), match=f"encoder_layer_backward: {match}"):
            backward(grad, x, weights, 2, 0.0, None, False, *saved, True)


@pytest.mark.parametrize("last", [False, True])
def test_double_backward_is_refused_and_saved_tensors_have_no_gradient(last: bool) -> None:
    case = LayerCase(2, 3, 8, 2, 6, last)
    x, *weights = [t.requires_grad_() for t in case.inputs()]
    raw = (x, weights, 2, 1e-5, 0.0, None, last)
    for call in (lambda: case.operator([x, *weights]), lambda: torch.ops.qfast.encoder_layer(*raw, True)[0]):
        (grad,) = torch.autograd.grad(call().square().sum(), x, create_graph=True)
        with pytest.raises((NotImplementedError, RuntimeError), match=r"encoder_layer: double backward .* Remedy"):
            grad.sum().backward()
    assert not any(part.requires_grad for part in torch.ops.qfast.encoder_layer(*raw, True)[1:])
    with pytest.raises(DataError, match="keep: must be True"):
        torch.ops.qfast.encoder_layer(*raw, False)


# ---------------------------------------------------------------- backward pass
@pytest.mark.parametrize("last", [False, True])
def test_frozen_parameters_and_data_without_gradient(last: bool, isa: str) -> None:
    case = LayerCase(7, 4, 12, 3, 9, last)
    tensors = case.inputs()
    whole = results(lambda t: case.operator(t), tensors)
    leaves = [t.detach().requires_grad_(i in (5, 6, 9)) for i, t in enumerate(tensors)]
    out = case.operator(leaves)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(F64))
    for i, leaf in enumerate(leaves):
        if i in (5, 6, 9):
            assert relative_error(leaf.grad, whole[1 + i]) < 1e-13
        else:
            assert leaf.grad is None


def test_backward_twice_over_one_graph_adds_up(isa: str) -> None:
    leaves = [t.requires_grad_() for t in SMALL.inputs()]
    total = SMALL.operator(leaves).square().sum()
    total.backward(retain_graph=True)
    once = [t.grad.clone() for t in leaves]
    total.backward()
    assert all(relative_error(t.grad, 2 * first) < 1e-14 for t, first in zip(leaves, once, strict=True))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        total.backward()


def test_weights_changed_in_place_before_the_backward_are_noticed() -> None:
    leaves = [t.requires_grad_() for t in SMALL.inputs()]
    total = SMALL.operator(leaves).sum()
    with torch.no_grad():
        leaves[5].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


# ---------------------------------------------------------------- torch's transforms
@pytest.mark.parametrize("last", [False, True])
def test_transforms_are_those_of_torchs_layer(last: bool) -> None:
    case = LayerCase(2, 3, 4, 2, 5, last)
    x, *weights = case.inputs()
    along = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).double()

    def ours(x: Tensor) -> Tensor:
        return case.operator([x, *weights])

    def theirs(x: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):  # the only attention of torch with a second derivative
            return case.reference([x, *weights])

    close = {"rtol": 1e-10, "atol": 1e-11}
    jacobian = torch.autograd.functional.jacobian(theirs, x)  # torch's layer has no forward mode
    slope = (jacobian * along).sum((-1, -2, -3))
    torch.testing.assert_close(torch.func.jvp(ours, (x,), (along,))[1], slope, **close)
    forward_ad = torch.autograd.forward_ad
    with forward_ad.dual_level():  # nothing requires a gradient: torch would drop the tangent silently
        torch.testing.assert_close(forward_ad.unpack_dual(ours(forward_ad.make_dual(x, along)))[1], slope, **close)
    for of in (torch.func.jacrev, torch.func.jacfwd):
        torch.testing.assert_close(of(ours)(x), jacobian, **close)

    def energy(x: Tensor) -> Tensor:
        return ours(x).pow(3).sum()

    expected = torch.autograd.functional.hessian(lambda x: theirs(x).pow(3).sum(), x)
    torch.testing.assert_close(torch.func.hessian(energy)(x), expected, **close)
    many = torch.stack([x, along])
    torch.testing.assert_close(torch.vmap(ours)(many), torch.stack([theirs(x), theirs(along)]), **close)
    each = torch.vmap(torch.func.grad(energy))(many)
    leaf = along.clone().requires_grad_()
    torch.testing.assert_close(each[1], torch.autograd.grad(theirs(leaf).pow(3).sum(), leaf)[0], **close)


def test_an_ensemble_by_vmap_over_weights() -> None:
    members = [SMALL.inputs(seed=i) for i in range(3)]
    x = members[0][0]
    stacked = [torch.stack(same) for same in zip(*(m[1:] for m in members), strict=True)]
    result = torch.vmap(lambda *weights: SMALL.operator([x, *weights]))(*stacked)
    expected = torch.stack([SMALL.reference([x, *m[1:]]) for m in members])
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------- compile and export
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_whole(dynamic: bool, last: bool) -> None:
    torch.compiler.reset()
    compiled = torch.compile(
        lambda x, *weights: encoder_layer(x, list(weights), heads=2, last_step=last),
        backend="aot_eager",
        fullgraph=True,
        dynamic=dynamic,
    )
    for batch in (6, 9):
        case = LayerCase(batch, 5, 8, 2, 10, last)
        tensors = case.inputs()
        exact = results(lambda t, case=case: case.operator(t), tensors)
        assert errors_above(results(lambda t: compiled(*t), tensors), exact, 1e-13) == []
        with torch.no_grad():
            assert relative_error(compiled(*tensors), exact[0]) < 1e-13
    torch.compiler.reset()


def test_compiled_with_dropout() -> None:
    """Every call draws a new seed from torch's generator. Gradients use the masks of their call."""
    torch.compiler.reset()
    compiled = torch.compile(
        lambda x, *weights: encoder_layer(x, list(weights), heads=2, dropout=0.5, training=True),
        backend="aot_eager",
        fullgraph=True,
    )
    tensors = SMALL.inputs()
    torch.manual_seed(2)
    first, second = compiled(*tensors), compiled(*tensors)
    assert not torch.equal(first, second)
    torch.manual_seed(2)
    assert torch.equal(compiled(*tensors), first)
    gradients = []
    for of in (compiled, lambda *t: SMALL.operator(t, dropout=0.5, training=True)):
        torch.manual_seed(2)
        gradients.append(results(lambda t, of=of: of(*t), tensors))
    assert relative_error(gradients[0][0], first) < 1e-13
    assert errors_above(*gradients, 1e-12) == []
    torch.compiler.reset()


def test_exported() -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(8, 2, 20, 0.0, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return encoder_layer(x, list(self.layer.parameters()), heads=2, last_step=True)

    network, x = Network(), torch.randn(6, 5, 8)
    batch = torch.export.Dim("batch", min=2, max=4096)
    with torch.no_grad():
        program = torch.export.export(network, (x,), dynamic_shapes={"x": {0: batch}})
        wide = torch.randn(11, 5, 8)
        torch.testing.assert_close(program.module()(wide), network.layer(wide)[:, -1])
    assert "qfast.encoder_layer" in str(program.graph)


# ---------------------------------------------------------------- half precision and autocast
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
def test_halves_are_computed_in_float32(half: torch.dtype) -> None:
    case = LayerCase(9, 6, 16, 2, 30)
    tensors = case.inputs(half)
    expected = case.operator([t.float() for t in tensors]).to(half)
    for inputs in (tensors, [tensors[0], *(t.float() for t in tensors[1:])]):
        result = case.operator(inputs)
        assert result.dtype == half
        assert torch.equal(result, expected)
    narrow, wide = (results(lambda t: case.operator(t), [t.to(d) for t in tensors]) for d in (half, F32))
    assert all(part.dtype == half for part in narrow)
    assert errors_above(narrow, wide, 3e-2 if half == torch.bfloat16 else 4e-3) == []


def test_autocast_leaves_the_operator_in_float32() -> None:
    case = LayerCase(9, 6, 16, 2, 30)
    tensors = case.inputs(F32)
    expected = results(lambda t: case.operator(t), tensors)
    with torch.autocast("cpu", torch.bfloat16):
        result = results(lambda t: case.operator(t), tensors)
    for ours, plain in zip(result, expected, strict=True):
        assert ours.dtype == F32
        assert torch.equal(ours, plain)


# ---------------------------------------------------------------- memory
PROGRAM = """
import sys, torch, qfast.ops as ops
from qfast.benchmarks.memory import peak_memory
torch.set_num_threads(1)
sys.modules["qfast.ops.encoder_layer"].may_keep = lambda *sizes: False
layer = torch.nn.TransformerEncoderLayer(16, 2, {hidden}, batch_first=True)
x = torch.randn({batch}, {steps}, 16, requires_grad=True)

def step(x):
    out = ops.encoder_layer(x, list(layer.parameters()), heads=2, dropout=0.1, training=True, last_step={last})
    out.sum().backward()

step(x[:8])
with peak_memory() as peak:
    step(x)
print(peak.megabytes)
"""


@pytest.mark.skipif(not KERNELS or sys.platform != "linux", reason="memory use of the kernels, read from Linux")
@pytest.mark.parametrize(
    ("sizes", "limit"),
    [
        # MiB: x needs 15, saved tensors of both norms 30, result and gradients 30; the hidden values alone 1,875
        ({"batch": 4000, "steps": 60, "hidden": 2048, "last": False}, 125),
        # the gradient of x, 15, and little else
        ({"batch": 4000, "steps": 60, "hidden": 2048, "last": True}, 40),
        # the attention weights of one window need 7 per head, those of all windows 230
        ({"batch": 20, "steps": 1200, "hidden": 8, "last": False}, 60),
    ],
    ids=["all steps", "last step", "long windows"],
)
def test_without_memory_nothing_of_the_block_or_the_attention_is_saved(sizes: dict[str, Any], limit: float) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(**sizes)], capture_output=True, text=True, check=True, timeout=120
    )
    assert float(ran.stdout) < limit
