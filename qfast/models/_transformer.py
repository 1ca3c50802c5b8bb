"""The constructors of Transformer and Localformer, flat and time-series. The training loop is `Estimator`."""

from __future__ import annotations

from typing import Any, ClassVar

from qfast.data.batching import BatchOrder, LoaderOrder
from qfast.errors import ConfigError
from qfast.training.estimator import Estimator

__all__ = ["Encoder", "EncoderTimeSeries"]


class Encoder(Estimator):
    """Arguments of the reference's flat Transformer and Localformer, positional order included."""

    decay_name: ClassVar[str] = "reg"
    model = property(lambda self: self.network, doc="The network, under the reference's name.")

    def __init__(
        self,
        d_feat: int = 20,
        d_model: int = 64,
        batch_size: int = 2048,
        nhead: int = 2,
        num_layers: int = 2,
        dropout: float = 0,
        n_epochs: int = 100,
        lr: float = 0.0001,
        metric: str = "",
        early_stop: int = 5,
        loss: str = "mse",
        optimizer: str = "adam",
        reg: float = 1e-3,
        n_jobs: int = 10,
        GPU: int | None = 0,
        seed: int | None = None,
        **options: Any,
    ) -> None:
        if "weight_decay" in options:
            raise ConfigError(f"{type(self).__name__} has no argument 'weight_decay': its name here is 'reg'.")
        network = {
            "d_feat": d_feat, "d_model": d_model, "nhead": nhead, "num_layers": num_layers, "dropout": dropout,
        }  # fmt: skip
        super().__init__(
            network,
            n_epochs=n_epochs,
            lr=lr,
            metric=metric,
            batch_size=batch_size,
            early_stop=early_stop,
            loss=loss,
            optimizer=optimizer,
            GPU=GPU,
            seed=seed,
            weight_decay=reg,
            extra={"n_jobs": n_jobs},
            **options,
        )


class EncoderTimeSeries(Encoder):
    """As `Encoder` with larger batches, those of the reference's `_ts` models."""

    order: ClassVar[BatchOrder] = LoaderOrder()

    def __init__(
        self,
        d_feat: int = 20,
        d_model: int = 64,
        batch_size: int = 8192,
        nhead: int = 2,
        num_layers: int = 2,
        dropout: float = 0,
        n_epochs: int = 100,
        lr: float = 0.0001,
        metric: str = "",
        early_stop: int = 5,
        loss: str = "mse",
        optimizer: str = "adam",
        reg: float = 1e-3,
        n_jobs: int = 10,
        GPU: int | None = 0,
        seed: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            d_feat, d_model, batch_size, nhead, num_layers, dropout, n_epochs, lr, metric, early_stop, loss,
            optimizer, reg, n_jobs, GPU, seed, **options,
        )  # fmt: skip
