"""Changes to a workflow file from the command line: `--set task.model.kwargs.n_epochs=5`."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from qfast.errors import ConfigError, nearest

__all__ = ["BASE_KEY", "TOP_LEVEL", "AliasGroups", "KeyPath", "apply_set", "path_text", "yaml_problem", "yaml_reader"]

Key = str | int
KeyPath = tuple[Key, ...]
AliasGroups = list[list[KeyPath]]
BASE_KEY = "BASE_CONFIG_PATH"
TOP_LEVEL = ("qlib_init", "task", "experiment_name", "market", "benchmark", "sys", BASE_KEY)
# Mappings that may take keys which are not there yet; what is put in is checked against the schema later.
OPEN_MAPPINGS = ("kwargs", "qlib_init", "segments", "task", "pretrain")


def apply_set(config: dict[str, Any], text: str, groups: AliasGroups | None = None) -> None:
    """Change `config` in place by one `"a.b.0.c=value"`.

    Parameters
    ----------
    config : dict
        Plain data.
    text : str
        Path of keys and list positions separated by dots, then "=", then a YAML value ("1e-3" is a
        number, "[2015-01-01, 2016-12-31]" a list of dates, an empty text null).
    groups : list of lists of paths, optional
        Paths that stood for one YAML anchor: when one is set, all of them are.

    Raises
    ------
    ConfigError
        No "=", a value that is not YAML, or a path that does not exist; the message names the nearest
        one. A new last key is accepted where keys are free (kwargs, qlib_init, segments, task).

    Examples
    --------
    >>> config = {"segments": {"train": [2008, 2014]}}
    >>> apply_set(config, "segments.train.1=2015"); config
    {'segments': {'train': [2008, 2015]}}
    """
    name, equals, value_text = text.partition("=")
    name = name.strip()
    if not equals or not name:
        raise ConfigError(f"--set {text!r}: expected key=value, for instance task.model.kwargs.n_epochs=5.")
    try:
        value = yaml_reader().load(value_text)
    except YAMLError as error:
        raise ConfigError(f"--set {name}: the value {value_text!r} is {yaml_problem(error)}") from None
    path = _resolve(config, name)
    together = [group for group in groups or [] if path in group]
    for target in {path, *(p for group in together for p in group)}:
        _assign(config, target, value)


def yaml_reader() -> YAML:
    return YAML(typ="safe", pure=True)  # the pure parser is the YAML 1.2 one


def yaml_problem(error: YAMLError) -> str:
    if not isinstance(error, MarkedYAMLError):
        return str(error)
    mark = error.problem_mark or error.context_mark
    where = "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: "
    parts = [str(part).strip().splitlines()[0] for part in (error.context, error.problem) if part]
    return f"not YAML: {where}{', '.join(parts)}"


def path_text(path: Iterable[Key]) -> str:
    return ".".join(str(key) for key in path)


def _resolve(config: Any, name: str) -> KeyPath:
    """The keys of a dotted path that exists in `config` (its last key may be new where keys are free)."""
    parts = name.split(".")
    found: Any = config
    path: KeyPath = ()
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        if isinstance(found, list):
            if not re.fullmatch(r"\d+", part) or int(part) >= len(found):
                raise ConfigError(
                    f"--set {name}: {path_text(path)!r} is a list of {len(found)}, so the next part must be a "
                    f"position from 0 to {len(found) - 1}, got {part!r}."
                )
            key: Key = int(part)
        elif not isinstance(found, dict):
            raise ConfigError(f"--set {name}: {path_text(path)!r} is the value {found!r} and has nothing below it.")
        elif part not in found and not last and _begins_mapping(path, part, found):
            found[part] = {}
            key = part
        elif part not in found and not (last and _is_open(path, part)):
            raise ConfigError(f"--set {name}: {_unknown(config, found, path, part, name)}")
        else:
            key = part
        path = (*path, key)
        found = found.get(key) if isinstance(found, dict) else found[int(key)]
    return path


def _begins_mapping(path: KeyPath, part: str, found: Mapping[str, Any]) -> bool:
    """True for a mapping that may be left out of a file and still be given values in."""
    return (part == "kwargs" and "class" in found) or (part == "pretrain" and path == ("task",))


def _is_open(path: KeyPath, part: str) -> bool:
    return part in TOP_LEVEL if not path else path[-1] in OPEN_MAPPINGS


def _unknown(config: Any, found: dict[str, Any], path: KeyPath, part: str, name: str) -> str:
    where = f"at {path_text(path)!r}" if path else "at the top level"
    message = f"there is no {part!r} {where}; known there: {sorted(map(str, found))}."
    right = nearest(part, found)
    if right is not None:
        return f"{message} Did you mean {path_text((*path, right))!r}?"
    paths = [path_text(p) for p in _all_paths(config, ())]
    same_end = sorted(
        (p for p in paths if p.split(".")[-1] == name.split(".")[-1]), key=lambda p: not p.startswith("task.")
    )
    likely = same_end[0] if same_end else nearest(name, paths, cutoff=0.5)
    return message if likely is None else f"{message} Did you mean {likely!r}?"


def _all_paths(item: Any, path: KeyPath) -> Iterator[KeyPath]:
    pairs = item.items() if isinstance(item, dict) else enumerate(item) if isinstance(item, list) else ()
    for key, value in pairs:
        yield (*path, key)
        yield from _all_paths(value, (*path, key))


def _assign(config: Any, path: KeyPath, value: Any) -> None:
    """Put a copy of `value` at `path`; nothing if an earlier --set replaced what lay on the way there."""
    found = config
    try:
        for key in path[:-1]:
            found = found[key]
        found[path[-1]] = copy.deepcopy(value)
    except (KeyError, IndexError, TypeError):
        return
