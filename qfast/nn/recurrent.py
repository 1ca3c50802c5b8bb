"""LSTM and GRU over a window, read at the last step.

Parameter names, creation order and initial weights are those of the reference
(pyqlib 0.9.7, qlib/contrib/model/pytorch_lstm.py and pytorch_gru.py), so state dicts travel both ways.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from qfast.errors import ConfigError, DataError, whole_number
from qfast.nn.plain import PlainTorch, has_hooks
from qfast.ops import recurrent

__all__ = ["GRUModel", "LSTMModel", "Recurrent", "as_windows"]


def as_windows(x: Tensor, d_feat: int) -> Tensor:
    """Bring a batch to [B, T, F].

    Parameters
    ----------
    x : Tensor
        [B, T, F], or [B, F*T] feature-major (all T steps of feature 0, then of feature 1, ...), the
        layout of Alpha360 columns.
    d_feat : int
        F.

    Raises
    ------
    DataError
        The last axis does not fit d_feat.

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
                "[B, F*T] holds T steps of each feature. Remedy: set d_feat to the number of features per step."
            )
        return x.reshape(len(x), d_feat, x.shape[1] // d_feat).permute(0, 2, 1)
    raise DataError(f"x must be [B, T, F] or [B, F*T], got {x.dim()} axes with shape {list(x.shape)}.")


def layer_weights(rnn: nn.RNNBase) -> list[list[Tensor]]:
    """Of each layer, as the operators take them."""
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    return [[getattr(rnn, f"{name}_l{layer}") for name in names] for layer in range(rnn.num_layers)]


class Recurrent(PlainTorch):
    """`rnn` over a window, read at its last step: what every network with such a base begins with."""

    def __init__(
        self, kind: type[_RecurrentModel], d_feat: int, hidden_size: int, num_layers: int, dropout: float
    ) -> None:
        super().__init__()
        d_feat, hidden_size = whole_number("d_feat", d_feat), whole_number("hidden_size", hidden_size)
        num_layers = whole_number("num_layers", num_layers)
        if not 0.0 <= float(dropout) <= 1.0:
            raise ConfigError(f"dropout must lie in [0, 1], got {dropout!r}.")
        # nn.LSTM warns about dropout without a second layer, where it has no effect; the reference's
        # defaults make that combination common.
        between = float(dropout) if num_layers > 1 else 0.0
        inputs = self._add_head(d_feat, hidden_size)
        self.rnn = kind.layer(inputs, hidden_size, num_layers=num_layers, batch_first=True, dropout=between)
        self.d_feat = d_feat

    def _add_head(self, d_feat: int, hidden_size: int) -> int:
        """Registers what stands before `rnn`, which draws its weights first; the features that `rnn` gets."""
        return d_feat

    def _kind(self) -> type[_RecurrentModel]:
        """The class that knows the layer and its operator."""
        raise NotImplementedError

    def _last_step(self, x: Tensor) -> Tensor:
        """[B, T, F] -> [B, H]; the same numbers by either way, up to rounding."""
        # A script leaves the outer branch out, and so does not compile what it calls: it must stay alone.
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            takes_operator = self._takes_operator(x)
            if takes_operator:
                return self._by_operator(x)
        out: Tensor = self.rnn(x)[0]
        return out[:, -1, :]

    def _by_operator(self, x: Tensor) -> Tensor:
        return self._run_operator(x, all_steps=False)[0]

    def _run_operator(self, x: Tensor, all_steps: bool) -> tuple[Tensor, Tensor]:
        """[B, T, F] -> h of the last step [B, H] or of all steps [B, T, H], and the last of each layer [L, B, H]."""
        rnn, layers = self.rnn, layer_weights(self.rnn)
        operator = self._kind().operator
        output, state = operator(x, layers, dropout=rnn.dropout, training=rnn.training, all_steps=all_steps)
        return output, state[0] if isinstance(state, tuple) else state

    def _takes_operator(self, x: Tensor) -> bool:
        """Whether to compute with our operator."""
        return self._is_plain(self.rnn) and self._may_take_operator(x, cast(Tensor, self.rnn.weight_ih_l0))

    def _is_plain(self, rnn: nn.Module) -> bool:
        """Whether `rnn` is still the layer that was built here: nothing but it would do what the operator does."""
        if type(rnn) is not self._kind().layer or rnn.bidirectional or rnn.proj_size or not rnn.bias:
            return False
        return rnn.batch_first and not has_hooks(rnn)


class _RecurrentModel(Recurrent):
    """fc_out(last step of the top recurrent layer); subclasses say which layer."""

    layer: ClassVar[type[nn.LSTM] | type[nn.GRU]]
    operator: ClassVar[Callable[..., tuple[Tensor, Any]]]

    def __init__(self, d_feat: int = 6, hidden_size: int = 64, num_layers: int = 2, dropout: float = 0.0) -> None:
        super().__init__(type(self), d_feat, hidden_size, num_layers, dropout)
        self.fc_out = nn.Linear(hidden_size, 1)

    def _kind(self) -> type[_RecurrentModel]:
        return type(self)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, F] or [B, F*T] -> [B]; a batch of one stays one-dimensional (the reference returns 0-d)."""
        prediction: Tensor = self.fc_out(self._last_step(as_windows(x, self.d_feat))).squeeze(-1)
        return prediction


class LSTMModel(_RecurrentModel):
    """Stacked LSTM read at the last step (Hochreiter and Schmidhuber 1997; reference: pytorch_lstm.py).

    Parameters
    ----------
    d_feat, hidden_size, num_layers : int
        F, H and L.
    dropout : float
        Between the layers, in training only.

    Notes
    -----
    `rnn` is torch's layer and may be replaced, hooked or quantised; only as it was built, on the CPU, is it computed
    by qfast's operator. torch.jit, torch.export, autocast, CUDA and `to_reference()` take torch's layer.
    torch.compile leaves its graph for the operator; fullgraph=True needs torch._dynamo.config.allow_rnn = True, as for
    any torch.nn.LSTM. torch.func's transforms and forward mode work. A gradient of a gradient by `backward` needs
    `to_reference()`, or torch.func.grad twice.

    Examples
    --------
    >>> LSTMModel(d_feat=6)(torch.zeros(3, 360)).shape
    torch.Size([3])
    """

    layer = nn.LSTM
    operator = recurrent.lstm


class GRUModel(_RecurrentModel):
    """Stacked GRU read at the last step (Cho et al. 2014; reference: pytorch_gru.py). Arguments as LSTMModel.

    Examples
    --------
    >>> GRUModel(d_feat=20)(torch.zeros(3, 20, 20)).shape
    torch.Size([3])
    """

    layer = nn.GRU
    operator = recurrent.gru
