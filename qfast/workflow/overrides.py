"""Changes to a workflow file from the command line: `--set task.model.kwargs.n_epochs=5`."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from qfast.errors import ConfigError, nearest, shown
from qfast.workflow.yaml_text import InvalidYaml, parse_yaml

__all__ = [
    "BASE_KEY",
    "DROP",
    "TOP_LEVEL",
    "AliasGroups",
    "KeyPath",
    "apply_set",
    "path_text",
    "similar_path",
]

Key = str | int
KeyPath = tuple[Key, ...]
AliasGroups = list[list[KeyPath]]
BASE_KEY = "BASE_CONFIG_PATH"
DROP = "__DROP__"
TOP_LEVEL = ("qlib_init", "task", "experiment_name", "market", "benchmark", "sys", BASE_KEY)
# Mappings that accept new keys. `qfast.workflow.validation` checks them later.
OPEN_MAPPINGS = ("kwargs", "qlib_init", "segments", "task", "pretrain")


def apply_set(config: dict[str, Any], text: str, groups: AliasGroups | None = None) -> None:
    """Apply one change `"a.b.0.c=value"` to `config`, in place.

    Parameters
    ----------
    config : dict
        Plain data.
    text : str
        A path of keys and list positions separated by dots, then "=", then a YAML value: "1e-3" is a number,
        "[2015-01-01, 2016-12-31]" is a list of dates, and empty text is null. "__DROP__" removes a key. It marks a
        list item, which `load_config` removes after all changes.
    groups : list of lists of paths, optional
        Groups of paths that are aliases of one YAML anchor. Setting one path sets its whole group.

    Raises
    ------
    ConfigError
        There is no "=", the value is not YAML, or the path does not exist. The message suggests the most similar path.
        New keys are accepted in kwargs, qlib_init, segments, task and pretrain, unless the value is "__DROP__". A base
        file cannot be changed.

    Examples
    --------
    >>> config = {"segments": {"train": [2008, 2014]}}
    >>> apply_set(config, "segments.train.1=2015"); config
    {'segments': {'train': [2008, 2015]}}
    """
    name, equals, value_text = text.partition("=")
    name = name.strip()
    if not equals or not name:
        raise ConfigError(f"--set {text!r}: expected key=value, for example task.model.kwargs.n_epochs=5.")
    try:
        value = parse_yaml(value_text).values
    except InvalidYaml as error:
        raise ConfigError(f"--set {name}: the value {shown(value_text)} is invalid: {error}.") from None
    if name == BASE_KEY:
        raise ConfigError(
            f"--set {text!r}: the base file is merged before the changes of --set. Remedy: edit {BASE_KEY} in the file."
        )
    path = _resolve(config, name, may_add=value != DROP)
    aliases = [alias for group in groups or [] if path in group for alias in group]
    for target in {path, *aliases}:
        _assign(config, target, value)


def path_text(path: Iterable[Key]) -> str:
    """Join a path with dots."""
    return ".".join(str(key) for key in path)


def _resolve(config: dict[str, Any], name: str, may_add: bool) -> KeyPath:
    """Split a dotted path into the keys of an existing item of `config`, or of a new key in an open mapping."""
    parts = name.split(".")
    value: Any = config
    path: KeyPath = ()
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        if isinstance(value, list):
            if not re.fullmatch(r"\d+", part) or int(part) >= len(value):
                raise ConfigError(
                    f"--set {name}: {path_text(path)!r} is a list of {len(value)}, so the next part must be a "
                    f"position from 0 to {len(value) - 1}, got {part!r}."
                )
            key: Key = int(part)
        elif not isinstance(value, dict):
            raise ConfigError(f"--set {name}: {path_text(path)!r} is the value {value!r}, which has no items.")
        elif may_add and part not in value and not last and _begins_mapping(path, part, value):
            value[part] = {}
            key = part
        elif part not in value and not (may_add and last and _is_open(path, part)):
            raise ConfigError(f"--set {name}: {_unknown(config, value, path, part, name)}")
        else:
            key = part
        path = (*path, key)
        value = value.get(key) if isinstance(value, dict) else value[int(key)]
    return path


def _begins_mapping(path: KeyPath, part: str, parent: Mapping[str, Any]) -> bool:
    """True for an optional mapping, which `--set` may create."""
    return (part == "kwargs" and "class" in parent) or (part == "pretrain" and path == ("task",))


def _is_open(path: KeyPath, part: str) -> bool:
    return part in TOP_LEVEL if not path else path[-1] in OPEN_MAPPINGS


def _unknown(config: dict[str, Any], parent: dict[str, Any], path: KeyPath, part: str, name: str) -> str:
    where = f"at {path_text(path)!r}" if path else "at the top level"
    message = f"there is no {part!r} {where}; known: {sorted(map(str, parent))}."
    similar = nearest(part, parent)
    if similar is not None:
        return f"{message} Did you mean {path_text((*path, similar))!r}?"
    likely = similar_path(config, name)
    return message if likely is None else f"{message} Did you mean {likely!r}?"


def similar_path(config: Mapping[str, Any], name: str) -> str | None:
    """The path in `config` that is most similar to the dotted path `name`; None if none is.

    >>> similar_path({"task": {"lr": 0.1}}, "lr")
    'task.lr'
    """
    paths = [path_text(p) for p in _all_paths(config, ())]
    same_end = sorted(
        (p for p in paths if p.split(".")[-1] == name.split(".")[-1]), key=lambda p: not p.startswith("task.")
    )
    return same_end[0] if same_end else nearest(name, paths, cutoff=0.5)


def _all_paths(item: object, path: KeyPath) -> Iterator[KeyPath]:
    pairs = item.items() if isinstance(item, dict) else enumerate(item) if isinstance(item, list) else ()
    for key, value in pairs:
        yield (*path, key)
        yield from _all_paths(value, (*path, key))


def _assign(config: dict[str, Any], path: KeyPath, value: object) -> None:
    """Store a copy of `value` at `path`, or remove the key for `__DROP__`.

    Does nothing if an earlier --set has replaced a parent of the path.
    """
    parent: Any = config
    try:
        for key in path[:-1]:
            parent = parent[key]
        if value == DROP and isinstance(parent, dict):
            del parent[path[-1]]
        else:
            parent[path[-1]] = copy.deepcopy(value)
    except (KeyError, IndexError, TypeError):
        return
