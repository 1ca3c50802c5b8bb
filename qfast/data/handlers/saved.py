"""Files of handlers and datasets, under Qlib's names `to_pickle` and `load` but without pickle.

A file is in the safetensors format: the arrays of the panels and of the fitted processors, and JSON for everything
else. Reading it never runs code.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from qfast.data.panel import Block, Panel
from qfast.data.processors import Processor, build_processor
from qfast.dates import DateLike
from qfast.errors import CheckpointError, ConfigError
from qfast.files import require_file_target
from qfast.registry import PROCESSORS, parameters
from qfast.tensor_files import require_intact, write_checked

if TYPE_CHECKING:
    from qfast.data.handlers.base import DataHandlerLP

__all__ = ["read_file", "read_handler", "write_file", "write_handler"]

FORMAT = 1
KEY = "qfast"
STAGES = ("shared", "infer", "learn")
PICKLE_MAGIC = (b"\x80", b"(", b"\x1f\x8b", b"BZh", b"\xfd7zXZ")  # pickle, and files that pandas compresses

Arrays = dict[str, np.ndarray]


def write_file(path: str | os.PathLike[str], kind: str, arrays: Arrays, facts: Mapping[str, Any]) -> None:
    """Write arrays and plain data to one file.

    Raises
    ------
    ConfigError
        `path` is a folder or cannot be written.
    """
    target = Path(path)
    require_file_target(target, "path")
    metadata = {KEY: json.dumps({"format": FORMAT, "kind": kind, **facts})}
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    write_checked(target, lambda file, entries: save_file(contiguous, file, metadata=entries), metadata)


def read_file(path: str | os.PathLike[str], kind: str) -> tuple[Arrays, dict[str, Any]]:
    """Read what `write_file` has written.

    Raises
    ------
    CheckpointError
        The file is missing, is a pickle file, is damaged, or has another kind or format.
    """
    file = Path(path)
    if not file.is_file():
        raise CheckpointError(f"{str(path)!r} is not a file (looked in {Path.cwd()}).")
    with file.open("rb") as stream:
        start = stream.read(8)
    try:
        if not start.startswith(PICKLE_MAGIC):
            require_intact(file)
        with safe_open(file, framework="numpy") as content:
            facts = json.loads((content.metadata() or {}).get(KEY, "null"))
            arrays = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        if start.startswith(PICKLE_MAGIC):
            raise CheckpointError(
                f"{str(path)!r} is a pickle file, as Qlib writes it. qfast does not read it, because it can run any "
                "code. Remedy: if you trust it, load it in Qlib, save handler.fetch(col_set='__raw', data_key=...) "
                "with to_parquet, and use DataHandlerLP.from_df(pandas.read_parquet(...))."
            ) from None
        raise CheckpointError(f"{str(path)!r} cannot be read, it may be truncated ({error}).") from None
    if not isinstance(facts, dict) or facts.get("format") != FORMAT or facts.get("kind") != kind:
        described = facts if facts is None else {key: facts.get(key) for key in ("format", "kind")}
        raise CheckpointError(
            f"{str(path)!r} must be a {kind} of format {FORMAT} that qfast has written, got {described}."
        )
    return arrays, facts


def write_handler(handler: DataHandlerLP, path: str | os.PathLike[str]) -> None:
    """Write the data and the fitted processors of a handler."""
    arrays, facts = handler_content(handler)
    write_file(path, "handler", arrays, facts)


def read_handler(path: str | os.PathLike[str]) -> DataHandlerLP:
    """Read a handler that `write_handler` has written."""
    return handler_of(*read_file(path, "handler"))


def handler_content(handler: DataHandlerLP) -> tuple[Arrays, dict[str, Any]]:
    """Arrays and plain data of a handler. An array that several panels share is stored once."""
    arrays: Arrays = {}
    names: dict[int, str] = {}

    def stored(array: np.ndarray) -> str:
        if id(array) not in names:
            names[id(array)] = f"array.{len(names)}"
            arrays[names[id(array)]] = array
        return names[id(array)]

    keys = ("infer", "learn") if handler.drop_raw else ("raw", "infer", "learn")
    panels = {key: _panel_facts(handler.panel(key), stored) for key in keys}
    stages: dict[str, list[dict[str, Any]]] = {}
    for stage in STAGES:
        stages[stage] = []
        for position, processor in enumerate(getattr(handler, f"{stage}_processors")):
            arrays |= {f"{stage}.{position}.{name}": value for name, value in processor.state().items()}
            stages[stage].append(_processor_facts(processor))
    bounds = {
        name: _text(getattr(handler, name)) for name in ("start_time", "end_time", "fit_start_time", "fit_end_time")
    }
    facts = {"panels": panels, "processors": stages, "process_type": handler.process_type, **bounds}
    return arrays, {**facts, "flat_columns": handler.flat_columns, "drop_raw": handler.drop_raw}


def handler_of(arrays: Arrays, facts: Mapping[str, Any]) -> DataHandlerLP:
    """The DataHandlerLP with the content of `handler_content`. Its processors are fitted and frozen."""
    from qfast.data.handlers.base import DataHandlerLP

    panels = {key: _panel_of(content, arrays) for key, content in facts["panels"].items()}
    processors = {}
    for stage in STAGES:
        processors[stage] = [build_processor(spec, inject=False) for spec in facts["processors"][stage]]
        for position, processor in enumerate(processors[stage]):
            prefix = f"{stage}.{position}."
            processor.load_state({n.removeprefix(prefix): v for n, v in arrays.items() if n.startswith(prefix)})
    bounds = {name: facts[name] for name in ("start_time", "end_time", "fit_start_time", "fit_end_time")}
    return DataHandlerLP.from_panels(
        panels, processors, facts["process_type"], flat_columns=facts["flat_columns"], **bounds
    )


def _panel_facts(panel: Panel, stored: Any) -> dict[str, Any]:
    stamps = panel.datetimes
    return {
        "datetimes": stored(stamps.asi8),
        "unit": stamps.unit,
        "zone": None if stamps.tz is None else str(stamps.tz),
        "instruments": [str(name) for name in panel.instruments],
        "date_codes": stored(panel.date_codes),
        "instrument_codes": stored(panel.instrument_codes),
        "live": None if panel.live is None else stored(panel.live),
        "blocks": {g: {"values": stored(b.values), "columns": list(b.columns)} for g, b in panel.blocks.items()},
    }


def _panel_of(facts: Mapping[str, Any], arrays: Arrays) -> Panel:
    stamps = pd.DatetimeIndex(arrays[facts["datetimes"]].view(f"datetime64[{facts['unit']}]"))
    return Panel(
        datetimes=stamps if facts["zone"] is None else stamps.tz_localize("UTC").tz_convert(facts["zone"]),
        instruments=np.array(facts["instruments"], dtype=object),
        date_codes=arrays[facts["date_codes"]],
        instrument_codes=arrays[facts["instrument_codes"]],
        blocks={g: Block(arrays[b["values"]], tuple(b["columns"])) for g, b in facts["blocks"].items()},
        live=None if facts["live"] is None else arrays[facts["live"]],
    )


def _processor_facts(processor: Processor) -> dict[str, Any]:
    kind = type(processor)
    if kind.__name__ not in PROCESSORS.names():
        raise ConfigError(f"{kind.__name__} cannot be saved, because it is not registered: {PROCESSORS.names()}.")
    arguments = {name: getattr(processor, name) for name in parameters(kind)}
    return {"class": kind.__name__, "kwargs": {name: _text(value) for name, value in arguments.items()}}


def _text(value: DateLike | Any) -> Any:
    """Plain data: dates as ISO text, tuples as lists."""
    if isinstance(value, tuple):
        return list(value)
    return value.isoformat() if hasattr(value, "isoformat") else value
