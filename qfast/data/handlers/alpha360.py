"""Qlib's handler Alpha360, whose features are windows of prices."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from qfast.data.filters import FilterSpec
from qfast.data.handlers.base import one_of
from qfast.data.handlers.prices import DEFAULT_LEARN_PROCESSORS, Expressions, PriceHandler
from qfast.data.panel import Block, WindowBlock
from qfast.data.price_windows import PriceWindows
from qfast.data.prices import Instruments, Prices, PriceSource, StorePath
from qfast.data.processors import ProcessorSpec
from qfast.data.processors.columns import rows_by_chunk
from qfast.dates import DateLike
from qfast.read_options import ReadSettings

DEFAULT_INFER_PROCESSORS: tuple[Mapping[str, Any], ...] = (
    {"class": "ProcessInf", "kwargs": {}},
    {"class": "ZScoreNorm", "kwargs": {}},
    {"class": "Fillna", "kwargs": {}},
)
STORAGE = ("auto", "view", "columns")


class Alpha360(PriceHandler):
    """Qlib's handler Alpha360: 60 days of six price fields as features.

    The features are Ref(f, i) / $close for i = 59 to 0 and f = close, open, high, low, vwap, followed by
    Ref($volume, i) / ($volume + 1e-12). Their names are CLOSE59 to CLOSE0, OPEN59 to OPEN0, ..., VOLUME59 to VOLUME0.
    The label is Ref($close, -2)/Ref($close, -1) - 1, the return from the next day to the day after, named LABEL0.
    Features and label also read prices outside [start_time, end_time], and prices of an instrument at times when it
    does not belong to the market.

    Parameters
    ----------
    instruments : str, list, {code: [(start, end), ...]} or {"market": name}
        Only a Qlib store has markets; for other prices a market means all instruments.
    start_time, end_time : date-like, optional
        First and last row, both inclusive.
    freq : str, optional
        Calendar of a store: "day" (default), "1min", ... For tables, "day" normalizes times to dates.
    infer_processors, learn_processors
        Default: Qlib's. ProcessInf, ZScoreNorm and Fillna on all columns for inference; DropnaLabel, and CSZScoreNorm
        on the label, for learning. Like in Qlib, Fillna also fills missing labels with 0.
    fit_start_time, fit_end_time : date-like
        Period from which processors learn their statistics, both inclusive.
    filter_pipe : list, optional
        Filters of the market `instruments`: Qlib's configurations, or objects of `qfast.data.filters`.
    inst_processors
        Not available. Only None is allowed.
    shared_processors, process_type, drop_raw
        As in `DataHandlerLP`.
    label : list of expressions, or (expressions, names), optional
        Without names, the expressions are the column names.
    data : path, DataFrame or Panel
        Prices, see `qfast.data.sources.load_prices`.
    provider_uri : path or {freq: path}
        Folder of a Qlib binary store, as an alternative to `data`.
    vwap : {None, "typical"}
        "typical": prices without a vwap get (high + low + close) / 3. None: like in Qlib, the features of a missing
        vwap are NaN.
    windows : {"auto", "view", "columns"}
        How the 360 columns are stored. "view": not at all. The handler keeps the six prices of each row, and every
        batch computes its columns, including the processors. This needs a fortieth of the memory of columns. "columns":
        in memory. "auto": as a view, unless a processor needs the columns in memory. The log names that processor;
        with "view" it is an error. RobustZScoreNorm, ZScoreNorm, MinMaxNorm, Fillna, TanhProcess, DropnaProcessor and
        all processors of the label keep the view. So do ProcessInf, if fewer than a sixteenth of the rows contain an
        infinite feature, and FilterCol and DropCol, if a quarter of the columns remains. The values are equal to the
        bit.
    read_options : ReadOptions or mapping, optional
        How to read tables, see `qfast.data.ReadOptions`.
    compat : {None, "qlib"}
        Applies to the label, see `FactorHandler`. The features equal Qlib's with either value.
    memory_limit, scratch
        As in `DataHandlerLP`. A view needs no files.

    Raises
    ------
    ConfigError
        An argument is invalid, or not exactly one of `data` and `provider_uri` is passed.
    DataError
        The prices cannot be used.

    Notes
    -----
    With columns in memory that processors change, the raw features are not stored but computed again from the prices
    for every request. Source: qlib/contrib/data/handler.py and loader.py of pyqlib 0.9.7.

    Examples
    --------
    >>> import pandas as pd
    >>> dates = pd.date_range("2024-01-01", periods=70)
    >>> prices = pd.DataFrame({"datetime": dates, "instrument": "A", "close": np.arange(1.0, 71.0), "volume": 1.0})
    >>> handler = Alpha360(data=prices, infer_processors=[], learn_processors=[])
    >>> frame = handler.fetch(col_set="feature")
    >>> frame.shape, float(frame["CLOSE1"].iloc[1])
    ((70, 360), 0.5)
    """

    WINDOW = 60
    FIELDS = ("close", "open", "high", "low", "vwap", "volume")

    def __init__(
        self,
        instruments: Instruments = "csi500",
        start_time: DateLike | None = None,
        end_time: DateLike | None = None,
        freq: str | None = None,
        infer_processors: Sequence[ProcessorSpec] = DEFAULT_INFER_PROCESSORS,
        learn_processors: Sequence[ProcessorSpec] = DEFAULT_LEARN_PROCESSORS,
        fit_start_time: DateLike | None = None,
        fit_end_time: DateLike | None = None,
        filter_pipe: Sequence[FilterSpec] | None = None,
        inst_processors: None = None,
        *,
        shared_processors: Sequence[ProcessorSpec] = (),
        process_type: str = "append",
        drop_raw: bool = False,
        label: Expressions | None = None,
        data: PriceSource | None = None,
        provider_uri: StorePath | None = None,
        vwap: str | None = None,
        read_options: ReadSettings = None,
        windows: str = "auto",
        compat: str | None = None,
        memory_limit: str | float | None = None,
        scratch: str | os.PathLike[str] | None = None,
    ) -> None:
        self.windows = one_of("windows", windows, STORAGE)
        self._set_up(
            instruments=instruments,
            start_time=start_time,
            end_time=end_time,
            freq=freq,
            stages={"shared": shared_processors, "infer": infer_processors, "learn": learn_processors},
            fit_start_time=fit_start_time,
            fit_end_time=fit_end_time,
            process_type=process_type,
            drop_raw=drop_raw,
            label=label,
            data=data,
            provider_uri=provider_uri,
            vwap=vwap,
            read_options=read_options,
            compat=compat,
            filter_pipe=filter_pipe,
            unavailable={"inst_processors": inst_processors},
            memory_limit=memory_limit,
            scratch=scratch,
        )

    def _feature_names(self) -> list[str]:
        return [f"{field.upper()}{i}" for field in self.FIELDS for i in range(self.WINDOW - 1, -1, -1)]

    def _feature_fields(self) -> list[str]:
        return list(self.FIELDS)

    def _fields_by_feature(self) -> dict[str, set[str]]:
        return {f"{field.upper()}{i}": {field, "close"} for field in self.FIELDS for i in range(self.WINDOW)}

    def _feature_reach(self) -> tuple[int, int]:
        return self.WINDOW - 1, 0

    def _feature_block(self, prices: Prices, rows: np.ndarray) -> Block:
        if self.windows == "columns":
            return super()._feature_block(prices, rows)
        return WindowBlock(self._price_windows(prices, rows), tuple(self._feature_names()))

    def _feature_values(self, prices: Prices, rows: np.ndarray) -> np.ndarray:
        windows = self._price_windows(prices, rows)
        values = self._storage.empty(windows.shape)
        for part in rows_by_chunk(len(rows)):
            values[part] = windows[part]
        return values

    def _price_windows(self, prices: Prices, rows: np.ndarray) -> PriceWindows:
        windows = PriceWindows.of_prices(prices, rows, self.FIELDS, self.WINDOW)
        return replace(windows, required=self.windows == "view")


class Alpha360vwap(Alpha360):
    """`Alpha360` with the label Ref($vwap, -2)/Ref($vwap, -1) - 1.

    Examples
    --------
    >>> Alpha360vwap.LABEL[1]
    ['LABEL0']
    """

    LABEL = (["Ref($vwap, -2)/Ref($vwap, -1) - 1"], ["LABEL0"])
