"""LSTM and GRU operators in torch: schemas, error messages, compile, export, transforms, autocast, half precision."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qfast.errors import ConfigError, DataError
from qfast.nn import GRUModel, LSTMModel
from qfast.ops import gru, lstm
from support.operator_case import F32, errors_above, results
from support.recurrent import CELLS, NAMES, NATIVE, RecurrentCase

PUBLIC: dict[str, Callable[..., Any]] = {"lstm": lstm, "gru": gru}
LAYERS = {"lstm": nn.LSTM, "gru": nn.GRU}


def layers_of(module: nn.RNNBase) -> list[list[Tensor]]:
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    return [[getattr(module, f"{name}_l{layer}") for name in names] for layer in range(module.num_layers)]


# ---------------------------------------------------------------- schemas
@pytest.mark.parametrize("all_steps", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name: str, all_steps: bool) -> None:
    """Schemas, fakes and gradients, with and without a state, dropout and saved tensors."""
    run = getattr(torch.ops.qfast, name)
    back = getattr(torch.ops.qfast, f"{name}_backward")
    state, dropout = (True, 0.3) if all_steps else (False, 0.0)
    case = RecurrentCase(name, 5, 3, 2, 9, 2, all_steps, state)
    inputs = case.inputs()
    seed = torch.tensor([3]) if dropout else None
    plain = case.raw(inputs, dropout, seed, all_steps)
    n, leaves = case.n_outputs, [t.detach().requires_grad_() for t in inputs]
    torch.library.opcheck(run, (*plain, False))
    torch.library.opcheck(run, (*case.raw(leaves, dropout, seed, all_steps), True))
    result = run(*plain, True)
    used = (True, False, True) if all_steps else (True, True, True)
    grads = [part if take else None for part, take in zip(result[:n], used, strict=False)]
    torch.library.opcheck(back, (*grads, *plain, *result[n:], all_steps, state))


@pytest.mark.parametrize("name", NAMES)
def test_shapes_on_the_meta_device(name: str) -> None:
    """The result has more than 2^32 elements."""
    case = RecurrentCase(name, 1, 1, 6, 64, 2)
    weights = [t.to("meta") for t in case.inputs().weights]
    inputs = [torch.empty(2**20, 250, 6, device="meta", dtype=torch.float64), *weights]
    output, *states = case.operator(inputs, all_steps=True)
    assert output.shape == (2**20, 250, 64)
    assert all(part.shape == (2, 2**20, 64) and part.device.type == "meta" for part in states)


# ---------------------------------------------------------------- refusals
REFUSED = {name: RecurrentCase(name, 4, 3, 2, 5, 2, state=True) for name in NAMES}
Refusals = dict[str, tuple[Callable[[], Any], type[Exception], str]]


def refused_inputs(name: str) -> Refusals:
    inputs, call = REFUSED[name].inputs(), PUBLIC[name]
    x, layers = inputs.x, inputs.layers
    return {
        "no tensor": (lambda: call([1.0], layers), DataError, "x: expected a tensor, got list"),
        "two axes": (lambda: call(x[0], layers), DataError, r"x: expected shape \[B, T, F\].* got \(3, 2\)"),
        "no feature": (lambda: call(x[..., :0], layers), DataError, r"F of at least 1, got \(4, 3, 0\)"),
        "integers": (
            lambda: call(x.long(), layers),
            DataError,
            "x: expected dtype float32 or float64, got torch.int64",
        ),
        "complex": (
            lambda: call(x.cfloat(), layers),
            DataError,
            "expected dtype float32 or float64, got torch.complex64",
        ),
        "other dtype": (
            lambda: call(x.float(), layers),
            DataError,
            r"layers\[0\].weight_ih: expected dtype and device of x \(torch.float32 on cpu\), got .*64.* Remedy",
        ),
    }


def refused_layers(name: str) -> Refusals:
    inputs, call = REFUSED[name].inputs(), PUBLIC[name]
    x, layers, g = inputs.x, inputs.layers, CELLS[name].gates * 5
    swapped = [[layers[0][1], layers[0][0], *layers[0][2:]], layers[1]]
    return {
        "no layer": (lambda: call(x, []), DataError, "layers: expected at least one"),
        "three weights": (lambda: call(x, [layers[0][:3]]), DataError, r"got \[3\] tensors per layer"),
        "other features": (
            lambda: call(x[..., :1], layers),
            DataError,
            rf"layers\[0\].weight_ih: expected shape \({g}, 1\), got \({g}, 2\)",
        ),
        "changed over": (lambda: call(x, swapped), DataError, r"layers\[0\].weight_(hh|ih): expected shape"),
        "second layer": (
            lambda: call(x, [layers[0], layers[0]]),
            DataError,
            rf"layers\[1\].weight_ih: expected shape \({g}, 5\), got \({g}, 2\)",
        ),
        "bias": (
            lambda: call(x, [[*layers[0][:3], layers[0][3][1:]], layers[1]]),
            DataError,
            rf"layers\[0\].bias_hh: expected shape \({g},\), got \({g - 1},\)",
        ),
    }


def refused_states(name: str) -> Refusals:
    inputs, call = REFUSED[name].inputs(), PUBLIC[name]
    x, layers = inputs.x, inputs.layers
    state = tuple(inputs.state) if name == "lstm" else inputs.state[0]
    short = (inputs.state[0], inputs.state[1][:1]) if name == "lstm" else inputs.state[0][:1]
    return {
        "state": (
            lambda: call(x, layers, initial_state=short),
            DataError,
            rf"initial_state.{'c' if name == 'lstm' else 'h'}: expected shape \(2, 4, 5\), got \(1, 4, 5\)",
        ),
        "state of other rows": (
            lambda: call(x[:2], layers, initial_state=state),
            DataError,
            r"expected shape \(2, 2, 5\)",
        ),
    }


def refused_dropout(name: str) -> Refusals:
    inputs, call = REFUSED[name].inputs(), PUBLIC[name]
    x, layers = inputs.x, inputs.layers
    return {
        "dropout above 1": (
            lambda: call(x, layers, dropout=1.5),
            ConfigError,
            r"dropout must be a number in \[0, 1\], got 1.5",
        ),
        "dropout nan": (
            lambda: call(x, layers, dropout=float("nan")),
            ConfigError,
            "dropout must be a number in .* got nan",
        ),
        "dropout text": (
            lambda: call(x, layers, dropout="0.5"),
            ConfigError,
            "dropout must be a number in .* got '0.5'",
        ),
        "dropout bool": (lambda: call(x, layers, dropout=True), ConfigError, "dropout must be a number in .* got True"),
    }


def refusals(name: str) -> Refusals:
    return refused_inputs(name) | refused_layers(name) | refused_states(name) | refused_dropout(name)


@pytest.mark.parametrize("what", list(refusals("lstm")))
@pytest.mark.parametrize("name", NAMES)
def test_refusals(name: str, what: str) -> None:
    call, error, match = refusals(name)[what]
    with pytest.raises(error, match=match):
        call()
    assert issubclass(error, ValueError)


def test_an_lstm_needs_both_states() -> None:
    case = RecurrentCase("lstm", 4, 3, 2, 5, state=True)
    inputs = case.inputs()
    with pytest.raises(DataError, match=r"initial_state: expected a pair \(h, c\), got Tensor"):
        lstm(inputs.x, inputs.layers, initial_state=inputs.state[0])


@pytest.mark.skipif(not NATIVE, reason="plain torch has other messages")
@pytest.mark.parametrize("name", NAMES)
def test_the_raw_operators_reject_wrong_arguments(name: str) -> None:
    """After torch.compile no Python code checks the arguments."""
    case = RecurrentCase(name, 4, 3, 2, 5, 2, state=True)
    inputs = case.inputs()
    run, (x, weights, *rest) = getattr(torch.ops.qfast, name), case.raw(inputs)
    for change, match in (
        ((x[0], weights, *rest), r"x: expected .*\[B, T, F\]"),
        ((x.long(), weights, *rest), "x: .*(float32|float64|floating)"),
        ((x, weights[:3], *rest), "weights: expected four tensors for each layer, got 3"),
        ((x, [], *rest), "weights: expected four tensors for each layer, got 0"),
        ((x.float(), weights, *rest), "weight_ih: expected the dtype of x"),
        ((x[..., :1], weights, *rest), "weight_ih: expected shape"),
        ((x, [*weights[:3], weights[3][:4], *weights[4:]], *rest), "bias_hh: expected shape"),
        ((x, weights, rest[0][:1], *rest[1:]), "expected shape .*2, 4, 5"),
        ((x, weights, *rest[:-3], 0.5, None, False), "seed"),
        ((x, weights, *rest[:-3], 1.5, torch.tensor([1]), False), "dropout"),
    ):
        with pytest.raises((RuntimeError, ValueError), match=match):
            run(*change, False)


@pytest.mark.parametrize("name", NAMES)
def test_double_backward_is_refused_and_saved_tensors_have_no_gradient(name: str) -> None:
    case = RecurrentCase(name, 2, 3, 2, 4, 2)
    inputs = case.inputs()
    leaves = case.split([t.detach().requires_grad_() for t in inputs])
    match = f"{name}: double backward .* Remedy: torch.nn.{name.upper()}.*torch.func.grad"
    for call in (
        lambda: case.operator(leaves)[0],
        lambda: getattr(torch.ops.qfast, name)(*case.raw(leaves), True)[0],
    ):
        (grad,) = torch.autograd.grad(call().sum(), leaves.x, create_graph=True)
        with pytest.raises((NotImplementedError, RuntimeError), match=match):
            grad.sum().backward()
    saved = getattr(torch.ops.qfast, name)(*case.raw(leaves), True)[case.n_outputs :]
    assert not any(part.requires_grad for part in saved)
    with pytest.raises(DataError, match="keep: must be True"):
        getattr(torch.ops.qfast, name)(*case.raw(leaves), False)


# ---------------------------------------------------------------- backward pass
@pytest.mark.parametrize("name", NAMES)
def test_a_frozen_layer_and_data_without_gradient(name: str, isa: str) -> None:
    case = RecurrentCase(name, 7, 4, 3, 9, 2)
    inputs = case.inputs()
    whole = results(lambda g: case.operator(g)[:1], inputs)[2:]
    leaves = [w.detach().requires_grad_(i >= 4) for i, w in enumerate(inputs.weights)]
    output = case.operator([inputs.x, *leaves])[0]
    rng = torch.Generator().manual_seed(9)
    (output * torch.randn(output.shape, generator=rng).double()).sum().backward()
    assert all(w.grad is None for w in leaves[:4])
    assert errors_above([w.grad for w in leaves[4:]], whole[4:], 1e-13) == []


@pytest.mark.parametrize("name", NAMES)
def test_backward_twice_over_one_graph_adds_up(name: str, isa: str) -> None:
    case = RecurrentCase(name, 7, 4, 3, 9, 2)
    inputs = case.inputs()
    leaves = [w.detach().requires_grad_() for w in inputs.weights]
    total = case.operator([inputs.x, *leaves])[0].square().sum()
    total.backward(retain_graph=True)
    once = [w.grad.clone() for w in leaves]
    total.backward()
    assert all(torch.equal(w.grad, 2 * first) for w, first in zip(leaves, once, strict=True))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        total.backward()


@pytest.mark.parametrize("name", NAMES)
def test_weights_changed_in_place_before_the_backward_are_noticed(name: str) -> None:
    case = RecurrentCase(name, 7, 4, 3, 9)
    inputs = case.inputs()
    leaves = [w.detach().requires_grad_() for w in inputs.weights]
    total = case.operator([inputs.x, *leaves])[0].sum()
    with torch.no_grad():
        leaves[1].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_any_strides(name: str, isa: str) -> None:
    """Expanded and transposed gradients, as sum() and views produce them."""
    case = RecurrentCase(name, 7, 4, 3, 9, 2)
    inputs = case.inputs()
    for call in (
        lambda of, g: [of(g, all_steps=True)[0].transpose(0, 2).contiguous().sum().expand(3).sum()],
        lambda of, g: [of(g, all_steps=True)[0][:, 1:3, ::2]],
        lambda of, g: [of(g)[0].t()],
        lambda of, g: [of(g)[1][:, ::2].permute(2, 0, 1)],
    ):
        result, exact = (
            results(lambda g, of=of, call=call: call(of, g), inputs) for of in (case.operator, case.reference)
        )
        assert errors_above(result, exact, 1e-12) == []


# ---------------------------------------------------------------- torch's transforms
@pytest.mark.parametrize("name", NAMES)
def test_transforms_are_those_of_torchs_layer(name: str) -> None:
    case = RecurrentCase(name, 3, 3, 2, 4, 2)
    inputs = case.inputs()
    x, along = inputs.x, torch.randn(3, 3, 2, generator=torch.Generator().manual_seed(1)).double()

    def ours(x: Tensor) -> Tensor:
        return case.operator([x, *inputs.weights])[0]

    def theirs(x: Tensor) -> Tensor:
        return case.reference([x, *inputs.weights])[0]

    close = {"rtol": 1e-11, "atol": 1e-12}
    expected = torch.func.jvp(theirs, (x,), (along,))[1]
    torch.testing.assert_close(torch.func.jvp(ours, (x,), (along,))[1], expected, **close)
    forward_ad = torch.autograd.forward_ad
    with forward_ad.dual_level():  # nothing requires a gradient: torch would drop the tangent silently
        torch.testing.assert_close(forward_ad.unpack_dual(ours(forward_ad.make_dual(x, along)))[1], expected, **close)
    jacobian = torch.func.jacfwd(theirs)(x)
    for of in (torch.func.jacrev, torch.func.jacfwd):
        torch.testing.assert_close(of(ours)(x), jacobian, **close)

    def energy(x: Tensor) -> Tensor:
        return ours(x).square().sum()

    torch.testing.assert_close(
        torch.func.hessian(energy)(x),
        torch.autograd.functional.hessian(lambda x: theirs(x).square().sum(), x),
        **close,
    )
    result = torch.vmap(ours)(torch.stack([x, along]))
    torch.testing.assert_close(result, torch.stack([theirs(x), theirs(along)]), **close)
    each = torch.vmap(torch.func.grad(energy), in_dims=0)(torch.stack([x, along]))
    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(each[0], torch.autograd.grad(theirs(leaf).square().sum(), leaf)[0], **close)


@pytest.mark.parametrize("name", NAMES)
def test_an_ensemble_by_vmap_over_weights(name: str) -> None:
    """torch's layers do not support this."""
    case = RecurrentCase(name, 5, 4, 3, 7)
    members = [case.inputs(seed=i) for i in range(3)]
    x = members[0].x
    stacked = [torch.stack(same).requires_grad_() for same in zip(*(m.weights for m in members), strict=True)]
    result = torch.vmap(lambda *weights: case.operator([x, *weights])[0])(*stacked)
    leaves = [[w.detach().requires_grad_() for w in m.weights] for m in members]
    expected = torch.stack([case.reference([x, *ws])[0] for ws in leaves])
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)
    result.square().sum().backward()
    expected.square().sum().backward()
    for i, weight in enumerate(stacked):
        assert errors_above([weight.grad], [torch.stack([ws[i].grad for ws in leaves])], 1e-11) == []


# ---------------------------------------------------------------- compile and export
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_compiled_whole(name: str, dynamic: bool) -> None:
    case = RecurrentCase(name, 6, 5, 3, 8, 2, state=True)
    torch.compiler.reset()
    compiled = torch.compile(
        lambda *t: case.operator(t, all_steps=True), backend="aot_eager", fullgraph=True, dynamic=dynamic
    )
    for batch in (6, 9):
        again = replace(case, batch=batch).inputs()
        result = results(lambda g: compiled(*g), again)
        exact = results(lambda g: case.operator(g, all_steps=True), again)
        assert errors_above(result, exact, 1e-13) == []
        with torch.no_grad():
            assert errors_above(compiled(*again), exact[: len(result) - len(again)], 1e-13) == []
    torch.compiler.reset()


@pytest.mark.parametrize("name", NAMES)
def test_compiled_with_dropout(name: str) -> None:
    """Every call draws a new seed from torch's generator."""
    case = RecurrentCase(name, 6, 5, 3, 8, 2)
    inputs = case.inputs()
    torch.compiler.reset()
    compiled = torch.compile(
        lambda *t: case.operator(t, dropout=0.5, training=True)[0], backend="aot_eager", fullgraph=True
    )
    torch.manual_seed(2)
    first, second = compiled(*inputs), compiled(*inputs)
    assert not torch.equal(first, second)
    torch.manual_seed(2)
    assert torch.equal(compiled(*inputs), first)
    torch.compiler.reset()


@pytest.mark.parametrize("name", NAMES)
def test_exported(name: str) -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = LAYERS[name](3, 8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return PUBLIC[name](x, layers_of(self.rnn))[0]

    network, x = Network(), torch.randn(6, 5, 3)
    batch = torch.export.Dim("batch", min=2, max=4096)
    with torch.no_grad():
        program = torch.export.export(network, (x,), dynamic_shapes={"x": {0: batch}})
        wide = torch.randn(11, 5, 3)
        torch.testing.assert_close(program.module()(wide), network.rnn(wide)[0][:, -1])
    assert f"qfast.{name}" in str(program.graph)


# ---------------------------------------------------------------- half precision and autocast
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_halves_are_computed_in_float32(name: str, half: torch.dtype) -> None:
    case = RecurrentCase(name, 9, 6, 4, 16, 2, state=True)
    inputs = case.inputs().to(half)
    result, exact = case.operator(inputs, all_steps=True), case.reference(inputs.to(F32), all_steps=True)
    for ours, true in zip(result, exact, strict=True):
        assert ours.dtype == half
        torch.testing.assert_close(ours, true.to(half), rtol=2e-2 if half == torch.bfloat16 else 2e-3, atol=1e-3)
    grads = results(case.operator, inputs)
    wide = results(lambda g: case.operator(g), inputs.to(F32))
    limit = 2e-2 if half == torch.bfloat16 else 2e-3
    assert all(part.dtype == half for part in grads)
    assert errors_above(grads, wide, limit) == []


@pytest.mark.parametrize("name", NAMES)
def test_autocast_leaves_the_operator_in_float32(name: str) -> None:
    case = RecurrentCase(name, 9, 6, 4, 16, 2)
    inputs = case.inputs(F32)
    expected = case.operator(inputs)
    with torch.autocast("cpu", torch.bfloat16):
        result = case.operator(inputs)
    for ours, plain in zip(result, expected, strict=True):
        assert ours.dtype == F32
        assert torch.equal(ours, plain)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
def test_an_initial_state_in_half_precision_is_accepted_next_to_float32(half: torch.dtype) -> None:
    """Under autocast, nn.Linear computes a state in half precision, while the windows are float32."""
    x, layer = torch.randn(5, 4, 3), [torch.randn(8, 3), torch.randn(8, 2), torch.randn(8), torch.randn(8)]
    h, c = (torch.randn(1, 5, 2).to(half) for _ in range(2))
    output, _ = lstm(x, [layer], initial_state=(h, c))
    assert output.dtype == F32
    assert torch.equal(output, lstm(x, [layer], initial_state=(h.float(), c.float()))[0])
    layer = [part[:6] for part in layer]
    assert torch.equal(gru(x, [layer], initial_state=h)[0], gru(x, [layer], initial_state=h.float())[0])


# ---------------------------------------------------------------- the networks
@pytest.mark.parametrize("network", [LSTMModel, GRUModel])
def test_networks_have_equal_gradients_with_the_operator_and_with_torchs_layer(network: Any, monkeypatch: Any) -> None:
    torch.manual_seed(0)
    model = network(d_feat=4, hidden_size=24, num_layers=2).double()
    x = torch.randn(64, 28, dtype=torch.float64)
    used: list[int] = []
    of = network.operator
    monkeypatch.setattr(network, "operator", staticmethod(lambda *a, **k: used.append(1) or of(*a, **k)))
    model(x).square().sum().backward()
    result = [p.grad.clone() for p in model.parameters()]
    assert len(used) == NATIVE
    model.zero_grad()
    calls: list[int] = []
    handle = model.rnn.register_forward_hook(lambda *_: calls.append(1))  # a hook is always called
    model(x).square().sum().backward()
    handle.remove()
    assert calls == [1]
    assert errors_above(result, [p.grad for p in model.parameters()], 1e-11) == []
