"""A Transformer encoder with convolutions between its layers and a GRU on top, read at the last step.

Parameter names, creation order and initial weights are those of the reference (pyqlib 0.9.7,
qlib/contrib/model/pytorch_localformer.py), so state dicts travel both ways.
"""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn

from qfast.nn.plain import has_hooks
from qfast.nn.recurrent import layer_weights
from qfast.nn.transformer import WindowEncoder, run_layer
from qfast.ops import gru, window_conv

__all__ = ["Localformer", "LocalformerEncoder"]


class LocalformerEncoder(nn.Module):
    """Each layer is given the steps and their convolution; the last convolution is added to the result again."""

    def __init__(self, encoder_layer: nn.Module, num_layers: int, d_model: int) -> None:
        super().__init__()
        conv = nn.Conv1d(d_model, d_model, 3, 1, 1)
        self.layers = nn.ModuleList([copy.deepcopy(encoder_layer) for _ in range(num_layers)])
        self.conv = nn.ModuleList([copy.deepcopy(conv) for _ in range(num_layers)])
        self.num_layers = num_layers

    def forward(self, x: Tensor) -> Tensor:
        """[T, B, D] -> [T, B, D]"""
        beside = x
        for layer, conv in zip(self.layers, self.conv):  # noqa: B905 (a script knows no strict)
            beside = conv(x.permute(1, 2, 0)).permute(2, 0, 1)
            x = layer(x + beside)
        return x + beside


class Localformer(WindowEncoder):
    """Transformer encoder with local context, and a GRU over its steps (reference: pytorch_localformer.py).

    With c_i the convolution of layer i over 3 steps, and x_0 the mapped features:

        x_(i+1) = layer_i(x_i + c_i(x_i));  out = decoder_layer(last step of rnn(x_L + c_(L-1)(x_(L-1))))

    Parameters
    ----------
    d_feat, d_model, nhead, num_layers, dropout, device
        As in `Transformer`; `num_layers` is also that of the GRU.

    Notes
    -----
    As for `Transformer`; the GRU reads every step, so every layer computes all of them.

    Examples
    --------
    >>> Localformer(d_feat=6).eval()(torch.zeros(3, 360)).shape
    torch.Size([3])
    """

    def __init__(
        self,
        d_feat: int = 6,
        d_model: int = 8,
        nhead: int = 4,
        num_layers: int = 2,
        dropout: float = 0.5,
        device: Any = None,
    ) -> None:
        super().__init__(d_feat, d_model, nhead, num_layers, dropout, device)

    def _add_before(self, d_model: int, num_layers: int, dropout: float) -> None:
        # nn.GRU warns about dropout without a second layer, where it has no effect.
        between = dropout if num_layers > 1 else 0.0
        self.rnn = nn.GRU(d_model, d_model, num_layers, batch_first=False, dropout=between)

    def _build_encoder(self, d_model: int, num_layers: int) -> nn.Module:
        return LocalformerEncoder(self.encoder_layer, num_layers, d_model)

    def _encoded(self, x: Tensor) -> Tensor:
        # A script leaves the outer branch out, and so does not compile what it calls: it must stay alone.
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            takes_operators = self._is_as_built() and self._takes_operators(x, self._layers())
            if takes_operators:
                return self._by_operators(x)
        steps: Tensor = self.rnn(self.transformer_encoder(x.transpose(0, 1)))[0]
        return steps[-1]

    def _by_operators(self, x: Tensor) -> Tensor:
        encoder, beside, rnn = cast(LocalformerEncoder, self.transformer_encoder), x, self.rnn
        for layer, conv in zip(encoder.layers, encoder.conv, strict=True):
            conv = cast(nn.Conv1d, conv)
            beside = window_conv(x, conv.weight, cast(Tensor, conv.bias))
            x = run_layer(layer, x + beside, last_step=False)
        return gru(x + beside, layer_weights(rnn), dropout=rnn.dropout, training=rnn.training)[0]

    def _layers(self) -> nn.ModuleList:
        return cast(LocalformerEncoder, self.transformer_encoder).layers

    def _is_as_built(self) -> bool:
        """All but the layers, hooks and all: an operator would not do what another does."""
        encoder, rnn = self.transformer_encoder, self.rnn
        if type(encoder) is not LocalformerEncoder or has_hooks(encoder):
            return False
        if type(rnn) is not nn.GRU or rnn.batch_first or rnn.bidirectional or not rnn.bias or has_hooks(rnn):
            return False
        return all(_is_same_conv(conv) for conv in encoder.conv)


def _is_same_conv(conv: nn.Module) -> bool:
    """Centred, of whole channels, with zeros beyond the window."""
    if type(conv) is not nn.Conv1d or has_hooks(conv) or conv.bias is None or conv.padding_mode != "zeros":
        return False
    taps = conv.kernel_size[0]
    one = conv.stride == conv.dilation == (1,) and conv.groups == 1
    return one and taps % 2 == 1 and conv.padding == (taps // 2,)
