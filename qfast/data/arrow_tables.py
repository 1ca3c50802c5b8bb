"""Tables of other libraries (Polars, Arrow, DuckDB) as pandas frames, through the Arrow interface that they share."""

from __future__ import annotations

import importlib
from typing import Any, Protocol, TypeGuard, TypeVar

import pandas as pd

from qfast.errors import DATA_PAGE, ConfigError, DataError

__all__ = ["ArrowTable", "conversion_hint", "is_arrow_table", "to_pandas", "without_arrow"]

METHOD = "__arrow_c_stream__"  # of the Arrow PyCapsule interface
CONVERSIONS = ("to_pandas", "toPandas", "collect", "compute", "df")  # of ibis, Spark, lazy Polars frames, Dask, DuckDB

T = TypeVar("T")


class ArrowTable(Protocol):
    """A table with Arrow's interface, for example a polars.DataFrame or a pyarrow.Table."""

    def __arrow_c_stream__(self, requested_schema: object | None = None) -> object:
        """A capsule with the columns of the table."""


def is_arrow_table(source: object) -> TypeGuard[ArrowTable]:
    """Whether an object offers its content as Arrow columns. Pandas frames do too, but need no conversion."""
    return hasattr(source, METHOD) and not isinstance(source, (pd.DataFrame, pd.Series, type))


def to_pandas(source: ArrowTable) -> pd.DataFrame:
    """Convert a table of another library to a pandas frame with the same columns.

    Parameters
    ----------
    source : object with `__arrow_c_stream__`
        For example a polars.DataFrame or a pyarrow.Table.

    Raises
    ------
    ConfigError
        pyarrow is not installed.
    DataError
        The object is a single column, or pandas has no type for one of its columns.

    Source
    ------
    https://arrow.apache.org/docs/format/CDataInterface/PyCapsuleInterface.html

    Examples
    --------
    >>> import pyarrow
    >>> to_pandas(pyarrow.table({"close": [1.0, 2.0]}))["close"].tolist()
    [1.0, 2.0]
    """
    try:
        pyarrow: Any = importlib.import_module("pyarrow")
    except ImportError as error:
        raise ConfigError(
            f"prices of type {type(source).__name__} need pyarrow, which cannot be imported ({error}). Remedy: pip "
            "install 'qfast-models[parquet]', or pass a pandas frame."
        ) from None
    try:
        frame: pd.DataFrame = pyarrow.table(source).to_pandas()
    except (pyarrow.ArrowException, TypeError, ValueError) as error:
        raise DataError(
            f"the {type(source).__name__} cannot be converted to a table of columns: {error}. {DATA_PAGE} shows every "
            "accepted form."
        ) from None
    return frame


def without_arrow(source: T) -> T | pd.DataFrame:
    """A table of another library as a pandas frame; any other object unchanged.

    A stream of Arrow batches can be read once, so a function that reads its source several times converts it first.
    """
    return to_pandas(source) if is_arrow_table(source) else source


def conversion_hint(source: object) -> str:
    """The remedy for a table that is neither a pandas frame nor an Arrow table, or "" if none is known.

    >>> class LazyFrame:
    ...     def collect(self): ...
    >>> conversion_hint(LazyFrame())
    ' Remedy: LazyFrame.collect() first.'
    """
    method = next((name for name in CONVERSIONS if callable(getattr(source, name, None))), None)
    return "" if method is None else f" Remedy: {type(source).__name__}.{method}() first."
