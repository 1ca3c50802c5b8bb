"""The error classes of qfast, and helpers for their messages: similar names, shortened values, lists."""

from __future__ import annotations

import contextlib
import difflib
import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import SupportsIndex

DATA_PAGE = "docs/data.md"
"""The page that shows every accepted form of data. Its address on the documentation site is not fixed."""


class QfastError(Exception):
    """Base class of every error that qfast raises on purpose."""


class DataError(QfastError, ValueError):
    """The data is invalid or unsuitable. The message names the row, column or segment."""


class ConfigError(QfastError, ValueError):
    """A configuration value or an argument is invalid. The message names it and shows actual and allowed values."""


class NotFittedError(QfastError, ValueError):
    """A model predicts before it is fitted."""


class CheckpointError(QfastError, RuntimeError):
    """A weight or checkpoint file is missing or truncated, or belongs to another model."""


class BackendError(QfastError, RuntimeError):
    """An explicitly requested device or implementation is not available on this machine."""


class RankError(QfastError, RuntimeError):
    """Another process of a distributed run has failed or died. The message contains its rank and its error."""


@contextlib.contextmanager
def naming_data_page() -> Iterator[None]:
    """Add the page about the accepted forms of data to a DataError of the block, unless the message names it already.

    Examples
    --------
    >>> with naming_data_page():
    ...     raise DataError("prices.csv has no datetime column.")
    Traceback (most recent call last):
    ...
    qfast.errors.DataError: prices.csv has no datetime column. docs/data.md shows every accepted form.
    """
    try:
        yield
    except DataError as error:
        if DATA_PAGE not in str(error):
            error.args = (f"{error} {DATA_PAGE} shows every accepted form.",)
        raise


def suggest(name: object, known: Iterable[object]) -> str:
    """Return " Did you mean 'NAME'?" for the most similar known name, or "" if none is similar.

    >>> suggest("drop_out", ["dropout", "d_feat"])
    " Did you mean 'dropout'?"
    """
    similar = nearest(name, known)
    return "" if similar is None else f" Did you mean {similar!r}?"


def nearest(name: object, known: Iterable[object], cutoff: float = 0.6) -> str | None:
    """Return the most similar known name, or None if no similarity reaches `cutoff`, from 0 (any) to 1 (equal)."""
    matches = difflib.get_close_matches(str(name), [str(k) for k in known], n=1, cutoff=cutoff)
    return matches[0] if matches else None


def shown(value: object, most: int = 80) -> str:
    """Return the repr of a value, truncated to `most` characters.

    >>> shown("a long text indeed", most=12)
    "'a long t..."
    """
    text = repr(value)
    return text if len(text) <= most else text[: most - 3] + "..."


def some(names: Sequence[object], most: int = 12) -> str:
    """Join the first `most` names and the number of the others.

    >>> some(["open", "close", "low"], most=2)
    'open, close, ... 1 more'
    """
    more = [f"... {len(names) - most} more"] if len(names) > most else []
    return ", ".join([str(name) for name in names[:most]] + more)


def whole_number(name: str, value: object, least: int = 1) -> int:
    """Return `value` as an int, or raise a ConfigError if it is not a whole number of at least `least`.

    >>> whole_number("step_len", 20)
    20
    """
    number = None
    if not isinstance(value, bool) and isinstance(value, SupportsIndex):
        with contextlib.suppress(TypeError):  # arrays and tensors have __index__, and raise unless they are integers
            number = operator.index(value)
    if number is None or number < least:
        raise ConfigError(f"{name} must be a whole number of at least {least}, got {value!r}.")
    return number
