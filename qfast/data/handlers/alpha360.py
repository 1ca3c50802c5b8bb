"""Alpha360: windows of prices as features, the return that follows as label."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qfast.data.handlers.prices import DEFAULT_LEARN_PROCESSORS, Expressions, PriceHandler
from qfast.data.prices import Instruments, Prices, PriceSource, StorePath
from qfast.data.processors import ProcessorSpec
from qfast.dates import DateLike

DEFAULT_INFER_PROCESSORS: tuple[Mapping[str, Any], ...] = (
    {"class": "ProcessInf", "kwargs": {}},
    {"class": "ZScoreNorm", "kwargs": {}},
    {"class": "Fillna", "kwargs": {}},
)
WINDOW_CHUNK = 1 << 12  # rows whose windows of one field stay in the cache


class Alpha360(PriceHandler):
    """60 days of six price fields as features, and the return of the next but one day as label.

    Features are Ref(f, i) / $close for i = 59 .. 0 and f = close, open, high, low, vwap, then
    Ref($volume, i) / ($volume + 1e-12): CLOSE59 .. CLOSE0, OPEN59 .. VOLUME0, feature by feature with
    time ascending. The label is Ref($close, -2) / Ref($close, -1) - 1, named LABEL0. Features and label
    may look outside [start_time, end_time] and outside an instrument's time in the market.

    Parameters
    ----------
    instruments : str, list, {code: [(start, end), ...]} or {"market": name}
        A market name needs a Qlib store; with other prices all instruments are used.
    start_time, end_time : date-like, optional
        Rows between, both inclusive.
    freq : str
        Calendar of a store: "day", "1min", ...
    infer_processors, learn_processors
        Default: the reference's, which are ProcessInf, ZScoreNorm and Fillna on all columns; DropnaLabel
        and CSZScoreNorm on the label. (Fillna also fills the labels with 0, as in the reference.)
    fit_start_time, fit_end_time : date-like
        Fit window of the processors that need one.
    filter_pipe, inst_processors
        Not available; anything but None is refused.
    shared_processors, process_type, drop_raw
        As in `DataHandlerLP`.
    label : list of expressions, or (expressions, names), optional
        A list without names is named by the expressions' texts.
    data : path, DataFrame or Panel
        Prices, see `qfast.data.sources.load_prices`.
    provider_uri : path or {freq: path}
        Folder of a Qlib binary store; alternative to `data`.
    vwap : {None, "typical"}
        "typical": prices without vwap get (high + low + close) / 3. Otherwise its features are NaN,
        as in the reference.

    Raises
    ------
    ConfigError, DataError
        Neither or both of `data` and `provider_uri`; an argument or prices that cannot be used.

    Notes
    -----
    Raw features are computed from the prices when they are asked for and not kept, unless no
    processor changes them. Source: pyqlib 0.9.7, qlib/contrib/data/handler.py and loader.py.

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
        freq: str = "day",
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
    ) -> None:
        self._set_up(
            instruments=instruments, start_time=start_time, end_time=end_time, freq=freq,
            stages={"shared": shared_processors, "infer": infer_processors, "learn": learn_processors},
            fit_start_time=fit_start_time, fit_end_time=fit_end_time, process_type=process_type, drop_raw=drop_raw,
            label=label, data=data, provider_uri=provider_uri, vwap=vwap,
            refused={"filter_pipe": filter_pipe, "inst_processors": inst_processors},
        )  # fmt: skip

    def _feature_names(self) -> list[str]:
        return [f"{field.upper()}{i}" for field in self.FIELDS for i in range(self.WINDOW - 1, -1, -1)]

    def _feature_fields(self) -> list[str]:
        return list(self.FIELDS)

    def _feature_reach(self) -> tuple[int, int]:
        return self.WINDOW - 1, 0

    def _feature_values(self, prices: Prices, rows: np.ndarray) -> np.ndarray:
        return price_windows(prices, rows, self.FIELDS, self.WINDOW)


class Alpha360vwap(Alpha360):
    """`Alpha360` with the label Ref($vwap, -2) / Ref($vwap, -1) - 1.

    Examples
    --------
    >>> Alpha360vwap.LABEL[1]
    ['LABEL0']
    """

    LABEL = (["Ref($vwap, -2)/Ref($vwap, -1) - 1"], ["LABEL0"])


def price_windows(prices: Prices, rows: np.ndarray, names: Sequence[str], window: int) -> np.ndarray:
    """Last `window` values of each field over today's close (volume: over today's volume + 1e-12).

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
    float32 [B, F * T], field by field, time ascending; NaN where there is no price.
    """
    panel, extents = prices
    out = np.empty((len(rows), len(names) * window), dtype=np.float32)
    codes = panel.instrument_codes
    # window - 1 NaN rows before each instrument let every window be one contiguous slice
    place = np.arange(panel.n_rows) + (window - 1) * (codes.astype(np.int64) + 1)
    padded = np.full(panel.n_rows + (window - 1) * len(panel.instruments), np.nan, dtype=np.float32)
    known = panel.columns("price")
    close = panel.column("close", "price")
    for f, name in enumerate(names):
        columns = slice(f * window, (f + 1) * window)
        if name not in known:
            out[:, columns] = np.nan
            continue
        series = panel.column(name, "price")
        padded[place] = series
        windows = np.lib.stride_tricks.sliding_window_view(padded, window)
        base = series + np.float32(1e-12) if name == "volume" else close
        for start in range(0, len(rows), WINDOW_CHUNK):
            some = rows[start : start + WINDOW_CHUNK]
            target = out[start : start + WINDOW_CHUNK, columns]
            with np.errstate(all="ignore"):
                np.divide(windows[place[some] - (window - 1)], base[some, None], out=target)
            if name in extents:
                stored = extents[name]
                outside = (some < stored.start[codes[some]]) | (some >= stored.stop[codes[some]])
                if outside.any():  # the field's file does not cover this day: the reference has no row there
                    target[outside] = np.nan
    return out
