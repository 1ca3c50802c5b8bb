"""Observations about the rows and files of a table: codes, fields that files lack, names of files, infinite values."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
import pandas as pd

from qfast.data.column_names import PRICE_FIELDS
from qfast.data.source_notes import note
from qfast.errors import some

__all__ = ["report_codes", "report_fields", "report_file_names", "report_infinite"]

PERIOD = re.compile(r"[ _.-]?(19|20)\d{2}([_-]?(\d{2}|q\d|h\d))?([_-]?\d{2})?$", re.IGNORECASE)
COPY = re.compile(r"( \(\d+\)| ?- copy.*| copy.*|_copy\d*| 副本)$", re.IGNORECASE)

Span = tuple[pd.Timestamp, pd.Timestamp]


def report_codes(table: str, names: Sequence[object]) -> None:
    """Report numeric codes of unequal length, and names that differ only in case or in the width of characters.

    Parameters
    ----------
    table : str
        Name of the source, for messages.
    names : sequence
        The different instruments.
    """
    texts = [str(name) for name in names]
    lengths = {len(text): text for text in texts}
    if len(lengths) > 1 and all(text.isdigit() for text in texts):
        short, long = lengths[min(lengths)], lengths[max(lengths)]
        note(
            f"{table}: the instruments are codes of unequal length, for example {short!r} and {long!r}; they may have "
            f"lost leading zeros. Remedy: store the codes as text, {short.zfill(len(long))!r}",
            warning=True,
        )
    first: dict[str, str] = {}
    pairs = []
    for text in texts:
        other = first.setdefault(unicodedata.normalize("NFKC", text).casefold(), text)
        if other != text:
            pairs.append(f"{other!r} and {text!r}")
    if pairs:
        note(
            f"{table}: {len(pairs)} name(s) differ from another one only in case or width and count as another "
            f"instrument: {some(pairs, 3)}. Remedy: one spelling for each instrument, if they are the same",
            warning=True,
        )


def report_fields(source: str, fields: Mapping[str, Sequence[str]]) -> None:
    """Report prices that only some of the files have, and a missing close.

    Parameters
    ----------
    source : str
    fields : mapping
        Name of each file -> its fields.
    """
    for field in PRICE_FIELDS:
        without = [name for name, present in fields.items() if field not in present]
        if without and (len(without) < len(fields)):
            first = list(fields[without[0]])
            note(
                f"{source}: {len(without)} of {len(fields)} file(s) have no {field}, so it is missing there: "
                f"{some(without, 3)} (the first has {some(first, 8)})",
                warning=True,
            )
        elif without and field == "close":
            note(f"{source}: there is no column close; the fields are {some(list(next(iter(fields.values()))), 12)}")


def report_file_names(source: str, spans: Mapping[str, Span]) -> None:
    """Report files that may be parts or copies of one instrument.

    Parameters
    ----------
    source : str
    spans : mapping
        Name of each file that is named after its instrument -> its first and last time.
    """
    parts: dict[str, list[str]] = {}
    for name in spans:
        parts.setdefault(PERIOD.sub("", name), []).append(name)
    split = [names for names in parts.values() if len(names) > 1 and _follow(sorted(spans[name] for name in names))]
    if split:
        note(
            f"{source}: the dates of {some(split[0], 3)} follow each other, so these files may contain one instrument, "
            f"but count as {len(split[0])} ({len(split)} such group(s)). Remedy: join them, or add a column with the "
            "symbol",
            warning=True,
        )
    copies = [name for name in spans if COPY.search(name) and COPY.sub("", name) in spans]
    if copies:
        note(
            f"{source}: {some(copies, 3)} may be copies of {some([COPY.sub('', name) for name in copies], 3)}, but "
            "count as instruments. Remedy: remove them from the folder",
            warning=True,
        )


def _follow(spans: Sequence[Span]) -> bool:
    """True if no span begins before the end of the one before it."""
    return all(after[0] > before[1] for before, after in pairwise(spans))


def report_infinite(table: str, columns: Mapping[str, np.ndarray]) -> None:
    """Report values that are infinite or too large for float32."""
    for column, values in columns.items():
        infinite = np.isinf(values)
        if infinite.any():
            note(
                f"{table}: column {column!r} has {int(infinite.sum())} value(s) that are infinite or above 3.4e38, the "
                f"first in row {int(np.argmax(infinite))}",
                warning=True,
            )
