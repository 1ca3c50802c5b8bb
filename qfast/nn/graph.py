"""A recurrent network over each stock's window, followed by attention over all stocks of the same day.

Parameter names, creation order and initial weights match Qlib (pyqlib 0.9.7, qlib/contrib/model/pytorch_gats.py), so
state dicts can be exchanged in both directions.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from qfast.errors import ConfigError, suggest
from qfast.nn.recurrent import GRUModel, LSTMModel, Recurrent, _RecurrentModel, as_windows
from qfast.ops import graph_attention

BASES: dict[str, type[_RecurrentModel]] = {"GRU": GRUModel, "LSTM": LSTMModel}

__all__ = ["BASES", "GATModel"]


class GATModel(Recurrent):
    """Graph attention over the stocks of a day (Velickovic et al. 2018; Qlib: pytorch_gats.py).

    With h_i the last step of `rnn` over stock i's window, z = transformation(h) and (a_key, a_query) the halves of a:

        w_ij = softmax over the day's j of LeakyReLU(a_key . z_j + a_query . z_i)
        out_i = fc_out(LeakyReLU(fc(h_i + sum_j w_ij h_j)))

    Every LeakyReLU has the negative slope 0.01, the default of torch and of the operator.

    Parameters
    ----------
    d_feat, hidden_size, num_layers, dropout
        F, H, L and the probability of dropout between recurrent layers, as in `LSTMModel`.
    base_model : str
        "GRU" or "LSTM".
    precision
        As in `LSTMModel`.

    Raises
    ------
    ConfigError
        If a size is not an integer of at least 1, dropout is outside [0, 1], or base_model or precision is
        unknown.

    Notes
    -----
    No N x N tensor is built. `transformation` and `a` are folded into two vectors, and `qfast.ops.graph_attention`
    computes the attention in O(N log N). Hooks of `transformation` are therefore not called.

    TorchScript, traces and `to_reference()` use the dense softmax, which needs O(N^2) memory. A trace is valid only
    for the days of its example. The notes of `LSTMModel` on `rnn`, compilers and torch.func also apply here.

    Examples
    --------
    >>> network, two_days = GATModel(d_feat=6), torch.tensor([0, 3, 8])
    >>> network(torch.zeros(8, 360), two_days).shape
    torch.Size([8])
    """

    def __init__(
        self,
        d_feat: int = 6,
        hidden_size: int = 64,
        num_layers: int = 2,
        dropout: float = 0.0,
        base_model: str = "GRU",
        *,
        precision: str = "float32",
    ) -> None:
        if not isinstance(base_model, str) or base_model not in BASES:
            raise ConfigError(
                f"base_model must be one of {sorted(BASES)}, got {base_model!r}."
                + suggest(str(base_model).upper(), BASES)
            )
        super().__init__(BASES[base_model], d_feat, hidden_size, num_layers, dropout, precision=precision)
        self.base_model = base_model
        self.transformation = nn.Linear(hidden_size, hidden_size)
        self.a = nn.Parameter(torch.randn(2 * hidden_size, 1))
        self.fc = nn.Linear(hidden_size, hidden_size)
        self.fc_out = nn.Linear(hidden_size, 1)

    def forward(self, x: Tensor, offsets: Tensor | None = None) -> Tensor:
        """Predict for the stocks of one day, or of several days that do not attend to each other.

        Parameters
        ----------
        x : Tensor [N, T, F], or [N, F*T] feature-major
        offsets : Tensor [D + 1], int64, optional
            Day d contains rows offsets[d] to offsets[d + 1] - 1. A CPU tensor is fastest. If None, all rows belong to
            one day.

        Returns
        -------
        Tensor [N]
            A single stock also returns [1], where Qlib returns a scalar.

        Raises
        ------
        DataError
            If x or offsets has the wrong shape or dtype.
        """
        return self.attend(self.encode(x), offsets)

    def encode(self, x: Tensor) -> Tensor:
        """Return the hidden state [N, H] of each stock, the last step of `rnn`.

        Parameters
        ----------
        x : Tensor [N, T, F], or [N, F*T] feature-major

        Examples
        --------
        >>> network, x = GATModel(d_feat=2), torch.ones(5, 4, 2)
        >>> torch.equal(network.attend(network.encode(x)), network(x))
        True
        """
        return self._last_step(as_windows(x, self.d_feat))

    def attend(self, hidden: Tensor, offsets: Tensor | None = None) -> Tensor:
        """Predict [N] from the hidden states [N, H] of the stocks of one day, or of the days that `offsets` bounds."""
        weight, bias = self._fold()
        attended = self._attend(hidden, weight, bias, offsets)
        prediction: Tensor = self.fc_out(functional.leaky_relu(self.fc(attended))).squeeze(-1)
        return prediction

    def scores(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the query and key [N] of each row.

        LeakyReLU(query_i + key_j) is the attention score of stock i for stock j before the softmax.

        Parameters
        ----------
        x : Tensor [N, T, F], or [N, F*T] feature-major

        Examples
        --------
        >>> query, key = GATModel(d_feat=2).scores(torch.zeros(5, 4, 2))
        >>> query.shape, key.shape
        (torch.Size([5]), torch.Size([5]))
        """
        weight, bias = self._fold()
        query, key = (self._last_step(as_windows(x, self.d_feat)) @ weight.t() + bias).unbind(1)
        return query, key

    def _kind(self) -> type[_RecurrentModel]:
        return BASES[self.base_model]

    def _fold(self) -> tuple[Tensor, Tensor]:
        """Fold `transformation` and `a` into weight [2, H] and bias [2] of the scores, the query's row first."""
        halves = self.a.view(2, -1).flip(0)
        return halves @ self.transformation.weight, halves @ self.transformation.bias

    def _attend(self, hidden: Tensor, weight: Tensor, bias: Tensor, offsets: Tensor | None) -> Tensor:
        """Add to each row of hidden [N, H] its attention over the rows of the same day."""
        # The scripting check must be the whole condition: see Recurrent._last_step. A trace must not record the
        # operator, which would fix the number of rows to that of the example.
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            dense = self._plain_torch or torch.jit.is_tracing()  # type: ignore[attr-defined]
            if not dense:
                # Under autocast the folded weights are in half precision, but the hidden states may not be.
                return graph_attention(hidden, weight.to(hidden.dtype), bias.to(hidden.dtype), offsets)
        bounds = [0, hidden.shape[0]] if offsets is None else [int(bound) for bound in offsets]
        query, key = (hidden @ weight.t() + bias).unbind(1)
        parts = [hidden[:0]]
        for day in range(len(bounds) - 1):
            begin, end = bounds[day], bounds[day + 1]
            scores = query[begin:end].unsqueeze(1) + key[begin:end].unsqueeze(0)
            weights = functional.leaky_relu(scores).softmax(1)
            parts.append(hidden[begin:end] + weights @ hidden[begin:end])
        return torch.cat(parts)
