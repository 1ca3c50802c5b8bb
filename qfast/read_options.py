"""ReadOptions: how to read tables of prices or factors where a reader cannot or should not guess."""

from __future__ import annotations

import codecs
import zoneinfo
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TypeAlias

from qfast.errors import ConfigError, shown, suggest

__all__ = ["NUMBER_DATES", "ReadOptions", "ReadSettings", "command_line"]

NUMBER_DATES = {
    "excel": "days since 1899-12-30, as in Excel",
    "unix_s": "seconds since 1970",
    "unix_ms": "milliseconds since 1970",
    "unix_us": "microseconds since 1970",
    "unix_ns": "nanoseconds since 1970",
}
"""Values of `date_format` for dates that are numbers, with their meaning."""

SEPARATOR_NAMES = {"\\t": "\t", "tab": "\t", "comma": ",", "semicolon": ";", "space": r"\s+", "pipe": "|"}


@dataclass(frozen=True)
class ReadOptions:
    """Options of the readers of tables. None, the default of each, means that the reader decides.

    Attributes
    ----------
    date_format : str, optional
        Format of all dates of a source, in the notation of `datetime.strptime` ("%d/%m/%Y"), "iso" for ISO 8601, or a
        name in `NUMBER_DATES` for numbers ("excel", "unix_s", ...).
    encoding : str, optional
        Text encoding of CSV files, for example "gb18030" or "latin-1". Default: UTF-8, or UTF-16 if the file is.
    separator : str, optional
        Character between the columns of CSV files. "tab" and "space" (any blanks) are accepted as names.
        Default: the one that the header contains.
    decimal : {".", ","}, optional
        Decimal mark of numbers in text. The other one separates thousands.
    freq : str, optional
        "day": the times of tables are normalized to dates without a time zone, and the last row of a day is used. For a
        Qlib store, the frequency to read. Default: times of tables stay as they are; a store is read by day.
    time_zone : str, optional
        Zone of the result, for example "Asia/Shanghai". Times with a UTC offset and Unix times are converted to it;
        other times are local times of it. With freq "day", the result are its local dates.
    instrument_column : str, optional
        Column with the instruments. Default: symbol, code, ticker or instrument, then the file name, then name.
    adjust : bool, optional
        True multiplies open, high, low, close and vwap by adjusted close / close and divides volume by it. The ratio
        becomes the column "factor".

    Raises
    ------
    ConfigError
        A value is not allowed.

    Examples
    --------
    >>> ReadOptions(date_format="%d/%m/%Y", decimal=",").recorded()
    {'date_format': '%d/%m/%Y', 'decimal': ','}
    """

    date_format: str | None = None
    encoding: str | None = None
    separator: str | None = None
    decimal: str | None = None
    freq: str | None = None
    time_zone: str | None = None
    instrument_column: str | None = None
    adjust: bool | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            expected = bool if field.name == "adjust" else str
            if value is not None and (not isinstance(value, expected) or value == ""):
                raise ConfigError(f"{command_line(field.name)} must be a {expected.__name__}, got {value!r}.")
        if self.decimal not in (None, ".", ","):
            raise ConfigError(f"--decimal must be '.' or ',', got {self.decimal!r}.")
        if self.encoding is not None:
            try:
                codecs.lookup(self.encoding)
            except LookupError:
                raise ConfigError(
                    f"--encoding must be a text encoding such as utf-8, gb18030 or latin-1, got {self.encoding!r}."
                ) from None
        if self.time_zone is not None:
            try:
                zoneinfo.ZoneInfo(self.time_zone)
            except (ValueError, OSError, zoneinfo.ZoneInfoNotFoundError):
                raise ConfigError(
                    f"--time-zone must be a zone such as Asia/Shanghai, America/New_York or UTC, got "
                    f"{self.time_zone!r}." + suggest(self.time_zone, zoneinfo.available_timezones())
                ) from None
        if self.date_format is not None and "%" not in self.date_format and self.date_format.lower() not in _NAMES:
            raise ConfigError(
                f"--date-format must be a format such as '%d/%m/%Y' or one of {list(_NAMES)}, got "
                f"{self.date_format!r}." + suggest(self.date_format, _NAMES)
            )
        if self.separator is not None:
            object.__setattr__(self, "separator", SEPARATOR_NAMES.get(self.separator.lower(), self.separator))

    @classmethod
    def of(cls, value: ReadSettings) -> ReadOptions:
        """The options that `value` describes: options, a mapping of their names, or None for the defaults.

        Raises
        ------
        ConfigError
            `value` is something else, or has an unknown name.

        Examples
        --------
        >>> ReadOptions.of({"decimal": ","}).decimal
        ','
        """
        if value is None:
            return cls()
        if isinstance(value, ReadOptions):
            return value
        if not isinstance(value, Mapping):
            raise ConfigError(
                f"read_options must be a mapping or ReadOptions, got {type(value).__name__}: {shown(value)}."
            )
        names = [field.name for field in fields(cls)]
        for name in value:
            if name not in names:
                raise ConfigError(f"read_options has no {name!r}; allowed: {names}." + suggest(name, names))
        return cls(**value)  # type: ignore[arg-type]  # the constructor checks the types

    def over(self, other: ReadOptions) -> ReadOptions:
        """These options, with those of `other` where these are None."""
        return ReadOptions(**{**other.recorded(), **self.recorded()})  # type: ignore[arg-type]

    def recorded(self) -> dict[str, str | bool]:
        """The options that are set, as plain data."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


ReadSettings: TypeAlias = "ReadOptions | Mapping[str, str | bool | None] | None"
"""Options of the readers: an object, a mapping of their names, or None for the defaults."""

_NAMES = ("iso", *NUMBER_DATES)


def command_line(name: str) -> str:
    """The command-line option of a field of `ReadOptions`.

    >>> command_line("date_format")
    '--date-format'
    """
    return "--" + name.replace("_", "-")
