"""`qfast.study`: seeds, grids, searches and rolling windows of one workflow as one job."""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from qfast.data.arrow_tables import without_arrow
from qfast.errors import ConfigError, QfastError, shown
from qfast.machine import usable_cores
from qfast.read_options import ReadOptions, ReadSettings
from qfast.studies.axes import AxisArguments
from qfast.studies.checks import CheckedStudy, EngineArguments, check_engine, check_study
from qfast.studies.combine import METHODS
from qfast.studies.engines import Engine, InlineEngine
from qfast.studies.finish import finish_study
from qfast.studies.folder import StudyFolder
from qfast.studies.plan import Plan
from qfast.studies.problems import Problems
from qfast.studies.report import write_study_report
from qfast.studies.runner import GridPoints, PointSource, Runner
from qfast.workflow.dataset import DataInput, data_source
from qfast.workflow.resumption import different_keys
from qfast.workflow.user_code import MANIFEST_KEY, AllowCode, allowed_code, require_permission
from qfast.workflow.validation import check_workflow

__all__ = ["StudyResult", "study"]

log = logging.getLogger("qfast")


@dataclass(frozen=True)
class StudyResult:
    """The result of a study.

    Attributes
    ----------
    path : Path
        The study folder. The report is `path / "report.html"`.
    table : DataFrame
        One row for each run: its values, seed, window, status, and metrics such as "test.rank_ic".
    summary : DataFrame
        Mean and standard deviation over seeds, one row for each point.
    failed : int
        Number of runs that failed; their rows contain the reason.
    best : dict
        Values of the best trial of a search. Empty without a search.
    """

    path: Path
    table: pd.DataFrame
    summary: pd.DataFrame
    failed: int
    best: Mapping[str, Any] = field(default_factory=dict)

    @property
    def report(self) -> Path:
        """Path of the report page."""
        return self.path / "report.html"


def study(
    config_path: str | os.PathLike[str] | None = None,
    data: DataInput | None = None,
    sets: Sequence[str] = (),
    device: str | None = None,
    output: str | os.PathLike[str] | None = None,
    *,
    seeds: int | str | Sequence[int] | None = None,
    grid: Mapping[str, Sequence[Any]] | Sequence[str] = (),
    search: Mapping[str, Any] | str | os.PathLike[str] | None = None,
    trials: int | None = None,
    rolling: int | None = None,
    expanding: bool = False,
    warm_start: bool = False,
    label_days: int | None = None,
    ensemble: str | None = None,
    jobs: int | None = None,
    threads: int = 1,
    on: str = "local",
    gpus: float | None = None,
    resume: str | os.PathLike[str] | None = None,
    allow_code: AllowCode = None,
    read_options: ReadSettings = None,
    quiet: bool = False,
) -> StudyResult:
    """Run one workflow many times and compare the runs. The axes multiply.

    The runs are ordinary run folders, equal to those of `qfast.run`. They share data that is prepared once.

    Parameters
    ----------
    config_path : path
        A workflow file in Qlib's format. Optional with `resume`.
    data, sets, device, allow_code, read_options
        As in `qfast.run`.
    output : path, optional
        The study folder, which must be empty or absent. Default: studies/<experiment>-<UTC time>.
    seeds : int, str or sequence of int, optional
        A number of seeds, counted from the seed of the workflow or 0, or a list of seeds. Default: one seed.
    grid : mapping or sequence of str
        Key of the workflow -> values, or texts "KEY=V1,V2".
    search : mapping or path, optional
        A search with Optuna, or its YAML file: space, objective, sampler, pruner, storage.
    trials : int
        Number of trials of the search, for each point of the grid.
    rolling : int, optional
        Days of a test segment of a rolling study.
    expanding : bool
        The training segment of a rolling study keeps its first day. False: it slides.
    warm_start : bool
        Each rolling window begins with the weights of the previous one.
    label_days : int, optional
        Later days that a label reads. Default: known from the expression of the label. Required for given labels.
    ensemble : {"rank", "zscore"}
        Ensemble scores are means of daily ranks (default) or of daily z-scores.
    jobs : int, optional
        Number of processes. Default: cores / threads, or 1 on a GPU.
    threads : int
        Threads of each process. The results equal those of `qfast run` with the same OMP_NUM_THREADS.
    on : str
        "local"; "ray" or "ray://HOST:PORT" for a Ray cluster; "inline" uses this process only.
    gpus : float, optional
        GPUs of each run on Ray; fractions share a GPU. Default: 1 if the device is "cuda", otherwise 0.
    resume : path, optional
        A study folder to continue. Finished runs remain, and all others continue from their checkpoints.
    quiet : bool
        Do not show the progress bar.

    Returns
    -------
    StudyResult

    Raises
    ------
    ConfigError
        The arguments or the workflow are wrong. The message lists every problem, and nothing has been run.
    DataError
        The data cannot be read.

    Examples
    --------
    >>> import tempfile
    >>> from qfast.workflow.demo import DEMO, demo_prices
    >>> with tempfile.TemporaryDirectory() as base:
    ...     result = study(DEMO, demo_prices(20, 560), ["task.model.kwargs.n_epochs=1"], output=f"{base}/study",
    ...                    seeds=2, on="inline", quiet=True)
    ...     result.table[["seed", "status"]].to_dict("list")
    {'seed': [0, 1], 'status': ['finished', 'finished']}
    """
    options, data = ReadOptions.of(read_options), without_arrow(data)  # other processes receive the data
    problems = Problems()
    engine_arguments = EngineArguments(on, jobs, threads, gpus)
    check_engine(engine_arguments, problems)
    if ensemble not in (None, *METHODS):
        problems.add("--ensemble", f"must be {' or '.join(METHODS)}, got {ensemble!r}")
    axes = AxisArguments(seeds, grid, search, trials, rolling, expanding, warm_start, label_days)
    with allowed_code(allow_code) as code:
        checked = None
        if config_path is not None:
            checked = check_study(Path(config_path), data, sets, device, axes, problems)
        elif resume is None:
            problems.add("WORKFLOW", "no workflow file. Remedy: pass one, or --resume with a study folder")
        problems.check()
        if resume is not None:
            folder = _reopen(resume, output, checked, axes, code)
            data, options = _stored_data(folder, data, options)
        else:
            assert checked is not None
            folder = _begin(output, str(config_path), checked, data, options, device, ensemble or "rank", code)
        paths = [] if code is None else [str(path) for path in code.paths]
        chosen = device or folder.manifest.get("device")
        task_options = {"device": chosen, "allow_code": tuple(paths)}
        with _discarded_without_runs(folder, new=resume is None), folder.working() as prepared:
            plan = Plan(folder, prepared, data, options)
            points = _points(folder, plan)
            with _engine(engine_arguments, folder, chosen) as engine:
                runner = Runner(folder, plan, points, engine, task_options, data, options, quiet)
                results = runner.run()
            best = points.results()
            finished = finish_study(folder, plan, results, best)
            write_study_report(folder, results, finished, best)
        return StudyResult(folder.path, results.table(), finished.summary, results.failed, best[0] if best else {})


# ---------------------------------------------------------------- the folder
@contextlib.contextmanager
def _discarded_without_runs(folder: StudyFolder, new: bool) -> Iterator[None]:
    """Remove the folder of a new study whose data or windows are refused before the first run."""
    try:
        yield
    except QfastError:
        if new and not folder.run(0).parent.exists():
            shutil.rmtree(folder.path, ignore_errors=True)
        raise


def _begin(
    output: str | os.PathLike[str] | None,
    source: str,
    checked: CheckedStudy,
    data: DataInput | None,
    options: ReadOptions,
    device: str | None,
    ensemble: str,
    code: Any,
) -> StudyFolder:
    workflow = check_workflow(checked.values)
    folder = StudyFolder.begin(
        output,
        checked.values,
        config=source,
        axes=checked.axes.facts(),
        aliases=[[list(path) for path in group] for group in checked.aliases],
        data=data_source(data, workflow, options),
        device=device,
        ensemble=ensemble,
        **({} if code is None else {MANIFEST_KEY: code.facts()}),
    )
    log.info("study folder: %s", folder.path)
    return folder


def _reopen(
    resume: str | os.PathLike[str],
    output: str | os.PathLike[str] | None,
    checked: CheckedStudy | None,
    axes: AxisArguments,
    code: Any,
) -> StudyFolder:
    """Open the study to continue, and refuse another study. More trials are accepted."""
    if output is not None and Path(output).resolve() != Path(resume).resolve():
        raise ConfigError(
            f"--output {str(output)!r} and --resume {str(resume)!r} are different folders. Pass only one."
        )
    folder = StudyFolder.reopen(resume)
    require_permission(folder.manifest, code, resume)
    stored, trials = folder.axes, axes.trials
    if checked is None and axes.options():
        raise ConfigError(
            f"--resume {str(resume)!r} contains the axes of the study, so {', '.join(axes.options())} must be omitted, "
            "or passed together with the workflow file of the study."
        )
    if checked is not None:
        _require_same_study(folder, checked)
    if trials is not None:
        if stored.search is None or trials < stored.trials:
            raise ConfigError(
                f"--trials {trials}: the study in {str(resume)!r} has {stored.trials} trials; only more can be added."
            )
        folder.update(axes={**stored.facts(), "trials": trials})
    return folder


def _require_same_study(folder: StudyFolder, checked: CheckedStudy) -> None:
    """Refuse a folder of another study, whose workflow or axes differ."""
    different = different_keys(checked.values, folder.workflow())
    new, stored = checked.axes.facts(), folder.axes.facts()
    different += [f"--{name}" for name in new if name != "trials" and new[name] != stored[name]]
    if different:
        shown_axes = {name.strip("-"): stored.get(name.strip("-")) for name in different if name.startswith("--")}
        stored_text = f" (the folder has {shown(shown_axes)})" if shown_axes else ""
        raise ConfigError(
            f"--resume {str(folder.path)!r} is the folder of a different study: {different[:5]} differ{stored_text}. "
            f"Remedy: qfast study --resume {shlex.quote(str(folder.path))} alone, or --output with another folder."
        )


def _stored_data(
    folder: StudyFolder, data: DataInput | None, options: ReadOptions
) -> tuple[DataInput | None, ReadOptions]:
    """The data of a resumed study, unless the caller passes it again."""
    facts = folder.manifest["data"]
    options = options.over(ReadOptions.of(facts.get("read_options")))
    if data is not None:
        return data, options
    if facts["given"] == "memory":
        raise ConfigError(
            f"the study in {str(folder.path)!r} was started with {facts['source']}, which is not stored. Remedy: pass "
            "the same data again (data=... or --data)."
        )
    return (facts["source"] if facts["given"] == "path" else None), options


# ---------------------------------------------------------------- parts
def _points(folder: StudyFolder, plan: Plan) -> PointSource:
    """The points of the study: a grid, or a search."""
    if plan.axes.search is None:
        return GridPoints(plan)
    from qfast.studies.search import SearchPoints

    return SearchPoints(plan, folder.path)


@contextlib.contextmanager
def _engine(arguments: EngineArguments, folder: StudyFolder, device: str | None) -> Iterator[Engine]:
    """The engine, which is closed at the end of the block."""
    engine: Engine
    kind, _, address = arguments.on.partition("://")
    if kind == "inline":
        engine = InlineEngine()
    elif kind == "ray":
        from qfast.studies.ray_engine import RayEngine

        needed = device or str(folder.workflow()["task"]["model"].get("kwargs", {}).get("device", ""))
        gpus = arguments.gpus if arguments.gpus is not None else float(needed.startswith("cuda"))
        engine = RayEngine(address, arguments.jobs, arguments.threads, gpus)
    else:
        from qfast.studies.local import LocalEngine

        jobs = arguments.jobs or _default_jobs(arguments.threads, device, folder)
        engine = LocalEngine(jobs, arguments.threads, folder.path / "logs")
    try:
        yield engine
    finally:
        engine.close()


def _default_jobs(threads: int, device: str | None, folder: StudyFolder) -> int:
    """Cores divided by threads; one on a GPU, which a second process would have to share."""
    from qfast.device import choose_device

    kwargs = folder.workflow()["task"]["model"].get("kwargs", {})
    chosen = choose_device(device or kwargs.get("device", "auto"), kwargs.get("GPU", 0))
    if chosen.type != "cpu":
        return 1
    return max(1, usable_cores() // threads)
