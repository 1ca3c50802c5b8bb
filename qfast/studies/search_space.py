"""The YAML file of a search, checked without Optuna being imported: space, objective, sampler, pruner, storage."""

from __future__ import annotations

import contextlib
import importlib.util
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qfast.errors import ConfigError, QfastError, shown, suggest
from qfast.studies.problems import Problems
from qfast.workflow.overrides import similar_path
from qfast.workflow.schema import Workflow
from qfast.workflow.yaml_text import InvalidYaml, parse_yaml

__all__ = ["DEFAULT_OBJECTIVE", "check_search"]

DEFAULT_OBJECTIVE = "valid.rank_ic"
KEYS = ("space", "objective", "direction", "sampler", "pruner", "storage")
METRICS = [
    *("ic", "icir", "rank_ic", "rank_icir", "score"),
    *("long_short_ann_return", "long_short_ann_sharpe", "long_avg_ann_return", "long_avg_ann_sharpe"),
]
DIRECTIONS = ("maximize", "minimize")
STORAGES = ("sqlite", "journal")
PARAMETERS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {  # type -> (required, optional) arguments
    "float": (("low", "high"), ("step", "log")),
    "int": (("low", "high"), ("step", "log")),
    "categorical": (("choices",), ()),
}


def check_search(
    search: Mapping[str, Any] | Path, workflow: Workflow | None, problems: Problems
) -> dict[str, Any] | None:
    """The content of a search file with its defaults.

    Parameters
    ----------
    search : mapping or Path
        "space": key of the workflow -> {type: float, int or categorical, and the arguments of Optuna's suggest_float,
        suggest_int or suggest_categorical}. "objective": segment and metric, default valid.rank_ic. "direction":
        maximize or minimize. "sampler", "pruner": name of a class of optuna.samplers or optuna.pruners, or {class,
        kwargs}. "storage": sqlite or journal.
    workflow : Workflow or None
        The workflow of the study, if it is valid.
    problems : Problems

    Returns
    -------
    dict or None
        None if the file cannot be read.
    """
    values = search if isinstance(search, Mapping) else _read(search, problems)
    if values is None:
        return None
    if not isinstance(values, Mapping):
        problems.add("--search", f"expected a mapping with the keys {list(KEYS)}, got {shown(values)}")
        return None
    for key in values:
        if key not in KEYS:
            problems.add("--search", f"unknown key {key!r}; allowed: {list(KEYS)}.{suggest(key, KEYS)}")
    result = {
        "space": _space(values.get("space"), workflow, problems),
        "objective": _objective(values.get("objective", DEFAULT_OBJECTIVE), workflow, problems),
        "direction": _one_of("direction", values.get("direction", "maximize"), DIRECTIONS, problems),
        "sampler": _class("sampler", values.get("sampler", "TPESampler"), problems),
        "pruner": None if values.get("pruner") is None else _class("pruner", values["pruner"], problems),
        "storage": _one_of("storage", values.get("storage", "sqlite"), STORAGES, problems),
    }
    if importlib.util.find_spec("optuna") is None:
        problems.add("--search", "optuna is not installed. Remedy: pip install 'qfast-models[tune]'")
    elif not problems.items:
        _check_classes(result, problems)
    return result


def _read(file: Path, problems: Problems) -> Any:
    try:
        return parse_yaml(file.read_text(encoding="utf-8")).values or {}
    except FileNotFoundError:
        problems.add("--search", f"{str(file)!r} does not exist (looked in {Path.cwd()})")
    except (OSError, UnicodeDecodeError) as error:
        problems.add("--search", f"{str(file)!r} cannot be read: {error}")
    except InvalidYaml as error:
        problems.add("--search", f"{file}: {error}")
    return None


def _one_of(name: str, value: object, allowed: tuple[str, ...], problems: Problems) -> str:
    if value not in allowed:
        problems.add("--search", f"{name} must be one of {list(allowed)}, got {value!r}.{suggest(value, allowed)}")
    return str(value)


def _class(name: str, value: object, problems: Problems) -> dict[str, Any]:
    """The description {class, kwargs} of a sampler or pruner."""
    spec = {"class": value} if isinstance(value, str) else value
    if not isinstance(spec, Mapping) or not isinstance(spec.get("class"), str) or set(spec) - {"class", "kwargs"}:
        problems.add("--search", f"{name} must be the name of a class, or a mapping of class and kwargs, got {value!r}")
        return {}
    kwargs = spec.get("kwargs") or {}
    if not isinstance(kwargs, Mapping):
        problems.add("--search", f"{name}.kwargs must be a mapping, got {kwargs!r}")
        return {}
    return {"class": spec["class"], "kwargs": dict(kwargs)}


def _objective(value: object, workflow: Workflow | None, problems: Problems) -> str:
    segments = () if workflow is None else tuple(workflow.task.dataset.kwargs.segments)
    segment, _, metric = str(value).partition(".")
    if not isinstance(value, str) or not segment or not metric:
        problems.add("--search", f"objective must be a segment and a metric such as valid.rank_ic, got {value!r}")
    elif segment != "1day" and metric not in METRICS:
        problems.add("--search", f"objective {value}: the metric must be one of {METRICS}.{suggest(metric, METRICS)}")
    elif workflow is not None and segment not in segments and segment != "1day":
        problems.add(
            "--search",
            f"the objective {value} needs a segment {segment!r}, but the workflow has only {list(segments)}."
            f"{suggest(segment, segments)}",
        )
    return str(value)


def _space(space: object, workflow: Workflow | None, problems: Problems) -> dict[str, Any]:
    if not isinstance(space, Mapping) or not space:
        problems.add(
            "--search",
            f"space must name at least one key, such as task.model.kwargs.lr: {{type: float, low: 1e-4, high: 1e-2, "
            f"log: true}}; got {shown(space)}",
        )
        return {}
    for key, spec in space.items():
        text = _parameter_problem(spec)
        if text is not None:
            problems.add(f"--search {key}", text)
        elif workflow is not None:
            _check_key(str(key), spec, workflow, problems)
    return {str(key): dict(spec) if isinstance(spec, Mapping) else spec for key, spec in space.items()}


def _parameter_problem(spec: object) -> str | None:
    """What is wrong with the range of one key; None if nothing is."""
    if not isinstance(spec, Mapping) or spec.get("type") not in PARAMETERS:
        kind = spec.get("type") if isinstance(spec, Mapping) else spec
        return f"type must be one of {list(PARAMETERS)}, got {kind!r}.{suggest(kind, PARAMETERS)}"
    required, optional = PARAMETERS[str(spec["type"])]
    allowed = ("type", *required, *optional)
    for name in spec:
        if name not in allowed:
            return f"{spec['type']} has no argument {name!r}; allowed: {list(allowed[1:])}.{suggest(name, allowed)}"
    missing = [name for name in required if name not in spec]
    if missing:
        return f"{spec['type']} requires {' and '.join(missing)}, got {dict(spec)}"
    if spec["type"] == "categorical":
        choices = spec["choices"]
        good = (
            isinstance(choices, list) and choices and all(isinstance(c, (str, int, float, type(None))) for c in choices)
        )
        return None if good else f"choices must be a list of numbers, texts, booleans or null, got {shown(choices)}"
    return _range_problem(spec)


def _range_problem(spec: Mapping[str, Any]) -> str | None:
    numbers = {name: spec[name] for name in ("low", "high", "step") if spec.get(name) is not None}
    kinds = (int,) if spec["type"] == "int" else (int, float)
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, kinds) or not math.isfinite(value):
            return f"{name} must be {'a whole number' if kinds == (int,) else 'a number'}, got {value!r}"
    if numbers["low"] > numbers["high"]:
        return f"the range is empty: low {numbers['low']} is above high {numbers['high']}"
    if spec.get("log") and (numbers["low"] <= 0 or "step" in numbers):
        return f"log: true requires a positive low and no step, got {dict(spec)}"
    if "step" in numbers and numbers["step"] <= 0:
        return f"step must be positive, got {numbers['step']!r}"
    return None


def _check_key(key: str, spec: Mapping[str, Any], workflow: Workflow, problems: Problems) -> None:
    """Check that the workflow accepts the first and the last value of a range, or every choice."""
    from qfast.studies.axes import Point

    bounds = spec["choices"] if spec["type"] == "categorical" else (spec["low"], spec["high"])
    changes = [text for value in bounds for text in Point(0, {key: value}).sets()]
    values = workflow.resolved()
    text = next(filter(None, (_refusal(values, change) for change in changes)), None)
    if text is not None:
        similar = None if "Did you mean" in text else similar_path(values, key)
        hint = "" if similar in (None, key) else f" Did you mean {similar!r}?"
        problems.add(f"--search {key}", text.removeprefix(f"{key}: ") + hint)


def _refusal(values: Mapping[str, Any], change: str) -> str | None:
    """Why a workflow does not accept a change; None if it does."""
    from qfast.studies.plan import point_workflow

    try:
        point_workflow(values, [], [change], "--search")
    except QfastError as error:
        return str(error).splitlines()[-1].strip().removeprefix("--set ")
    return None


def _check_classes(search: Mapping[str, Any], problems: Problems) -> None:
    """Build the sampler and the pruner once."""
    from qfast.studies.search import build_pruner, build_sampler

    with _reported(problems, "sampler", search):
        build_sampler(search, 0)
    with _reported(problems, "pruner", search):
        build_pruner(search)


@contextlib.contextmanager
def _reported(problems: Problems, name: str, search: Mapping[str, Any]) -> Iterator[None]:
    """Add an exception of a constructor to the problems."""
    try:
        yield
    except ConfigError as error:
        problems.add("--search", str(error))
    except (TypeError, ValueError) as error:
        problems.add("--search", f"{name} {search[name]['class']}: {error}")
