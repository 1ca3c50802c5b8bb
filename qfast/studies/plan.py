"""Which runs a study consists of: the workflow of each point, its rolling windows, and the order of the runs."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qfast.dates import date_text
from qfast.errors import ConfigError
from qfast.read_options import ReadOptions
from qfast.studies.axes import Point, Rolling
from qfast.studies.folder import StudyFolder
from qfast.studies.rolling import Segments, calendar_of, label_reach, rolling_segments
from qfast.workflow import pretraining
from qfast.workflow.config import apply_set
from qfast.workflow.dataset import DataInput, absolute_sources
from qfast.workflow.overrides import AliasGroups
from qfast.workflow.prepared import PreparedData, data_key
from qfast.workflow.records import PortAnaRecord
from qfast.workflow.schema import Workflow, as_list
from qfast.workflow.validation import check_workflow

__all__ = ["Plan", "RunSpec", "Window", "point_workflow"]

SEGMENTS = "task.dataset.kwargs.segments"


@dataclass(frozen=True)
class Window:
    """A rolling window: its number, from 0, and its segments as [start, end] texts."""

    number: int
    segments: Mapping[str, Sequence[str | None]]


@dataclass(frozen=True)
class RunSpec:
    """One run of a study.

    Attributes
    ----------
    number : int
    point : Point
    window : Window or None
    seed : int
    config : Path
        The workflow file of the point and window.
    after : RunSpec or None
        The run whose weights this one begins with.
    waits_for : int or None
        Number of a run that must end first.
    """

    number: int
    point: Point
    window: Window | None
    seed: int
    config: Path
    after: RunSpec | None = None
    waits_for: int | None = None


def point_workflow(
    values: Mapping[str, Any],
    aliases: AliasGroups,
    sets: Sequence[str],
    source: str,
    segments: Mapping[str, Sequence[str | None]] | None = None,
) -> Workflow:
    """The checked workflow of a point.

    Parameters
    ----------
    values : mapping
        The resolved workflow of the study. Not modified.
    aliases : list of lists of paths
        Keys that are aliases of one anchor and change together.
    sets : sequence of str
        The changes of the point.
    source : str
        For messages.
    segments : mapping, optional
        Segments of a rolling window. The window then has no backtest, whose period is that of all windows together.

    Raises
    ------
    ConfigError
        A key does not exist, or a value is not allowed.
    """
    changed = copy.deepcopy(dict(values))
    for text in sets:
        apply_set(changed, text, aliases)
    if segments is not None:
        task = changed["task"]
        task["dataset"]["kwargs"]["segments"] = {name: list(ends) for name, ends in segments.items()}
        records = as_list(task.get("record"))
        task["record"] = [record for record in records if not _is_backtest(record)]  # type: ignore[attr-defined]
    workflow = check_workflow(changed, source)
    pretraining.absolute_model_path(workflow.task.model, Path(source))
    absolute_sources(workflow, Path.cwd())
    return workflow


def _is_backtest(record: Mapping[str, Any] | str) -> bool:
    name = record if isinstance(record, str) else str(record.get("class"))
    return name.rsplit(".", 1)[-1] == PortAnaRecord.__name__


class Plan:
    """The runs of a study, and the data that they share.

    Parameters
    ----------
    folder : StudyFolder
    prepared : Path
        Folder for prepared data.
    data : path, DataFrame, Panel, mapping or None
        As in `qfast.run`.
    read_options : ReadOptions
    """

    def __init__(self, folder: StudyFolder, prepared: Path, data: DataInput | None, read_options: ReadOptions) -> None:
        self.folder, self.axes = folder, folder.axes
        self._values, self._aliases = folder.workflow(), folder.aliases
        self._root, self._data, self._read_options = prepared, data, read_options
        self._prepared: dict[str, PreparedData] = {}
        self._windows: dict[int, list[Window] | list[None]] = {}
        self._numbers = _Numbers()

    # ---------------------------------------------------------------- workflows and data
    def workflow(self, point: Point, window: Window | None = None) -> Workflow:
        """The checked workflow of a point and window."""
        segments = None if window is None else window.segments
        return point_workflow(self._values, self._aliases, point.sets(), str(self.folder.path), segments)

    def prepared(self, workflow: Workflow) -> PreparedData:
        """The data of a workflow, prepared at the first call for each distinct handler."""
        key = data_key(workflow)
        if key not in self._prepared:
            target = self._root / f"{len(self._prepared):03d}"
            self._prepared[key] = PreparedData.write(target, workflow, self._data, self._read_options)
        return self._prepared[key]

    def windows(self, point: Point) -> list[Window] | list[None]:
        """The rolling windows of a point; [None] without rolling.

        Raises
        ------
        ConfigError
            The step is longer than the test segment, or the reach of the label is unknown.
        """
        rolling = self.axes.rolling
        if rolling is None:
            return [None]
        base = point.index // max(self.axes.trials, 1)  # the trials of a search have the windows of their grid point
        if base not in self._windows:
            self._windows[base] = self._rolling_windows(self.workflow(point), rolling)
        return self._windows[base]

    def _rolling_windows(self, workflow: Workflow, rolling: Rolling) -> list[Window]:
        dataset = self.prepared(workflow).dataset(workflow)
        reach = label_reach(dataset) if rolling.label_days is None else rolling.label_days
        if reach is None:
            raise ConfigError(
                "the labels are columns of the data, so it is unknown how many later days they read. Remedy: "
                "--label-days N; for example 2 for the return from the next day to the day after."
            )
        calendar, last = calendar_of(dataset)
        segments = workflow.task.dataset.kwargs.segments
        windows = rolling_segments(
            calendar,
            segments,
            rolling.step,
            reach,
            expanding=rolling.expanding,
            last=last,
        )
        return [Window(number, _texts(window)) for number, window in enumerate(windows)]

    # ---------------------------------------------------------------- runs
    def static_points(self) -> list[Point]:
        """All points of a study without a search."""
        return [Point(index, values) for index, values in enumerate(self.axes.grid_points())]

    def count(self, points: Sequence[Point]) -> int:
        """Number of runs of some points."""
        return sum(len(self.windows(point)) for point in points) * len(self.axes.seeds)

    def runs(self, point: Point, *, first_alone: bool = False) -> Iterator[RunSpec]:
        """The runs of a point: all seeds of the first window, then of the second, and so on.

        Parameters
        ----------
        point : Point
        first_alone : bool
            All other runs wait for the first one, which a pruner may stop.
        """
        windows = self.windows(point)
        start = self._numbers.start(point.index, len(windows) * len(self.axes.seeds))
        previous: dict[int, RunSpec] = {}
        warm = self.axes.rolling is not None and self.axes.rolling.warm_start
        for position, window in enumerate(windows):
            config = self._config(point, window, warm=warm and position > 0)
            for place, seed in enumerate(self.axes.seeds):
                number = start + position * len(self.axes.seeds) + place
                after = previous.get(seed) if warm else None
                waits_for = start if first_alone and number != start else None
                previous[seed] = RunSpec(number, point, window, seed, config, after, waits_for)
                yield previous[seed]

    def _config(self, point: Point, window: Window | None, warm: bool) -> Path:
        name = f"{point.index:03d}" if window is None else f"{point.index:03d}-{window.number:03d}"
        values = self.workflow(point, window).resolved()
        return self.folder.write_workflow(name, _without_base(values) if warm else values)


def _without_base(values: dict[str, Any]) -> dict[str, Any]:
    """A workflow without its other sources of initial weights, for a run that starts from those of another run."""
    task = values["task"]
    task.pop("pretrain", None)
    task["model"].get("kwargs", {}).pop("model_path", None)
    return values


class _Numbers:
    """The number of the first run of each point. Points are numbered in the order of their index."""

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}

    def start(self, index: int, count: int) -> int:
        """The number of the first run of point `index`, which has `count` runs."""
        self._counts.setdefault(index, count)
        # Points that have not been planned yet are those of a search, which all have the same number of runs.
        return sum(self._counts.get(earlier, count) for earlier in range(index))


def _texts(segments: Segments) -> dict[str, list[str | None]]:
    return {name: [None if end is None else date_text(end) for end in ends] for name, ends in segments.items()}
