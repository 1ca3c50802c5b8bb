"""Does the past move with the future? Prices after some days are changed, and nothing before may move."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from qfast.data.panel import Panel
from qfast.dates import date_text
from qfast.errors import some
from qfast.workflow.check.findings import CheckReport
from qfast.workflow.check.scores import NEARBY, compare_scores, scored_days, scored_segment
from qfast.workflow.check.trial import STAGES, Trial, rebuild_dataset

__all__ = ["check_future_change"]


CUTS = 4  # the future is changed after 1/4, 2/4 and 3/4 of the days scored
FEWEST_DAYS = 4
HOLES = 0.1  # share of a changed future's rows, cells and volumes that are missing, or 0


def check_future_change(report: CheckReport, trial: Trial) -> None:
    """What lies after some of the days scored is changed; features and scores up to them must not move."""
    dataset, model = trial.dataset, trial.model
    days = _days_to_cut_at(dataset)
    if len(days) < FEWEST_DAYS:
        report.add("note", "look-ahead", _why_no_cut(dataset))
        return
    places = [(len(days) - 1) * part // CUTS for part in range(1, CUTS)]
    cuts = [days[place] for place in places]
    features = _features(dataset, cuts[-1])
    moved: set[str] = set()
    before, after = [], []
    for number, (place, cut) in enumerate(zip(places, cuts, strict=True)):
        other = rebuild_dataset(trial.workflow, _with_another_future(trial.source, cut, number))
        past, now = _until(features, cut), _features(other, cut)
        moved |= {str(c) for c in features if not np.array_equal(past[c], now[c], equal_nan=True)}
        span = slice(days[max(0, place - NEARBY)], days[min(place + NEARBY, len(days) - 1)])
        before.append(_until(model.predict(dataset, span), cut))
        after.append(model.predict(other, span).reindex(before[-1].index))
    said = f"with all prices after {', '.join(map(date_text, cuts))} changed, holes made and filled {trial.size}"
    if moved:
        named = some([str(c) for c in features if str(c) in moved])
        report.add("error", "look-ahead", f"{said}, {len(moved)} feature(s) of earlier days move: {named}")
    else:
        report.add("ok", "look-ahead", f"{said}, no feature of that day or before moves by a bit")
    compare_scores(report, "look-ahead", said, pd.concat(before), pd.concat(after))


def _until(table: Any, cut: pd.Timestamp) -> Any:
    return table[table.index.get_level_values("datetime") <= cut]


def _features(dataset: Any, until: pd.Timestamp) -> pd.DataFrame:
    found: pd.DataFrame = dataset.handler.fetch(slice(None, until), col_set="feature", data_key="infer")
    return found


def _days_to_cut_at(dataset: Any) -> pd.DatetimeIndex:
    """Days scored. Where train alone is there, days that no processor learns from: what they learn may move."""
    days = scored_days(dataset)
    if scored_segment(dataset) != "train":
        return days
    panel, first = dataset.handler.panel("infer"), _fitted_until(dataset.handler)
    every = np.unique(panel.date_codes[panel.live_rows()])
    later = panel.datetimes[every[every >= first]]
    trained = later[later.isin(days)]
    return trained if len(trained) >= FEWEST_DAYS else later


def _fitted_until(handler: Any) -> int:
    """Code of the first day that no processor of the scores is fitted on."""
    panel = handler.panel("infer")
    fitted = [p for stage in STAGES for p in getattr(handler, f"{stage}_processors") if hasattr(p, "fit_end_time")]
    return max((int(panel.date_code_range(None, p.fit_end_time)[1]) for p in fitted), default=0)


def _why_no_cut(dataset: Any) -> str:
    name, last = scored_segment(dataset), _fitted_until(dataset.handler)
    if name != "train" or not last:
        return f"{name} has fewer than {FEWEST_DAYS} days, too few for the experiment"
    return (
        f"left out: processors are fitted up to {date_text(dataset.handler.panel('infer').datetimes[last - 1])}, the "
        "data's last days, so a changed future changes what they learn. Remedy: a segment valid or test"
    )


def _with_another_future(panel: Panel, cut: pd.Timestamp, seed: int) -> Panel:
    """Other numbers after `cut`, and others of them missing, known and zero: what is missing tells something too."""
    rng = np.random.default_rng(seed)
    later = np.flatnonzero(np.asarray(panel.datetimes > cut)[panel.date_codes])
    absent = rng.random(len(later)) < HOLES
    blocks = {}
    for group, block in panel.blocks.items():
        values = block.values.copy()
        for place, name in enumerate(block.columns):
            column = values[later, place].astype(np.float64)
            known = column[np.isfinite(column)]
            filled = ~np.isfinite(column) & (rng.random(len(later)) < 0.5)
            if len(known):
                column[filled] = rng.choice(known, int(filled.sum()))
            column = column * np.exp(0.3 * rng.standard_normal(len(later))) + 0.01
            if str(name).lower() == "volume":
                column[rng.random(len(later)) < HOLES] = 0.0
            column[absent | (rng.random(len(later)) < HOLES / 2)] = np.nan
            values[later, place] = column
        blocks[group] = replace(block, values=values)
    return replace(panel, blocks=blocks)
