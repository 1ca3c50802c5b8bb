"""LSTM and GRU estimators, flat and time-series; one constructor each, the training loop is `Estimator`."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from qfast.data.batching import BatchOrder, LoaderOrder
from qfast.estimator import Estimator
from qfast.nn import GRUModel, LSTMModel

__all__ = ["GRU", "LSTM", "GRUTimeSeries", "LSTMTimeSeries"]


class _Recurrent(Estimator):
    """Arguments of the reference's flat LSTM and GRU, positional order included."""

    def __init__(
        self,
        d_feat: int = 6,
        hidden_size: int = 64,
        num_layers: int = 2,
        dropout: float = 0.0,
        n_epochs: int = 200,
        lr: float = 0.001,
        metric: str = "",
        batch_size: int = 2000,
        early_stop: int = 20,
        loss: str = "mse",
        optimizer: str = "adam",
        GPU: Any = 0,
        seed: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            {"d_feat": d_feat, "hidden_size": hidden_size, "num_layers": num_layers, "dropout": dropout},
            n_epochs=n_epochs,
            lr=lr,
            metric=metric,
            batch_size=batch_size,
            early_stop=early_stop,
            loss=loss,
            optimizer=optimizer,
            GPU=GPU,
            seed=seed,
            **options,
        )


class _RecurrentTimeSeries(_Recurrent):
    """As `_Recurrent` with `n_jobs` before `GPU`; batches and loss precision of the reference's `_ts` models."""

    order: ClassVar[BatchOrder] = LoaderOrder()
    loss_dtype: ClassVar[torch.dtype] = torch.float64

    def __init__(
        self,
        d_feat: int = 6,
        hidden_size: int = 64,
        num_layers: int = 2,
        dropout: float = 0.0,
        n_epochs: int = 200,
        lr: float = 0.001,
        metric: str = "",
        batch_size: int = 2000,
        early_stop: int = 20,
        loss: str = "mse",
        optimizer: str = "adam",
        n_jobs: int = 10,
        GPU: Any = 0,
        seed: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            d_feat, hidden_size, num_layers, dropout, n_epochs, lr, metric, batch_size, early_stop, loss, optimizer,
            GPU, seed, extra={"n_jobs": n_jobs}, **options,
        )  # fmt: skip


class LSTM(_Recurrent):
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
    >>> LSTM(d_feat=6, hidden_size=8, seed=0).network(torch.zeros(2, 360)).shape
    torch.Size([2])
    """

    network_class = LSTMModel
    lstm_model = property(lambda self: self.network, doc="The network, under the reference's name.")


class GRU(_Recurrent):
    """GRU over flat windows (Alpha360 style); training rows with any NaN are left out, as in the reference.

    Parameters and notes as `LSTM`. Reference: qlib.contrib.model.pytorch_gru.GRU.

    Examples
    --------
    >>> GRU(d_feat=6, hidden_size=8, seed=0).network(torch.zeros(2, 360)).shape
    torch.Size([2])
    """

    network_class = GRUModel
    drops_incomplete_rows = True
    gru_model = property(lambda self: self.network, doc="The network, under the reference's name.")


class LSTMTimeSeries(_RecurrentTimeSeries):
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
    >>> LSTMTimeSeries(d_feat=20, hidden_size=8, seed=0).network(torch.zeros(2, 20, 20)).shape
    torch.Size([2])
    """

    network_class = LSTMModel
    LSTM_model = property(lambda self: self.network, doc="The network, under the reference's name.")


class GRUTimeSeries(_RecurrentTimeSeries):
    """GRU over rolling windows (Alpha158 style). Parameters as `LSTMTimeSeries`.

    Reference: pyqlib 0.9.7, qlib.contrib.model.pytorch_gru_ts.GRU.

    Examples
    --------
    >>> GRUTimeSeries(d_feat=20, hidden_size=8, seed=0).network(torch.zeros(2, 20, 20)).shape
    torch.Size([2])
    """

    network_class = GRUModel
    GRU_model = property(lambda self: self.network, doc="The network, under the reference's name.")
