"""qfast's operators. Each module has a public function, its checks, the schema, the fake, gradients and a self-test.

The plain-torch twin of an operator states what it computes. It is in the same module, or in <operator>_twin.py.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from qfast.ops import activations as _activations
from qfast.ops import adam as _adam
from qfast.ops import additive_attention as _attention
from qfast.ops import attention_pool as _attention_pool
from qfast.ops import encoder_layer as _encoder_layer
from qfast.ops import feed_forward as _feed_forward
from qfast.ops import linear_tanh as _linear_tanh
from qfast.ops import price_windows as _price_windows
from qfast.ops import recurrent as _recurrent
from qfast.ops import temporal_conv as _temporal_conv
from qfast.ops import window_conv as _window_conv
from qfast.ops import window_gather as _window_gather
from qfast.ops import window_index as _window_index
from qfast.ops.activations import tanh
from qfast.ops.adam import clipped_adam_
from qfast.ops.additive_attention import additive_attention, graph_attention
from qfast.ops.attention_pool import attention_pool
from qfast.ops.encoder_layer import encoder_layer
from qfast.ops.feed_forward import feed_forward
from qfast.ops.linear_tanh import linear_tanh
from qfast.ops.price_windows import price_windows
from qfast.ops.recurrent import gru, lstm
from qfast.ops.temporal_conv import BlockWeights, temporal_block, temporal_conv_net
from qfast.ops.window_conv import window_conv
from qfast.ops.window_gather import gather_windows, window_rows
from qfast.ops.window_index import WindowIndex, build_window_index

__all__ = [
    "OPERATORS",
    "BlockWeights",
    "Operator",
    "WindowIndex",
    "additive_attention",
    "attention_pool",
    "build_window_index",
    "clipped_adam_",
    "encoder_layer",
    "feed_forward",
    "gather_windows",
    "graph_attention",
    "gru",
    "linear_tanh",
    "lstm",
    "price_windows",
    "tanh",
    "temporal_block",
    "temporal_conv_net",
    "window_conv",
    "window_rows",
]


class Operator(NamedTuple):
    """Entry of an operator for `qfast doctor`.

    Attributes
    ----------
    self_test : callable
        Raises an error if the operator on a device differs from its plain-torch twin.
    devices : tuple of str
        Kinds of devices with a kernel.
    """

    self_test: Callable[[torch.device], None]
    devices: tuple[str, ...] = ("cpu", "cuda")


OPERATORS = {
    "additive_attention": Operator(partial(_attention.self_test, "additive_attention")),
    "attention_pool": Operator(_attention_pool.self_test),
    "build_window_index": Operator(_window_index.self_test, ("cpu",)),
    "clipped_adam_": Operator(_adam.self_test),
    "encoder_layer": Operator(_encoder_layer.self_test),
    "feed_forward": Operator(_feed_forward.self_test),
    "gather_windows": Operator(_window_gather.self_test),
    "graph_attention": Operator(partial(_attention.self_test, "graph_attention")),
    "gru": Operator(partial(_recurrent.self_test, "gru")),
    "linear_tanh": Operator(_linear_tanh.self_test, ("cpu",)),
    "lstm": Operator(partial(_recurrent.self_test, "lstm")),
    "price_windows": Operator(_price_windows.self_test, ("cpu",)),
    "tanh": Operator(_activations.self_test, ("cpu",)),
    "temporal_conv_net": Operator(_temporal_conv.self_test),
    "window_conv": Operator(_window_conv.self_test, ("cpu",)),
}
