"""Train the model of a workflow file: data, training with checkpoints, scores, metrics, plots, one run folder."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from qfast import registry
from qfast.data.protocols import HandlerDataset
from qfast.data.source_notes import collected_notes
from qfast.errors import ConfigError, DataError, QfastError
from qfast.files import locked
from qfast.read_options import ReadOptions, ReadSettings
from qfast.training.callbacks import Callback
from qfast.workflow import folder as folders
from qfast.workflow import pretraining, resumption, starting
from qfast.workflow.check.meaning import meaningless
from qfast.workflow.config import dump_yaml
from qfast.workflow.dataset import DataInput, build_dataset, data_facts, data_source
from qfast.workflow.folder import CONFIG, LAST, RunFolder, recorded
from qfast.workflow.job import Job, prepare
from qfast.workflow.portfolio import PortfolioResult, write_portfolio
from qfast.workflow.prepared import PreparedData
from qfast.workflow.records import PortAnaRecord, Record, build_records
from qfast.workflow.report import write_report
from qfast.workflow.results import SegmentResult, evaluate, raw_labels, write_results
from qfast.workflow.saved_model import save_scoring
from qfast.workflow.torchrun import (
    FollowedFolder,
    data_of_machine,
    folder_to_continue,
    joined,
    require_same_run,
    same_result,
    share_run,
)
from qfast.workflow.user_code import MANIFEST_KEY, AllowCode, AllowedCode, allowed_code, require_permission

if TYPE_CHECKING:
    from qfast.training.estimator import Estimator
    from qfast.training.ranks import Ranks

__all__ = ["RunResult", "run"]

log = logging.getLogger("qfast")


@dataclass(frozen=True)
class RunResult:
    """The result of a finished run.

    Attributes
    ----------
    path : Path
        The run folder. The report is `path / "report.html"`.
    metrics : dict
        Segment -> metric -> value.
    model : Estimator
        The fitted estimator.
    dataset : DatasetH or TSDatasetH
        The dataset that it was trained on.
    portfolio : dict
        Metric of the portfolio backtest -> value. Empty if the workflow has no backtest.
    """

    path: Path
    metrics: dict[str, dict[str, float]]
    model: Estimator
    dataset: HandlerDataset
    portfolio: dict[str, float] = field(default_factory=dict)

    @property
    def report(self) -> Path:
        """Path of the report page, a single HTML file."""
        return self.path / "report.html"


def run(
    config_path: str | os.PathLike[str] | None = None,
    data: DataInput | None = None,
    sets: Sequence[str] = (),
    device: str | None = None,
    output: str | os.PathLike[str] | None = None,
    seed: int | None = None,
    resume: str | os.PathLike[str] | None = None,
    *,
    callbacks: Sequence[Callback] = (),
    allow_code: AllowCode = None,
    read_options: ReadSettings = None,
    prepared: PreparedData | None = None,
    init_from: str | os.PathLike[str] | None = None,
    progress: bool | str | None = None,
) -> RunResult:
    """Train the model of a workflow file and write a run folder.

    Under torchrun, all processes call it with the same arguments and share the work (docs/distributed.md).

    Parameters
    ----------
    config_path : path
        A workflow file in Qlib's format. Optional with `resume`.
    data : path, DataFrame, Arrow table or Panel, optional
        Prices that replace `qlib_init.provider_uri`: a CSV or Parquet file, a folder of such files, a Qlib data folder,
        a frame of pandas or Polars, an Arrow table, or a panel (docs/data.md). If the workflow's handler is
        `DataHandlerLP`, features and labels instead of prices.
    sets : sequence of str
        Changes to the file, for example "task.model.kwargs.n_epochs=5".
    device : str, optional
        "cpu", "cuda", "cuda:1" or "auto". Replaces the device of the file.
    output : path, optional
        The run folder, which must be empty or absent. Default: runs/<experiment>-<UTC time>.
    seed : int, optional
        Replaces the seed of the file. If neither specifies one, a seed is drawn and recorded in the manifest.
    resume : path, optional
        A run folder to continue, with the same workflow and the same data. Training, or pre-training, continues after
        its last complete epoch. The result equals that of an uninterrupted run.
    callbacks : sequence of Callback
        Passed to `fit`, and to the fit of the base model if the file has a `pretrain` block.
    allow_code : path or sequence of paths, optional
        Python files, or folders of them, from which the file may name classes. The run folder records them.
    read_options : ReadOptions or mapping, optional
        How to read tables, see `qfast.data.ReadOptions`. Replaces the options of the file. The manifest records them,
        and a resumed run uses them again.
    prepared : PreparedData, optional
        Data that `PreparedData.write` has already read and processed for a workflow with the same handler. The results
        equal those of a run that reads the data itself.
    init_from : path, optional
        A run folder, or a weight file, whose weights the training starts from. Replaces `task.init_from` of the file.
        The manifest records the file and its hash.
    progress : bool, "auto" or "lines", optional
        Progress bar or one line per epoch, as the argument of the model. False shows nothing. Replaces the value of the
        file.

    Raises
    ------
    ConfigError
        The file or the arguments are wrong; the message lists every problem. It is also raised if another process
        writes to the `resume` folder.
    DataError
        The data cannot be read or is unsuitable for training.
    CheckpointError
        The weights of `init_from` do not fit the model, or the checkpoint of `resume` is damaged.
    QfastError
        The disk is full. The manifest records the failure, and the run can be resumed.
    RankError
        Another process of a run under torchrun has failed or died.

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
    with joined() as ranks, contextlib.ExitStack() as lock:
        code = lock.enter_context(allowed_code(allow_code))
        options = ReadOptions.of(read_options)
        if ranks is not None and not ranks.is_main:
            shared = ranks.wait_for("run")
            folder: RunFolder = FollowedFolder.open(shared["folder"])
            resumed = folder if shared["resumed"] else None
            job = prepare(
                *(config_path, data, sets, device, shared["seed"], resumed, callbacks, options, init_from, progress)
            )
        else:
            continued = resume if resume is not None else folder_to_continue(output)
            resumed = None if continued is None else _reopen(continued, output, lock, code)
            job = prepare(*(config_path, data, sets, device, seed, resumed, callbacks, options, init_from, progress))
            folder = _create(job, output, lock, code) if resumed is None else resumed
            share_run(ranks, folder, job.seed, resumed=job.resumed)
        job.prepared = prepared
        result = _run(job, folder, ranks, lock)
        return result if ranks is None else same_result(ranks, result)


def _run(job: Job, folder: RunFolder, ranks: Ranks | None, stack: contextlib.ExitStack) -> RunResult:
    """All stages of a run. Over several ranks, only rank 0 evaluates the scores and writes."""
    with recorded(folder):
        if job.prepared is None:
            with job.timed("data"):
                job.prepared = data_of_machine(ranks, job, folder, stack)
        dataset = _load(job, folder)
        if ranks is not None:
            require_same_run(ranks, job)
        labels = raw_labels(dataset)
        records = _begin(job, folder, dataset, meaningless(job.workflow, dataset))
        with job.timed("training"):
            _train(job, folder, dataset)
        with job.timed("scores"):
            results = evaluate(job.model, dataset, labels)
            if not folder.writes:
                return RunResult(folder.path, {}, job.model, dataset)
            metrics = write_results(folder, records, results)
        with job.timed("portfolio"):
            portfolio = _trade(job, folder, records, results.get("test"), dataset)
        folder.update(seconds=job.seconds)
        write_report(folder, job.workflow, job.model, dataset, results, metrics, job.started, portfolio)
    traded = {} if portfolio is None else portfolio.backtest.metrics()
    return RunResult(folder.path, metrics, job.model, dataset, traded)


# ---------------------------------------------------------------- the folder
def _create(
    job: Job, output: str | os.PathLike[str] | None, lock: contextlib.ExitStack, code: AllowedCode | None
) -> RunFolder:
    folder = RunFolder.create(
        output,
        job.workflow.experiment_name,
        dump_yaml(job.workflow.resolved()),
        config=job.source,
        seed=job.seed,
        seed_drawn=job.seed_drawn,
        data=data_source(job.data, job.workflow, job.read_options),
        **({} if job.origin is None else {starting.KEY: job.origin.facts()}),
        **({} if code is None else {MANIFEST_KEY: code.facts()}),
    )
    log.info("run folder: %s", folder.path)
    lock.enter_context(locked(folder.path))
    return folder


def _reopen(
    path: str | os.PathLike[str],
    output: str | os.PathLike[str] | None,
    lock: contextlib.ExitStack,
    code: AllowedCode | None,
) -> RunFolder:
    if output is not None and Path(output).resolve() != Path(path).resolve():
        raise ConfigError(f"--output {str(output)!r} and --resume {str(path)!r} are different folders. Pass only one.")
    lock.enter_context(locked(RunFolder.open(path).path))
    folder = RunFolder.open(path)  # again, because the manifest may have changed before the lock was acquired
    require_permission(folder.manifest, code, path)
    return folder


# ---------------------------------------------------------------- the stages
def _load(job: Job, folder: RunFolder) -> HandlerDataset:
    """Build the dataset, and load the checkpoint of a resumed run. Raises an error if the run cannot be resumed."""
    with job.timed("data"):
        if job.prepared is not None:
            dataset, notes, job.facts = job.prepared.dataset(job.workflow), job.prepared.notes, job.prepared.facts
        else:
            with collected_notes() as notes:
                dataset = build_dataset(job.workflow, job.data, job.read_options)
            job.facts = data_facts(dataset.handler, job.data, job.workflow, job.read_options)
        job.source_warnings = [note.text for note in notes if note.warning]
        if notes:
            job.facts["reading"] = [note.text for note in notes]
    if job.resumed:
        resumption.require_same_data(folder, job.facts)
        if (folder / LAST).exists():
            job.model.load_checkpoint(folder / LAST)
        else:
            pretraining.check_resumable(folder)
    return dataset


def _begin(job: Job, folder: RunFolder, dataset: HandlerDataset, warnings: Sequence[str]) -> list[Record]:
    """Build the records, and write everything that is known before training, including `warnings`."""
    if job.resumed:
        folder.restart()
    workflow = job.workflow
    notices = [*_notices(job), *job.source_warnings, *warnings]
    records = build_records(workflow, job.model, dataset)
    for record in records:
        if isinstance(record, PortAnaRecord):
            record.plan.check_prices(dataset.handler, workflow.qlib_init.region)
    folder.write_text(CONFIG, dump_yaml(workflow.resolved()))
    folder.update(
        config=job.source,
        seed=job.seed,
        seed_drawn=job.seed_drawn,
        device=str(job.model.device),
        tiers=_tiers(),
        notes=notices,
        data=job.facts,
        **folders.environment(),
    )
    if folder.writes:
        save_scoring(folder, workflow, job.model, dataset)
    return records


def _notices(job: Job) -> list[str]:
    """Log and return a notice for each record that this version does not support. Manifest and report repeat them."""
    notices = []
    for spec in job.workflow.task.record:
        factory, _ = registry.RECORDS.resolve(spec.model_dump(by_alias=True, include={"class_", "module_path"}))
        if notice := getattr(factory, "notice", ""):
            notices.append(str(notice))
            log.warning(notice)
    return notices


def _tiers() -> dict[str, object]:
    from qfast import _backend

    return dict(_backend.status())


def _train(job: Job, folder: RunFolder, dataset: HandlerDataset) -> None:
    """Pre-train the base model if the file requests it, then fit the model, from its checkpoint if there is one."""
    has_checkpoint = (folder / LAST).exists()
    if not has_checkpoint:
        pretraining.pretrain(folder, job.workflow, job.model, dataset, job.resumed, job.callbacks)
    reweighter = None
    if job.workflow.task.reweighter is not None:
        reweighter = registry.REWEIGHTERS.build(job.workflow.task.reweighter.description(), path="task.reweighter")
    if job.resumed and not has_checkpoint and job.workflow.task.pretrain is False:
        log.warning("%s has no checkpoint; training starts from the beginning", folder.path)
    history = pretraining.SaveHistory(folder.path)
    resuming = job.resumed and has_checkpoint
    transfer = [] if resuming else [pretraining.RecordTransfer(folder)]
    job.model.fit(
        dataset,
        reweighter=reweighter,
        callbacks=[*job.callbacks, history, *transfer, pretraining.EndAfterSignal()],
        checkpoint_dir=folder.path,
        resume=resuming,
        init_from=None if job.origin is None else job.origin.run,
    )
    history.save_result(job.model)


def _trade(
    job: Job,
    folder: RunFolder,
    records: Sequence[Record],
    test: SegmentResult | None,
    dataset: HandlerDataset,
) -> PortfolioResult | None:
    """Run the portfolio backtest of the file on the scores of the segment test, as Qlib does."""
    plan = next((record.plan for record in records if isinstance(record, PortAnaRecord)), None)
    if plan is None:
        return None
    result: PortfolioResult | None = None
    try:
        if test is None or not len(test.score):
            raise DataError("the segment test has no scores to trade on.")
        result = plan.run(test.score, dataset.handler, job.workflow.qlib_init.region)
    except Exception as error:  # no failure of the backtest may discard a trained model
        if not isinstance(error, QfastError):
            log.exception("the portfolio backtest failed")
        reason = str(error) if isinstance(error, QfastError) else f"{type(error).__name__}: {error}"
        notes = [f"PortAnaRecord: the portfolio backtest was skipped: {reason}"]
    if result is not None:
        write_portfolio(folder, result)
        notes = [f"portfolio backtest: {note}." for note in result.notes]
    for note in notes:
        log.warning(note)
    folder.update(notes=[*folder.manifest["notes"], *notes])
    return result
