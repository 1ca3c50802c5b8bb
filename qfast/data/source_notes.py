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
    """

    warning: bool
    text: str


_collected: ContextVar[list[SourceNote] | None] = ContextVar("qfast_source_notes", default=None)


def note(text: str, warning: bool = False) -> None:
    """Log an observation, and add it to the lists of all enclosing `collected_notes`."""
    log.log(logging.WARNING if warning else logging.INFO, "%s", text)
    notes = _collected.get()
    if notes is not None and SourceNote(warning, text) not in notes:  # a handler may read a source twice
        notes.append(SourceNote(warning, text))


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
