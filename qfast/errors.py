"""Every error qfast raises on purpose, and the hint that goes with a misspelt name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
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
    nearest = difflib.get_close_matches(str(name), [str(k) for k in known], n=1, cutoff=0.6)
    return f" Did you mean {nearest[0]!r}?" if nearest else ""


def whole_number(name: str, value: Any, least: int = 1) -> int:
    """`value` as an int if it is a whole number of at least `least`, otherwise a ConfigError that names it.

    >>> whole_number("step_len", 20)
    20
    """
    if isinstance(value, bool) or not hasattr(value, "__index__") or value < least:
        raise ConfigError(f"{name} must be a whole number of at least {least}, got {value!r}.")
    return int(value)
