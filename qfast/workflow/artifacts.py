"""The tables of a finished run as the pickles that Qlib's recorder keeps, for scripts that read those."""

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

__all__ = ["export_artifacts"]

SEGMENT = "test"  # the reference's records look at no other
POSITIONS = "positions_normal_1day"
LEVELS: dict[str, tuple[list[str | None], bool]] = {  # names of the index, and whether it begins with dates
    "report_normal_1day": (["datetime"], True),
    "indicators_normal_1day": ([None], True),
    "port_analysis_1day": ([None, None], False),
    "indicator_analysis_1day": ([None], False),
    POSITIONS: (["datetime", "instrument"], True),
}
SIGNAL_METRICS = (
    "IC", "ICIR", "Rank IC", "Rank ICIR",
    "Long-Short Ann Return", "Long-Short Ann Sharpe", "Long-Avg Ann Return", "Long-Avg Ann Sharpe",
)  # fmt: skip


def export_artifacts(run: str | os.PathLike[str], folder: str | os.PathLike[str] | None = None) -> Path:
    """Write what Qlib's recorder would hold of a run: the same names, indices, columns and dtypes.

    `pred.pkl` and `label.pkl` of the segment test, `sig_analysis/ic.pkl` and `ric.pkl` (with long-short returns where
    the run has them `long_short_r.pkl` and `long_avg_r.pkl`), the tables of `portfolio_analysis/`, and `metrics.json`
    with the recorder's metrics by name.

    Parameters
    ----------
    run : path
        A finished run folder.
    folder : path, optional
        Default: "artifacts" in the run folder. Files that are there are replaced.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    ConfigError
        No run, one that has not finished or has no segment test; a folder that cannot be made.

    Notes
    -----
    `positions_normal_1day.pkl` is a dict of Timestamp -> `qlib.backtest.position.Position` with pyqlib installed, and
    of Timestamp -> that object's `position` (dict) without. `indicators_normal_1day_obj.pkl`, Qlib's record of single
    orders, is not written.

    Source
    ------
    The records of pyqlib 0.9.7, qlib/workflow/record_temp.py.
    """
    source = RunFolder.open(run)
    if source.manifest["status"] != FINISHED:
        raise ConfigError(f"run folder {str(run)!r} is {source.manifest['status']}; only a finished run is exported.")
    scored = read_frame(source.path, "pred")
    score = scored.loc[scored["segment"] == SEGMENT, "score"].astype(np.float32)
    if score.empty:
        raise ConfigError(f"run folder {str(run)!r} has no scores of a segment {SEGMENT!r}, the one that is exported.")
    label = read_frame(source.path, "label")["label"].reindex(score.index).astype(np.float32)
    target = _Target(source / "artifacts" if folder is None else Path(folder))
    target.write("pred", score.to_frame("score"))
    target.write("label", label.to_frame(source.manifest["data"].get("label", "LABEL0")))
    ic, rank_ic = daily_ic(score, label)
    target.write("sig_analysis/ic", ic.rename(None))
    target.write("sig_analysis/ric", rank_ic.rename(None))
    metrics = source.read_json("metrics.json")[SEGMENT]
    found = {name: metrics[name] for name in SIGNAL_METRICS if name in metrics}
    if SIGNAL_METRICS[-1] in metrics:
        for name, series in zip(("long_short_r", "long_avg_r"), long_short_return(score, label), strict=True):
            target.write(f"sig_analysis/{name}", series.rename(None))
    if (source / PORTFOLIO / "metrics.json").exists():
        found |= source.read_json(f"{PORTFOLIO}/metrics.json")
        tables = {name: _table(source / PORTFOLIO, name) for name in LEVELS if name != POSITIONS}
        for name, table in tables.items():
            target.write(f"{PORTFOLIO}/{name}", table)
        held = _table(source / PORTFOLIO, POSITIONS)
        target.write(f"{PORTFOLIO}/{POSITIONS}", _positions(held, tables["report_normal_1day"]))
    atomic_write(target.path / "metrics.json", lambda file: file.write_text(json.dumps(found, indent=2) + "\n"))
    return target.path


class _Target:
    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            for name in ("sig_analysis", PORTFOLIO):
                (path / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"the folder {str(path)!r} cannot be made: {error.strerror}.") from None

    def write(self, name: str, value: Any) -> None:
        atomic_write(self.path / f"{name}.pkl", lambda file: file.write_bytes(pickle.dumps(value)))


def _table(folder: Path, name: str) -> pd.DataFrame:
    """A table of the run with the reference's names of index levels."""
    levels, dated = LEVELS[name]
    file = folder / f"{name}.parquet"
    if file.exists():
        found = pd.read_parquet(file)
    else:
        found = pd.read_csv(
            file.with_suffix(".csv"), index_col=list(range(len(levels))), parse_dates=[0] if dated else False
        )
    return found.set_axis(found.index.set_names(levels))


def _positions(held: pd.DataFrame, report: pd.DataFrame) -> dict[pd.Timestamp, Any]:
    """By day: cash, worth of all, and by instrument amount, price, weight, days held."""
    days: dict[pd.Timestamp, dict[str, Any]] = {
        day: {"cash": cash, "now_account_value": account}
        for day, cash, account in zip(report.index, report["cash"], report["account"], strict=True)
    }
    for (day, instrument), row in zip(held.index, held.to_dict("records"), strict=True):
        days[day][instrument] = row
    if importlib.util.find_spec("qlib") is None:
        return dict(days)
    position = importlib.import_module("qlib.backtest.position").Position
    out = {}
    for day, content in days.items():
        out[day] = position(cash=float(report["account"].iloc[0]))
        out[day].position = content
    return out
