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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import jinja2.meta
import jinja2.sandbox
from ruamel.yaml.error import YAMLError

from qfast.errors import ConfigError
from qfast.workflow.overrides import (
    BASE_KEY,
    TOP_LEVEL,
    AliasGroups,
    KeyPath,
    apply_set,
    path_text,
    yaml_problem,
    yaml_reader,
)

__all__ = ["LoadedConfig", "apply_set", "deep_merge", "dump_yaml", "fill_placeholders", "load_config"]

log = logging.getLogger("qfast")
DROP = "__DROP__"


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
    yaml = yaml_reader()
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.representer.ignore_aliases = lambda *_: True
    out = io.StringIO()
    yaml.dump(values, out)
    return out.getvalue()


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
        values = yaml_reader().load(text)
        node = yaml_reader().compose(text)
    except YAMLError as error:
        raise ConfigError(f"{file}: {yaml_problem(error)}") from None
    if not isinstance(values, dict):
        kind = "empty" if values is None else f"a {type(values).__name__}"
        raise ConfigError(
            f"{file}: a workflow file is a mapping with the keys {list(TOP_LEVEL[:2])}; this one is {kind}."
        )
    shared: dict[int, list[KeyPath]] = {}
    for path, ident in _node_paths(node, (), ()):
        if ident is None:
            raise ConfigError(f"{file}: the alias at {path_text(path)!r} contains itself.")
        shared.setdefault(ident, []).append(path)
    return values, [paths for paths in shared.values() if len(paths) > 1]


def _node_paths(node: Any, path: KeyPath, above: tuple[int, ...]) -> Iterator[tuple[KeyPath, int | None]]:
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


def _find_base(name: Any, file: Path) -> Path:
    if not isinstance(name, str):
        raise ConfigError(f"{file}: {BASE_KEY} must be a path, got {name!r}.")
    places = [Path(name), file.absolute().parent / name]
    for place in places:
        if place.is_file():
            return place
    looked = list(dict.fromkeys(str(place.absolute()) for place in places))
    raise ConfigError(f"{file}: {BASE_KEY} {name!r} was not found; looked at {looked}.")


def _not_overridden(group: list[KeyPath], over: Mapping[str, Any]) -> list[KeyPath]:
    """The paths of a base file's anchor at which the file merged over it says nothing."""

    def said(path: KeyPath) -> bool:
        found: Any = over
        for key in path:
            if not isinstance(found, dict):
                return True
            if key not in found:
                return False
            found = found[key]
        return True

    return [path for path in group if not said(path)]
