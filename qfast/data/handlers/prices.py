"""PriceHandler: reads prices, computes the label, and computes raw features on request."""

from __future__ import annotations

import logging
import os
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from qfast.data.arrow_tables import without_arrow
from qfast.data.expression import Field, fields, instruments, parse, reach, walk
from qfast.data.factor_graph import no_such_field
from qfast.data.factors import checked_compat, evaluate_all
from qfast.data.filters import (
    FilterSpec,
    MarketFilter,
    apply_filters,
    build_filters,
    filter_expressions,
    filter_fields,
    filter_reach,
)
from qfast.data.halts import cells_unlike_qlib, fields_of, halted_rows, sensitive_columns
from qfast.data.handlers.base import COPIES, DataHandlerLP
from qfast.data.panel import Block, Panel
from qfast.data.prices import PRICE_FIELDS, Instruments, Prices, PriceSource, StorePath
from qfast.data.processors import DropCol, FilterCol, ProcessorSpec, Workspace
from qfast.data.processors.column_use import unread_columns
from qfast.data.protocols import Columns
from qfast.data.rows import restrict_rows, take_rows
from qfast.data.sources import read_prices
from qfast.data.storage import Storage
from qfast.data.store import BinaryStore, is_store
from qfast.dates import DateLike
from qfast.errors import ConfigError, DataError, shown, some
from qfast.read_options import ReadOptions, ReadSettings

log = logging.getLogger("qfast.data")

VWAP_REMEDY = ". vwap='typical' uses (high + low + close) / 3 instead."

Expressions: TypeAlias = str | Sequence[str] | tuple[Sequence[str], Sequence[str]]
"""One expression, a list of them, or (expressions, column names)."""

DEFAULT_LEARN_PROCESSORS: tuple[Mapping[str, Any], ...] = (
    {"class": "DropnaLabel"},
    {"class": "CSZScoreNorm", "kwargs": {"fields_group": "label"}},
)


class PriceHandler(DataHandlerLP):
    """A handler whose features and label are computed from prices.

    A subclass defines the default label in `LABEL`, describes its features in `_feature_names`, `_feature_fields` and
    `_feature_reach`, and computes them in `_feature_values`.
    """

    label_expressions: list[str]
    """Expressions of the label columns."""
    label_names: list[str]
    """Names of the label columns."""
    compat: str | None = None
    """"qlib" if expressions have Qlib's bits; a class attribute for handlers pickled before it existed."""
    mask_prices: dict[str, Prices]
    """Prices of the instruments that `Mask` names and the handler's own prices lack, by name."""

    _storage = Storage()

    LABEL: tuple[list[str], list[str]] = (["Ref($close, -2)/Ref($close, -1) - 1"], ["LABEL0"])

    def _set_up(
        self,
        *,
        instruments: Instruments,
        start_time: DateLike | None,
        end_time: DateLike | None,
        freq: str | None,
        stages: Mapping[str, Sequence[ProcessorSpec]],
        fit_start_time: DateLike | None,
        fit_end_time: DateLike | None,
        process_type: str,
        drop_raw: bool,
        label: Expressions | None,
        data: PriceSource | None,
        provider_uri: StorePath | None,
        vwap: str | None,
        read_options: ReadSettings = None,
        compat: str | None = None,
        filter_pipe: Sequence[FilterSpec] | None = None,
        unavailable: Mapping[str, object] | None = None,
        memory_limit: str | float | None = None,
        scratch: str | os.PathLike[str] | None = None,
        refused: Mapping[str, object] | None = None,  # old name of `unavailable`
    ) -> None:
        """The part of the constructor that all subclasses share, called once the features are known."""
        data = without_arrow(data)
        if not drop_raw:
            self._arguments = {name: value for name, value in locals().items() if name != "self"}
        self._refuse_unavailable({**(refused or {}), **(unavailable or {})})
        market, filters = build_filters(instruments, filter_pipe)
        self._configure(stages, process_type, drop_raw, instruments, start_time, end_time, fit_start_time, fit_end_time)
        self.read_options = ReadOptions.of(read_options).over(ReadOptions(freq=freq))
        self.freq = self.read_options.freq or "day"
        self.compat = checked_compat(compat)
        self.label_expressions, self.label_names = expressions_and_names(
            "label", self.get_label_config() if label is None else label
        )
        self._store = _store_with_vwap(data, provider_uri, vwap)
        read = partial(
            read_prices, data, provider_uri=provider_uri, start_time=start_time, end_time=end_time, vwap=vwap
        )
        self._read_prices(market, filters, read)
        self._rows = self._prices.panel.rows_between(start_time, end_time)
        if filters:
            self._filter(filters)
        self._report_missing_fields()
        self._report_halts()
        self._labels = self._label_panel()
        omitted = self._unread_features()
        n_bytes = 4 * len(self._rows) * (len(self._feature_names()) - len(omitted))
        self._storage = Storage.for_size(COPIES * n_bytes, memory_limit, scratch)
        raw = self._with_features(self._labels, omitted)
        space = Workspace(raw.blocks if drop_raw else ["feature"], omitted, self._storage)
        self._process(raw, space)
        if not drop_raw and not omitted and "feature" not in space.overwritten:
            self._raw = raw  # no processor changed the features, so "infer" shares their memory
        if drop_raw:
            del self._prices, self._labels

    def _refuse_unavailable(self, arguments: Mapping[str, object]) -> None:
        for name, value in arguments.items():
            if value:
                raise ConfigError(
                    f"{type(self).__name__}: {name} is not available, got {shown(value)}. Remedy: remove it, or use "
                    "--engine qlib."
                )

    def _read_prices(self, market: Instruments, filters: Sequence[MarketFilter], read: Callable[..., Prices]) -> None:
        """Read the prices that the features, the labels, the filters and `Mask` need."""
        reaches = [self._feature_reach(), *map(reach, self.label_expressions), *filter_reach(filters)]
        before, after = (max(rows) for rows in zip(*reaches, strict=True))
        label_fields = [field for text in self.label_expressions for field in fields(text)]
        wanted = list(dict.fromkeys([*self._feature_fields(), *label_fields, *filter_fields(filters)]))
        read = partial(read, options=self.read_options, margin=(before, after), wanted=wanted)
        self._prices = read(instruments=market)
        self.mask_prices = other_prices(
            [*self._feature_texts(), *self.label_expressions, *filter_expressions(filters)],
            self._prices.panel,
            lambda name: read(instruments=[name]),
        )

    @property
    def priced(self) -> PriceHandler:
        """The handler itself."""
        return self

    # ---------------------------------------------------------------- the features of a subclass
    @abstractmethod
    def _feature_names(self) -> list[str]:
        """C column names."""

    @abstractmethod
    def _feature_fields(self) -> list[str]:
        """Price fields that the features read."""

    @abstractmethod
    def _feature_reach(self) -> tuple[int, int]:
        """Rows before and after the current one that the features read."""

    @abstractmethod
    def _feature_values(self, prices: Prices, rows: np.ndarray) -> np.ndarray:
        """Features at panel rows `rows` (int64 [M]): float32 [M, C]."""

    def _feature_block(self, prices: Prices, rows: np.ndarray) -> Block:
        """The feature columns at panel rows `rows`."""
        return Block(self._feature_values(prices, rows), tuple(self._feature_names()))

    def _features_without(self, omitted: Collection[str]) -> Block:
        """The feature columns at the rows of the handler, except the columns `omitted`."""
        if omitted:
            raise NotImplementedError(f"{type(self).__name__} computes all features together.")
        return self._feature_block(self._prices, self._rows)

    def _unread_features(self) -> set[str]:
        """Features that no result of the processors depends on. They are only computed for the raw data."""
        names = self._feature_names()
        unread = unread_columns(
            {"feature": names, "label": self.label_names},
            *(self.shared_processors, self.infer_processors, self.learn_processors),
            self.process_type == self.PTYPE_I,
        ).intersection(names)
        return unread if self._computes_columns_separately() and len(unread) < len(names) else set()

    def _computes_columns_separately(self) -> bool:
        """True if `_features_without` can omit columns."""
        return False

    def _feature_texts(self) -> list[str]:
        """Expressions of the features; empty if they are computed in another way."""
        return []

    def get_label_config(self) -> tuple[list[str], list[str]]:
        """Default label, as (expressions, names)."""
        return self.LABEL

    # ---------------------------------------------------------------- prices, label, raw features
    @property
    def prices(self) -> Panel | None:
        """The prices from which the features are computed, group "price". None if drop_raw=True discarded them."""
        prices = getattr(self, "_prices", None)
        return None if prices is None else prices.panel

    def _set_up_again(self) -> None:
        arguments = self.__dict__.get("_arguments")
        if arguments is None:
            super()._set_up_again()  # raises the error
            return
        stages = {stage: getattr(self, f"{stage}_processors") for stage in ("shared", "infer", "learn")}
        bounds = {name: getattr(self, name) for name in ("instruments", "start_time", "end_time")}
        self._set_up(**{**arguments, **bounds, "stages": stages})

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a pickled handler. Attributes of the previous release get their new names."""
        renamed = {"_label": "label_expressions", "_label_names": "label_names", "_others": "mask_prices"}
        self.__dict__.update({renamed.get(name, name): value for name, value in state.items()})
        self.__dict__.setdefault("read_options", ReadOptions(freq=state.get("freq")))

    def quotes(
        self, instruments: Sequence[str], wanted: Sequence[str], start_time: DateLike | None, end_time: DateLike | None
    ) -> Prices:
        """Prices of any instruments of the source, from one day before `start_time`.

        Parameters
        ----------
        instruments : sequence of str
            Instruments that the source lacks are left out.
        wanted : sequence of str
            Fields. Fields that the source lacks are left out.
        start_time, end_time : date-like or None
            The result may contain rows outside this period.

        Returns
        -------
        Prices

        Raises
        ------
        DataError
            The source has none of the instruments, or drop_raw=True discarded the prices.
        """
        if self._store is not None:
            source, vwap = self._store
            return read_prices(
                provider_uri=source,
                instruments=list(instruments),
                start_time=start_time,
                end_time=end_time,
                vwap=vwap,
                options=self.read_options,
                wanted=wanted,
                margin=(1, 1),
            )
        if self.prices is None:
            raise _prices_dropped()
        available = [name for name in self.prices.instruments if name in set(instruments)]
        if not available:
            raise DataError(
                f"the prices have none of the instruments {some(list(instruments), 5)}; they have "
                f"{some(list(self.prices.instruments), 5)}."
            )
        return Prices(restrict_rows(self.prices, available, None, None), {})

    def priced_earlier(self) -> np.ndarray:
        """Positions in `prices.instruments` whose close is missing on the first day read but not on all earlier days.

        Returns
        -------
        int64 [K]
            Empty if the prices were read from their first day on.
        """
        panel = self.prices
        first = int(panel.date_codes.min()) if panel is not None and panel.n_rows else 0
        if panel is None or self._store is None or first == 0:
            return np.empty(0, dtype=np.int64)
        missing = (panel.date_codes == first) & ~np.isfinite(panel.column("close", "price"))
        codes = panel.instrument_codes[missing].astype(np.int64)
        if not len(codes):
            return codes
        names = [str(panel.instruments[code]) for code in codes]
        try:
            store = BinaryStore(self._store[0], self.freq)
            earlier = store.read(names, ["close"], end_time=panel.datetimes[first - 1]).panel
        except DataError:  # the store has none of them
            return np.empty(0, dtype=np.int64)
        priced = earlier.instruments[np.unique(earlier.instrument_codes[np.isfinite(earlier.column("close", "price"))])]
        return codes[np.isin(names, priced.astype(str))]

    def price_fields(self) -> list[str]:
        """Names of all fields of the source, in lower case.

        Raises
        ------
        DataError
            The source is not a store, and drop_raw=True discarded the prices.
        """
        if self._store is not None:
            return BinaryStore(self._store[0], self.freq).fields()
        if self.prices is None:
            raise _prices_dropped()
        return sorted(name.lower() for name in self.prices.columns("price"))

    @property
    def lookback(self) -> int:
        """Number of rows that the features of a row read, including that row."""
        return self._feature_reach()[0] + 1

    @property
    def lookahead(self) -> int:
        """Number of later rows that the features of a row read; 0 if the features are known on that row's day."""
        return self._feature_reach()[1]

    @property
    def feature_names(self) -> list[str]:
        """Names of the feature columns in order."""
        return list(self._feature_names())

    @property
    def feature_expressions(self) -> list[str]:
        """Expressions of the features in order; empty if they are not computed from expressions."""
        return list(self._feature_texts())

    @property
    def label_horizon(self) -> int:
        """Number of later rows that the label of a row reads."""
        return max(reach(text)[1] for text in self.label_expressions)

    def _report_missing_fields(self) -> None:
        """Log price fields that are missing, which are NaN as in Qlib. A missing close or other field is an error."""
        columns = {name.lower() for name in self._prices.panel.columns("price")}
        missing = [f for f in self._feature_fields() if f not in columns and f in PRICE_FIELDS]
        self._require_fields(columns, [*self._feature_texts(), *self.label_expressions])
        if "close" in missing:
            raise DataError(f"{type(self).__name__}: the prices have no column 'close'; they have {sorted(columns)}.")
        labels = [text for text in self.label_expressions if not set(fields(text)) <= columns]
        kept = self._kept_features()
        affected = [name for name, read in self._fields_by_feature().items() if name in kept and read & set(missing)]
        if labels:
            absent = sorted({field for text in labels for field in fields(text)} - columns)
            log.warning(
                "%s: the prices have no column(s) %s, so the label %s is NaN%s",
                type(self).__name__,
                ", ".join(absent),
                some(labels, most=1),
                VWAP_REMEDY if "vwap" in absent else "",
            )
        if affected:
            log.warning(
                "%s: the prices have no column(s) %s; their features are NaN%s",
                type(self).__name__,
                ", ".join(missing),
                VWAP_REMEDY if "vwap" in missing else "",
            )

    def _fields_by_feature(self) -> dict[str, set[str]]:
        """Feature -> price fields that it reads; without expressions, all fields of the handler."""
        names, texts = self._feature_names(), self._feature_texts()
        if not texts:
            return {name: set(self._feature_fields()) for name in names}
        return {name: set(fields(text)) for name, text in zip(names, texts, strict=True)}

    def _kept_features(self) -> set[str]:
        """Features that no FilterCol or DropCol of the shared and infer processors removes."""
        kept = set(self._feature_names())
        for processor in (*self.shared_processors, *self.infer_processors):
            if isinstance(processor, DropCol):
                kept -= set(processor.col_list)
            elif isinstance(processor, FilterCol) and processor.fields_group in ("feature", None):
                kept &= set(processor.col_list)
        return kept

    def _report_halts(self) -> None:
        """Log where the choice of `compat` changes values: rows of equal prices or volumes, or after infinite ones."""
        texts = self._feature_texts()
        names, kept = self._feature_names(), self._kept_features()
        windows = {place: rows for place, rows in sensitive_columns(texts).items() if names[place] in kept}
        if not windows:
            return
        read = fields_of([texts[place] for place in windows])
        shortest = max(2, min(windows.values()))
        halted = int(halted_rows(self._prices, read, shortest)[self._rows].sum())
        if halted:
            columns = [self._feature_names()[place] for place in windows]
            log.info(
                "%s: %d of %d rows follow %d equal values of %s, or an infinite value. There, the values of %s "
                "differ from Qlib's by default; compat='qlib' reproduces Qlib's (docs/factors.md). This run has %s.",
                *(type(self).__name__, halted, len(self._rows), shortest, "/".join(read), some(columns, 8)),
                "the exact values" if self.compat is None else "Qlib's values",
            )

    def cells_unlike_qlib(self) -> dict[str, int]:
        """Number of cells in which exact values differ from Qlib's by more than rounding, by feature.

        Features that FilterCol or DropCol removes are not counted.

        Raises
        ------
        DataError
            drop_raw=True discarded the prices.
        """
        if self.prices is None:
            raise _prices_dropped()
        kept, texts = self._kept_features(), self._feature_texts()
        selected = [(text, name) for text, name in zip(texts, self._feature_names(), strict=False) if name in kept]
        return cells_unlike_qlib(
            *([text for text, _ in selected], [name for _, name in selected], self._prices, self._rows),
            self.start_time,
            self.mask_prices,
        )

    def _require_fields(self, columns: Collection[str], texts: Iterable[str]) -> None:
        # The prices contain only the fields that were requested from a store, so the message lists price_fields().
        for text in texts:
            for node in walk(parse(text)):
                if isinstance(node, Field) and node.name not in columns and node.name not in PRICE_FIELDS:
                    raise no_such_field(text, node, self.price_fields())

    def _evaluated(
        self, texts: Sequence[str], prices: Prices, rows: np.ndarray, out: np.ndarray | None = None
    ) -> np.ndarray:
        """Values of expressions, float32 [len(rows), len(texts)], written to `out` if it is passed."""
        return evaluate_all(
            texts,
            prices.panel,
            rows=rows,
            extents=prices.extents,
            optional=PRICE_FIELDS,
            start_time=self.start_time,
            others=self.mask_prices,
            compat=self.compat,
            out=out,
        )

    def _filter(self, filters: Sequence[MarketFilter]) -> None:
        """Remove the rows of the market that the filters remove."""
        for text in filter_expressions(filters):
            self._require_fields({name.lower() for name in self._prices.panel.columns("price")}, [text])

        def evaluate(text: str, rows: np.ndarray) -> np.ndarray:
            return np.asarray(self._evaluated([text], self._prices, rows)[:, 0])

        self._prices = self._prices._replace(panel=apply_filters(self._prices.panel, self._rows, filters, evaluate))
        self._rows = self._prices.panel.rows_between(self.start_time, self.end_time)

    def _label_panel(self) -> Panel:
        """The rows of the handler, with only the group "label"."""
        values = self._evaluated(self.label_expressions, self._prices, self._rows)
        keys = replace(take_rows(self._prices.panel, self._rows, groups=()), live=None)
        return keys.with_group("label", values, self.label_names)

    def _with_features(self, labels: Panel, omitted: Collection[str] = ()) -> Panel:
        features = replace(labels, blocks={"feature": self._features_without(omitted)})
        return replace(labels, blocks={**features.blocks, **labels.blocks})

    def get_cols(self, col_set: Columns = DataHandlerLP.CS_ALL, data_key: str = DataHandlerLP.DK_I) -> list[Any]:
        """Names of the columns that `fetch` returns; see `DataHandlerLP.get_cols`."""
        if data_key != self.DK_R or self._raw is not None or self.drop_raw:
            return super().get_cols(col_set, data_key)
        # The raw features are computed at every request, but their names are known.
        groups = ["feature", *self._labels.blocks] if isinstance(col_set, str) else list(col_set)
        if isinstance(col_set, str) and col_set not in (self.CS_ALL, self.CS_RAW):
            return self._raw_names(col_set)
        pairs = [(group, name) for group in groups for name in self._raw_names(group)]
        return [name for _, name in pairs] if col_set == self.CS_ALL else pairs

    def _raw_names(self, group: str) -> list[str]:
        return self.feature_names if group == "feature" else list(self._labels.columns(group))

    def _raw_panel(self, groups: Sequence[str] | None) -> Panel:
        if self._raw is not None or self.drop_raw:
            return super()._raw_panel(groups)
        if groups is not None and set(groups) <= {"label"}:
            return self._labels
        log.debug("%s: computing the raw features again from the prices", type(self).__name__)
        return self._with_features(self._labels)


def priced_handler(handler: object) -> PriceHandler | None:
    """The price handler that a handler is or, with a data loader, contains; None for a handler without prices."""
    priced: PriceHandler | None = getattr(handler, "priced", None)
    return priced


def _prices_dropped() -> DataError:
    return DataError("the prices were dropped (drop_raw=True). Remedy: build the handler with drop_raw=False.")


def other_prices(texts: Iterable[str], panel: Panel, read: Callable[[str], Prices]) -> dict[str, Prices]:
    """Prices of the instruments that `Mask` names in the expressions and the panel lacks, from `read(name)`."""
    available = {str(i).lower() for i in panel.instruments}
    names = dict.fromkeys(name for text in texts for name in instruments(text))
    return {name: read(name) for name in names if name.lower() not in available}


def expressions_and_names(setting: str, value: object) -> tuple[list[str], list[str]]:
    """Expressions and column names of a setting, which is a text, a list of texts, or (texts, names).

    Raises
    ------
    ConfigError
        The value has another form. The message contains the name `setting`.

    Examples
    --------
    >>> expressions_and_names("label", ["Ref($close, -1)"])
    (['Ref($close, -1)'], ['Ref($close, -1)'])
    """
    if isinstance(value, str):
        value = [value]
    if isinstance(value, (list, tuple)) and len(value):
        if all(isinstance(text, str) for text in value):
            return list(value), list(value)
        if len(value) == 2 and all(isinstance(part, (list, tuple)) for part in value):
            texts, names = (list(part) for part in value)
            if texts and len(texts) == len(names) and all(isinstance(t, str) for t in [*texts, *names]):
                return texts, names
    raise ConfigError(
        f"{setting} must be a list of expressions or (expressions, names) of equal length, got {shown(value)}."
    )


def _store_with_vwap(
    data: PriceSource | None, provider_uri: StorePath | None, vwap: str | None
) -> tuple[StorePath, str | None] | None:
    """The Qlib data folder that the prices come from, with the field of the vwap; None for other sources."""
    if provider_uri is not None:
        return provider_uri, vwap
    if isinstance(data, (str, Path)) and is_store(data):
        return data, vwap
    return None
