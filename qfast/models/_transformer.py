"""Constructors of Transformer and Localformer, flat and time-series."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from qfast.data.batching import BatchOrder, LoaderOrder
from qfast.errors import ConfigError
from qfast.training.base import network_alias
from qfast.training.estimator import Estimator

DEFAULT_DECAY = 1e-3

__all__ = ["EncoderEstimator", "EncoderTimeSeriesEstimator"]


class EncoderEstimator(Estimator):
    """Estimator with the arguments of Qlib's flat Transformer and Localformer, in Qlib's order."""

    decay_name: ClassVar[str] = "reg"
    model = network_alias()

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
        metric: str | Callable[..., Any] = "",
        early_stop: int = 5,
        loss: str | Callable[..., Any] = "mse",
        optimizer: str = "adam",
        reg: float = DEFAULT_DECAY,
        n_jobs: int = 10,
        GPU: int | None = 0,
        seed: int | None = None,
        **options: Any,
    ) -> None:
        decay = options.pop("weight_decay", None)
        if decay is not None and reg not in (decay, DEFAULT_DECAY):
            raise ConfigError(f"reg={reg!r} and weight_decay={decay!r} are the same argument. Remedy: pass only one.")
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
            weight_decay=reg if decay is None else decay,
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
        metric: str | Callable[..., Any] = "",
        early_stop: int = 5,
        loss: str | Callable[..., Any] = "mse",
        optimizer: str = "adam",
        reg: float = DEFAULT_DECAY,
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
