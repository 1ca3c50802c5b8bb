"""The look-ahead experiment: future prices or factors are changed, and no earlier feature or score may change."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd

from qfast.data.panel import Panel
from qfast.data.protocols import Handler, HandlerDataset
from qfast.dates import date_text
from qfast.errors import some
from qfast.workflow.check.findings import CheckReport
from qfast.workflow.check.scores import NEARBY, compare_scores, scored_days, scored_segment
from qfast.workflow.check.trial import STAGES, Trial, rebuild_dataset

__all__ = ["check_future_change"]

CUTS = 4  # the future is changed after 1/4, 2/4 and 3/4 of the scored days
FEWEST_DAYS = 4
HOLES = 0.1  # fraction of the rows that become missing, and of the volumes that become zero; half as many cells


def check_future_change(report: CheckReport, trial: Trial) -> None:
    """Change the data after several days; report features and scores up to each of them that change."""
    dataset, model = trial.dataset, trial.model
    days = _days_to_cut_at(dataset)
    if len(days) < FEWEST_DAYS:
        report.add("note", "look-ahead", _why_no_cut(dataset))
        return
    positions = [(len(days) - 1) * part // CUTS for part in range(1, CUTS)]
    cuts = [days[position] for position in positions]
    features = _features(dataset, cuts[-1])
    changed: set[str] = set()
    before, after = [], []
    for number, (position, cut) in enumerate(zip(positions, cuts, strict=True)):
        other = rebuild_dataset(trial.workflow, _with_another_future(trial.source, cut, number))
        expected, actual = _features_until(features, cut), _features(other, cut)
        changed |= {str(c) for c in features if not np.array_equal(expected[c], actual[c], equal_nan=True)}
        span = slice(days[max(0, position - NEARBY)], days[min(position + NEARBY, len(days) - 1)])
        before.append(_scores_until(model.predict(dataset, span), cut))
        after.append(model.predict(other, span).reindex(before[-1].index))
    condition = (
        f"after changing all data after {', '.join(map(date_text, cuts))}, adding holes and filling others {trial.size}"
    )
    if changed:
        listed = some([str(c) for c in features if str(c) in changed])
        report.add("error", "look-ahead", f"{condition}: {len(changed)} feature(s) of earlier days change: {listed}")
    else:
        report.add("ok", "look-ahead", f"{condition}: no feature up to that day changes by a bit")
    compare_scores(report, "look-ahead", condition, pd.concat(before), pd.concat(after))


def _features_until(table: pd.DataFrame, cut: pd.Timestamp) -> pd.DataFrame:
    return table[table.index.get_level_values("datetime") <= cut]


def _scores_until(scores: pd.Series, cut: pd.Timestamp) -> pd.Series:
    return scores[scores.index.get_level_values("datetime") <= cut]


def _features(dataset: HandlerDataset, until: pd.Timestamp) -> pd.DataFrame:
    return dataset.handler.fetch(slice(None, until), col_set="feature", data_key="infer")


def _days_to_cut_at(dataset: HandlerDataset) -> pd.DatetimeIndex:
    """The scored days, or, if train is the only segment, days after the fit windows, whose statistics may change."""
    days = scored_days(dataset)
    if scored_segment(dataset) != "train":
        return days
    panel, first = dataset.handler.panel("infer"), _first_code_after_fit(dataset.handler)
    codes = np.unique(panel.date_codes[panel.live_rows()])
    later = panel.datetimes[codes[codes >= first]]
    trained = later[later.isin(days)]
    return trained if len(trained) >= FEWEST_DAYS else later


def _first_code_after_fit(handler: Handler) -> int:
    """Date code of the first day after the fit windows of all processors that affect scores."""
    panel = handler.panel("infer")
    fitted = [p for stage in STAGES for p in getattr(handler, f"{stage}_processors") if hasattr(p, "fit_end_time")]
    return max((int(panel.date_code_range(None, p.fit_end_time)[1]) for p in fitted), default=0)


def _why_no_cut(dataset: HandlerDataset) -> str:
    name, code = scored_segment(dataset), _first_code_after_fit(dataset.handler)
    if name != "train" or not code:
        return f"skipped: {name} has fewer than {FEWEST_DAYS} days"
    last_fitted = dataset.handler.panel("infer").datetimes[code - 1]
    return (
        f"skipped: processors are fitted up to {date_text(last_fitted)}, close to the end of the data, so changing the "
        "future changes their statistics. Remedy: add a segment valid or test"
    )


def _with_another_future(panel: Panel, cut: pd.Timestamp, seed: int) -> Panel:
    """Change the values after `cut`, and which of them are missing or zero, because that is information, too."""
    rng = np.random.default_rng(seed)
    later = np.flatnonzero(np.asarray(panel.datetimes > cut)[panel.date_codes])
    absent = rng.random(len(later)) < HOLES
    blocks = {}
    for group, block in panel.blocks.items():
        values = block.values.copy()
        for position, name in enumerate(block.columns):
            column = values[later, position].astype(np.float64)
            present = column[np.isfinite(column)]
            filled = ~np.isfinite(column) & (rng.random(len(later)) < 0.5)
            if len(present):
                column[filled] = rng.choice(present, int(filled.sum()))
            column = column * np.exp(0.3 * rng.standard_normal(len(later))) + 0.01
            if str(name).lower() == "volume":
                column[rng.random(len(later)) < HOLES] = 0.0
            column[absent | (rng.random(len(later)) < HOLES / 2)] = np.nan
            values[later, position] = column
        blocks[group] = replace(block, values=values)
    return replace(panel, blocks=blocks)
