"""LSTM and GRU networks that predict from the last step of a window.

Parameter names, creation order and initial weights match Qlib (pyqlib 0.9.7, qlib/contrib/model/pytorch_lstm.py and
pytorch_gru.py), so state dicts can be exchanged in both directions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from qfast.errors import ConfigError, DataError, whole_number
from qfast.nn.plain import has_hooks
from qfast.nn.recurrent_layer import HasRecurrentLayer
from qfast.ops import recurrent

__all__ = ["GRUModel", "LSTMModel", "Recurrent", "as_windows"]


def as_windows(x: Tensor, d_feat: int) -> Tensor:
    """Return a batch of windows as [B, T, F].

    Parameters
    ----------
    x : Tensor
        [B, T, F], or [B, F*T] feature-major (all T steps of feature 0, then all of feature 1, ...), which is the
        column order of Alpha360.
    d_feat : int
        F.

    Returns
    -------
    Tensor [B, T, F]
        x itself if it has three axes.

    Raises
    ------
    DataError
        If the last axis does not match d_feat, or x does not have two or three axes.

    Examples
    --------
    >>> as_windows(torch.tensor([[1.0, 2.0, 3.0, 10.0, 20.0, 30.0]]), d_feat=2)[0]
    tensor([[ 1., 10.],
            [ 2., 20.],
            [ 3., 30.]])
    """
    if x.dim() == 3:
        if x.shape[2] != d_feat:
            raise DataError(
                f"x has {x.shape[2]} features (shape {list(x.shape)} read as [B, T, F]) but the network was "
                f"built with d_feat={d_feat}. Remedy: d_feat={x.shape[2]}."
            )
        return x
    if x.dim() == 2:
        if x.shape[1] % d_feat or x.shape[1] == 0:
            raise DataError(
                f"x has {x.shape[1]} columns, which is not a multiple of d_feat={d_feat}: a flat window "
                "[B, F*T] has T columns for each feature. Remedy: set d_feat to the number of features per step."
            )
        return x.reshape(x.shape[0], d_feat, x.shape[1] // d_feat).permute(0, 2, 1)
    raise DataError(
        f"x must be [B, T, F] or [B, F*T], got {x.dim()} axes with shape {list(x.shape)}. "
        "Remedy: x.unsqueeze(0) if x is a single window."
    )


class Recurrent(HasRecurrentLayer):
    """Base class of the networks that run a recurrent layer, `rnn`, over a window.

    Subclasses return the class of the layer and its operator from `_kind`, and may register modules that run before
    `rnn` in `_add_head`.

    Parameters
    ----------
    kind : type
        LSTMModel, GRUModel or another class with a `layer`.
    d_feat, hidden_size, num_layers : int
        F, H and L.
    dropout : float
        Probability of dropout between the recurrent layers, in training only.
    precision : {"float32", "bf16", "bf16-if-available"}
        Precision of the operators' products on a CPU (docs/precision.md). It is not part of the state dict.

    Raises
    ------
    ConfigError
        If a size is not an integer of at least 1, dropout is outside [0, 1], or precision is unknown.
    """

    def __init__(
        self,
        kind: type[_RecurrentModel],
        d_feat: int,
        hidden_size: int,
        num_layers: int,
        dropout: float,
        *,
        precision: str = "float32",
    ) -> None:
        super().__init__(precision)
        d_feat = whole_number("d_feat", d_feat)
        hidden_size = whole_number("hidden_size", hidden_size)
        num_layers = whole_number("num_layers", num_layers)
        if not 0.0 <= float(dropout) <= 1.0:
            raise ConfigError(f"dropout must be in [0, 1], got {dropout!r}.")
        # torch warns about dropout in a single recurrent layer, where it has no effect. Qlib's defaults often
        # combine the two.
        between_layers = float(dropout) if num_layers > 1 else 0.0
        rnn_inputs = self._add_head(d_feat, hidden_size)
        self.rnn = kind.layer(rnn_inputs, hidden_size, num_layers=num_layers, batch_first=True, dropout=between_layers)
        self.d_feat = d_feat

    def _add_head(self, d_feat: int, hidden_size: int) -> int:
        """Register the modules that run before `rnn`; return the number of features that `rnn` reads.

        It is called before `rnn` is created because Qlib draws the initial weights in this order.
        """
        return d_feat

    def _kind(self) -> type[_RecurrentModel]:
        """Return the class that holds the type of `rnn` and its operator."""
        raise NotImplementedError

    def _last_step(self, x: Tensor) -> Tensor:
        """Run `rnn` over [B, T, F] and return its last step [B, H].

        The operator and torch's layer give the same result up to rounding.
        """
        # TorchScript skips the body of this `if` and does not compile what it calls, but only while
        # `not is_scripting()` is the whole condition.
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            uses_operator = self._uses_operator(x)
            if uses_operator:
                return self._by_operator(x)
        out: Tensor = self.rnn(x)[0]
        return out[:, -1, :]

    def _by_operator(self, x: Tensor) -> Tensor:
        """Compute `_last_step` with qfast's operator."""
        return self._run_operator(x, all_steps=False)[0]

    def _run_operator(self, x: Tensor, all_steps: bool) -> tuple[Tensor, Tensor]:
        """Run the operator over [B, T, F].

        Returns h of the last step [B, H], or of all steps [B, T, H], and the last h of every layer [L, B, H].
        """
        weights, dropout, training = self._layer_arguments()
        operator = self._kind().operator
        output, state = operator(
            x, weights, dropout=dropout, training=training, all_steps=all_steps, precision=self.precision
        )
        return output, state[0] if isinstance(state, tuple) else state

    def _uses_operator(self, x: Tensor) -> bool:
        """Return whether qfast's operator computes `rnn` on x."""
        return self._layer_is_built() and self._can_use_operator(x, self._layer_dtype_source())

    def _is_built_layer(self, rnn: nn.Module) -> bool:
        if type(rnn) is not self._kind().layer or rnn.bidirectional or rnn.proj_size or not rnn.bias:
            return False
        return rnn.batch_first and not has_hooks(rnn)


class _RecurrentModel(Recurrent):
    """fc_out(last step of the top recurrent layer). Subclasses set the layer and its operator."""

    layer: ClassVar[type[nn.LSTM] | type[nn.GRU]]
    operator: ClassVar[Callable[..., tuple[Tensor, Tensor | tuple[Tensor, Tensor]]]]

    def __init__(
        self,
        d_feat: int = 6,
        hidden_size: int = 64,
        num_layers: int = 2,
        dropout: float = 0.0,
        *,
        precision: str = "float32",
    ) -> None:
        super().__init__(type(self), d_feat, hidden_size, num_layers, dropout, precision=precision)
        self.fc_out = nn.Linear(hidden_size, 1)

    def _kind(self) -> type[_RecurrentModel]:
        return type(self)

    def forward(self, x: Tensor) -> Tensor:
        """Predict from [B, T, F] or [B, F*T] -> [B]. A batch of one also returns [1], where Qlib returns a scalar."""
        prediction: Tensor = self.fc_out(self._last_step(as_windows(x, self.d_feat))).squeeze(-1)
        return prediction


class LSTMModel(_RecurrentModel):
    """Stacked LSTM that predicts from the last step (Hochreiter and Schmidhuber 1997; Qlib: pytorch_lstm.py).

    Parameters
    ----------
    d_feat, hidden_size, num_layers : int
        F, H and L.
    dropout : float
        Probability of dropout between the layers, in training only.
    precision : {"float32", "bf16", "bf16-if-available"}
        Precision of the operators' products on a CPU (docs/precision.md). It is not part of the state dict.

    Raises
    ------
    ConfigError
        If a size is not an integer of at least 1, dropout is outside [0, 1], or precision is unknown.

    Notes
    -----
    `rnn` is torch's layer, so it can be replaced, hooked or quantized. qfast's operator computes it as long as it is
    unchanged, on the CPU and, with QFAST_CUDA_LAYERS=qfast, on CUDA. Otherwise, and under torch.jit, torch.export,
    autocast and `to_reference()`, torch's layer computes it.

    torch.compile includes the operator in its graph, also with fullgraph=True. The transforms of torch.func and
    forward mode are supported. Double backward is not: use `to_reference()`, or apply torch.func.grad twice.

    Examples
    --------
    >>> LSTMModel(d_feat=6)(torch.zeros(3, 360)).shape
    torch.Size([3])
    """

    layer = nn.LSTM
    operator = recurrent.lstm


class GRUModel(_RecurrentModel):
    """Stacked GRU that predicts from the last step (Cho et al. 2014; Qlib: pytorch_gru.py).

    Parameters, errors and notes are the same as for `LSTMModel`.

    Examples
    --------
    >>> GRUModel(d_feat=20)(torch.zeros(3, 20, 20)).shape
    torch.Size([3])
    """

    layer = nn.GRU
    operator = recurrent.gru
