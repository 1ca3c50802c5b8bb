"""YAML 1.2 with limits on size, depth and aliases, and errors that name the line.

A few hundred bytes of nested aliases stand for gigabytes of values, and a deep value exceeds Python's recursion limit.
"""

from __future__ import annotations

import calendar
import copy
import functools
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from ruamel.yaml import YAML
from ruamel.yaml.composer import Composer
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from qfast.errors import shown

__all__ = ["CACHED_TEXTS", "InvalidYaml", "ParsedYaml", "parse_yaml", "yaml_writer"]

MOST_CHARACTERS = 2 << 20  # of the text; reading takes about 10 seconds per MiB
MOST_DEPTH = 64
CACHED_TEXTS, CACHED_CHARACTERS = 4, 128 << 10  # number of texts that remain parsed, and the longest of them
MOST_VALUES = 100_000  # with every alias replaced by its values
UNUSABLE = re.compile("[\ud800-\udfff\0]")  # neither a file name nor a UTF-8 file can contain these


class InvalidYaml(ValueError):
    """Text that is not YAML or exceeds a limit. The message contains the line."""


class ParsedYaml(NamedTuple):
    """Plain data of the caller's own, and the YAML node that it comes from (None for an empty text)."""

    values: Any
    node: Any


class _LimitedComposer(Composer):
    """A composer that refuses values below a depth."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Compose one node and everything in it."""
        self.depth += 1
        if self.depth > MOST_DEPTH:
            line = self.parser.peek_event().start_mark.line + 1
            raise InvalidYaml(f"line {line}: values are nested more than {MOST_DEPTH} levels deep")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def yaml_writer() -> YAML:
    """A reader and writer of YAML 1.2, which only ruamel's pure-Python parser supports."""
    return YAML(typ="safe", pure=True)


def parse_yaml(text: str) -> ParsedYaml:
    """Parse YAML text to plain data.

    Raises
    ------
    InvalidYaml
        The text is not YAML, contains a date or number that does not exist or a character that no file can contain, or
        exceeds a limit: 2 MiB, 64 levels, or 100,000 values and 2 MiB with every alias replaced by its values.

    Examples
    --------
    >>> parse_yaml("lr: 1e-3").values
    {'lr': 0.001}
    """
    if len(text) > MOST_CHARACTERS:
        raise InvalidYaml(f"the text has {len(text)} characters; at most {MOST_CHARACTERS} are allowed")
    parsed = _parsed(text) if len(text) <= CACHED_CHARACTERS else _parsed.__wrapped__(text)
    return ParsedYaml(copy.deepcopy(parsed.values), parsed.node)


@functools.lru_cache(maxsize=CACHED_TEXTS)
def _parsed(text: str) -> ParsedYaml:
    """Parse a text of permitted length. The runs of a study read the same few files."""
    yaml = yaml_writer()
    yaml.Composer = _LimitedComposer
    try:
        node = yaml.compose(text)
        if node is None:
            return ParsedYaml(None, None)
        _require_small(node)
        for scalar in _scalars(node):
            if UNUSABLE.search(scalar.value):
                raise InvalidYaml(f"{_line(scalar)}: {shown(scalar.value)} has a character that no file can have")
        return ParsedYaml(_constructed(node, text), node)
    except YAMLError as error:
        raise InvalidYaml(_problem(error)) from None


def _constructed(node: Any, text: str) -> Any:
    try:
        return yaml_writer().constructor.construct_document(node)
    except (ValueError, ArithmeticError, TypeError) as error:
        problem = _invalid_date(text) or _invalid_scalar(node) or str(error)
    raise InvalidYaml(problem)


def _invalid_scalar(node: Any) -> str | None:
    """The first scalar that has no value, such as a time with an impossible zone."""
    for scalar in _scalars(node):
        try:
            yaml_writer().constructor.construct_document(scalar)
        except (ValueError, ArithmeticError, TypeError, YAMLError) as error:  # noqa: PERF203 - the first one ends it
            return f"{_line(scalar)}: {shown(scalar.value, 40)} is not valid ({_reason(error)})"
    return None


def _reason(error: Exception) -> str:
    return str(error).splitlines()[0].rstrip(".")


def _invalid_date(text: str) -> str | None:
    """The first date in YAML text that does not exist, with its line; None if all exist."""
    for match in re.finditer(r"(?<![\w-])(\d{4})-(\d{1,2})-(\d{1,2})(?![\w-])", text):
        year, month, day = map(int, match.groups())
        if not (year and 1 <= month <= 12 and 1 <= day <= calendar.monthrange(year, month)[1]):
            return f"line {text.count(chr(10), 0, match.start()) + 1}: {match[0]!r} is not a date"
    return None


def _problem(error: YAMLError) -> str:
    """Describe a YAML error in one line, with line and column."""
    if not isinstance(error, MarkedYAMLError):
        return "not YAML: " + " ".join(str(error).split())
    mark = error.problem_mark or error.context_mark
    where = "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: "
    parts = [str(part).strip().splitlines()[0] for part in (error.context, error.problem) if part]
    return f"not YAML: {where}{', '.join(parts)}"


# ---------------------------------------------------------------- nodes
def _children(node: Any) -> list[Any]:
    if node.id == "mapping":
        return [part for pair in node.value for part in pair]
    return list(node.value) if node.id == "sequence" else []


def _scalars(node: Any) -> Iterator[Any]:
    """Every scalar below a node, once."""
    seen, pending = {id(node)}, [node]
    while pending:
        current = pending.pop()
        if current.id == "scalar":
            yield current
        for child in reversed(_children(current)):
            if id(child) not in seen:
                seen.add(id(child))
                pending.append(child)


def _line(node: Any) -> str:
    return f"line {node.start_mark.line + 1}"


def _require_small(root: Any) -> None:
    """Refuse a node with too many values or characters if every alias is replaced by its values."""
    sizes: dict[int, tuple[int, int]] = {}
    open_nodes: set[int] = set()
    pending = [(root, False)]
    while pending:
        node, is_complete = pending.pop()
        if is_complete:
            parts = [sizes[id(child)] for child in _children(node) if id(child) in sizes]
            own = len(node.value) if node.id == "scalar" else 0
            values, characters = 1 + sum(part[0] for part in parts), own + sum(part[1] for part in parts)
            if values > MOST_VALUES or characters > MOST_CHARACTERS:
                raise InvalidYaml(
                    f"{_line(node)}: with aliases replaced, this value contains {values} values and {characters} "
                    f"characters; at most {MOST_VALUES} and {MOST_CHARACTERS} are allowed"
                )
            sizes[id(node)] = values, characters
        elif id(node) not in open_nodes:  # the node of an alias, or a node that contains itself, is counted once
            open_nodes.add(id(node))
            pending.append((node, True))
            pending += [(child, False) for child in _children(node)]
