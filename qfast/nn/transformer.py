"""A Transformer encoder that predicts from the last step of a window.

Parameter names, creation order and initial weights match Qlib (pyqlib 0.9.7,
qlib/contrib/model/pytorch_transformer.py), so state dicts can be exchanged in both directions.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn

from qfast.errors import ConfigError, DataError, whole_number
from qfast.nn.plain import PlainTorch, check_dtype, has_hooks
from qfast.nn.recurrent import as_windows
from qfast.ops import encoder_layer

MAX_STEPS = 1000  # length of Qlib's table of positions

__all__ = ["PositionalEncoding", "Transformer", "WindowEncoder"]


class PositionalEncoding(nn.Module):
    """Add sinusoidal positions to the features of each step (Vaswani et al. 2017; Qlib: pytorch_transformer.py).

    Features 2k and 2k + 1 of step t get sin(t / 10000^(2k / D)) and the cosine of the same angle.

    Parameters
    ----------
    d_model : int
        D, an even number.
    max_len : int
        Largest number of steps.

    Examples
    --------
    >>> PositionalEncoding(4)(torch.zeros(2, 1, 4))[0, 0].tolist()
    [0.0, 1.0, 0.0, 1.0]
    """

    def __init__(self, d_model: int, max_len: int = MAX_STEPS) -> None:
        super().__init__()
        position = torch.arange(max_len, dtype=torch.float).unsqueeze(1)
        rate = torch.exp(torch.arange(0, d_model, 2).float() * (-math.log(10000.0) / d_model))
        pe = torch.zeros(max_len, d_model)
        pe[:, 0::2] = torch.sin(position * rate)
        pe[:, 1::2] = torch.cos(position * rate)
        self.register_buffer("pe", pe.unsqueeze(1))

    def forward(self, x: Tensor) -> Tensor:
        """Add positions to [T, B, D] -> [T, B, D]."""
        positions: Tensor = self.pe  # type: ignore[assignment]
        return x + positions[: len(x)]


class WindowEncoder(PlainTorch):
    """Base class of Transformer and Localformer: a projection to D features, positions, an encoder and one output.

    Subclasses build the encoder in `_build_encoder` and run it in `_encode`. They may register modules before all
    others in `_add_first`.

    Parameters
    ----------
    d_feat, d_model, nhead, num_layers, dropout, device, precision
        As in `Transformer`.

    Raises
    ------
    ConfigError
        As in `Transformer`.
    """

    def __init__(
        self,
        d_feat: int,
        d_model: int,
        nhead: int,
        num_layers: int,
        dropout: float,
        device: torch.device | str | int | None,
        precision: str,
    ) -> None:
        super().__init__(precision)
        d_feat = whole_number("d_feat", d_feat)
        d_model = whole_number("d_model", d_model)
        nhead = whole_number("nhead", nhead)
        num_layers = whole_number("num_layers", num_layers)
        if d_model % 2:
            raise ConfigError(
                f"d_model must be even, because positions are pairs of sine and cosine, got {d_model}. "
                f"Remedy: d_model={d_model + 1}."
            )
        if d_model % nhead:
            divisors = [n for n in range(1, d_model + 1) if d_model % n == 0]
            raise ConfigError(f"nhead must divide d_model={d_model}, got {nhead}. Remedy: one of {divisors}.")
        if not 0.0 <= float(dropout) <= 1.0:
            raise ConfigError(f"dropout must be in [0, 1], got {dropout!r}.")
        self._add_first(d_model, num_layers, float(dropout))
        self.feature_layer = nn.Linear(d_feat, d_model)
        self.pos_encoder = PositionalEncoding(d_model)
        # The template that the encoder's layers are copied from. As in Qlib, forward does not use it.
        self.encoder_layer = nn.TransformerEncoderLayer(d_model=d_model, nhead=nhead, dropout=float(dropout))
        self.transformer_encoder = self._build_encoder(d_model, num_layers)
        self.decoder_layer = nn.Linear(d_model, 1)
        self.device = device
        self.d_feat = d_feat

    def _add_first(self, d_model: int, num_layers: int, dropout: float) -> None:
        """Register the modules whose initial weights Qlib draws before all others."""

    def _build_encoder(self, d_model: int, num_layers: int) -> nn.Module:
        """Return the encoder, whose layers are copies of `encoder_layer`."""
        raise NotImplementedError

    def _encode(self, x: Tensor) -> Tensor:
        """Encode [B, T, D] and return the last step [B, D]."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Predict from [B, T, F] or [B, F*T] -> [B]. A batch of one also returns [1], where Qlib returns a scalar.

        Raises
        ------
        DataError
            If the shape does not match d_feat, T is 0 or more than 1000, or the dtype differs from the weights'.
        """
        x = as_windows(x, self.d_feat)
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            self._check(x)
        projected = self.pos_encoder(self.feature_layer(x).transpose(0, 1)).transpose(0, 1)
        prediction: Tensor = self.decoder_layer(self._encode(projected)).squeeze(-1)
        return prediction

    def _check(self, x: Tensor) -> None:
        """Raise DataError with a remedy where torch's layers would fail with a less helpful message or return NaN."""
        if x.shape[1] > MAX_STEPS:
            raise DataError(
                f"x has {x.shape[1]} steps, but there are positions for {MAX_STEPS}. Remedy: a step_len of at most "
                f"{MAX_STEPS}, or check d_feat={self.d_feat} if x is flat."
            )
        if x.shape[1] == 0:
            raise DataError(
                f"x has no steps: its shape is {list(x.shape)}, expected [B, T, F] with T of at least 1. "
                "Remedy: a step_len of at least 1."
            )
        weight = getattr(self.feature_layer, "weight", None)
        if isinstance(weight, Tensor) and not torch.is_autocast_enabled(x.device.type):
            check_dtype(x, weight)

    def _uses_operators(self, x: Tensor, layers: nn.ModuleList) -> bool:
        """Return whether qfast's operators compute the encoder layers on x: the layers must be unchanged."""
        if len(layers) == 0 or not all(_is_plain_layer(layer) for layer in layers):
            return False
        return self._can_use_operator(x, cast(nn.TransformerEncoderLayer, layers[0]).linear1.weight)


class Transformer(WindowEncoder):
    """Transformer encoder that predicts from the last step (Vaswani et al. 2017; Qlib: pytorch_transformer.py).

    Parameters
    ----------
    d_feat, d_model, nhead, num_layers : int
        F, D, number of heads and L. D must be even and a multiple of nhead. The feed-forward blocks have 2048 units.
    dropout : float
        Probability of dropout in the encoder layers, in training only.
    device : torch.device, str or int, optional
        Stored but not used, as in Qlib. Use `.to(device)` to move the network.
    precision : {"float32", "bf16", "bf16-if-available"}
        Precision of the operators' products on a CPU (docs/precision.md). It is not part of the state dict.

    Raises
    ------
    ConfigError
        If a size is not an integer of at least 1, d_model is odd, nhead does not divide d_model, dropout is outside
        [0, 1], or precision is unknown.

    Notes
    -----
    `qfast.ops.encoder_layer` computes the layers on the CPU and, with QFAST_CUDA_LAYERS=qfast, on CUDA. It computes
    the last layer for the last step only. torch's layers are used instead if a layer was changed or hooked, and under
    torch.jit, torch.export, autocast and `to_reference()`.

    As in Qlib, the state dict contains `encoder_layer.*`, which nothing uses and which gets no gradient.

    Examples
    --------
    >>> Transformer(d_feat=6).eval()(torch.zeros(3, 360)).shape
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

    def _build_encoder(self, d_model: int, num_layers: int) -> nn.Module:
        return nn.TransformerEncoder(self.encoder_layer, num_layers, enable_nested_tensor=False)

    def _encode(self, x: Tensor) -> Tensor:
        # The scripting check must be the whole condition: see Recurrent._last_step.
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            uses_operators = self._is_as_built() and self._uses_operators(x, self._layers())
            if uses_operators:
                return self._encode_by_operators(x)
        steps: Tensor = self.transformer_encoder(x.transpose(0, 1))
        return steps[-1]

    def _encode_by_operators(self, x: Tensor) -> Tensor:
        """Compute `_encode` with qfast's operators, the last layer at the last step only."""
        layers = self._layers()
        for number, layer in enumerate(layers, 1):
            x = run_layer(layer, x, last_step=number == len(layers), precision=self.precision)
        return x

    def _layers(self) -> nn.ModuleList:
        """Return the encoder layers."""
        return cast(nn.TransformerEncoder, self.transformer_encoder).layers

    def _is_as_built(self) -> bool:
        """Return whether the encoder is unchanged apart from its layers, which `_uses_operators` checks."""
        encoder = self.transformer_encoder
        return type(encoder) is nn.TransformerEncoder and encoder.norm is None and not has_hooks(encoder)


def run_layer(layer: nn.Module, x: Tensor, last_step: bool, precision: str = "float32") -> Tensor:
    """Compute one of torch's encoder layers with qfast's operator.

    Parameters
    ----------
    layer : nn.TransformerEncoderLayer
    x : Tensor [B, T, D]
    last_step : bool
        Compute the last step only.
    precision : str
        As in `encoder_layer`.

    Returns
    -------
    Tensor [B, T, D], or [B, D] with `last_step`
    """
    layer = cast(nn.TransformerEncoderLayer, layer)
    attention = layer.self_attn
    weights = [
        attention.in_proj_weight,
        attention.in_proj_bias,
        attention.out_proj.weight,
        attention.out_proj.bias,
        layer.linear1.weight,
        layer.linear1.bias,
        layer.linear2.weight,
        layer.linear2.bias,
        layer.norm1.weight,
        layer.norm1.bias,
        layer.norm2.weight,
        layer.norm2.bias,
    ]
    return encoder_layer(
        x,
        weights,
        heads=attention.num_heads,
        eps=layer.norm1.eps,
        dropout=layer.dropout.p,
        training=layer.training,
        last_step=last_step,
        precision=precision,
    )


_SUBMODULES = {
    "self_attn": nn.MultiheadAttention,
    "linear1": nn.Linear,
    "dropout": nn.Dropout,
    "linear2": nn.Linear,
    "norm1": nn.LayerNorm,
    "norm2": nn.LayerNorm,
    "dropout1": nn.Dropout,
    "dropout2": nn.Dropout,
}


def _is_plain_layer(layer: nn.Module) -> bool:
    """Return whether `encoder_layer` computes what this module does: an unchanged layer without hooks."""
    if type(layer) is not nn.TransformerEncoderLayer or any(has_hooks(module) for module in layer.modules()):
        return False
    if any(type(getattr(layer, name, None)) is not kind for name, kind in _SUBMODULES.items()):
        return False
    attention, linears, norms = layer.self_attn, (layer.linear1, layer.linear2), (layer.norm1, layer.norm2)
    if attention.in_proj_weight is None or attention.bias_k is not None or attention.add_zero_attn:
        return False
    biases = (attention.in_proj_bias, attention.out_proj.bias, *(module.bias for module in (*linears, *norms)))
    if any(bias is None for bias in biases):
        return False
    # The operator has one dropout probability, one mode and one eps for the whole layer.
    dropouts = {attention.dropout, layer.dropout.p, layer.dropout1.p, layer.dropout2.p}
    modes = {module.training for module in layer.modules()}
    if not len(dropouts) == len(modes) == len({norm.eps for norm in norms}) == 1:
        return False
    return not layer.norm_first and not attention.batch_first and layer.activation is nn.functional.relu
