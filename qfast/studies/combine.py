"""Scores of several runs together: rolling windows one after the other, and ensembles over seeds."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from qfast.data.protocols import HandlerDataset
from qfast.errors import ConfigError, QfastError
from qfast.workflow.folder import RunFolder, read_frame
from qfast.workflow.portfolio import write_portfolio
from qfast.workflow.records import PortAnaRecord, Record, build_records
from qfast.workflow.results import SegmentResult, write_results
from qfast.workflow.schema import Workflow

__all__ = [
    "METHODS",
    "Member",
    "RunScores",
    "ScoredRows",
    "Scores",
    "combined",
    "concatenated",
    "run_scores",
    "write_combined",
]

log = logging.getLogger("qfast")

METHODS = ("rank", "zscore")  # of an ensemble; the first one is the default
Scores = dict[str, SegmentResult]
"""Segment -> scores, labels and daily ICs."""


class ScoredRows(NamedTuple):
    """Scores and labels of a segment, without its ICs, which an ensemble of many runs does not need."""

    score: pd.Series
    label: pd.Series


RunScores = dict[str, ScoredRows]
"""Segment -> scores and labels of a run."""
Member = Mapping[str, ScoredRows] | Mapping[str, SegmentResult]
"""Scores of an ensemble's member."""


def run_scores(folder: Path) -> RunScores:
    """Scores and labels of a finished run, by segment. A run stores no segment train, unless it has no other one."""
    scores, label = read_frame(folder, "pred"), read_frame(folder, "label")["label"]
    results = {}
    for name in scores["segment"].unique():
        score = scores.loc[scores["segment"] == name, "score"]
        if name != "newest":
            results[str(name)] = ScoredRows(score, label.reindex(score.index))
    return results


def concatenated(windows: Sequence[RunScores]) -> Scores:
    """The test segments of rolling windows as one segment.

    Raises
    ------
    ConfigError
        No window has scores.
    """
    tests = [window["test"] for window in windows if "test" in window and len(window["test"].score)]
    if not tests:
        raise ConfigError("no window of the rolling study has scores in its segment test. Remedy: later data.")
    score = pd.concat([test.score for test in tests]).sort_index()
    label = pd.concat([test.label for test in tests]).reindex(score.index)
    return {"test": SegmentResult.of("test", score, label)}


def combined(members: Sequence[Member], method: str) -> Scores:
    """The ensemble of several runs.

    Parameters
    ----------
    members : sequence of mappings
        Segment -> scores and labels, for each run. A run without a score for an instrument and day does not count
        there.
    method : {"rank", "zscore"}
        "rank": mean over runs of the rank of the score among the instruments of the day, from 0 (exclusive) to 1, with
        average ranks for ties. "zscore": mean over runs of (score - mean) / standard deviation of the day (ddof 0).

    Returns
    -------
    Scores
        For the segments that all runs have. The scores of a single run remain as they are.

    Examples
    --------
    >>> index = pd.MultiIndex.from_product([pd.to_datetime(["2024-01-02"]), ["A", "B"]],
    ...                                    names=["datetime", "instrument"])
    >>> runs = [{"test": SegmentResult.of("test", pd.Series(values, index), pd.Series([0.0, 1.0], index))}
    ...         for values in ([0.1, 0.9], [0.3, 0.2], [0.2, 0.4])]
    >>> combined(runs, "rank")["test"].score.round(3).tolist()
    [0.667, 0.833]
    """
    if len(members) == 1:
        return {name: SegmentResult.of(name, rows.score, rows.label) for name, rows in members[0].items()}
    results = {}
    for name in (name for name in members[0] if all(name in member for member in members)):
        scores = pd.concat([_daily(member[name].score, method) for member in members], axis=1).mean(axis=1)
        score = scores.rename("score").sort_index()
        label = pd.concat([member[name].label for member in members])
        label = label[~label.index.duplicated()].reindex(score.index)
        results[name] = SegmentResult.of(name, score, label)
    return results


def _daily(score: pd.Series, method: str) -> pd.Series:
    """Ranks or z-scores within each day."""
    days = score.astype("float64").groupby(level="datetime")
    if method == "rank":
        return days.rank(pct=True)
    deviation = days.transform("std", ddof=0)
    return (score - days.transform("mean")) / deviation.where(deviation > 0)


def write_combined(
    target: Path, results: Scores, workflow: Workflow, dataset: HandlerDataset
) -> dict[str, dict[str, float]]:
    """Write scores, labels, metrics and the backtest in the files of a run folder, and return the metrics.

    Parameters
    ----------
    target : Path
        Created if it does not exist.
    results : Scores
    workflow : Workflow
        Its records apply: long-short returns, and the backtest of the segment test.
    dataset : DatasetH
        Its handler has the prices of the backtest.
    """
    target.mkdir(parents=True, exist_ok=True)
    folder = RunFolder(target, {})
    records = build_records(workflow, None, dataset)
    metrics = write_results(folder, records, results)
    _trade(folder, records, results, workflow, dataset)
    return metrics


def _trade(
    folder: RunFolder,
    records: Iterable[Record],
    results: Mapping[str, SegmentResult],
    workflow: Workflow,
    dataset: HandlerDataset,
) -> None:
    """Run the backtest of the workflow on the segment test. A failure is logged, as in a run."""
    plan = next((record.plan for record in records if isinstance(record, PortAnaRecord)), None)
    if plan is None or "test" not in results:
        return
    try:
        write_portfolio(folder, plan.run(results["test"].score, dataset.handler, workflow.qlib_init.region))
    except QfastError as error:
        log.warning("the backtest in %s was skipped: %s", folder.path, error)
