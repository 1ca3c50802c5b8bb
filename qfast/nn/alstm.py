"""A recurrent network over a window, read at its last step and by attention over all of them.

Parameter names, creation order and initial weights are those of the reference (pyqlib 0.9.7,
qlib/contrib/model/pytorch_alstm.py), so state dicts travel both ways.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from qfast.errors import ConfigError, suggest
from qfast.nn.plain import has_hooks
from qfast.nn.recurrent import GRUModel, LSTMModel, Recurrent, _RecurrentModel, as_windows
from qfast.ops import attention_pool, tanh, transforms

__all__ = ["RNN_TYPES", "ALSTMModel"]


class _Elman(_RecurrentModel):
    """torch's plain recurrent layer, for which there is no operator."""

    layer = nn.RNN  # type: ignore[assignment]


RNN_TYPES: dict[str, type[_RecurrentModel]] = {"GRU": GRUModel, "LSTM": LSTMModel, "RNN": _Elman}


class ALSTMModel(Recurrent):
    """LSTM or GRU with attention over time (Qin et al. 2017, Feng et al. 2019; reference: pytorch_alstm.py).

    With h_t the steps of `rnn` over tanh(fc_in(x_t)):

        w_t = softmax over t of att_fc_out(tanh(dropout(att_fc_in(h_t))))
        out = fc_out([h_T, sum_t w_t h_t])

    Parameters
    ----------
    d_feat, hidden_size, num_layers : int
        F, H and L; the attention is H // 2 wide.
    dropout : float
        Between the recurrent layers and inside the attention, in training only.
    rnn_type : str
        "GRU", "LSTM" or "RNN" (torch's plain layer, by torch), in upper or lower case.

    Raises
    ------
    ConfigError
        A size that is not a whole number above 0, a dropout outside [0, 1], another rnn_type.

    Notes
    -----
    Windows of consecutive rows (`rows.unfold(0, T, 1).transpose(1, 2)`) without a gradient: `net` runs once a row, not
    once a window that the row is in.

    About `rnn`, compilers and torch.func the notes of `LSTMModel` hold. `att_net` is computed by
    `qfast.ops.attention_pool` where `rnn` is by its operator and `att_net` is as it was built, without hooks.

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
    ) -> None:
        if not isinstance(rnn_type, str) or rnn_type.upper() not in RNN_TYPES:
            raise ConfigError(
                f"rnn_type must be one of {sorted(RNN_TYPES)}, got {rnn_type!r}."
                + suggest(str(rnn_type).upper(), RNN_TYPES)
            )
        super().__init__(RNN_TYPES[rnn_type.upper()], d_feat, hidden_size, num_layers, dropout)
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
        """[B, T, F] or [B, F*T] -> [B]."""
        last, pooled = self._attended(as_windows(x, self.d_feat))
        prediction: Tensor = self.fc_out(torch.cat((last, pooled), 1)).squeeze(-1)
        return prediction

    def _attended(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[B, T, F] -> last step of `rnn`, weighted mean of its steps, [B, H] each; the same numbers by either way."""
        # As in `_last_step`: a script leaves the outer branch out, which must stay alone.
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            takes_operator = self._takes_operator(x)
            if takes_operator:
                return self._attended_by_operator(x)
        steps: Tensor = self.rnn(self.net(x))[0]
        pooled: Tensor = (steps * self.att_net(steps)).sum(1)
        return steps[:, -1, :], pooled

    def _takes_operator(self, x: Tensor) -> bool:
        return self.rnn_type.upper() != "RNN" and super()._takes_operator(x)

    def _attended_by_operator(self, x: Tensor) -> tuple[Tensor, Tensor]:
        steps, states = self._run_operator(self._mapped(x), all_steps=True)
        last = states[-1]  # not out of `steps`, whose gradient would be as large and zero elsewhere
        if not self._attention_is_plain():
            return last, (steps * self.att_net(steps)).sum(1)
        entering, leaving = cast(nn.Linear, self.att_net[0]), cast(nn.Linear, self.att_net[3])
        dropout = cast(nn.Dropout, self.att_net[1])
        weights = entering.weight, entering.bias, leaving.weight
        return last, attention_pool(steps, *weights, dropout=dropout.p, training=dropout.training)

    def _mapped(self, x: Tensor) -> Tensor:
        """`net` of every step, without a gradient once a row where windows overlap."""
        if not _is_plain(self.net, [nn.Linear, nn.Tanh]):
            return self.net(x)  # may look across steps
        linear = cast(nn.Linear, self.net[0])
        batch, steps, features = x.shape
        overlaps = batch > 1 and steps > 1 and x.stride(0) == x.stride(1)
        if not overlaps or torch.is_grad_enabled() or transforms.active():
            return tanh(linear(x))
        rows = x.as_strided((batch + steps - 1, features), (x.stride(0), x.stride(2)))
        return tanh(linear(rows)).unfold(0, steps, 1).transpose(1, 2)

    def _attention_is_plain(self) -> bool:
        if not _is_plain(self.att_net, [nn.Linear, nn.Dropout, nn.Tanh, nn.Linear, nn.Softmax]):
            return False
        entering, _, _, leaving, softmax = self.att_net
        one_score = leaving.out_features == 1 and [name for name, _ in leaving.named_parameters()] == ["weight"]
        return bool(one_score and entering.bias is not None and cast(nn.Softmax, softmax).dim == 1)


def _is_plain(layers: nn.Module, kinds: list[type[nn.Module]]) -> bool:
    """Whether `layers` is still what was built here, in kind and without hooks: an operator would not call others."""
    if type(layers) is not nn.Sequential or [type(part) for part in layers] != kinds:
        return False
    return not any(has_hooks(part) for part in (layers, *layers))
