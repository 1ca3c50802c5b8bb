"""The definition of products of bfloat16 for the tests: the operators' plain-torch twins, with rounded operands."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch

from qfast.precision import BF16, bf16_obstacle

__all__ = ["OPERATORS", "emulation", "needs_bf16"]

OPERATORS = {  # operators with products of bfloat16, and the modules that define them
    "attention_pool": "attention_pool",
    "encoder_layer": "encoder_layer",
    "feed_forward": "feed_forward",
    "gru": "recurrent",
    "lstm": "recurrent",
    "temporal_conv_net": "temporal_conv",
    "window_conv": "window_conv",
}
OBSTACLE = bf16_obstacle()
needs_bf16 = pytest.mark.skipif(bool(OBSTACLE), reason=f"bf16 is not available: {OBSTACLE}")
# There are no kernels for this key, so the dispatcher chooses the twin.
_TWINS = torch._C.DispatchKeySet(torch._C.DispatchKey.XLA)


@contextmanager
def emulation() -> Iterator[None]:
    """Within the block, the public functions compute bf16 with their twins, in the dtype of their tensors."""
    with pytest.MonkeyPatch.context() as patch:
        for name, file in OPERATORS.items():
            patch.setattr(importlib.import_module(f"qfast.ops.{file}"), "products_for", lambda *_: BF16)
            for operator in (name, f"{name}_backward"):
                packet = getattr(torch.ops.qfast, operator)
                patch.setattr(torch.ops.qfast, operator, partial(_twin, packet.default))
        yield


def _twin(operator: Any, *arguments: Any) -> Any:
    return operator.redispatch(_TWINS, *arguments)
