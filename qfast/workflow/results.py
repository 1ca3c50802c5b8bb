"""Scores and raw labels of each segment, their metrics, and the files that contain them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pandas as pd

from qfast._renamed import renamed_names
from qfast.data.protocols import HandlerDataset
from qfast.metrics import daily_ic, ic_summary
from qfast.workflow.folder import RunFolder
from qfast.workflow.records import Record

if TYPE_CHECKING:
    from qfast.training.estimator import Estimator

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
    """Scores, labels and daily ICs of one segment.

    Attributes
    ----------
    name : str
    score, label : Series
        Indexed by (datetime, instrument). `label` is the raw label.
    ic, rank_ic : Series
        Indexed by datetime.
    """

    name: str
    score: pd.Series
    label: pd.Series
    ic: pd.Series
    rank_ic: pd.Series

    @classmethod
    def of(cls, name: str, score: pd.Series, label: pd.Series) -> SegmentResult:
        """Compute the ICs of scores and labels."""
        ic, rank_ic = daily_ic(score, label)
        return cls(name, score, label, ic, rank_ic)


def raw_labels(dataset: HandlerDataset) -> dict[str, pd.Series]:
    """Raw labels of each segment. A run fetches them before training, so errors occur early.

    Raises
    ------
    RawDataDroppedError
        The handler has discarded its raw data.
    """
    labels = {}
    for name, (start, end) in dataset.segments.items():
        labels[name] = dataset.handler.fetch(slice(start, end), col_set="label", data_key="raw").iloc[:, 0]
        if labels[name].empty:
            log.warning("segment %r (%s to %s) contains no rows of the data and will have no metrics", name, start, end)
    return labels


def evaluate(model: Estimator, dataset: HandlerDataset, labels: Mapping[str, pd.Series]) -> dict[str, SegmentResult]:
    """Score every segment.

    Returns
    -------
    dict
        Segment -> result. The key "newest" contains the dates after the last label and after all segments, if any.
    """
    results = {name: SegmentResult.of(name, model.predict(dataset, name), label) for name, label in labels.items()}
    start = _first_unlabelled(dataset, results)
    if start is not None:
        score = model.predict(dataset, slice(start, None))
        results["newest"] = SegmentResult.of("newest", score, pd.Series(float("nan"), score.index))
    return results


def _first_unlabelled(dataset: HandlerDataset, results: Mapping[str, SegmentResult]) -> pd.Timestamp | None:
    """The first date after the last label and after all segments; None if there is none."""
    label = dataset.handler.fetch(slice(None), col_set="label", data_key="raw").iloc[:, 0]
    dates = label.index.get_level_values("datetime")
    ends = [dates[label.notna().to_numpy()].max()]
    ends += [r.score.index.get_level_values("datetime").max() for r in results.values() if len(r.score)]
    later = dates[dates > max(end for end in ends if not pd.isna(end))] if any(not pd.isna(e) for e in ends) else dates
    return later.min() if len(later) else None


def write_results(
    run_folder: RunFolder, records: Sequence[Record], results: Mapping[str, SegmentResult]
) -> dict[str, dict[str, float]]:
    """Write pred, label, daily.csv and metrics.json, and return the metrics: segment -> metric -> value.

    pred and label contain the segments other than train, unless train is the only one.
    """
    written = [r for name, r in results.items() if name != "train"] or list(results.values())
    scores = [pd.DataFrame({"score": r.score, "segment": r.name}).sort_index() for r in written]
    run_folder.write_frame("pred", _without_repeats(pd.concat(scores)))
    labels = [r.label.sort_index().to_frame("label") for r in written if r.name != "newest"]
    run_folder.write_frame("label", _without_repeats(pd.concat(labels)))
    metrics: dict[str, dict[str, float]] = {}
    daily = {}
    for name, result in results.items():
        if name == "newest":
            continue
        values = ic_summary(result.ic, result.rank_ic)
        series = {"ic": result.ic, "rank_ic": result.rank_ic}
        for record in records:
            values |= record.metrics(result)
            series |= record.series(result)
        metrics[name] = {**values, "days": float(result.ic.notna().sum()), "samples": float(len(result.score))}
        daily[name] = pd.DataFrame(series)
    run_folder.write_text("daily.csv", pd.concat(daily, names=["segment", "datetime"]).to_csv(float_format="%.9g"))
    run_folder.write_json("metrics.json", metrics)
    return metrics


def _without_repeats(frame: pd.DataFrame) -> pd.DataFrame:
    """Remove duplicate rows of overlapping segments, except that of the last segment."""
    return frame[~frame.index.duplicated(keep="last")]
