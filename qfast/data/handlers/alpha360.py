"""Alpha360: windows of prices as features, the return that follows as label."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from qfast.data.expression import evaluate, fields, reach
from qfast.data.handlers.base import DataHandlerLP
from qfast.data.panel import Block, Panel
from qfast.data.prices import PRICE_FIELDS, Prices
from qfast.data.processors import Workspace
from qfast.data.rows import take_rows
from qfast.data.sources import read_prices
from qfast.errors import ConfigError, DataError, shown

log = logging.getLogger("qfast.data")

DEFAULT_INFER_PROCESSORS: tuple[Mapping[str, Any], ...] = (
    {"class": "ProcessInf", "kwargs": {}},
    {"class": "ZScoreNorm", "kwargs": {}},
    {"class": "Fillna", "kwargs": {}},
)
DEFAULT_LEARN_PROCESSORS: tuple[Mapping[str, Any], ...] = (
    {"class": "DropnaLabel"},
    {"class": "CSZScoreNorm", "kwargs": {"fields_group": "label"}},
)
WINDOW_CHUNK = 1 << 12  # rows whose windows of one field stay in the cache


class Alpha360(DataHandlerLP):
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

    LABEL = (["Ref($close, -2)/Ref($close, -1) - 1"], ["LABEL0"])
    WINDOW = 60
    FIELDS = ("close", "open", "high", "low", "vwap", "volume")

    def __init__(
        self,
        instruments: Any = "csi500",
        start_time: Any = None,
        end_time: Any = None,
        freq: str = "day",
        infer_processors: Sequence[Any] = DEFAULT_INFER_PROCESSORS,
        learn_processors: Sequence[Any] = DEFAULT_LEARN_PROCESSORS,
        fit_start_time: Any = None,
        fit_end_time: Any = None,
        filter_pipe: None = None,
        inst_processors: None = None,
        *,
        shared_processors: Sequence[Any] = (),
        process_type: str = "append",
        drop_raw: bool = False,
        label: Any = None,
        data: Any = None,
        provider_uri: Any = None,
        vwap: str | None = None,
    ) -> None:
        for name, value in (("filter_pipe", filter_pipe), ("inst_processors", inst_processors)):
            if value:
                raise ConfigError(f"{type(self).__name__}: {name} is not available, got {shown(value)}.")
        self._configure(
            {"shared": shared_processors, "infer": infer_processors, "learn": learn_processors},
            process_type, drop_raw, instruments, start_time, end_time, fit_start_time, fit_end_time,
        )  # fmt: skip
        self.freq = freq
        self._label, self._label_names = _label_config(self.LABEL if label is None else label)
        before, after = (max(side) for side in zip((self.WINDOW - 1, 0), *map(reach, self._label), strict=True))
        self._prices = read_prices(
            data, provider_uri=provider_uri, instruments=instruments, start_time=start_time, end_time=end_time,
            freq=freq, vwap=vwap, margin=(before, after),
            wanted=list(dict.fromkeys([*self.FIELDS, *(f for text in self._label for f in fields(text))])),
        )  # fmt: skip
        self._rows = self._prices.panel.rows_between(start_time, end_time)
        self._report_missing_fields()
        self._labels = self._label_panel()
        raw = self._with_features(self._labels)
        space = Workspace(raw.blocks if drop_raw else ["feature"])
        self._process(raw, space)
        if not drop_raw and "feature" not in space.overwritten:
            self._raw = raw  # nobody changed the features: the raw panel costs nothing
        if drop_raw:
            del self._prices, self._labels

    @property
    def prices(self) -> Panel | None:
        """The prices behind the features, group "price"; None where drop_raw gave them up."""
        found = getattr(self, "_prices", None)
        return None if found is None else found.panel

    def _report_missing_fields(self) -> None:
        """The reference reads a field without a file as NaN; say so, and refuse if none is there."""
        known = self._prices.panel.columns("price")
        missing = [f for f in self.FIELDS if f not in known]
        if "close" in missing:
            raise DataError(f"{type(self).__name__}: the prices have no column 'close'; they have {list(known)}.")
        if missing:
            log.warning(
                "%s: the prices have no column(s) %s; their features are NaN.%s",
                type(self).__name__, ", ".join(missing),
                " vwap='typical' uses (high + low + close) / 3 instead." if "vwap" in missing else "",
            )  # fmt: skip

    def _label_panel(self) -> Panel:
        """The handler's rows with the group "label" only."""
        panel, extents = self._prices
        optional = set(PRICE_FIELDS)
        values = np.empty((len(self._rows), len(self._label)), dtype=np.float32)
        for j, text in enumerate(self._label):
            values[:, j] = evaluate(text, panel, extents=extents, optional=optional)[self._rows]
        keys = replace(take_rows(panel, self._rows, groups=()), live=None)
        return keys.with_group("label", values, self._label_names)

    def _with_features(self, labels: Panel) -> Panel:
        names = [f"{field.upper()}{i}" for field in self.FIELDS for i in range(self.WINDOW - 1, -1, -1)]
        values = price_windows(self._prices, self._rows, self.FIELDS, self.WINDOW)
        features = replace(labels, blocks={"feature": Block(values, tuple(names))})
        return replace(labels, blocks={**features.blocks, **labels.blocks})

    def _raw_panel(self, groups: Sequence[str] | None) -> Panel:
        if self._raw is not None or self.drop_raw:
            return super()._raw_panel(groups)
        if groups is not None and set(groups) <= {"label"}:
            return self._labels
        log.debug("%s: raw features are computed again from the prices", type(self).__name__)
        return self._with_features(self._labels)


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


def _label_config(label: Any) -> tuple[list[str], list[str]]:
    """Expressions and column names of a label setting."""
    if isinstance(label, str):
        label = [label]
    if isinstance(label, (list, tuple)) and len(label):
        if all(isinstance(text, str) for text in label):
            return list(label), list(label)
        if len(label) == 2 and all(isinstance(part, (list, tuple)) for part in label):
            texts, names = (list(part) for part in label)
            if texts and len(texts) == len(names) and all(isinstance(t, str) for t in [*texts, *names]):
                return texts, names
    raise ConfigError(
        f"label must be a list of expressions or (expressions, names) of equal length, got {shown(label)}."
    )
