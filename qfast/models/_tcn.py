"""Constructors of TCN, flat and time-series."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pandas as pd
import torch
from torch import Tensor, nn

from qfast.data.batching import BatchOrder, LoaderOrder
from qfast.data.protocols import Dataset, Segment
from qfast.data.windows import WindowSet
from qfast.errors import DataError, whole_number
from qfast.models._period import WholePeriod
from qfast.nn.plain import has_hooks
from qfast.nn.tcn import TCNModel, TemporalConvNet
from qfast.ops.temporal_conv import temporal_conv_net
from qfast.ops.temporal_conv_plan import Plan
from qfast.training.estimator import Estimator

CALL_COST = 50e6  # fixed cost of a network call in multiply-adds, measured
WINDOWS_SAVED = 3  # a window that shares rows costs at most three quarters of another one, measured
MIN_CONSECUTIVE = 16

__all__ = ["TemporalConvEstimator", "TemporalConvTimeSeriesEstimator"]


class TemporalConvEstimator(Estimator):
    """Estimator with the arguments of Qlib's flat TCN, in Qlib's order."""

    network_class = TCNModel

    def __init__(
        self,
        d_feat: int = 6,
        n_chans: int = 128,
        kernel_size: int = 5,
        num_layers: int = 5,
        dropout: float = 0.5,
        n_epochs: int = 200,
        lr: float = 0.0001,
        metric: str | Callable[..., Any] = "",
        batch_size: int = 2000,
        early_stop: int = 20,
        loss: str | Callable[..., Any] = "mse",
        optimizer: str = "adam",
        GPU: int | None = 0,
        seed: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            {
                "d_feat": d_feat,
                "n_chans": n_chans,
                "kernel_size": kernel_size,
                "num_layers": num_layers,
                "dropout": dropout,
            },
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

    def build_network(self, d_feat: int, n_chans: int, kernel_size: int, num_layers: int, dropout: float) -> TCNModel:  # type: ignore[override]
        """Build a network of `num_layers` blocks with `n_chans` channels each and one output."""
        d_feat, n_chans = whole_number("d_feat", d_feat), whole_number("n_chans", n_chans)
        num_channels = [n_chans] * whole_number("num_layers", num_layers)
        return self.network_class(d_feat, 1, num_channels, kernel_size, dropout)

    def run_network(self, windows: WindowSet, samples: Tensor, offsets: Tensor | None = None) -> Tensor:
        """As `Estimator.run_network`, with windows transposed to [B, F, T]."""
        prediction: Tensor = self.network(self.network_input(windows, samples))
        return prediction

    def network_input(self, windows: WindowSet, samples: Tensor) -> Tensor:
        """Features of some samples as the network reads them.

        Parameters
        ----------
        windows : WindowSet
        samples : Tensor
            int64 [B], sample numbers.

        Returns
        -------
        Tensor
            [B, F, T], or [B, F*T] feature-major for flat samples.

        Raises
        ------
        DataError
            The number of columns does not match `d_feat`.
        """
        x = windows.batch(samples)
        d_feat = self._params["d_feat"]
        if windows.step_len is None:
            if x.shape[1] % d_feat:
                raise DataError(f"the data has {x.shape[1]} columns, which is not a multiple of d_feat={d_feat}.")
            return x
        if x.shape[2] != d_feat:
            raise DataError(
                f"the data has {x.shape[2]} features per step, but the model has d_feat={d_feat}. Remedy: "
                f"d_feat={x.shape[2]}."
            )
        return x.transpose(1, 2)


class TemporalConvTimeSeriesEstimator(WholePeriod, TemporalConvEstimator):
    """`TemporalConvEstimator` with the defaults, the argument `n_jobs`, and the batches of Qlib's `_ts` model.

    The loss has the dtype of the label.
    """

    order: ClassVar[BatchOrder] = LoaderOrder()
    loss_dtype: ClassVar[torch.dtype | None] = None

    def __init__(
        self,
        d_feat: int = 6,
        n_chans: int = 128,
        kernel_size: int = 5,
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
            n_chans,
            kernel_size,
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
        self._forgets_transpose = False

    def network_input(self, windows: WindowSet, samples: Tensor) -> Tensor:
        """As in `TemporalConvEstimator`; while predicting with compat="qlib", [B, T, F]."""
        if self._forgets_transpose:
            return self._untransposed(windows, samples)
        return super().network_input(windows, samples)

    def min_consecutive(self, features: int, steps: int) -> int:
        """As in `WholePeriod`: the saved multiply-adds must outweigh the fixed cost of a call (CALL_COST)."""
        return max(MIN_CONSECUTIVE, round(CALL_COST / self._multiply_adds(features, steps)))

    def min_joined(self, features: int, steps: int) -> int | None:
        """As in `WholePeriod`: None for a changed network, whose modules and hooks receive only the samples' windows.

        The superfluous windows must cost less than the windows of the sequence save.
        """
        return max(MIN_CONSECUTIVE, WINDOWS_SAVED * (steps - 1)) if _is_unchanged(self.network) else None

    def _multiply_adds(self, features: int, steps: int) -> int:
        """Multiply-adds of one window."""
        params = self._params
        channels = [params["n_chans"]] * params["num_layers"]
        plan: Plan = temporal_conv_net.plan(steps, params["kernel_size"], len(channels))  # type: ignore[attr-defined]
        return plan.multiply_adds(features, channels)[0]

    # ---------------------------------------------------------------- Qlib's predictions
    def predict(self, dataset: Dataset, segment: Segment = "test") -> pd.Series:
        """As `Estimator.predict`.

        With compat="qlib" the network reads [B, T, F] as [B, F, T]: Qlib transposes windows in training but not in
        prediction.

        Raises
        ------
        DataError
            Also if compat="qlib" and step_len differs from d_feat.
        """
        self._forgets_transpose = self._params["compat"] == "qlib"
        try:
            return super().predict(dataset, segment)
        finally:
            self._forgets_transpose = False

    __call__ = predict

    def _untransposed(self, windows: WindowSet, samples: Tensor) -> Tensor:
        x = windows.batch(samples)
        d_feat = self._params["d_feat"]
        if windows.step_len not in (None, d_feat):
            raise DataError(
                "compat='qlib' predicts as Qlib, which does not transpose the windows: this needs step_len == d_feat, "
                f"got step_len={windows.step_len} and d_feat={d_feat}. Remedy: compat=None, which transposes them."
            )
        return x


def _is_unchanged(network: nn.Module) -> bool:
    """Return whether a network has only the modules that it was built with, and no hooks."""
    if type(network) is not TCNModel or type(network.tcn) is not TemporalConvNet or has_hooks(network.tcn):
        return False
    if type(network.linear) is not nn.Linear or has_hooks(network) or has_hooks(network.linear):
        return False
    return network.tcn.uses_operator()
