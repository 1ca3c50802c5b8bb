"""Estimators with the reference's `_ts` arguments and defaults: rolling windows out of a time-series dataset."""

from __future__ import annotations

from typing import ClassVar

from qfast.models._graph import GraphTimeSeries
from qfast.models._recurrent import AttentiveTimeSeries, RecurrentTimeSeries
from qfast.models._tcn import TemporalConvTimeSeries
from qfast.models._transformer import EncoderTimeSeries
from qfast.nn import ALSTMModel, GATModel, GRUModel, Localformer, LSTMModel, TCNModel, Transformer
from qfast.training.estimator import Estimator

__all__ = [
    "ALSTM", "GRU", "LSTM", "TCN", "ALSTMModel", "GATModel", "GATs", "GRUModel", "LSTMModel", "Localformer",
    "LocalformerModel", "TCNModel", "Transformer", "TransformerModel",
]  # fmt: skip


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


class ALSTM(AttentiveTimeSeries):
    """LSTM or GRU with attention over time on rolling windows (Alpha158 style). Parameters as the flat `ALSTM`, and
    `n_jobs`, which is accepted and unused.

    Reference: pyqlib 0.9.7, qlib.contrib.model.pytorch_alstm_ts.ALSTM.

    Examples
    --------
    >>> import torch
    >>> ALSTM(d_feat=20, hidden_size=8, seed=0).network(torch.zeros(2, 20, 20)).shape
    torch.Size([2])
    """


class GATs(GraphTimeSeries):
    """Graph attention over all stocks of a day, on rolling windows (Alpha158 style). Parameters as the flat `GATs`.

    Notes
    -----
    Reference: pyqlib 0.9.7, qlib.contrib.model.pytorch_gats_ts.GATs, whose batches are not days: they are consecutive
    samples of one stock after the other, so that attention runs over dates (Qlib issues 1460 and 2319). Here a batch
    is all stocks of one date, shuffled as in the flat model; `compat="qlib"` gives the reference's batches, draws and
    numbers. Predictions stand instrument by instrument, each under its own date, either way.

    Examples
    --------
    >>> import torch
    >>> GATs(d_feat=20, hidden_size=8, seed=0).network(torch.zeros(5, 20, 20)).shape
    torch.Size([5])
    """

    base_estimators: ClassVar[dict[str, type[Estimator]]] = {"GRU": GRU, "LSTM": LSTM}


class TCN(TemporalConvTimeSeries):
    """Temporal convolution network over rolling windows (Alpha158 style). Parameters as the flat `TCN`, and `n_jobs`,
    which is accepted and unused.

    Notes
    -----
    Reference: pyqlib 0.9.7, qlib.contrib.model.pytorch_tcn_ts.TCN, whose `predict` forgets to transpose the windows
    ([issue 1401](https://github.com/microsoft/qlib/issues/1401)): it fails, or where step_len == d_feat scores
    nonsense. Here it transposes them; `compat="qlib"` brings the reference's predictions back.

    Examples
    --------
    >>> import torch
    >>> TCN(d_feat=20, n_chans=8, seed=0).network(torch.zeros(2, 20, 30)).shape
    torch.Size([2])
    """

    TCN_model = property(lambda self: self.network, doc="The network, under the reference's name.")


class TransformerModel(EncoderTimeSeries):
    """Transformer encoder over rolling windows (Alpha158 style). Parameters as the flat `TransformerModel`.

    Reference: pyqlib 0.9.7, qlib.contrib.model.pytorch_transformer_ts.TransformerModel.

    Examples
    --------
    >>> import torch
    >>> TransformerModel(d_feat=20, d_model=8, seed=0).network(torch.zeros(2, 20, 20)).shape
    torch.Size([2])
    """

    network_class = Transformer


class LocalformerModel(EncoderTimeSeries):
    """Transformer encoder with local context and a GRU on top, over rolling windows (Alpha158 style). Parameters as the
    flat `LocalformerModel`.

    Reference: pyqlib 0.9.7, qlib.contrib.model.pytorch_localformer_ts.LocalformerModel.

    Examples
    --------
    >>> import torch
    >>> LocalformerModel(d_feat=20, d_model=8, seed=0).network(torch.zeros(2, 20, 20)).shape
    torch.Size([2])
    """

    network_class = Localformer
