"""Estimators with the arguments and defaults of Qlib's time-series models (`_ts`), over rolling windows (Alpha158)."""

from __future__ import annotations

from typing import ClassVar

from qfast.models._graph import GraphTimeSeriesEstimator
from qfast.models._recurrent import AttentiveTimeSeriesEstimator, RecurrentTimeSeriesEstimator
from qfast.models._tcn import TemporalConvTimeSeriesEstimator
from qfast.models._transformer import EncoderTimeSeriesEstimator
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


class LSTM(RecurrentTimeSeriesEstimator):
    """LSTM over rolling windows (Alpha158), trained on shuffled samples.

    The samples are rolling windows of a time-series dataset. The network maps [B, T, F] to predictions [B].

    Parameters
    ----------
    n_jobs : int
        Accepted and ignored: qfast gathers batches in the training process.
    others
        As in the flat `qfast.models.LSTM`, with the defaults of Qlib's time-series model.

    Raises
    ------
    ConfigError
        An unknown argument, or a value that is not allowed.
    BackendError
        The device is not available.

    Source
    ------
    Qlib (pyqlib 0.9.7), qlib/contrib/model/pytorch_lstm_ts.py.

    Examples
    --------
    >>> import torch
    >>> LSTM(d_feat=20, hidden_size=8, seed=0).network(torch.zeros(2, 20, 20)).shape
    torch.Size([2])
    """

    network_class = LSTMModel
    LSTM_model = network_alias()


class GRU(RecurrentTimeSeriesEstimator):
    """GRU over rolling windows (Alpha158), trained on shuffled samples.

    The samples are rolling windows of a time-series dataset. The network maps [B, T, F] to predictions [B].

    Parameters
    ----------
    n_jobs : int
        Accepted and ignored: qfast gathers batches in the training process.
    others
        As in the flat `qfast.models.GRU`, with the defaults of Qlib's time-series model.

    Raises
    ------
    ConfigError
        An unknown argument, or a value that is not allowed.
    BackendError
        The device is not available.

    Source
    ------
    Qlib (pyqlib 0.9.7), qlib/contrib/model/pytorch_gru_ts.py.

    Examples
    --------
    >>> import torch
    >>> GRU(d_feat=20, hidden_size=8, seed=0).network(torch.zeros(2, 20, 20)).shape
    torch.Size([2])
    """

    network_class = GRUModel
    GRU_model = network_alias()


class ALSTM(AttentiveTimeSeriesEstimator):
    """LSTM or GRU with attention over time on rolling windows (Alpha158), trained on shuffled samples.

    The samples are rolling windows of a time-series dataset. The network maps [B, T, F] to predictions [B].

    Parameters
    ----------
    n_jobs : int
        Accepted and ignored: qfast gathers batches in the training process.
    others
        As in the flat `qfast.models.ALSTM`, with the defaults of Qlib's time-series model.

    Raises
    ------
    ConfigError
        An unknown argument, or a value that is not allowed.
    BackendError
        The device is not available.

    Source
    ------
    Qlib (pyqlib 0.9.7), qlib/contrib/model/pytorch_alstm_ts.py.

    Examples
    --------
    >>> import torch
    >>> ALSTM(d_feat=20, hidden_size=8, seed=0).network(torch.zeros(2, 20, 20)).shape
    torch.Size([2])
    """


class GATs(GraphTimeSeriesEstimator):
    """Graph attention over all stocks of a day, on top of an LSTM or GRU over each stock's rolling window (Alpha158).

    The samples are rolling windows of a time-series dataset. The network maps [N, T, F], the N stocks of a day,
    to predictions [N].

    Parameters
    ----------
    n_jobs : int
        Accepted and ignored: qfast gathers batches in the training process.
    others
        As in the flat `qfast.models.GATs`, with the defaults of Qlib's time-series model.

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
    The batches of Qlib's model are not days but consecutive samples, ordered by stock. Its attention therefore runs
    over the dates of one stock (Qlib issues [1460](https://github.com/microsoft/qlib/issues/1460) and
    [2319](https://github.com/microsoft/qlib/issues/2319)). In qfast a batch is all stocks of one day, and the days are
    shuffled as in the flat model. `compat="qlib"` restores Qlib's batches, random draws and results. Predictions are
    ordered by instrument in both cases.

    Source
    ------
    Qlib (pyqlib 0.9.7), qlib/contrib/model/pytorch_gats_ts.py.

    Examples
    --------
    >>> import torch
    >>> GATs(d_feat=20, hidden_size=8, seed=0).network(torch.zeros(5, 20, 20)).shape
    torch.Size([5])
    """

    base_estimators: ClassVar[dict[str, type[Estimator]]] = {"GRU": GRU, "LSTM": LSTM}


class TCN(TemporalConvTimeSeriesEstimator):
    """Temporal convolution network over rolling windows (Alpha158), trained on shuffled samples.

    The samples are rolling windows of a time-series dataset. The network maps [B, F, T] to predictions [B].

    Parameters
    ----------
    n_jobs : int
        Accepted and ignored: qfast gathers batches in the training process.
    others
        As in the flat `qfast.models.TCN`, with the defaults of Qlib's time-series model.

    Raises
    ------
    ConfigError
        An unknown argument, or a value that is not allowed.
    BackendError
        The device is not available.

    Notes
    -----
    Qlib's `predict` does not transpose the windows
    ([issue 1401](https://github.com/microsoft/qlib/issues/1401)): it fails, or predicts from transposed data if
    step_len == d_feat. qfast transposes them; `compat="qlib"` restores Qlib's predictions.

    Source
    ------
    Qlib (pyqlib 0.9.7), qlib/contrib/model/pytorch_tcn_ts.py.

    Examples
    --------
    >>> import torch
    >>> TCN(d_feat=20, n_chans=8, seed=0).network(torch.zeros(2, 20, 30)).shape
    torch.Size([2])
    """

    TCN_model = network_alias()


class TransformerModel(EncoderTimeSeriesEstimator):
    """Transformer encoder over rolling windows (Alpha158) that predicts from the last step.

    The samples are rolling windows of a time-series dataset. The network maps [B, T, F] to predictions [B].

    Parameters
    ----------
    As in the flat `qfast.models.TransformerModel`, with the defaults of Qlib's time-series model.

    Raises
    ------
    ConfigError
        An unknown argument, or a value that is not allowed.
    BackendError
        The device is not available.

    Source
    ------
    Qlib (pyqlib 0.9.7), qlib/contrib/model/pytorch_transformer_ts.py.

    Examples
    --------
    >>> import torch
    >>> TransformerModel(d_feat=20, d_model=8, seed=0).network(torch.zeros(2, 20, 20)).shape
    torch.Size([2])
    """

    network_class = Transformer


class LocalformerModel(EncoderTimeSeriesEstimator):
    """Transformer encoder with local context and a GRU over its steps, on rolling windows (Alpha158).

    The samples are rolling windows of a time-series dataset. The network maps [B, T, F] to predictions [B].

    Parameters
    ----------
    As in the flat `qfast.models.LocalformerModel`, with the defaults of Qlib's time-series model.

    Raises
    ------
    ConfigError
        An unknown argument, or a value that is not allowed.
    BackendError
        The device is not available.

    Source
    ------
    Qlib (pyqlib 0.9.7), qlib/contrib/model/pytorch_localformer_ts.py.

    Examples
    --------
    >>> import torch
    >>> LocalformerModel(d_feat=20, d_model=8, seed=0).network(torch.zeros(2, 20, 20)).shape
    torch.Size([2])
    """

    network_class = Localformer
