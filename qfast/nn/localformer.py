"""A Transformer encoder with convolutions between its layers and a GRU on top, which predicts from the last step.

Parameter names, creation order and initial weights match Qlib (pyqlib 0.9.7,
qlib/contrib/model/pytorch_localformer.py), so state dicts can be exchanged in both directions.
"""

from __future__ import annotations

import copy
from typing import cast

import torch
from torch import Tensor, nn

from qfast.nn.plain import has_hooks
from qfast.nn.recurrent_layer import HasRecurrentLayer
from qfast.nn.transformer import WindowEncoder, run_layer
from qfast.ops import gru, window_conv

__all__ = ["Localformer", "LocalformerEncoder"]


class LocalformerEncoder(nn.Module):
    """Stack of encoder layers. Each layer reads the sum of the steps and their convolution over 3 steps.

    The output of the last convolution is also added to the result of the last layer.

    Parameters
    ----------
    encoder_layer : nn.Module
        Copied num_layers times.
    num_layers : int
        L.
    d_model : int
        D, the number of features.

    Examples
    --------
    >>> layer = nn.TransformerEncoderLayer(d_model=8, nhead=2)
    >>> LocalformerEncoder(layer, num_layers=2, d_model=8)(torch.zeros(20, 3, 8)).shape
    torch.Size([20, 3, 8])
    """

    def __init__(self, encoder_layer: nn.Module, num_layers: int, d_model: int) -> None:
        super().__init__()
        conv = nn.Conv1d(d_model, d_model, 3, 1, 1)
        self.layers = nn.ModuleList([copy.deepcopy(encoder_layer) for _ in range(num_layers)])
        self.conv = nn.ModuleList([copy.deepcopy(conv) for _ in range(num_layers)])
        self.num_layers = num_layers

    def forward(self, x: Tensor) -> Tensor:
        """Encode [T, B, D] -> [T, B, D]."""
        context = x
        for layer, conv in zip(self.layers, self.conv):  # noqa: B905 (TorchScript has no zip(strict=True))
            context = conv(x.permute(1, 2, 0)).permute(2, 0, 1)
            x = layer(x + context)
        return x + context


class Localformer(HasRecurrentLayer, WindowEncoder):
    """Transformer encoder with local context and a GRU over its steps (Qlib: pytorch_localformer.py).

    With x_0 the projected features plus positions and c_i the convolution of layer i over 3 steps:

        x_(i+1) = layer_i(x_i + c_i(x_i))
        out = decoder_layer(last step of rnn(x_L + c_(L-1)(x_(L-1))))

    Parameters
    ----------
    d_feat, d_model, nhead, num_layers, dropout, device, precision
        As in `Transformer`. The GRU also has num_layers layers.

    Raises
    ------
    ConfigError
        As in `Transformer`.

    Notes
    -----
    The notes of `Transformer` also apply here, except that every layer computes all steps, because the GRU reads them.

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
        device: torch.device | str | int | None = None,
        *,
        precision: str = "float32",
    ) -> None:
        super().__init__(d_feat, d_model, nhead, num_layers, dropout, device, precision)

    def _add_first(self, d_model: int, num_layers: int, dropout: float) -> None:
        # torch warns about dropout in a single recurrent layer, where it has no effect.
        between_layers = dropout if num_layers > 1 else 0.0
        self.rnn = nn.GRU(d_model, d_model, num_layers, batch_first=False, dropout=between_layers)

    def _build_encoder(self, d_model: int, num_layers: int) -> nn.Module:
        return LocalformerEncoder(self.encoder_layer, num_layers, d_model)

    def _encode(self, x: Tensor) -> Tensor:
        # The scripting check must be the whole condition: see Recurrent._last_step.
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            uses_operators = self._is_as_built() and self._uses_operators(x, self._layers())
            if uses_operators:
                return self._encode_by_operators(x)
        steps: Tensor = self.rnn(self.transformer_encoder(x.transpose(0, 1)))[0]
        return steps[-1]

    def _encode_by_operators(self, x: Tensor) -> Tensor:
        """Compute `_encode` with qfast's operators."""
        encoder = cast(LocalformerEncoder, self.transformer_encoder)
        context = x
        for layer, module in zip(encoder.layers, encoder.conv, strict=True):
            conv = cast(nn.Conv1d, module)
            context = window_conv(x, conv.weight, cast(Tensor, conv.bias), precision=self.precision)
            x = run_layer(layer, x + context, last_step=False, precision=self.precision)
        weights, dropout, training = self._layer_arguments()
        return gru(x + context, weights, dropout=dropout, training=training, precision=self.precision)[0]

    def _layers(self) -> nn.ModuleList:
        """Return the encoder layers."""
        return cast(LocalformerEncoder, self.transformer_encoder).layers

    def _is_as_built(self) -> bool:
        """Return whether the encoder, its convolutions and the GRU are unchanged; an operator would not call others.

        `_uses_operators` checks the encoder layers.
        """
        encoder = self.transformer_encoder
        if type(encoder) is not LocalformerEncoder or has_hooks(encoder):
            return False
        return self._layer_is_built() and all(_is_window_conv(conv) for conv in encoder.conv)

    def _is_built_layer(self, rnn: nn.Module) -> bool:
        if type(rnn) is not nn.GRU or rnn.batch_first or rnn.bidirectional or not rnn.bias:
            return False
        return not has_hooks(rnn)


def _is_window_conv(conv: nn.Module) -> bool:
    """Return whether `window_conv` computes this module: a centred, dense convolution with zero padding."""
    if type(conv) is not nn.Conv1d or has_hooks(conv) or conv.bias is None or conv.padding_mode != "zeros":
        return False
    kernel_size = conv.kernel_size[0]
    is_dense = conv.stride == conv.dilation == (1,) and conv.groups == 1
    return is_dense and kernel_size % 2 == 1 and conv.padding == (kernel_size // 2,)
