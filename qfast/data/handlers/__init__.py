"""Handlers: raw columns, the processors that run over them, and the resulting panels for inference and learning.

The stages are those of DataHandlerLP in pyqlib 0.9.7. Shared and then infer processors turn the raw data into the
"infer" data. Learn processors run on the "infer" data (process_type="append") or on the result of the shared processors
("independent") and return the "learn" data. Panels share every block that no processor changed, so dropping rows and
ranking labels for learning does not copy the features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qfast.data.handlers.alpha158 import Alpha158, Alpha158vwap, FactorHandler
from qfast.data.handlers.alpha360 import Alpha360, Alpha360vwap
from qfast.data.handlers.base import DataHandlerLP, RawDataDroppedError
from qfast.data.processors import Processor, ProcessorSpec, build_processor
from qfast.data.protocols import Handler
from qfast.dates import DateLike
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
    "check_transform_proc",
]


def build_handler(spec: Handler | Mapping[str, Any] | str, *, path: str = "handler", **extra: Any) -> Handler:
    """Build a handler from an instance, a configuration mapping or a class name.

    Parameters
    ----------
    spec : Handler, mapping or str
        See `qfast.registry.Registry.build`.
    path : str
        Place of the configuration, for messages.
    **extra
        Additional arguments of the handler.

    Raises
    ------
    ConfigError
        The class or an argument is unknown.

    Examples
    --------
    >>> from qfast.data import synthetic
    >>> build_handler({"class": "Alpha360"}, data=synthetic.prices(3, 70), learn_processors=[], infer_processors=[])
    Alpha360(3 instruments, 188 rows, 188 to learn from, columns {'feature': 360, 'label': 1})
    """
    return HANDLERS.build(spec, path=path, **extra)


def check_transform_proc(
    proc_l: Sequence[ProcessorSpec], fit_start_time: DateLike | None, fit_end_time: DateLike | None
) -> list[Processor]:
    """Build processors with the fit period of a handler; handlers written for Qlib call it.

    Parameters
    ----------
    proc_l : sequence of Processor, mapping or str
    fit_start_time, fit_end_time : date-like or None
        Fit period of the processors that have these arguments and do not specify their own.

    Raises
    ------
    ConfigError
        A processor is unknown, or needs a fit period and there is none.

    Examples
    --------
    >>> check_transform_proc(["Fillna"], None, None)
    [Fillna(fields_group=None, fill_value=0)]
    """
    return [build_processor(spec, fit_start_time, fit_end_time) for spec in proc_l or ()]


HANDLERS.base = DataHandlerLP
HANDLERS.add(DataHandlerLP, modules=("qlib.data.dataset.handler", "qfast.data.handlers", "qfast.data"))
for _class in (Alpha158, Alpha158vwap, Alpha360, Alpha360vwap):
    HANDLERS.add(_class, modules=("qlib.contrib.data.handler", "qfast.data.handlers", "qfast.data"))
HANDLERS.add(FactorHandler, modules=("qfast.data.handlers", "qfast.data"))
