"""A Transformer encoder over a window, read at its last step.

Parameter names, creation order and initial weights are those of the reference (pyqlib 0.9.7,
qlib/contrib/model/pytorch_transformer.py), so state dicts travel both ways.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn

from qfast.errors import ConfigError, DataError, whole_number
from qfast.nn.plain import PlainTorch, check_dtype, has_hooks
from qfast.nn.recurrent import as_windows
from qfast.ops import encoder_layer

LONGEST = 1000  # steps that have a position

__all__ = ["PositionalEncoding", "Transformer", "WindowEncoder"]


class PositionalEncoding(nn.Module):
    """Adds sin(t / 10000^(2k / D)) and the cosine to features 2k and 2k + 1 of step t (Vaswani et al. 2017).

    Examples
    --------
    >>> PositionalEncoding(4)(torch.zeros(2, 1, 4))[0, 0].tolist()
    [0.0, 1.0, 0.0, 1.0]
    """

    def __init__(self, d_model: int, max_len: int = LONGEST) -> None:
        super().__init__()
        position = torch.arange(max_len, dtype=torch.float).unsqueeze(1)
        rate = torch.exp(torch.arange(0, d_model, 2).float() * (-math.log(10000.0) / d_model))
        pe = torch.zeros(max_len, d_model)
        pe[:, 0::2], pe[:, 1::2] = torch.sin(position * rate), torch.cos(position * rate)
        self.register_buffer("pe", pe.unsqueeze(1))

    def forward(self, x: Tensor) -> Tensor:
        """[T, B, D] -> [T, B, D]"""
        positions: Tensor = self.pe  # type: ignore[assignment]
        return x + positions[: len(x)]


class WindowEncoder(PlainTorch):
    """What Transformer and Localformer have in common: features mapped to D, positions, layers, one output."""

    def __init__(self, d_feat: int, d_model: int, nhead: int, num_layers: int, dropout: float, device: Any) -> None:
        super().__init__()
        d_feat, d_model = whole_number("d_feat", d_feat), whole_number("d_model", d_model)
        nhead, num_layers = whole_number("nhead", nhead), whole_number("num_layers", num_layers)
        if d_model % 2:
            raise ConfigError(f"d_model must be even, as positions are pairs of sine and cosine, got {d_model}.")
        if d_model % nhead:
            fitting = [n for n in range(1, d_model + 1) if d_model % n == 0]
            raise ConfigError(f"nhead must divide d_model={d_model}, got {nhead}. Remedy: one of {fitting}.")
        if not 0.0 <= float(dropout) <= 1.0:
            raise ConfigError(f"dropout must lie in [0, 1], got {dropout!r}.")
        self._add_before(d_model, num_layers, float(dropout))
        self.feature_layer = nn.Linear(d_feat, d_model)
        self.pos_encoder = PositionalEncoding(d_model)
        # Not used in forward, in the reference neither; the layers are copies of it.
        self.encoder_layer = nn.TransformerEncoderLayer(d_model=d_model, nhead=nhead, dropout=float(dropout))
        self.transformer_encoder = self._build_encoder(d_model, num_layers)
        self.decoder_layer = nn.Linear(d_model, 1)
        self.device = device
        self.d_feat = d_feat

    def _add_before(self, d_model: int, num_layers: int, dropout: float) -> None:
        """Registers what draws its weights first."""

    def _build_encoder(self, d_model: int, num_layers: int) -> nn.Module:
        raise NotImplementedError

    def _encoded(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, D], the last step."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, F] or [B, F*T] -> [B]; a batch of one stays one-dimensional (the reference returns 0-d)."""
        x = as_windows(x, self.d_feat)
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            self._check(x)
        mapped = self.pos_encoder(self.feature_layer(x).transpose(0, 1)).transpose(0, 1)
        prediction: Tensor = self.decoder_layer(self._encoded(mapped)).squeeze(-1)
        return prediction

    def _check(self, x: Tensor) -> None:
        """Where torch's layers would refuse without saying what to do, or return what is none."""
        if x.shape[1] > LONGEST:
            raise DataError(
                f"x has {x.shape[1]} steps, but there are positions for {LONGEST}. Remedy: a step_len of at most "
                f"{LONGEST}, or check d_feat={self.d_feat} if x is flat."
            )
        if x.shape[1] == 0:
            raise DataError(f"x has no step: its shape is {list(x.shape)}, expected [B, T, F] with T of at least 1.")
        weight = getattr(self.feature_layer, "weight", None)
        if isinstance(weight, Tensor) and not torch.is_autocast_enabled(x.device.type):
            check_dtype(x, weight)

    def _takes_operators(self, x: Tensor, layers: nn.ModuleList) -> bool:
        """Whether the layers are computed by our operators: as they were built, and where these serve."""
        if len(layers) == 0 or not all(_is_plain(layer) for layer in layers):
            return False
        return self._may_take_operator(x, cast(nn.TransformerEncoderLayer, layers[0]).linear1.weight)


class Transformer(WindowEncoder):
    """Transformer encoder read at its last step (Vaswani et al. 2017; reference: pytorch_transformer.py).

    Parameters
    ----------
    d_feat, d_model, nhead, num_layers : int
        F, D, heads and L. D is even and a multiple of nhead; the feed-forward blocks are 2048 wide.
    dropout : float
        In the encoder layers, in training only.
    device
        Stored, as in the reference; `.to(device)` moves the network.

    Raises
    ------
    ConfigError
        A size that is not a whole number above 0, an odd d_model, an nhead that does not divide it, a dropout outside
        [0, 1].

    Notes
    -----
    On the CPU the layers are computed by `qfast.ops.encoder_layer`, the last one for the last step alone; torch.jit,
    torch.export, autocast, CUDA, `to_reference()` and layers that were changed or hooked take torch's own.
    `encoder_layer.*` is in the state dict for the reference's sake: nothing uses it and it gets no gradient.

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
        device: Any = None,
    ) -> None:
        super().__init__(d_feat, d_model, nhead, num_layers, dropout, device)

    def _build_encoder(self, d_model: int, num_layers: int) -> nn.Module:
        return nn.TransformerEncoder(self.encoder_layer, num_layers, enable_nested_tensor=False)

    def _encoded(self, x: Tensor) -> Tensor:
        # A script leaves the outer branch out, and so does not compile what it calls: it must stay alone.
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            takes_operators = self._is_as_built() and self._takes_operators(x, self._layers())
            if takes_operators:
                return self._by_operators(x)
        steps: Tensor = self.transformer_encoder(x.transpose(0, 1))
        return steps[-1]

    def _by_operators(self, x: Tensor) -> Tensor:
        layers = self._layers()
        for number, layer in enumerate(layers, 1):
            x = run_layer(layer, x, last_step=number == len(layers))
        return x

    def _layers(self) -> nn.ModuleList:
        return cast(nn.TransformerEncoder, self.transformer_encoder).layers

    def _is_as_built(self) -> bool:
        """All but the layers, hooks and all: an operator would not do what another does."""
        encoder = self.transformer_encoder
        return type(encoder) is nn.TransformerEncoder and encoder.norm is None and not has_hooks(encoder)


def run_layer(layer: nn.Module, x: Tensor, last_step: bool) -> Tensor:
    """One of torch's layers by our operator: [B, T, D] -> [B, T, D] or [B, D]."""
    layer = cast(nn.TransformerEncoderLayer, layer)
    attention = layer.self_attn
    weights = [
        attention.in_proj_weight, attention.in_proj_bias, attention.out_proj.weight, attention.out_proj.bias,
        layer.linear1.weight, layer.linear1.bias, layer.linear2.weight, layer.linear2.bias,
        layer.norm1.weight, layer.norm1.bias, layer.norm2.weight, layer.norm2.bias,
    ]  # fmt: skip
    options: Any = {"heads": attention.num_heads, "eps": layer.norm1.eps, "dropout": layer.dropout.p}
    return encoder_layer(x, weights, training=layer.training, last_step=last_step, **options)


_PARTS = {
    "self_attn": nn.MultiheadAttention, "linear1": nn.Linear, "dropout": nn.Dropout, "linear2": nn.Linear,
    "norm1": nn.LayerNorm, "norm2": nn.LayerNorm, "dropout1": nn.Dropout, "dropout2": nn.Dropout,
}  # fmt: skip


def _is_plain(layer: nn.Module) -> bool:
    """Whether a layer is what was built here, hooks and all: an operator would not do what another does."""
    if type(layer) is not nn.TransformerEncoderLayer or any(has_hooks(part) for part in layer.modules()):
        return False
    if any(type(getattr(layer, name, None)) is not kind for name, kind in _PARTS.items()):
        return False
    attention, linear, norms = layer.self_attn, (layer.linear1, layer.linear2), (layer.norm1, layer.norm2)
    projects = attention.in_proj_weight is not None and attention.bias_k is None and not attention.add_zero_attn
    biases = (attention.in_proj_bias, attention.out_proj.bias, *(part.bias for part in (*linear, *norms)))
    shares = {attention.dropout, *(part.p for part in (layer.dropout, layer.dropout1, layer.dropout2))}
    modes = {part.training for part in layer.modules()}
    return (
        projects
        and not any(bias is None for bias in biases)
        and len(shares) == len(modes) == len({norm.eps for norm in norms}) == 1
        and not (layer.norm_first or attention.batch_first)
        and layer.activation is nn.functional.relu
    )
