"""What the readers have noticed about a source: logged, and collected for reports."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from contextvars import ContextVar
from typing import NamedTuple

__all__ = ["SourceNote", "collected_notes", "note"]

log = logging.getLogger("qfast.data")


class SourceNote(NamedTuple):
    """One observation.

    Attributes
    ----------
    warning : bool
        False: it only states how the source was read.
    text : str
    is_repeated_by_check : bool
        True if `qfast check` finds the same in the prices, with more detail.
    """

    warning: bool
    text: str
    is_repeated_by_check: bool = False


_collected: ContextVar[list[SourceNote] | None] = ContextVar("qfast_source_notes", default=None)


def note(text: str, warning: bool = False, *, is_repeated_by_check: bool = False) -> None:
    """Log an observation, and add it to the lists of all enclosing `collected_notes`."""
    log.log(logging.WARNING if warning else logging.INFO, "%s", text)
    notes, one = _collected.get(), SourceNote(warning, text, is_repeated_by_check)
    if notes is not None and one not in notes:  # a handler may read a source twice
        notes.append(one)


@contextlib.contextmanager
def collected_notes() -> Iterator[list[SourceNote]]:
    """Collect the notes of all sources that are read in the block.

    Examples
    --------
    >>> with collected_notes() as notes:
    ...     note("a.csv: 2 rows")
    >>> notes[0].text
    'a.csv: 2 rows'
    """
    notes: list[SourceNote] = []
    token = _collected.set(notes)
    try:
        yield notes
    finally:
        _collected.reset(token)
