"""New data for a finished run: its dataset with the fitted processors, on the days that the requested scores need.

A score reads the rows of its window, and every row reads the prices of its features' lookback. Only these days are read
from a Qlib data folder, and only the files of instruments that are members on one of them.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd

from qfast import registry
from qfast.data.arrow_tables import without_arrow
from qfast.data.handlers.prices import PriceHandler
from qfast.data.panel import Panel
from qfast.data.prices import Instruments, PriceSource, StorePath
from qfast.data.processors import Processor
from qfast.data.protocols import Handler, HandlerDataset
from qfast.data.store import BinaryStore, is_store
from qfast.data.tables import panel_of
from qfast.dates import date_text
from qfast.errors import DataError, naming_data_page, some
from qfast.read_options import ReadOptions
from qfast.workflow.dataset import DataInput, source_argument, source_arguments, source_panel
from qfast.workflow.saved_model import source_columns, time_steps

__all__ = ["NewData", "TextBounds"]

log = logging.getLogger("qfast")

RECENT_DAYS = 20  # of the data, which determine how many instruments a day usually has
SEGMENT = "new"

TextBounds = tuple[str | None, str | None]
"""First and last date as ISO text; None: unbounded."""


@dataclass
class NewData:
    """Prices or factors for the model of a run.

    Attributes
    ----------
    facts : mapping
        Content of the run's model.json.
    processors : mapping
        Stage -> fitted processors.
    data : path, {freq: folder}, DataFrame, Panel or mapping of frames
    instruments : str, list, {code: spans} or None
        Instruments to score; None: all.
    options : ReadOptions
        How to read a table.
    notes : list of str
        Warnings about the data, which grow while it is read.
    """

    facts: Mapping[str, Any]
    processors: Mapping[str, Sequence[Processor]]
    data: DataInput | Mapping[str, str]
    instruments: Instruments
    options: ReadOptions
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.data = without_arrow(self.data)
        factory, _ = registry.HANDLERS.resolve(_bare(self.facts["handler"]))
        self._accepted = registry.all_parameters(factory)
        self._store: BinaryStore | None = None
        self._panel: Panel | None = None
        if isinstance(factory, type) and issubclass(factory, PriceHandler):
            self._open()
        elif source_argument(self.facts["handler"]) == "source":
            factors = source_arguments(self.facts["handler"], cast(DataInput, self.data), self.options)["source"]
            self._panel = _feature_panel(factors, self.facts.get("raw_columns"))
        if self._panel is not None:
            self.instruments = self._present(self._panel.instruments)

    def _open(self) -> None:
        """Open the store, or read the table of prices."""
        arguments = self.facts["handler"]["kwargs"]
        own = ReadOptions.of(arguments.get("read_options")).over(ReadOptions(freq=arguments.get("freq")))
        options = self.options.over(own)
        by_freq = isinstance(self.data, Mapping) and all(isinstance(v, (str, Path)) for v in self.data.values())
        if by_freq or (isinstance(self.data, (str, Path)) and is_store(self.data)):
            with naming_data_page():
                self._store = BinaryStore(cast(StorePath, self.data), options.freq or "day")
        else:
            self._panel = panel_of(cast(PriceSource, self.data), options)

    def _present(self, available: np.ndarray) -> Instruments:
        """The instruments to score without those that the data lacks, which a note mentions."""
        if self.instruments is None:
            return None
        if isinstance(self.instruments, str):
            return [self.instruments] if self.instruments in available else None
        if isinstance(self.instruments, Mapping) and "market" in self.instruments:
            return None
        wanted = list(dict.fromkeys(str(name) for name in self.instruments))
        absent = sorted(set(wanted) - {str(name) for name in available})
        if len(absent) == len(wanted):
            raise DataError(
                f"the data has none of the instruments of the run ({some(absent, 5)}). Remedy: --instruments all."
            )
        if absent:
            self.notes.append(f"{len(absent)} of {len(wanted)} instruments are not in the data: {some(absent, 5)}")
        if isinstance(self.instruments, Mapping):
            return {code: spans for code, spans in self.instruments.items() if str(code) not in absent}
        return [name for name in wanted if name not in absent]

    # ---------------------------------------------------------------- the dataset
    def dataset(self, bounds: TextBounds, latest: bool = False) -> tuple[HandlerDataset, TextBounds]:
        """Build the dataset, whose segment "new" is the requested period.

        Parameters
        ----------
        bounds : pair of str or None
            First and last date to score.
        latest : bool
            Score the last day on which the data has values, instead of `bounds`.

        Returns
        -------
        tuple
            The dataset, and the bounds of its segment.

        Raises
        ------
        DataError
            The data cannot be read, or its columns differ from those in training.
        """
        if latest and (self._store is not None or self._panel is not None):
            bounds = self._latest_day(self._recent_prices())
        handler = self._needed_rows(bounds)
        if latest and bounds == (None, None):
            bounds = self._latest_day(source_panel(handler))
        _require_columns(self.facts["columns"], handler.get_cols("feature", "infer"), "feature column")
        if self.facts.get("source_columns") is not None:
            present = source_columns(handler) or []
            _require_columns(self.facts["source_columns"], present, "price column", extra_allowed=True)
        spec = self.facts["dataset"]
        kwargs = {**spec["kwargs"], "handler": handler, "segments": {SEGMENT: list(bounds)}}
        dataset: HandlerDataset = registry.DATASETS.build({**spec, "kwargs": kwargs}, path="dataset")
        return dataset, bounds

    def period(self, dataset: HandlerDataset) -> str:
        """First and last date of the data, for messages."""
        dates = (self._calendar() or dataset.handler.panel("infer")).datetimes
        return f"{date_text(dates[0])} to {date_text(dates[-1])}"

    def _needed_rows(self, bounds: TextBounds) -> Handler:
        """The handler from the first date of the first window to the last date."""
        calendar, step_len = self._calendar(), time_steps(self.facts["dataset"])
        if not self._reads_windows_only():
            return self._handler((None, None))
        if step_len == 0 or bounds[0] is None:
            return self._handler(bounds)
        if calendar is None:
            return self._handler((None, None))
        begin, margin = calendar.date_code_range(bounds[0], None)[0], step_len
        while begin > margin:
            handler = self._handler((calendar.datetimes[begin - margin].isoformat(), bounds[1]))
            # A window counts the dates on which the data has rows. The calendar may contain other dates.
            if _dates_before(handler.panel("infer"), bounds[0]) >= step_len:
                return handler
            margin *= 2
        return self._handler((None, bounds[1]))

    def _reads_windows_only(self) -> bool:
        """False if a processor of the user may read other days than those of a window."""
        processors = [p for stage in self.processors.values() for p in stage]
        return all(type(p).__module__.split(".")[0] == "qfast" for p in processors)

    def _handler(self, bounds: TextBounds) -> Handler:
        """The handler of the run over the rows between two dates, with the fitted processors."""
        spec = self.facts["handler"]
        arguments = {**spec["kwargs"], **self._source_arguments()}
        stages = {f"{stage}_processors": list(built) for stage, built in self.processors.items()}
        arguments |= {name: built for name, built in stages.items() if name in self._accepted}
        arguments["learn_processors"] = []
        if "source" not in arguments:
            arguments["start_time"], arguments["end_time"] = bounds
            if self.facts.get("start") is not None:  # features such as EMA must begin on the same day as in training
                arguments["start_time"] = self.facts["start"]
        if "instruments" in self._accepted:
            everything = None if "source" in arguments else "all"
            arguments["instruments"] = everything if self.instruments is None else self.instruments
            if self._store is not None:
                arguments["instruments"] = self._store.members(self.instruments, arguments["start_time"], bounds[1])
        handler: Handler = registry.HANDLERS.build({**spec, "kwargs": arguments}, path="model.json")
        return handler

    def _source_arguments(self) -> dict[str, Any]:
        if self._panel is not None:  # it was read with the options, which must not be applied twice
            panel = source_arguments(self.facts["handler"], self._panel)
            return {**panel, "read_options": None} if "read_options" in self._accepted else panel
        if self._store is not None and isinstance(self.data, Mapping):
            return {"data": None, "provider_uri": self.data}
        return source_arguments(self.facts["handler"], cast(DataInput, self.data), self.options)

    # ---------------------------------------------------------------- dates
    def _calendar(self) -> Panel | None:
        """A panel with the dates of the prices; None if they are not known before the handler is built."""
        if self._store is None:
            return self._panel
        empty = np.empty(0, dtype=np.int32)
        return Panel(self._store.calendar, np.empty(0, dtype=object), empty, empty, {})

    def _recent_prices(self) -> Panel:
        """Prices or factors that contain the last RECENT_DAYS days with rows."""
        if self._store is None:
            assert self._panel is not None
            return self._panel
        n_days = 2 * RECENT_DAYS
        while n_days < len(self._store.calendar):
            low = len(self._store.calendar) - n_days
            panel = self._closes(self._store, self._store.calendar[low])
            if panel is not None and panel.date_codes[panel.live_rows()].max(initial=-1) - RECENT_DAYS >= low:
                return panel
            n_days *= 4
        return self._store.read(self.instruments, ["close"]).panel

    def _closes(self, store: BinaryStore, start: pd.Timestamp) -> Panel | None:
        """Closing prices from `start` on; None if there are none."""
        try:
            return store.read(store.members(self.instruments, start, None), ["close"], start).panel
        except DataError:
            return None

    def _latest_day(self, panel: Panel) -> TextBounds:
        """The last day on which the data has values. Notes mention an incomplete day and later days without values."""
        rows = panel.live_rows()
        rows = rows[panel.date_codes[rows] > panel.date_codes[rows].max() - RECENT_DAYS]
        if "price" in panel.blocks and "close" in panel.columns("price"):
            has_value = np.isfinite(panel.column("close")[rows])
        else:
            has_value = np.isfinite(panel.values(next(iter(panel.blocks)))[rows]).any(axis=1)
        counts = np.bincount(panel.date_codes[rows[has_value]], minlength=len(panel.datetimes))
        last = int(panel.date_codes[rows].max())
        day = int(np.flatnonzero(counts)[-1]) if has_value.any() else last
        scored = date_text(panel.datetimes[day])
        if last < len(panel.datetimes) - 1:
            self.notes.append(
                f"the calendar of the data ends on {date_text(panel.datetimes[-1])}, but no instrument to score has a "
                f"row after {date_text(panel.datetimes[last])}; scoring {scored}"
            )
        elif day < last:
            self.notes.append(
                f"the last day of the data, {date_text(panel.datetimes[last])}, has no values; scoring {scored} instead"
            )
        usual = float(np.median(counts[:day][counts[:day] > 0])) if counts[:day].any() else 0.0
        if counts[day] < usual / 2:
            self.notes.append(
                f"only {counts[day]} instruments have values on {scored}, compared with {usual:.0f} on the days "
                "before; the day may be incomplete"
            )
        return panel.datetimes[day].isoformat(), panel.datetimes[day].isoformat()


# ---------------------------------------------------------------- helpers
def _bare(spec: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in spec.items() if key != "kwargs"}


def _dates_before(panel: Panel, start: str) -> int:
    """Number of dates before `start` on which the panel has live rows."""
    codes = panel.date_codes[panel.live_rows()]
    return len(np.unique(codes[codes < panel.date_code_range(start, None)[0]]))


def _feature_panel(source: Panel | pd.DataFrame, columns: Sequence[str] | None) -> Panel:
    """The factors in the column order of training. Labels are unused and may be present."""
    panel = source if isinstance(source, Panel) else Panel.from_frame(source)
    if "feature" not in panel.blocks:
        raise DataError(f"the data has no column group 'feature', only {sorted(panel.blocks)}.")
    present = panel.columns("feature")
    if columns is None or list(columns) == list(present):
        return panel
    _require_columns(columns, present, "feature column")
    order = [present.index(name) for name in columns]
    return panel.replace("feature", np.ascontiguousarray(panel.values("feature")[:, order]), columns)


def _require_columns(trained: Sequence[str], present: Sequence[str], what: str, extra_allowed: bool = False) -> None:
    missing = [name for name in trained if name not in present]
    extra = [] if extra_allowed else [name for name in present if name not in trained]
    if missing or extra:
        raise DataError(
            f"the data differs from the training data: {what}s missing (or empty) {_listed(missing)}, unexpected "
            f"{_listed(extra)}. Remedy: pass the {what}s of training."
        )


def _listed(names: Sequence[str]) -> str:
    return f"[{some([repr(name) for name in names], most=6)}]" if names else "none"
