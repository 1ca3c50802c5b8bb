"""Score new data with a finished run: saved weights and fitted processors; nothing is fitted again."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from qfast import registry
from qfast._renamed import renamed_names
from qfast.data.panel import Panel
from qfast.data.protocols import Handler, HandlerDataset
from qfast.dates import DateLike, date_text, normal_date
from qfast.errors import ConfigError, DataError, some
from qfast.read_options import ReadOptions, ReadSettings
from qfast.workflow.dataset import DataInput, source_arguments, source_panel, stored_read_options
from qfast.workflow.folder import FINISHED, RunFolder
from qfast.workflow.lookback import check_lookback
from qfast.workflow.saved_model import first_day, load_facts, load_model, load_processors, source_columns
from qfast.workflow.user_code import AllowCode, allowed_code, require_permission
from qfast.workflow.validation import register_all

__all__ = ["predict"]

__getattr__ = renamed_names(
    __name__,
    {
        "build_dataset": "qfast.workflow.dataset.build_dataset",
        "data_facts": "qfast.workflow.dataset.data_facts",
        "data_source": "qfast.workflow.dataset.data_source",
        "save_scoring": "qfast.workflow.saved_model.save_scoring",
        "scoring_summary": "qfast.workflow.info.run_info",
    },
)

log = logging.getLogger("qfast")

TextBounds = tuple[str | None, str | None]
"""First and last date as ISO text; None: unbounded."""

LATEST = "latest"
RECENT_DAYS = 20  # of the data, which tell how many instruments a day usually has


def predict(
    run_path: str | os.PathLike[str],
    data: DataInput,
    *,
    start: DateLike | None = None,
    end: DateLike | None = None,
    date: DateLike | None = None,
    device: str = "auto",
    allow_code: AllowCode = None,
    read_options: ReadSettings = None,
) -> pd.Series:
    """Score new data with the best weights of a run.

    Parameters
    ----------
    run_path : path
        A run folder. An interrupted run scores with its best weights so far.
    data : path, DataFrame or Panel
        Prices, or factors if the model was trained on factors, as for `run`. Labels are not needed. The data must begin
        early enough for the features: 60 trading days before the first date to score for Alpha360.
    start, end : date-like, optional
        First and last date to score, both inclusive. Features still use earlier rows.
    date : date-like or "latest", optional
        The only date to score, instead of `start` and `end`. "latest" is the last date for which the data has values.
    device : str
        "auto", "cpu", "cuda", "cuda:1".
    allow_code : path or sequence of paths, optional
        Permits the classes of a run that `qfast.run` has trained with `allow_code`.
    read_options : ReadOptions or mapping, optional
        How to read tables, see `qfast.data.ReadOptions`. Default for each option: its value in the run.

    Returns
    -------
    Series
        float32, name "score", sorted by (datetime, instrument). Includes the last date of the data, which has no label
        yet. `attrs["notes"]` lists the warnings, for example about dates whose features look back beyond the data.

    Raises
    ------
    ConfigError
        `run_path` is not a run folder, `date` is combined with `start` or `end`, or the run uses classes that require
        `allow_code`.
    CheckpointError
        A file of the run is missing, truncated or inconsistent.
    DataError
        The columns differ from those in training, no row is between `start` and `end`, or no row has as many days as
        the features need.

    Examples
    --------
    >>> predict("no/such/run", None)
    Traceback (most recent call last):
    ...
    qfast.errors.ConfigError: run folder 'no/such/run' does not exist.
    """
    latest = isinstance(date, str) and date == LATEST
    bounds = _bounds(start, end, None if latest else date)
    if latest and bounds != (None, None):
        raise ConfigError(f"--date latest cannot be combined with --start {start} and --end {end}.")
    run_folder = RunFolder.open(run_path)
    with allowed_code(allow_code) as code:
        require_permission(run_folder.manifest, code, run_path)
        return _predict(run_folder, data, bounds, latest, device, ReadOptions.of(read_options))


def _predict(
    run_folder: RunFolder, data: DataInput, bounds: TextBounds, latest: bool, device: str, read_options: ReadOptions
) -> pd.Series:
    run_path = run_folder.path
    if run_folder.manifest["status"] != FINISHED:
        log.warning("run %s is %s; scoring with its best weights so far", run_path, run_folder.manifest["status"])
    register_all()
    facts = load_facts(run_folder)
    model = load_model(run_folder, facts, device)
    read_options = read_options.over(stored_read_options(run_folder.manifest))
    handler = _build_handler(run_folder, facts, data, bounds, read_options)
    notes: list[str] = []
    if latest:
        day, notes = _latest_day(handler)
        bounds = (day.isoformat(), day.isoformat())
    dataset = _build_dataset(facts, handler, bounds)
    notes += _notes_on_earlier_days(facts, dataset, bounds)
    for note in notes:
        log.warning("%s", note)
    scores = model.predict(dataset, "new")
    if scores.empty:
        dates = handler.panel("infer").datetimes
        raise DataError(
            f"no row is between start={bounds[0]} and end={bounds[1]}; the data is from {date_text(dates[0])} to "
            f"{date_text(dates[-1])}."
        )
    scores = scores.rename("score").sort_index()
    scores.attrs["notes"] = notes
    return scores


# ---------------------------------------------------------------- dates


def _bounds(start: DateLike | None, end: DateLike | None, date: DateLike | None) -> TextBounds:
    if date is None:
        return _date("start", start), _date("end", end)
    if start is not None or end is not None:
        raise ConfigError(f"--date {date} cannot be combined with --start {start} and --end {end}.")
    return _date("date", date), _date("date", date)


def _date(name: str, value: DateLike | None) -> str | None:
    try:
        return normal_date(value)
    except ValueError as error:
        raise ConfigError(f"--{name}: {error}.") from None


def _latest_day(handler: Handler) -> tuple[pd.Timestamp, list[str]]:
    """The last day on which the source has values, and notes if it is incomplete or not the last day of the data."""
    panel = source_panel(handler)
    rows = panel.live_rows()
    rows = rows[panel.date_codes[rows] > panel.date_codes[rows].max() - RECENT_DAYS]
    if "price" in panel.blocks and "close" in panel.columns("price"):
        has_value = np.isfinite(panel.column("close")[rows])
    else:
        has_value = np.isfinite(panel.values(next(iter(panel.blocks)))[rows]).any(axis=1)
    counts = np.bincount(panel.date_codes[rows[has_value]], minlength=len(panel.datetimes))
    last = int(panel.date_codes[rows].max())
    day = int(np.flatnonzero(counts)[-1]) if has_value.any() else last
    notes = []
    if day < last:
        notes.append(
            f"the last day of the data, {date_text(panel.datetimes[last])}, has no values; scoring "
            f"{date_text(panel.datetimes[day])} instead"
        )
    usual = float(np.median(counts[:day][counts[:day] > 0])) if counts[:day].any() else 0.0
    if counts[day] < usual / 2:
        notes.append(
            f"only {counts[day]} instruments have values on {date_text(panel.datetimes[day])}, compared with "
            f"{usual:.0f} on the days before; the day may be incomplete"
        )
    return panel.datetimes[day], notes


def _notes_on_earlier_days(facts: Mapping[str, Any], dataset: HandlerDataset, bounds: TextBounds) -> list[str]:
    notes = []
    lookback_note = check_lookback(dataset, *bounds, facts.get("short_history", 0.0))
    if lookback_note is not None:
        notes.append(lookback_note)
    if facts.get("start") is not None and (first := first_day(dataset.handler)) > pd.Timestamp(facts["start"]):
        notes.append(
            f"the data begins on {date_text(first)}, the training data on {facts['start']}: features that depend on "
            "the first day (EMA, windows over all earlier rows) differ from training"
        )
    return notes


# ---------------------------------------------------------------- the dataset
def _build_dataset(facts: Mapping[str, Any], handler: Handler, bounds: TextBounds) -> HandlerDataset:
    spec = facts["dataset"]
    kwargs = {**spec["kwargs"], "handler": handler, "segments": {"new": list(bounds)}}
    dataset: HandlerDataset = registry.DATASETS.build({**spec, "kwargs": kwargs}, path="dataset")
    return dataset


def _build_handler(
    run_folder: RunFolder, facts: Mapping[str, Any], data: DataInput, bounds: TextBounds, options: ReadOptions
) -> Handler:
    """Build the handler of the run over new data, with the fitted processors."""
    stages = load_processors(run_folder, facts["processors"])
    spec = facts["handler"]
    arguments = {**spec["kwargs"], **source_arguments(spec, data, options)}
    if "source" in arguments:
        arguments["source"] = _feature_panel(arguments["source"], facts.get("raw_columns"))
    factory, _ = registry.HANDLERS.resolve({k: v for k, v in spec.items() if k != "kwargs"})
    accepted = registry.all_parameters(factory)
    arguments |= {f"{stage}_processors": built for stage, built in stages.items() if f"{stage}_processors" in accepted}
    arguments["learn_processors"] = []
    if "data" in arguments:  # computes features for these dates only, from prices that begin earlier
        # A flat sample is one row, so earlier rows are not needed. A rolling window contains earlier rows.
        rolling = "step_len" in registry.parameters(registry.DATASETS.resolve(facts["dataset"]["class"])[0])
        arguments["start_time"], arguments["end_time"] = (None, None) if rolling else bounds
        if facts.get("start") is not None:  # features such as EMA must begin on the same day as in training
            arguments["start_time"] = facts["start"]
    if "instruments" in accepted:
        arguments["instruments"] = "all" if "data" in arguments else None
    handler: Handler = registry.HANDLERS.build({**spec, "kwargs": arguments}, path="model.json")
    _require_columns(facts["columns"], handler.get_cols("feature", "infer"), "feature column")
    if facts.get("source_columns") is not None:
        _require_columns(facts["source_columns"], source_columns(handler) or [], "price column", extra_allowed=True)
    return handler


def _feature_panel(source: Panel | pd.DataFrame, columns: Sequence[str] | None) -> Panel:
    """The factors in the column order of training. Labels are unused and may be present."""
    panel = source if isinstance(source, Panel) else Panel.from_frame(source)
    if "feature" not in panel.blocks:
        raise DataError(f"the data has no column group 'feature', only {sorted(panel.blocks)}.")
    present = panel.columns("feature")
    if columns is None or list(columns) == list(present):
        return panel
    _require_columns(columns, present, "feature column")
    order = [present.index(name) for name in columns]
    return panel.replace("feature", np.ascontiguousarray(panel.values("feature")[:, order]), columns)


def _require_columns(trained: Sequence[str], present: Sequence[str], what: str, extra_allowed: bool = False) -> None:
    missing = [name for name in trained if name not in present]
    extra = [] if extra_allowed else [name for name in present if name not in trained]
    if missing or extra:
        raise DataError(
            f"the data differs from the training data: {what}s missing (or empty) {_listed(missing)}, unexpected "
            f"{_listed(extra)}. Remedy: pass the {what}s of training."
        )


def _listed(names: Sequence[str]) -> str:
    return f"[{some([repr(name) for name in names], most=6)}]" if names else "none"
