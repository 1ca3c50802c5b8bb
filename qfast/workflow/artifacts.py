"""Export the tables of a finished run as the pickles of Qlib's recorder, for scripts that read those."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from qfast.errors import ConfigError
from qfast.files import atomic_write
from qfast.metrics import daily_ic, long_short_return
from qfast.workflow.folder import FINISHED, RunFolder, read_frame
from qfast.workflow.portfolio import FOLDER as PORTFOLIO
from qfast.workflow.saved_model import load_facts, time_steps
from qfast.workflow.validation import register_all

__all__ = ["export_artifacts"]

SEGMENT = "test"  # Qlib's records use no other segment
POSITIONS = "positions_normal_1day"
LEVELS: dict[
    str, tuple[list[str | None], bool]
] = {  # names of the index levels, and whether the first one contains dates
    "report_normal_1day": (["datetime"], True),
    "indicators_normal_1day": ([None], True),
    "port_analysis_1day": ([None, None], False),
    "indicator_analysis_1day": ([None], False),
    POSITIONS: (["datetime", "instrument"], True),
}
SIGNAL_METRICS = (
    *("IC", "ICIR", "Rank IC", "Rank ICIR"),
    *("Long-Short Ann Return", "Long-Short Ann Sharpe", "Long-Avg Ann Return", "Long-Avg Ann Sharpe"),
)


def export_artifacts(run: str | os.PathLike[str], folder: str | os.PathLike[str] | None = None) -> Path:
    """Write the artifacts of Qlib's recorder for a run, with the same names, indices, columns and dtypes.

    The files are `pred.pkl` and `label.pkl` of the segment test, `sig_analysis/ic.pkl` and `ric.pkl`, the tables of
    `portfolio_analysis/`, and `metrics.json` with the recorder's metrics. If the run has long-short returns,
    `sig_analysis/long_short_r.pkl` and `long_avg_r.pkl` are added. `portfolio_analysis/` exists only if the run had a
    backtest.

    Rows have Qlib's order. Qlib's time-series datasets predict by instrument, so the rows of `pred.pkl` are sorted by
    (instrument, datetime) if the run had one, and by (datetime, instrument) otherwise. All other tables are sorted by
    date. The index levels are always (datetime, instrument). `pred.parquet` in the run folder is sorted by date.

    Parameters
    ----------
    run : path
        A finished run folder.
    folder : path, optional
        Default: "artifacts" in the run folder. Existing files are replaced.

    Returns
    -------
    Path
        The folder of the files.

    Raises
    ------
    ConfigError
        `run` is not a finished run, its segment test has no scores, or the folder cannot be created.

    Notes
    -----
    With pyqlib installed, `positions_normal_1day.pkl` maps each Timestamp to a `qlib.backtest.position.Position`.
    Without pyqlib, it maps each Timestamp to that object's `position`, a dict. `indicators_normal_1day_obj.pkl`, Qlib's
    record of single orders, is not written.

    Source: the records of pyqlib 0.9.7, qlib/workflow/record_temp.py.
    """
    source = RunFolder.open(run)
    if source.manifest["status"] != FINISHED:
        raise ConfigError(
            f"run folder {str(run)!r} is {source.manifest['status']}, but only a finished run can be exported."
        )
    scored = read_frame(source.path, "pred")
    score = scored.loc[scored["segment"] == SEGMENT, "score"].astype(np.float32)
    if score.empty:
        raise ConfigError(
            f"run folder {str(run)!r} has no scores of the segment {SEGMENT!r}, which the export contains."
        )
    label = read_frame(source.path, "label")["label"].reindex(score.index).astype(np.float32)
    target = _Target(source / "artifacts" if folder is None else Path(folder))
    register_all()
    rolling = time_steps(load_facts(source)["dataset"]) > 0
    ordered = score.sort_index(level=["instrument", "datetime"]) if rolling else score
    target.write("pred", ordered.to_frame("score"))
    target.write("label", label.to_frame(source.manifest["data"].get("label", "LABEL0")))
    ic, rank_ic = daily_ic(score, label)
    target.write("sig_analysis/ic", ic.rename(None))
    target.write("sig_analysis/ric", rank_ic.rename(None))
    metrics = source.read_json("metrics.json")[SEGMENT]
    exported = {name: metrics[name] for name in SIGNAL_METRICS if name in metrics}
    if SIGNAL_METRICS[-1] in metrics:
        for name, series in zip(("long_short_r", "long_avg_r"), long_short_return(score, label), strict=True):
            target.write(f"sig_analysis/{name}", series.rename(None))
    if (source / PORTFOLIO / "metrics.json").exists():
        exported |= source.read_json(f"{PORTFOLIO}/metrics.json")
        tables = {name: _table(source / PORTFOLIO, name) for name in LEVELS if name != POSITIONS}
        for name, table in tables.items():
            target.write(f"{PORTFOLIO}/{name}", table)
        positions = _table(source / PORTFOLIO, POSITIONS)
        target.write(f"{PORTFOLIO}/{POSITIONS}", _positions(positions, tables["report_normal_1day"]))
    atomic_write(target.path / "metrics.json", lambda file: file.write_text(json.dumps(exported, indent=2) + "\n"))
    return target.path


class _Target:
    def __init__(self, path: Path) -> None:
        self.path = path
        self._create(path)

    def write(self, name: str, value: object) -> None:
        self._create((self.path / name).parent)
        atomic_write(self.path / f"{name}.pkl", lambda file: file.write_bytes(pickle.dumps(value)))

    def _create(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"the folder {str(folder)!r} cannot be created: {error.strerror}.") from None


def _table(folder: Path, name: str) -> pd.DataFrame:
    """Read a table of the run and name its index levels as in Qlib."""
    levels, dated = LEVELS[name]
    file = folder / f"{name}.parquet"
    if file.exists():
        table = pd.read_parquet(file)
    else:
        table = pd.read_csv(
            file.with_suffix(".csv"), index_col=list(range(len(levels))), parse_dates=[0] if dated else False
        )
    return table.set_axis(table.index.set_names(levels))


def _positions(positions: pd.DataFrame, report: pd.DataFrame) -> dict[pd.Timestamp, object]:
    """By day: cash, account value, and for each instrument its amount, price, weight and number of days."""
    days: dict[pd.Timestamp, dict[str, Any]] = {
        day: {"cash": cash, "now_account_value": account}
        for day, cash, account in zip(report.index, report["cash"], report["account"], strict=True)
    }
    for (day, instrument), row in zip(positions.index, positions.to_dict("records"), strict=True):
        days[day][instrument] = row
    if importlib.util.find_spec("qlib") is None:
        return dict(days)
    position = importlib.import_module("qlib.backtest.position").Position
    objects = {}
    for day, content in days.items():
        objects[day] = position(cash=float(report["account"].iloc[0]))
        objects[day].position = content
    return objects
