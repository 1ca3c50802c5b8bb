"""Base class of the networks: when to call qfast's operators, and how to get a network that uses torch only."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

from qfast import _backend
from qfast.errors import DataError
from qfast.ops import transforms
from qfast.precision import check_products

__all__ = ["PlainTorch", "check_dtype", "has_hooks"]

Network = TypeVar("Network", bound="PlainTorch")


class PlainTorch(nn.Module):
    """Base class of every network in qfast.nn: `to_reference` returns a copy that uses torch's operations only.

    Parameters
    ----------
    precision : {"float32", "bf16", "bf16-if-available"}
        Precision of the operators' products on a CPU (docs/precision.md).

    Raises
    ------
    ConfigError
        precision is unknown.
    """

    _plain_torch = False
    precision = "float32"
    """Precision of the operators' products on a CPU: "float32", "bf16" or "bf16-if-available" (docs/precision.md).
    torch's own layers compute in float32. An attribute, so it is not part of the state dict."""

    def __init__(self, precision: str = "float32") -> None:
        super().__init__()
        self.precision = check_products(precision)

    def to_reference(self: Network) -> Network:
        """Return a copy that computes with torch's own layers and operations, as Qlib does, at torch's speed.

        Use it for exporters that know only torch's operations (ONNX, for example), for quantization and for double
        backward. Double backward of an encoder also needs `torch.nn.attention.sdpa_kernel(SDPBackend.MATH)`, because
        torch's fused attention does not support it.

        Without dropout the results are equal up to rounding. With dropout the copy draws torch's masks.

        Returns
        -------
        nn.Module
            A network of the same class with copies of the weights under the same names.

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

    def _can_use_operator(self, x: Tensor, weight: Tensor) -> bool:
        """Return whether qfast's operators can compute a network with these weights on x.

        The operators need float32 or float64 tensors on a device where they are enabled. Traces, exports and autocast
        use torch's layers.

        Raises
        ------
        DataError
            If x and `weight` have different dtypes.
        """
        if self._plain_torch or torch.jit.is_tracing() or torch.compiler.is_exporting():  # type: ignore[attr-defined]
            return False
        device = x.device.type
        if device not in ("cpu", "cuda") or torch.is_autocast_enabled(device):
            return False
        if device == "cuda" and not _backend.uses_qfast_layers(x.device):
            return False
        check_dtype(x, weight)
        if x.dtype not in (torch.float32, torch.float64) or x.shape[1] == 0:
            return False
        # Under torch.func and forward mode the operators compute with plain torch operations, which support every
        # transform. Some of torch's layers support neither vmap nor forward mode in float32.
        return torch.compiler.is_compiling() or transforms.active() or _backend.uses_qfast_layers(x.device)


def check_dtype(x: Tensor, weight: Tensor) -> None:
    """Check that x has the dtype of a network's weights.

    Raises
    ------
    DataError
        If the dtypes differ. The message contains both dtypes and the conversions that fix it.

    Examples
    --------
    >>> check_dtype(torch.zeros(2), torch.zeros(3))
    >>> check_dtype(torch.zeros(2), torch.zeros(3, dtype=torch.float64))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    qfast.errors.DataError: x is torch.float32 but the network's weights are torch.float64. Remedy: ...
    """
    if x.dtype == weight.dtype:
        return
    remedy = f"x.to({weight.dtype})"
    if x.is_floating_point():
        remedy += f", or network.to({x.dtype}). New networks use torch's default dtype (torch.set_default_dtype)"
    raise DataError(f"x is {x.dtype} but the network's weights are {weight.dtype}. Remedy: {remedy}.")


def has_hooks(module: nn.Module) -> bool:
    """Return whether a forward or backward hook is registered on `module`; an operator would not call it.

    Examples
    --------
    >>> layer = nn.Linear(2, 2)
    >>> handle = layer.register_forward_hook(lambda module, inputs, output: None)
    >>> has_hooks(layer), has_hooks(nn.Linear(2, 2))
    (True, False)
    """
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )
