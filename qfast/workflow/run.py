"""One workflow from file to report: data, training with checkpoints, scores, metrics, plots, one folder."""

from __future__ import annotations

import logging
import os
import random
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from qfast import registry
from qfast.callbacks import Callback
from qfast.errors import ConfigError, DataError, QfastError
from qfast.metrics import ic_summary
from qfast.workflow import folder as folders
from qfast.workflow.config import dump_yaml, fill_placeholders, load_config
from qfast.workflow.folder import RunFolder
from qfast.workflow.records import Record
from qfast.workflow.report import (
    Report,
    SegmentResult,
    cumulative_plot,
    loss_plot,
    quantile_plot,
    render_html,
)
from qfast.workflow.schema import Workflow, check_workflow
from qfast.workflow.scoring import BEST, build_dataset, data_facts, save_scoring

__all__ = ["RunResult", "run"]

log = logging.getLogger("qfast")

LAST = "last.safetensors"
CONFIG = "config.yaml"
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
    """

    path: Path
    metrics: dict[str, dict[str, float]]
    model: Any
    dataset: Any

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
        epoch, and the result is that of an unbroken run.
    callbacks : sequence of Callback
        Handed to `fit`.

    Raises
    ------
    ConfigError
        Everything wrong with the file or the arguments, at once.
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
    job = _prepare(config_path, data, sets, device, seed, resume, callbacks)
    if job.resumed is not None:
        if output is not None and Path(output).resolve() != job.resumed.path.resolve():
            raise ConfigError(f"--output {str(output)!r} and --resume {str(resume)!r} are different folders; give one.")
        loaded = _load(job)  # what cannot be resumed is refused before anything in the folder changes
        job.resumed.update(status=folders.RUNNING, error=None, resumed=folders.now())
        with _recorded(job.resumed):
            return _execute(job, job.resumed, loaded)
    model = _build_model(job)  # wrong arguments leave no folder behind
    run_folder = RunFolder.create(output, job.workflow.experiment_name)
    log.info("run folder: %s", run_folder.path)
    with _recorded(run_folder):
        run_folder.write_text(CONFIG, dump_yaml(job.workflow.resolved()))
        return _execute(job, run_folder, _load(job, model))


# ---------------------------------------------------------------- before anything is written
def _prepare(
    config_path: Any,
    data: Any,
    sets: Sequence[str],
    device: str | None,
    seed: int | None,
    resume: Any,
    callbacks: Any,
) -> _Job:
    resumed = None if resume is None else RunFolder.open(resume)
    if config_path is None and resumed is None:
        raise ConfigError("a workflow file is needed (or --resume with a run folder).")
    file = Path(config_path) if resumed is None else resumed / CONFIG
    loaded = load_config(file, sets)
    workflow = check_workflow(loaded.values, str(file))
    if resumed is not None:
        _require_same(resumed, config_path, sets, workflow)
        if data is None:
            data = resumed.manifest.get("data", {}).get("source")
    kwargs = workflow.task.model.kwargs
    if device is not None:
        kwargs["device"] = device
    if seed is not None:
        kwargs["seed"] = seed
    drawn = kwargs.get("seed") is None
    if drawn:  # a run that cannot be repeated helps nobody
        kwargs["seed"] = random.SystemRandom().randrange(2**31)
    if data is None:
        _require_provider(workflow)
    elif isinstance(data, (str, os.PathLike)) and not Path(data).expanduser().exists():
        raise ConfigError(f"--data {str(data)!r} does not exist (looked in {Path.cwd()}).")
    source = str(config_path) if config_path is not None else str(file)
    return _Job(workflow, source, data, device, kwargs["seed"], drawn, resumed, callbacks)


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
                "CSV "
                "or Parquet file, a folder of CSV files, or a Qlib data folder."
            )


def _require_same(resumed: RunFolder, config_path: Any, sets: Sequence[str], workflow: Workflow) -> None:
    """A workflow file given beside `--resume` must be the one that the run was started with."""
    if config_path is None:
        return
    given = check_workflow(load_config(config_path, sets).values, str(config_path)).resolved()
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
@contextmanager
def _recorded(run_folder: RunFolder) -> Iterator[None]:
    """The manifest's status follows what happens inside."""
    try:
        yield
    except KeyboardInterrupt:
        _finish_quietly(run_folder, folders.INTERRUPTED, "interrupted")
        log.warning("interrupted; go on with: qfast run --resume %s", shlex.quote(str(run_folder.path)))
        raise
    except BaseException as error:
        _finish_quietly(run_folder, folders.FAILED, f"{type(error).__name__}: {error}")
        if folders.is_disk_full(error):
            raise QfastError(
                f"no space left on the disk while writing to {str(run_folder.path)!r}; the files there are whole. "
                f"Remedy: make room, then qfast run --resume {shlex.quote(str(run_folder.path))}."
            ) from error
        raise
    run_folder.finish(folders.FINISHED)


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
    dataset = build_dataset(job.workflow, job.data)
    facts = data_facts(dataset.handler, job.data, job.workflow)
    if job.resumed is not None:
        _require_same_data(job.resumed, facts)
        if (job.resumed / LAST).exists():
            model.load_checkpoint(job.resumed / LAST)
    return _Loaded(model, dataset, facts, _raw_labels(dataset))


def _execute(job: _Job, run_folder: RunFolder, loaded: _Loaded) -> RunResult:
    workflow, model, dataset = job.workflow, loaded.model, loaded.dataset
    notices = _notices(workflow)
    records = _build_records(workflow, model, dataset)
    run_folder.write_text(CONFIG, dump_yaml(workflow.resolved()))
    run_folder.update(
        config=job.source, seed=job.seed, seed_drawn=job.seed_drawn, device=str(model.device), tiers=_tiers(),
        notes=notices, data=loaded.facts, **folders.environment(),
    )  # fmt: skip
    save_scoring(run_folder, workflow, model, dataset)
    _fit(job, run_folder, model, dataset)
    results = _evaluate(model, dataset, loaded.labels)
    metrics = _write_results(run_folder, records, results)
    _write_report(job, run_folder, model, dataset, results, metrics)
    return RunResult(run_folder.path, metrics, model, dataset)


def _build_model(job: _Job) -> Any:
    spec = job.workflow.task.model
    return registry.MODELS.build(spec.model_dump(by_alias=True, exclude_unset=True), path="task.model")


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
        filled = fill_placeholders(spec.model_dump(by_alias=True, exclude_unset=True), objects, task)
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


class _KeepHistory(Callback):
    """After every epoch: history.csv, and best.safetensors where the epoch is the best so far."""

    def __init__(self, run_folder: RunFolder) -> None:
        self.folder = run_folder

    def on_epoch_end(self, estimator: Any) -> None:
        self.folder.write_text("history.csv", estimator.history_.to_csv())
        if estimator.best_epoch_ in (None, estimator.epoch_):
            estimator.save_weights(self.folder / BEST)


def _fit(job: _Job, run_folder: RunFolder, model: Any, dataset: Any) -> None:
    reweighter = None
    if job.workflow.task.reweighter is not None:
        spec = job.workflow.task.reweighter.model_dump(by_alias=True, exclude_unset=True)
        reweighter = registry.REWEIGHTERS.build(spec, path="task.reweighter")
    resume = job.resumed is not None and (run_folder / LAST).exists()
    if job.resumed is not None and not resume:
        log.warning("%s has no checkpoint; training starts from the beginning", run_folder.path)
    model.fit(
        dataset,
        reweighter=reweighter,
        callbacks=[*job.callbacks, _KeepHistory(run_folder)],
        checkpoint_dir=run_folder.path,
        resume=resume,
    )
    run_folder.write_text("history.csv", model.history_.to_csv())
    model.save_weights(run_folder / BEST)


# ---------------------------------------------------------------- results
def _raw_labels(dataset: Any) -> dict[str, pd.Series]:
    """Raw labels of each segment; fetched before training, so that what is wrong with them costs no time."""
    labels = {}
    for name, (start, end) in dataset.segments.items():
        labels[name] = dataset.handler.fetch(slice(start, end), col_set="label", data_key="raw").iloc[:, 0]
        if labels[name].empty:
            log.warning("segment %r (%s to %s) holds no rows of the data; it will have no metrics", name, start, end)
    return labels


def _evaluate(model: Any, dataset: Any, labels: Mapping[str, pd.Series]) -> dict[str, SegmentResult]:
    """Scores and raw labels of every segment; "newest": dates after the last label that no segment holds."""
    results = {name: SegmentResult.of(name, model.predict(dataset, name), label) for name, label in labels.items()}
    start = _first_unlabelled(dataset, results)
    if start is not None:
        score = model.predict(dataset, slice(start, None))
        results["newest"] = SegmentResult.of("newest", score, pd.Series(float("nan"), score.index))
    return results


def _first_unlabelled(dataset: Any, results: Mapping[str, SegmentResult]) -> pd.Timestamp | None:
    """The first date that neither has a label nor lies in or before a segment."""
    label = dataset.handler.fetch(slice(None), col_set="label", data_key="raw").iloc[:, 0]
    dates = label.index.get_level_values("datetime")
    ends = [dates[label.notna().to_numpy()].max()]
    ends += [r.score.index.get_level_values("datetime").max() for r in results.values() if len(r.score)]
    later = dates[dates > max(end for end in ends if not pd.isna(end))] if any(not pd.isna(e) for e in ends) else dates
    return later.min() if len(later) else None


def _write_results(
    run_folder: RunFolder, records: Sequence[Record], results: Mapping[str, SegmentResult]
) -> dict[str, dict[str, float]]:
    kept = [r for name, r in results.items() if name != "train"] or list(results.values())
    scores = [pd.DataFrame({"score": r.score, "segment": r.name}).sort_index() for r in kept]
    run_folder.write_frame("pred", _without_repeats(pd.concat(scores)))
    labels = [r.label.sort_index().to_frame("label") for r in kept if r.name != "newest"]
    run_folder.write_frame("label", _without_repeats(pd.concat(labels)))
    metrics: dict[str, dict[str, float]] = {}
    daily = {}
    for name, result in results.items():
        if name == "newest":
            continue
        found = ic_summary(result.ic, result.rank_ic)
        series = {"ic": result.ic, "rank_ic": result.rank_ic}
        for record in records:
            found |= record.metrics(result)
            series |= record.series(result)
        metrics[name] = {**found, "days": float(result.ic.notna().sum()), "samples": float(len(result.score))}
        daily[name] = pd.DataFrame(series)
    run_folder.write_text("daily.csv", pd.concat(daily, names=["segment", "datetime"]).to_csv(float_format="%.9g"))
    run_folder.write_json("metrics.json", metrics)
    return metrics


def _without_repeats(frame: pd.DataFrame) -> pd.DataFrame:
    """Segments may overlap; the later one's row is kept."""
    return frame[~frame.index.duplicated(keep="last")]


def _write_report(
    job: _Job,
    run_folder: RunFolder,
    model: Any,
    dataset: Any,
    results: Mapping[str, SegmentResult],
    metrics: Mapping[str, Any],
) -> None:
    shown = [r for name, r in results.items() if name != "newest"]
    plots = {
        "loss": loss_plot(model.history_, model.best_epoch_),
        "cumulative_ic": cumulative_plot(shown),
        "score_groups": quantile_plot(shown),
    }
    (run_folder / "plots").mkdir(exist_ok=True)
    for name, png in plots.items():
        folders.atomic_write(run_folder / "plots" / f"{name}.png", partial(_write_bytes, content=png))
    newest = max(results.values(), key=lambda r: _last_date(r.score)).score
    date = _last_date(newest)
    page = Report(
        title=f"{job.workflow.experiment_name}: {type(model).__name__}",
        subtitle=_subtitle(run_folder),
        intro=_intro(dataset),
        metrics=metrics,
        facts=_facts(job, run_folder, model),
        plots=plots,
        config=dump_yaml(job.workflow.resolved()),
        notes=run_folder.manifest["notes"],
        newest=newest.xs(date, level="datetime") if len(newest) else None,
        newest_date=date.date() if date == date.normalize() else date,
    )
    run_folder.write_text("report.html", render_html(page))


def _write_bytes(file: Path, content: bytes) -> None:
    file.write_bytes(content)


def _last_date(score: pd.Series) -> pd.Timestamp:
    dates = score.index.get_level_values("datetime")
    return dates.max() if len(dates) else pd.Timestamp.min


def _intro(dataset: Any) -> str:
    label = " and ".join(str(name) for name in dataset.handler.get_cols("label"))
    chosen = " and chosen on valid" if "valid" in dataset.segments else ""
    return (
        "On every date each instrument gets a score; a higher score predicts a higher label. The label is "
        f"{label}. The weights were learnt on the segment train{chosen}."
    )


def _subtitle(run_folder: RunFolder) -> str:
    facts = run_folder.manifest["data"]
    return (
        f"{facts['instruments']} instruments, {facts['first']} to {facts['last']}, run {run_folder.path.name}, "
        f"qfast {run_folder.manifest['versions']['qfast']}"
    )


def _facts(job: _Job, run_folder: RunFolder, model: Any) -> dict[str, Any]:
    manifest = run_folder.manifest
    parameters = sum(p.numel() for p in model.network.parameters())
    history = model.history_
    segments = job.workflow.task.dataset.kwargs.segments
    return {
        "Model": f"{type(model).__module__}.{type(model).__name__}, {parameters:,} parameters",
        "Epochs": f"{len(history)}, best {model.best_epoch_}, {history['seconds'].sum():.1f} s of training",
        "Segments": "; ".join(f"{name} {_span(*bounds)}" for name, bounds in segments.items()),
        "Data": f"{manifest['data']['source']} (hash {manifest['data']['hash']})",
        "Device": manifest["device"],
        "Operators": _tier_text(manifest["tiers"], manifest["device"]),
        "Seed": f"{job.seed}{' (drawn for this run)' if job.seed_drawn else ''}",
        "Versions": ", ".join(f"{name} {version}" for name, version in manifest["versions"].items()),
        "Platform": manifest["platform"],
        "Command": shlex.join(manifest["command"]),
        "Wall time": f"{time.time() - job.started:.1f} s",
    }


def _span(start: str | None, end: str | None) -> str:
    return f"{start or 'the first date'} to {end or 'the newest date'}"


def _tier_text(tiers: Mapping[str, Any], device: str) -> str:
    state = tiers.get("cuda" if device.startswith("cuda") else "cpu", {})
    return f"{state.get('tier', 'torch')} tier ({state.get('reason', 'unknown')})"
