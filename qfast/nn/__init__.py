"""Networks that map windows [B, T, F] (TCN: [B, F, T]) to predictions [B]. Parameter names match Qlib."""

from qfast.nn.alstm import ALSTMModel
from qfast.nn.graph import GATModel
from qfast.nn.localformer import Localformer
from qfast.nn.recurrent import GRUModel, LSTMModel
from qfast.nn.tcn import CausalConv1d, TCNModel, TemporalBlock, TemporalConvNet
from qfast.nn.temporal_stream import TCNStream
from qfast.nn.transformer import Transformer

__all__ = [
    "ALSTMModel",
    "CausalConv1d",
    "GATModel",
    "GRUModel",
    "LSTMModel",
    "Localformer",
    "TCNModel",
    "TCNStream",
    "TemporalBlock",
    "TemporalConvNet",
    "Transformer",
]
