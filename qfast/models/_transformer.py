"""Constructors of Transformer and Localformer, flat and time-series."""

from __future__ import annotations

from typing import Any, ClassVar

from qfast.data.batching import BatchOrder, LoaderOrder
from qfast.errors import ConfigError
from qfast.training.estimator import Estimator

__all__ = ["EncoderEstimator", "EncoderTimeSeriesEstimator"]


class EncoderEstimator(Estimator):
    """Estimator with the arguments of Qlib's flat Transformer and Localformer, in Qlib's order."""

    decay_name: ClassVar[str] = "reg"
    model = property(lambda self: self.network, doc="The network, under Qlib's name.")

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
            raise ConfigError(f"{type(self).__name__} has no argument 'weight_decay'. Remedy: reg.")
        super().__init__(
            {"d_feat": d_feat, "d_model": d_model, "nhead": nhead, "num_layers": num_layers, "dropout": dropout},
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


class EncoderTimeSeriesEstimator(EncoderEstimator):
    """`EncoderEstimator` with the batches of Qlib's `_ts` models, which are also larger by default."""

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
            d_feat,
            d_model,
            batch_size,
            nhead,
            num_layers,
            dropout,
            n_epochs,
            lr,
            metric,
            early_stop,
            loss,
            optimizer,
            reg,
            n_jobs,
            GPU,
            seed,
            **options,
        )
