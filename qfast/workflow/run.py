"""One workflow from file to report: data, training with checkpoints, scores, metrics, plots, one folder."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from qfast import registry
from qfast.errors import ConfigError, DataError, QfastError
from qfast.files import is_disk_full, locked, sweep
from qfast.training.callbacks import Callback
from qfast.workflow import folder as folders
from qfast.workflow import pretraining
from qfast.workflow.config import dump_yaml, fill_placeholders, load_config
from qfast.workflow.dataset import build_dataset, data_facts, data_source
from qfast.workflow.folder import CONFIG, LAST, RunFolder
from qfast.workflow.portfolio import PortfolioResult, write_portfolio
from qfast.workflow.records import PortAnaRecord, Record
from qfast.workflow.report import write_report
from qfast.workflow.results import evaluate, raw_labels, write_results
from qfast.workflow.saved_model import save_scoring
from qfast.workflow.schema import Workflow, check_workflow

__all__ = ["RunResult", "run"]

log = logging.getLogger("qfast")

MAY_DIFFER = {"task.model.kwargs.seed", "task.model.kwargs.device"}  # between a run and its resumption


@dataclass(frozen=True)
class RunResult:
    """What a finished run leaves.

    Attributes
    ----------
    path : Path
        The run folder; `path / "report.html"` is the page.
    metrics : dict
        Segment -> metric -> value.
    model, dataset
        The fitted estimator and its data.
    portfolio : dict
        Metric of the backtest -> value; empty without one.
    """

    path: Path
    metrics: dict[str, dict[str, float]]
    model: Any
    dataset: Any
    portfolio: dict[str, float] = field(default_factory=dict)

    @property
    def report(self) -> Path:
        return self.path / "report.html"


@dataclass
class _Job:
    """A checked workflow and everything `run` was told besides."""

    workflow: Workflow
    source: str
    data: Any
    device: str | None
    seed: int | None
    seed_drawn: bool = False
    resumed: RunFolder | None = None
    callbacks: Sequence[Callback] = ()
    started: float = field(default_factory=time.time)
    seconds: dict[str, float] = field(default_factory=dict)  # wall time by stage

    @contextlib.contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[stage] = round(time.perf_counter() - began, 3)


def run(
    config_path: str | os.PathLike[str] | None = None,
    data: Any = None,
    sets: Sequence[str] = (),
    device: str | None = None,
    output: str | os.PathLike[str] | None = None,
    seed: int | None = None,
    resume: str | os.PathLike[str] | None = None,
    *,
    callbacks: Sequence[Callback] = (),
) -> RunResult:
    """Train the model of a workflow file and write a run folder.

    Parameters
    ----------
    config_path : path
        A workflow file in the reference's format. Not needed with `resume`.
    data : path, DataFrame or Panel, optional
        Prices to use instead of `qlib_init.provider_uri` (a file, a folder, a Qlib store, a frame).
    sets : sequence of str
        Changes to the file, "task.model.kwargs.n_epochs=5".
    device : str, optional
        "cpu", "cuda", "cuda:1" or "auto", instead of what the file says.
    output : path, optional
        The run folder, which must not exist yet or be empty. Default: runs/<experiment>-<UTC time>.
    seed : int, optional
        Instead of the file's; where neither gives one, one is drawn and written down.
    resume : path, optional
        A run folder to go on with: same workflow, same data; training continues after its last whole
        epoch, in pre-training or after it, and the result is that of an unbroken run.
    callbacks : sequence of Callback
        Handed to `fit`, and to the fit of the base model where the file asks for pre-training.

    Raises
    ------
    ConfigError
        Everything wrong with the file or the arguments, at once; a `resume` that another process writes to.
    DataError
        Data that cannot be read or trained on.
    QfastError
        The disk is full. The folder then says so, and the run can be resumed.

    Examples
    --------
    >>> from qfast.workflow.demo import DEMO, demo_prices
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as base:
    ...     result = run(DEMO, data=demo_prices(20, 560), output=Path(base, "run"),
    ...                  sets=["task.model.kwargs.n_epochs=1"])
    ...     sorted(result.metrics)
    ['test', 'train', 'valid']
    """
    if resume is None:
        return _start(_prepare(config_path, data, sets, device, seed, None, callbacks), output)
    if output is not None and Path(output).resolve() != Path(resume).resolve():
        raise ConfigError(f"--output {str(output)!r} and --resume {str(resume)!r} are different folders; give one.")
    with locked(RunFolder.open(resume).path):
        resumed = RunFolder.open(resume)  # again: it may have changed until the lock was ours
        return _go_on(_prepare(config_path, data, sets, device, seed, resumed, callbacks), resumed)


def _start(job: _Job, output: str | os.PathLike[str] | None) -> RunResult:
    model = _build_model(job)  # wrong arguments leave no folder behind
    workflow = job.workflow
    run_folder = RunFolder.create(
        output, workflow.experiment_name, dump_yaml(workflow.resolved()), config=job.source, seed=job.seed,
        seed_drawn=job.seed_drawn, data=data_source(job.data, workflow),
    )  # fmt: skip
    log.info("run folder: %s", run_folder.path)
    with locked(run_folder.path):
        return _recorded(run_folder, lambda: _execute(job, run_folder, _load(job, model)))


def _go_on(job: _Job, resumed: RunFolder) -> RunResult:
    loaded = _load(job)  # what cannot be resumed is refused before anything in the folder changes
    for file in sweep(resumed.path):
        log.info("removed %s, left by a run that was killed", file)

    def work() -> RunResult:
        resumed.update(status=folders.RUNNING, error=None, resumed=folders.now())
        return _execute(job, resumed, loaded)

    return _recorded(resumed, work)


# ---------------------------------------------------------------- before anything is written
def _prepare(
    config_path: Any,
    data: Any,
    sets: Sequence[str],
    device: str | None,
    seed: int | None,
    resumed: RunFolder | None,
    callbacks: Any,
) -> _Job:
    if config_path is None and resumed is None:
        raise ConfigError("a workflow file is needed (or --resume with a run folder).")
    file = Path(config_path) if resumed is None else resumed / CONFIG
    if resumed is not None and not file.is_file():
        raise ConfigError(f"the run in {str(resumed.path)!r} has no {CONFIG}: {resumed.resume_hint()}.")
    workflow = _checked(file, sets, started=resumed is not None and (resumed / LAST).exists())
    if resumed is not None:
        _require_same(resumed, config_path, sets, workflow)
        pretraining.require_same_block(resumed, load_config(file).values["task"], workflow.task.pretrain)
        data = _data_of(resumed) if data is None else data
    kwargs = workflow.task.model.kwargs
    if device is not None:
        kwargs["device"] = device
    if seed is not None:
        kwargs["seed"] = seed
    _require_seed(kwargs.get("seed"))
    drawn = kwargs.get("seed") is None
    if drawn:  # a run that cannot be repeated helps nobody
        kwargs["seed"] = random.SystemRandom().randrange(2**31)
    if data is None:
        _require_provider(workflow)
    elif isinstance(data, (str, os.PathLike)) and not Path(data).expanduser().exists():
        raise ConfigError(f"--data {str(data)!r} does not exist (looked in {Path.cwd()}).")
    source = str(config_path) if config_path is not None else str(file)
    return _Job(workflow, source, data, device, kwargs["seed"], drawn, resumed, callbacks)


def _checked(file: Path, sets: Sequence[str], started: bool = False) -> Workflow:
    """The checked workflow of a file; a run whose training has `started` needs no weight file any more."""
    workflow = check_workflow(load_config(file, sets).values, str(file))
    pretraining.absolute_model_path(workflow.task.model, file, optional=started)
    return workflow


def _require_seed(seed: Any) -> None:
    if seed is not None and not 0 <= seed < 2**32:  # what NumPy's generator takes
        raise ConfigError(f"the seed (--seed or task.model.kwargs.seed) must be from 0 to {2**32 - 1}, got {seed!r}.")


def _data_of(resumed: RunFolder) -> Any:
    """The data that a run was started with, as `run` takes it."""
    facts = resumed.manifest.get("data", {})
    if facts.get("given") == "memory":
        raise ConfigError(
            f"the run in {str(resumed.path)!r} was started with {facts['source']}, which is not stored. Remedy: give "
            "the same data again (data=... or --data)."
        )
    return facts.get("source") if facts.get("given", "path") == "path" else None


def _require_provider(workflow: Workflow) -> None:
    """Data must come from somewhere before anything else is done."""
    uri = workflow.qlib_init.provider_uri
    own = workflow.task.dataset.kwargs.handler.kwargs.model_extra or {}
    if any(own.get(name) is not None for name in ("data", "provider_uri", "source")):
        return
    if uri is None:
        raise ConfigError(
            "qlib_init.provider_uri is missing, so there is no data. Remedy: --data PATH with a CSV or Parquet file, a "
            "folder of CSV files, or a Qlib data folder."
        )
    for place in uri.values() if isinstance(uri, Mapping) else [uri]:
        if not Path(place).expanduser().is_dir():
            raise ConfigError(
                f"qlib_init.provider_uri: the Qlib data folder {place!r} does not exist. Remedy: --data PATH with a "
                "CSV or Parquet file, a folder of CSV files, or a Qlib data folder."
            )


def _require_same(resumed: RunFolder, config_path: Any, sets: Sequence[str], workflow: Workflow) -> None:
    """A workflow file given beside `--resume` must be the one that the run was started with."""
    if config_path is None:
        return
    given = _checked(Path(config_path), sets, started=True).resolved()
    different = sorted(set(_differences(given, workflow.resolved(), "")) - MAY_DIFFER)
    if different:
        raise ConfigError(
            f"{str(config_path)!r} differs from the workflow of the run {str(resumed.path)!r} at {different[:5]}. "
            "Remedy: leave the file out (the run keeps its own config.yaml), or start a new run."
        )


def _differences(one: Any, other: Any, path: str) -> Iterator[str]:
    if isinstance(one, dict) and isinstance(other, dict):
        for key in one.keys() | other.keys():
            yield from _differences(one.get(key), other.get(key), f"{path}.{key}" if path else str(key))
    elif one != other:
        yield path


# ---------------------------------------------------------------- the run itself
def _recorded(run_folder: RunFolder, work: Callable[[], RunResult]) -> RunResult:
    """The result of `work`; the manifest's status follows what happens to it, up to its last word."""
    try:
        result = work()
        run_folder.finish(folders.FINISHED)
        return result
    except KeyboardInterrupt:
        _finish_quietly(run_folder, folders.INTERRUPTED, "interrupted")
        log.warning("interrupted; %s", run_folder.resume_hint())
        raise
    except BaseException as error:
        _finish_quietly(run_folder, folders.FAILED, f"{type(error).__name__}: {error}")
        if is_disk_full(error):
            raise QfastError(
                f"no space left on the disk while writing to {str(run_folder.path)!r}; the files there are whole. "
                f"Remedy: make room, then {run_folder.resume_hint().removeprefix('go on with: ')}."
            ) from error
        raise


def _finish_quietly(run_folder: RunFolder, status: str, error: str) -> None:
    """Record a bad end; what went wrong with that must not hide what went wrong first."""
    try:
        run_folder.finish(status, error)
    except Exception:
        log.exception("the manifest of %s could not be updated", run_folder.path)


@dataclass
class _Loaded:
    """The objects of a run, and what is known of its data."""

    model: Any
    dataset: Any
    facts: dict[str, Any]
    labels: dict[str, pd.Series]


def _load(job: _Job, model: Any = None) -> _Loaded:
    model = _build_model(job) if model is None else model
    with job.timed("data"):
        dataset = build_dataset(job.workflow, job.data)
        facts = data_facts(dataset.handler, job.data, job.workflow)
    if job.resumed is not None:
        _require_same_data(job.resumed, facts)
        if (job.resumed / LAST).exists():
            model.load_checkpoint(job.resumed / LAST)
        else:
            pretraining.check_resumable(job.resumed)
    return _Loaded(model, dataset, facts, raw_labels(dataset))


def _execute(job: _Job, run_folder: RunFolder, loaded: _Loaded) -> RunResult:
    workflow, model, dataset = job.workflow, loaded.model, loaded.dataset
    notices = _notices(workflow)
    records = _build_records(workflow, model, dataset)
    for record in records:
        if isinstance(record, PortAnaRecord):
            record.plan.check_prices(dataset.handler, workflow.qlib_init.region)
    run_folder.write_text(CONFIG, dump_yaml(workflow.resolved()))
    run_folder.update(
        config=job.source, seed=job.seed, seed_drawn=job.seed_drawn, device=str(model.device), tiers=_tiers(),
        notes=notices, data=loaded.facts, **folders.environment(),
    )  # fmt: skip
    save_scoring(run_folder, workflow, model, dataset)
    with job.timed("training"):
        if not (run_folder / LAST).exists():
            pretraining.pretrain(run_folder, workflow, model, dataset, job.resumed is not None, job.callbacks)
        _fit(job, run_folder, model, dataset)
    with job.timed("scores"):
        results = evaluate(model, dataset, loaded.labels)
        metrics = write_results(run_folder, records, results)
    with job.timed("portfolio"):
        portfolio = _trade(run_folder, workflow, records, results, dataset)
    run_folder.update(seconds=job.seconds)
    write_report(run_folder, workflow, model, dataset, results, metrics, job.started, portfolio)
    traded = {} if portfolio is None else portfolio.backtest.metrics()
    return RunResult(run_folder.path, metrics, model, dataset, traded)


def _trade(
    run_folder: RunFolder, workflow: Workflow, records: Sequence[Record], results: Mapping[str, Any], dataset: Any
) -> PortfolioResult | None:
    """The backtest that the file asks for, on the scores of the segment test, which the reference's is on too."""
    plan = next((record.plan for record in records if isinstance(record, PortAnaRecord)), None)
    if plan is None:
        return None
    found: PortfolioResult | None = None
    try:
        if "test" not in results or not len(results["test"].score):
            raise DataError("the segment test has no scores to trade on.")
        found = plan.run(results["test"].score, dataset.handler, workflow.qlib_init.region)
    except Exception as error:  # what is trained is not thrown away for it, whatever it is
        if not isinstance(error, QfastError):
            log.exception("the portfolio backtest broke off")
        named = str(error) if isinstance(error, QfastError) else f"{type(error).__name__}: {error}"
        notes = [f"PortAnaRecord, the portfolio backtest, was left out: {named}"]
    if found is not None:
        write_portfolio(run_folder, found)
        notes = [f"portfolio backtest: {note}." for note in found.notes]
    for note in notes:
        log.warning(note)
    run_folder.update(notes=[*run_folder.manifest["notes"], *notes])
    return found


def _build_model(job: _Job) -> Any:
    spec = pretraining.without_lost_file(job.workflow.task.model.given())
    return registry.MODELS.build(spec, path="task.model")


def _notices(workflow: Workflow) -> list[str]:
    """What the file asks for and this version does not do: logged now, kept in manifest and report."""
    found = []
    for spec in workflow.task.record:
        factory, _ = registry.RECORDS.resolve(spec.model_dump(by_alias=True, include={"class_", "module_path"}))
        notice = getattr(factory, "notice", "")
        if notice:
            found.append(str(notice))
    for notice in found:
        log.warning(notice)
    return found


def _build_records(workflow: Workflow, model: Any, dataset: Any) -> list[Record]:
    # <PRED> belongs to the backtest, which fills it in itself.
    objects = {"<MODEL>": model, "<DATASET>": dataset, "<PRED>": "<PRED>"}
    task = workflow.resolved()["task"]
    built = []
    for position, spec in enumerate(workflow.task.record):
        filled = fill_placeholders(spec.given(), objects, task)
        built.append(registry.RECORDS.build(filled, path=f"task.record.{position}"))
    return built


def _tiers() -> dict[str, Any]:
    from qfast import _backend

    return dict(_backend.status())


def _require_same_data(resumed: RunFolder, facts: Mapping[str, Any]) -> None:
    before = resumed.manifest.get("data", {}).get("hash")
    if before is not None and before != facts["hash"]:
        raise DataError(
            f"the data {facts['source']!r} is not what the run was started with (hash {facts['hash']}, then {before}). "
            "Remedy: --data with the same data, or a new run."
        )


def _fit(job: _Job, run_folder: RunFolder, model: Any, dataset: Any) -> None:
    reweighter = None
    if job.workflow.task.reweighter is not None:
        spec = job.workflow.task.reweighter.given()
        reweighter = registry.REWEIGHTERS.build(spec, path="task.reweighter")
    resume = job.resumed is not None and (run_folder / LAST).exists()
    if job.resumed is not None and not resume and job.workflow.task.pretrain is False:
        log.warning("%s has no checkpoint; training starts from the beginning", run_folder.path)
    keep = pretraining.KeepHistory(run_folder.path)
    model.fit(
        dataset,
        reweighter=reweighter,
        callbacks=[*job.callbacks, keep, *([] if resume else [pretraining.NoteTaken(run_folder)])],
        checkpoint_dir=run_folder.path,
        resume=resume,
    )
    keep.keep_result(model)
