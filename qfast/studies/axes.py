"""The axes of a study: seeds, a grid, rolling windows and a search, from the command line or from Python."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qfast.errors import ConfigError, shown
from qfast.studies.problems import Problems
from qfast.workflow.yaml_text import InvalidYaml, parse_yaml

__all__ = ["Axes", "AxisArguments", "Point", "Rolling", "grid_of", "seeds_of", "set_text"]

MOST_SEED = 2**32 - 1  # of NumPy's generator


@dataclass(frozen=True)
class AxisArguments:
    """The arguments of `qfast.study` that describe its axes, unchecked and with the same names."""

    seeds: int | str | Sequence[int] | None = None
    grid: Mapping[str, Sequence[Any]] | Sequence[str] = ()
    search: Mapping[str, Any] | str | os.PathLike[str] | None = None
    trials: int | None = None
    rolling: int | None = None
    expanding: bool = False
    warm_start: bool = False
    label_days: int | None = None

    def options(self) -> list[str]:
        """The command-line options that have been passed, without --trials."""
        passed = [name for name, value in vars(self).items() if value not in (None, (), [], {}, False)]
        return [f"--{name.replace('_', '-')}" for name in passed if name != "trials"]


@dataclass(frozen=True)
class Rolling:
    """Rolling windows: each window is tested on the `step` days after the previous one.

    Attributes
    ----------
    step : int
        Trading days of a test segment.
    expanding : bool
        The training segment always begins on its first day, as in Qlib's `Rolling`. False: all segments slide.
    warm_start : bool
        Each window begins with the weights of the previous one.
    label_days : int or None
        Number of later days that the label reads. None: as its expression does.
    """

    step: int
    expanding: bool = False
    warm_start: bool = False
    label_days: int | None = None


@dataclass(frozen=True)
class Point:
    """One combination of values of the workflow's keys.

    Attributes
    ----------
    index : int
        Position in the study, from 0.
    values : dict
        Key of the workflow -> value.
    trial : int or None
        Number of the trial of a search.
    """

    index: int
    values: Mapping[str, Any] = field(default_factory=dict, hash=False)
    trial: int | None = None

    def sets(self) -> list[str]:
        """The values as changes for `--set`."""
        return [set_text(key, value) for key, value in self.values.items()]


@dataclass(frozen=True)
class Axes:
    """The axes of a study, which multiply.

    Attributes
    ----------
    seeds : tuple of int
    grid : dict
        Key of the workflow -> values.
    rolling : Rolling or None
    search : dict or None
        A checked search file, see `qfast.studies.search`.
    trials : int
        Trials of the search, for each point of the grid.
    """

    seeds: tuple[int, ...] = (0,)
    grid: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    rolling: Rolling | None = None
    search: Mapping[str, Any] | None = None
    trials: int = 0

    def grid_points(self) -> list[dict[str, Any]]:
        """All combinations of the grid's values; one without values if there is no grid.

        Examples
        --------
        >>> Axes(grid={"a": (1, 2), "b": (3,)}).grid_points()
        [{'a': 1, 'b': 3}, {'a': 2, 'b': 3}]
        """
        return [dict(zip(self.grid, values, strict=True)) for values in itertools.product(*self.grid.values())]

    def facts(self) -> dict[str, Any]:
        """The axes as plain data."""
        rolling = None if self.rolling is None else dict(vars(self.rolling))
        return {
            "seeds": list(self.seeds),
            "grid": {key: list(values) for key, values in self.grid.items()},
            "rolling": rolling,
            "search": None if self.search is None else dict(self.search),
            "trials": self.trials,
        }

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> Axes:
        """The axes whose `facts` these are."""
        return cls(
            seeds=tuple(facts["seeds"]),
            grid={key: tuple(values) for key, values in facts["grid"].items()},
            rolling=None if facts["rolling"] is None else Rolling(**facts["rolling"]),
            search=facts["search"],
            trials=facts["trials"],
        )


def set_text(key: str, value: object) -> str:
    """A change of one key as text for `--set`. JSON is YAML, so the value is read as it was.

    >>> set_text("task.model.kwargs.lr", 1e-3)
    'task.model.kwargs.lr=0.001'
    """
    return f"{key}={json.dumps(value, default=str)}"


def seeds_of(seeds: int | str | Sequence[int] | None, first: int, problems: Problems) -> tuple[int, ...]:
    """The seeds of a study.

    Parameters
    ----------
    seeds : int, str, sequence of int, or None
        A number N: `first`, `first` + 1, ..., `first` + N - 1. A list, or text such as "3,5": these seeds. None:
        `first` only.
    first : int
    problems : Problems
        Receives duplicate seeds and seeds that are not whole numbers.

    Examples
    --------
    >>> seeds_of(3, 10, Problems()), seeds_of("4,9", 0, Problems())
    ((10, 11, 12), (4, 9))
    """
    listed: list[Any]
    if isinstance(seeds, str) and "," not in seeds:
        seeds = _whole(seeds) if _whole(seeds) is not None else [seeds]  # type: ignore[list-item]
    if seeds is None or isinstance(seeds, int):
        count = 1 if seeds is None else seeds
        if isinstance(seeds, bool) or count < 1:
            problems.add("--seeds", f"the number of seeds must be at least 1, got {seeds!r}")
            return (first,)
        listed = list(range(first, first + count))
    elif isinstance(seeds, str):
        listed = [part.strip() for part in seeds.split(",") if part.strip()]
    else:
        listed = list(seeds)
    numbers = [_whole(seed) for seed in listed]
    valid = [number for number in numbers if number is not None and 0 <= number <= MOST_SEED]
    wrong = [seed for seed, number in zip(listed, numbers, strict=True) if number not in valid]
    if wrong or not listed:
        problems.add("--seeds", f"seeds must be whole numbers from 0 to {MOST_SEED}, got {shown(wrong or listed)}")
        return (first,)
    for seed in dict.fromkeys(seed for seed in valid if valid.count(seed) > 1):
        problems.add("--seeds", f"the seed {seed} occurs {valid.count(seed)} times; each seed may occur once")
    return tuple(dict.fromkeys(valid))


def _whole(value: object) -> int | None:
    """The value as a whole number; None if it is not one."""
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        return None
    try:
        return int(value)
    except ValueError:
        return None


def grid_of(grid: Mapping[str, Sequence[Any]] | Sequence[str], problems: Problems) -> dict[str, tuple[Any, ...]]:
    """The grid of a study.

    Parameters
    ----------
    grid : mapping or sequence of str
        Key of the workflow -> values, or texts "KEY=V1,V2" with values in YAML.
    problems : Problems
        Receives texts in another form, keys that occur twice, and keys without values or with equal values.

    Examples
    --------
    >>> grid_of(["a.lr=1e-3,1e-2", "a.metric=loss"], Problems())
    {'a.lr': (0.001, 0.01), 'a.metric': ('loss',)}
    """
    result: dict[str, tuple[Any, ...]] = {}
    for key, values in _pairs(grid, problems):
        texts = [json.dumps(value, sort_keys=True, default=str) for value in values]
        if key in result:
            problems.add(f"--grid {key}", "the key occurs twice. Remedy: list all its values once")
        elif not values:
            problems.add(f"--grid {key}", "there are no values, for example task.model.kwargs.lr=1e-3,1e-2")
        elif len(set(texts)) < len(texts):
            twice = next(value for value, text in zip(values, texts, strict=True) if texts.count(text) > 1)
            problems.add(f"--grid {key}", f"the value {twice!r} occurs twice")
        else:
            result[key] = tuple(json.loads(text) for text in texts)  # as study.json stores them: dates are text
    return result


def _pairs(grid: Mapping[str, Sequence[Any]] | Sequence[str], problems: Problems) -> Iterator[tuple[str, list[Any]]]:
    if isinstance(grid, Mapping):
        for key, values in grid.items():
            if isinstance(values, str) or not isinstance(values, Sequence):
                problems.add(f"--grid {key}", f"the values must be a list, got {shown(values)}")
            else:
                yield key, list(values)
        return
    for text in grid:
        key, equals, values_text = text.partition("=")
        try:
            if not equals or not key.strip():
                raise ConfigError("expected KEY=V1,V2, for example task.model.kwargs.lr=1e-3,1e-2")
            yield key.strip(), parse_yaml(f"[{values_text}]").values
        except InvalidYaml as error:
            problems.add(f"--grid {key.strip()}", f"the values {values_text!r} are {error}")
        except ConfigError as error:
            problems.add(f"--grid {text!r}", str(error))
