"""Every error qfast raises on purpose, and how their messages name things: nearest names, shortened values."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any


class QfastError(Exception):
    """Base of all errors raised by qfast."""


class DataError(QfastError, ValueError):
    """The data cannot be used as asked: the message names the row, column or segment."""


class ConfigError(QfastError, ValueError):
    """A configuration or argument is wrong: the message names it, what came and what is allowed."""


class NotFittedError(QfastError, ValueError):
    """A model was asked to predict before it was fitted."""


class CheckpointError(QfastError, RuntimeError):
    """A weight or checkpoint file is missing, truncated or belongs to another model."""


class BackendError(QfastError, RuntimeError):
    """A compute tier that was asked for explicitly cannot be used on this machine."""


def suggest(name: object, known: Iterable[object]) -> str:
    """Nearest right name as a sentence with a leading space, or an empty string.

    >>> suggest("drop_out", ["dropout", "d_feat"])
    " Did you mean 'dropout'?"
    """
    found = nearest(name, known)
    return "" if found is None else f" Did you mean {found!r}?"


def nearest(name: object, known: Iterable[object], cutoff: float = 0.6) -> str | None:
    """The most similar of the known names, None if none is similar enough (0: anything, 1: equal only)."""
    found = difflib.get_close_matches(str(name), [str(k) for k in known], n=1, cutoff=cutoff)
    return found[0] if found else None


def shown(value: object, most: int = 80) -> str:
    """The value's repr, cut to `most` characters.

    >>> shown("a long text indeed", most=12)
    "'a long t..."
    """
    text = repr(value)
    return text if len(text) <= most else text[: most - 3] + "..."


def some(names: Sequence[object], most: int = 12) -> str:
    """The first `most` names, and how many more there are.

    >>> some(["open", "close", "low"], most=2)
    'open, close, ... 1 more'
    """
    more = [f"... {len(names) - most} more"] if len(names) > most else []
    return ", ".join([str(name) for name in names[:most]] + more)


def whole_number(name: str, value: Any, least: int = 1) -> int:
    """`value` as an int if it is a whole number of at least `least`, otherwise a ConfigError that names it.

    >>> whole_number("step_len", 20)
    20
    """
    if isinstance(value, bool) or not hasattr(value, "__index__") or value < least:
        raise ConfigError(f"{name} must be a whole number of at least {least}, got {value!r}.")
    return int(value)
