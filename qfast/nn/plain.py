"""Networks that can do without our operators, for whatever knows torch's alone."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

from qfast import _backend
from qfast.errors import DataError
from qfast.ops import transforms

__all__ = ["PlainTorch", "check_dtype", "has_hooks"]

Network = TypeVar("Network", bound="PlainTorch")


class PlainTorch(nn.Module):
    """What every network of qfast.nn can do: give a copy of itself that computes with torch's own operations."""

    _plain_torch = False

    def to_reference(self: Network) -> Network:
        """A copy that computes by torch's own layers and operations, as the reference does, at their speed.

        For ONNX and other exporters that know torch's operations only, quantisation, and gradients of gradients (of
        an encoder under torch.nn.attention.sdpa_kernel(SDPBackend.MATH): torch's fast attention has none). The numbers
        are the same up to rounding, but where there is dropout: its masks are then torch's.

        Returns
        -------
        nn.Module
            Same class, weights of its own with the same names.

        Examples
        --------
        >>> import torch
        >>> from qfast.nn import LSTMModel
        >>> plain = LSTMModel(d_feat=6).eval().to_reference()
        >>> "qfast" in str(torch.export.export(plain, (torch.zeros(3, 360),)).graph)
        False
        """
        plain = copy.deepcopy(self)
        for part in plain.modules():
            if isinstance(part, PlainTorch):
                part._plain_torch = True
        return plain

    def _may_take_operator(self, x: Tensor, weight: Tensor) -> bool:
        """Whether to compute a network of such weights with our operators: where these serve, in float32 and float64.

        Raises
        ------
        DataError
            x has not the weights' dtype.
        """
        if self._plain_torch or torch.jit.is_tracing() or torch.compiler.is_exporting():  # type: ignore[attr-defined]
            return False
        device = x.device.type
        if device not in ("cpu", "cuda") or torch.is_autocast_enabled(device):
            return False
        if device == "cuda" and not _backend.layers_serve(x.device):
            return False
        check_dtype(x, weight)
        if x.dtype not in (torch.float32, torch.float64) or x.shape[1] == 0:
            return False
        # torch's layers cannot all follow vmap, nor forward mode in float32
        return torch.compiler.is_compiling() or transforms.active() or _backend.layers_serve(x.device)


def check_dtype(x: Tensor, weight: Tensor) -> None:
    """x has the dtype of a network's weights.

    Raises
    ------
    DataError
        It has not.
    """
    if x.dtype == weight.dtype:
        return
    remedy = f"x.to({weight.dtype})"
    if x.is_floating_point():
        remedy += f", or the network .to({x.dtype}); new networks take torch's default dtype (torch.set_default_dtype)"
    raise DataError(f"x is {x.dtype} but the network's weights are {weight.dtype}. Remedy: {remedy}.")


def has_hooks(part: nn.Module) -> bool:
    """Whether something waits for the calls of a module, which an operator in its place would not make."""
    return bool(part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks)
