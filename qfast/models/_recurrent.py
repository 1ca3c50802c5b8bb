"""Constructors of LSTM, GRU and ALSTM, flat and time-series."""

from __future__ import annotations

from collections.abc import Callable
from math import ceil
from typing import Any, ClassVar

import torch
from torch import nn

from qfast.data.batching import BatchOrder, LoaderOrder
from qfast.models._period import WholePeriod
from qfast.nn import ALSTMModel
from qfast.training.base import network_alias
from qfast.training.estimator import Estimator

CALL_COST = 10  # fixed cost of a network call in windows, measured: the last tiles of a call are not full
NEVER = 2**62

__all__ = [
    "AttentiveEstimator",
    "AttentiveTimeSeriesEstimator",
    "RecurrentEstimator",
    "RecurrentTimeSeriesEstimator",
]


class RecurrentEstimator(Estimator):
    """Estimator with the arguments of Qlib's flat LSTM and GRU, in Qlib's order."""

    network_options: ClassVar[dict[str, Any]] = {}
    """Further keyword arguments of the network, with their defaults."""

    def __init__(
        self,
        d_feat: int = 6,
        hidden_size: int = 64,
        num_layers: int = 2,
        dropout: float = 0.0,
        n_epochs: int = 200,
        lr: float = 0.001,
        metric: str | Callable[..., Any] = "",
        batch_size: int = 2000,
        early_stop: int = 20,
        loss: str | Callable[..., Any] = "mse",
        optimizer: str = "adam",
        GPU: int | None = 0,
        seed: int | None = None,
        **options: Any,
    ) -> None:
        further = {name: options.pop(name, default) for name, default in self.network_options.items()}
        super().__init__(
            {"d_feat": d_feat, "hidden_size": hidden_size, "num_layers": num_layers, "dropout": dropout} | further,
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


class RecurrentTimeSeriesEstimator(WholePeriod, RecurrentEstimator):
    """`RecurrentEstimator` with `n_jobs` before `GPU`, and with the batches and float64 loss of Qlib's `_ts` models."""

    order: ClassVar[BatchOrder] = LoaderOrder()
    loss_dtype: ClassVar[torch.dtype] = torch.float64
    weights_in_batches: ClassVar[bool] = True

    def __init__(
        self,
        d_feat: int = 6,
        hidden_size: int = 64,
        num_layers: int = 2,
        dropout: float = 0.0,
        n_epochs: int = 200,
        lr: float = 0.001,
        metric: str | Callable[..., Any] = "",
        batch_size: int = 2000,
        early_stop: int = 20,
        loss: str | Callable[..., Any] = "mse",
        optimizer: str = "adam",
        n_jobs: int = 10,
        GPU: int | None = 0,
        seed: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            d_feat,
            hidden_size,
            num_layers,
            dropout,
            n_epochs,
            lr,
            metric,
            batch_size,
            early_stop,
            loss,
            optimizer,
            GPU,
            seed,
            extra={"n_jobs": n_jobs},
            **options,
        )

    def min_consecutive(self, features: int, steps: int) -> int:
        """Length of the shortest run whose saved first-layer products outweigh the fixed cost of a call (CALL_COST)."""
        per_row, total = self.multiply_adds(features)
        return ceil(CALL_COST * total * steps / (per_row * (steps - 1))) if steps > 1 else NEVER

    def multiply_adds(self, features: int) -> tuple[int, int]:
        """Multiply-adds of one step in units of H times the number of gates: those that need only the row, and all."""
        hidden, layers = self._params["hidden_size"], self._params["num_layers"]
        return features, features + (2 * layers - 1) * hidden


class AttentiveEstimator(RecurrentEstimator):
    """`RecurrentEstimator` with the keyword `rnn_type`, which Qlib accepts and ignores: it always builds a GRU."""

    network_class = ALSTMModel
    network_options: ClassVar[dict[str, Any]] = {"rnn_type": "GRU"}
    options: ClassVar[tuple[str, ...]] = (*RecurrentEstimator.options, *network_options)
    ALSTM_model = network_alias()

    def build_network(self, *, rnn_type: str, **network: Any) -> nn.Module:  # type: ignore[override]
        """Build the network with a layer of type `rnn_type`; with compat="qlib" always with a GRU."""
        if self._params["compat"] == "qlib":
            if str(rnn_type).upper() != "GRU":
                self.logger.warning("rnn_type=%r has no effect with compat='qlib': a GRU is built", rnn_type)
            rnn_type = "GRU"
        elif str(rnn_type).upper() != "GRU":
            self.logger.info("rnn_type=%r is built; Qlib ignores rnn_type and builds a GRU", rnn_type)
        return self.network_class(rnn_type=rnn_type, **network)


class AttentiveTimeSeriesEstimator(AttentiveEstimator, RecurrentTimeSeriesEstimator):
    """`AttentiveEstimator` with the arguments, batches and loss of `RecurrentTimeSeriesEstimator`."""

    def multiply_adds(self, features: int) -> tuple[int, int]:
        """As in `RecurrentTimeSeriesEstimator`."""
        hidden, layers, gates = self._params["hidden_size"], self._params["num_layers"], 3
        # Per row: the input layer `net`, and the first recurrent layer's products with its output.
        head = features / gates + hidden
        return ceil(head), ceil(head + (2 * layers - 1) * hidden)
