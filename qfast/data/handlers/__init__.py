"""Handlers: raw columns, the processors that run over them, and the three panels that result.

The flow is the reference's (pyqlib 0.9.7, DataHandlerLP): raw -> shared -> infer gives the "infer"
data; learn processors run on that ("append") or on the result of the shared ones ("independent") and
give the "learn" data. Panels share every block that no processor changed, so dropping rows and ranking
labels for learning costs no second copy of the features.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qfast.data.handlers.alpha158 import Alpha158, Alpha158vwap, FactorHandler
from qfast.data.handlers.alpha360 import Alpha360, Alpha360vwap
from qfast.data.handlers.base import DataHandlerLP, RawDataDroppedError
from qfast.data.protocols import Handler
from qfast.registry import HANDLERS

__all__ = [
    "Alpha158",
    "Alpha158vwap",
    "Alpha360",
    "Alpha360vwap",
    "DataHandlerLP",
    "FactorHandler",
    "RawDataDroppedError",
    "build_handler",
]


def build_handler(spec: Handler | Mapping[str, Any] | str, *, path: str = "handler", **extra: Any) -> Handler:
    """A handler from an instance, a mapping or a name; see `qfast.registry.Registry.build`."""
    return HANDLERS.build(spec, path=path, **extra)


HANDLERS.add(DataHandlerLP, modules=("qlib.data.dataset.handler", "qfast.data.handlers", "qfast.data"))
for _class in (Alpha158, Alpha158vwap, Alpha360, Alpha360vwap):
    HANDLERS.add(_class, modules=("qlib.contrib.data.handler", "qfast.data.handlers", "qfast.data"))
HANDLERS.add(FactorHandler, modules=("qfast.data.handlers", "qfast.data"))
