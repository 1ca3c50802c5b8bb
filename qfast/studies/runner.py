"""Execute the runs of a study on an engine: order, retries, progress, and the table after each run."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from qfast.read_options import ReadOptions
from qfast.studies.axes import Point
from qfast.studies.engines import Engine
from qfast.studies.folder import StudyFolder
from qfast.studies.plan import Plan, RunSpec
from qfast.studies.results import Ending, Results
from qfast.studies.tasks import LOST, Outcome, RunTask
from qfast.workflow.dataset import DataInput
from qfast.workflow.folder import FAILED, FINISHED

__all__ = ["GridPoints", "PointSource", "Runner"]

log = logging.getLogger("qfast")

RETRIES = 1  # of a run whose process or node has died


class PointSource(Protocol):
    """Where the points of a study come from: a grid, or a search that reacts to results."""

    first_alone: bool
    """Whether the other runs of a point wait for its first one."""

    def total(self, plan: Plan) -> int:
        """Number of runs of the study, as far as it is known."""

    def next(self) -> Point | None:
        """The next point; None if there is none, or none before further results are known."""

    def trial(self, point: Point) -> Mapping[str, Any] | None:
        """What the first run of a point needs to be stopped early; None if it cannot be."""

    def done(self, point: Point, rows: list[Mapping[str, Any]]) -> None:
        """Receive the rows of the table of all runs of a point."""

    def results(self) -> list[dict[str, Any]]:
        """The best trial of each search: "trial", "value" and its values. Empty without a search."""


class GridPoints:
    """The points of a grid, all of which are known at the beginning."""

    first_alone = False

    def __init__(self, plan: Plan) -> None:
        self._points = plan.static_points()
        self._position = 0

    def total(self, plan: Plan) -> int:
        """Number of runs of all points."""
        return plan.count(self._points)

    def next(self) -> Point | None:
        """The next point of the grid."""
        if self._position == len(self._points):
            return None
        self._position += 1
        return self._points[self._position - 1]

    def trial(self, point: Point) -> Mapping[str, Any] | None:
        """None: no run of a grid is stopped early."""
        return None

    def done(self, point: Point, rows: list[Mapping[str, Any]]) -> None:
        """Do nothing."""

    def results(self) -> list[dict[str, Any]]:
        """An empty list."""
        return []


class Runner:
    """Executes the runs of a plan.

    Parameters
    ----------
    folder : StudyFolder
    plan : Plan
    points : PointSource
    engine : Engine
    options : dict
        Entries of every `RunTask`: device, allow_code.
    data : path, DataFrame, Panel, mapping or None
    read_options : ReadOptions
    quiet : bool
        Do not show the progress bar.
    """

    def __init__(
        self,
        folder: StudyFolder,
        plan: Plan,
        points: PointSource,
        engine: Engine,
        options: Mapping[str, Any],
        data: DataInput | None,
        read_options: ReadOptions,
        quiet: bool = False,
    ) -> None:
        self._folder, self._plan, self._points, self._engine = folder, plan, points, engine
        path = isinstance(data, (str, os.PathLike))
        self._options = {
            **options,
            "data": str(Path(data).expanduser().resolve()) if path else None,  # type: ignore[arg-type]
            "read_options": read_options.recorded(),
        }
        self._quiet = quiet
        self._waiting: list[RunSpec] = []
        self._running: dict[int, RunSpec] = {}
        self._retries: dict[int, int] = {}
        self._left: dict[int, int] = {}
        self._prepared: dict[Path, Mapping[str, Any]] = {}  # workflow file -> description of its data
        self.results = Results(folder.path)

    def run(self) -> Results:
        """Execute all runs and return their rows. The table of the folder is complete after each run."""
        total = self._points.total(self._plan)
        # None: tqdm checks whether stderr is a terminal. Log lines are then written above the bar.
        bar = tqdm(total=total, unit="run", desc="study", disable=True if self._quiet else None, leave=False)
        with bar, contextlib.nullcontext() if bar.disable else _log_above_bar():
            while True:
                self._fill(bar)
                if not self._running:
                    break
                for outcome in self._engine.wait():
                    self._end(outcome, bar)
        self.results.write()
        return self.results

    def _fill(self, bar: tqdm[Any]) -> None:
        """Begin runs until every slot is in use, or no run can begin now."""
        while len(self._running) < self._engine.slots:
            spec = self._next_spec(bar)
            if spec is None:
                return
            ending = self.results.earlier(self._folder.run(spec.number))
            if ending is not None:  # finished before the study was resumed
                self._record(spec, ending, bar)
                continue
            self._running[spec.number] = spec
            self._engine.submit(self._task(spec))

    def _next_spec(self, bar: tqdm[Any]) -> RunSpec | None:
        while True:
            for position, spec in enumerate(self._waiting):
                if self._can_begin(spec):
                    return self._waiting.pop(position)
            failed = next((spec for spec in self._waiting if self._cannot_begin(spec)), None)
            if failed is not None:
                self._waiting.remove(failed)
                self._record(failed, self._cannot_begin(failed) or Ending(FAILED), bar)
                continue
            point = self._points.next()
            if point is None:
                return None
            specs = list(self._plan.runs(point, first_alone=self._points.first_alone))
            self._left[point.index] = len(specs)
            self._waiting.extend(specs)

    def _can_begin(self, spec: RunSpec) -> bool:
        after = spec.after is None or self.results.status(spec.after.number) == FINISHED
        waits = spec.waits_for is None or self.results.status(spec.waits_for) == FINISHED
        return after and waits

    def _cannot_begin(self, spec: RunSpec) -> Ending | None:
        """The ending of a run that depends on one without a result; None if the run may still begin."""
        numbers = [spec.waits_for, None if spec.after is None else spec.after.number]
        for number in (number for number in numbers if number is not None):
            status = self.results.status(number)
            if status not in (None, FINISHED):
                return Ending(status or FAILED, f"run {number:03d}, which it depends on, {status}")
        return None

    def _task(self, spec: RunSpec) -> RunTask:
        if spec.config not in self._prepared:  # checking a workflow takes long, compared with the rest of this method
            workflow = self._plan.workflow(spec.point, spec.window)
            self._prepared[spec.config] = self._plan.prepared(workflow).description()
        first = spec.waits_for is None and self._points.first_alone
        before = None if spec.after is None else str(self._folder.run(spec.after.number).resolve())
        return RunTask(
            number=spec.number,
            folder=str(self._folder.run(spec.number).resolve()),
            config=str(spec.config),
            seed=spec.seed,
            prepared=self._prepared[spec.config],
            init_from=before,
            trial=self._points.trial(spec.point) if first else None,
            log=str(self._folder.log_file(spec.number).resolve()),
            **self._options,
        )

    def _end(self, outcome: Outcome, bar: tqdm[Any]) -> None:
        """Record the end of a run, or begin it once more if its process has died."""
        spec = self._running.pop(outcome.number)
        if outcome.status == LOST and self._retries.get(spec.number, 0) < RETRIES:
            self._retries[spec.number] = self._retries.get(spec.number, 0) + 1
            log.warning("run %03d: %s; it is tried once more", spec.number, outcome.reason)
            self._running[spec.number] = spec
            self._engine.submit(self._task(spec))
            return
        failed = outcome.status != FINISHED
        self._record(spec, Ending(FAILED if failed else FINISHED, outcome.reason), bar)

    def _record(self, spec: RunSpec, ending: Ending, bar: tqdm[Any]) -> None:
        row = self.results.add(spec, ending, self._folder.run(spec.number))
        if ending.status == FAILED:
            log.warning("run %03d failed: %s", spec.number, ending.reason)
        else:
            log.info("run %03d: %s", spec.number, self.results.summary_line(row))
        bar.update()
        self.results.write()
        self._left[spec.point.index] -= 1
        if not self._left[spec.point.index]:
            self._points.done(spec.point, self.results.of_point(spec.point))


def _log_above_bar() -> contextlib.AbstractContextManager[None]:
    # In a notebook without ipywidgets, this import warns, so it must not be made for a study without a bar.
    from tqdm.contrib.logging import logging_redirect_tqdm

    return logging_redirect_tqdm([log])
