"""Estimators with the reference's flat (Alpha360 style) defaults, and the networks under them.

`qfast.models.ts` holds the same models with the reference's time-series defaults.
"""

from qfast.models.flat import (
    ALSTM,
    GRU,
    LSTM,
    TCN,
    ALSTMModel,
    GATModel,
    GATs,
    GRUModel,
    Localformer,
    LocalformerModel,
    LSTMModel,
    TCNModel,
    Transformer,
    TransformerModel,
)

__all__ = [
    "ALSTM", "GRU", "LSTM", "TCN", "ALSTMModel", "GATModel", "GATs", "GRUModel", "LSTMModel", "Localformer",
    "LocalformerModel", "TCNModel", "Transformer", "TransformerModel",
]  # fmt: skip
