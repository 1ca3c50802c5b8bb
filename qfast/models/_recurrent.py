"""The constructors of LSTM, GRU and ALSTM, flat and time-series. The training loop is `Estimator`."""

from __future__ import annotations

from math import ceil
from typing import Any, ClassVar

import torch
from torch import nn

from qfast.data.batching import BatchOrder, LoaderOrder
from qfast.models._period import WholePeriod
from qfast.nn import ALSTMModel
from qfast.training.estimator import Estimator

# What a call for windows that follow each other adds, in windows: its last tiles are not full. Measured.
CALL_COST = 10
NEVER = 2**62

__all__ = ["Attentive", "AttentiveTimeSeries", "Recurrent", "RecurrentTimeSeries"]


class Recurrent(Estimator):
    """Arguments of the reference's flat LSTM and GRU, positional order included."""

    network_options: ClassVar[dict[str, Any]] = {}  # keyword arguments of the network alone, and their defaults

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
        GPU: int | None = 0,
        seed: int | None = None,
        **options: Any,
    ) -> None:
        more = {name: options.pop(name, default) for name, default in self.network_options.items()}
        super().__init__(
            {"d_feat": d_feat, "hidden_size": hidden_size, "num_layers": num_layers, "dropout": dropout, **more},
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


class RecurrentTimeSeries(WholePeriod, Recurrent):
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
        GPU: int | None = 0,
        seed: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            d_feat, hidden_size, num_layers, dropout, n_epochs, lr, metric, batch_size, early_stop, loss, optimizer,
            GPU, seed, extra={"n_jobs": n_jobs}, **options,
        )  # fmt: skip

    def fewest_in_call(self, features: int, steps: int) -> int:
        """Those of whose multiplications `CALL_COST` windows' worth are saved: the first layer's products with rows."""
        per_row, every = self.multiply_adds(features)
        return ceil(CALL_COST * every * steps / (per_row * (steps - 1))) if steps > 1 else NEVER

    def multiply_adds(self, features: int) -> tuple[int, int]:
        """Of a step, in units of H times the gates: those that depend on a row alone, and all."""
        hidden, layers = self._params["hidden_size"], self._params["num_layers"]
        return features, features + (2 * layers - 1) * hidden


class Attentive(Recurrent):
    """As `Recurrent`, and `rnn_type`: the reference takes it, ignores it and builds a GRU."""

    network_class = ALSTMModel
    network_options: ClassVar[dict[str, Any]] = {"rnn_type": "GRU"}
    options: ClassVar[tuple[str, ...]] = (*Recurrent.options, *network_options)
    ALSTM_model = property(lambda self: self.network, doc="The network, under the reference's name.")

    def build_network(self, *, rnn_type: str, **network: Any) -> nn.Module:  # type: ignore[override]
        """The network with the layer that `rnn_type` asks for; with compat="qlib" it is a GRU in any case."""
        asked = str(rnn_type).upper()
        if self._params["compat"] == "qlib":
            if asked != "GRU":
                self.logger.warning("rnn_type=%r has no effect with compat='qlib': a GRU is built", rnn_type)
            rnn_type = "GRU"
        elif asked != "GRU":
            self.logger.info("rnn_type=%r is built; the reference would ignore it and build a GRU", rnn_type)
        return self.network_class(rnn_type=rnn_type, **network)


class AttentiveTimeSeries(Attentive, RecurrentTimeSeries):
    """As `Attentive`, with the arguments, batches and loss precision of `RecurrentTimeSeries`."""

    def multiply_adds(self, features: int) -> tuple[int, int]:
        hidden, layers, gates = self._params["hidden_size"], self._params["num_layers"], 3
        head = features / gates + hidden  # `net`, and the first layer's products with what it gives
        return ceil(head), ceil(head + (2 * layers - 1) * hidden)
