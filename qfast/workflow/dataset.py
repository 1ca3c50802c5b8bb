"""Where the data of a workflow comes from: building its dataset, and what the manifest says of it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import pandas as pd

from qfast import registry
from qfast.data.panel import Panel
from qfast.data.prices import parse_dates
from qfast.data.protocols import Handler, HandlerDataset
from qfast.data.tables import read_table
from qfast.dates import date_text
from qfast.errors import ConfigError
from qfast.workflow.schema import Workflow

__all__ = ["DataInput", "build_dataset", "data_facts", "data_source", "source_arguments", "source_panel"]


DataInput: TypeAlias = "str | os.PathLike[str] | pd.DataFrame | Panel | Mapping[str, pd.DataFrame]"
"""Prices or factors: a path, a frame, a panel, or frames by column group."""

SOURCE_ARGUMENTS = ("data", "provider_uri", "source")  # handler arguments that specify where the data comes from
DATA_REMEDY = "--data PATH with a CSV or Parquet file, a folder of CSV files, or a Qlib data folder"
HANDLER_PATH = "task.dataset.kwargs.handler"


def require_data(data: DataInput | None, workflow: Workflow) -> None:
    """Refuse a workflow whose data cannot exist, before any work is done.

    Raises
    ------
    ConfigError
        `data` is a path that does not exist; without `data`, the file specifies none or a Qlib folder that does not
        exist.
    """
    if data is not None:
        if isinstance(data, (str, os.PathLike)) and not Path(data).expanduser().exists():
            raise ConfigError(f"--data {str(data)!r} does not exist (looked in {Path.cwd()}).")
        return
    handler_arguments = workflow.task.dataset.kwargs.handler.kwargs.model_extra or {}
    if any(handler_arguments.get(name) is not None for name in SOURCE_ARGUMENTS):
        return
    uri = workflow.qlib_init.provider_uri
    if uri is None:
        raise ConfigError(f"qlib_init.provider_uri is missing, so there is no data. Remedy: {DATA_REMEDY}.")
    for place in uri.values() if isinstance(uri, Mapping) else [uri]:
        if not Path(place).expanduser().is_dir():
            raise ConfigError(
                f"qlib_init.provider_uri: the Qlib data folder {place!r} does not exist. Remedy: {DATA_REMEDY}."
            )


def build_dataset(workflow: Workflow, data: DataInput | None) -> HandlerDataset:
    """The dataset of a workflow, over `data` where it is given, else over `qlib_init.provider_uri`."""
    spec = workflow.task.dataset.given()
    handler_spec = spec["kwargs"].pop("handler")
    own = handler_spec.setdefault("kwargs", {})
    if data is not None:
        own.update(source_arguments(handler_spec, data))
    elif not any(own.get(name) is not None for name in SOURCE_ARGUMENTS):
        own["provider_uri"] = workflow.qlib_init.provider_uri
    handler = registry.HANDLERS.build(handler_spec, path=HANDLER_PATH)
    return registry.DATASETS.build({**spec, "kwargs": {**spec["kwargs"], "handler": handler}}, path="task.dataset")


def source_arguments(handler_spec: Mapping[str, Any], data: DataInput) -> dict[str, Any]:
    """The arguments by which the handler's class is given `data`."""
    bare = {key: handler_spec[key] for key in ("class", "module_path") if key in handler_spec}
    factory, _ = registry.HANDLERS.resolve(bare, HANDLER_PATH)
    taken = registry.parameters(factory)
    if "data" in taken:
        return {"data": data, "provider_uri": None} if "provider_uri" in taken else {"data": data}
    if "source" in taken:
        return {"source": _factor_frame(data)}
    name = getattr(factory, "__name__", factory)
    raise ConfigError(f"{HANDLER_PATH}: {name} takes no data from outside; use Alpha360 or DataHandlerLP with --data.")


def _factor_frame(data: DataInput) -> pd.DataFrame | Panel | Mapping[str, pd.DataFrame]:
    """Features and labels of one's own: a Panel, a frame, or a Parquet or CSV file of one.

    Two-level columns are (group, name). With single-level columns, names that begin with "label" are
    labels and the others features.
    """
    if isinstance(data, (Panel, Mapping)):
        return data
    name = "the frame" if isinstance(data, pd.DataFrame) else str(data)
    frame = data if isinstance(data, pd.DataFrame) else _read_table(Path(data).expanduser())
    if not isinstance(frame.index, pd.MultiIndex) and {"datetime", "instrument"} <= set(frame.columns):
        frame = frame.assign(datetime=parse_dates(frame["datetime"], name)).set_index(["datetime", "instrument"])
    if frame.columns.nlevels == 1:
        groups = ["label" if str(c).lower().startswith("label") else "feature" for c in frame.columns]
        frame = frame.set_axis(pd.MultiIndex.from_arrays([groups, frame.columns]), axis=1)
    return frame


def _read_table(file: Path) -> pd.DataFrame:
    if not file.exists():
        raise ConfigError(f"--data {str(file)!r} does not exist (looked in {Path.cwd()}).")
    return read_table(file)


def data_source(data: DataInput | None, workflow: Workflow) -> dict[str, str]:
    """Where the data comes from, known before it is read; `given` says what a resumed run has to do for it."""
    if isinstance(data, (str, os.PathLike)):
        return {"source": str(Path(data).expanduser().resolve()), "given": "path"}
    if data is not None:
        return {"source": f"a {type(data).__name__} in memory", "given": "memory"}
    own = workflow.task.dataset.kwargs.handler.kwargs.model_extra or {}
    named = [own[name] for name in SOURCE_ARGUMENTS if own.get(name) is not None]
    return {"source": str(named[0] if named else workflow.qlib_init.provider_uri), "given": "config"}


def data_facts(handler: Handler, data: DataInput | None, workflow: Workflow) -> dict[str, Any]:
    """What the manifest says of the data: source, hash, size, period."""
    panel = source_panel(handler)
    dates = panel.datetimes
    return {
        **data_source(data, workflow),
        "hash": panel.content_hash(),
        "rows": panel.n_live,
        "instruments": len(panel.instruments),
        "first": date_text(dates[0]),
        "last": date_text(dates[-1]),
        "label": str(next(iter(handler.get_cols("label")), "LABEL0")),
    }


def source_panel(handler: Handler) -> Panel:
    prices = getattr(handler, "prices", None)
    if isinstance(prices, Panel):
        return prices
    found: Panel = handler.panel("infer" if getattr(handler, "drop_raw", False) else "raw")
    return found
