"""Scores for new data from a finished run: saved weights, saved processors, nothing fitted again, no label needed."""

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
from qfast.dates import date_text, normal_date
from qfast.errors import CheckpointError, ConfigError, DataError, some
from qfast.workflow import folder as folders
from qfast.workflow.dataset import source_arguments, source_panel
from qfast.workflow.folder import RunFolder
from qfast.workflow.lookback import check_lookback
from qfast.workflow.saved_model import FORMAT, MODEL, first_day, load_model, load_processors, source_columns
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
LATEST = "latest"
DAYS_LOOKED_AT = 20  # the newest ones, to tell what is usual


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
    model = load_model(run_folder, facts, device)
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
    note = check_lookback(dataset, bounds[0], bounds[1], facts.get("short_history", 0.0))
    notes += [] if note is None else [note]
    if facts.get("start") is not None and first_day(handler) > pd.Timestamp(facts["start"]):
        notes.append(
            f"the data begins on {date_text(first_day(handler))}, training on {facts['start']}: features that look "
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
    panel = source_panel(handler)
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


def _scoring_handler(run_folder: RunFolder, facts: Mapping[str, Any], data: Any, bounds: Sequence[Any]) -> Any:
    stages = load_processors(run_folder, facts["processors"])
    spec = facts["handler"]
    own = {**spec["kwargs"], **source_arguments(spec, data)}
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
        _require_columns(facts["source_columns"], source_columns(handler) or [], "price column", extra_allowed=True)
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
