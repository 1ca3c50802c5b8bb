"""Handlers whose features are factor expressions, and Qlib's factor set Alpha158."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np

from qfast.data.expression import fields, reach
from qfast.data.factor_cache import FactorCache
from qfast.data.filters import FilterSpec
from qfast.data.handlers.prices import DEFAULT_LEARN_PROCESSORS, Expressions, PriceHandler, expressions_and_names
from qfast.data.panel import Block
from qfast.data.prices import Instruments, Prices, PriceSource, StorePath
from qfast.data.processors import ProcessorSpec
from qfast.data.rows import take_rows
from qfast.dates import DateLike
from qfast.errors import ConfigError, shown, suggest
from qfast.read_options import ReadSettings

log = logging.getLogger("qfast.data")

# Methods that compute and process the features. If a subclass overrides one of them, all features are computed.
COMPUTE_FEATURES = (
    *("_feature_names", "_feature_texts", "_feature_values", "_feature_block", "_features_without", "_with_features"),
    *("_evaluated", "_computed", "_process"),
)

WINDOWS = (5, 10, 20, 30, 60)

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
    """Sums of a field's rises and of its falls over the sum of its absolute changes, and their difference."""
    up, down = f"Greater({field} - Ref({field}, 1), 0)", f"Greater(Ref({field}, 1) - {field}, 0)"
    total = f"(Sum(Abs({field} - Ref({field}, 1)), {{d}}) + 1e-12)"
    return {
        f"{name}P": f"Sum({up}, {{d}}) / {total}",
        f"{name}N": f"Sum({down}, {{d}}) / {total}",
        f"{name}D": f"(Sum({up}, {{d}}) - Sum({down}, {{d}})) / {total}",
    }


# Families of rolling factors: name -> expression, in which {d} is the window.
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
QLIB_NAMES = {"MIN": "LOW"}  # family -> its name in Qlib's "include" and "exclude"
SECTIONS: Mapping[str, tuple[str, ...]] = {
    "kbar": (),
    "price": ("windows", "feature"),
    "volume": ("windows",),
    "rolling": ("windows", "include", "exclude"),
}


def alpha158_factors(config: Mapping[str, Any] | None = None) -> tuple[list[str], list[str]]:
    """Expressions and names of the factors of Alpha158, or of the part that `config` selects.

    Parameters
    ----------
    config : mapping, optional
        The sections to include:

        - "kbar": {}, the nine candlestick factors.
        - "price": {"windows": [0, ...], "feature": ["OPEN", ...]}, prices of that many days ago over today's close.
        - "volume": {"windows": [0, ...]}, volumes of that many days ago over today's volume.
        - "rolling": {"windows": [5, ...], "include": ["ROC", ...], "exclude": [...]}, the 29 rolling families. Like in
          Qlib, the family MIN may also be called "LOW" here.

        Default: kbar, today's open, high, low and vwap, and all rolling families over 5, 10, 20, 30 and 60 days.

    Returns
    -------
    (list of str, list of str)
        Expressions and column names.

    Raises
    ------
    ConfigError
        A section, setting or family is unknown, windows are not whole numbers, or no factor is selected.

    Notes
    -----
    Source: Alpha158DL in qlib/contrib/data/loader.py of pyqlib 0.9.7.

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
    factors: dict[str, str] = {}
    if "kbar" in config:
        factors |= KBAR
    if "price" in config:
        price = config["price"] or {}
        for field in price.get("feature", ("OPEN", "HIGH", "LOW", "CLOSE", "VWAP")):
            for d in price.get("windows", range(5)):
                factors[f"{field.upper()}{d}"] = f"{_ago(field, d)} / $close"
    if "volume" in config:
        for d in (config["volume"] or {}).get("windows", range(5)):
            factors[f"VOLUME{d}"] = f"{_ago('volume', d)} / ($volume + 1e-12)"
    if "rolling" in config:
        rolling = config["rolling"] or {}
        include, exclude = rolling.get("include"), rolling.get("exclude") or ()
        for family, text in ROLLING.items():
            names = {family, QLIB_NAMES.get(family, family)}
            if names.isdisjoint(exclude) and (include is None or not names.isdisjoint(include)):
                factors |= {f"{family}{d}": text.replace("{d}", str(d)) for d in rolling.get("windows", WINDOWS)}
    if not factors:
        raise ConfigError(f"the configuration of Alpha158 must select at least one factor, got {shown(dict(config))}.")
    return list(factors.values()), list(factors)


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
                names = list(SECTIONS[section])
                raise ConfigError(
                    f"section {section!r} of Alpha158 has no setting {name!r}; it has {names}." + suggest(name, names)
                )
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
            raise ConfigError(
                f"{section}.windows of Alpha158 must be whole numbers of at least {least}, got {wrong[0]!r}."
            )
    elif name == "feature":
        wrong = [field for field in value if not isinstance(field, str)]
        if wrong:
            raise ConfigError(f"price.feature of Alpha158 must contain names of fields, got {wrong[0]!r}.")
    else:
        families = [*ROLLING, *QLIB_NAMES.values()]
        for family in value:
            if family not in families:
                raise ConfigError(
                    f"rolling.{name} of Alpha158 must contain some of {families}, got {family!r}."
                    + suggest(str(family), families)
                )


class FactorHandler(PriceHandler):
    """A handler whose features are factor expressions over prices.

    Parameters
    ----------
    features : list of expressions, or (expressions, names)
        See `qfast.data.factors`. Without names, the expressions are the column names.
    instruments : str, list, {code: [(start, end), ...]} or {"market": name}
        Only a Qlib store has markets; for other prices a market means all instruments.
    start_time, end_time : date-like, optional
        First and last row, both inclusive. Expressions also read prices outside this period, and prices of an
        instrument at times when it does not belong to the market.
    freq : str, optional
        Calendar of a store: "day" (default), "1min", ... For tables, "day" normalizes times to dates.
    infer_processors, learn_processors, shared_processors
        Default: DropnaLabel and CSZScoreNorm on the label for learning, and no others.
    fit_start_time, fit_end_time : date-like
        Period from which processors learn their statistics, both inclusive.
    process_type, drop_raw
        As in `DataHandlerLP`.
    label : list of expressions, or (expressions, names), optional
        Default: Ref($close, -2)/Ref($close, -1) - 1, named LABEL0.
    data : path, DataFrame or Panel
        Prices, see `qfast.data.sources.load_prices`.
    provider_uri : path or {freq: path}
        Folder of a Qlib binary store, as an alternative to `data`.
    vwap : {None, "typical"}
        "typical": prices without a vwap get (high + low + close) / 3. None: like in Qlib, features that use a missing
        vwap are NaN.
    read_options : ReadOptions or mapping, optional
        How to read tables, see `qfast.data.ReadOptions`.
    cache : path, optional
        Folder in which computed factors are stored for later runs, see `qfast.data.factor_cache`.
    compat : {None, "qlib"}
        "qlib": features and label have Qlib's bits, including the rounding errors of its row-by-row updates, see
        docs/factors.md. None: windows are computed anew for every row.
    filter_pipe : list, optional
        Filters of the market `instruments`: Qlib's configurations, or objects of `qfast.data.filters`.
    inst_processors
        Not available. Only None is allowed.
    memory_limit, scratch
        As in `DataHandlerLP`. Factors are computed instrument by instrument, so they may exceed memory.

    Raises
    ------
    ConfigError
        An expression or argument is invalid, or not exactly one of `data` and `provider_uri` is passed.
    DataError
        The prices cannot be used.

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
        freq: str | None = None,
        infer_processors: Sequence[ProcessorSpec] = (),
        learn_processors: Sequence[ProcessorSpec] = DEFAULT_LEARN_PROCESSORS,
        fit_start_time: DateLike | None = None,
        fit_end_time: DateLike | None = None,
        process_type: str = "append",
        filter_pipe: Sequence[FilterSpec] | None = None,
        inst_processors: None = None,
        *,
        shared_processors: Sequence[ProcessorSpec] = (),
        drop_raw: bool = False,
        label: Expressions | None = None,
        data: PriceSource | None = None,
        provider_uri: StorePath | None = None,
        vwap: str | None = None,
        read_options: ReadSettings = None,
        cache: str | os.PathLike[str] | None = None,
        compat: str | None = None,
        memory_limit: str | float | None = None,
        scratch: str | os.PathLike[str] | None = None,
    ) -> None:
        self._texts, self._names = expressions_and_names("features", features)
        self._reach = tuple(max(side) for side in zip(*map(reach, self._texts), strict=True))
        self._cache = None if cache is None else FactorCache(cache)
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
        return self._names

    def _feature_texts(self) -> list[str]:
        return self._texts

    def _feature_fields(self) -> list[str]:
        return list(dict.fromkeys(field for text in self._texts for field in fields(text)))

    def _feature_reach(self) -> tuple[int, int]:
        before, after = self._reach
        return before, after

    def _feature_values(self, prices: Prices, rows: np.ndarray) -> np.ndarray:
        return self._computed(self._texts, prices, rows)

    def _features_without(self, omitted: Collection[str]) -> Block:
        if not omitted:
            return super()._features_without(omitted)
        kept = [(text, name) for text, name in zip(self._texts, self._names, strict=True) if name not in omitted]
        log.info(
            "%s: computing %d of %d features, the others are unused", type(self).__name__, len(kept), len(self._names)
        )
        texts, names = zip(*kept, strict=True)
        return Block(self._computed(texts, self._prices, self._rows), names)

    def _computes_columns_separately(self) -> bool:
        return all(getattr(type(self), name) is getattr(FactorHandler, name) for name in COMPUTE_FEATURES)

    def _computed(self, texts: Sequence[str], prices: Prices, rows: np.ndarray) -> np.ndarray:
        """Values of expressions, from the cache if it has them: float32 [len(rows), len(texts)]."""
        if self._cache is not None:
            key = self._cache.key(texts, prices, rows, self.start_time, self.mask_prices, self.compat)
            values = self._cache.read(key, texts, len(rows))
            if values is None:
                keys = replace(take_rows(prices.panel, rows, groups=()), live=None)
                values = self._cache.write(key, texts, keys, lambda out: self._evaluated(texts, prices, rows, out=out))
            if values is not None:
                return values
        return self._evaluated(texts, prices, rows, out=self._storage.empty((len(rows), len(texts))))


class Alpha158(FactorHandler):
    """Qlib's handler Alpha158: 158 factors of the last 60 days as features.

    The features are nine candlestick factors (KMID, KLEN, ...), today's open, high, low and vwap over the close, and 29
    rolling families over 5, 10, 20, 30 and 60 days, family by family (ROC5 to VSUMD60). The label is
    Ref($close, -2)/Ref($close, -1) - 1, the return from the next day to the day after.

    Parameters
    ----------
    instruments, start_time, end_time, freq, infer_processors, learn_processors, fit_start_time, fit_end_time
        As in `FactorHandler`. Order and defaults are Qlib's.
    process_type, filter_pipe, inst_processors, shared_processors, drop_raw, label, data, provider_uri, vwap,
    read_options, cache, compat, memory_limit, scratch
        As in `FactorHandler`.
    config : mapping, optional
        Selects part of the factors, see `alpha158_factors`.

    Raises
    ------
    ConfigError, DataError
        As in `FactorHandler` and `alpha158_factors`.

    Notes
    -----
    Like in Qlib, a subclass may override `get_feature_config` and `get_label_config`. Source:
    qlib/contrib/data/handler.py and loader.py of pyqlib 0.9.7.

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
        freq: str | None = None,
        infer_processors: Sequence[ProcessorSpec] = (),
        learn_processors: Sequence[ProcessorSpec] = DEFAULT_LEARN_PROCESSORS,
        fit_start_time: DateLike | None = None,
        fit_end_time: DateLike | None = None,
        process_type: str = "append",
        filter_pipe: Sequence[FilterSpec] | None = None,
        inst_processors: None = None,
        *,
        shared_processors: Sequence[ProcessorSpec] = (),
        drop_raw: bool = False,
        label: Expressions | None = None,
        data: PriceSource | None = None,
        provider_uri: StorePath | None = None,
        vwap: str | None = None,
        read_options: ReadSettings = None,
        cache: str | os.PathLike[str] | None = None,
        config: Mapping[str, Any] | None = None,
        compat: str | None = None,
        memory_limit: str | float | None = None,
        scratch: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__(
            self.get_feature_config() if config is None else alpha158_factors(config),
            instruments=instruments,
            start_time=start_time,
            end_time=end_time,
            freq=freq,
            infer_processors=infer_processors,
            learn_processors=learn_processors,
            fit_start_time=fit_start_time,
            fit_end_time=fit_end_time,
            process_type=process_type,
            filter_pipe=filter_pipe,
            inst_processors=inst_processors,
            shared_processors=shared_processors,
            drop_raw=drop_raw,
            label=label,
            data=data,
            provider_uri=provider_uri,
            vwap=vwap,
            read_options=read_options,
            cache=cache,
            compat=compat,
            memory_limit=memory_limit,
            scratch=scratch,
        )

    def get_feature_config(self) -> tuple[list[str], list[str]]:
        """Default features, as (expressions, names)."""
        return alpha158_factors(self.DEFAULT)


class Alpha158vwap(Alpha158):
    """`Alpha158` with the label Ref($vwap, -2)/Ref($vwap, -1) - 1.

    Examples
    --------
    >>> Alpha158vwap.LABEL[1]
    ['LABEL0']
    """

    LABEL = (["Ref($vwap, -2)/Ref($vwap, -1) - 1"], ["LABEL0"])
