"""LSTM and GRU operators beside torch's own layers, in float64 and by relative norm."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from qfast import _backend
from qfast.nn import GRUModel, LSTMModel
from qfast.ops import recurrent

OPERATORS = {"lstm": (nn.LSTM, recurrent.lstm), "gru": (nn.GRU, recurrent.gru)}
NAMES = list(OPERATORS)


def layers_of(module: nn.RNNBase) -> list[list[Tensor]]:
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    return [[getattr(module, f"{name}_l{layer}") for name in names] for layer in range(module.num_layers)]


def layer_arguments(name: str, batch: int, steps: int, features: int, hidden: int, dtype=torch.float64) -> list[Tensor]:
    rng = torch.Generator().manual_seed(batch + 7 * steps)
    gates = {"lstm": 4, "gru": 3}[name] * hidden
    biases = {"lstm": 1, "gru": 2}[name]
    sizes = [(steps, batch, features), (gates, features), (gates, hidden), *[(gates,)] * biases]
    return [(torch.randn(size, generator=rng, dtype=dtype) * 0.5).requires_grad_() for size in sizes]


def results(call, x: Tensor, weights: list[Tensor], of_steps: Tensor | None, of_last: Tensor | None) -> list[Tensor]:
    """Output, last step, and gradients of x and the weights of a weighted sum of what `call` returns."""
    for tensor in (x, *weights):
        tensor.grad = None
    output, last = call(x)
    total = sum((a * b).sum() for a, b in ((output, of_steps), (last, of_last)) if b is not None)
    total.backward()
    return [output.detach(), last.detach(), x.grad, *(w.grad for w in weights)]


def compare(name, shape, dtype=torch.float64, limit=1e-12, view=None, steps_used=True, last_used=True) -> None:
    batch, steps, features, hidden, n_layers = shape
    rng = torch.Generator().manual_seed(1)
    module_class, operator = OPERATORS[name]
    module = module_class(features, hidden, n_layers, batch_first=True).double()
    x = torch.randn(batch, steps, features, generator=rng, dtype=torch.float64)
    of_steps = torch.randn(batch, steps, hidden, generator=rng, dtype=torch.float64) if steps_used else None
    of_last = torch.randn(batch, hidden, generator=rng, dtype=torch.float64) if last_used else None
    weights = list(module.parameters())

    def theirs(x: Tensor) -> tuple[Tensor, Tensor]:
        output = module(x)[0]
        return output, output[:, -1]

    expected = results(theirs, x.clone().requires_grad_(), weights, of_steps, of_last)
    ours = module_class(features, hidden, n_layers, batch_first=True).to(dtype)
    ours.load_state_dict(module.state_dict())
    given_x = view(x) if view else x
    assert torch.equal(given_x, x)
    cast = [None if g is None else g.to(dtype) for g in (of_steps, of_last)]
    found = results(
        lambda x: operator(x, layers_of(ours)),
        given_x.to(dtype).detach().requires_grad_(),
        list(ours.parameters()),
        *cast,
    )
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a.shape == b.shape
        assert (a.double() - b).norm() <= limit * b.norm(), (i, float((a.double() - b).norm() / b.norm()))


SHAPES = [
    (1, 1, 1, 1, 1),
    (2, 1, 3, 5, 2),
    (0, 3, 2, 4, 2),
    (1, 6, 2, 130, 1),
    (33, 4, 1, 16, 3),
    (257, 3, 7, 17, 1),  # two tiles of unequal size
    (530, 9, 5, 8, 2),  # several tiles, several collections of steps
    (64, 40, 158, 64, 1),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_values_and_gradients_are_those_of_torchs_layer(name, shape, isa):
    compare(name, shape)


@pytest.mark.parametrize("name", NAMES)
def test_float32_is_as_accurate_as_torchs_layer(name, isa):
    compare(name, (300, 20, 20, 64, 2), torch.float32, limit=5e-6)


@settings(deadline=None, max_examples=25)
@given(
    name=st.sampled_from(NAMES),
    shape=st.tuples(
        *[st.integers(0, 40), st.integers(1, 9), st.integers(1, 9), st.integers(1, 130), st.integers(1, 3)]
    ),
    used=st.sampled_from([(True, True), (True, False), (False, True)]),
)
def test_any_shape_and_either_result(name, shape, used):
    compare(name, shape, steps_used=used[0], last_used=used[1])


VIEWS = {
    "feature-major": lambda x: x.permute(0, 2, 1).contiguous().permute(0, 2, 1),
    "time-major": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "every other column": lambda x: torch.stack([x, x + 1], -1).flatten(2)[..., ::2],
    "rows of a wider panel": lambda x: torch.cat([x, x], 2)[..., : x.shape[2]],
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("name", NAMES)
def test_strides_of_x_do_not_matter(name, view):
    compare(name, (37, 5, 6, 12, 2), view=VIEWS[view])


@pytest.mark.parametrize("name", NAMES)
def test_gradients_by_finite_differences(name):
    arguments = layer_arguments(name, 3, 4, 2, 3)
    layer = getattr(torch.ops.qfast, f"{name}_layer")
    assert torch.autograd.gradcheck(lambda *a: layer(*a, True)[:2], arguments)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name, keep):
    arguments = [a.requires_grad_(keep) for a in layer_arguments(name, 5, 3, 2, 17)]
    torch.library.opcheck(getattr(torch.ops.qfast, f"{name}_layer"), (*arguments, keep))
    if keep:
        plain = [a.detach() for a in arguments]
        output, last, *kept = getattr(torch.ops.qfast, f"{name}_layer")(*plain, True)
        backward = getattr(torch.ops.qfast, f"{name}_layer_backward")
        for grads in ((output, last), (None, last), (output, None)):
            torch.library.opcheck(backward, (*grads, *plain[:3], output, *kept, True))


@pytest.mark.parametrize("name", NAMES)
def test_kernels_agree_with_the_twins_and_the_same_bits_come_twice(name, isa):
    arguments = [a.detach() for a in layer_arguments(name, 300, 7, 5, 33)]
    layer = getattr(torch.ops.qfast, f"{name}_layer")
    backward = getattr(torch.ops.qfast, f"{name}_layer_backward")
    forward = layer(*arguments, True)
    back = (forward[0], forward[1], *arguments[:3], forward[0], *forward[2:], True)
    twins = (
        recurrent._SCHEMAS[f"{name}_layer"][1](*arguments, True),
        recurrent._SCHEMAS[f"{name}_layer_backward"][1](*back),
    )
    for found, again, expected in (
        (forward, layer(*arguments, True), twins[0]),
        (backward(*back), backward(*back), twins[1]),
    ):
        for a, b, c in zip(found, again, expected, strict=True):
            assert torch.equal(a, b)
            torch.testing.assert_close(a, c, rtol=1e-11, atol=1e-11)
    for kept, bare in zip(forward[:2], layer(*arguments, False)[:2], strict=True):
        assert torch.equal(kept, bare)


# ---------------------------------------------------------------- activations
def activations(x: Tensor, hidden: int) -> tuple[Tensor, Tensor]:
    """Sigmoid and tanh of x as the cell computes them: gates of one LSTM step whose pre-activations are x."""
    eye = torch.eye(hidden, dtype=x.dtype).repeat(4, 1)
    zeros = torch.zeros(4 * hidden, hidden, dtype=x.dtype)
    gates = torch.ops.qfast.lstm_layer(x.reshape(1, -1, hidden), eye, zeros, zeros[:, 0].clone(), True)[2]
    return gates[0, :, :hidden].reshape(-1), gates[0, :, 2 * hidden : 3 * hidden].reshape(-1)


def ulps(found: Tensor, exact: np.ndarray) -> float:
    """Largest error in units of the last place of the exact result (of its subnormals, near zero)."""
    place = np.spacing(np.abs(exact).astype(found.numpy().dtype)).astype(np.longdouble)
    return float(np.max(np.abs(found.numpy().astype(np.longdouble) - exact) / place))


@pytest.mark.skipif(_backend.native is None, reason="the twin's activations are torch's")
@pytest.mark.parametrize("hidden", [1, 16])  # what is left of a vector; whole vectors
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_activations_within_four_ulp(dtype, hidden, isa):
    rng = np.random.default_rng(0)
    magnitude = np.concatenate([np.exp(rng.uniform(-40, 7, 120_000)), np.linspace(0, 25, 80_000)])
    x = torch.from_numpy(np.concatenate([magnitude, -magnitude])).to(dtype)
    wide = x.numpy().astype(np.longdouble)
    sigmoid, tanh = activations(x, hidden)
    with np.errstate(over="ignore"):
        assert ulps(sigmoid, 1 / (1 + np.exp(-wide))) <= 4
    assert ulps(tanh, np.tanh(wide)) <= 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_activations_at_the_ends(dtype, isa):
    x = torch.tensor([0.0, 1e5, -1e5, torch.inf, -torch.inf, torch.nan, 1e-30, -1e-30], dtype=dtype)
    sigmoid, tanh = activations(x, 1)
    assert sigmoid.tolist()[:5] == [0.5, 1.0, 0.0, 1.0, 0.0]
    assert tanh.tolist()[:5] == [0.0, 1.0, -1.0, 1.0, -1.0]
    assert torch.isnan(sigmoid[5])
    assert torch.isnan(tanh[5])
    assert torch.equal(tanh[6:], x[6:])


@pytest.mark.parametrize("name", NAMES)
def test_a_row_of_nan_stays_alone(name, isa):
    module_class, operator = OPERATORS[name]
    module = module_class(3, 20, 2, batch_first=True)
    x = torch.randn(9, 4, 3)
    clean = operator(x, layers_of(module))[1]
    x[4, 1, 2] = torch.nan
    found = operator(x, layers_of(module))[1]
    assert torch.isnan(found[4]).all()
    others = torch.arange(9) != 4
    torch.testing.assert_close(found[others], clean[others])


# ---------------------------------------------------------------- dropout, refusals, networks
@pytest.mark.parametrize("name", NAMES)
def test_dropout_draws_the_masks_of_torchs_layer(name):
    module_class, operator = OPERATORS[name]
    module = module_class(3, 8, 3, batch_first=True, dropout=0.4).double()
    x = torch.randn(11, 5, 3, dtype=torch.float64)
    torch.manual_seed(5)
    expected, after = module(x)[0], torch.get_rng_state()
    torch.manual_seed(5)
    found = operator(x, layers_of(module), dropout=0.4, training=True)[0]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(torch.get_rng_state(), after)
    module.eval()
    torch.testing.assert_close(operator(x, layers_of(module), dropout=0.4)[0], module(x)[0])


@pytest.mark.parametrize("name", NAMES)
def test_refusals(name):
    operator = OPERATORS[name][1]
    x, *weights = (a.detach() for a in layer_arguments(name, 4, 3, 2, 5))
    x, weights = x.transpose(0, 1), [*weights[:3], weights[-1]]
    with pytest.raises(ValueError, match=r"x: expected shape \[B, T, F\], got \(4, 3\)"):
        operator(x[..., 0], [weights])
    with pytest.raises(ValueError, match=r"x: expected at least one step and one feature.* got \(0, 4, 2\)"):
        operator(x[:, :0], [weights])
    with pytest.raises(ValueError, match=r"weight_ih: expected shape \(\d+, 9\), got \(\d+, 2\)"):
        operator(torch.zeros(4, 3, 9, dtype=x.dtype), [weights])
    with pytest.raises(ValueError, match=r"dtype and device of x \(torch.float32 on cpu\), got torch.float64.* Remedy"):
        operator(x.float(), [weights])
    with pytest.raises(ValueError, match=r"x: expected dtype float32 or float64, got (torch.float16|Half)"):
        operator(x.half(), [[w.half() for w in weights]])
    with pytest.raises(ValueError, match="layers: expected at least one"):
        operator(x, [])
    with pytest.raises(ValueError, match="dropout must lie in"):
        operator(x, [weights], dropout=1.5, training=True)


@pytest.mark.parametrize("name", NAMES)
def test_double_backward_is_refused_and_what_is_kept_has_no_gradient(name):
    arguments = layer_arguments(name, 2, 3, 2, 4)
    layer = getattr(torch.ops.qfast, f"{name}_layer")
    (grad,) = torch.autograd.grad(layer(*arguments, True)[1].sum(), arguments[0], create_graph=True)
    with pytest.raises(
        NotImplementedError, match=f"{name}_layer: double backward .* Remedy: torch.nn.{name.upper()}.*QFAST_BACKEND"
    ):
        grad.sum().backward()
    assert not any(kept.requires_grad for kept in layer(*arguments, True)[2:])
    with pytest.raises(ValueError, match="keep: must be true"):
        layer(*arguments, False)


@pytest.mark.parametrize("name", NAMES)
def test_forward_mode_and_transforms_are_those_of_torchs_layer(name):
    module_class, operator = OPERATORS[name]
    module = module_class(3, 7, 2, batch_first=True).double()
    x, along = torch.randn(2, 5, 4, 3, dtype=torch.float64)

    def ours(x: Tensor) -> Tensor:
        return operator(x, layers_of(module))[0]

    def theirs(x: Tensor) -> Tensor:
        return module(x)[0]

    expected = torch.func.jvp(theirs, (x,), (along,))[1]
    assert expected.norm() > 0.1
    close = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(torch.func.jvp(ours, (x,), (along,))[1], expected, **close)
    forward_ad = torch.autograd.forward_ad
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    with forward_ad.dual_level():  # nothing requires a gradient: torch would drop the tangent silently
        torch.testing.assert_close(forward_ad.unpack_dual(ours(forward_ad.make_dual(x, along)))[1], expected, **close)
    for of in (torch.func.jacrev, torch.func.jacfwd):
        torch.testing.assert_close(of(ours)(x), torch.func.jacfwd(theirs)(x), **close)

    def curvature(call, x: Tensor) -> Tensor:
        return torch.func.grad(lambda y: torch.func.grad(lambda z: call(z).square().sum())(y).square().sum())(x)

    torch.testing.assert_close(curvature(ours, x), curvature(theirs, x), **close)
    each = torch.vmap(ours)(torch.stack([x, along]))
    torch.testing.assert_close(each, torch.stack([theirs(x), theirs(along)]), **close)


@pytest.mark.parametrize("name", NAMES)
def test_vmap_over_weights_that_want_a_gradient(name):
    """An ensemble: torch's own layers have no rule for it."""
    module_class, operator = OPERATORS[name]
    modules = [module_class(3, 7, 1, batch_first=True).double() for _ in range(3)]
    x = torch.randn(5, 4, 3, dtype=torch.float64)
    each = zip(*map(_first, modules), strict=True)
    stacked = [torch.stack([w.detach() for w in same]).requires_grad_() for same in each]
    found = torch.vmap(lambda *weights: operator(x, [weights])[1])(*stacked)
    expected = torch.stack([module(x)[0][:, -1] for module in modules])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    found.square().sum().backward()
    expected.square().sum().backward()
    for i, weight in enumerate(stacked):
        wanted = torch.stack([_first(module)[i].grad for module in modules])
        torch.testing.assert_close(weight.grad, wanted, rtol=1e-11, atol=1e-12)


def _first(module: nn.RNNBase) -> list[Tensor]:
    return layers_of(module)[0]


@pytest.mark.parametrize("network", [LSTMModel, GRUModel])
def test_networks_train_alike_through_the_operator_and_through_torchs_layer(network, monkeypatch):
    model = network(d_feat=4, hidden_size=24, num_layers=2).double()
    x = torch.randn(64 * torch.get_num_threads(), 28, dtype=torch.float64)  # enough rows for the operator
    used = []
    operator = network.operator
    monkeypatch.setattr(network, "operator", staticmethod(lambda *a, **k: used.append(1) or operator(*a, **k)))
    model(x).square().sum().backward()
    found = [p.grad.clone() for p in model.parameters()]
    assert len(used) == (_backend.native is not None)
    model.zero_grad()
    calls = []
    handle = model.rnn.register_forward_hook(lambda *_: calls.append(1))  # a hook is always called
    model(x).square().sum().backward()
    handle.remove()
    assert calls == [1]
    for a, p in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("name", NAMES)
def test_any_number_of_threads(name, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        compare(name, (900, 4, 6, 64, 2))
    finally:
        torch.set_num_threads(before)
