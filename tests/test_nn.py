"""Networks of qfast.nn under torch's transforms, compilers and quantisation, and with replaced layers."""

from __future__ import annotations

import copy
import pickle
import warnings

import numpy as np
import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch.func import functional_call

import qfast.nn
from qfast.errors import DataError
from qfast.nn import GRUModel, LSTMModel

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
networks = pytest.mark.parametrize("network", [LSTMModel, GRUModel])
ROWS = 300  # large enough for the operator to be faster


def by_torch(net: nn.Module, x: Tensor) -> Tensor:
    return net.fc_out(net.rnn(x)[0][:, -1]).squeeze(-1)


def case(network, dtype=torch.float64) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    x, along = torch.randn(2, ROWS, 4, 5, dtype=dtype)
    return network(5, 9, 2).to(dtype), x, along


@networks
def test_directional_derivatives_are_those_of_torchs_layer(network):
    net, x, along = case(network)
    expected = torch.func.jvp(lambda x: by_torch(net, x), (x,), (along,))[1]
    assert expected.norm() > 0.01
    torch.testing.assert_close(torch.func.jvp(net, (x,), (along,))[1], expected, rtol=1e-10, atol=1e-13)
    step = 1e-6
    slope = (net(x + step * along) - net(x - step * along)) / (2 * step)
    torch.testing.assert_close(slope, expected, rtol=1e-6, atol=1e-8)
    for frozen in (False, True):
        net.requires_grad_(not frozen)
        with torch.autograd.forward_ad.dual_level():
            result = torch.autograd.forward_ad.unpack_dual(net(torch.autograd.forward_ad.make_dual(x, along))).tangent
            torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-13)


@networks
def test_directional_derivatives_in_float32(network):
    """torch's LSTM does not support float32 here."""
    net, x, along = case(network, torch.float32)
    wide = copy.deepcopy(net).double()
    expected = torch.func.jvp(lambda x: by_torch(wide, x), (x.double(),), (along.double(),))[1]
    result = torch.func.jvp(net, (x,), (along,))[1].double()
    assert (result - expected).norm() <= 1e-5 * expected.norm()


@networks
def test_functional_gradients_are_those_of_torchs_layer(network):
    net, x, _ = case(network)
    parameters = dict(net.named_parameters())
    result = torch.func.grad(lambda p: functional_call(net, p, (x,)).square().sum())(parameters)
    by_torch(net, x).square().sum().backward()
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(result[name], parameter.grad, rtol=1e-10, atol=1e-12)


@networks
def test_an_ensemble_under_vmap(network):
    _, x, _ = case(network)
    nets = [network(5, 9, 2).double() for _ in range(3)]
    parameters, buffers = torch.func.stack_module_state(nets)
    result = torch.vmap(lambda p, b: functional_call(nets[0], (p, b), (x,)))(parameters, buffers)
    torch.testing.assert_close(result, torch.stack([by_torch(net, x) for net in nets]), rtol=1e-12, atol=1e-12)


@networks
def test_trace_and_script_keep_the_numbers(network):
    net, x, _ = case(network)
    for made in (torch.jit.trace(net, (x,)), torch.jit.script(net)):
        torch.testing.assert_close(made(x), net(x), rtol=1e-12, atol=1e-12)
        assert "qfast::" not in str(made.inlined_graph)
    flat = x.permute(0, 2, 1).flatten(1)
    torch.testing.assert_close(torch.jit.script(net)(flat), net(x), rtol=1e-12, atol=1e-12)
    with pytest.raises(torch.jit.Error, match=r"built with d_feat=5\. Remedy: d_feat=4"):
        torch.jit.script(net)(x[..., :4])


@networks
def test_an_export_has_torchs_operations_only(network):
    net, x, _ = case(network)
    program = torch.export.export(net, (x,))
    assert not [node for node in program.graph.nodes if "qfast" in str(node.target)]
    torch.testing.assert_close(program.module()(x), net(x), rtol=1e-12, atol=1e-12)


@networks
def test_compile_into_one_graph(network):
    net, x, _ = case(network)
    compiled = torch.compile(copy.deepcopy(net), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), net(x), rtol=1e-12, atol=1e-12)
    compiled(x).sum().backward()
    net(x).sum().backward()
    for a, b in zip(compiled.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-10)


@networks
def test_a_compiled_network_follows_its_layer(network):
    """The compiled code sees new weights, a replaced layer and the training mode, although it never reads `rnn`."""
    torch.compiler.reset()  # the other tests compile the same code, and the number of compilations is limited
    torch.manual_seed(0)
    net, x = network(d_feat=5, hidden_size=9, num_layers=2, dropout=0.5).double(), torch.randn(6, 4, 5).double()
    net = pickle.loads(pickle.dumps(net))
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    assert not torch.equal(compiled(x), net.eval()(x)), "training mode has dropout"
    assert torch.equal(compiled(x), net(x))
    before = net(x)
    with torch.no_grad():
        net.rnn.weight_hh_l1 *= 2
    assert torch.equal(compiled(x), net(x))
    net.rnn = network.layer(5, 9, num_layers=1, batch_first=True).double()
    result = compiled(x)
    assert torch.equal(result, net(x))
    assert not torch.equal(result, before)
    weights = {name: value.detach() / 2 for name, value in net.named_parameters()}
    expected = functional_call(net, weights, (x,))
    assert torch.equal(torch.compile(functional_call, backend="aot_eager")(net, weights, (x,)), expected)


@networks
def test_compile_after_a_library_has_replaced_the_layer(network):
    """Quantization writes to `_modules`, which does not call __setattr__."""
    net, x, _ = case(network, torch.float32)
    net.eval()(x)
    other = network.layer(5, 9, num_layers=2, batch_first=True)
    net._modules["rnn"] = other
    compiled = torch.compile(net, backend="aot_eager")
    torch.testing.assert_close(compiled(x), by_torch(net, x))


@networks
def test_dynamic_quantisation(network):
    net, x, _ = case(network, torch.float32)
    net.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        small = torch.ao.quantization.quantize_dynamic(net, {nn.LSTM, nn.GRU}, dtype=torch.qint8)
        result = small(x)
    assert type(small.rnn) is not type(net.rnn)
    assert (result - net(x)).norm() <= 0.05 * net(x).norm()


OTHERS = {
    "no-bias": {"hidden_size": 9, "bias": False},
    "bidirectional": {"hidden_size": 9, "bidirectional": True},
    "projected": {"hidden_size": 12, "proj_size": 9},
    "wider": {"hidden_size": 17},
}


@pytest.mark.parametrize("other", OTHERS)
@networks
def test_another_layer_in_place_of_rnn(network, other):
    if network is GRUModel and other == "projected":
        pytest.skip("torch's GRU has no projection")
    net, x, _ = case(network)
    net.rnn = network.layer(5, num_layers=2, batch_first=True, **OTHERS[other]).double()
    net.fc_out = nn.Linear(net.rnn(x)[0].shape[2], 1).double()
    expected = by_torch(net, x)
    torch.testing.assert_close(net(x), expected, rtol=1e-12, atol=1e-12)
    net(x).sum().backward()
    assert all(p.grad is not None for p in net.rnn.parameters() if p.numel()), "every parameter is used"


@networks
def test_a_layer_of_another_class_in_place_of_rnn(network):
    net, x, _ = case(network)
    net.rnn = nn.RNN(5, 9, batch_first=True).double()
    torch.testing.assert_close(net(x), by_torch(net, x))

    class Doubled(network.layer):
        def forward(self, x: Tensor, hx=None):
            output, state = super().forward(x, hx)
            return 2 * output, state

    net.rnn = Doubled(5, 9, batch_first=True).double()
    torch.testing.assert_close(net(x), by_torch(net, x), rtol=1e-12, atol=1e-12)


@networks
def test_other_dtypes_of_x_and_weights_are_reported(network):
    net, x, _ = case(network)
    with pytest.raises(
        DataError, match=r"x is torch.float32 but .* weights are torch.float64. Remedy: x.to\(torch.float64"
    ):
        net(x.float())


NETWORKS = {
    "LSTMModel": {"hidden_size": np.int64(8)},
    "GRUModel": {"hidden_size": np.int64(8)},
    "ALSTMModel": {"hidden_size": np.int64(8)},
    "Transformer": {"d_model": np.int64(8), "nhead": np.int64(2)},
    "Localformer": {"d_model": np.int64(8), "nhead": np.int64(2)},
}


@pytest.mark.parametrize("name", NETWORKS)
def test_sizes_of_numpy_and_a_flat_batch_of_none(name: str) -> None:
    """Sizes may be NumPy integers, as in hyper-parameter searches, and a batch may be empty."""
    network = getattr(qfast.nn, name)(d_feat=np.int64(6), num_layers=np.int64(2), **NETWORKS[name]).eval()
    assert network(torch.zeros(3, 120)).shape == (3,)
    assert network(torch.zeros(0, 120)).shape == (0,)
