"""Temporal convolutional networks: residual blocks of dilated causal convolutions with weight normalization.

Parameter names, creation order and initial weights match Qlib (pyqlib 0.9.7, qlib/contrib/model/tcn.py and
pytorch_tcn.py), so state dicts can be exchanged in both directions.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from numbers import Real
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from qfast.errors import CheckpointError, ConfigError, DataError, whole_number
from qfast.nn.plain import PlainTorch, check_dtype, has_hooks
from qfast.nn.temporal_stream import TCNStream
from qfast.ops.temporal_conv import BlockWeights, temporal_block, temporal_conv_net

__all__ = ["CausalConv1d", "TCNModel", "TemporalBlock", "TemporalConvNet"]

# torch.nn.utils.parametrizations.weight_norm uses other names for the two parts of a weight than Qlib.
_PARAMETRIZATION_NAMES = {
    "parametrizations.weight.original0": "weight_g",
    "parametrizations.weight.original1": "weight_v",
}


class CausalConv1d(nn.Module):
    """Dilated causal convolution with weight g v / ||v|| per output channel (Salimans and Kingma 2016).

    The window is padded with zeros on the left. v and the bias are initialized as in torch.nn.Conv1d, and g = ||v||.

    Parameters
    ----------
    in_channels, out_channels : int
        C_in and C.
    kernel_size, dilation : int

    Examples
    --------
    >>> CausalConv1d(3, 8, kernel_size=2, dilation=4)(torch.zeros(5, 3, 20)).shape
    torch.Size([5, 8, 20])
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
        """The weight [C, C_in, k], computed from weight_g and weight_v."""
        return torch._weight_norm(self.weight_v, self.weight_g, 0)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve [B, C_in, T] -> [B, C, T]."""
        weight = torch._weight_norm(self.weight_v, self.weight_g, 0)
        x = functional.pad(x, ((self.kernel_size - 1) * self.dilation, 0))
        return functional.conv1d(x, weight, self.bias, dilation=self.dilation)

    def extra_repr(self) -> str:
        """Return the sizes for the repr."""
        return f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, dilation={self.dilation}"


class _Steps(nn.Sequential):
    """The sequence of modules that a block runs.

    `named_modules` omits the convolutions if duplicates are requested, because the block itself registers them too.
    torch.func.functional_call requests all names of a parameter and cannot restore a parameter that has two.
    """

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """Yield the names and modules, without the convolutions if duplicates are requested."""
        for name, module in super().named_modules(memo, prefix, remove_duplicate):
            if remove_duplicate or not isinstance(module, CausalConv1d):
                yield name, module


_NET = (CausalConv1d, nn.Identity, nn.ReLU, nn.Dropout) * 2  # the modules of TemporalBlock.net


class TemporalBlock(PlainTorch):
    """One residual block at all steps: relu(net(x) + x) (Bai, Kolter, Koltun 2018; Qlib: tcn.py).

    If the widths differ, a 1x1 convolution of x is added instead of x.

    Parameters
    ----------
    n_inputs, n_outputs : int
        C_in and C.
    kernel_size, dilation : int
    dropout : float
        Probability of dropout of the output of both convolutions, in training only.
    precision : {"float32", "bf16", "bf16-if-available"}
        Precision of the operators' products on a CPU (docs/precision.md). It is not part of the state dict.

    Raises
    ------
    ConfigError
        If a size is not an integer of at least 1, dropout is outside [0, 1], or precision is unknown.

    Notes
    -----
    As in Qlib, the convolutions are registered twice, as conv1 and conv2 and in `net`, so a state dict contains them
    under both names. Loading accepts a state dict with only one of the names, or with the names of torch's newer
    parametrizations. It raises CheckpointError if two copies of a tensor differ.

    One operator computes the block. If a module was replaced or hooked, the modules are called one by one.

    Examples
    --------
    >>> TemporalBlock(3, 8, kernel_size=2)(torch.zeros(5, 3, 20)).shape
    torch.Size([5, 8, 20])
    """

    def __init__(
        self,
        n_inputs: int,
        n_outputs: int,
        kernel_size: int,
        dilation: int = 1,
        dropout: float = 0.2,
        *,
        precision: str = "float32",
    ) -> None:
        super().__init__(precision)
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
        # Qlib pads both sides and has modules 1 and 5 cut the surplus steps off. The Identity modules take their place,
        # so the other modules get the same numbers.
        self.net = _Steps(
            self.conv1,
            nn.Identity(),
            self.relu1,
            self.dropout1,
            self.conv2,
            nn.Identity(),
            self.relu2,
            self.dropout2,
        )
        self.downsample = nn.Conv1d(n_inputs, n_outputs, 1) if n_inputs != n_outputs else None
        self.relu = nn.ReLU()
        self.dilation = dilation
        self._draw_as_qlib()
        self.register_load_state_dict_pre_hook(_rename_before_loading)

    def _draw_as_qlib(self) -> None:
        """Draw random numbers in Qlib's order.

        Qlib also draws weights for the two convolutions, but its weight normalization overwrites them. Here they only
        advance the generator.
        """
        with torch.no_grad():
            for conv in (self.conv1, self.conv2):
                torch.empty_like(conv.weight_v).normal_(0, 0.01)
            if self.downsample is not None:
                self.downsample.weight.normal_(0, 0.01)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the block at all steps, [B, C_in, T] -> [B, C, T]."""
        # The scripting check must be the whole condition: see Recurrent._last_step.
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            uses_operator = _can_use_operator([self])
            if uses_operator:
                return self._by_operator(x)
        residual = x if self.downsample is None else self.downsample(x)
        out: Tensor = self.relu(self.net(x) + residual)
        return out

    def _by_operator(self, x: Tensor) -> Tensor:
        """Compute `forward` with qfast's operator."""
        dropout = self.dropout1
        weights = self.block_weights()
        return temporal_block(
            x,
            weights,
            dilation=self.dilation,
            dropout=dropout.p,
            training=dropout.training,
            precision=self.precision,
        )

    def block_weights(self) -> BlockWeights:
        """Return the parameters in the form that `qfast.ops.temporal_conv_net` accepts."""
        first, second, downsample = self.conv1, self.conv2, self.downsample
        return BlockWeights(
            weight_v1=first.weight_v,
            weight_g1=first.weight_g,
            bias1=first.bias,
            weight_v2=second.weight_v,
            weight_g2=second.weight_g,
            bias2=second.bias,
            downsample_weight=None if downsample is None else downsample.weight,
            downsample_bias=None if downsample is None else downsample.bias,
        )

    def is_plain(self) -> bool:
        """Return whether all modules are unchanged and without hooks, so the operator computes the same result."""
        first, second, downsample = self.dropout1, self.dropout2, self.downsample
        modules = list(self.net)
        if len(modules) != len(_NET) or any(
            type(module) is not kind for module, kind in zip(modules, _NET, strict=True)
        ):
            return False
        if modules[0] is not self.conv1 or modules[4] is not self.conv2 or type(self.relu) is not nn.ReLU:
            return False
        if modules[3] is not first or modules[7] is not second:
            return False
        if first.p != second.p or first.training != second.training:
            return False
        if self.conv1.in_channels != self.conv1.out_channels:
            if type(downsample) is not nn.Conv1d or has_hooks(downsample):
                return False
        elif downsample is not None:
            return False
        # Only the modules that `forward` calls: self.modules() takes as long as all other checks together.
        return not any(has_hooks(module) for module in (self, self.net, self.relu, *modules))


class TemporalConvNet(PlainTorch):
    """Stack of temporal blocks with dilations 1, 2, 4, ..., at all steps (Bai, Kolter, Koltun 2018; Qlib: tcn.py).

    Parameters
    ----------
    num_inputs : int
        F.
    num_channels : sequence of int
        Width of each block.
    kernel_size : int
    dropout : float
        Probability of dropout of the output of every convolution, in training only.
    precision : {"float32", "bf16", "bf16-if-available"}
        Precision of the operators' products on a CPU (docs/precision.md). It is not part of the state dict.

    Raises
    ------
    ConfigError
        If num_channels is empty or not a sequence, a size is not an integer of at least 1, dropout is outside [0, 1],
        or precision is unknown.

    Examples
    --------
    >>> TemporalConvNet(3, [8, 16])(torch.zeros(5, 3, 20)).shape
    torch.Size([5, 16, 20])
    """

    def __init__(
        self,
        num_inputs: int,
        num_channels: Sequence[int],
        kernel_size: int = 2,
        dropout: float = 0.2,
        *,
        precision: str = "float32",
    ) -> None:
        super().__init__(precision)
        if not isinstance(num_channels, Sequence) or len(num_channels) == 0:
            raise ConfigError(
                f"num_channels must be a list with the width of each block, got {num_channels!r}. "
                "Remedy: [32, 32] for two blocks of 32 channels."
            )
        widths = [num_inputs, *num_channels]
        blocks = [
            TemporalBlock(before, width, kernel_size, 2**number, dropout, precision=precision)
            for number, (before, width) in enumerate(pairwise(widths))
        ]
        self.network = nn.Sequential(*blocks)
        self.register_load_state_dict_pre_hook(_rename_before_loading)

    def forward(self, x: Tensor) -> Tensor:
        """Compute all blocks at all steps, [B, F, T] -> [B, C, T]."""
        # The scripting check must be the whole condition: see Recurrent._last_step.
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            uses_operator = self.uses_operator()
            if uses_operator:
                return self.by_operator(x, all_steps=True, precision=self.precision)
        out: Tensor = self.network(x)
        return out

    def uses_operator(self) -> bool:
        """Return whether one operator computes the whole stack: no block was changed or hooked."""
        blocks = self.network
        return (
            type(blocks) is nn.Sequential
            and not has_hooks(blocks)
            and _can_use_operator(cast("Iterable[TemporalBlock]", blocks))
        )

    def by_operator(self, x: Tensor, *, all_steps: bool, precision: str = "float32") -> Tensor:
        """Compute all blocks with qfast's operator.

        Returns [B, C, T] for x [B, F, T] if `all_steps`. Otherwise it returns [B, C] of the last step and computes only
        the steps that the last one depends on.
        """
        blocks = cast(list[TemporalBlock], list(self.network))
        dropout = blocks[0].dropout1
        return temporal_conv_net(
            x,
            [block.block_weights() for block in blocks],
            dilations=[block.dilation for block in blocks],
            dropout=dropout.p,
            training=dropout.training,
            all_steps=all_steps,
            precision=precision,
        )

    def translate_state_dict(self, state: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
        """Return a state dict with the names of this network, from any names that `TemporalBlock` accepts.

        Raises
        ------
        CheckpointError
            If `state` has a tensor under two names with different values.
        """
        renamed = dict(state)
        _rename_before_loading(self, renamed, prefix)
        return renamed

    def own_names(self, state: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
        """Deprecated name of `translate_state_dict`."""
        _warn_renamed("own_names", "translate_state_dict")
        return self.translate_state_dict(state, prefix)

    def takes_operator(self) -> bool:
        """Deprecated name of `uses_operator`."""
        _warn_renamed("takes_operator", "uses_operator")
        return self.uses_operator()


class TCNModel(PlainTorch):
    """Temporal convolutional network that predicts from the last step (Bai et al. 2018; Qlib: pytorch_tcn.py).

    Parameters
    ----------
    num_input : int
        F.
    output_size : int
        Number of predictions per window.
    num_channels : sequence of int
        Width of each block.
    kernel_size : int
        At least 1. Qlib fails for 1.
    dropout : float
        Probability of dropout of the output of every convolution, in training only.
    precision : {"float32", "bf16", "bf16-if-available"}
        Precision of the operators' products on a CPU (docs/precision.md). It is not part of the state dict.

    Raises
    ------
    ConfigError
        If num_channels is empty or not a sequence, a size is not an integer of at least 1, dropout is outside [0, 1],
        or precision is unknown.

    Notes
    -----
    Only the steps that the last step depends on are computed. `qfast.ops.temporal_conv_net.plan(T, kernel_size,
    blocks)` returns them. TorchScript and traces use torch's convolutions at all steps instead. Under autocast the
    convolutions stay in float32.

    Examples
    --------
    >>> network = TCNModel(num_input=6, output_size=1, num_channels=[8] * 3, kernel_size=3, dropout=0.5)
    >>> network(torch.zeros(5, 360)).shape
    torch.Size([5])
    """

    def __init__(
        self,
        num_input: int,
        output_size: int,
        num_channels: Sequence[int],
        kernel_size: int,
        dropout: float,
        *,
        precision: str = "float32",
    ) -> None:
        super().__init__(precision)
        self.num_input = whole_number("num_input", num_input)
        self.output_size = whole_number("output_size", output_size)
        self.tcn = TemporalConvNet(num_input, num_channels, kernel_size, dropout, precision=precision)
        self.linear = nn.Linear(num_channels[-1], output_size)

    def forward(self, x: Tensor) -> Tensor:
        """Predict from the last step of each window.

        Parameters
        ----------
        x : Tensor [B, F, T], or [B, F*T] feature-major (all T steps of feature 0, then all of feature 1, ...)
            Any strides. For windows [B, T, F] pass x.transpose(1, 2).

        Returns
        -------
        Tensor [B], or [B, output_size] if output_size is more than 1
            A batch of one also returns [1], where Qlib returns a scalar.

        Raises
        ------
        DataError
            If the shape does not match num_input, or the dtype differs from the weights'.
        """
        windows = self._windows(x)
        prediction: Tensor = self.linear(self._last_step(windows))
        return prediction.squeeze(-1) if self.output_size == 1 else prediction

    def stream(self) -> TCNStream:
        """Return a TCNStream, which scores day by day from one new row per instrument, with a copy of the weights.

        Examples
        --------
        >>> model = TCNModel(num_input=6, output_size=1, num_channels=[8] * 3, kernel_size=3, dropout=0.5).eval()
        >>> model.stream().push(torch.zeros(2, 6), ["AAPL", "MSFT"]).shape
        torch.Size([2])
        """
        return TCNStream(self)

    def translate_state_dict(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a state dict with the names of this network, from any names that `TemporalBlock` accepts.

        Raises
        ------
        CheckpointError
            If `state` has a tensor under two names with different values.
        """
        return self.tcn.translate_state_dict(state, "tcn.")

    def own_names(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Deprecated name of `translate_state_dict`."""
        _warn_renamed("own_names", "translate_state_dict")
        return self.translate_state_dict(state)

    def _windows(self, x: Tensor) -> Tensor:
        """Return a batch of windows as [B, F, T]."""
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

    def _last_step(self, x: Tensor) -> Tensor:
        """Return the last step [B, C] of the network over [B, F, T]."""
        # The scripting check must be the whole condition: see Recurrent._last_step.
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            uses_operator = type(self.tcn) is TemporalConvNet and not has_hooks(self.tcn) and self.tcn.uses_operator()
            if uses_operator:
                if not torch.is_autocast_enabled(x.device.type):
                    check_dtype(x, next(self.tcn.parameters()))
                return self.tcn.by_operator(x, all_steps=False, precision=self.precision)
        out: Tensor = self.tcn(x)[:, :, -1]
        return out


def _check_dropout(dropout: object) -> None:
    if isinstance(dropout, bool) or not isinstance(dropout, Real) or not 0.0 <= float(dropout) <= 1.0:
        raise ConfigError(f"dropout must be in [0, 1], got {dropout!r}.")


def _can_use_operator(blocks: Iterable[TemporalBlock]) -> bool:
    """Return whether one operator can compute these blocks.

    A trace must not record the operator, because a process without qfast could not load it.
    """
    if torch.jit.is_tracing():  # type: ignore[attr-defined]
        return False
    if not all(type(block) is TemporalBlock and block.is_plain() and not block._plain_torch for block in blocks):
        return False
    return len({(block.dropout1.p, block.dropout1.training) for block in blocks}) == 1


# ---------------------------------------------------------------- names in state dicts
def _complete_names(state: dict[str, Tensor], prefix: str) -> None:
    """Store the convolutions of a block in `state` under both of their names.

    Raises
    ------
    CheckpointError
        If `state` has a tensor under two names with different values.
    """
    for name, alias in (("conv1", "net.0"), ("conv2", "net.4")):
        for conv in (f"{prefix}{name}", f"{prefix}{alias}"):
            for parametrized, plain in _PARAMETRIZATION_NAMES.items():
                if f"{conv}.{parametrized}" in state:
                    _require_equal(state, f"{conv}.{plain}", f"{conv}.{parametrized}")
                    state[f"{conv}.{plain}"] = state.pop(f"{conv}.{parametrized}")
        for parameter in ("bias", "weight_g", "weight_v"):
            first, second = f"{prefix}{name}.{parameter}", f"{prefix}{alias}.{parameter}"
            _require_equal(state, first, second)
            if first in state:
                state[second] = state[first]
            elif second in state:
                state[first] = state[second]


def _require_equal(state: dict[str, Tensor], first: str, second: str) -> None:
    """Raise CheckpointError if `state` has both names with different values."""
    if first in state and second in state and not _is_equal(state[first], state[second]):
        raise CheckpointError(
            f"{first} and {second} are two names of one tensor but have different values (shapes "
            f"{list(state[first].shape)} and {list(state[second].shape)}). Remedy: remove the wrong one from the state "
            "dict; one of the two names is enough."
        )


def _is_equal(first: Tensor, second: Tensor) -> bool:
    """Return whether two copies of a tensor have the same values; NaN equals NaN."""
    if first is second or first.is_meta or second.is_meta:
        return True
    if first.shape != second.shape:
        return False
    return bool(torch.isclose(first, second.to(first), rtol=0, atol=0, equal_nan=True).all())


def _rename_before_loading(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Complete the names of one block, or of all blocks of a stack, before torch loads a state dict.

    The stack checks all blocks at once, so an invalid state dict raises before any weight is changed.
    """
    if isinstance(module, TemporalConvNet):
        for number in range(len(module.network)):
            _complete_names(state, f"{prefix}network.{number}.")
    else:
        _complete_names(state, prefix)


def _warn_renamed(old: str, new: str) -> None:
    """Warn that a method is called by a name that will be removed."""
    warnings.warn(f"{old} was renamed and will be removed in the next release: use {new}.", DeprecationWarning, 3)
