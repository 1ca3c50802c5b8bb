"""Networks: (B, T, F) -> (B,), parameters named as in the reference."""

from qfast.nn.graph import GATModel
from qfast.nn.recurrent import GRUModel, LSTMModel

__all__ = ["GATModel", "GRUModel", "LSTMModel"]
