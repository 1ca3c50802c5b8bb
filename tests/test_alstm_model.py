"""ALSTMModel compared with the same torch layers called one by one, in every way that a torch network is used."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch.func import functional_call

from qfast import _backend
from qfast.errors import ConfigError, DataError
from qfast.nn import ALSTMModel, alstm

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
types = pytest.mark.parametrize("rnn_type", ["GRU", "LSTM", "RNN"])


def by_torch_layers(net: ALSTMModel, x: Tensor) -> Tensor:
    steps = net.rnn(net.net(x))[0]
    pooled = (steps * net.att_net(steps)).sum(1)
    return net.fc_out(torch.cat((steps[:, -1], pooled), 1))[..., 0]


def small_network(
    rnn_type: str = "GRU", dtype: torch.dtype = torch.float64, rows: int = 40
) -> tuple[ALSTMModel, Tensor]:
    torch.manual_seed(0)
    return ALSTMModel(5, 9, 2, rnn_type=rnn_type).to(dtype), torch.randn(rows, 7, 5, dtype=dtype)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Records the shapes of the inputs of `attention_pool`."""
    from qfast.nn import alstm

    seen: list[tuple[int, ...]] = []
    inner = alstm.attention_pool
    monkeypatch.setattr(alstm, "attention_pool", lambda h, *a, **k: seen.append(tuple(h.shape)) or inner(h, *a, **k))
    return seen


# ---------------------------------------------------------------- numbers
@types
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_predictions_and_gradients_are_those_of_the_layers(rnn_type: str, dtype: torch.dtype, bound: float) -> None:
    net, x = small_network(rnn_type, dtype)
    exact, wide = copy.deepcopy(net).double(), x.double().requires_grad_()
    x.requires_grad_()
    result, expected = net(x), by_torch_layers(exact, wide)
    assert (result - expected).norm() <= bound * expected.norm()
    result.square().sum().backward()
    expected.square().sum().backward()
    pairs = [(x, wide), *zip(net.parameters(), exact.parameters(), strict=True)]
    for ours, theirs in pairs:
        assert (ours.grad.double() - theirs.grad).norm() <= 3 * bound * theirs.grad.norm()


@pytest.mark.parametrize("rnn_type", ["GRU", "LSTM"])
def test_the_network_calls_the_operators(rnn_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if _backend.native is None:
        pytest.skip("no native library")
    seen = counted(monkeypatch)
    net, x = small_network(rnn_type)
    net(x)
    assert seen == [(40, 7, 9)]


@types
@pytest.mark.parametrize("sizes", [(1, 1, 1), (3, 1, 1), (6, 2, 3), (20, 33, 1)], ids=str)
def test_sizes(rnn_type: str, sizes: tuple[int, int, int]) -> None:
    net = ALSTMModel(*sizes, rnn_type=rnn_type).double()
    for batch, steps in ((1, 1), (2, 9), (0, 4)):
        x = torch.randn(batch, steps, sizes[0], dtype=torch.float64)
        if batch == 0 and rnn_type == "RNN":
            continue  # torch's layer decides
        assert net(x).shape == (batch,)
        if batch:
            torch.testing.assert_close(net(x), by_torch_layers(net, x), rtol=1e-12, atol=1e-12)


def test_flat_windows_are_read_feature_by_feature() -> None:
    net, x = small_network()
    assert torch.equal(net(x.transpose(1, 2).reshape(40, -1)), net(x.transpose(1, 2).contiguous().transpose(1, 2)))
    with pytest.raises(DataError, match=r"built with d_feat=5\. Remedy: d_feat=4"):
        net(x[..., :4])


# ---------------------------------------------------------------- duplicate rows
@pytest.mark.parametrize("rnn_type", ["GRU", "LSTM"])
@pytest.mark.parametrize("spacing", [1, 3])
def test_windows_of_consecutive_rows_map_each_row_once(rnn_type: str, spacing: int, monkeypatch) -> None:
    net, _ = small_network(rnn_type)
    rows = torch.randn(60, 5 * spacing, dtype=torch.float64)[:, ::spacing]
    windows = rows.unfold(0, 20, 1).transpose(1, 2)
    seen: list[int] = []
    inner = alstm.linear_tanh
    monkeypatch.setattr(alstm, "linear_tanh", lambda x, *layer: (seen.append(x[..., 0].numel()), inner(x, *layer))[1])
    with torch.no_grad():
        result, expected = net(windows), net(windows.contiguous())
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-13)
    if _backend.native is not None:
        assert seen == [60, 41 * 20]
    one, same_row = windows[:1], rows[:1].unsqueeze(0).expand(6, 4, 5)
    for odd in (one, same_row, windows[:, :1]):
        with torch.no_grad():
            torch.testing.assert_close(net(odd), net(odd.contiguous()), rtol=1e-12, atol=1e-13)


@torch.no_grad()
def test_changed_parts_are_called_as_they_are() -> None:
    """Other names, another container, a hook that mixes steps, a score for each unit: the result is plain torch's."""

    class Doubled(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    def centred(_module: nn.Module, _given: object, out: Tensor) -> Tensor:
        return out - out.mean(1, keepdim=True)

    windows = torch.randn(30, 5, dtype=torch.float64).unfold(0, 8, 1).transpose(1, 2)
    for change in ("names", "container", "hook", "scores", "bias"):
        net, _ = small_network()
        if change == "names":
            net.net, net.att_net = nn.Sequential(*net.net), nn.Sequential(*net.att_net)
        elif change == "container":
            net.net, net.att_net = Doubled(*net.net), Doubled(*net.att_net)
        elif change == "hook":
            net.net.register_forward_hook(centred)
        else:
            width = net.att_net.att_fc_out.in_features
            outputs = net.rnn.hidden_size if change == "scores" else 1
            net.att_net.att_fc_out = nn.Linear(width, outputs, bias=change == "bias").double()
        expected = by_torch_layers(net, windows.contiguous())
        for arguments in (windows, windows.contiguous()):
            torch.testing.assert_close(net(arguments), expected, rtol=1e-10, atol=1e-12)


def test_windows_of_consecutive_rows_have_gradients() -> None:
    net, _ = small_network()
    rows = torch.randn(30, 5, dtype=torch.float64, requires_grad=True)
    for function in (net, lambda x: by_torch_layers(net, x)):
        function(rows.unfold(0, 8, 1).transpose(1, 2)).square().sum().backward()
    other = rows.detach().clone().requires_grad_()
    by_torch_layers(net, other.unfold(0, 8, 1).transpose(1, 2)).square().sum().backward()
    torch.testing.assert_close(rows.grad, 2 * other.grad, rtol=1e-10, atol=1e-12)


def test_a_head_that_looks_across_steps_gets_whole_windows() -> None:
    """A replaced layer may use the whole window."""

    class Centred(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x - x.mean(1, keepdim=True)

    net, _ = small_network()
    net.net.append(Centred())
    windows = torch.randn(30, 5, dtype=torch.float64).unfold(0, 8, 1).transpose(1, 2)
    with torch.no_grad():
        torch.testing.assert_close(net(windows), by_torch_layers(net, windows), rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------- changed parts
@pytest.mark.parametrize("part", ["att_fc_in", "att_act", "att_net"])
def test_hooks_inside_the_attention_are_called(part: str) -> None:
    net, x = small_network()
    called = []
    module = net.att_net if part == "att_net" else getattr(net.att_net, part)
    handle = module.register_forward_hook(lambda *_: called.append(part))
    torch.testing.assert_close(net(x), by_torch_layers(net, x), rtol=1e-12, atol=1e-12)
    assert called == [part, part]
    handle.remove()
    net(x)
    assert len(called) == 2 or _backend.native is None


def test_an_exchanged_activation_is_called() -> None:
    net, x = small_network()
    before = net(x)
    net.att_net.att_act = nn.ReLU()
    assert not torch.allclose(net(x), before)
    torch.testing.assert_close(net(x), by_torch_layers(net, x), rtol=1e-12, atol=1e-12)


def test_an_attention_without_bias_is_computed() -> None:
    net, x = small_network()
    net.att_net.att_fc_in = nn.Linear(9, 4, bias=False).double()
    torch.testing.assert_close(net(x), by_torch_layers(net, x), rtol=1e-12, atol=1e-12)


def test_an_exchanged_output_with_bias_and_a_wider_attention_are_computed() -> None:
    net, x = small_network()
    net.att_net.att_fc_in, net.att_net.att_fc_out = nn.Linear(9, 11).double(), nn.Linear(11, 1).double()
    torch.testing.assert_close(net(x), by_torch_layers(net, x), rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------- dropout
def test_dropout_counts_in_training_only_and_follows_the_generator() -> None:
    torch.manual_seed(0)
    net, x = ALSTMModel(5, 8, 1, dropout=0.5), torch.randn(30, 7, 5)
    torch.manual_seed(1)
    first, second = net(x), net(x)
    torch.manual_seed(1)
    assert torch.equal(net(x), first)
    assert not torch.equal(first, second)
    net.eval()
    assert torch.equal(net(x), net(x))
    torch.testing.assert_close(net(x), by_torch_layers(net, x), rtol=1e-5, atol=1e-6)
    net.train()
    net.att_net.eval()
    assert torch.equal(net(x), net(x))


# ---------------------------------------------------------------- arguments
@pytest.mark.parametrize("rnn_type", ["gru", "Lstm", "rnn"])
def test_the_type_may_be_written_in_any_case(rnn_type: str) -> None:
    net = ALSTMModel(rnn_type=rnn_type)
    assert type(net.rnn) is getattr(nn, rnn_type.upper())
    assert net.rnn_type == rnn_type


@pytest.mark.parametrize("rnn_type", ["LSTN", "Linear", "", None, 3])
def test_another_type_is_refused(rnn_type: object) -> None:
    with pytest.raises(ConfigError, match=r"rnn_type must be one of \['GRU', 'LSTM', 'RNN'\], got"):
        ALSTMModel(rnn_type=rnn_type)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Did you mean 'LSTM'"):
        ALSTMModel(rnn_type="LSTN")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"hidden_size": 0}, "hidden_size"), ({"d_feat": 2.5}, "d_feat"), ({"dropout": 2.0}, "dropout must be in")],
)
def test_wrong_sizes_are_reported(wrong: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ALSTMModel(**wrong)  # type: ignore[arg-type]


# ---------------------------------------------------------------- in torch: compile, export, transforms
@types
def test_trace_script_and_export_hold_torchs_operations_only(rnn_type: str) -> None:
    net, x = small_network(rnn_type)
    expected = by_torch_layers(net, x)
    for made in (torch.jit.trace(net, (x,)), torch.jit.script(net)):
        torch.testing.assert_close(made(x), expected, rtol=1e-12, atol=1e-12)
        assert "qfast::" not in str(made.inlined_graph)
    program = torch.export.export(net, (x,))
    assert "qfast" not in str(program.graph)
    torch.testing.assert_close(program.module()(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rnn_type", ["GRU", "LSTM"])
def test_compile_into_one_graph(rnn_type: str) -> None:
    net, x = small_network(rnn_type)
    compiled = torch.compile(copy.deepcopy(net), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), net(x), rtol=1e-12, atol=1e-12)
    compiled(x).sum().backward()
    net(x).sum().backward()
    for a, b in zip(compiled.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("rnn_type", ["GRU", "LSTM"])
def test_transforms(rnn_type: str) -> None:
    net, x = small_network(rnn_type)
    along = torch.randn_like(x)
    expected = torch.func.jvp(lambda x: by_torch_layers(net, x), (x,), (along,))[1]
    torch.testing.assert_close(torch.func.jvp(net, (x,), (along,))[1], expected, rtol=1e-10, atol=1e-13)
    result = torch.func.grad(lambda p: functional_call(net, p, (x,)).square().sum())(dict(net.named_parameters()))
    by_torch_layers(net, x).square().sum().backward()
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(result[name], parameter.grad, rtol=1e-10, atol=1e-12)
    others = [copy.deepcopy(net) for _ in range(2)]
    parameters, buffers = torch.func.stack_module_state(others)
    ensemble = torch.vmap(lambda p, b: functional_call(net, (p, b), (x,)))(parameters, buffers)
    torch.testing.assert_close(ensemble, torch.stack([by_torch_layers(net, x)] * 2), rtol=1e-12, atol=1e-12)


def test_autocast() -> None:
    net, x = small_network(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = net(x)
    assert (result.float() - by_torch_layers(net, x)).norm() <= 0.05 * by_torch_layers(net, x).norm() + 0.02


def test_dynamic_quantisation() -> None:
    net, x = small_network(dtype=torch.float32)
    net.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        small = torch.ao.quantization.quantize_dynamic(net, {nn.GRU, nn.Linear}, dtype=torch.qint8)
        result = small(x)
    assert type(small.att_net.att_fc_in) is not nn.Linear
    assert (result - net(x)).norm() <= 0.1 * net(x).norm() + 0.02


def test_it_is_copied_and_pickled_after_a_forward() -> None:
    net, x = small_network()
    expected = net(x)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(other(x), expected)


# ---------------------------------------------------------------- compared with Qlib
@pytest.mark.parametrize("suffix", ["", "_ts"])
@pytest.mark.parametrize("rnn_type", ["GRU", "lstm", "RNN"])
@pytest.mark.parametrize("sizes", [(6, 64, 2), (20, 5, 1)], ids=str)
def test_weights_names_and_values_equal_qlib(suffix: str, rnn_type: str, sizes: tuple[int, int, int]) -> None:
    import importlib

    pytest.importorskip("qlib", reason="pyqlib is the oracle; install qfast-models[qlib]")
    theirs = importlib.import_module(f"qlib.contrib.model.pytorch_alstm{suffix}").ALSTMModel
    torch.manual_seed(5)
    qlib_network, after = theirs(*sizes, rnn_type=rnn_type), torch.get_rng_state()
    torch.manual_seed(5)
    net = ALSTMModel(*sizes, rnn_type=rnn_type)
    assert torch.equal(torch.get_rng_state(), after)
    expected = qlib_network.state_dict()
    assert list(net.state_dict()) == list(expected)
    assert all(torch.equal(value, expected[key]) for key, value in net.state_dict().items())
    x = torch.randn(21, 12, sizes[0], dtype=torch.float64)
    arguments = x if suffix else x.transpose(1, 2).reshape(21, -1)
    qlib_network.double().load_state_dict(net.double().state_dict())
    result, numbers = net(arguments), qlib_network(arguments)
    assert (result - numbers).norm() <= 1e-12 * numbers.norm()
    assert net(arguments[:1]).shape == qlib_network(arguments[:1]).shape == (1,)
    result.square().sum().backward()
    numbers.square().sum().backward()
    for ours, other in zip(net.parameters(), qlib_network.parameters(), strict=True):
        assert (ours.grad - other.grad).norm() <= 1e-12 * other.grad.norm()
