"""Qlib's handler Alpha360, whose features are windows of prices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qfast.data.handlers.prices import DEFAULT_LEARN_PROCESSORS, Expressions, PriceHandler
from qfast.data.prices import Instruments, Prices, PriceSource, StorePath
from qfast.data.processors import ProcessorSpec
from qfast.dates import DateLike
from qfast.read_options import ReadSettings

DEFAULT_INFER_PROCESSORS: tuple[Mapping[str, Any], ...] = (
    {"class": "ProcessInf", "kwargs": {}},
    {"class": "ZScoreNorm", "kwargs": {}},
    {"class": "Fillna", "kwargs": {}},
)
WINDOW_CHUNK = 1 << 12  # rows at a time, whose windows of one field stay in the CPU cache


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
    filter_pipe, inst_processors
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
    read_options : ReadOptions or mapping, optional
        How to read tables, see `qfast.data.ReadOptions`.

    Raises
    ------
    ConfigError
        An argument is invalid, or not exactly one of `data` and `provider_uri` is passed.
    DataError
        The prices cannot be used.

    Notes
    -----
    If processors change the features, the raw features are not stored but computed again from the prices for every
    request. Source: qlib/contrib/data/handler.py and loader.py of pyqlib 0.9.7.

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
        filter_pipe: None = None,
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
    ) -> None:
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
            unavailable={"filter_pipe": filter_pipe, "inst_processors": inst_processors},
        )

    def _feature_names(self) -> list[str]:
        return [f"{field.upper()}{i}" for field in self.FIELDS for i in range(self.WINDOW - 1, -1, -1)]

    def _feature_fields(self) -> list[str]:
        return list(self.FIELDS)

    def _fields_by_feature(self) -> dict[str, set[str]]:
        return {f"{field.upper()}{i}": {field, "close"} for field in self.FIELDS for i in range(self.WINDOW)}

    def _feature_reach(self) -> tuple[int, int]:
        return self.WINDOW - 1, 0

    def _feature_values(self, prices: Prices, rows: np.ndarray) -> np.ndarray:
        return price_windows(prices, rows, self.FIELDS, self.WINDOW)


class Alpha360vwap(Alpha360):
    """`Alpha360` with the label Ref($vwap, -2)/Ref($vwap, -1) - 1.

    Examples
    --------
    >>> Alpha360vwap.LABEL[1]
    ['LABEL0']
    """

    LABEL = (["Ref($vwap, -2)/Ref($vwap, -1) - 1"], ["LABEL0"])


def price_windows(prices: Prices, rows: np.ndarray, names: Sequence[str], window: int) -> np.ndarray:
    """The last `window` values of each field, divided by today's close (volume: by today's volume + 1e-12).

    Parameters
    ----------
    prices : Prices
    rows : int64 [B]
        Panel rows to compute.
    names : sequence of str
        F field names.
    window : int
        T.

    Returns
    -------
    float32 [B, F * T]
        Field by field, with time ascending; NaN where there is no price.

    Examples
    --------
    >>> import pandas as pd
    >>> from qfast.data import load_prices
    >>> dates = pd.date_range("2024-01-01", periods=3)
    >>> frame = pd.DataFrame({"datetime": dates, "instrument": "A", "close": [1.0, 2.0, 4.0]})
    >>> price_windows(Prices(load_prices(frame), {}), np.array([1, 2]), ["close"], 2).tolist()
    [[0.5, 1.0], [0.5, 1.0]]
    """
    panel, extents = prices
    out = np.empty((len(rows), len(names) * window), dtype=np.float32)
    codes = panel.instrument_codes
    # With window - 1 rows of NaN before each instrument, every window is a contiguous slice.
    place = np.arange(panel.n_rows) + (window - 1) * (codes.astype(np.int64) + 1)
    padded = np.full(panel.n_rows + (window - 1) * len(panel.instruments), np.nan, dtype=np.float32)
    fields = panel.columns("price")
    close = panel.column("close", "price")
    for f, name in enumerate(names):
        columns = slice(f * window, (f + 1) * window)
        if name not in fields:
            out[:, columns] = np.nan
            continue
        series = panel.column(name, "price")
        padded[place] = series
        windows = np.lib.stride_tricks.sliding_window_view(padded, window)
        base = series + np.float32(1e-12) if name == "volume" else close
        for start in range(0, len(rows), WINDOW_CHUNK):
            chunk = rows[start : start + WINDOW_CHUNK]
            target = out[start : start + WINDOW_CHUNK, columns]
            with np.errstate(all="ignore"):
                np.divide(windows[place[chunk] - (window - 1)], base[chunk, None], out=target)
            if name in extents:
                stored = extents[name]
                outside = (chunk < stored.start[codes[chunk]]) | (chunk >= stored.stop[codes[chunk]])
                if outside.any():  # like in Qlib, a field has no windows on days that its file does not cover
                    target[outside] = np.nan
    return out
