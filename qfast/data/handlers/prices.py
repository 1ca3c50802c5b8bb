"""What the handlers over prices share: reading, the label, and raw features that are computed when asked for."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from qfast.data.expression import Field, fields, instruments, parse, reach, walk
from qfast.data.factor_graph import no_such_field
from qfast.data.factors import evaluate_all
from qfast.data.handlers.base import DataHandlerLP
from qfast.data.panel import Block, Panel
from qfast.data.prices import PRICE_FIELDS, Instruments, Prices, PriceSource, StorePath
from qfast.data.processors import ProcessorSpec, Workspace
from qfast.data.rows import restrict_rows, take_rows
from qfast.data.sources import read_prices
from qfast.data.store import BinaryStore, is_store
from qfast.dates import DateLike
from qfast.errors import ConfigError, DataError, shown

log = logging.getLogger("qfast.data")

Expressions: TypeAlias = str | Sequence[str] | tuple[Sequence[str], Sequence[str]]
"""One expression, a list of them, or (expressions, column names)."""

DEFAULT_LEARN_PROCESSORS: tuple[Mapping[str, Any], ...] = (
    {"class": "DropnaLabel"},
    {"class": "CSZScoreNorm", "kwargs": {"fields_group": "label"}},
)


class PriceHandler(DataHandlerLP):
    """A handler whose features and label are computed from prices.

    Subclasses say in `LABEL` what the label is by default, in `_feature_names`, `_feature_fields` and
    `_feature_reach` what their features are called and read, and compute them in `_feature_values`.
    """

    label_expressions: list[str]
    """Expressions of the label columns."""
    label_names: list[str]
    """Names of the label columns."""
    mask_prices: dict[str, Prices]
    """Prices of the instruments that `Mask` names and the handler's own prices lack, by name."""

    LABEL: tuple[list[str], list[str]] = (["Ref($close, -2)/Ref($close, -1) - 1"], ["LABEL0"])

    def _set_up(
        self,
        *,
        instruments: Instruments,
        start_time: DateLike | None,
        end_time: DateLike | None,
        freq: str,
        stages: Mapping[str, Sequence[ProcessorSpec]],
        fit_start_time: DateLike | None,
        fit_end_time: DateLike | None,
        process_type: str,
        drop_raw: bool,
        label: Expressions | None,
        data: PriceSource | None,
        provider_uri: StorePath | None,
        vwap: str | None,
        refused: Mapping[str, object],
    ) -> None:
        """Everything a constructor does once its features are known."""
        for name, value in refused.items():
            if value:
                raise ConfigError(f"{type(self).__name__}: {name} is not available, got {shown(value)}.")
        self._configure(stages, process_type, drop_raw, instruments, start_time, end_time, fit_start_time, fit_end_time)
        self.freq = freq
        self.label_expressions, self.label_names = expressions_and_names(
            "label", self.get_label_config() if label is None else label
        )
        before, after = (
            max(side) for side in zip(self._feature_reach(), *map(reach, self.label_expressions), strict=True)
        )

        def read(instruments: Instruments) -> Prices:
            return read_prices(
                data, provider_uri=provider_uri, instruments=instruments, start_time=start_time, end_time=end_time,
                freq=freq, vwap=vwap, margin=(before, after), wanted=wanted,
            )  # fmt: skip

        store = provider_uri
        if store is None and isinstance(data, (str, Path)) and is_store(data):
            store = data
        self._store = None if store is None else (store, vwap)
        wanted = list(
            dict.fromkeys([*self._feature_fields(), *(f for text in self.label_expressions for f in fields(text))])
        )
        self._prices = read(instruments)
        self.mask_prices = other_prices(
            [*self._feature_texts(), *self.label_expressions], self._prices.panel, lambda name: read([name])
        )
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

    # ---------------------------------------------------------------- what a subclass says of its features
    @abstractmethod
    def _feature_names(self) -> list[str]:
        """Columns."""

    @abstractmethod
    def _feature_fields(self) -> list[str]:
        """Price fields that they read."""

    @abstractmethod
    def _feature_reach(self) -> tuple[int, int]:
        """Rows before and after the current one that they look at."""

    @abstractmethod
    def _feature_values(self, prices: Prices, rows: np.ndarray) -> np.ndarray:
        """float32 [len(rows), C]."""

    def _feature_texts(self) -> list[str]:
        """Expressions behind them, where there are any."""
        return []

    def get_label_config(self) -> tuple[list[str], list[str]]:
        """(expressions, names) of the label where the constructor is given none."""
        return self.LABEL

    # ---------------------------------------------------------------- prices, label, raw features
    @property
    def prices(self) -> Panel | None:
        """The prices behind the features, group "price"; None where drop_raw gave them up."""
        found = getattr(self, "_prices", None)
        return None if found is None else found.panel

    def quotes(
        self, instruments: Sequence[str], wanted: Sequence[str], start_time: DateLike | None, end_time: DateLike | None
    ) -> Prices:
        """Prices of instruments, also of ones that are no samples, with a day before `start_time`.

        Parameters
        ----------
        instruments : sequence of str
            Those that the source has not are left out.
        wanted : sequence of str
            Fields; those that the source has not are left out.
        start_time, end_time : date-like or None
            Rows outside them may be there.

        Raises
        ------
        DataError
            None of the instruments is there, or the prices were given up (drop_raw).
        """
        if self._store is not None:
            source, vwap = self._store
            return read_prices(
                provider_uri=source, instruments=list(instruments), start_time=start_time, end_time=end_time,
                freq=self.freq, vwap=vwap, wanted=wanted, margin=(1, 1),
            )  # fmt: skip
        if self.prices is None:
            raise _given_up()
        known = [name for name in self.prices.instruments if name in set(instruments)]
        if not known:
            raise DataError(f"none of the instruments {list(instruments)[:5]} is in the prices.")
        return Prices(restrict_rows(self.prices, known, None, None), {})

    def price_fields(self) -> list[str]:
        """Fields that there are to be read: of a store all that it has, otherwise the columns of the prices.

        Raises
        ------
        DataError
            The prices were given up (drop_raw).
        """
        if self._store is not None:
            return BinaryStore(self._store[0], self.freq).fields()
        if self.prices is None:
            raise _given_up()
        return sorted(name.lower() for name in self.prices.columns("price"))

    @property
    def lookback(self) -> int:
        """Rows, its own included, that the features of a row read."""
        return self._feature_reach()[0] + 1

    @property
    def lookahead(self) -> int:
        """Rows after its own that the features of a row read; 0 for features that are known on their day."""
        return self._feature_reach()[1]

    @property
    def feature_names(self) -> list[str]:
        """Names of the feature columns, in their order."""
        return list(self._feature_names())

    @property
    def feature_expressions(self) -> list[str]:
        """Expressions of the features, in their order; empty where there are none."""
        return list(self._feature_texts())

    @property
    def label_horizon(self) -> int:
        """Days after its own that the label of a row looks at."""
        return max(reach(text)[1] for text in self.label_expressions)

    def _report_missing_fields(self) -> None:
        """The reference reads a field without a file as NaN; say so, and refuse if none is there."""
        known = {name.lower() for name in self._prices.panel.columns("price")}
        missing = [f for f in self._feature_fields() if f not in known and f in PRICE_FIELDS]
        self._require_fields(known)
        if "close" in missing:
            raise DataError(f"{type(self).__name__}: the prices have no column 'close'; they have {sorted(known)}.")
        if missing:
            log.warning(
                "%s: the prices have no column(s) %s; their features are NaN.%s",
                type(self).__name__, ", ".join(missing),
                " vwap='typical' uses (high + low + close) / 3 instead." if "vwap" in missing else "",
            )  # fmt: skip

    def _require_fields(self, known: Collection[str]) -> None:
        """Only the fields that are wanted are read from a store: a message must list all that it has."""
        for text in (*self._feature_texts(), *self.label_expressions):
            for node in walk(parse(text)):
                if isinstance(node, Field) and node.name not in known and node.name not in PRICE_FIELDS:
                    raise no_such_field(text, node, self.price_fields())

    def _evaluated(self, texts: Sequence[str], prices: Prices, rows: np.ndarray) -> np.ndarray:
        """float32 [len(rows), len(texts)]."""
        return evaluate_all(
            texts, prices.panel, rows=rows, extents=prices.extents, optional=PRICE_FIELDS,
            start_time=self.start_time, others=self.mask_prices,
        )  # fmt: skip

    def _label_panel(self) -> Panel:
        """The handler's rows with the group "label" only."""
        values = self._evaluated(self.label_expressions, self._prices, self._rows)
        keys = replace(take_rows(self._prices.panel, self._rows, groups=()), live=None)
        return keys.with_group("label", values, self.label_names)

    def _with_features(self, labels: Panel) -> Panel:
        values = self._feature_values(self._prices, self._rows)
        features = replace(labels, blocks={"feature": Block(values, tuple(self._feature_names()))})
        return replace(labels, blocks={**features.blocks, **labels.blocks})

    def _raw_panel(self, groups: Sequence[str] | None) -> Panel:
        if self._raw is not None or self.drop_raw:
            return super()._raw_panel(groups)
        if groups is not None and set(groups) <= {"label"}:
            return self._labels
        log.debug("%s: raw features are computed again from the prices", type(self).__name__)
        return self._with_features(self._labels)


def _given_up() -> DataError:
    return DataError("the prices were given up (drop_raw=True). Remedy: build the handler with drop_raw=False.")


def other_prices(texts: Iterable[str], panel: Panel, read: Callable[[str], Prices]) -> dict[str, Prices]:
    """Prices of the instruments that expressions name and the panel has not, by `read(name)`."""
    known = {str(i).lower() for i in panel.instruments}
    names = dict.fromkeys(name for text in texts for name in instruments(text))
    return {name: read(name) for name in names if name.lower() not in known}


def expressions_and_names(what: str, value: object) -> tuple[list[str], list[str]]:
    """Expressions and column names of a setting: a text, a list of texts, or (texts, names)."""
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
        f"{what} must be a list of expressions or (expressions, names) of equal length, got {shown(value)}."
    )
