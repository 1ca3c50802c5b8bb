"""Tables of other libraries (Polars, Arrow, DuckDB) as pandas frames, through the Arrow interface that they share."""

from __future__ import annotations

import importlib
from typing import Any

import pandas as pd

from qfast.errors import ConfigError

__all__ = ["is_arrow_table", "to_pandas"]

METHOD = "__arrow_c_stream__"  # of the Arrow PyCapsule interface


def is_arrow_table(source: object) -> bool:
    """Whether an object offers its content as Arrow columns. Pandas frames do too, but need no conversion."""
    return hasattr(source, METHOD) and not isinstance(source, (pd.DataFrame, pd.Series, type))


def to_pandas(source: Any) -> pd.DataFrame:
    """Convert a table of another library to a pandas frame with the same columns.

    Parameters
    ----------
    source : object with `__arrow_c_stream__`
        For example a polars.DataFrame or a pyarrow.Table.

    Raises
    ------
    ConfigError
        pyarrow is not installed.

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
        pyarrow = importlib.import_module("pyarrow")
    except ImportError as error:
        raise ConfigError(
            f"prices of type {type(source).__name__} need pyarrow, which cannot be imported ({error}). Remedy: pip "
            "install 'qfast-models[parquet]', or pass a pandas frame."
        ) from None
    frame: pd.DataFrame = pyarrow.table(source).to_pandas()
    return frame
