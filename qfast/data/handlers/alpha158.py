"""Factors by expression as features, and Alpha158, the set of them that quants know."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from qfast.data.expression import fields, reach
from qfast.data.factor_cache import FactorCache
from qfast.data.handlers.prices import DEFAULT_LEARN_PROCESSORS, Expressions, PriceHandler, expressions_and_names
from qfast.data.prices import Instruments, Prices, PriceSource, StorePath
from qfast.data.processors import ProcessorSpec
from qfast.dates import DateLike
from qfast.errors import ConfigError, shown, suggest

log = logging.getLogger("qfast.data")

WINDOWS = (5, 10, 20, 30, 60)
BACK = ("Ref($close, 1)", "Ref($volume, 1)")

KBAR: Mapping[str, str] = {
    "KMID": "($close - $open) / $open",
    "KLEN": "($high - $low) / $open",
    "KMID2": "($close - $open) / ($high - $low + 1e-12)",
    "KUP": "($high - Greater($open, $close)) / $open",
    "KUP2": "($high - Greater($open, $close)) / ($high - $low + 1e-12)",
    "KLOW": "(Less($open, $close) - $low) / $open",
    "KLOW2": "(Less($open, $close) - $low) / ($high - $low + 1e-12)",
    "KSFT": "(2 * $close - $high - $low) / $open",
    "KSFT2": "(2 * $close - $high - $low) / ($high - $low + 1e-12)",
}


def _moves(field: str, name: str) -> dict[str, str]:
    """Shares of the rises and falls of a field in all its moves, and their difference."""
    up, down = f"Greater({field} - Ref({field}, 1), 0)", f"Greater(Ref({field}, 1) - {field}, 0)"
    every = f"(Sum(Abs({field} - Ref({field}, 1)), {{d}}) + 1e-12)"
    return {
        f"{name}P": f"Sum({up}, {{d}}) / {every}",
        f"{name}N": f"Sum({down}, {{d}}) / {every}",
        f"{name}D": f"(Sum({up}, {{d}}) - Sum({down}, {{d}})) / {every}",
    }


# Families of the rolling factors: name -> expression with {d} for the window.
ROLLING: Mapping[str, str] = {
    "ROC": "Ref($close, {d}) / $close",
    "MA": "Mean($close, {d}) / $close",
    "STD": "Std($close, {d}) / $close",
    "BETA": "Slope($close, {d}) / $close",
    "RSQR": "Rsquare($close, {d})",
    "RESI": "Resi($close, {d}) / $close",
    "MAX": "Max($high, {d}) / $close",
    "MIN": "Min($low, {d}) / $close",
    "QTLU": "Quantile($close, {d}, 0.8) / $close",
    "QTLD": "Quantile($close, {d}, 0.2) / $close",
    "RANK": "Rank($close, {d})",
    "RSV": "($close - Min($low, {d})) / (Max($high, {d}) - Min($low, {d}) + 1e-12)",
    "IMAX": "IdxMax($high, {d}) / {d}",
    "IMIN": "IdxMin($low, {d}) / {d}",
    "IMXD": "(IdxMax($high, {d}) - IdxMin($low, {d})) / {d}",
    "CORR": "Corr($close, Log($volume + 1), {d})",
    "CORD": "Corr($close / Ref($close, 1), Log($volume / Ref($volume, 1) + 1), {d})",
    "CNTP": "Mean($close > Ref($close, 1), {d})",
    "CNTN": "Mean($close < Ref($close, 1), {d})",
    "CNTD": "Mean($close > Ref($close, 1), {d}) - Mean($close < Ref($close, 1), {d})",
    **_moves("$close", "SUM"),
    "VMA": "Mean($volume, {d}) / ($volume + 1e-12)",
    "VSTD": "Std($volume, {d}) / ($volume + 1e-12)",
    "WVMA": "Std(Abs($close / Ref($close, 1) - 1) * $volume, {d})"
    " / (Mean(Abs($close / Ref($close, 1) - 1) * $volume, {d}) + 1e-12)",
    **_moves("$volume", "VSUM"),
}
CHOSEN_AS = {"MIN": "LOW"}  # the name by which the reference's include and exclude know a family
SECTIONS: Mapping[str, tuple[str, ...]] = {
    "kbar": (), "price": ("windows", "feature"), "volume": ("windows",), "rolling": ("windows", "include", "exclude"),
}  # fmt: skip


def alpha158_factors(config: Mapping[str, Any] | None = None) -> tuple[list[str], list[str]]:
    """Expressions and names of Alpha158, or of the part of it that `config` asks for.

    Parameters
    ----------
    config : mapping, optional
        "kbar": {} for the nine of the candlestick; "price": {"windows": [0], "feature": ["OPEN", ...]} for prices
        of days ago over today's close; "volume": {"windows": [0]}; "rolling": {"windows": [5, ...], "include":
        ["ROC", ...], "exclude": [...]} for the 29 rolling families (MIN is chosen as "LOW" or "MIN"). Default: kbar,
        today's open, high, low and vwap, and all rolling families over 5, 10, 20, 30 and 60 days.

    Raises
    ------
    ConfigError
        An unknown section, setting or family; windows that are no whole numbers.

    Source
    ------
    Alpha158DL of pyqlib 0.9.7, qlib/contrib/data/loader.py.

    Examples
    --------
    >>> texts, names = alpha158_factors()
    >>> len(names), names[0], texts[0]
    (158, 'KMID', '($close - $open) / $open')
    >>> alpha158_factors({"rolling": {"windows": [7], "include": ["MA"]}})
    (['Mean($close, 7) / $close'], ['MA7'])
    """
    if config is None:
        config = {"kbar": {}, "price": {"windows": [0], "feature": ["OPEN", "HIGH", "LOW", "VWAP"]}, "rolling": {}}
    _check_config(config)
    found: dict[str, str] = {}
    if "kbar" in config:
        found |= KBAR
    if "price" in config:
        price = config["price"] or {}
        for field in price.get("feature", ("OPEN", "HIGH", "LOW", "CLOSE", "VWAP")):
            for d in price.get("windows", range(5)):
                found[f"{field.upper()}{d}"] = f"{_ago(field, d)} / $close"
    if "volume" in config:
        for d in (config["volume"] or {}).get("windows", range(5)):
            found[f"VOLUME{d}"] = f"{_ago('volume', d)} / ($volume + 1e-12)"
    if "rolling" in config:
        rolling = config["rolling"] or {}
        include, exclude = rolling.get("include"), rolling.get("exclude") or ()
        for family, text in ROLLING.items():
            names = {family, CHOSEN_AS.get(family, family)}
            if names.isdisjoint(exclude) and (include is None or not names.isdisjoint(include)):
                found |= {f"{family}{d}": text.replace("{d}", str(d)) for d in rolling.get("windows", WINDOWS)}
    if not found:
        raise ConfigError(f"the configuration of Alpha158 asks for no factor: {shown(dict(config))}.")
    return list(found.values()), list(found)


def _ago(field: str, days: int) -> str:
    return f"Ref(${field.lower()}, {days})" if days else f"${field.lower()}"


def _check_config(config: object) -> None:
    if not isinstance(config, Mapping):
        raise ConfigError(f"the configuration of Alpha158 must be a mapping, got {shown(config)}.")
    for section, settings in config.items():
        if section not in SECTIONS:
            raise ConfigError(
                f"Alpha158 has no section {section!r}; it has {list(SECTIONS)}." + suggest(section, SECTIONS)
            )
        if settings is not None and not isinstance(settings, Mapping):
            raise ConfigError(f"section {section!r} of Alpha158 must be a mapping, got {shown(settings)}.")
        for name, value in (settings or {}).items():
            if name not in SECTIONS[section]:
                known = list(SECTIONS[section])
                raise ConfigError(f"section {section!r} of Alpha158 has {known}, not {name!r}." + suggest(name, known))
            _check_setting(section, name, value)


def _check_setting(section: str, name: str, value: object) -> None:
    if name in ("include", "exclude") and value is None:
        return
    if isinstance(value, str) or not isinstance(value, (Sequence, range)):
        raise ConfigError(f"{section}.{name} of Alpha158 must be a list, got {shown(value)}.")
    if name == "windows":
        least = 1 if section == "rolling" else 0
        wrong = [d for d in value if not isinstance(d, int) or isinstance(d, bool) or d < least]
        if wrong:
            raise ConfigError(f"{section}.windows of Alpha158 must be whole numbers from {least}, got {wrong[0]!r}.")
    elif name == "feature":
        wrong = [field for field in value if not isinstance(field, str)]
        if wrong:
            raise ConfigError(f"price.feature of Alpha158 must name fields, got {wrong[0]!r}.")
    else:
        known = [*ROLLING, *CHOSEN_AS.values()]
        for family in value:
            if family not in known:
                raise ConfigError(
                    f"rolling.{name} of Alpha158 names {family!r}; known: {known}." + suggest(str(family), known)
                )


class FactorHandler(PriceHandler):
    """Features that are expressions over prices, and a label.

    Parameters
    ----------
    features : list of expressions, or (expressions, names)
        See `qfast.data.factors`. A list without names is named by the expressions' texts.
    instruments : str, list, {code: [(start, end), ...]} or {"market": name}
        A market name needs a Qlib store; with other prices all instruments are used.
    start_time, end_time : date-like, optional
        Rows between, both inclusive. Expressions look outside them, and outside an instrument's time in the market.
    freq : str
        Calendar of a store: "day", "1min", ...
    infer_processors, learn_processors, shared_processors
        Default: none for inference; DropnaLabel and CSZScoreNorm on the label for learning.
    fit_start_time, fit_end_time : date-like
        Fit window of the processors that need one.
    process_type, drop_raw
        As in `DataHandlerLP`.
    label : list of expressions, or (expressions, names), optional
        Default: Ref($close, -2)/Ref($close, -1) - 1, named LABEL0.
    data : path, DataFrame or Panel
        Prices, see `qfast.data.sources.load_prices`.
    provider_uri : path or {freq: path}
        Folder of a Qlib binary store; alternative to `data`.
    vwap : {None, "typical"}
        "typical": prices without vwap get (high + low + close) / 3. Otherwise what uses it is NaN,
        as in the reference.
    cache : path, optional
        Folder in which computed factors are kept between runs, see `qfast.data.factor_cache`.
    filter_pipe, inst_processors
        Not available; anything but None is refused.

    Raises
    ------
    ConfigError, DataError
        An expression that does not parse, neither or both of `data` and `provider_uri`; an argument or prices that
        cannot be used.

    Examples
    --------
    >>> import pandas as pd
    >>> dates = pd.date_range("2024-01-01", periods=5)
    >>> prices = pd.DataFrame({"datetime": dates, "instrument": "A", "close": np.arange(1.0, 6.0)})
    >>> handler = FactorHandler((["Mean($close, 2)"], ["MA2"]), data=prices, learn_processors=[])
    >>> handler.fetch(col_set="feature")["MA2"].tolist()
    [1.0, 1.5, 2.5, 3.5, 4.5]
    """

    def __init__(
        self,
        features: Expressions,
        instruments: Instruments = "all",
        start_time: DateLike | None = None,
        end_time: DateLike | None = None,
        freq: str = "day",
        infer_processors: Sequence[ProcessorSpec] = (),
        learn_processors: Sequence[ProcessorSpec] = DEFAULT_LEARN_PROCESSORS,
        fit_start_time: DateLike | None = None,
        fit_end_time: DateLike | None = None,
        process_type: str = "append",
        filter_pipe: None = None,
        inst_processors: None = None,
        *,
        shared_processors: Sequence[ProcessorSpec] = (),
        drop_raw: bool = False,
        label: Expressions | None = None,
        data: PriceSource | None = None,
        provider_uri: StorePath | None = None,
        vwap: str | None = None,
        cache: str | os.PathLike[str] | None = None,
    ) -> None:
        self._texts, self._names = expressions_and_names("features", features)
        self._reach = tuple(max(side) for side in zip(*map(reach, self._texts), strict=True))
        self._cache = None if cache is None else FactorCache(cache)
        self._set_up(
            instruments=instruments, start_time=start_time, end_time=end_time, freq=freq,
            stages={"shared": shared_processors, "infer": infer_processors, "learn": learn_processors},
            fit_start_time=fit_start_time, fit_end_time=fit_end_time, process_type=process_type, drop_raw=drop_raw,
            label=label, data=data, provider_uri=provider_uri, vwap=vwap,
            refused={"filter_pipe": filter_pipe, "inst_processors": inst_processors},
        )  # fmt: skip

    def _feature_names(self) -> list[str]:
        return self._names

    def _feature_texts(self) -> list[str]:
        return self._texts

    def _feature_fields(self) -> list[str]:
        return list(dict.fromkeys(field for text in self._texts for field in fields(text)))

    def _feature_reach(self) -> tuple[int, int]:
        before, after = self._reach
        return before, after

    def _feature_values(self, prices: Prices, rows: np.ndarray) -> np.ndarray:
        if self._cache is None:
            return self._evaluated(self._texts, prices, rows)
        key = self._cache.key(self._texts, prices, rows, self.start_time, self.mask_prices)
        found = self._cache.read(key, self._texts, len(rows))
        if found is None:
            found = self._evaluated(self._texts, prices, rows)
            self._cache.write(key, self._texts, found)
        return found


class Alpha158(FactorHandler):
    """158 factors of the last 60 days as features, and the return of the next but one day as label.

    Nine of the candlestick (KMID, KLEN, ...), today's open, high, low and vwap over the close, and 29 rolling families
    over 5, 10, 20, 30 and 60 days, family by family (ROC5 .. VSUMD60).

    Parameters
    ----------
    instruments, start_time, end_time, freq, infer_processors, learn_processors, fit_start_time, fit_end_time
        As in `FactorHandler`; the reference's names, order and defaults.
    process_type, filter_pipe, inst_processors, shared_processors, drop_raw, label, data, provider_uri, vwap, cache
        As in `FactorHandler`.
    config : mapping, optional
        Part of the factors, see `alpha158_factors`.

    Raises
    ------
    ConfigError, DataError
        As in `FactorHandler` and `alpha158_factors`.

    Notes
    -----
    A subclass may override `get_feature_config` and `get_label_config`, as with the reference. Source: pyqlib 0.9.7,
    qlib/contrib/data/handler.py and loader.py.

    Examples
    --------
    >>> from qfast.data import synthetic
    >>> handler = Alpha158(data=synthetic.prices(3, 70), learn_processors=[])
    >>> handler.fetch(col_set="feature").shape[1], handler.get_cols("feature")[13]
    (158, 'ROC5')
    """

    DEFAULT: ClassVar[Mapping[str, Any] | None] = None

    def __init__(
        self,
        instruments: Instruments = "csi500",
        start_time: DateLike | None = None,
        end_time: DateLike | None = None,
        freq: str = "day",
        infer_processors: Sequence[ProcessorSpec] = (),
        learn_processors: Sequence[ProcessorSpec] = DEFAULT_LEARN_PROCESSORS,
        fit_start_time: DateLike | None = None,
        fit_end_time: DateLike | None = None,
        process_type: str = "append",
        filter_pipe: None = None,
        inst_processors: None = None,
        *,
        shared_processors: Sequence[ProcessorSpec] = (),
        drop_raw: bool = False,
        label: Expressions | None = None,
        data: PriceSource | None = None,
        provider_uri: StorePath | None = None,
        vwap: str | None = None,
        cache: str | os.PathLike[str] | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(
            self.get_feature_config() if config is None else alpha158_factors(config),
            instruments, start_time, end_time, freq, infer_processors, learn_processors, fit_start_time, fit_end_time,
            process_type, filter_pipe, inst_processors, shared_processors=shared_processors, drop_raw=drop_raw,
            label=label, data=data, provider_uri=provider_uri, vwap=vwap, cache=cache,
        )  # fmt: skip

    def get_feature_config(self) -> tuple[list[str], list[str]]:
        """(expressions, names) of the features where the constructor is given no `config`."""
        return alpha158_factors(self.DEFAULT)


class Alpha158vwap(Alpha158):
    """`Alpha158` with the label Ref($vwap, -2) / Ref($vwap, -1) - 1.

    Examples
    --------
    >>> Alpha158vwap.LABEL[1]
    ['LABEL0']
    """

    LABEL = (["Ref($vwap, -2)/Ref($vwap, -1) - 1"], ["LABEL0"])
