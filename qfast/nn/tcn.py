"""Temporal convolution networks: residual blocks of dilated causal convolutions with weight normalisation.

Parameter names, creation order and initial weights are those of the reference (pyqlib 0.9.7, qlib/contrib/model/tcn.py
and pytorch_tcn.py), so state dicts travel both ways.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from numbers import Real
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from qfast.errors import CheckpointError, ConfigError, DataError, whole_number
from qfast.nn.plain import PlainTorch
from qfast.nn.temporal_stream import TCNStream
from qfast.ops.temporal_conv import BlockWeights, temporal_block, temporal_conv_net

__all__ = ["CausalConv1d", "TCNModel", "TemporalBlock", "TemporalConvNet"]

# What torch.nn.utils.parametrizations.weight_norm calls the two parts of a weight.
_NEW_NAMES = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}


class CausalConv1d(nn.Module):
    """Dilated convolution that sees zeros before the window, its weight g v / ||v|| per output channel.

    Parameters
    ----------
    in_channels, out_channels, kernel_size, dilation : int

    Source
    ------
    Weight normalisation: Salimans and Kingma 2016. Initial v and bias: torch.nn.Conv1d; g = ||v||.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, dilation: int = 1) -> None:
        super().__init__()
        plain = nn.Conv1d(in_channels, out_channels, kernel_size)
        assert plain.bias is not None
        self.bias = plain.bias
        self.weight_g = nn.Parameter(torch.norm_except_dim(plain.weight.detach(), 2, 0))
        self.weight_v = plain.weight
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size, self.dilation = kernel_size, dilation

    @property
    def weight(self) -> Tensor:
        """[C, C_in, k], the product of its two parts."""
        return torch._weight_norm(self.weight_v, self.weight_g, 0)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C_in, T] -> [B, C, T]."""
        weight = torch._weight_norm(self.weight_v, self.weight_g, 0)
        x = functional.pad(x, ((self.kernel_size - 1) * self.dilation, 0))
        return functional.conv1d(x, weight, self.bias, dilation=self.dilation)

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, dilation={self.dilation}"


class _Steps(nn.Sequential):
    """What a block runs. Its convolutions are the block's own, and torch.func.functional_call, which asks for all names
    of a parameter, does not put those back right that have two: here they have none."""

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        for name, module in super().named_modules(memo, prefix, remove_duplicate):
            if remove_duplicate or not isinstance(module, CausalConv1d):
                yield name, module


class TemporalBlock(PlainTorch):
    """One residual block at all steps: relu(net(x) + x), or with a 1x1 convolution of x where the widths differ.

    Parameters
    ----------
    n_inputs, n_outputs, kernel_size, dilation : int
    dropout : float
        Of both convolutions' outputs.

    Notes
    -----
    The convolutions are registered twice, by name and in `net`, as in the reference: a state dict holds them under
    both names. One that has only one of them, or the parametrizations of newer torch, is read as well; two copies that
    differ are refused. Modules that were replaced or hooked are called one by one, others by one operator.

    Source
    ------
    Bai, Kolter, Koltun 2018.

    Examples
    --------
    >>> TemporalBlock(3, 8, kernel_size=2)(torch.zeros(5, 3, 20)).shape
    torch.Size([5, 8, 20])
    """

    def __init__(
        self, n_inputs: int, n_outputs: int, kernel_size: int, dilation: int = 1, dropout: float = 0.2
    ) -> None:
        super().__init__()
        sizes = {"n_inputs": n_inputs, "n_outputs": n_outputs, "kernel_size": kernel_size, "dilation": dilation}
        for name, value in sizes.items():
            whole_number(name, value)
        _check_dropout(dropout)
        self.conv1 = CausalConv1d(n_inputs, n_outputs, kernel_size, dilation)
        self.relu1 = nn.ReLU()
        self.dropout1 = nn.Dropout(dropout)
        self.conv2 = CausalConv1d(n_outputs, n_outputs, kernel_size, dilation)
        self.relu2 = nn.ReLU()
        self.dropout2 = nn.Dropout(dropout)
        # The reference cuts surplus steps off after each convolution: its numbers 1 and 5.
        first = self.conv1, nn.Identity(), self.relu1, self.dropout1
        self.net = _Steps(*first, self.conv2, nn.Identity(), self.relu2, self.dropout2)
        self.downsample = nn.Conv1d(n_inputs, n_outputs, 1) if n_inputs != n_outputs else None
        self.relu = nn.ReLU()
        self.dilation = dilation
        self._draw_as_reference()
        self.register_load_state_dict_pre_hook(_rename_before_loading)

    def _draw_as_reference(self) -> None:
        """The reference draws weights for the convolutions that its weight normalisation then overwrites: only the
        generator notices, and the 1x1 convolution."""
        with torch.no_grad():
            for conv in (self.conv1, self.conv2):
                torch.empty_like(conv.weight_v).normal_(0, 0.01)
            if self.downsample is not None:
                self.downsample.weight.normal_(0, 0.01)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C_in, T] -> [B, C, T]."""
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            takes_operator = _take_operator([self])
            if takes_operator:
                return self._by_operator(x)
        beside = x if self.downsample is None else self.downsample(x)
        out: Tensor = self.relu(self.net(x) + beside)
        return out

    def _by_operator(self, x: Tensor) -> Tensor:
        dropout = self.dropout1
        weights = self.block_weights()
        return temporal_block(x, weights, dilation=self.dilation, dropout=dropout.p, training=dropout.training)

    def block_weights(self) -> BlockWeights:
        """The parameters as `qfast.ops.temporal_conv_net` takes them."""
        first, second, down = self.conv1, self.conv2, self.downsample
        convolutions = (first.weight_v, first.weight_g, first.bias, second.weight_v, second.weight_g, second.bias)
        return BlockWeights(*convolutions) if down is None else BlockWeights(*convolutions, down.weight, down.bias)

    def is_plain(self) -> bool:
        """Whether the modules are still those that were built here: only then the operator does what they would."""
        net, down = self.net, self.downsample
        kinds = (CausalConv1d, nn.Identity, nn.ReLU, nn.Dropout) * 2
        if len(net) != len(kinds) or any(type(m) is not kind for m, kind in zip(net, kinds, strict=True)):
            return False
        if net[0] is not self.conv1 or net[4] is not self.conv2 or type(self.relu) is not nn.ReLU:
            return False
        dropouts = self.dropout1, self.dropout2
        if (
            (net[3], net[7]) != dropouts
            or dropouts[0].p != dropouts[1].p
            or dropouts[0].training != dropouts[1].training
        ):
            return False
        down_kind = type(None) if self.conv1.in_channels == self.conv1.out_channels else nn.Conv1d
        return type(down) is down_kind and not any(_is_hooked(module) for module in self.modules())


class TemporalConvNet(PlainTorch):
    """Stack of temporal blocks with the dilations 1, 2, 4, ..., at all steps.

    Parameters
    ----------
    num_inputs : int
    num_channels : sequence of int
        Width of each block.
    kernel_size : int
    dropout : float

    Source
    ------
    Bai, Kolter, Koltun 2018; reference: qlib/contrib/model/tcn.py.

    Examples
    --------
    >>> TemporalConvNet(3, [8, 16])(torch.zeros(5, 3, 20)).shape
    torch.Size([5, 16, 20])
    """

    def __init__(
        self, num_inputs: int, num_channels: Sequence[int], kernel_size: int = 2, dropout: float = 0.2
    ) -> None:
        super().__init__()
        if not isinstance(num_channels, Sequence) or len(num_channels) == 0:
            raise ConfigError(f"num_channels must be a list with the width of each block, got {num_channels!r}.")
        widths = [num_inputs, *num_channels]
        blocks = [
            TemporalBlock(before, width, kernel_size, 2**number, dropout)
            for number, (before, width) in enumerate(pairwise(widths))
        ]
        self.network = nn.Sequential(*blocks)
        self.register_load_state_dict_pre_hook(_rename_before_loading)

    def forward(self, x: Tensor) -> Tensor:
        """[B, F, T] -> [B, C, T]."""
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            takes_operator = self.takes_operator()
            if takes_operator:
                return self.by_operator(x, all_steps=True)
        out: Tensor = self.network(x)
        return out

    def takes_operator(self) -> bool:
        """Whether one operator can do the whole stack."""
        return type(self.network) is nn.Sequential and not _is_hooked(self.network) and _take_operator(self.network)

    def by_operator(self, x: Tensor, *, all_steps: bool) -> Tensor:
        """[B, F, T] -> [B, C, T], or [B, C] of the last step, which costs a part of it."""
        blocks = cast(list[TemporalBlock], list(self.network))
        dropout = blocks[0].dropout1
        return temporal_conv_net(
            x,
            [block.block_weights() for block in blocks],
            dilations=[block.dilation for block in blocks],
            dropout=dropout.p,
            training=dropout.training,
            all_steps=all_steps,
        )

    def own_names(self, state: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
        """`state` with the names of this network: see the notes of `TemporalBlock`."""
        renamed = dict(state)
        _rename_before_loading(self, renamed, prefix)
        return renamed


class TCNModel(PlainTorch):
    """Temporal convolution network read at the last step (Bai et al. 2018; reference: pytorch_tcn.py).

    Parameters
    ----------
    num_input : int
        F.
    output_size : int
        Predictions of a window.
    num_channels : sequence of int
        Width of each block.
    kernel_size : int
        Also 1, which the reference cannot do.
    dropout : float
        Of every convolution's output.

    Raises
    ------
    ConfigError
        A size that is not a whole number above 0, a dropout outside [0, 1].

    Notes
    -----
    Only what the last step can see is computed: `qfast.ops.temporal_conv_net.plan(T, kernel_size, blocks)` tells what
    that is. TorchScript and traces hold torch's convolutions at all steps instead. Under autocast the convolutions
    stay in float32.

    Examples
    --------
    >>> network = TCNModel(num_input=6, output_size=1, num_channels=[8] * 3, kernel_size=3, dropout=0.5)
    >>> network(torch.zeros(5, 360)).shape
    torch.Size([5])
    """

    def __init__(
        self, num_input: int, output_size: int, num_channels: Sequence[int], kernel_size: int, dropout: float
    ) -> None:
        super().__init__()
        self.num_input = whole_number("num_input", num_input)
        self.output_size = whole_number("output_size", output_size)
        self.tcn = TemporalConvNet(num_input, num_channels, kernel_size, dropout)
        self.linear = nn.Linear(num_channels[-1], output_size)

    def forward(self, x: Tensor) -> Tensor:
        """Predictions.

        Parameters
        ----------
        x : Tensor [B, F, T], or [B, F*T] feature-major (all T steps of feature 0, then of feature 1, ...)
            Any strides; windows [B, T, F] as x.transpose(1, 2).

        Returns
        -------
        Tensor [B], or [B, output_size] if that is more than 1
            Also for a batch of one, where the reference returns 0-d.
        """
        windows = self._windows(x)
        prediction: Tensor = self.linear(self._last_step(windows))
        return prediction.squeeze(-1) if self.output_size == 1 else prediction

    def stream(self) -> TCNStream:
        """What scores day by day from one new row of each instrument, with the weights as they are now."""
        return TCNStream(self)

    def own_names(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`state` with the names of this network: see the notes of `TemporalBlock`."""
        return self.tcn.own_names(state, "tcn.")

    def _windows(self, x: Tensor) -> Tensor:
        features = self.num_input
        if x.dim() == 3:
            if x.shape[1] != features:
                raise DataError(
                    f"x has shape {list(x.shape)}, read as [B, F, T], but the network was built with num_input="
                    f"{features}. Remedy: x.transpose(1, 2) for windows [B, T, F], or num_input={x.shape[1]}."
                )
            return x
        if x.dim() != 2 or x.shape[1] == 0 or x.shape[1] % features:
            raise DataError(
                f"x must be [B, F, T] or [B, F*T] with F = num_input = {features}, got shape {list(x.shape)}. Remedy: "
                "set num_input to the number of features per step."
            )
        return x.reshape(x.shape[0], features, x.shape[1] // features)

    def _require_own_dtype(self, x: Tensor) -> None:
        own = next(self.tcn.parameters()).dtype
        if x.dtype != own and not torch.is_autocast_enabled(x.device.type):
            raise DataError(
                f"x is {x.dtype} but the network's weights are {own}. Remedy: x.to({own}), or the network "
                f".to({x.dtype}); new networks take torch's default dtype (torch.set_default_dtype)."
            )

    def _last_step(self, x: Tensor) -> Tensor:
        # As in nn/recurrent.py: a script leaves this branch out.
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            takes_operator = (
                type(self.tcn) is TemporalConvNet and not _is_hooked(self.tcn) and self.tcn.takes_operator()
            )
            if takes_operator:
                self._require_own_dtype(x)
                return self.tcn.by_operator(x, all_steps=False)
        out: Tensor = self.tcn(x)[:, :, -1]
        return out


def _check_dropout(dropout: Any) -> None:
    if isinstance(dropout, bool) or not isinstance(dropout, Real) or not 0.0 <= float(dropout) <= 1.0:
        raise ConfigError(f"dropout must lie in [0, 1], got {dropout!r}.")


def _is_hooked(module: nn.Module) -> bool:
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(hooks)


def _take_operator(blocks: Any) -> bool:
    """Whether one operator can do these blocks: a trace would keep it, and nothing else could read the trace."""
    if torch.jit.is_tracing():  # type: ignore[attr-defined]
        return False
    if not all(type(block) is TemporalBlock and block.is_plain() and not block._plain_torch for block in blocks):
        return False
    return len({(block.dropout1.p, block.dropout1.training) for block in blocks}) == 1


# ---------------------------------------------------------------- names
def _rename(state: dict[str, Tensor], prefix: str) -> None:
    """Gives the convolutions of a block both of their names."""
    for name, alias in (("conv1", "net.0"), ("conv2", "net.4")):
        for place in (name, alias):
            for new, old in _NEW_NAMES.items():
                if f"{prefix}{place}.{new}" in state:
                    _require_same(state, f"{prefix}{place}.{old}", f"{prefix}{place}.{new}")
                    state[f"{prefix}{place}.{old}"] = state.pop(f"{prefix}{place}.{new}")
        for part in ("bias", "weight_g", "weight_v"):
            one, other = f"{prefix}{name}.{part}", f"{prefix}{alias}.{part}"
            _require_same(state, one, other)
            if one in state:
                state[other] = state[one]
            elif other in state:
                state[one] = state[other]


def _require_same(state: dict[str, Tensor], one: str, other: str) -> None:
    if one in state and other in state and not _same(state[one], state[other]):
        raise CheckpointError(
            f"{one} and {other} are two names of one tensor but hold different values. Remedy: take the wrong one out "
            "of the state dict; either name alone is enough."
        )


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two copies hold the same numbers, NaN included."""
    if one is other or one.is_meta or other.is_meta:
        return True
    return one.shape == other.shape and bool(torch.isclose(one, other.to(one), rtol=0, atol=0, equal_nan=True).all())


def _rename_before_loading(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Of a block, or of all blocks of a stack: what is refused is so before anything is loaded."""
    if isinstance(module, TemporalConvNet):
        for number in range(len(module.network)):
            _rename(state, f"{prefix}network.{number}.")
    else:
        _rename(state, prefix)
