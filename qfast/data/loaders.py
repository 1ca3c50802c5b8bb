"""Data loaders of `DataHandlerLP(data_loader=...)`: expressions over prices, stored tables, and combinations of them.

Source: qlib/data/dataset/loader.py and qlib/contrib/data/loader.py of pyqlib 0.9.7. Unlike Qlib's, these loaders never
read pickle files.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import pandas as pd

from qfast.data.arrow_tables import conversion_hint, without_arrow
from qfast.data.filters import FilterSpec
from qfast.data.panel import Block, Panel
from qfast.data.prices import Instruments
from qfast.data.rows import restrict_rows
from qfast.data.tables import keyed_frame, read_table
from qfast.dates import DateLike
from qfast.errors import ConfigError, DataError, shown
from qfast.read_options import ReadOptions, ReadSettings
from qfast.registry import Registry

if TYPE_CHECKING:
    from qfast.data.handlers.prices import PriceHandler

log = logging.getLogger("qfast.data")

__all__ = [
    "LOADERS",
    "Alpha158DL",
    "Alpha360DL",
    "DataLoader",
    "LoadRequest",
    "Loaded",
    "NestedDataLoader",
    "QlibDataLoader",
    "StaticDataLoader",
    "build_loader",
]

JOINS = ("left", "right", "inner", "outer")
PICKLES = (".pkl", ".pickle", ".joblib", ".dill")

LoaderSpec: TypeAlias = "DataLoader | Mapping[str, Any] | str"
"""A loader, or the description of one."""


@dataclass(frozen=True)
class LoadRequest:
    """The rows to load, and where prices come from.

    Attributes
    ----------
    instruments, start_time, end_time
        As in `DataHandlerLP`.
    prices : dict
        Arguments of a price handler: "data", "provider_uri", "vwap", "read_options".
    """

    instruments: Instruments = None
    start_time: DateLike | None = None
    end_time: DateLike | None = None
    prices: Mapping[str, Any] = field(default_factory=dict)


class Loaded(NamedTuple):
    """The columns of a loader, and the handler with the prices that they are computed from, if any."""

    panel: Panel
    priced: PriceHandler | None


class DataLoader(ABC):
    """Base class of loaders. A subclass implements `read`."""

    @abstractmethod
    def read(self, request: LoadRequest) -> Loaded:
        """The columns for the requested rows."""

    def load(
        self,
        instruments: Instruments = None,
        start_time: DateLike | None = None,
        end_time: DateLike | None = None,
        **prices: Any,
    ) -> pd.DataFrame:
        """The columns as a frame sorted by (datetime, instrument), with two column levels (group, name).

        Parameters
        ----------
        instruments, start_time, end_time
            As in `DataHandlerLP`.
        **prices
            `data` or `provider_uri` of the prices, and `vwap`.
        """
        return self.read(LoadRequest(instruments, start_time, end_time, prices)).panel.to_frame()


class QlibDataLoader(DataLoader):
    """Computes column groups from expressions over prices.

    Parameters
    ----------
    config : mapping or list
        {group: expressions or (expressions, names)}, usually with the groups "feature" and "label". A list of
        expressions, or (expressions, names), is the group "feature".
    filter_pipe : list, optional
        Filters of the market, see `qfast.data.filters`.
    swap_level : bool
        Ignored; for compatibility with Qlib.
    freq : str
        Calendar of a store.
    inst_processors : None
        Not available.

    Raises
    ------
    ConfigError
        An argument has another form or is not available.

    Examples
    --------
    >>> from qfast.data import synthetic
    >>> loader = QlibDataLoader({"feature": (["$close / $open"], ["DAY"]), "label": ["Ref($close, -1) / $close"]})
    >>> loader.load(data=synthetic.prices(2, 10)).columns.tolist()
    [('feature', 'DAY'), ('label', 'Ref($close, -1) / $close')]
    """

    def __init__(
        self,
        config: Mapping[str, Any] | Sequence[Any],
        filter_pipe: Sequence[FilterSpec] | None = None,
        swap_level: bool = True,
        freq: str | Mapping[str, str] = "day",
        inst_processors: object = None,
    ) -> None:
        from qfast.data.handlers.prices import expressions_and_names  # handlers import this module

        if inst_processors or not isinstance(freq, str):
            raise ConfigError(
                f"{type(self).__name__}: inst_processors and several frequencies are not available, got "
                f"{shown(inst_processors or freq)}. Remedy: --engine qlib."
            )
        groups = config if isinstance(config, Mapping) else {"feature": config}
        self.fields = {str(group): expressions_and_names(f"config.{group}", value) for group, value in groups.items()}
        self.filter_pipe, self.freq = filter_pipe, freq
        if not self.fields:
            raise ConfigError(f"{type(self).__name__}: config must contain at least one group, got {shown(config)}.")

    def read(self, request: LoadRequest) -> Loaded:
        """Compute all groups in one pass over the prices."""
        from qfast.data.handlers.alpha158 import FactorHandler

        others = {group: pair for group, pair in self.fields.items() if group != "label"} or {"": self.fields["label"]}
        handler = FactorHandler(
            ([t for texts, _ in others.values() for t in texts], [n for _, names in others.values() for n in names]),
            instruments="all" if request.instruments is None else request.instruments,
            start_time=request.start_time,
            end_time=request.end_time,
            freq=None if self.freq == "day" else self.freq,
            learn_processors=[],
            filter_pipe=self.filter_pipe,
            label=self.fields.get("label"),
            **request.prices,
        )
        raw = handler.panel("raw")
        values, blocks, start = raw.values("feature"), {}, 0
        for group, (texts, names) in others.items():
            blocks[group] = Block(values[:, start : start + len(texts)], tuple(names))
            start += len(texts)
        blocks["label"] = raw.block("label")
        return Loaded(Panel(**{**vars(raw), "blocks": {group: blocks[group] for group in self.fields}}), handler)


class Alpha158DL(QlibDataLoader):
    """`QlibDataLoader` with the factors of Alpha158 as the group "feature", unless `config` has other ones.

    Examples
    --------
    >>> len(Alpha158DL().fields["feature"][1])
    158
    """

    def __init__(self, config: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__({"feature": self.get_feature_config(), **(config or {})}, **kwargs)

    @staticmethod
    def get_feature_config(config: Mapping[str, Any] | None = None) -> tuple[list[str], list[str]]:
        """Expressions and names of the factors that `config` selects, see `alpha158_factors`."""
        from qfast.data.handlers.alpha158 import alpha158_factors

        return alpha158_factors(config)


class Alpha360DL(QlibDataLoader):
    """`QlibDataLoader` with the features of Alpha360 as the group "feature", unless `config` has other ones.

    Examples
    --------
    >>> Alpha360DL().fields["feature"][0][:2]
    ['Ref($close, 59)/$close', 'Ref($close, 58)/$close']
    """

    def __init__(self, config: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__({"feature": self.get_feature_config(), **(config or {})}, **kwargs)

    @staticmethod
    def get_feature_config() -> tuple[list[str], list[str]]:
        """Expressions and names of the 360 features."""
        texts, names = [], []
        for name in ("close", "open", "high", "low", "vwap", "volume"):
            base = "($volume+1e-12)" if name == "volume" else "$close"
            for i in range(59, -1, -1):
                texts.append(f"Ref(${name}, {i})/{base}" if i else f"${name}/{base}")
                names.append(f"{name.upper()}{i}")
        return texts, names


class StaticDataLoader(DataLoader):
    """Loads stored columns.

    Parameters
    ----------
    config : path, DataFrame, Panel, or mapping of group to path or DataFrame
        A Parquet or CSV file, or a frame, indexed (datetime, instrument) or with these columns. Two-level columns are
        (group, name). Of single-level columns, names that begin with "label" are labels and the others features.
        Relative paths start at the working directory; in a workflow file, at its folder if they do not exist there.
    join : {"outer", "inner", "left", "right"}
        How the rows of several groups are combined.
    read_options : ReadOptions or mapping, optional
        How to read the files, for example {"date_format": "%d/%m/%Y"}.

    Raises
    ------
    ConfigError
        `config` has another form, or is a pickle file.

    Examples
    --------
    >>> index = pd.MultiIndex.from_product([pd.date_range("2024-01-01", periods=2), ["A"]],
    ...                                    names=["datetime", "instrument"])
    >>> StaticDataLoader({"feature": pd.DataFrame({"x": [1.0, 2.0]}, index)}).load(end_time="2024-01-01").shape
    (1, 1)
    """

    def __init__(self, config: Any, join: str = "outer", read_options: ReadSettings = None) -> None:
        self.config, self.join = config, _join(join)
        self.read_options = ReadOptions.of(read_options)
        for path in config.values() if isinstance(config, Mapping) else [config]:
            _refuse_pickle(path)

    def read(self, request: LoadRequest) -> Loaded:
        """Read the files and select the rows. The name of a market selects all instruments."""
        if isinstance(self.config, Panel):
            panel = self.config
        elif isinstance(self.config, Mapping):
            frames = {str(group): _stored_frame(value, self.read_options) for group, value in self.config.items()}
            plain = {g: f.droplevel(0, axis=1) if f.columns.nlevels == 2 else f for g, f in frames.items()}
            panel = Panel.from_frame(pd.concat(plain, axis=1, join="inner" if self.join == "inner" else "outer"))
        else:
            panel = Panel.from_frame(grouped_columns(_stored_frame(self.config, self.read_options)))
        wanted = request.instruments
        listed = None if wanted is None or isinstance(wanted, (str, Mapping)) else [str(name) for name in wanted]
        if listed is not None:
            listed = [name for name in listed if name in set(map(str, panel.instruments))]
        return Loaded(restrict_rows(panel, listed, request.start_time, request.end_time), None)


class NestedDataLoader(DataLoader):
    """Combines the columns of several loaders.

    Parameters
    ----------
    dataloader_l : list of loaders or descriptions
    join : {"left", "outer", "inner", "right"}
        How the rows of each loader are combined with those before it.

    Raises
    ------
    ConfigError
        The list is empty, or a loader is unknown.

    Notes
    -----
    Like in Qlib, a column of a later loader replaces an earlier column of the same name, and the columns are sorted by
    (group, name).

    Examples
    --------
    >>> from qfast.data import synthetic
    >>> day, week = (QlibDataLoader({"feature": ([f"$close / Ref($close, {n})"], [f"R{n}"])}) for n in (1, 5))
    >>> NestedDataLoader([week, day]).load(data=synthetic.prices(2, 10)).columns.tolist()
    [('feature', 'R1'), ('feature', 'R5')]
    """

    def __init__(self, dataloader_l: Sequence[LoaderSpec], join: str = "left") -> None:
        if isinstance(dataloader_l, (str, Mapping)) or not dataloader_l:
            raise ConfigError(f"NestedDataLoader: dataloader_l must be a list of loaders, got {shown(dataloader_l)}.")
        self.data_loader_l = [build_loader(spec, f"dataloader_l[{i}]") for i, spec in enumerate(dataloader_l)]
        self.join = _join(join)

    def read(self, request: LoadRequest) -> Loaded:
        """Read all loaders and merge their rows."""
        merged: pd.DataFrame | None = None
        priced = None
        for loader in self.data_loader_l:
            panel, handler = loader.read(request)
            priced = priced or handler
            frame = panel.to_frame()
            if merged is not None:
                _report_no_common_keys(merged, frame, type(loader).__name__)
                merged = merged.drop(columns=[c for c in frame.columns if c in merged.columns])
                how: Any = self.join
                frame = merged.merge(frame, left_index=True, right_index=True, how=how)
            merged = frame
        assert merged is not None
        if not len(merged):
            raise DataError(f"NestedDataLoader: the loaders have no rows in common (join={self.join!r}).")
        return Loaded(Panel.from_frame(merged.sort_index(axis=1)), priced)


def build_loader(spec: LoaderSpec, path: str = "data_loader") -> DataLoader:
    """Build a loader from an instance, a description or a class name.

    Raises
    ------
    ConfigError
        The class or an argument is unknown.

    Examples
    --------
    >>> build_loader({"class": "QlibDataLoader", "kwargs": {"config": ["$close"]}}).fields
    {'feature': (['$close'], ['$close'])}
    """
    loader: DataLoader = LOADERS.build(spec, path=path)
    return loader


# ---------------------------------------------------------------- helpers
def _join(join: str) -> str:
    if join not in JOINS:
        raise ConfigError(f"join must be one of {list(JOINS)}, got {join!r}.")
    return join


def _refuse_pickle(path: object) -> None:
    if isinstance(path, (str, Path)) and str(path).strip().lower().endswith(PICKLES):
        raise ConfigError(
            f"StaticDataLoader: {str(path)!r} is a pickle file, which can run code when it is read. Remedy: "
            "pandas.read_pickle(...).to_parquet(...) once, if you trust the file, and name the Parquet file."
        )


def _stored_frame(value: Any, options: ReadOptions) -> pd.DataFrame:
    """A frame indexed (datetime, instrument)."""
    value = value.to_frame() if isinstance(value, pd.Series) else without_arrow(value)
    name = "the frame"
    if isinstance(value, (str, Path)):
        _refuse_pickle(value)
        name, file = str(value), Path(str(value).strip()).expanduser()
        if not file.exists():
            raise ConfigError(f"StaticDataLoader: {name!r} does not exist (looked in {Path.cwd()}).")
        value = read_table(file, options)
    if not isinstance(value, pd.DataFrame):
        raise ConfigError(
            f"StaticDataLoader: expected a path, a DataFrame or an Arrow table, got {type(value).__name__}."
            + conversion_hint(value)
        )
    return value if isinstance(value.index, pd.MultiIndex) else keyed_frame(value, name, options)


def _report_no_common_keys(merged: pd.DataFrame, frame: pd.DataFrame, loader: str) -> None:
    """Log that two loaders have no date or no instrument in common, so the columns of one are missing everywhere."""
    for level in ("datetime", "instrument"):
        one, other = (part.index.unique(level) for part in (merged, frame))
        if len(one) and len(other) and not one.isin(other).any():
            log.warning(
                "NestedDataLoader: %s has no %s of the loaders before it, so its columns are missing in their rows: it "
                "has %s to %s, they have %s to %s",
                *(loader, level, other.min(), other.max(), one.min(), one.max()),
            )


def grouped_columns(frame: pd.DataFrame) -> pd.DataFrame:
    """A frame with columns (group, name). Single names that begin with "label" are labels, all others features."""
    if frame.columns.nlevels > 1:
        return frame
    groups = ["label" if str(name).lower().startswith("label") else "feature" for name in frame.columns]
    return frame.set_axis(pd.MultiIndex.from_arrays([groups, frame.columns]), axis=1)


LOADERS = Registry("data loader", accepts=DataLoader, base=DataLoader)
for _loader, _module in (
    (QlibDataLoader, "qlib.data.dataset.loader"),
    (StaticDataLoader, "qlib.data.dataset.loader"),
    (NestedDataLoader, "qlib.data.dataset.loader"),
    (Alpha158DL, "qlib.contrib.data.loader"),
    (Alpha360DL, "qlib.contrib.data.loader"),
):
    LOADERS.add(_loader, modules=(_module, "qfast.data.loaders", "qfast.data"))
LOADERS.unavailable(
    "DataLoaderDH",
    "DataLoaderDH is not available. Remedy: NestedDataLoader, or --engine qlib.",
    modules=("qlib.data.dataset.loader",),
)
