"""Everything that is refused before a study runs, reported in one error."""

from __future__ import annotations

import importlib.util
import re
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from qfast import registry
from qfast.device import choose_device
from qfast.errors import ConfigError, QfastError, suggest
from qfast.studies.axes import Axes, AxisArguments, Point, Rolling, grid_of, seeds_of
from qfast.studies.plan import point_workflow
from qfast.studies.problems import Problems
from qfast.workflow import pretraining, resumption, starting
from qfast.workflow.config import load_config
from qfast.workflow.dataset import DataInput, require_data
from qfast.workflow.overrides import AliasGroups, similar_path
from qfast.workflow.schema import Workflow
from qfast.workflow.validation import check_workflow

__all__ = ["CheckedStudy", "EngineArguments", "check_engine", "check_study"]

ENGINES = ("local", "ray", "inline")
CONNECT_SECONDS = 10.0


@dataclass(frozen=True)
class CheckedStudy:
    """A study whose arguments are valid.

    Attributes
    ----------
    values : dict
        The resolved workflow.
    aliases : list of lists of paths
    axes : Axes
    """

    values: dict[str, Any]
    aliases: AliasGroups
    axes: Axes


def check_study(
    config: Path,
    data: DataInput | None,
    sets: Sequence[str],
    device: str | None,
    arguments: AxisArguments,
    problems: Problems,
) -> CheckedStudy:
    """Check the workflow and the axes of a new study; arguments as in `qfast.study`.

    Raises
    ------
    ConfigError
        One message with all problems.
    """
    workflow, aliases = _base(config, sets, problems)
    axes = Axes(
        seeds=seeds_of(arguments.seeds, _first_seed(workflow), problems),
        grid=grid_of(arguments.grid, problems),
        rolling=_rolling(arguments, problems),
        **_search(arguments, workflow, problems),
    )
    if device is not None:
        _attempt(problems, "--device", lambda: choose_device(device, 0))
    if workflow is None:
        problems.check()
        raise AssertionError("an invalid workflow is a problem")
    _attempt(problems, "--data", lambda: require_data(data, workflow))
    values = workflow.resolved()
    _check_points(values, aliases, axes, problems)
    if axes.rolling is not None:
        _check_rolling(workflow, axes, problems)
    problems.check()
    return CheckedStudy(values, aliases, axes)


@dataclass(frozen=True)
class EngineArguments:
    """The arguments of `qfast.study` that describe its engine, unchecked and with the same names."""

    on: str = "local"
    jobs: int | None = None
    threads: int = 1
    gpus: float | None = None


def check_engine(arguments: EngineArguments, problems: Problems) -> None:
    """Check the arguments of the engine."""
    on = arguments.on
    name = on.partition("://")[0]
    if name not in ENGINES or ("://" in on and name != "ray"):
        problems.add("--on", f"expected local or ray[://ADDRESS], got {on!r}.{suggest(name, ENGINES)}")
    if name == "ray" and importlib.util.find_spec("ray") is None:
        problems.add("--on", "ray is not installed. Remedy: pip install 'qfast-models[ray]'")
    elif name == "ray" and "://" in on:
        _check_address(on, problems)
    if arguments.gpus is not None and (name != "ray" or arguments.gpus < 0):
        problems.add("--gpus", f"is a number of at least 0 for --on ray, got {arguments.gpus} with --on {on}")
    for option, value in (("--jobs", arguments.jobs), ("--threads", arguments.threads)):
        if value is not None and value < 1:
            problems.add(option, f"must be at least 1, got {value}")


def _check_address(on: str, problems: Problems) -> None:
    """Connect to the address once, because Ray itself tries for minutes."""
    host, _, port = on.partition("://")[2].rpartition(":")
    if not host or not port.isdigit():
        problems.add("--on", f"expected ray://HOST:PORT, got {on!r}")
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        problems.add(
            "--on",
            f"no Ray cluster answers at {host}:{port} ({error}). Remedy: the address of a running head node (port "
            "6379) or of Ray Client (port 10001), or --on ray for this machine",
        )


# ---------------------------------------------------------------- the workflow
def _base(config: Path, sets: Sequence[str], problems: Problems) -> tuple[Workflow | None, AliasGroups]:
    """The checked workflow of the study, with absolute paths; None if it is invalid."""
    try:
        loaded = load_config(config, sets)
        workflow = check_workflow(loaded.values, str(config))
        pretraining.absolute_model_path(workflow.task.model, config)
        starting.absolute_origin(workflow, config)
        resumption.locate_sources(workflow, config)
    except ConfigError as error:
        _add_all(problems, str(config), error)
        return None, []
    return workflow, loaded.aliases


def _add_all(problems: Problems, place: str, error: ConfigError) -> None:
    """Add each problem of an error that lists several."""
    first, *lines = str(error).splitlines()
    for line in lines:
        where, _, text = line.strip().partition(": ")
        problems.add(where, text)
    if not lines:
        problems.add(place, first.removeprefix(f"{place}: ").removeprefix("--set "))


def _attempt(problems: Problems, place: str, check: Any) -> None:
    try:
        check()
    except QfastError as error:
        problems.add(place, str(error).removeprefix(f"{place}: "))


def _first_seed(workflow: Workflow | None) -> int:
    """The seed of the workflow, or 0."""
    seed = None if workflow is None else workflow.task.model.kwargs.get("seed")
    return seed if isinstance(seed, int) and seed >= 0 else 0


# ---------------------------------------------------------------- grid
def _check_points(values: Mapping[str, Any], aliases: AliasGroups, axes: Axes, problems: Problems) -> None:
    """Check each value of the grid alone, and then all combinations."""
    before = len(problems.items)
    for key, candidates in axes.grid.items():
        if not _is_known(values, key):
            problems.add(f"--grid {key}", _unknown_key(values, key))
            continue
        for value in candidates:
            _check_point(values, aliases, Point(0, {key: value}), f"--grid {key}", problems)
    if len(axes.grid) > 1 and len(problems.items) == before:
        for combination in axes.grid_points():
            _check_point(values, aliases, Point(0, combination), f"--grid {combination}", problems)
    elif not axes.grid:
        _check_point(values, aliases, Point(0), "task.model", problems)


def _is_known(values: Mapping[str, Any], key: str) -> bool:
    """True for an item of the workflow, and for an argument of a class, whose name the class checks."""
    item: Any = values
    parts = key.split(".")
    for depth, part in enumerate(parts):
        if isinstance(item, Mapping) and part in item:
            item = item[part]
        elif isinstance(item, Sequence) and not isinstance(item, str) and part.isdigit() and int(part) < len(item):
            item = item[int(part)]
        else:
            return depth == len(parts) - 1 and depth > 0 and parts[depth - 1] == "kwargs"
    return True


def _unknown_key(values: Mapping[str, Any], key: str) -> str:
    """Why a key is unknown, with the most similar key."""
    similar = similar_path(values, key)
    return f"the workflow does not contain this key.{'' if similar is None else f' Did you mean {similar!r}?'}"


def _check_point(values: Mapping[str, Any], aliases: AliasGroups, point: Point, place: str, problems: Problems) -> None:
    """Check the workflow of a point and build its model."""
    try:
        workflow = point_workflow(values, aliases, point.sets(), place)
        spec = pretraining.without_lost_file(workflow.task.model.description())
        arguments = {**spec.get("kwargs", {}), "device": "cpu"}
        model = registry.MODELS.build({**spec, "kwargs": arguments}, path="task.model")
        starting.starting_weights(workflow, model, None)
    except QfastError as error:
        lines = str(error).splitlines()
        for line in lines[1:] or lines:
            problems.add(place, re.sub(r"^--set ", "", line.strip()).removeprefix(f"{place.removeprefix('--grid ')}: "))


# ---------------------------------------------------------------- rolling and search
def _rolling(arguments: AxisArguments, problems: Problems) -> Rolling | None:
    step, label_days = arguments.rolling, arguments.label_days
    if step is None:
        for option in arguments.options():
            if option in ("--expanding", "--warm-start", "--label-days"):
                problems.add(option, "needs --rolling STEP")
        return None
    if step < 1:
        problems.add("--rolling", f"the step must be at least 1 day, got {step}")
    if label_days is not None and label_days < 0:
        problems.add("--label-days", f"must be at least 0, got {label_days}")
    return Rolling(step, arguments.expanding, arguments.warm_start, label_days)


def _check_rolling(workflow: Workflow, axes: Axes, problems: Problems) -> None:
    """Check what is known without the data; the calendar shows the exact number of days later."""
    segments = workflow.task.dataset.kwargs.segments
    step = 1 if axes.rolling is None else axes.rolling.step
    if "test" not in segments:
        problems.add("--rolling", f"there is no segment 'test', only {list(segments)}.{suggest('test', segments)}")
        return
    start, end = segments["test"]
    if start is None:
        problems.add("--rolling", "the segment 'test' has no start. Remedy: the first day to test on")
    elif end is not None and (days := (pd.Timestamp(end) - pd.Timestamp(start)).days + 1) < step:
        problems.add("--rolling", f"the step is {step} days, but the segment 'test' ({start} to {end}) has {days}")
    for key in (axes.search or {}).get("space", {}):
        if key.startswith("task.dataset"):
            problems.add("--search", f"{key} would change the rolling windows. Remedy: --grid {key}")


def _search(arguments: AxisArguments, workflow: Workflow | None, problems: Problems) -> dict[str, Any]:
    """The search and trials of the axes."""
    search, trials = arguments.search, arguments.trials
    if search is None:
        if trials is not None:
            problems.add("--trials", f"needs --search FILE, got {trials} trials and no search")
        return {}
    from qfast.studies.search_space import check_search

    if trials is None:
        problems.add("--trials", "a search needs a number of trials, for example --trials 100")
    elif trials < 1:
        problems.add("--trials", f"must be at least 1, got {trials}")
    checked = check_search(search if isinstance(search, Mapping) else Path(search), workflow, problems)
    return {"search": checked, "trials": trials or 0}
