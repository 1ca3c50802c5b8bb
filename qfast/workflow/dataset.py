"""Where the data of a workflow comes from: its dataset, and the entry of the manifest about its source."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import pandas as pd

from qfast import registry
from qfast.data.arrow_tables import ArrowTable, to_pandas, without_arrow
from qfast.data.loaders import grouped_columns
from qfast.data.panel import Panel
from qfast.data.panel_folder import is_panel_folder
from qfast.data.protocols import Handler, HandlerDataset
from qfast.data.tables import keyed_frame, read_table
from qfast.dates import date_text
from qfast.errors import ConfigError, some
from qfast.read_options import ReadOptions, command_line
from qfast.workflow.folder import CONFIG, RunFolder
from qfast.workflow.schema import Workflow

__all__ = [
    "DataInput",
    "absolute_sources",
    "build_dataset",
    "data_facts",
    "data_source",
    "dataset_over",
    "recorded_source",
    "source_arguments",
    "source_panel",
    "stored_read_options",
    "workflow_handler",
]


DataInput: TypeAlias = "str | os.PathLike[str] | pd.DataFrame | Panel | Mapping[str, pd.DataFrame] | ArrowTable"
"""Prices or factors: a path, a frame, a panel, frames by column group, or a table of Polars, Arrow or DuckDB."""

SOURCE_ARGUMENTS = ("data", "provider_uri", "source")  # handler arguments that specify where the data comes from
DATA_REMEDY = "--data PATH with a CSV or Parquet file, a folder of such files, or a Qlib data folder"
DEFAULTS = ReadOptions()
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
    if uri is None and handler_arguments.get("data_loader") is not None:
        return  # a loader of stored columns needs no prices
    if uri is None:
        raise ConfigError(f"qlib_init.provider_uri is missing, so there is no data. Remedy: {DATA_REMEDY}.")
    for folder in uri.values() if isinstance(uri, Mapping) else [uri]:
        if not Path(folder).expanduser().is_dir():
            raise ConfigError(
                f"qlib_init.provider_uri: the Qlib data folder {folder!r} does not exist. Remedy: {DATA_REMEDY}."
            )


def absolute_sources(
    workflow: Workflow, directory: str | os.PathLike[str], other: str | os.PathLike[str] | None = None
) -> None:
    """Make relative paths of data in a workflow absolute, in place, so they do not depend on the working directory.

    Parameters
    ----------
    workflow : Workflow
        `qlib_init.provider_uri`, the handler arguments `data` and `provider_uri`, and the files of StaticDataLoaders
        are changed.
    directory : path
        The directory that the paths are relative to.
    other : path, optional
        Directory of paths that do not exist in `directory`.
    """

    def absolute(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {freq: absolute(path) for freq, path in value.items()}
        if not isinstance(value, str) or not value or value.startswith("~"):
            return value
        path = Path(directory, value.strip())
        if other is not None and not path.exists() and Path(other, value.strip()).exists():
            path = Path(other, value.strip())
        return str(path.resolve())

    def in_loaders(spec: Any) -> Any:
        """The description of a data loader, with absolute paths of StaticDataLoaders in it."""
        if isinstance(spec, list):
            return [in_loaders(item) for item in spec]
        if not isinstance(spec, Mapping):
            return spec
        changed = {key: in_loaders(value) for key, value in spec.items()}
        kwargs = changed.get("kwargs")
        if str(spec.get("class")).rpartition(".")[2] == "StaticDataLoader" and isinstance(kwargs, Mapping):
            changed["kwargs"] = {**kwargs, "config": absolute(kwargs.get("config"))}
        return changed

    init = workflow.qlib_init
    if init.provider_uri is not None:
        init.provider_uri = absolute(init.provider_uri)
    arguments = workflow.task.dataset.kwargs.handler.kwargs.model_extra or {}
    for name in ("data", "provider_uri"):
        if name in arguments:
            arguments[name] = absolute(arguments[name])
    if "data_loader" in arguments:
        arguments["data_loader"] = in_loaders(arguments["data_loader"])


def build_dataset(workflow: Workflow, data: DataInput | None, read_options: ReadOptions = DEFAULTS) -> HandlerDataset:
    """Build the dataset of a workflow.

    Parameters
    ----------
    workflow : Workflow
    data : path, DataFrame, Panel or mapping of frames, optional
        Default: the source that the handler's arguments specify, or else `qlib_init.provider_uri`.
    read_options : ReadOptions
        How to read a table; they replace the options in the handler's arguments.

    Raises
    ------
    ConfigError
        `data`, but the handler's class does not accept data.
    DataError
        The data cannot be read or is unsuitable for the handler.
    """
    return dataset_over(workflow, workflow_handler(workflow, data, read_options))


def workflow_handler(workflow: Workflow, data: DataInput | None, read_options: ReadOptions = DEFAULTS) -> Handler:
    """Build the handler of a workflow, which reads and processes the data; arguments and errors as in `build_dataset`.

    The result depends on the handler's description and on `qlib_init`, but on no other part of the workflow.
    """
    handler_spec = workflow.task.dataset.description()["kwargs"]["handler"]
    arguments = handler_spec.setdefault("kwargs", {})
    if data is not None:
        arguments.update(source_arguments(handler_spec, data, read_options))
    elif not any(arguments.get(name) is not None for name in SOURCE_ARGUMENTS):
        arguments["provider_uri"] = workflow.qlib_init.provider_uri
    if data is None and read_options.recorded():
        arguments.update(_option_arguments(handler_spec, read_options))
    handler: Handler = registry.HANDLERS.build(handler_spec, path=HANDLER_PATH)
    return handler


def dataset_over(workflow: Workflow, handler: Handler) -> HandlerDataset:
    """The dataset of a workflow over a handler that `workflow_handler` has built."""
    spec = workflow.task.dataset.description()
    kwargs = {**spec["kwargs"], "handler": handler}
    dataset: HandlerDataset = registry.DATASETS.build({**spec, "kwargs": kwargs}, path="task.dataset")
    return dataset


def source_arguments(
    handler_spec: Mapping[str, Any], data: DataInput, read_options: ReadOptions = DEFAULTS
) -> dict[str, Any]:
    """Arguments that pass `data` and the options for reading it to the class of a handler.

    Raises
    ------
    ConfigError
        The class does not accept data.
    """
    factory, accepted = _handler_class(handler_spec)
    name = source_argument(handler_spec)
    if name == "data":
        prices = without_arrow(data)  # a handler may read its prices several times
        arguments = {"data": prices, "provider_uri": None} if "provider_uri" in accepted else {"data": prices}
        return arguments | (_option_arguments(handler_spec, read_options) if read_options.recorded() else {})
    if name == "source":
        return {"source": _factor_frame(data, read_options)}
    title = getattr(factory, "__name__", factory)
    raise ConfigError(
        f"{HANDLER_PATH}: {title} does not accept --data. Remedy: use Alpha158, Alpha360 or DataHandlerLP."
    )


def source_argument(handler_spec: Mapping[str, Any]) -> str | None:
    """The argument through which a handler accepts data: "data" for prices, "source" for columns, or None.

    A DataHandlerLP with a data_loader, and a class of the user that passes one on, computes its columns from prices.
    """
    factory, accepted = _handler_class(handler_spec)
    has_loader = (handler_spec.get("kwargs") or {}).get("data_loader") is not None
    if "source" in registry.parameters(factory) and not has_loader:
        return "source"
    return next((name for name in ("data", "source") if name in accepted), None)


def _option_arguments(handler_spec: Mapping[str, Any], read_options: ReadOptions) -> dict[str, Any]:
    factory, accepted = _handler_class(handler_spec)
    if "read_options" not in accepted:
        names = [command_line(name) for name in read_options.recorded()]
        raise ConfigError(f"{HANDLER_PATH}: {getattr(factory, '__name__', factory)} does not accept {some(names)}.")
    own = ReadOptions.of(handler_spec.get("kwargs", {}).get("read_options"))
    return {"read_options": read_options.over(own)}


def _handler_class(handler_spec: Mapping[str, Any]) -> tuple[Callable[..., Any], Mapping[str, inspect.Parameter]]:
    bare = {key: handler_spec[key] for key in ("class", "module_path") if key in handler_spec}
    factory, _ = registry.HANDLERS.resolve(bare, HANDLER_PATH)
    return factory, registry.all_parameters(factory)


def recorded_source(folder: RunFolder) -> str | dict[str, str]:
    """The data that a run was trained on: a path, or {freq: folder} of a Qlib store.

    Raises
    ------
    ConfigError
        It was in memory, or is no longer where it was.
    """
    facts = folder.manifest.get("data", {})
    remedy = f"Remedy: {DATA_REMEDY}."
    if "source" not in facts or facts.get("given") == "memory":
        described = facts.get("source", "data that the manifest does not describe")
        raise ConfigError(f"the run in {str(folder.path)!r} was trained on {described}, which is not stored. {remedy}")
    source: Any = facts["source"]
    if facts.get("given") == "config" and source.startswith("{"):  # the manifest contains only its text
        from qfast.workflow.config import load_config

        source = load_config(folder / CONFIG).values["qlib_init"]["provider_uri"]
    directory = Path(folder.manifest.get("directory", Path.cwd()))
    paths = source.values() if isinstance(source, Mapping) else [source]
    for path in paths:
        if not (directory / Path(path).expanduser()).exists():
            raise ConfigError(
                f"the data of the run in {str(folder.path)!r}, {path!r}, no longer exists or has moved. {remedy}"
            )
    if isinstance(source, Mapping):
        return {freq: str(directory / Path(path).expanduser()) for freq, path in source.items()}
    return str(directory / Path(source).expanduser())


def stored_read_options(manifest: Mapping[str, Any]) -> ReadOptions:
    """The options with which the data of a run was read, as recorded in its manifest."""
    return ReadOptions.of(manifest.get("data", {}).get("read_options"))


def _factor_frame(data: DataInput, read_options: ReadOptions) -> pd.DataFrame | Panel | Mapping[str, pd.DataFrame]:
    """Features and labels from a Panel, from frames, or from a Parquet or CSV file.

    Two-level columns are (group, name). Single-level columns whose names begin with "label" are labels, and the others
    are features.
    """
    if isinstance(data, (Panel, Mapping)):
        return data
    if isinstance(data, (str, os.PathLike)):
        if is_panel_folder(data):
            return Panel.open(data)
        name, frame = str(data), _read_table(Path(data).expanduser(), read_options)
    else:
        name, frame = "the frame", data if isinstance(data, pd.DataFrame) else to_pandas(data)
    return grouped_columns(keyed_frame(frame, name, read_options))


def _read_table(file: Path, read_options: ReadOptions) -> pd.DataFrame:
    if not file.exists():
        raise ConfigError(f"--data {str(file)!r} does not exist (looked in {Path.cwd()}).")
    return read_table(file, read_options)


def data_source(data: DataInput | None, workflow: Workflow, read_options: ReadOptions = DEFAULTS) -> dict[str, Any]:
    """The source of the data, for the manifest; it is known before the data is read.

    Returns
    -------
    dict
        "source": a path or a description. "given": "path", "memory" (a resumed run must receive the data again) or
        "config" (the workflow file specifies the source). "read_options": those of the command, if there are any.
    """
    options = read_options.recorded()
    return _location(data, workflow) | ({"read_options": options} if options else {})


def _location(data: DataInput | None, workflow: Workflow) -> dict[str, str]:
    if isinstance(data, (str, os.PathLike)):
        return {"source": str(Path(data).expanduser().resolve()), "given": "path"}
    if data is not None:
        return {"source": f"a {type(data).__name__} in memory", "given": "memory"}
    arguments = workflow.task.dataset.kwargs.handler.kwargs.model_extra or {}
    sources = [arguments[name] for name in SOURCE_ARGUMENTS if arguments.get(name) is not None]
    return {"source": str(sources[0] if sources else workflow.qlib_init.provider_uri), "given": "config"}


def data_facts(
    handler: Handler, data: DataInput | None, workflow: Workflow, read_options: ReadOptions = DEFAULTS
) -> dict[str, Any]:
    """The entry of the manifest about the data: source, content hash, size, period, name of the label."""
    panel = source_panel(handler)
    dates = panel.datetimes
    return {
        **data_source(data, workflow, read_options),
        "hash": panel.content_hash(),
        "rows": panel.n_live,
        "instruments": len(panel.instruments),
        "first": date_text(dates[0]),
        "last": date_text(dates[-1]),
        "label": str(next(iter(handler.get_cols("label")), "LABEL0")),
    }


def source_panel(handler: Handler) -> Panel:
    """The prices of a handler, or else its factors before processing, if it has not discarded them."""
    prices = getattr(handler, "prices", None)
    if isinstance(prices, Panel):
        return prices
    return handler.panel("infer" if getattr(handler, "drop_raw", False) else "raw")
