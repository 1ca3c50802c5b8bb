"""Write the report of a run: its plots, and a page with metrics, facts and plots."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import pandas as pd

from qfast.data.protocols import HandlerDataset
from qfast.dates import date_text
from qfast.drawing import drawn
from qfast.workflow import pretraining
from qfast.workflow.config import dump_yaml
from qfast.workflow.folder import RunFolder
from qfast.workflow.plots import cumulative_plot, loss_plot, portfolio_plot, quantile_plot
from qfast.workflow.portfolio import PortfolioResult
from qfast.workflow.results import SegmentResult
from qfast.workflow.run_page import Report, render_html
from qfast.workflow.schema import Workflow
from qfast.workflow.signal_quality import SignalQuality, investment

if TYPE_CHECKING:
    from qfast.training.estimator import Estimator

__all__ = ["write_report"]


def write_report(
    run_folder: RunFolder,
    workflow: Workflow,
    model: Estimator,
    dataset: HandlerDataset,
    results: Mapping[str, SegmentResult],
    metrics: Mapping[str, Mapping[str, float]],
    started: float,
    portfolio: PortfolioResult | None = None,
) -> None:
    """Write `plots/` and `report.html`.

    Parameters
    ----------
    run_folder : RunFolder
    workflow : Workflow
    model : Estimator
    dataset : DatasetH
    results : mapping
        Result of `qfast.workflow.results.evaluate`.
    metrics : mapping
        Segment -> metric -> value.
    started : float
        Start of the run in seconds since 1970.
    portfolio : PortfolioResult, optional
    """
    shown = [r for name, r in results.items() if name != "newest"]
    before = pretraining.history(run_folder)
    drawings: dict[str, Callable[[], bytes]] = {}
    if before is not None:
        drawings["pretrain_loss"] = lambda: loss_plot(*before, title="Pre-training: loss by epoch")
    drawings["loss"] = lambda: _score_curve(model)
    drawings["cumulative_ic"] = lambda: cumulative_plot(shown)
    drawings["score_groups"] = lambda: quantile_plot(shown)
    if portfolio is not None:
        drawings["portfolio"] = lambda: portfolio_plot(portfolio.backtest.report)
    plots, problems = drawn(drawings)
    if problems:
        run_folder.update(notes=[*run_folder.manifest["notes"], *problems])
    (run_folder / "plots").mkdir(exist_ok=True)
    for name, png in plots.items():
        run_folder.write_bytes(f"plots/{name}.png", png)
    newest = max(results.values(), key=lambda r: _last_date(r.score)).score
    date = _last_date(newest)
    page = Report(
        title=f"{workflow.experiment_name}: {type(model).__name__}",
        subtitle=_subtitle(run_folder),
        intro=_intro(dataset),
        metrics=metrics,
        facts=_facts(run_folder, workflow, model, started),
        plots=plots,
        config=dump_yaml(workflow.resolved()),
        notes=run_folder.manifest["notes"],
        newest=newest.xs(date, level="datetime") if len(newest) else None,
        newest_date=date_text(date),
        portfolio=None if portfolio is None else portfolio.backtest.risk()["risk"].unstack(),
        investment=None if portfolio is None else investment(portfolio.backtest),
        signal=_signal(results),
    )
    run_folder.write_text("report.html", render_html(page))


def _signal(results: Mapping[str, SegmentResult]) -> SignalQuality | None:
    """The signal of the segment test, otherwise valid or train; None if it has no IC."""
    shown = next((results[name] for name in ("test", "valid", "train") if name in results), None)
    return None if shown is None or shown.ic.isna().all() else SignalQuality.of(shown)


def _score_curve(model: Estimator) -> bytes:
    """The plot of the scores that select the epoch: minus the loss, unless the user has a metric."""
    is_loss = model.scores_are_losses
    title = "Loss by epoch" if is_loss else "Score by epoch"
    return loss_plot(model.history_, model.best_epoch_, title, is_loss=is_loss)


def _last_date(score: pd.Series) -> pd.Timestamp:
    dates = score.index.get_level_values("datetime")
    return dates.max() if len(dates) else pd.Timestamp.min


def _intro(dataset: HandlerDataset) -> str:
    label = " and ".join(str(name) for name in dataset.handler.get_cols("label"))
    selection = ", and the best epoch was selected on valid" if "valid" in dataset.segments else ""
    return (
        "The model scores each instrument on every date. A higher score predicts a higher label. The label is "
        f"{label}. The model was trained on the segment train{selection}."
    )


def _subtitle(run_folder: RunFolder) -> str:
    facts = run_folder.manifest["data"]
    return (
        f"{facts['instruments']} instruments, {facts['first']} to {facts['last']}, run {run_folder.path.name}, "
        f"qfast {run_folder.manifest['versions']['qfast']}"
    )


def _facts(run_folder: RunFolder, workflow: Workflow, model: Estimator, started: float) -> dict[str, object]:
    manifest = run_folder.manifest
    parameters = sum(p.numel() for p in model.network.parameters())
    history = model.history_
    seconds = history["seconds"].sum() if len(history) else 0.0
    segments = workflow.task.dataset.kwargs.segments
    return {
        "Model": f"{type(model).__module__}.{type(model).__name__}, {parameters:,} parameters",
        "Epochs": f"{len(history)}, best {model.best_epoch_}, {seconds:.1f} s of training",
        **pretraining.facts(manifest),
        "Segments": "; ".join(f"{name} {_span(*bounds)}" for name, bounds in segments.items()),
        "Data": f"{manifest['data']['source']} (hash {manifest['data']['hash']})",
        "Device": manifest["device"],
        "Operators": _tier_text(manifest["tiers"], manifest["device"]),
        "Seed": f"{manifest['seed']}{' (drawn for this run)' if manifest['seed_drawn'] else ''}",
        "Versions": ", ".join(f"{name} {version}" for name, version in manifest["versions"].items()),
        "Platform": manifest["platform"],
        "Command": shlex.join(manifest["command"]),
        "Wall time": f"{time.time() - started:.1f} s ({_stages(manifest['seconds'])})",
    }


def _stages(seconds: Mapping[str, float]) -> str:
    return ", ".join(f"{stage} {wall_time:.1f}" for stage, wall_time in seconds.items())


def _span(start: str | None, end: str | None) -> str:
    return f"{start or 'the first date'} to {end or 'the last date'}"


def _tier_text(tiers: Mapping[str, Mapping[str, str]], device: str) -> str:
    state = tiers.get("cuda" if device.startswith("cuda") else "cpu", {})
    return f"{state.get('tier', 'torch')} tier ({state.get('reason', 'unknown')})"
