"""Networks that can do without our operators, for whatever knows torch's alone."""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import nn

__all__ = ["PlainTorch"]

Network = TypeVar("Network", bound="PlainTorch")


class PlainTorch(nn.Module):
    """What every network of qfast.nn can do: give a copy of itself that computes with torch's own operations."""

    _plain_torch = False

    def to_reference(self: Network) -> Network:
        """A copy that computes by torch's own layers and operations, as the reference does, at their speed.

        For ONNX and other exporters that know torch's operations only, quantisation, and gradients of gradients. The
        numbers are the same up to rounding, but where there is dropout: its masks are then torch's.

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
