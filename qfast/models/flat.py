"""Estimators with the reference's flat (Alpha360 style) arguments and defaults."""

from __future__ import annotations

from typing import ClassVar

from qfast.models._graph import Graph
from qfast.models._recurrent import Attentive, Recurrent
from qfast.models._tcn import TemporalConv
from qfast.models._transformer import Encoder
from qfast.nn import ALSTMModel, GATModel, GRUModel, Localformer, LSTMModel, TCNModel, Transformer
from qfast.training.estimator import Estimator

__all__ = [
    "ALSTM", "GRU", "LSTM", "TCN", "ALSTMModel", "GATModel", "GATs", "GRUModel", "LSTMModel", "Localformer",
    "LocalformerModel", "TCNModel", "Transformer", "TransformerModel",
]  # fmt: skip


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


class ALSTM(Attentive):
    """LSTM or GRU with attention over time on flat windows (Alpha360 style), trained on shuffled rows.

    Parameters
    ----------
    d_feat, hidden_size, num_layers, dropout
        Of the network `ALSTMModel`.
    n_epochs, lr, metric, batch_size, early_stop, loss, optimizer, GPU, seed
        Of the training loop, see `Estimator`. `batch_size` counts rows, `early_stop` epochs.
    rnn_type : str
        Keyword only: "GRU", "LSTM" or "RNN". The reference takes it and builds a GRU whatever it says; so does
        `compat="qlib"`.
    device, compat, progress
        Keyword only, see `Estimator`.

    Notes
    -----
    Reference: pyqlib 0.9.7, qlib.contrib.model.pytorch_alstm.ALSTM. Same arguments, weights and batch order under the
    same seed, and without dropout the same scores; the masks of the dropout are drawn by counter.

    Examples
    --------
    >>> import torch
    >>> ALSTM(d_feat=6, hidden_size=8, seed=0).network(torch.zeros(2, 360)).shape
    torch.Size([2])
    """


class GATs(Graph):
    """Graph attention over all stocks of a day (Alpha360 style), on top of an LSTM or GRU over each stock's window.

    Every day is a batch; the days are shuffled before each training pass, and scored hundreds at a time.

    Parameters
    ----------
    d_feat, hidden_size, num_layers, dropout, base_model
        Of the network `GATModel`.
    n_epochs, lr, metric, early_stop, loss, optimizer, GPU, seed
        Of the training loop, see `Estimator`.
    model_path : path, optional
        Weights of the base to begin with: a file of the reference's (.pkl), a .safetensors file or a run folder.
    shuffle_days : bool
        Keyword only: False keeps the days in order.
    device, compat, progress
        Keyword only, see `Estimator`. `batch_size` is accepted and has no effect, as in the reference.

    Notes
    -----
    Reference: pyqlib 0.9.7, qlib.contrib.model.pytorch_gats.GATs. Same arguments, weights, order of days and scores
    under the same seed; the differences on purpose stand in docs/parity.md. Without `model_path` and `pretrain` the
    first `fit` draws the base's weights a second time, as the reference does.

    Examples
    --------
    >>> import torch
    >>> GATs(d_feat=6, hidden_size=8, seed=0).network(torch.zeros(5, 360)).shape
    torch.Size([5])
    """

    base_estimators: ClassVar[dict[str, type[Estimator]]] = {"GRU": GRU, "LSTM": LSTM}


class TCN(TemporalConv):
    """Temporal convolution network over flat windows (Alpha360 style), read at the last step.

    Parameters
    ----------
    d_feat : int
        Features of a step.
    n_chans, num_layers : int
        Width and number of the blocks, whose dilations are 1, 2, 4, ...
    kernel_size : int
    dropout : float
        Of every convolution's output.
    n_epochs, lr, metric, batch_size, early_stop, loss, optimizer, GPU, seed
        Of the training loop, see `Estimator`.
    device, compat, progress
        Keyword only, see `Estimator`.

    Notes
    -----
    Reference: pyqlib 0.9.7, qlib.contrib.model.pytorch_tcn.TCN. Same arguments, weights and batch order under the same
    seed, and without dropout the same scores; the masks of the dropout are drawn by counter (docs/tcn.md).

    Examples
    --------
    >>> import torch
    >>> TCN(d_feat=6, n_chans=8, seed=0).network(torch.zeros(2, 360)).shape
    torch.Size([2])
    """

    tcn_model = property(lambda self: self.network, doc="The network, under the reference's name.")


class TransformerModel(Encoder):
    """Transformer encoder over flat windows (Alpha360 style), read at its last step.

    Parameters
    ----------
    d_feat, d_model, nhead, num_layers, dropout
        Of the network `qfast.nn.Transformer`.
    n_epochs, lr, metric, batch_size, early_stop, loss, optimizer, GPU, seed
        Of the training loop, see `Estimator`. `batch_size` counts rows, `early_stop` epochs.
    reg : float
        Weight decay: L2 added to the gradient.
    n_jobs : int
        Accepted for the reference's sake and unused.
    device, compat, progress
        Keyword only, see `Estimator`.

    Notes
    -----
    Reference: pyqlib 0.9.7, qlib.contrib.model.pytorch_transformer.TransformerModel. Same arguments, weights and batch
    order under the same seed, and without dropout the same scores; the masks of the dropout are drawn by counter.

    Examples
    --------
    >>> import torch
    >>> TransformerModel(d_feat=6, d_model=8, seed=0).network(torch.zeros(2, 360)).shape
    torch.Size([2])
    """

    network_class = Transformer


class LocalformerModel(Encoder):
    """Transformer encoder with local context and a GRU on top, over flat windows (Alpha360 style).

    Parameters and notes as `TransformerModel`; the network is `qfast.nn.Localformer`. Reference:
    qlib.contrib.model.pytorch_localformer.LocalformerModel.

    Examples
    --------
    >>> import torch
    >>> LocalformerModel(d_feat=6, d_model=8, seed=0).network(torch.zeros(2, 360)).shape
    torch.Size([2])
    """

    network_class = Localformer
