"""Estimators with the reference's flat (Alpha360 style) arguments and defaults."""

from __future__ import annotations

from qfast.models._recurrent import Recurrent
from qfast.nn import GRUModel, LSTMModel

__all__ = ["GRU", "LSTM", "GRUModel", "LSTMModel"]


class LSTM(Recurrent):
    """LSTM over flat windows (Alpha360 style), trained on shuffled rows.

    Parameters
    ----------
    d_feat, hidden_size, num_layers, dropout
        Of the network `LSTMModel`.
    n_epochs, lr, metric, batch_size, early_stop, loss, optimizer, GPU, seed
        Of the training loop, see `Estimator`. `batch_size` counts rows, `early_stop` epochs.
    device, compat, progress
        Keyword only, see `Estimator`.

    Notes
    -----
    Reference: pyqlib 0.9.7, qlib.contrib.model.pytorch_lstm.LSTM. Same arguments, weights, batch order
    and scores under the same seed; the differences on purpose stand in docs/parity.md.

    Examples
    --------
    >>> import torch
    >>> LSTM(d_feat=6, hidden_size=8, seed=0).network(torch.zeros(2, 360)).shape
    torch.Size([2])
    """

    network_class = LSTMModel
    lstm_model = property(lambda self: self.network, doc="The network, under the reference's name.")


class GRU(Recurrent):
    """GRU over flat windows (Alpha360 style); training rows with any NaN are left out, as in the reference.

    Parameters and notes as `LSTM`. Reference: qlib.contrib.model.pytorch_gru.GRU.

    Examples
    --------
    >>> import torch
    >>> GRU(d_feat=6, hidden_size=8, seed=0).network(torch.zeros(2, 360)).shape
    torch.Size([2])
    """

    network_class = GRUModel
    drops_incomplete_rows = True
    gru_model = property(lambda self: self.network, doc="The network, under the reference's name.")
