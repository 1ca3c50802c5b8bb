"""Read a workflow file in Qlib's YAML format: templates, base files and `--set`.

Jinja2 renders the text with environment variables. The result is parsed as YAML 1.2 (`lr: 1e-3` is a number, `yes` is a
string), merged over the file that `BASE_CONFIG_PATH` names, and changed by `--set key=value`. The output is plain data.
`qfast.workflow.validation` checks it. Nothing in it is imported or executed.
"""

from __future__ import annotations

import copy
import functools
import io
import logging
import os
import pickle
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qfast.errors import ConfigError
from qfast.workflow.folder import CONFIG, MANIFEST, RunFolder
from qfast.workflow.overrides import (
    BASE_KEY,
    DROP,
    TOP_LEVEL,
    AliasGroups,
    KeyPath,
    apply_set,
    path_text,
)
from qfast.workflow.template import render_template
from qfast.workflow.yaml_text import CACHED_TEXTS, MOST_CHARACTERS, InvalidYaml, parse_yaml, yaml_writer

__all__ = [
    "LoadedConfig",
    "apply_set",
    "deep_merge",
    "dump_yaml",
    "fill_placeholders",
    "is_run_config",
    "load_config",
    "run_folder_of",
]

log = logging.getLogger("qfast")


@dataclass(frozen=True)
class LoadedConfig:
    """A workflow file as plain data.

    Attributes
    ----------
    values : dict
        The content after rendering, merging and `--set`.
    path : Path
        The workflow file.
    aliases : list of lists of paths
        Groups of paths that are aliases of one YAML anchor, for `apply_set`.
    """

    values: dict[str, Any]
    path: Path
    aliases: AliasGroups = field(default_factory=list)


def is_run_config(path: str | os.PathLike[str]) -> bool:
    """True if a workflow file is the resolved configuration in a run folder."""
    return run_folder_of(path) is not None


def run_folder_of(path: str | os.PathLike[str]) -> RunFolder | None:
    """The run folder whose resolved configuration a workflow file is; None for any other file."""
    file = Path(path).absolute()
    if file.name != CONFIG or not (file.parent / MANIFEST).is_file():
        return None
    try:
        return RunFolder.open(file.parent)
    except ConfigError:  # another program's manifest
        return None


def load_config(path: str | os.PathLike[str], sets: Sequence[str] = ()) -> LoadedConfig:
    """Read a workflow file.

    Parameters
    ----------
    path : path
        A file in Qlib's YAML format. `{{ NAME }}` is replaced by the environment variable NAME, or by "x" if the
        template is `{{ NAME | default("x") }}` and NAME is not set. Templates can access nothing else.
        `BASE_CONFIG_PATH` names a base file that this file is merged over. It is searched in the working directory,
        then in the folder of the workflow file. Base files are not rendered and cannot have a base. The file in a run
        folder is resolved: it is neither rendered nor merged again, even if an earlier version of qfast has left
        `BASE_CONFIG_PATH` in it.
    sets : sequence of str
        Changes `"a.b.0.c=value"`, see `apply_set`. They are applied in order after the merge.

    Returns
    -------
    LoadedConfig
        Its values contain neither `BASE_CONFIG_PATH` nor `__DROP__`.

    Raises
    ------
    ConfigError
        The file does not exist, is not UTF-8 text, or is not a mapping; a template or YAML error (with line and
        column); a missing base file; or an invalid `--set`.

    Source: qlib/cli/run.py, qlib/utils/data.py (update_config).

    Examples
    --------
    >>> import tempfile; folder = tempfile.TemporaryDirectory()
    >>> file = Path(folder.name, "a.yaml"); _ = file.write_text("task: {model: {kwargs: {lr: 1e-3}}}")
    >>> load_config(file, ["task.model.kwargs.lr=2e-3"]).values
    {'task': {'model': {'kwargs': {'lr': 0.002}}}}
    """
    file = Path(path)
    text, resolved = _read_text(file, "workflow file"), is_run_config(file)
    values, groups = _read_yaml(text if resolved else render_template(text, file), file)
    base_name = values.pop(BASE_KEY, None)
    if base_name is not None and resolved:
        log.info("%s already contains the values of %s %r; it is not merged again", file, BASE_KEY, base_name)
    elif base_name is not None:
        base_file = _find_base(base_name, file)
        base, base_groups = _read_base(base_file, file)
        log.info("%s: merged over %s", file, base_file)
        groups = groups + [_not_overridden(group, values) for group in base_groups]
        values = deep_merge(base, values)
    for change in sets:
        apply_set(values, change, groups)
    return LoadedConfig(_without_dropped(values), file, groups)


def deep_merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Merge `over` into a copy of `base`. Mappings are merged by key, and all other values are replaced.

    The value `__DROP__` removes a key. Aliases of one YAML anchor in `base` remain one object in the result, except
    along the keys that `over` changes.

    Parameters
    ----------
    base, over : mapping
        Not modified.

    Examples
    --------
    >>> deep_merge({"a": {"x": 1, "y": 2}, "b": 3}, {"a": {"x": 9, "y": "__DROP__"}})
    {'a': {'x': 9}, 'b': 3}
    """
    merged = copy.deepcopy(dict(base))
    for key, value in over.items():
        if isinstance(value, str) and value == DROP:
            merged.pop(key, None)
        elif isinstance(merged.get(key), dict) and isinstance(value, dict):
            merged[key] = deep_merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def fill_placeholders(item: object, objects: Mapping[str, object], config: Mapping[str, object]) -> Any:
    """Copy plain data with placeholder strings replaced.

    A string equal to a key of `objects` is replaced by that object. A string that begins with "<a.b.0>" is replaced by
    that item of `config`. If there is no such item, the string is unchanged and a message is logged. Placeholders at
    other positions of a string are not replaced.

    Parameters
    ----------
    item : dict, list, str or any other value
        Not modified.
    objects : mapping
        Values of "<MODEL>", "<DATASET>" and "<PRED>".
    config : mapping

    Source: qlib/utils/__init__.py, fill_placeholder.

    Examples
    --------
    >>> fill_placeholders({"model": "<MODEL>", "from": "<s.0>"}, {"<MODEL>": 7}, {"s": [1, 2]})
    {'model': 7, 'from': 1}
    """
    if isinstance(item, dict):
        return {key: fill_placeholders(value, objects, config) for key, value in item.items()}
    if isinstance(item, list):
        return [fill_placeholders(value, objects, config) for value in item]
    if not isinstance(item, str):
        return item
    if item in objects:
        return objects[item]
    match = re.match(r"<([^<>]+)>", item)
    if match is None:
        return item
    value: Any = config
    try:
        for part in match[1].split("."):
            value = value[int(part)] if isinstance(value, list) else value[part]
    except (KeyError, ValueError, IndexError, TypeError):
        log.info("%s looks like a placeholder, but the configuration has no such item; it is not replaced", item)
        return item
    return value


def dump_yaml(values: object) -> str:
    """Format plain data as YAML text without anchors, in its order.

    Examples
    --------
    >>> dump_yaml({"task": {"lr": 0.001}})
    'task:\\n  lr: 0.001\\n'
    """
    return _yaml_text(pickle.dumps(values))


@functools.lru_cache(maxsize=CACHED_TEXTS)
def _yaml_text(pickled: bytes) -> str:
    """The text of a pickled value, because a cache needs keys that can be hashed and dictionaries cannot.

    A run writes its workflow three times, and the runs of a study share one.
    """
    yaml = yaml_writer()
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.representer.ignore_aliases = lambda *_: True
    out = io.StringIO()
    yaml.dump(pickle.loads(pickled), out)
    return out.getvalue()


def _without_dropped(item: Any) -> Any:
    """Plain data without the keys and list items whose value is `__DROP__`."""
    if isinstance(item, dict):
        return {key: _without_dropped(value) for key, value in item.items() if value != DROP}
    if isinstance(item, list):
        return [_without_dropped(value) for value in item if value != DROP]
    return item


def _read_text(file: Path, what: str) -> str:
    try:
        if file.stat().st_size > 4 * MOST_CHARACTERS:  # a character has at most 4 bytes
            raise ConfigError(
                f"{what} {str(file)!r} has {file.stat().st_size} bytes; at most {MOST_CHARACTERS} characters are "
                "allowed."
            )
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{what} {str(file)!r} does not exist (looked in {Path.cwd()}).") from None
    except IsADirectoryError:
        raise ConfigError(f"{what} {str(file)!r} is a folder. Remedy: pass the YAML file.") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{what} {str(file)!r} is not UTF-8 text: {error}") from None
    except OSError as error:
        raise ConfigError(f"{what} {str(file)!r} cannot be read: {error.strerror}") from None


def _read_yaml(text: str, file: Path) -> tuple[dict[str, Any], AliasGroups]:
    """Parse `text`; return its plain data and the groups of paths that are aliases of one anchor."""
    try:
        values, node = parse_yaml(text)
    except InvalidYaml as error:
        raise ConfigError(f"{file}: {error}.") from None
    if not isinstance(values, dict):
        kind = "empty" if values is None else f"a {type(values).__name__}"
        raise ConfigError(
            f"{file}: a workflow file must be a mapping with the keys {list(TOP_LEVEL[:2])}; this one is {kind}."
            + (f" Remedy: `qfast new {file}` writes one, if this is a table." if kind == "a str" else "")
        )
    shared: dict[int, list[KeyPath]] = {}
    for path, ident in _node_paths(node, (), ()):
        if ident is None:
            raise ConfigError(f"{file}: the alias at {path_text(path)!r} contains itself.")
        shared.setdefault(ident, []).append(path)
    return values, [paths for paths in shared.values() if len(paths) > 1]


def _node_paths(node: Any, path: KeyPath, above: tuple[int, ...]) -> Iterator[tuple[KeyPath, int | None]]:
    """Yield every path below a YAML node with the id of the node there, or None for a node that contains itself."""
    yield path, None if id(node) in above else id(node)
    if id(node) in above or node is None:
        return
    inside = (*above, id(node))
    if node.id == "mapping":
        for key, value in node.value:
            yield from _node_paths(value, path if key.value == "<<" else (*path, key.value), inside)
    elif node.id == "sequence":
        for position, value in enumerate(node.value):
            yield from _node_paths(value, (*path, position), inside)


def _read_base(base_file: Path, file: Path) -> tuple[dict[str, Any], AliasGroups]:
    """Read a base file. Any other file is refused, because config.yaml and the report contain the values.

    Raises
    ------
    ConfigError
        The name does not end in .yaml or .yml, or the content is not that of a workflow file. The message contains
        nothing of the content.
    """
    refused = ConfigError(
        f"{file}: {BASE_KEY} {str(base_file)!r} is not a workflow file. Remedy: a file that ends in .yaml or .yml and "
        f"has at least one of the keys {list(TOP_LEVEL[:5])}."
    )
    if base_file.suffix.lower() not in (".yaml", ".yml"):
        raise refused
    base, groups = _read_yaml(_read_text(base_file, "base file"), base_file)
    if not set(TOP_LEVEL[:5]) & set(base):
        raise refused
    return base, groups


def _find_base(name: object, file: Path) -> Path:
    if not isinstance(name, str):
        raise ConfigError(f"{file}: {BASE_KEY} must be a path, got {name!r}.")
    candidates = [Path(name), file.absolute().parent / name]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    searched = list(dict.fromkeys(str(candidate.absolute()) for candidate in candidates))
    raise ConfigError(f"{file}: {BASE_KEY} {name!r} was not found; searched {searched}.")


def _not_overridden(group: list[KeyPath], over: Mapping[str, Any]) -> list[KeyPath]:
    """The paths of a base file's anchor that the file merged over it does not override."""

    def overridden(path: KeyPath) -> bool:
        value: Any = over
        for key in path:
            if not isinstance(value, dict):
                return True
            if key not in value:
                return False
            value = value[key]
        return True

    return [path for path in group if not overridden(path)]
