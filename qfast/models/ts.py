"""Estimators with the reference's `_ts` arguments and defaults: rolling windows out of a time-series dataset."""

from __future__ import annotations

from qfast.models._recurrent import RecurrentTimeSeries
from qfast.nn import GRUModel, LSTMModel

__all__ = ["GRU", "LSTM", "GRUModel", "LSTMModel"]


class LSTM(RecurrentTimeSeries):
    """LSTM over rolling windows (Alpha158 style), for time-series datasets.

    Parameters
    ----------
    n_jobs : int
        Accepted for the reference's sake and unused: batches are gathered in this process.
    others
        As in the flat `qfast.models.LSTM`.

    Notes
    -----
    Reference: pyqlib 0.9.7, qlib.contrib.model.pytorch_lstm_ts.LSTM.

    Examples
    --------
    >>> import torch
    >>> LSTM(d_feat=20, hidden_size=8, seed=0).network(torch.zeros(2, 20, 20)).shape
    torch.Size([2])
    """

    network_class = LSTMModel
    LSTM_model = property(lambda self: self.network, doc="The network, under the reference's name.")


class GRU(RecurrentTimeSeries):
    """GRU over rolling windows (Alpha158 style). Parameters as `LSTM`.

    Reference: pyqlib 0.9.7, qlib.contrib.model.pytorch_gru_ts.GRU.

    Examples
    --------
    >>> import torch
    >>> GRU(d_feat=20, hidden_size=8, seed=0).network(torch.zeros(2, 20, 20)).shape
    torch.Size([2])
    """

    network_class = GRUModel
    GRU_model = property(lambda self: self.network, doc="The network, under the reference's name.")
