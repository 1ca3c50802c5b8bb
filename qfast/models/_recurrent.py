"""The constructors of LSTM and GRU, flat and time-series. The training loop is `Estimator`."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from qfast.data.batching import BatchOrder, LoaderOrder
from qfast.estimator import Estimator

__all__ = ["Recurrent", "RecurrentTimeSeries"]


class Recurrent(Estimator):
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


class RecurrentTimeSeries(Recurrent):
    """As `Recurrent` with `n_jobs` before `GPU`; batches and loss precision of the reference's `_ts` models."""

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
