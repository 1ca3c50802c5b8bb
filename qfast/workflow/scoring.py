"""Scores for new data from a finished run: saved weights, saved processors, nothing fitted again.

`save_scoring` writes what is needed beside the weights: `model.json` (classes, arguments, columns) and
`processors.safetensors` (what the processors learnt). `predict` reads them; no label is needed and no
code is loaded from the files.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import safetensors.numpy

from qfast import registry
from qfast.data.factors import depends_on_the_start
from qfast.data.panel import Panel
from qfast.data.prices import parse_dates
from qfast.data.tables import read_table
from qfast.dates import date_text, normal_date
from qfast.errors import CheckpointError, ConfigError, DataError, some
from qfast.files import atomic_write
from qfast.workflow import folder as folders
from qfast.workflow import pretraining
from qfast.workflow.folder import BEST, RunFolder
from qfast.workflow.history import check_history, short_share
from qfast.workflow.schema import Workflow, register_all

__all__ = ["build_dataset", "data_facts", "data_source", "predict", "save_scoring"]

log = logging.getLogger("qfast")

FORMAT = 1
LATEST = "latest"
DAYS_LOOKED_AT = 20  # the newest ones, to tell what is usual
MODEL = "model.json"
PROCESSORS = "processors.safetensors"
NOT_SCORING = ("device", "progress", "cuda_graphs", "model_path")  # of a model's arguments: all weights are in BEST
STAGES = ("shared", "infer")  # learn processors have no part in scoring
HANDLER_PATH = "task.dataset.kwargs.handler"
# Of the training run only: scoring takes all rows of the new data and fits nothing.
TRAINING_ONLY = (
    "instruments", "start_time", "end_time", "fit_start_time", "fit_end_time", "data", "provider_uri", "source",
    "shared_processors", "infer_processors", "learn_processors", "drop_raw", "filter_pipe", "cache",
)  # fmt: skip


# ---------------------------------------------------------------- data in
def build_dataset(workflow: Workflow, data: Any) -> Any:
    """The dataset of a workflow, over `data` where it is given, else over `qlib_init.provider_uri`."""
    spec = workflow.task.dataset.given()
    handler_spec = spec["kwargs"].pop("handler")
    own = handler_spec.setdefault("kwargs", {})
    if data is not None:
        own.update(_source_arguments(handler_spec, data))
    elif not any(own.get(name) is not None for name in ("data", "provider_uri", "source")):
        own["provider_uri"] = workflow.qlib_init.provider_uri
    handler = registry.HANDLERS.build(handler_spec, path=HANDLER_PATH)
    return registry.DATASETS.build({**spec, "kwargs": {**spec["kwargs"], "handler": handler}}, path="task.dataset")


def _source_arguments(handler_spec: Mapping[str, Any], data: Any) -> dict[str, Any]:
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


def _factor_frame(data: Any) -> Any:
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


def data_source(data: Any, workflow: Workflow) -> dict[str, str]:
    """Where the data comes from, known before it is read; `given` says what a resumed run has to do for it."""
    if isinstance(data, (str, os.PathLike)):
        return {"source": str(Path(data).expanduser().resolve()), "given": "path"}
    if data is not None:
        return {"source": f"a {type(data).__name__} in memory", "given": "memory"}
    own = workflow.task.dataset.kwargs.handler.kwargs.model_extra or {}
    named = [own[name] for name in ("data", "provider_uri", "source") if own.get(name) is not None]
    return {"source": str(named[0] if named else workflow.qlib_init.provider_uri), "given": "config"}


def data_facts(handler: Any, data: Any, workflow: Workflow) -> dict[str, Any]:
    """What the manifest says of the data: source, hash, size, period."""
    panel = _source_panel(handler)
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


def _source_panel(handler: Any) -> Panel:
    prices = getattr(handler, "prices", None)
    if isinstance(prices, Panel):
        return prices
    found: Panel = handler.panel("infer" if getattr(handler, "drop_raw", False) else "raw")
    return found


def _source_columns(handler: Any) -> list[str] | None:
    """Price columns that hold values; a column without any would turn into features without any."""
    prices = getattr(handler, "prices", None)
    if not isinstance(prices, Panel):
        return None
    return [c for c in prices.columns("price") if bool(np.isfinite(prices.column(c, "price")).any())]


def _raw_columns(handler: Any) -> list[str] | None:
    """Feature columns of factors of the user's own, before any processor."""
    if isinstance(getattr(handler, "prices", None), Panel) or getattr(handler, "drop_raw", False):
        return None
    return [str(c) for c in handler.get_cols("feature", "raw")]


# ---------------------------------------------------------------- saving
def save_scoring(run_folder: RunFolder, workflow: Workflow, model: Any, dataset: Any) -> None:
    """Write model.json and processors.safetensors: all that `predict` needs besides the weights."""
    handler = dataset.handler
    arrays: dict[str, np.ndarray] = {}
    stages: dict[str, list[dict[str, Any]]] = {}
    for stage in STAGES:
        stages[stage] = []
        for position, processor in enumerate(getattr(handler, f"{stage}_processors")):
            state = processor.state()
            arrays |= {f"{stage}.{position}.{name}": np.ascontiguousarray(value) for name, value in state.items()}
            stages[stage].append({"class": type(processor).__name__, "kwargs": _constructor_arguments(processor)})
    handler_spec = workflow.task.dataset.kwargs.handler.given()
    kept = {k: v for k, v in handler_spec.get("kwargs", {}).items() if k not in TRAINING_ONLY}
    dataset_spec = workflow.task.dataset.given()
    dataset_kwargs = {k: v for k, v in dataset_spec["kwargs"].items() if k not in ("handler", "segments")}
    parameters = {k: v for k, v in model.get_params().items() if k not in NOT_SCORING}
    facts = {
        "format": FORMAT,
        "model": {**workflow.task.model.given(), "kwargs": parameters},
        "dataset": {**dataset_spec, "kwargs": dataset_kwargs},
        "handler": {**handler_spec, "kwargs": kept},
        "processors": stages,
        "columns": list(handler.get_cols("feature", "infer")),
        "raw_columns": _raw_columns(handler),
        "source_columns": _source_columns(handler),
        "short_history": short_share(dataset),
        "start": _start_that_counts(handler),
    }
    # A file without any array is not readable everywhere, hence the marker.
    arrays["format"] = np.array([FORMAT], dtype=np.int64)
    atomic_write(run_folder / PROCESSORS, lambda file: safetensors.numpy.save_file(arrays, file))
    run_folder.write_json(MODEL, facts)


def _start_that_counts(handler: Any) -> str | None:
    """The first day of training, if features look back without end, as EMA does; else None."""
    if not any(depends_on_the_start(text) for text in getattr(handler, "feature_expressions", [])):
        return None
    return date_text(_first_day(handler))


def _first_day(handler: Any) -> pd.Timestamp:
    panel = handler.panel("infer")
    return panel.datetimes[int(panel.date_codes.min())]


def _constructor_arguments(processor: Any) -> dict[str, Any]:
    """Constructors of processors only store, so their arguments stand as attributes."""
    out = {}
    for name in registry.parameters(type(processor)):
        value = getattr(processor, name)
        out[name] = list(value) if isinstance(value, tuple) else value
    return out


# ---------------------------------------------------------------- scoring
def predict(
    run_path: str | os.PathLike[str],
    data: Any,
    *,
    start: Any = None,
    end: Any = None,
    date: Any = None,
    device: str = "auto",
) -> pd.Series:
    """Scores of a run's best weights for new data.

    Parameters
    ----------
    run_path : path
        A run folder; an interrupted one gives the best weights so far.
    data : path, DataFrame or Panel
        Prices (or factors, if the model was trained on factors of the user's own) as for `run`. They
        must reach far enough back for the features: 60 trading days for Alpha360.
    start, end : date-like, optional
        Score only these dates, both inclusive. Rows before `start` still serve as history.
    date : date-like or "latest", optional
        Score this date only, instead of `start` and `end`; "latest" is the newest one on which the data holds values.
    device : str
        "auto", "cpu", "cuda", "cuda:1".

    Returns
    -------
    Series
        float32 "score", sorted by (datetime, instrument). The newest date is included. `attrs["notes"]` lists
        what was warned about: dates whose features look back beyond the data.

    Raises
    ------
    ConfigError
        `run_path` is no run folder; both `date` and `start` or `end`.
    CheckpointError
        A file of the run is missing, truncated or does not fit.
    DataError
        Columns that differ from training; no row between `start` and `end`; not one row with the history
        that the features need.

    Examples
    --------
    >>> predict("no/such/run", None)
    Traceback (most recent call last):
    ...
    qfast.errors.ConfigError: run folder 'no/such/run' does not exist.
    """
    latest = isinstance(date, str) and date == LATEST
    if date is not None and (start is not None or end is not None):
        raise ConfigError(f"--date {date} is one date; leave --start and --end out, or the date.")
    if date is not None and not latest:
        start = end = _bound("date", date)
    bounds = [_bound("start", start), _bound("end", end)]
    run_folder = RunFolder.open(run_path)
    if run_folder.manifest["status"] != folders.FINISHED:
        log.warning("run %s is %s; scoring with its best weights so far", run_path, run_folder.manifest["status"])
    register_all()
    facts = run_folder.read_json(MODEL)
    if facts.get("format") != FORMAT:
        raise CheckpointError(f"{run_folder / MODEL} has format {facts.get('format')!r}; this version reads {FORMAT}.")
    model = _load_model(run_folder, facts, device)
    dataset_spec = facts["dataset"]
    # A flat sample is one row, so rows before `start` are not needed; a rolling window reaches back.
    flat = "step_len" not in registry.parameters(registry.DATASETS.resolve(dataset_spec["class"])[0])
    handler = _scoring_handler(run_folder, facts, data, bounds if flat else [None, None])
    notes = []
    if latest:
        day, said = _newest_day(handler)
        bounds = [day.isoformat()] * 2
        notes += said
    dataset_kwargs = {**dataset_spec["kwargs"], "handler": handler, "segments": {"new": bounds}}
    dataset = registry.DATASETS.build({**dataset_spec, "kwargs": dataset_kwargs}, path="dataset")
    note = check_history(dataset, bounds[0], bounds[1], facts.get("short_history", 0.0))
    notes += [] if note is None else [note]
    if facts.get("start") is not None and _first_day(handler) > pd.Timestamp(facts["start"]):
        notes.append(
            f"the data begins on {date_text(_first_day(handler))}, training on {facts['start']}: features that look "
            "back without end (EMA, windows of 0 rows) are others than in training"
        )
    for note in notes:
        log.warning("%s", note)
    scores = model.predict(dataset, "new")
    if scores.empty:
        dates = handler.panel("infer").datetimes
        raise DataError(
            f"no row lies between start={bounds[0]} and end={bounds[1]}; the data has {date_text(dates[0])} to "
            f"{date_text(dates[-1])}."
        )
    scores = scores.rename("score").sort_index()
    scores.attrs["notes"] = notes
    return scores


def _newest_day(handler: Any) -> tuple[pd.Timestamp, list[str]]:
    """The newest day on which anything is known, and what has to be said of it."""
    panel = _source_panel(handler)
    rows = panel.live_rows()
    rows = rows[panel.date_codes[rows] > panel.date_codes[rows].max() - DAYS_LOOKED_AT]
    if "price" in panel.blocks and "close" in panel.columns("price"):
        known = np.isfinite(panel.column("close")[rows])
    else:
        known = np.isfinite(panel.values(next(iter(panel.blocks)))[rows]).any(axis=1)
    counts = np.bincount(panel.date_codes[rows[known]], minlength=len(panel.datetimes))
    last = int(panel.date_codes[rows].max())
    day = int(np.flatnonzero(counts)[-1]) if known.any() else last
    said = []
    if day < last:
        said.append(
            f"{date_text(panel.datetimes[last])}, the newest day of the data, holds no value; "
            f"{date_text(panel.datetimes[day])} is scored"
        )
    usual = float(np.median(counts[:day][counts[:day] > 0])) if counts[:day].any() else 0.0
    if counts[day] < usual / 2:
        said.append(
            f"on {date_text(panel.datetimes[day])} only {counts[day]} instruments have values, {usual:.0f} on the days "
            "before: is the day complete?"
        )
    return panel.datetimes[day], said


def _bound(name: str, value: Any) -> str | None:
    try:
        return normal_date(value)
    except ValueError as error:
        raise ConfigError(f"--{name}: {error}.") from None


def _load_model(run_folder: RunFolder, facts: Mapping[str, Any], device: str) -> Any:
    spec = facts["model"]
    kwargs = {**spec["kwargs"], "device": device, "progress": False}
    model = registry.MODELS.build({**spec, "kwargs": kwargs}, path="model.json")
    return model.load_weights(run_folder / BEST)


def _scoring_handler(run_folder: RunFolder, facts: Mapping[str, Any], data: Any, bounds: Sequence[Any]) -> Any:
    stages = _load_processors(run_folder, facts["processors"])
    spec = facts["handler"]
    own = {**spec["kwargs"], **_source_arguments(spec, data)}
    if "source" in own:
        own["source"] = _feature_panel(own["source"], facts.get("raw_columns"))
    factory, _ = registry.HANDLERS.resolve({k: v for k, v in spec.items() if k != "kwargs"})
    taken = registry.parameters(factory)
    own |= {f"{stage}_processors": built for stage, built in stages.items() if f"{stage}_processors" in taken}
    own["learn_processors"] = []
    if "data" in own:  # features are computed for these dates only, from prices that reach further back
        own["start_time"], own["end_time"] = bounds
        if facts.get("start") is not None:  # or from where they were in training, which features such as EMA know of
            own["start_time"] = facts["start"]
    if "instruments" in taken:
        own["instruments"] = "all" if "data" in own else None
    handler = registry.HANDLERS.build({**spec, "kwargs": own}, path="model.json")
    _require_columns(facts["columns"], list(handler.get_cols("feature", "infer")), "feature column")
    if facts.get("source_columns") is not None:
        _require_columns(facts["source_columns"], _source_columns(handler) or [], "price column", extra_allowed=True)
    return handler


def _feature_panel(source: Any, columns: Sequence[str] | None) -> Any:
    """The factors in the order of training; their labels, if any, are left alone."""
    panel = source if isinstance(source, Panel) else Panel.from_frame(source)
    if "feature" not in panel.blocks:
        raise DataError(f"the data has no column group 'feature', only {sorted(panel.blocks)}.")
    given = panel.columns("feature")
    if columns is None or list(columns) == list(given):
        return panel
    _require_columns(columns, given, "feature column")
    order = [given.index(name) for name in columns]
    return panel.replace("feature", np.ascontiguousarray(panel.values("feature")[:, order]), columns)


def _require_columns(trained: Sequence[str], given: Sequence[str], what: str, extra_allowed: bool = False) -> None:
    missing = [c for c in trained if c not in given]
    extra = [] if extra_allowed else [c for c in given if c not in trained]
    if missing or extra:
        raise DataError(
            f"the data differs from what the model was trained on: {what}s missing (or empty) {_listed(missing)}, "
            f"not known {_listed(extra)}. Remedy: give the same {what}s as in training."
        )


def _listed(names: Sequence[str]) -> str:
    return f"[{some([repr(name) for name in names], most=6)}]" if names else "none"


def _load_processors(run_folder: RunFolder, stages: Mapping[str, Any]) -> dict[str, list[Any]]:
    file = run_folder / PROCESSORS
    if not file.is_file():
        raise CheckpointError(f"{str(file)!r} is missing; without it new data cannot be prepared as in training.")
    try:
        arrays = safetensors.numpy.load_file(file)
    except Exception as error:  # the reader raises its own kinds for a damaged file
        raise CheckpointError(f"{str(file)!r} is not readable, it may be truncated ({error}).") from None
    built: dict[str, list[Any]] = {}
    for stage, specs in stages.items():
        built[stage] = []
        for position, spec in enumerate(specs):
            processor = registry.PROCESSORS.build(spec, path=f"{MODEL}: processors.{stage}.{position}")
            prefix = f"{stage}.{position}."
            state = {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
            try:
                processor.load_state(state)
            except DataError as error:
                raise CheckpointError(f"{str(file)!r} does not fit {MODEL}: {error}") from None
            built[stage].append(processor)
    return built


def scoring_summary(run_path: str | os.PathLike[str]) -> dict[str, Any]:
    """What `qfast info` prints: status, data, model, metrics of a run."""
    run_folder = RunFolder.open(run_path)
    out = {
        k: run_folder.manifest.get(k) for k in ("experiment", "status", "error", "started", "ended", "device", "seed")
    }
    out["data"] = run_folder.manifest.get("data", {})
    if out["status"] != folders.FINISHED and "stage" in run_folder.manifest:
        out["status"] = f"{out['status']} ({run_folder.manifest['stage']})"
    out["pretraining"] = pretraining.facts(run_folder.manifest)
    out["hint"] = run_folder.resume_hint()
    out["notes"] = run_folder.manifest.get("notes", [])
    metrics = run_folder / "metrics.json"
    out["metrics"] = json.loads(metrics.read_text(encoding="utf-8")) if metrics.exists() else {}
    return out
