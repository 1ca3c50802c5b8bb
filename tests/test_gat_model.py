"""GATModel compared with pyqlib's and with the formula, and under torch's transforms and compilers."""

from __future__ import annotations

import copy
import importlib
import pickle
from itertools import pairwise

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch.func import functional_call

from qfast.errors import ConfigError, DataError
from qfast.nn import GATModel

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
bases = pytest.mark.parametrize("base", ["GRU", "LSTM"])
DAYS = torch.tensor([0, 3, 3, 4, 20])


def dense(net: GATModel, x: Tensor) -> Tensor:
    """One day by torch's layers and the formula of the docstring."""
    hidden = net.rnn(x)[0][:, -1]
    z = net.transformation(hidden)
    a_key, a_query = net.a[:, 0].chunk(2)
    weights = nn.functional.leaky_relu((z @ a_query)[:, None] + (z @ a_key)[None, :], 0.01).softmax(1)
    return net.fc_out(nn.functional.leaky_relu(net.fc(hidden + weights @ hidden), 0.01)).squeeze(-1)


def case(base: str, dtype=torch.float64, rows: int = 20) -> tuple[GATModel, Tensor]:
    torch.manual_seed(0)
    return GATModel(5, 9, 2, base_model=base).to(dtype), torch.randn(rows, 4, 5, dtype=dtype)


def qlib_network(suffix: str, base: str, **sizes) -> nn.Module:
    pytest.importorskip("qlib", reason="pyqlib is the oracle; install qfast-models[qlib]")
    result = importlib.import_module(f"qlib.contrib.model.pytorch_gats{suffix}")
    return result.GATModel(base_model=base, **sizes)


# ---------------------------------------------------------------- compared with Qlib
@pytest.mark.parametrize("suffix", ["", "_ts"])
@bases
def test_initial_weights_and_generator_equal_qlib(base, suffix):
    sizes = {"d_feat": 4, "hidden_size": 7, "num_layers": 2}
    torch.manual_seed(3)
    expected = qlib_network(suffix, base, **sizes).state_dict()
    after = torch.get_rng_state()
    torch.manual_seed(3)
    result = GATModel(base_model=base, **sizes).state_dict()
    assert torch.equal(torch.get_rng_state(), after)
    assert list(result) == list(expected)
    assert all(torch.equal(result[key], expected[key]) for key in expected)


@pytest.mark.parametrize("stocks", [2, 7, 300])
@pytest.mark.parametrize("suffix", ["", "_ts"])
@bases
def test_outputs_and_gradients_equal_qlib(base, suffix, stocks):
    """Qlib's network in float64 is exact. Its float32 errors show the cost of cancellation."""
    torch.manual_seed(0)
    theirs = qlib_network(suffix, base, d_feat=6, hidden_size=64)
    for p in (theirs.a, *theirs.rnn.parameters()):  # states as wide as trained ones, scores on both sides of the bend
        p.data *= 4
    ours = GATModel(6, base_model=base)
    ours.load_state_dict(theirs.state_dict())
    x, along = torch.randn(stocks, 20, 6), torch.randn(stocks)
    expected = results(theirs, x, along, torch.float64, flat=not suffix)
    for flat in (True, False):  # either layout
        for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
            result = results(ours, x, along, dtype, flat)
            usual = results(theirs, x, along, dtype, flat=not suffix)
            for name, value in expected.items():
                # Adding a number to all keys has an effect only on scores that cross the bend.
                scale = expected["transformation.weight" if name == "transformation.bias" else name].norm()
                allowed = max(tolerance * scale, 4 * (usual[name] - value).norm())
                assert (result[name] - value).norm() <= allowed, (name, dtype)


def results(net: nn.Module, x: Tensor, along: Tensor, dtype: torch.dtype, flat: bool) -> dict[str, Tensor]:
    """Output and gradients, in float64."""
    net = copy.deepcopy(net).to(dtype)
    out = net((x.permute(0, 2, 1).reshape(len(x), -1) if flat else x).to(dtype))
    (out @ along.to(dtype)).backward()
    return {"out": out.detach().double(), **{name: p.grad.double() for name, p in net.named_parameters()}}


# ---------------------------------------------------------------- days
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@bases
def test_days_in_one_call_are_the_days_alone(base, dtype):
    net, x = case(base, dtype)
    expected = torch.cat([dense(net, x[a:b]) for a, b in pairwise(DAYS)])
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-13}
    torch.testing.assert_close(net(x, DAYS), expected, **tolerance)
    torch.testing.assert_close(net(x), dense(net, x), **tolerance)
    assert net(x[:1]).shape == (1,)
    torch.testing.assert_close(net(x[:1]), dense(net, x[:1]), **tolerance)


@bases
def test_a_non_finite_day_affects_no_other(base):
    net, x = case(base)
    spoilt = x.clone()
    spoilt[2, 1, 1] = torch.nan
    result, expected = net(spoilt, DAYS), net(x, DAYS)
    assert result[:3].isnan().all()
    torch.testing.assert_close(result[3:], expected[3:], rtol=0, atol=0)


@bases
def test_scores_are_those_of_the_formula(base):
    net, x = case(base)
    z = net.transformation(net.rnn(x)[0][:, -1])
    query, key = net.scores(x)
    torch.testing.assert_close(query, z @ net.a[9:, 0], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(key, z @ net.a[:9, 0], rtol=1e-12, atol=1e-13)


def test_wrong_arguments_are_named():
    with pytest.raises(ConfigError, match=r"base_model must be one of \['GRU', 'LSTM'\], got 'RNN'\."):
        GATModel(base_model="RNN")
    with pytest.raises(ConfigError, match=r"got 'lstm'\. Did you mean 'LSTM'\?"):
        GATModel(base_model="lstm")
    with pytest.raises(ConfigError, match=r"base_model must be one of .* got None"):
        GATModel(base_model=None)
    with pytest.raises(ConfigError, match="hidden_size must be a whole number of at least 1"):
        GATModel(hidden_size=0)
    net, x = case("GRU")
    with pytest.raises(DataError, match="offsets: must run from 0 to N = 20, got 0 to 19"):
        net(x, torch.tensor([0, 19]))
    with pytest.raises(DataError, match=r"x has 4 features .* built with d_feat=5"):
        net(x[..., :4])


# ---------------------------------------------------------------- copies, transforms, compilers
@bases
def test_it_is_copied_and_pickled_after_a_forward(base):
    """Qlib's module stores a tensor of the autograd graph, so deepcopy fails."""
    net, x = case(base)
    expected = net(x, DAYS)
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        torch.testing.assert_close(twin(x, DAYS), expected, rtol=0, atol=0)


@bases
def test_functional_gradients(base):
    net, x = case(base)
    result = torch.func.grad(lambda p: functional_call(net, p, (x, DAYS)).square().sum())(dict(net.named_parameters()))
    net(x, DAYS).square().sum().backward()
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(result[name], parameter.grad, rtol=1e-9, atol=1e-12)


@bases
def test_directional_derivatives(base):
    net, x = case(base)
    along, step = torch.randn_like(x), 1e-6
    slope = (net(x + step * along, DAYS) - net(x - step * along, DAYS)) / (2 * step)
    result = torch.func.jvp(lambda x: net(x, DAYS), (x,), (along,))[1]
    torch.testing.assert_close(result, slope, rtol=1e-6, atol=1e-8)


@bases
def test_trace_and_script_keep_the_numbers(base):
    net, x = case(base)
    scripted = torch.jit.script(net)
    traced = torch.jit.trace(net, (x,))
    for made in (scripted, traced):
        for rows in (20, 7, 1):
            torch.testing.assert_close(made(x[:rows]), net(x[:rows]), rtol=1e-12, atol=1e-12)
        assert "qfast::" not in str(made.inlined_graph)
    torch.testing.assert_close(scripted(x, DAYS), net(x, DAYS), rtol=1e-12, atol=1e-12)


@bases
def test_export_keeps_the_numbers(base):
    net, x = case(base)
    program = torch.export.export(net, (x,))
    torch.testing.assert_close(program.module()(x), net(x), rtol=1e-12, atol=1e-12)


@bases
def test_compile_into_one_graph(base):
    net, x = case(base)
    compiled = torch.compile(copy.deepcopy(net), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, DAYS), net(x, DAYS), rtol=1e-12, atol=1e-12)
    compiled(x, DAYS).sum().backward()
    net(x, DAYS).sum().backward()
    for a, b in zip(compiled.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("base", ["LSTM", "GRU"])
def test_half_precision(base: str) -> None:
    torch.manual_seed(0)
    network, x, days = GATModel(d_feat=6, hidden_size=16, base_model=base), torch.randn(9, 60), torch.tensor([0, 4, 9])
    expected = network(x, days)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = network(x, days)
    result.float().sum().backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in network.parameters())
    torch.testing.assert_close(result.float(), expected, rtol=0.1, atol=0.05)
    narrow = network.bfloat16()(x.bfloat16(), days)
    assert narrow.dtype == torch.bfloat16
    torch.testing.assert_close(narrow.float(), expected, rtol=0.1, atol=0.05)
