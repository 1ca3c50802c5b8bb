"""Estimators with the arguments and defaults of Qlib's flat models (Alpha360)."""

from __future__ import annotations

from typing import ClassVar

from qfast.models._graph import GraphEstimator
from qfast.models._recurrent import AttentiveEstimator, RecurrentEstimator
from qfast.models._tcn import TemporalConvEstimator
from qfast.models._transformer import EncoderEstimator
from qfast.nn import ALSTMModel, GATModel, GRUModel, Localformer, LSTMModel, TCNModel, Transformer
from qfast.training.base import network_alias
from qfast.training.estimator import Estimator

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


class LSTM(RecurrentEstimator):
    """LSTM over flat windows (Alpha360), trained on shuffled samples.

    Flat samples have F*T columns, feature-major: all T steps of feature 0, then all of feature 1, as in Alpha360. The
    network maps [B, F*T] to predictions [B].

    Parameters
    ----------
    d_feat, hidden_size, num_layers : int
        Features per step, hidden units and layers of the network `LSTMModel`.
    dropout : float
        Probability of dropout between the layers, in training only.
    n_epochs, lr, metric, batch_size, early_stop, loss, optimizer, GPU, seed
        Arguments of the training loop, see `qfast.training.Estimator`.
    weight_decay, device, compat, progress, cuda_graphs, precision
        Keyword-only arguments of the training loop, see `Estimator`.

    Raises
    ------
    ConfigError
        An unknown argument, or a value that is not allowed.
    BackendError
        The device is not available.

    Source
    ------
    Qlib (pyqlib 0.9.7), qlib/contrib/model/pytorch_lstm.py. With the same seed, weights, batches and scores
    equal Qlib's. docs/parity.md lists the deliberate differences.

    Examples
    --------
    >>> import torch
    >>> LSTM(d_feat=6, hidden_size=8, seed=0).network(torch.zeros(2, 360)).shape
    torch.Size([2])
    """

    network_class = LSTMModel
    lstm_model = network_alias()


class GRU(RecurrentEstimator):
    """GRU over flat windows (Alpha360), trained on shuffled samples.

    As in Qlib, training samples with NaN in features or label are left out.

    Flat samples have F*T columns, feature-major: all T steps of feature 0, then all of feature 1, as in Alpha360. The
    network maps [B, F*T] to predictions [B].

    Parameters
    ----------
    d_feat, hidden_size, num_layers : int
        Features per step, hidden units and layers of the network `GRUModel`.
    dropout : float
        Probability of dropout between the layers, in training only.
    n_epochs, lr, metric, batch_size, early_stop, loss, optimizer, GPU, seed
        Arguments of the training loop, see `qfast.training.Estimator`.
    weight_decay, device, compat, progress, cuda_graphs, precision
        Keyword-only arguments of the training loop, see `Estimator`.

    Raises
    ------
    ConfigError
        An unknown argument, or a value that is not allowed.
    BackendError
        The device is not available.

    Source
    ------
    Qlib (pyqlib 0.9.7), qlib/contrib/model/pytorch_gru.py. With the same seed, weights, batches and scores
    equal Qlib's. docs/parity.md lists the deliberate differences.

    Examples
    --------
    >>> import torch
    >>> GRU(d_feat=6, hidden_size=8, seed=0).network(torch.zeros(2, 360)).shape
    torch.Size([2])
    """

    network_class = GRUModel
    drops_incomplete_rows = True
    gru_model = network_alias()


class ALSTM(AttentiveEstimator):
    """LSTM or GRU with attention over time on flat windows (Alpha360), trained on shuffled samples.

    Flat samples have F*T columns, feature-major: all T steps of feature 0, then all of feature 1, as in Alpha360. The
    network maps [B, F*T] to predictions [B].

    Parameters
    ----------
    d_feat, hidden_size, num_layers : int
        Features per step, hidden units and layers of the network `ALSTMModel`.
    dropout : float
        Probability of dropout between the layers and inside the attention, in training only.
    n_epochs, lr, metric, batch_size, early_stop, loss, optimizer, GPU, seed
        Arguments of the training loop, see `qfast.training.Estimator`.
    weight_decay, device, compat, progress, cuda_graphs, precision
        Keyword-only arguments of the training loop, see `Estimator`.
    rnn_type : {"GRU", "LSTM", "RNN"}
        Keyword only. Qlib accepts it but always builds a GRU, which `compat="qlib"` restores.

    Raises
    ------
    ConfigError
        An unknown argument, or a value that is not allowed.
    BackendError
        The device is not available.

    Source
    ------
    Qlib (pyqlib 0.9.7), qlib/contrib/model/pytorch_alstm.py. With the same seed, weights and batches
    equal Qlib's, and so do the scores without dropout. qfast draws dropout masks from a counter-based generator;
    `compat="qlib"` restores Qlib's.

    Examples
    --------
    >>> import torch
    >>> ALSTM(d_feat=6, hidden_size=8, seed=0).network(torch.zeros(2, 360)).shape
    torch.Size([2])
    """


class GATs(GraphEstimator):
    """Graph attention over all stocks of a day, on top of an LSTM or GRU over each stock's flat window (Alpha360).

    Every day is a batch. The order of the days is shuffled before each training pass; scoring processes many days per
    call.

    Flat samples have F*T columns, feature-major: all T steps of feature 0, then all of feature 1, as in Alpha360. The
    network maps [N, F*T], the N stocks of a day, to predictions [N].

    Parameters
    ----------
    d_feat, hidden_size, num_layers : int
        Features per step, hidden units and layers of the network `GATModel`.
    dropout : float
        Probability of dropout between the recurrent layers, in training only.
    base_model : {"GRU", "LSTM"}
        The recurrent layer.
    model_path : path, optional
        Initial weights of the base model: a state dict that Qlib has written (.pkl), a .safetensors file or a run
        folder.
    n_epochs, lr, metric, early_stop, loss, optimizer, GPU, seed
        Arguments of the training loop, see `qfast.training.Estimator`.
    weight_decay, device, compat, progress, cuda_graphs, precision
        Keyword-only arguments of the training loop, see `Estimator`.
    shuffle_days : bool
        Keyword only. False keeps the days in order.
    batch_size : int
        Keyword only. Accepted and ignored, as in Qlib.

    Raises
    ------
    ConfigError
        An unknown argument, or a value that is not allowed.
    BackendError
        The device is not available.
    CheckpointError
        `model_path` contains weights that do not fit.

    Notes
    -----
    Without `model_path` and `pretrain`, the first `fit` draws the weights of the base model again, as Qlib does.

    Source
    ------
    Qlib (pyqlib 0.9.7), qlib/contrib/model/pytorch_gats.py. With the same seed, weights, order of days and
    scores equal Qlib's. docs/parity.md lists the deliberate differences.

    Examples
    --------
    >>> import torch
    >>> GATs(d_feat=6, hidden_size=8, seed=0).network(torch.zeros(5, 360)).shape
    torch.Size([5])
    """

    base_estimators: ClassVar[dict[str, type[Estimator]]] = {"GRU": GRU, "LSTM": LSTM}


class TCN(TemporalConvEstimator):
    """Temporal convolution network over flat windows (Alpha360), trained on shuffled samples.

    Flat samples have F*T columns, feature-major: all T steps of feature 0, then all of feature 1, as in Alpha360. The
    network maps [B, F*T] to predictions [B].

    Parameters
    ----------
    d_feat : int
        Features per step.
    n_chans, num_layers : int
        Channels and number of the blocks of the network `TCNModel`, whose dilations are 1, 2, 4, ...
    kernel_size : int
        Steps that a convolution reads.
    dropout : float
        Probability of dropout of the output of every convolution, in training only.
    n_epochs, lr, metric, batch_size, early_stop, loss, optimizer, GPU, seed
        Arguments of the training loop, see `qfast.training.Estimator`.
    weight_decay, device, compat, progress, cuda_graphs, precision
        Keyword-only arguments of the training loop, see `Estimator`.

    Raises
    ------
    ConfigError
        An unknown argument, or a value that is not allowed.
    BackendError
        The device is not available.

    Source
    ------
    Qlib (pyqlib 0.9.7), qlib/contrib/model/pytorch_tcn.py. With the same seed, weights and batches
    equal Qlib's, and so do the scores without dropout. qfast draws dropout masks from a counter-based generator;
    `compat="qlib"` restores Qlib's.

    Examples
    --------
    >>> import torch
    >>> TCN(d_feat=6, n_chans=8, seed=0).network(torch.zeros(2, 360)).shape
    torch.Size([2])
    """

    tcn_model = network_alias()


class TransformerModel(EncoderEstimator):
    """Transformer encoder over flat windows (Alpha360) that predicts from the last step.

    Flat samples have F*T columns, feature-major: all T steps of feature 0, then all of feature 1, as in Alpha360. The
    network maps [B, F*T] to predictions [B].

    Parameters
    ----------
    d_feat, d_model, nhead, num_layers : int
        Features per step, width, number of heads and layers of the network `qfast.nn.Transformer`. d_model must be even
        and a multiple of nhead.
    dropout : float
        Probability of dropout in the encoder layers, in training only.
    n_epochs, lr, metric, batch_size, early_stop, loss, optimizer, GPU, seed
        Arguments of the training loop, see `qfast.training.Estimator`.
    device, compat, progress, cuda_graphs, precision
        Keyword-only arguments of the training loop, see `Estimator`.
    reg : float
        L2 penalty. `weight_decay`, its name in the other models, is accepted too.
    n_jobs : int
        Accepted and ignored.

    Raises
    ------
    ConfigError
        An unknown argument, or a value that is not allowed.
    BackendError
        The device is not available.

    Source
    ------
    Qlib (pyqlib 0.9.7), qlib/contrib/model/pytorch_transformer.py. With the same seed, weights and batches equal
    Qlib's, and so do the scores without dropout. qfast draws dropout masks from a counter-based generator;
    `compat="qlib"` restores Qlib's.

    Examples
    --------
    >>> import torch
    >>> TransformerModel(d_feat=6, d_model=8, seed=0).network(torch.zeros(2, 360)).shape
    torch.Size([2])
    """

    network_class = Transformer


class LocalformerModel(EncoderEstimator):
    """Transformer encoder with local context and a GRU over its steps, on flat windows (Alpha360).

    Flat samples have F*T columns, feature-major: all T steps of feature 0, then all of feature 1, as in Alpha360. The
    network maps [B, F*T] to predictions [B].

    Parameters
    ----------
    d_feat, d_model, nhead, num_layers : int
        Features per step, width, number of heads and layers of the network `qfast.nn.Localformer`. d_model must be even
        and a multiple of nhead.
    dropout : float
        Probability of dropout in the encoder layers and between the layers of the GRU, in training only.
    n_epochs, lr, metric, batch_size, early_stop, loss, optimizer, GPU, seed
        Arguments of the training loop, see `qfast.training.Estimator`.
    device, compat, progress, cuda_graphs, precision
        Keyword-only arguments of the training loop, see `Estimator`.
    reg : float
        L2 penalty. `weight_decay`, its name in the other models, is accepted too.
    n_jobs : int
        Accepted and ignored.

    Raises
    ------
    ConfigError
        An unknown argument, or a value that is not allowed.
    BackendError
        The device is not available.

    Source
    ------
    Qlib (pyqlib 0.9.7), qlib/contrib/model/pytorch_localformer.py. With the same seed, weights and batches equal
    Qlib's, and so do the scores without dropout. qfast draws dropout masks from a counter-based generator;
    `compat="qlib"` restores Qlib's.

    Examples
    --------
    >>> import torch
    >>> LocalformerModel(d_feat=6, d_model=8, seed=0).network(torch.zeros(2, 360)).shape
    torch.Size([2])
    """

    network_class = Localformer
