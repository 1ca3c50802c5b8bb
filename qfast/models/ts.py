"""Estimators with the reference's `_ts` defaults: rolling windows out of a time-series dataset."""

from qfast.models._recurrent import GRUTimeSeries as GRU
from qfast.models._recurrent import LSTMTimeSeries as LSTM
from qfast.nn import GRUModel, LSTMModel

__all__ = ["GRU", "LSTM", "GRUModel", "LSTMModel"]
