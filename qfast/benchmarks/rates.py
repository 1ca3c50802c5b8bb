"""What the processor can do: the rate of matrix products and of copies, and the work of the networks."""

from __future__ import annotations

import time
from typing import Any, cast

import torch
from torch import nn

from qfast.nn import ALSTMModel, GATModel, GRUModel, Localformer, LSTMModel, TCNModel, Transformer
from qfast.ops.temporal_conv_plan import plan

__all__ = ["copy_rate", "forward_multiply_adds", "product_rate", "training_multiply_adds"]

SIZE = 512  # of the square matrices; three of them fit into the cache of a core
MEGABYTES = 8  # of a copied part
SOURCE_MEGABYTES = 128  # parts of it are copied in turn, so they are not in the cache
REPEATS = 5
HIDDEN = 2048  # units of the feed-forward blocks of Transformer and Localformer


def product_rate() -> float:
    """Multiply-adds per second of torch.mm in float32 on one thread, by CPU time, the best of several.

    Examples
    --------
    >>> product_rate() > 1e8
    True
    """
    left, right = torch.rand(SIZE, SIZE), torch.rand(SIZE, SIZE)
    best = float("inf")
    for _ in range(REPEATS):
        start = time.process_time()
        for _ in range(4):
            torch.mm(left, right)
        best = min(best, (time.process_time() - start) / 4)
    return float(SIZE**3 / best)


def copy_rate() -> float:
    """Bytes per second of copies of memory that is not in the cache, by CPU time, the best of several.

    Examples
    --------
    >>> copy_rate() > 1e7
    True
    """
    count = MEGABYTES << 18
    source, target = torch.ones(SOURCE_MEGABYTES << 18), torch.zeros(count)
    starts = range(0, source.numel() - count + 1, count)
    best = float("inf")
    for _ in range(REPEATS):
        start = time.process_time()
        for first in starts:
            target.copy_(source[first : first + count])
        best = min(best, (time.process_time() - start) / len(starts))
    return count * 4 / best


# ---------------------------------------------------------------- work
def forward_multiply_adds(network: nn.Module, steps: int) -> float | None:
    """Multiply-adds of the matrix products of one window, as qfast computes them.

    Steps that the prediction does not depend on are not counted. The attention of GATs is not counted either, because
    it is not a matrix product and takes a small part of the time.

    Parameters
    ----------
    network : Module
        A network of `qfast.nn`.
    steps : int
        T.

    Returns
    -------
    float or None
        None for other networks.

    Examples
    --------
    >>> forward_multiply_adds(LSTMModel(d_feat=2, hidden_size=4, num_layers=1), steps=3)
    288.0
    """
    counts = _multiply_adds(network, steps)
    return None if counts is None else counts[0]


def training_multiply_adds(network: nn.Module, steps: int) -> float | None:
    """Multiply-adds of forward and backward of one window.

    Backward computes the gradients of the weights and, except for the first layer, of the inputs.
    """
    counts = _multiply_adds(network, steps)
    return None if counts is None else 3 * counts[0] - counts[1]


def _multiply_adds(network: nn.Module, steps: int) -> tuple[float, float] | None:
    """Multiply-adds of a window, and those of them that read the features."""
    if isinstance(network, ALSTMModel):
        hidden = network.rnn.hidden_size
        head = steps * network.d_feat * hidden
        return head + _recurrent(network.rnn, steps)[0] + steps * hidden * (hidden // 2), head
    if isinstance(network, GATModel):
        total, first = _recurrent(network.rnn, steps)
        return total + network.rnn.hidden_size**2, first
    if isinstance(network, (LSTMModel, GRUModel)):
        return _recurrent(network.rnn, steps)
    if isinstance(network, TCNModel):
        return _temporal(network, steps)
    if isinstance(network, (Transformer, Localformer)):
        return _encoder(network, steps)
    return None


def _recurrent(rnn: nn.RNNBase, steps: int) -> tuple[float, float]:
    gates = {"LSTM": 4, "GRU": 3}.get(rnn.mode, 1)
    width = gates * rnn.hidden_size
    first = float(steps * rnn.input_size * width)
    return first + steps * (2 * rnn.num_layers - 1) * rnn.hidden_size * width, first


def _temporal(network: TCNModel, steps: int) -> tuple[float, float]:
    blocks: list[Any] = list(network.tcn.network)
    channels = [block.conv1.out_channels for block in blocks]
    computed = plan(steps, blocks[0].conv1.kernel_size, len(blocks))
    total = computed.multiply_adds(network.num_input, channels)[0]
    first = computed.blocks[0].taps[0] * network.num_input * channels[0]
    return float(total), float(first)


def _encoder(network: Transformer | Localformer, steps: int) -> tuple[float, float]:
    layers = cast("Any", network.transformer_encoder).layers
    width = network.feature_layer.out_features
    features = float(steps * network.feature_layer.in_features * width)
    keys_and_values = 2.0 * steps * width**2
    step = 2.0 * width**2 + 2.0 * steps * width + 2.0 * width * HIDDEN  # query, result, attention, feed-forward
    layer = keys_and_values + steps * step
    if isinstance(network, Transformer):
        return features + (len(layers) - 1) * layer + keys_and_values + step, features
    convolution = 3.0 * steps * width**2
    return features + len(layers) * (layer + convolution) + _recurrent(network.rnn, steps)[0], features
