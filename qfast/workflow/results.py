"""Scores and labels of a trained model by segment, their metrics and tables."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from qfast._renamed import renamed_names
from qfast.metrics import daily_ic, ic_summary
from qfast.workflow.folder import RunFolder
from qfast.workflow.records import Record

__all__ = ["SegmentResult", "evaluate", "raw_labels", "write_results"]

__getattr__ = renamed_names(
    __name__,
    {
        "write_report": "qfast.workflow.report.write_report",
    },
)


log = logging.getLogger("qfast")


@dataclass(frozen=True)
class SegmentResult:
    """Scores and labels of one segment, and what is computed from them.

    `score` and `label` are indexed (datetime, instrument); `ic` and `rank_ic` by datetime.
    """

    name: str
    score: pd.Series
    label: pd.Series
    ic: pd.Series
    rank_ic: pd.Series

    @classmethod
    def of(cls, name: str, score: pd.Series, label: pd.Series) -> SegmentResult:
        ic, rank_ic = daily_ic(score, label)
        return cls(name, score, label, ic, rank_ic)


def raw_labels(dataset: Any) -> dict[str, pd.Series]:
    """Raw labels of each segment; fetched before training, so that what is wrong with them costs no time."""
    labels = {}
    for name, (start, end) in dataset.segments.items():
        labels[name] = dataset.handler.fetch(slice(start, end), col_set="label", data_key="raw").iloc[:, 0]
        if labels[name].empty:
            log.warning("segment %r (%s to %s) holds no rows of the data; it will have no metrics", name, start, end)
    return labels


def evaluate(model: Any, dataset: Any, labels: Mapping[str, pd.Series]) -> dict[str, SegmentResult]:
    """Scores and raw labels of every segment; "newest": dates after the last label that no segment holds."""
    results = {name: SegmentResult.of(name, model.predict(dataset, name), label) for name, label in labels.items()}
    start = _first_unlabelled(dataset, results)
    if start is not None:
        score = model.predict(dataset, slice(start, None))
        results["newest"] = SegmentResult.of("newest", score, pd.Series(float("nan"), score.index))
    return results


def _first_unlabelled(dataset: Any, results: Mapping[str, SegmentResult]) -> pd.Timestamp | None:
    """The first date that neither has a label nor lies in or before a segment."""
    label = dataset.handler.fetch(slice(None), col_set="label", data_key="raw").iloc[:, 0]
    dates = label.index.get_level_values("datetime")
    ends = [dates[label.notna().to_numpy()].max()]
    ends += [r.score.index.get_level_values("datetime").max() for r in results.values() if len(r.score)]
    later = dates[dates > max(end for end in ends if not pd.isna(end))] if any(not pd.isna(e) for e in ends) else dates
    return later.min() if len(later) else None


def write_results(
    run_folder: RunFolder, records: Sequence[Record], results: Mapping[str, SegmentResult]
) -> dict[str, dict[str, float]]:
    """Write pred, label, daily.csv and metrics.json; the metrics by segment."""
    kept = [r for name, r in results.items() if name != "train"] or list(results.values())
    scores = [pd.DataFrame({"score": r.score, "segment": r.name}).sort_index() for r in kept]
    run_folder.write_frame("pred", _without_repeats(pd.concat(scores)))
    labels = [r.label.sort_index().to_frame("label") for r in kept if r.name != "newest"]
    run_folder.write_frame("label", _without_repeats(pd.concat(labels)))
    metrics: dict[str, dict[str, float]] = {}
    daily = {}
    for name, result in results.items():
        if name == "newest":
            continue
        found = ic_summary(result.ic, result.rank_ic)
        series = {"ic": result.ic, "rank_ic": result.rank_ic}
        for record in records:
            found |= record.metrics(result)
            series |= record.series(result)
        metrics[name] = {**found, "days": float(result.ic.notna().sum()), "samples": float(len(result.score))}
        daily[name] = pd.DataFrame(series)
    run_folder.write_text("daily.csv", pd.concat(daily, names=["segment", "datetime"]).to_csv(float_format="%.9g"))
    run_folder.write_json("metrics.json", metrics)
    return metrics


def _without_repeats(frame: pd.DataFrame) -> pd.DataFrame:
    """Segments may overlap; the later one's row is kept."""
    return frame[~frame.index.duplicated(keep="last")]
