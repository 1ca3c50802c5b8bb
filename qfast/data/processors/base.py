"""The base class of processors, and functions that build and run lists of them."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias, cast

import numpy as np
import pandas as pd

from qfast.data.panel import Panel, Table
from qfast.data.price_windows import PriceWindows
from qfast.data.storage import Storage
from qfast.dates import DateLike
from qfast.errors import ConfigError, DataError, some
from qfast.registry import PROCESSORS, parameters

log = logging.getLogger("qfast.data")


class Workspace:
    """Records which blocks processors may overwrite, and which they did overwrite.

    Attributes
    ----------
    owned : set of str
        Groups whose current block no other panel uses, so it may be overwritten.
    overwritten : set of str
        Groups whose original block was overwritten.
    omitted : set of str
        Columns of the group "feature" that were not computed, because no result depends on them. They are columns that
        a processor later in the list removes.
    storage : Storage
        Allocates new blocks. Default: in memory.
    """

    def __init__(self, owned: Iterable[str] = (), omitted: Iterable[str] = (), storage: Storage | None = None) -> None:
        self.owned = set(owned)
        self.overwritten: set[str] = set()
        self.omitted = set(omitted)
        self.storage = Storage() if storage is None else storage

    def without_blocks(self) -> Workspace:
        """A workspace with the same columns and storage that owns no block."""
        return Workspace((), self.omitted, self.storage)


class LearnOnlyProcessorError(ConfigError, TypeError):
    """A processor that reads labels is in a stage whose result is used for inference."""


class Processor:
    """One step on a panel. `fit` learns statistics from live rows, and a call returns a new panel.

    A subclass implements `_apply(panel, space)`, in which `space` records the blocks that may be overwritten.
    `qfast.data.processors.columns.target` returns the array to write to. Or it overrides `__call__(df)`, and `fit(df)`,
    as in Qlib: both then receive a frame of the live rows, indexed (datetime, instrument), with columns (group, name),
    and `__call__` returns it.

    Examples
    --------
    >>> class Negate(Processor):
    ...     def _apply(self, panel, space):
    ...         return panel.replace("feature", -panel.values("feature"))
    >>> import pandas as pd
    >>> index = pd.MultiIndex.from_product([pd.date_range("2024-01-01", periods=2), ["A"]],
    ...                                    names=["datetime", "instrument"])
    >>> Negate()(Panel.from_frame(pd.DataFrame({"x": [1.0, 2.0]}, index=index))).values("feature").tolist()
    [[-1.0], [-2.0]]
    >>> class Halve(Processor):
    ...     def __call__(self, df):
    ...         df["feature"] /= 2
    ...         return df
    >>> from qfast.data import DataHandlerLP
    >>> frame = pd.DataFrame({("feature", "x"): [1.0, 2.0]}, index=index)
    >>> DataHandlerLP(frame, infer_processors=[Halve()]).fetch()["x"].tolist()
    [0.5, 1.0]
    """

    def fit(self, panel: Panel) -> None:
        """Learn statistics from the live rows of `panel`. The default learns nothing."""

    def __call__(self, panel: Any) -> Any:
        """The processed panel. `panel` and its blocks are not changed. A frame is processed to a frame."""
        if isinstance(panel, pd.DataFrame):  # of a subclass that overrides __call__
            return self._apply(Panel.from_frame(panel), Workspace()).to_frame()
        return self._apply(panel, Workspace())

    def fit_to(self, panel: Panel) -> None:
        """Call `fit`, with a frame if the subclass has Qlib's style."""
        own = self._has_own_fit()
        before = dict(vars(self))
        self.fit(cast(Any, panel.to_frame()) if own and self._processes_frames() else panel)
        if own:
            self._learned = [name for name, value in vars(self).items() if value is not before.get(name)]

    def _processes_frames(self) -> bool:
        return type(self).__call__ is not Processor.__call__

    def _has_own_fit(self) -> bool:
        """Whether `fit` is a method of the user."""
        return type(self).fit.__module__.partition(".")[0] != "qfast"

    def _process_frame(self, panel: Panel) -> Panel:
        """The result of an overridden `__call__`, which receives the live rows as a frame."""
        frame = panel.to_frame()
        index, groups = frame.index, list(frame.columns)
        result = self(frame)
        if isinstance(result, Panel):
            return result
        if not isinstance(result, pd.DataFrame) or result.columns.nlevels != 2:
            raise ConfigError(
                f"{type(self).__name__}.__call__ must return a frame with columns (group, name), got "
                f"{type(result).__name__}."
            )
        if not result.index.equals(index) or list(result.columns) != groups:
            return _cast_as(Panel.from_frame(result, dtype=np.float64), panel)
        rows = panel.by_date(panel.live_rows())
        for group in panel.blocks:
            table = np.array(panel.table(group))
            table[rows] = result[group].to_numpy(dtype=np.float64)
            panel = panel.replace(group, table)
        return panel

    def run(self, panel: Panel, space: Workspace) -> Panel:
        """The processed panel. Blocks that `space` owns may be overwritten, and `space` owns all new blocks."""
        before = {group: block.table for group, block in panel.blocks.items()}
        after = self._process_frame(panel) if self._processes_frames() else self._apply(panel, space)
        for group, block in after.blocks.items():
            if block.table is not before.get(group):
                space.owned.add(group)
                self._report_computed(group, before.get(group), block.table)
        return after

    def _report_computed(self, group: str, before: Table | None, after: Table) -> None:
        """Log, or refuse, that windows of prices became columns in memory."""
        if not isinstance(before, PriceWindows) or isinstance(after, PriceWindows):
            return
        name = type(self).__name__
        if before.required:
            raise ConfigError(
                f"{name} needs {after.shape[1]} columns of group {group!r} in memory, but windows is 'view'. "
                f"Remedy: windows='auto', or processors without {name}."
            )
        size = np.prod(after.shape) * after.itemsize / 2**30
        count = after.shape[1]
        log.info("%s: group %r is stored as %d columns, %.2f GiB, because %s", name, group, count, size, self.no_view)

    no_view = "it is not known to treat each value alone"  # why windows of prices become columns in memory
    frozen = False  # True after load_state; `fit` is then no longer called

    def state(self) -> dict[str, np.ndarray]:
        """The statistics that `fit` learned, as named arrays; empty for a step that learns nothing.

        Raises
        ------
        NotFittedError
            The step needs `fit` first.
        ConfigError
            A subclass of the user has a `fit` that sets attributes, but no `state`.
        """
        learned = getattr(self, "_learned", [])
        if learned:
            raise ConfigError(
                f"{type(self).__name__}.fit sets {some(learned, 4)}, but the class has no state() and "
                "load_state(state), so a run cannot store them. Remedy: implement both for named arrays, as in "
                "qfast.data.processors."
            )
        return {}

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Load the result of `state`. The step is then frozen and not fitted again.

        Raises
        ------
        DataError
            The arrays are not those of this processor.
        """
        if state:
            raise DataError(f"{type(self).__name__} learns nothing, but the saved state has {sorted(state)}.")
        self.frozen = True

    def is_for_infer(self) -> bool:
        """False for a step that needs labels, which inference data lacks."""
        return True

    def readonly(self) -> bool:
        """True: a call never changes the values of its argument. Part of Qlib's interface."""
        return True

    def config(self, **kwargs: DateLike | None) -> None:
        """Replace `fit_start_time` and `fit_end_time`, if the processor has them.

        Raises
        ------
        ConfigError
            Another setting is passed.
        """
        for name, value in kwargs.items():
            if name not in ("fit_start_time", "fit_end_time"):
                raise ConfigError(
                    f"{type(self).__name__}.config has no setting {name!r}; it has fit_start_time and fit_end_time."
                )
            if hasattr(self, name):
                setattr(self, name, value)

    def __repr__(self) -> str:
        """The constructor call."""
        public = {
            k: v for k, v in vars(self).items() if not k.startswith("_") and not isinstance(v, (dict, np.ndarray))
        }
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in public.items())})"

    def _apply(self, panel: Panel, space: Workspace) -> Panel:
        raise NotImplementedError(f"{type(self).__name__} must implement _apply(panel, space)")


def _cast_as(panel: Panel, other: Panel) -> Panel:
    """The panel with the dtypes that its groups have in `other`."""
    for group in panel.blocks:
        if group in other.blocks:
            panel = panel.replace(group, np.asarray(panel.table(group), dtype=other.table(group).dtype))
    return panel


ProcessorSpec: TypeAlias = Processor | Mapping[str, Any] | str
"""A processor, {"class": name, "kwargs": {...}} or a class name."""


# ---------------------------------------------------------------- building and running lists of processors
def build_processor(
    spec: ProcessorSpec,
    fit_start_time: DateLike | None = None,
    fit_end_time: DateLike | None = None,
    *,
    path: str = "",
    inject: bool = True,
) -> Processor:
    """Build a processor from an instance, a configuration mapping or a class name.

    Parameters
    ----------
    spec : Processor, mapping or str
        An instance, ``{"class": "Fillna", "kwargs": {"fields_group": "feature"}}``, or "Fillna". A mapping is not
        changed.
    fit_start_time, fit_end_time : date-like or None
        Fit period of a processor that has these arguments. Values in `spec` have priority; in Qlib they do not.
    path : str
        Place of the configuration, for messages.
    inject : bool
        False: use only the fit period in `spec`.

    Returns
    -------
    Processor

    Raises
    ------
    ConfigError
        The class or an argument is unknown, or a fit period is required and missing.

    Examples
    --------
    >>> build_processor({"class": "Fillna", "kwargs": {"fill_value": 1}})
    Fillna(fields_group=None, fill_value=1)
    """
    if PROCESSORS.is_instance(spec):
        return cast(Processor, spec)
    factory, kwargs = PROCESSORS.resolve(spec, path)
    if inject and {"fit_start_time", "fit_end_time"} <= parameters(factory).keys():
        kwargs = {"fit_start_time": fit_start_time, "fit_end_time": fit_end_time, **kwargs}
        missing = [k for k in ("fit_start_time", "fit_end_time") if kwargs[k] is None]
        if missing:
            raise ConfigError(
                f"{path + ': ' if path else ''}{getattr(factory, '__name__', factory)} needs {' and '.join(missing)}. "
                "Remedy: pass fit_start_time and fit_end_time to the handler or to the processor."
            )
    return cast(Processor, PROCESSORS.create(factory, kwargs, path))


def _empty_columns(panel: Panel, fields_group: object) -> list[str]:
    """Columns of a group, or of all groups, without any finite value in the live rows, as "name (group)"."""
    rows = panel.live_rows()
    return [
        f"{name} ({group})"
        for group, block in panel.blocks.items()
        if not isinstance(fields_group, str) or group == fields_group
        for position, name in enumerate(block.columns)
        if not np.isfinite(block.table[rows, position]).any()
    ]


def run_processors(
    panel: Panel, processors: Sequence[Processor], *, stage: str, space: Workspace, fit: bool = True
) -> Panel:
    """Fit and apply processors in order. Each is fitted to the result of the previous one.

    Parameters
    ----------
    panel : Panel
    processors : sequence of Processor
    stage : {"shared", "infer", "learn"}
    space : Workspace
        Blocks that may be overwritten. It also owns the new blocks afterwards.
    fit : bool
        False: apply without fitting.

    Returns
    -------
    Panel

    Raises
    ------
    LearnOnlyProcessorError
        A processor that reads labels is in the shared or infer stage. Like in Qlib, the error is a TypeError too.
    DataError
        A processor drops all rows.
    """
    for number, processor in enumerate(processors):
        name = f"{stage}_processors[{number}]"
        if stage != "learn" and not processor.is_for_infer():
            raise LearnOnlyProcessorError(
                f"{name} is {type(processor).__name__}, which reads labels and is for learning only. "
                "Remedy: move it to learn_processors."
            )
        if fit and not processor.frozen:
            processor.fit_to(panel)
        before, rows_before = panel, panel.n_live
        panel = processor.run(panel, space)
        if rows_before and not panel.n_live:
            empty = _empty_columns(before, getattr(processor, "fields_group", None))
            cause = f"these columns contain no value: {some(empty)}" if empty else "every row has a NaN"
            raise DataError(f"{name} ({processor!r}) dropped all {rows_before} rows, because {cause}.")
    return panel
