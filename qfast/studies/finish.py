"""What a study writes when its runs have ended: rolling scores, ensembles, the summary and the report."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from qfast.files import atomic_write
from qfast.studies.axes import Point
from qfast.studies.combine import Member, RunScores, Scores, combined, concatenated, run_scores, write_combined
from qfast.studies.folder import StudyFolder
from qfast.studies.plan import Plan, RunSpec
from qfast.studies.results import Results, markdown_summary, metric_values, point_name, summarize
from qfast.workflow.folder import FINISHED

__all__ = ["Finished", "finish_study"]

log = logging.getLogger("qfast")

ROLLING, ENSEMBLES = "rolling", "ensembles"
SUMMARY = "summary.csv"
MOST_ENSEMBLES = 50  # points; an ensemble of every point of a large grid would only cost time


@dataclass
class Finished:
    """The results of a study over several runs.

    Attributes
    ----------
    summary : DataFrame
        Result of `summarize`, one row for each point, and one for its ensemble if it has several seeds.
    markdown : str
        The summary in the format of Qlib's benchmark tables.
    rolling : dict
        Point name -> scores of its first seed, or of its ensemble, over all windows. Empty without rolling.
    ensembles : dict
        Point name -> scores of its ensemble. Empty without several seeds.
    """

    summary: pd.DataFrame
    markdown: str
    rolling: dict[str, Scores] = field(default_factory=dict)
    ensembles: dict[str, Scores] = field(default_factory=dict)


def finish_study(folder: StudyFolder, plan: Plan, results: Results, best: Sequence[Mapping[str, Any]]) -> Finished:
    """Combine the runs of each point, and write rolling/, ensembles/, summary.csv and summary.md.

    Parameters
    ----------
    folder : StudyFolder
    plan : Plan
    results : Results
    best : sequence of mappings
        Best trials of a search, whose points have ensembles.
    """
    specs = [spec for spec in results.specs() if results.status(spec.number) == FINISHED]
    points = list(dict.fromkeys(spec.point for spec in specs))
    shown = _shown_points(points, best)
    groups: dict[str, list[Mapping[str, Any]]] = {}
    finished = Finished(pd.DataFrame(), "")
    for point in points:
        name = point_name(point) or str(folder.manifest["experiment"])
        own = [spec for spec in specs if spec.point == point]
        groups[name] = [row for row in results.of_point(point) if row["status"] == FINISHED]
        if point not in shown:
            continue
        members: list[Scores] | list[RunScores] = []
        if plan.axes.rolling is not None:
            rolled = _rolling(folder, plan, point, own)
            groups[name] = [metric_values(_target(folder, ROLLING, point, seed)) for seed in rolled]
            members = list(rolled.values())
        elif len(own) > 1:
            members = [run_scores(folder.run(spec.number)) for spec in own]
        if len(members) > 1:
            groups[f"{name}, ensemble"] = [_ensemble(folder, plan, point, members, finished, name)]
        if plan.axes.rolling is not None and rolled:
            finished.rolling[name] = finished.ensembles.get(name) or next(iter(rolled.values()))
    finished.summary = summarize(groups)
    handler = plan.workflow(Point(0)).task.dataset.kwargs.handler.class_.rsplit(".", 1)[-1]
    finished.markdown = markdown_summary(finished.summary, handler)
    _write(folder.path / SUMMARY, finished.summary.to_csv())
    _write(folder.path / "summary.md", finished.markdown)
    return finished


def _shown_points(points: Sequence[Point], best: Sequence[Mapping[str, Any]]) -> list[Point]:
    """The points whose scores are combined: all of a grid, and the best trials of a search."""
    if any(point.trial is not None for point in points):
        chosen = [{key: value for key, value in row.items() if key not in ("trial", "value")} for row in best]
        numbers = [row["trial"] for row in best]
        return [p for p in points if p.trial in numbers and dict(p.values) in chosen]
    if len(points) > MOST_ENSEMBLES:
        log.info("the scores of the first %d of %d points are combined", MOST_ENSEMBLES, len(points))
    return list(points[:MOST_ENSEMBLES])


def _rolling(folder: StudyFolder, plan: Plan, point: Point, specs: Sequence[RunSpec]) -> dict[int, Scores]:
    """Seed -> the scores of all windows one after the other, which are also written."""
    workflow = plan.workflow(point)
    dataset = plan.prepared(workflow).dataset(workflow)
    members = {}
    n_windows = len(plan.windows(point))
    for seed in dict.fromkeys(spec.seed for spec in specs):
        own = sorted((spec for spec in specs if spec.seed == seed), key=lambda spec: spec.number)
        if len(own) < n_windows:
            log.warning("seed %d: only %d of %d windows finished; the others have no scores", seed, len(own), n_windows)
        members[seed] = concatenated([run_scores(folder.run(spec.number)) for spec in own])
        write_combined(_target(folder, ROLLING, point, seed), members[seed], workflow, dataset)
    return members


def _ensemble(
    folder: StudyFolder, plan: Plan, point: Point, members: Sequence[Member], finished: Finished, name: str
) -> Mapping[str, Any]:
    """Write the ensemble of a point and return its values for the summary."""
    workflow = plan.workflow(point)
    dataset = plan.prepared(workflow).dataset(workflow)
    finished.ensembles[name] = combined(members, folder.manifest["ensemble"])
    target = _target(folder, ENSEMBLES, point)
    write_combined(target, finished.ensembles[name], workflow, dataset)
    return metric_values(target)


def _target(folder: StudyFolder, kind: str, point: Point, seed: int | None = None) -> Path:
    name = f"{point.index:03d}" + ("" if seed is None else f"-seed-{seed}")
    return folder.path / kind / name


def _write(target: Path, text: str) -> None:
    atomic_write(target, lambda file: file.write_bytes(text.encode("utf-8")))
