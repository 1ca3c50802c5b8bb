"""Reading a workflow file: the reference's YAML, its templates, its base files, and `--set` on top.

The text is rendered by Jinja2 with environment variables, read as YAML 1.2 (so that `lr: 1e-3` is a
number and `yes` is text), merged over `BASE_CONFIG_PATH`, and changed by `--set key=value`. What comes
out is plain data; `qfast.workflow.schema` checks it and nothing in it is ever imported or executed.
"""

from __future__ import annotations

import copy
import io
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import jinja2.meta
import jinja2.sandbox
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from qfast.errors import ConfigError, nearest

__all__ = ["LoadedConfig", "apply_set", "deep_merge", "dump_yaml", "fill_placeholders", "load_config"]

log = logging.getLogger("qfast")

BASE_KEY = "BASE_CONFIG_PATH"
DROP = "__DROP__"
Key = str | int
Path_ = tuple[Key, ...]
AliasGroups = list[list[Path_]]
# Mappings that may take keys which are not there yet; what is put in is checked against the schema later.
OPEN_MAPPINGS = ("kwargs", "qlib_init", "segments", "task", "pretrain")
TOP_LEVEL = ("qlib_init", "task", "experiment_name", "market", "benchmark", "sys", BASE_KEY)


@dataclass(frozen=True)
class LoadedConfig:
    """A workflow file as plain data.

    Attributes
    ----------
    values : dict
        Rendered, merged and changed by `--set`.
    path : Path
        The file it was read from.
    """

    values: dict[str, Any]
    path: Path


def load_config(path: str | os.PathLike[str], sets: Sequence[str] = ()) -> LoadedConfig:
    """Read a workflow file.

    Parameters
    ----------
    path : path
        The reference's YAML format. `{{ NAME }}` is replaced by the environment variable NAME (nothing
        else is in reach of the template). `BASE_CONFIG_PATH` names a file, looked up from the working
        directory and then from the workflow file's folder, that this one is merged over; the base
        itself is neither rendered nor given a base of its own.
    sets : sequence of str
        `"a.b.0.c=value"`, see `apply_set`; done in order, after the merge.

    Raises
    ------
    ConfigError
        No such file, not UTF-8 text, a template or YAML error (with line and column), a document that is
        not a mapping, a base file that is not found, a bad `--set`.

    Source: qlib/cli/run.py, qlib/utils/data.py (update_config).

    Examples
    --------
    >>> import tempfile; folder = tempfile.TemporaryDirectory()
    >>> file = Path(folder.name, "a.yaml"); _ = file.write_text("task: {model: {kwargs: {lr: 1e-3}}}")
    >>> load_config(file, ["task.model.kwargs.lr=2e-3"]).values
    {'task': {'model': {'kwargs': {'lr': 0.002}}}}
    """
    file = Path(path)
    values, groups = _read_yaml(_render(_read_text(file, "workflow file"), file), file)
    if BASE_KEY in values:
        base_file = _find_base(values[BASE_KEY], file)
        base, base_groups = _read_yaml(_read_text(base_file, "base file"), base_file)
        log.info("%s: merged over %s", file, base_file)
        groups = groups + [_not_overridden(group, values) for group in base_groups]
        values = deep_merge(base, values)
    for text in sets:
        apply_set(values, text, groups)
    return LoadedConfig(values, file)


def deep_merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` merged into a copy of `base`: mappings key by key, anything else replaced.

    The value `__DROP__` removes the key. Parts of `base` that one alias shares are one object in the
    result as well, except along the keys that `over` changes.

    Examples
    --------
    >>> deep_merge({"a": {"x": 1, "y": 2}, "b": 3}, {"a": {"x": 9, "y": "__DROP__"}})
    {'a': {'x': 9}, 'b': 3}
    """
    out = copy.deepcopy(dict(base))
    for key, value in over.items():
        if isinstance(value, str) and value == DROP:
            out.pop(key, None)
        elif isinstance(out.get(key), dict) and isinstance(value, dict):
            out[key] = deep_merge(out[key], value)
        else:
            out[key] = value
    return out


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
        value = _yaml().load(value_text)
    except YAMLError as error:
        raise ConfigError(f"--set {name}: the value {value_text!r} is {_problem(error)}") from None
    path = _resolve(config, name)
    together = [group for group in groups or [] if path in group]
    for target in {path, *(p for group in together for p in group)}:
        _assign(config, target, value)


def fill_placeholders(item: Any, objects: Mapping[str, Any], config: Mapping[str, Any]) -> Any:
    """A copy of `item` with placeholder texts replaced; nothing is changed in place.

    A text equal to a key of `objects` ("<MODEL>", "<DATASET>", "<PRED>") becomes that object. A text that
    begins with "<a.b.0>" becomes that item of `config`; one that leads nowhere stays as it is, with a log
    line. Text that only contains a placeholder further on is left alone.

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
    found: Any = config
    try:
        for part in match[1].split("."):
            found = found[int(part)] if isinstance(found, list) else found[part]
    except (KeyError, ValueError, IndexError, TypeError):
        log.info("%s looks like a placeholder, but the configuration has no such item; left as it is", item)
        return item
    return found


def dump_yaml(values: Any) -> str:
    """YAML text of plain data, without anchors, in the order given.

    Examples
    --------
    >>> dump_yaml({"task": {"lr": 0.001}})
    'task:\\n  lr: 0.001\\n'
    """
    yaml = _yaml()
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.representer.ignore_aliases = lambda *_: True
    out = io.StringIO()
    yaml.dump(values, out)
    return out.getvalue()


# ---------------------------------------------------------------- reading
def _yaml() -> YAML:
    return YAML(typ="safe", pure=True)  # the pure parser is the YAML 1.2 one


def _read_text(file: Path, what: str) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{what} {str(file)!r} does not exist (looked in {Path.cwd()}).") from None
    except IsADirectoryError:
        raise ConfigError(f"{what} {str(file)!r} is a folder; give the YAML file itself.") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{what} {str(file)!r} is not UTF-8 text: {error}") from None
    except OSError as error:
        raise ConfigError(f"{what} {str(file)!r} cannot be read: {error.strerror}") from None


def _render(text: str, file: Path) -> str:
    # Sandboxed, because a template could otherwise reach Python's internals.
    environment = jinja2.sandbox.SandboxedEnvironment()
    try:
        names = jinja2.meta.find_undeclared_variables(environment.parse(text))
        missing = sorted(name for name in names if name not in os.environ)
        if missing:
            log.warning("%s: environment variables %s are not set; they are rendered as nothing", file, missing)
        return environment.from_string(text).render({name: os.environ[name] for name in names if name in os.environ})
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(f"{file}: template error on line {error.lineno}: {error.message}") from None
    except (jinja2.TemplateError, ArithmeticError, TypeError, ValueError) as error:
        raise ConfigError(f"{file}: the template does not render: {error}") from None


def _read_yaml(text: str, file: Path) -> tuple[dict[str, Any], AliasGroups]:
    """Plain data of the one document in `text`, and the groups of paths that share an anchor."""
    try:
        values = _yaml().load(text)
        node = _yaml().compose(text)
    except YAMLError as error:
        raise ConfigError(f"{file}: {_problem(error)}") from None
    if not isinstance(values, dict):
        kind = "empty" if values is None else f"a {type(values).__name__}"
        raise ConfigError(
            f"{file}: a workflow file is a mapping with the keys {list(TOP_LEVEL[:2])}; this one is {kind}."
        )
    shared: dict[int, list[Path_]] = {}
    for path, ident in _node_paths(node, (), ()):
        if ident is None:
            raise ConfigError(f"{file}: the alias at {_text(path)!r} contains itself.")
        shared.setdefault(ident, []).append(path)
    return values, [paths for paths in shared.values() if len(paths) > 1]


def _node_paths(node: Any, path: Path_, above: tuple[int, ...]) -> Iterator[tuple[Path_, int | None]]:
    """Every path below a YAML node with the identity of the node there; None for a node within itself."""
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


def _problem(error: YAMLError) -> str:
    if not isinstance(error, MarkedYAMLError):
        return str(error)
    mark = error.problem_mark or error.context_mark
    where = "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: "
    parts = [str(part).strip().splitlines()[0] for part in (error.context, error.problem) if part]
    return f"not YAML: {where}{', '.join(parts)}"


def _find_base(name: Any, file: Path) -> Path:
    if not isinstance(name, str):
        raise ConfigError(f"{file}: {BASE_KEY} must be a path, got {name!r}.")
    places = [Path(name), file.absolute().parent / name]
    for place in places:
        if place.is_file():
            return place
    looked = list(dict.fromkeys(str(place.absolute()) for place in places))
    raise ConfigError(f"{file}: {BASE_KEY} {name!r} was not found; looked at {looked}.")


def _not_overridden(group: list[Path_], over: Mapping[str, Any]) -> list[Path_]:
    """The paths of a base file's anchor at which the file merged over it says nothing."""

    def said(path: Path_) -> bool:
        found: Any = over
        for key in path:
            if not isinstance(found, dict):
                return True
            if key not in found:
                return False
            found = found[key]
        return True

    return [path for path in group if not said(path)]


# ---------------------------------------------------------------- --set
def _text(path: Iterable[Key]) -> str:
    return ".".join(str(key) for key in path)


def _resolve(config: Any, name: str) -> Path_:
    """The keys of a dotted path that exists in `config` (its last key may be new where keys are free)."""
    parts = name.split(".")
    found: Any = config
    path: Path_ = ()
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        if isinstance(found, list):
            if not re.fullmatch(r"\d+", part) or int(part) >= len(found):
                raise ConfigError(
                    f"--set {name}: {_text(path)!r} is a list of {len(found)}, so the next part must be a "
                    f"position from 0 to {len(found) - 1}, got {part!r}."
                )
            key: Key = int(part)
        elif not isinstance(found, dict):
            raise ConfigError(f"--set {name}: {_text(path)!r} is the value {found!r} and has nothing below it.")
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


def _begins_mapping(path: Path_, part: str, found: Mapping[str, Any]) -> bool:
    """True for a mapping that may be left out of a file and still be given values in."""
    return (part == "kwargs" and "class" in found) or (part == "pretrain" and path == ("task",))


def _is_open(path: Path_, part: str) -> bool:
    return part in TOP_LEVEL if not path else path[-1] in OPEN_MAPPINGS


def _unknown(config: Any, found: dict[str, Any], path: Path_, part: str, name: str) -> str:
    where = f"at {_text(path)!r}" if path else "at the top level"
    message = f"there is no {part!r} {where}; known there: {sorted(map(str, found))}."
    right = nearest(part, found)
    if right is not None:
        return f"{message} Did you mean {_text((*path, right))!r}?"
    paths = [_text(p) for p in _all_paths(config, ())]
    same_end = sorted(
        (p for p in paths if p.split(".")[-1] == name.split(".")[-1]), key=lambda p: not p.startswith("task.")
    )
    likely = same_end[0] if same_end else nearest(name, paths, cutoff=0.5)
    return message if likely is None else f"{message} Did you mean {likely!r}?"


def _all_paths(item: Any, path: Path_) -> Iterator[Path_]:
    pairs = item.items() if isinstance(item, dict) else enumerate(item) if isinstance(item, list) else ()
    for key, value in pairs:
        yield (*path, key)
        yield from _all_paths(value, (*path, key))


def _assign(config: Any, path: Path_, value: Any) -> None:
    """Put a copy of `value` at `path`; nothing if an earlier --set replaced what lay on the way there."""
    found = config
    try:
        for key in path[:-1]:
            found = found[key]
        found[path[-1]] = copy.deepcopy(value)
    except (KeyError, IndexError, TypeError):
        return
