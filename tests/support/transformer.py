"""Small Transformer and Localformer networks, and the same networks from torch's layers."""

from __future__ import annotations

import torch
import torch._dynamo
from torch import Tensor

from qfast import _backend
from qfast.nn import Localformer, Transformer

F32, F64 = torch.float32, torch.float64


Network = Transformer | Localformer
NATIVE = _backend.native is not None


def small_network(kind: type, dtype: torch.dtype = F64, rows: int = 12, dropout: float = 0.0) -> tuple[Network, Tensor]:
    """A seeded network of 2 layers, 8 wide, and an input of 7 steps and 5 features."""
    torch.manual_seed(0)
    return kind(5, 8, 2, 2, dropout).to(dtype), torch.randn(rows, 7, 5, dtype=dtype)


def by_torch_layers(net: Network, x: Tensor) -> Tensor:
    """The network from torch's layers, which accept [T, B, D]."""
    encoder = net.transformer_encoder
    steps = net.feature_layer(x).transpose(0, 1)
    steps = steps + net.pos_encoder.pe[: len(steps)]
    for i, layer in enumerate(encoder.layers):
        if isinstance(net, Transformer):
            steps = layer(steps)
        else:
            convolved = encoder.conv[i](steps.permute(1, 2, 0)).permute(2, 0, 1)
            steps = layer(steps + convolved)
    if not isinstance(net, Transformer):
        steps = net.rnn(steps + convolved)[0]
    return net.decoder_layer(steps[-1])[:, 0]


def gradients(net: Network, out: Tensor) -> dict[str, Tensor]:
    """Gradients of all parameters that influence the result."""
    net.zero_grad()
    out.pow(2).sum().backward()
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
