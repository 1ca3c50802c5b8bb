"""A finished run in Python: the model with its weights, the fitted processors, the resolved configuration."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from qfast.data.prices import Instruments
from qfast.data.processors import Processor
from qfast.data.protocols import HandlerDataset
from qfast.data.source_notes import collected_notes
from qfast.dates import DateLike, date_text, normal_date
from qfast.errors import ConfigError, DataError
from qfast.read_options import ReadOptions, ReadSettings
from qfast.workflow.dataset import DataInput, recorded_source, stored_read_options
from qfast.workflow.folder import BEST, CONFIG, FINISHED, RunFolder
from qfast.workflow.lookback import check_lookback
from qfast.workflow.new_data import SEGMENT, NewData, TextBounds
from qfast.workflow.saved_estimator import load_estimator
from qfast.workflow.saved_model import first_day, load_facts, load_model, load_processors, run_instruments
from qfast.workflow.user_code import AllowCode, allowed_code, require_permission
from qfast.workflow.validation import register_all

if TYPE_CHECKING:
    from qfast.training.estimator import Estimator

__all__ = ["SavedRun", "load"]

log = logging.getLogger("qfast")

LATEST = "latest"


class SavedRun:
    """A run that `load` has read.

    Attributes
    ----------
    path : Path
        The run folder.
    manifest : dict
        Status, versions, seed, device and data of the run.
    model : Estimator
        The model with its best weights. `predict`, `network` and, for GATs, `attention` are available.
    processors : dict of str to list of Processor
        The fitted processors of the stages "shared" and "infer".
    notes : list of str
        Warnings, for example about replaced weights.
    """

    def __init__(
        self,
        folder: RunFolder,
        facts: Mapping[str, Any],
        model: Estimator,
        processors: dict[str, list[Processor]],
        allow_code: AllowCode,
        notes: Sequence[str],
    ) -> None:
        self.path = folder.path
        self.manifest = folder.manifest
        self.model = model
        self.processors = processors
        self.notes = list(notes)
        self._folder, self._facts, self._allow_code = folder, facts, allow_code

    @cached_property
    def config(self) -> dict[str, Any]:
        """The resolved configuration of the run, as plain data."""
        from qfast.workflow.config import load_config

        return load_config(self.path / CONFIG).values

    def __repr__(self) -> str:
        """Class, folder, model and status."""
        return f"SavedRun({str(self.path)!r}, {type(self.model).__name__}, {self.manifest['status']})"

    def dataset(
        self,
        data: DataInput | None = None,
        start: DateLike | None = None,
        end: DateLike | None = None,
        *,
        instruments: Instruments = None,
        read_options: ReadSettings = None,
    ) -> HandlerDataset:
        """A dataset on old or new data with the fitted processors of the run.

        Parameters
        ----------
        data, start, end, instruments, read_options
            As in `qfast.predict`.

        Returns
        -------
        DatasetH or TSDatasetH
            It has one segment, "new", from `start` to `end`: `run.model.predict(dataset, "new")`. Features are computed
            for the rows that its samples read.

        Raises
        ------
        ConfigError, DataError
            As in `qfast.predict`.
        """
        with self._permitted():
            return self._new_data(data, instruments, read_options).dataset(_bounds(start, end))[0]

    def predict(
        self,
        data: DataInput | None = None,
        start: DateLike | None = None,
        end: DateLike | None = None,
        *,
        date: DateLike | None = None,
        instruments: Instruments = None,
        read_options: ReadSettings = None,
    ) -> pd.Series:
        """Score old or new data; arguments, result and errors as in `qfast.predict`."""
        latest = isinstance(date, str) and date == LATEST
        bounds = _bounds(start, end, None if latest else date)
        if latest and bounds != (None, None):
            raise ConfigError(f"--date latest cannot be combined with --start {start} and --end {end}.")
        with self._permitted():
            with collected_notes() as source_notes:  # which the readers have logged
                new = self._new_data(data, instruments, read_options)
                dataset, bounds = new.dataset(bounds, latest)
            notes = [*self.notes, *new.notes, *self._notes_on_earlier_days(dataset, bounds)]
            for note in notes:
                log.warning("%s", note)
            scores = self.model.predict(dataset, SEGMENT)
        if scores.empty:
            raise DataError(
                f"no row is between start={bounds[0]} and end={bounds[1]}; the data is from {new.period(dataset)}."
            )
        scores = scores.rename("score").sort_index()
        scores.attrs["notes"] = [*(note.text for note in source_notes if note.warning), *notes]
        return scores

    @contextmanager
    def _permitted(self) -> Iterator[None]:
        """Permit the user's classes while handler, processors and dataset are built."""
        with allowed_code(self._allow_code):
            yield

    def _new_data(self, data: DataInput | None, instruments: Instruments, read_options: ReadSettings) -> NewData:
        options = ReadOptions.of(read_options).over(stored_read_options(self.manifest))
        return NewData(
            self._facts,
            self.processors,
            recorded_source(self._folder) if data is None else data,
            run_instruments(self._folder, self._facts) if instruments is None else _everything(instruments),
            options,
        )

    def _notes_on_earlier_days(self, dataset: HandlerDataset, bounds: TextBounds) -> list[str]:
        notes = []
        lookback_note = check_lookback(dataset, *bounds, self._facts.get("short_history", 0.0))
        if lookback_note is not None:
            notes.append(lookback_note)
        start = self._facts.get("start")
        first = first_day(dataset.handler)
        if start is not None and first > dataset.handler.panel("infer").timestamp(start, "start"):
            notes.append(
                f"the data begins on {date_text(first)}, the training data on {start}: features that depend on the "
                "first day (EMA, windows over all earlier rows) differ from training"
            )
        return notes


def load(
    run_path: str | os.PathLike[str],
    *,
    device: str = "auto",
    allow_code: AllowCode = None,
    weights: str | os.PathLike[str] | None = None,
) -> SavedRun | Any:
    """Load a run, or an estimator that `Estimator.save` has written. Nothing is fitted.

    Parameters
    ----------
    run_path : path
        A run folder, of which the model with the best weights, the fitted processors and the configuration are loaded;
        an interrupted run has its best weights so far. Or a file of `Estimator.save`.
    device, allow_code, weights
        As in `qfast.predict`. `weights` is for run folders only.

    Returns
    -------
    SavedRun, or for a file the Estimator

    Raises
    ------
    ConfigError
        `run_path` is neither a run folder nor a file, or its classes require `allow_code`.
    CheckpointError
        A file is missing, truncated or inconsistent.

    Examples
    --------
    >>> import tempfile
    >>> from qfast.workflow.demo import DEMO, demo_prices
    >>> from qfast.workflow.run import run
    >>> prices, folder = demo_prices(20, 560), tempfile.TemporaryDirectory()
    >>> path = run(DEMO, prices, ["task.model.kwargs.n_epochs=1"], output=f"{folder.name}/run").path
    >>> saved = load(path)
    >>> saved.config["task"]["model"]["class"], sorted(saved.processors)
    ('LSTM', ['infer', 'shared'])
    >>> dataset = saved.dataset(prices, start="2019-12-02", end="2019-12-20")
    >>> saved.model.predict(dataset, "new").equals(saved.predict(prices, "2019-12-02", "2019-12-20"))
    True
    """
    if Path(run_path).is_file():
        if weights is not None:
            raise ConfigError(
                f"weights={os.fspath(weights)!r} replaces the weights of a run, but {os.fspath(run_path)!r} is a file. "
                "Remedy: load(path).load_weights(weights)."
            )
        with allowed_code(allow_code):
            return load_estimator(Path(run_path), device)
    folder = RunFolder.open(run_path)
    with allowed_code(allow_code) as code:
        require_permission(folder.manifest, code, run_path)
        if folder.manifest["status"] != FINISHED:
            log.warning("run %s is %s; scoring with its best weights so far", run_path, folder.manifest["status"])
        register_all()
        facts = load_facts(folder)
        processors = load_processors(folder, facts["processors"])
        model = load_model(folder, facts, device, weights)
    note = folder.replaced_file(BEST) if weights is None else None
    if note is not None:
        log.warning("%s", note)
    return SavedRun(folder, facts, model, processors, allow_code, [] if note is None else [note])


def _everything(instruments: Instruments) -> Instruments:
    return None if isinstance(instruments, str) and instruments.lower() == "all" else instruments


def _bounds(start: DateLike | None, end: DateLike | None, date: DateLike | None = None) -> TextBounds:
    if date is None:
        return _date("start", start), _date("end", end)
    if start is not None or end is not None:
        raise ConfigError(f"--date {date} cannot be combined with --start {start} and --end {end}.")
    return _date("date", date), _date("date", date)


def _date(name: str, value: DateLike | None) -> str | None:
    try:
        return normal_date(value)
    except ValueError as error:
        raise ConfigError(f"--{name}: {error}.") from None
