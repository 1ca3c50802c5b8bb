"""The parts of Localformer that Transformer lacks: convolutions between the layers and a GRU on top."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from qfast.nn import Localformer, localformer
from support.operator_case import relative_error
from support.transformer import F32, F64, NATIVE, by_torch_layers, gradients, small_network

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the operators in the order of their calls."""
    calls: list[str] = []
    for name in ("window_conv", "run_layer", "gru"):
        inner = getattr(localformer, name)

        def counted(*arguments: object, name: str = name, inner: Callable = inner, **options: object) -> object:
            calls.append(name)
            return inner(*arguments, **options)

        monkeypatch.setattr(localformer, name, counted)
    return calls


def by_hand(net: Localformer, x: Tensor) -> Tensor:
    """The definition step by step, with torch's layers and GRU cell."""
    values = net.feature_layer(x) + net.pos_encoder.pe[: x.shape[1], 0]
    for layer, conv in zip(net.transformer_encoder.layers, net.transformer_encoder.conv, strict=True):
        padded = nn.functional.pad(values, (0, 0, 1, 1))
        convolved = conv.bias + sum(
            padded[:, k : k + x.shape[1]] @ conv.weight[:, :, k].t() for k in range(conv.weight.shape[2])
        )
        values = layer((values + convolved).transpose(0, 1)).transpose(0, 1)
    values = values + convolved  # the last convolution is added once more
    for i in range(net.rnn.num_layers):
        cell = nn.GRUCell(values.shape[2], values.shape[2]).double()
        for name, p in cell.named_parameters():
            p.data.copy_(getattr(net.rnn, f"{name}_l{i}"))
        state, steps = torch.zeros_like(values[:, 0]), []
        for t in range(x.shape[1]):
            state = cell(values[:, t], state)
            steps.append(state)
        values = torch.stack(steps, 1)
    return net.decoder_layer(values[:, -1])[:, 0]


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_the_definition(steps: int) -> None:
    net, _ = small_network(Localformer)
    x = torch.randn(6, steps, 5, dtype=F64)
    torch.testing.assert_close(net(x), by_hand(net, x), rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(net.to_reference()(x), by_hand(net, x), rtol=1e-11, atol=1e-12)


def test_one_operator_after_the_other(seen: list[str]) -> None:
    if not NATIVE:
        pytest.skip("no native library")
    net, x = small_network(Localformer)
    net(x)
    assert seen == ["window_conv", "run_layer", "window_conv", "run_layer", "gru"]


def test_the_convolutions_start_equal_and_train_separately() -> None:
    net, x = small_network(Localformer)
    first, second = net.transformer_encoder.conv
    assert torch.equal(first.weight, second.weight)
    assert first.weight is not second.weight
    of = gradients(net, net(x))
    names = [f"transformer_encoder.conv.{i}.weight" for i in (0, 1)]
    assert relative_error(of[names[0]], of[names[1]]) > 0.1


def test_dropout_is_between_the_layers_of_the_gru() -> None:
    assert Localformer(num_layers=3, dropout=0.3).rnn.dropout == 0.3
    assert Localformer(num_layers=1, dropout=0.3).rnn.dropout == 0.0
    net, x = small_network(Localformer, F32, dropout=0.5)
    net.transformer_encoder.eval()
    torch.manual_seed(1)
    first, second = net(x), net(x)
    assert not torch.allclose(first, second)
    net.rnn.eval()
    torch.testing.assert_close(net(x), by_torch_layers(net, x), rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- changed networks
def _conv_hook(net: Localformer) -> None:
    net.transformer_encoder.conv[1].register_forward_hook(lambda module, _, out: out * 2)


def _padding_mode(net: Localformer) -> None:
    net.transformer_encoder.conv[0] = nn.Conv1d(8, 8, 3, padding=1, padding_mode="circular").double()


def _dilation(net: Localformer) -> None:
    net.transformer_encoder.conv[0] = nn.Conv1d(8, 8, 3, padding=2, dilation=2).double()


def _groups(net: Localformer) -> None:
    net.transformer_encoder.conv[0] = nn.Conv1d(8, 8, 3, padding=1, groups=2).double()


def _no_bias(net: Localformer) -> None:
    net.transformer_encoder.conv[1].bias = None


def _even_taps(net: Localformer) -> None:
    net.transformer_encoder.conv[1] = nn.Conv1d(8, 8, 4, padding="same").double()


def _same_by_name(net: Localformer) -> None:
    net.transformer_encoder.conv[1] = nn.Conv1d(8, 8, 3, padding="same").double()


def _other_convolution(net: Localformer) -> None:
    net.transformer_encoder.conv[1] = nn.Sequential(net.transformer_encoder.conv[1], nn.Tanh())


def _rnn_hook(net: Localformer) -> None:
    net.rnn.register_forward_pre_hook(lambda module, arguments: (arguments[0] * 2,))


def _lstm(net: Localformer) -> None:
    net.rnn = nn.LSTM(8, 8, 2).double()


def _no_rnn_bias(net: Localformer) -> None:
    net.rnn = nn.GRU(8, 8, 2, bias=False).double()


def _both_directions(net: Localformer) -> None:
    net.rnn = nn.GRU(8, 4, 2, bidirectional=True).double()


CHANGES = [
    _conv_hook,
    _padding_mode,
    _dilation,
    _groups,
    _no_bias,
    _even_taps,
    _same_by_name,
    _other_convolution,
    _rnn_hook,
    _lstm,
    _no_rnn_bias,
    _both_directions,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changed_networks_are_computed_as_they_are(change: Callable, seen: list[str]) -> None:
    net, x = small_network(Localformer)
    before = net(x)
    seen.clear()
    torch.manual_seed(4)
    change(net)
    result = net(x)
    assert seen == []
    assert not torch.allclose(result, before, rtol=1e-9)  # the change counts
    torch.testing.assert_close(result, by_torch_layers(net, x), rtol=1e-11, atol=1e-12)


def test_parts_that_are_replaced_by_the_same_kind_count(seen: list[str]) -> None:
    """Five taps or a wider GRU of one layer: the operators use the new layers."""
    net, x = small_network(Localformer)
    torch.manual_seed(4)
    net.transformer_encoder.conv[0] = nn.Conv1d(8, 8, 5, padding=2).double()
    net.rnn, net.decoder_layer = nn.GRU(8, 12).double(), nn.Linear(12, 1).double()
    exact = copy.deepcopy(net)
    result, expected = net(x), by_torch_layers(exact, x)
    torch.testing.assert_close(result, expected, rtol=1e-11, atol=1e-12)
    assert len(seen) == 5 * NATIVE
    of_ours, of_theirs = gradients(net, result), gradients(exact, expected)
    assert all(relative_error(of_ours[name], value) < 1e-11 for name, value in of_theirs.items())
