"""LSTM and GRU over a window, read at the last step.

Parameter names, creation order and initial weights are those of the reference
(pyqlib 0.9.7, qlib/contrib/model/pytorch_lstm.py and pytorch_gru.py), so state dicts travel both ways.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from qfast.errors import ConfigError, DataError, whole_number

__all__ = ["GRUModel", "LSTMModel", "as_windows"]


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
                f"x has {x.shape[2]} features (shape {tuple(x.shape)} read as [B, T, F]) but the network was "
                f"built with d_feat={d_feat}. Remedy: d_feat={x.shape[2]}."
            )
        return x
    if x.dim() == 2:
        if x.shape[1] % d_feat or x.shape[1] == 0:
            raise DataError(
                f"x has {x.shape[1]} columns, which is not a multiple of d_feat={d_feat}: a flat window "
                "[B, F*T] holds T steps of each feature. Remedy: set d_feat to the number of features per step."
            )
        return x.reshape(len(x), d_feat, -1).permute(0, 2, 1)
    raise DataError(f"x must be [B, T, F] or [B, F*T], got {x.dim()} axes with shape {tuple(x.shape)}.")


class _RecurrentModel(nn.Module):
    """fc_out(last step of the top recurrent layer); subclasses say which layer."""

    layer: ClassVar[type[nn.LSTM] | type[nn.GRU]]

    def __init__(self, d_feat: int = 6, hidden_size: int = 64, num_layers: int = 2, dropout: float = 0.0) -> None:
        super().__init__()
        for name, value in {"d_feat": d_feat, "hidden_size": hidden_size, "num_layers": num_layers}.items():
            whole_number(name, value)
        if not 0.0 <= float(dropout) <= 1.0:
            raise ConfigError(f"dropout must lie in [0, 1], got {dropout!r}.")
        # nn.LSTM warns about dropout without a second layer, where it has no effect; the reference's
        # defaults make that combination common.
        between = float(dropout) if num_layers > 1 else 0.0
        self.rnn = self.layer(d_feat, hidden_size, num_layers=num_layers, batch_first=True, dropout=between)
        self.fc_out = nn.Linear(hidden_size, 1)
        self.d_feat = d_feat

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, F] or [B, F*T] -> [B]; a batch of one stays one-dimensional (the reference returns 0-d)."""
        out, _ = self.rnn(as_windows(x, self.d_feat))
        prediction: Tensor = self.fc_out(out[:, -1, :]).squeeze(-1)
        return prediction


class LSTMModel(_RecurrentModel):
    """Stacked LSTM read at the last step (Hochreiter and Schmidhuber 1997; reference: pytorch_lstm.py).

    Parameters
    ----------
    d_feat, hidden_size, num_layers : int
        F, H and L.
    dropout : float
        Between the layers, in training only.

    Examples
    --------
    >>> LSTMModel(d_feat=6)(torch.zeros(3, 360)).shape
    torch.Size([3])
    """

    layer = nn.LSTM


class GRUModel(_RecurrentModel):
    """Stacked GRU read at the last step (Cho et al. 2014; reference: pytorch_gru.py). Arguments as LSTMModel.

    Examples
    --------
    >>> GRUModel(d_feat=20)(torch.zeros(3, 20, 20)).shape
    torch.Size([3])
    """

    layer = nn.GRU
