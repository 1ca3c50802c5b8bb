"""A recurrent network that predicts from the last step of a window and from attention over all its steps.

Parameter names, creation order and initial weights match Qlib (pyqlib 0.9.7, qlib/contrib/model/pytorch_alstm.py), so
state dicts can be exchanged in both directions.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from qfast.errors import ConfigError, suggest
from qfast.nn.plain import has_hooks
from qfast.nn.recurrent import GRUModel, LSTMModel, Recurrent, _RecurrentModel, as_windows
from qfast.ops import attention_pool, linear_tanh, transforms

__all__ = ["RNN_TYPES", "ALSTMModel"]


class _Elman(_RecurrentModel):
    """torch's plain recurrent layer. qfast has no operator for it."""

    layer = nn.RNN  # type: ignore[assignment]


RNN_TYPES: dict[str, type[_RecurrentModel]] = {"GRU": GRUModel, "LSTM": LSTMModel, "RNN": _Elman}


class ALSTMModel(Recurrent):
    """LSTM or GRU with attention over time (Qin et al. 2017, Feng et al. 2019; Qlib: pytorch_alstm.py).

    With h_t the output of `rnn` at step t, over inputs tanh(fc_in(x_t)):

        w_t = softmax over t of att_fc_out(tanh(dropout(att_fc_in(h_t))))
        out = fc_out([h_T, sum_t w_t h_t])

    Parameters
    ----------
    d_feat, hidden_size, num_layers : int
        F, H and L. The attention layer has H // 2 units.
    dropout : float
        Probability of dropout between the recurrent layers and inside the attention, in training only.
    rnn_type : str
        "GRU", "LSTM" or "RNN" in upper or lower case. torch's own layer computes "RNN".
    precision
        As in `LSTMModel`.

    Raises
    ------
    ConfigError
        If a size is not an integer of at least 1, dropout is outside [0, 1], or rnn_type or precision is
        unknown.

    Notes
    -----
    Without gradients, `net` is computed once per row if the windows are a view of consecutive rows
    (`rows.unfold(0, T, 1).transpose(1, 2)`), instead of once per window that contains the row.

    The notes of `LSTMModel` on `rnn`, compilers and torch.func also apply here. `qfast.ops.attention_pool` computes
    `att_net` if an operator computes `rnn` and `att_net` is unchanged and has no hooks.

    Examples
    --------
    >>> ALSTMModel(d_feat=6)(torch.zeros(3, 360)).shape
    torch.Size([3])
    """

    def __init__(
        self,
        d_feat: int = 6,
        hidden_size: int = 64,
        num_layers: int = 2,
        dropout: float = 0.0,
        rnn_type: str = "GRU",
        *,
        precision: str = "float32",
    ) -> None:
        if not isinstance(rnn_type, str) or rnn_type.upper() not in RNN_TYPES:
            raise ConfigError(
                f"rnn_type must be one of {sorted(RNN_TYPES)}, got {rnn_type!r}."
                + suggest(str(rnn_type).upper(), RNN_TYPES)
            )
        super().__init__(RNN_TYPES[rnn_type.upper()], d_feat, hidden_size, num_layers, dropout, precision=precision)
        self.rnn_type = rnn_type
        self.fc_out = nn.Linear(2 * hidden_size, 1)
        self.att_net = nn.Sequential()
        self.att_net.add_module("att_fc_in", nn.Linear(hidden_size, hidden_size // 2))
        self.att_net.add_module("att_dropout", nn.Dropout(float(dropout)))
        self.att_net.add_module("att_act", nn.Tanh())
        self.att_net.add_module("att_fc_out", nn.Linear(hidden_size // 2, 1, bias=False))
        self.att_net.add_module("att_softmax", nn.Softmax(dim=1))

    def _add_head(self, d_feat: int, hidden_size: int) -> int:
        self.net = nn.Sequential()
        self.net.add_module("fc_in", nn.Linear(d_feat, hidden_size))
        self.net.add_module("act", nn.Tanh())
        return hidden_size

    def _kind(self) -> type[_RecurrentModel]:
        return RNN_TYPES[self.rnn_type.upper()]

    def forward(self, x: Tensor) -> Tensor:
        """Predict from [B, T, F] or [B, F*T] -> [B]."""
        last, pooled = self._attend(as_windows(x, self.d_feat))
        prediction: Tensor = self.fc_out(torch.cat((last, pooled), 1)).squeeze(-1)
        return prediction

    def _attend(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the last step of `rnn` over [B, T, F] and the weighted mean of its steps, [B, H] each.

        The operators and torch's layers give the same result up to rounding.
        """
        # The scripting check must be the whole condition: see Recurrent._last_step.
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            uses_operator = self._uses_operator(x)
            if uses_operator:
                return self._attend_by_operator(x)
        steps: Tensor = self.rnn(self.net(x))[0]
        pooled: Tensor = (steps * self.att_net(steps)).sum(1)
        return steps[:, -1, :], pooled

    def _uses_operator(self, x: Tensor) -> bool:
        return self.rnn_type.upper() != "RNN" and super()._uses_operator(x)

    def _attend_by_operator(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Compute `_attend` with qfast's operators."""
        steps, states = self._run_operator(self._apply_head(x), all_steps=True)
        # steps[:, -1] has the same value, but its gradient would be a [B, T, H] tensor that is zero except at the
        # last step.
        last = states[-1]
        if not self._attention_is_as_built():
            return last, (steps * self.att_net(steps)).sum(1)
        fc_in = cast(nn.Linear, self.att_net[0])
        dropout = cast(nn.Dropout, self.att_net[1])
        fc_out = cast(nn.Linear, self.att_net[3])
        pooled = attention_pool(
            steps,
            fc_in.weight,
            fc_in.bias,
            fc_out.weight,
            dropout=dropout.p,
            training=dropout.training,
            precision=self.precision,
        )
        return last, pooled

    def _apply_head(self, x: Tensor) -> Tensor:
        """Apply `net` to every step, [B, T, F] -> [B, T, H], without gradients once per row shared by windows."""
        if not self._head_is_as_built():
            return self.net(x)  # a replaced module may mix steps, so it needs whole windows
        linear = cast(nn.Linear, self.net[0])
        batch, steps, features = x.shape
        windows_overlap = batch > 1 and steps > 1 and x.stride(0) == x.stride(1)
        if not windows_overlap or torch.is_grad_enabled() or transforms.active():
            return linear_tanh(x, linear.weight, linear.bias)
        rows = x.as_strided((batch + steps - 1, features), (x.stride(0), x.stride(2)))
        return linear_tanh(rows.unsqueeze(0), linear.weight, linear.bias)[0].unfold(0, steps, 1).transpose(1, 2)

    def _head_is_as_built(self) -> bool:
        """Return whether `net` is unchanged, so `linear_tanh` computes the same result."""
        return _is_as_built(self.net, [nn.Linear, nn.Tanh]) and self.net[0].bias is not None

    def _attention_is_as_built(self) -> bool:
        """Return whether `att_net` is unchanged, so `attention_pool` computes the same result."""
        if not _is_as_built(self.att_net, [nn.Linear, nn.Dropout, nn.Tanh, nn.Linear, nn.Softmax]):
            return False
        fc_in, _, _, fc_out, softmax = self.att_net
        has_one_score = fc_out.out_features == 1 and [name for name, _ in fc_out.named_parameters()] == ["weight"]
        return bool(has_one_score and fc_in.bias is not None and cast(nn.Softmax, softmax).dim == 1)


def _is_as_built(layers: nn.Module, kinds: list[type[nn.Module]]) -> bool:
    """Return whether `layers` is a plain Sequential of these module types without hooks.

    An operator must not replace other modules, because it would not call them.
    """
    if type(layers) is not nn.Sequential or [type(layer) for layer in layers] != kinds:
        return False
    return not any(has_hooks(module) for module in (layers, *layers))
