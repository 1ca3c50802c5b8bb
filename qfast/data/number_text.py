"""Numbers in text: currency signs, percent, separators of thousands, decimal commas, K, M and B."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
import pandas as pd

from qfast.errors import DataError

__all__ = ["MISSING", "NumberText", "decimal_mark"]

MISSING = (
    *(
        "",
        "NA",
        "N/A",
        "n/a",
        "na",
        "N.A.",
        "n.a.",
        "<NA>",
        "#N/A",
        "NaN",
        "nan",
        "-nan",
        "null",
        "NULL",
        "None",
        "none",
    ),
    *("-", "--", "---", "—", "–", ".", "?", "#VALUE!", "#DIV/0!", "#REF!", "#NUM!", "#NULL!", "#NAME?", "#N/A N/A"),
)
CURRENCY = r"(?:[$€£¥₹₩元]|USD|EUR|GBP|CNY|RMB|INR|JPY|HKD|US\$|HK\$)"
SCALES = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
THOUSANDS_OR_DECIMAL = re.compile(r"[+-]?[1-9]\d{0,2}[.,]\d{3}")


class NumberText:
    """A column of text that may contain numbers.

    Parameters
    ----------
    values : Series
        Text; missing values are allowed.

    Attributes
    ----------
    texts : Series
        The text without blanks, currency signs, signs of percent and factors such as K; "" where missing.

    Examples
    --------
    >>> NumberText(pd.Series(["$1,234.50", "(2.5)", "1.2M", "-"])).numbers(".").tolist()
    [1234.5, -2.5, 1200000.0, nan]
    """

    def __init__(self, values: pd.Series) -> None:
        texts = values.astype(object).where(values.notna(), "").astype(str).str.strip()
        texts = texts.str.replace(r"^'|^=\"(.*)\"$", r"\1", regex=True)  # text in spreadsheets
        texts = texts.where(~texts.isin(MISSING), "")
        texts = texts.str.replace("\u2212", "-").str.replace(r"^\((.*)\)$", r"-\1", regex=True)
        texts = texts.str.replace(rf"^([+-]?)\s*{CURRENCY}\s*|\s*{CURRENCY}$", r"\1", regex=True)
        self._percent = np.asarray(texts.str.endswith("%"), dtype=bool)
        texts = texts.str.rstrip("%").str.strip()
        suffix = texts.str.extract(r"\d\s*([KMBT])$", flags=re.IGNORECASE)[0].str.upper()
        self._scale = suffix.map(SCALES).fillna(1.0).to_numpy(dtype=np.float64)
        texts = texts.str.replace(r"(?<=\d)\s*[KMBTkmbt]$", "", regex=True)
        self.texts = texts.str.replace(r"(?<=\d)[\s\u00a0\u202f'’](?=\d{3})", "", regex=True)

    def decimal(self) -> str | None:
        """The decimal mark that a value proves: "." or ","; None if no value does.

        Raises
        ------
        DataError
            Some values prove a comma and others a point.
        """
        texts = self.texts
        comma = texts.str.contains(r",\d*$", regex=True) & ~texts.str.match(r"[+-]?\d{1,3}(?:,\d{2,3})*,\d{3}$")
        comma |= texts.str.match(r"[+-]?\d{1,3}(?:\.\d{3}){2,}$") | texts.str.match(r"[+-]?0\d*,\d+$")
        point = texts.str.contains(r"\.\d*$", regex=True) & ~texts.str.match(r"[+-]?\d{1,3}(?:\.\d{3})+$")
        point |= texts.str.match(r"[+-]?\d{1,3}(?:,\d{2,3})+,\d{3}$") | texts.str.match(r"[+-]?0\d*\.\d+$")
        marks = np.asarray(comma, dtype=bool), np.asarray(point, dtype=bool)
        if marks[0].any() and marks[1].any():
            rows = [int(np.argmax(mark)) for mark in marks]
            raise DataError(
                f"row {rows[0]} has a decimal comma ({texts.iloc[rows[0]]!r}) and row {rows[1]} a decimal point "
                f"({texts.iloc[rows[1]]!r})"
            )
        return "," if marks[0].any() else "." if marks[1].any() else None

    def ambiguous_row(self) -> int | None:
        """The first row whose mark may separate thousands or decimals, such as "1,234"."""
        matches = np.asarray(self.texts.map(lambda text: THOUSANDS_OR_DECIMAL.fullmatch(text) is not None), dtype=bool)
        return int(np.argmax(matches)) if matches.any() else None

    def numbers(self, decimal: str) -> np.ndarray:
        """Values, float64; NaN where the text is missing or not a number. "5%" is 0.05."""
        texts = self.texts.str.replace("," if decimal == "." else ".", "", regex=False)
        if decimal == ",":
            texts = texts.str.replace(",", ".", regex=False)
        values = pd.to_numeric(texts, errors="coerce").to_numpy(dtype=np.float64)
        return np.where(self._percent, values / 100, values) * self._scale

    def bad_rows(self, numbers: np.ndarray) -> np.ndarray:
        """Rows whose text is neither a number nor missing."""
        return np.flatnonzero(np.isnan(numbers) & np.asarray(self.texts != "", dtype=bool))


def decimal_mark(columns: Mapping[str, NumberText], points: bool) -> str:
    """The decimal mark of a table.

    Parameters
    ----------
    columns : mapping
        Name -> text of the columns that pandas could not read as numbers.
    points : bool
        True if another column has numbers with a decimal point.

    Raises
    ------
    DataError
        Two columns prove different marks, or no value tells thousands from decimals.
    """
    proofs: dict[str, str] = {}
    for name, column in columns.items():
        try:
            mark = column.decimal()
        except DataError as error:
            raise DataError(f"column {name!r}: {error}. Remedy: --decimal.") from None
        if mark is not None:
            proofs.setdefault(mark, name)
    if points and "," in proofs:
        raise DataError(
            f"column {proofs[',']!r} has decimal commas, but other columns have decimal points. Remedy: --decimal."
        )
    if len(proofs) > 1:
        raise DataError(
            f"column {proofs[',']!r} has decimal commas, but column {proofs['.']!r} has decimal points. Remedy: "
            "--decimal."
        )
    if proofs or points:
        return next(iter(proofs), ".")
    for name, column in columns.items():
        row = column.ambiguous_row()
        if row is not None:
            text = column.texts.iloc[row]
            raise DataError(
                f"column {name!r}: {text!r} in row {row} may be {text.replace(',', '').replace('.', '')} or "
                f"{text.replace(',', '.')}. Remedy: --decimal '.' or --decimal ','."
            )
    return "."
