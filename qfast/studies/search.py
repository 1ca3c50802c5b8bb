"""A search with Optuna: its trials are the points of a study, and a pruner may stop a run early.

Optuna's storage contains the trials, so `optuna-dashboard` and Optuna itself can read them while the study runs. A
trial that was running when the study was killed is continued when the study is resumed.
"""

from __future__ import annotations

import importlib
import inspect
import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qfast.errors import ConfigError, suggest
from qfast.files import atomic_write
from qfast.metrics import daily_ic, ic_summary
from qfast.studies.axes import Point
from qfast.studies.plan import Plan
from qfast.studies.results import PRUNED, PRUNED_FILE, metric_id
from qfast.training.callbacks import Callback
from qfast.workflow.config import load_config
from qfast.workflow.folder import CONFIG, FINISHED
from qfast.workflow.prepared import PreparedData
from qfast.workflow.validation import check_workflow

if TYPE_CHECKING:
    from qfast.training.estimator import Estimator

__all__ = ["Pruning", "SearchPoints", "build_pruner", "build_sampler", "build_storage"]

log = logging.getLogger("qfast")

STORAGE_FILES = {"sqlite": "search.db", "journal": "search.journal"}
INTERMEDIATE = ("ic", "icir", "rank_ic", "rank_icir")  # metrics of scores, which are known after each epoch


def _optuna() -> Any:
    """Optuna, without its message for every trial."""
    optuna = importlib.import_module("optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def build_sampler(search: Mapping[str, Any], number: int) -> Any:
    """The sampler for trial `number`.

    Each trial has a sampler with a seed of its own. A resumed search therefore draws what an uninterrupted one draws.
    """
    factory = _class_of("samplers", search["sampler"]["class"])
    kwargs = dict(search["sampler"].get("kwargs") or {})
    if "seed" in inspect.signature(factory).parameters:
        entropy = (int(kwargs.get("seed") or 0), number)
        kwargs["seed"] = int(np.random.SeedSequence(entropy).generate_state(1)[0])
    return factory(**kwargs)


def build_pruner(search: Mapping[str, Any]) -> Any:
    """The pruner; NopPruner, which stops no run, if the search has none."""
    if search.get("pruner") is None:
        return _optuna().pruners.NopPruner()
    return _class_of("pruners", search["pruner"]["class"])(**search["pruner"].get("kwargs") or {})


def build_storage(kind: str, folder: Path) -> Any:
    """The storage of a study folder: an SQLite file, or a journal file."""
    optuna = _optuna()
    file = folder.resolve() / STORAGE_FILES[kind]
    if kind == "sqlite":
        return optuna.storages.RDBStorage(
            f"sqlite:///{file}",
            engine_kwargs={"connect_args": {"timeout": 60}},  # seconds to wait for another writer
        )
    journal = importlib.import_module("optuna.storages.journal")
    return optuna.storages.JournalStorage(journal.JournalFileBackend(str(file)))


def _class_of(module: str, name: str) -> Any:
    """A class of `optuna.samplers` or `optuna.pruners`."""
    optuna = _optuna()
    known = [
        n for n in dir(getattr(optuna, module)) if n.endswith(module[:-1].capitalize()) and not n.startswith("Base")
    ]
    if name not in known:
        raise ConfigError(f"optuna.{module} has no {name!r}; it has {known}.{suggest(name, known)}")
    return getattr(getattr(optuna, module), name)


class SearchPoints:
    """The trials of a search as points of a study. Each point of a grid has a search of its own.

    Parameters
    ----------
    plan : Plan
    folder : Path
        The study folder, which contains the storage.
    """

    def __init__(self, plan: Plan, folder: Path) -> None:
        axes = plan.axes
        assert axes.search is not None
        self._search, self._trials, self._folder = axes.search, axes.trials, folder
        self._grid = axes.grid_points()
        self._storage = build_storage(self._search["storage"], folder)
        self._studies = [self._study(position) for position in range(len(self._grid))]
        self._open: dict[int, Any] = {}  # index of a point -> its running trial
        self._position = 0
        self.first_alone = self._search.get("pruner") is not None

    def _study(self, position: int) -> Any:
        return _optuna().create_study(
            storage=self._storage,
            study_name=study_name(position),
            direction=self._search["direction"],
            pruner=build_pruner(self._search),
            load_if_exists=True,
        )

    def total(self, plan: Plan) -> int:
        """Number of runs if no trial is stopped early."""
        return sum(plan.count([Point(g * self._trials, values)]) for g, values in enumerate(self._grid)) * self._trials

    def next(self) -> Point | None:
        """The next trial; None if all trials have begun."""
        if self._position == len(self._grid) * self._trials:
            return None
        grid, number = divmod(self._position, self._trials)
        self._position += 1
        trial = self._trial(self._studies[grid], number)
        values = {key: _suggest(trial, key, spec) for key, spec in self._search["space"].items()}
        point = Point(grid * self._trials + number, {**self._grid[grid], **values}, trial=number)
        self._open[point.index] = trial
        return point

    def _trial(self, study: Any, number: int) -> Any:
        """Trial `number`: a new one, or one that an earlier process began."""
        study.sampler = build_sampler(self._search, number)
        earlier = study.get_trials(deepcopy=False)
        if number >= len(earlier):
            return study.ask()
        if earlier[number].state.is_finished():
            return _Finished(earlier[number].params)
        return _optuna().trial.Trial(study, earlier[number]._trial_id)

    def trial(self, point: Point) -> Mapping[str, Any] | None:
        """What the first run of a trial needs to report its epochs; None without a pruner."""
        trial = self._open[point.index]
        if self._search.get("pruner") is None or isinstance(trial, _Finished):
            return None
        return {
            "folder": str(self._folder.resolve()),
            "search": dict(self._search),
            "study": study_name(point.index // self._trials),
            "trial": trial._trial_id,
        }

    def done(self, point: Point, rows: list[Mapping[str, Any]]) -> None:
        """Report the mean objective of a trial's runs to Optuna."""
        trial = self._open.pop(point.index)
        if isinstance(trial, _Finished):
            return
        study = self._studies[point.index // self._trials]
        states = _optuna().trial.TrialState
        values = [float(row.get(self._search["objective"], math.nan)) for row in rows]
        if any(row["status"] == PRUNED for row in rows):
            study.tell(trial, state=states.PRUNED)
        elif all(row["status"] == FINISHED for row in rows) and all(map(math.isfinite, values)):
            study.tell(trial, sum(values) / len(values))
        else:
            study.tell(trial, state=states.FAIL)

    def results(self) -> list[dict[str, Any]]:
        """For each point of the grid: its values, and number, value and parameters of the best trial, if any."""
        results = []
        for values, study in zip(self._grid, self._studies, strict=True):
            complete = [t for t in study.get_trials(deepcopy=False) if t.state.name == "COMPLETE"]
            if complete:
                best = study.best_trial
                results.append({**values, "trial": best.number, "value": best.value, **best.params})
        return results


class _Finished:
    """A trial that Optuna knows the result of, with its parameters."""

    def __init__(self, params: Mapping[str, Any]) -> None:
        self.params = params


def study_name(position: int) -> str:
    """Name of the search of a point of the grid in Optuna's storage."""
    return "search" if position == 0 else f"search-{position}"


def _suggest(trial: Any, key: str, spec: Mapping[str, Any]) -> Any:
    """The value of one key in a trial."""
    if isinstance(trial, _Finished):
        return trial.params[key]
    if spec["type"] == "categorical":
        return trial.suggest_categorical(key, spec["choices"])
    suggest_number = trial.suggest_int if spec["type"] == "int" else trial.suggest_float
    options = {name: spec[name] for name in ("step", "log") if spec.get(name)}
    return suggest_number(key, spec["low"], spec["high"], **options)


class Pruning(Callback):
    """Reports the objective after each epoch, and ends the training if the pruner says so.

    The run then scores and reports as usual. A file in its folder marks it as stopped early.

    Parameters
    ----------
    facts : mapping
        Result of `SearchPoints.trial`.
    folder : Path
        The run folder.
    prepared : PreparedData
    """

    def __init__(self, facts: Mapping[str, Any], folder: Path, prepared: PreparedData) -> None:
        self._search, self._folder, self._prepared = facts["search"], folder, prepared
        study = _optuna().load_study(
            storage=build_storage(self._search["storage"], Path(facts["folder"])),
            study_name=facts["study"],
            pruner=build_pruner(self._search),
        )
        self._trial = _optuna().trial.Trial(study, facts["trial"])
        self._dataset: Any = None
        self._label: Any = None
        self._segment, _, self._metric = str(self._search["objective"]).partition(".")

    def on_valid_end(self, estimator: Estimator) -> None:
        """Report the epoch, and stop the training if the trial is not promising."""
        value = self._value(estimator)
        if not math.isfinite(value):
            return
        self._trial.report(value, step=estimator.epoch_)
        if self._trial.should_prune():
            note = json.dumps({"epoch": estimator.epoch_, self._search["objective"]: value})
            atomic_write(self._folder / PRUNED_FILE, lambda file: file.write_text(note, encoding="utf-8"))
            log.info("the pruner ends the run after epoch %d", estimator.epoch_)
            estimator.stop_training = True

    def _value(self, estimator: Estimator) -> float:
        """The objective with the weights of this epoch; for other metrics than ICs, the score of the epoch."""
        if self._metric not in INTERMEDIATE:
            return float(estimator.progress_.records[-1].get("valid", math.nan))
        if self._dataset is None:
            workflow = check_workflow(load_config(self._folder / CONFIG).values)
            self._dataset = self._prepared.dataset(workflow)
            ends = self._dataset.segments[self._segment]
            labels = self._dataset.handler.fetch(slice(*ends), col_set="label", data_key="raw")
            self._label = labels.iloc[:, 0]
        summary = ic_summary(*daily_ic(estimator.predict(self._dataset, self._segment), self._label))
        return {metric_id(name): value for name, value in summary.items()}[self._metric]
