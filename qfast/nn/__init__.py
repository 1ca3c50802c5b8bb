"""Networks: windows [B, T, F] (TCN: [B, F, T]) -> [B], parameters named as in the reference."""

from qfast.nn.alstm import ALSTMModel
from qfast.nn.graph import GATModel
from qfast.nn.recurrent import GRUModel, LSTMModel
from qfast.nn.tcn import CausalConv1d, TCNModel, TemporalBlock, TemporalConvNet
from qfast.nn.temporal_stream import TCNStream

__all__ = [
    "ALSTMModel",
    "CausalConv1d",
    "GATModel",
    "GRUModel",
    "LSTMModel",
    "TCNModel",
    "TCNStream",
    "TemporalBlock",
    "TemporalConvNet",
]
