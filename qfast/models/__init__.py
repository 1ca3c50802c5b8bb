"""The seven models of Qlib as estimators, with the arguments and defaults of Qlib's flat models (Alpha360).

`qfast.models.ts` contains the same models with the defaults of Qlib's time-series models, over rolling windows
(Alpha158). `qfast.models.attention` shows which stocks attend to which. The networks are those of `qfast.nn`.
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
    "ALSTM",
    "GRU",
    "LSTM",
    "TCN",
    "ALSTMModel",
    "GATModel",
    "GATs",
    "GRUModel",
    "LSTMModel",
    "Localformer",
    "LocalformerModel",
    "TCNModel",
    "Transformer",
    "TransformerModel",
]
