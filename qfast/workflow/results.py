"""What a trained model leaves: scores and labels by segment, metrics, plots and the report."""

from __future__ import annotations

import logging
import shlex
import time
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from qfast.dates import date_text
from qfast.metrics import ic_summary
from qfast.workflow import pretraining
from qfast.workflow.config import dump_yaml
from qfast.workflow.folder import RunFolder
from qfast.workflow.portfolio import PortfolioResult
from qfast.workflow.records import Record
from qfast.workflow.report import (
    Report,
    SegmentResult,
    cumulative_plot,
    loss_plot,
    portfolio_plot,
    quantile_plot,
    render_html,
)
from qfast.workflow.schema import Workflow

__all__ = ["evaluate", "raw_labels", "write_report", "write_results"]

log = logging.getLogger("qfast")


def raw_labels(dataset: Any) -> dict[str, pd.Series]:
    """Raw labels of each segment; fetched before training, so that what is wrong with them costs no time."""
    labels = {}
    for name, (start, end) in dataset.segments.items():
        labels[name] = dataset.handler.fetch(slice(start, end), col_set="label", data_key="raw").iloc[:, 0]
        if labels[name].empty:
            log.warning("segment %r (%s to %s) holds no rows of the data; it will have no metrics", name, start, end)
    return labels


def evaluate(model: Any, dataset: Any, labels: Mapping[str, pd.Series]) -> dict[str, SegmentResult]:
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


def write_results(
    run_folder: RunFolder, records: Sequence[Record], results: Mapping[str, SegmentResult]
) -> dict[str, dict[str, float]]:
    """Write pred, label, daily.csv and metrics.json; the metrics by segment."""
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


def write_report(
    run_folder: RunFolder,
    workflow: Workflow,
    model: Any,
    dataset: Any,
    results: Mapping[str, SegmentResult],
    metrics: Mapping[str, Any],
    started: float,
    portfolio: PortfolioResult | None = None,
) -> None:
    """The plots and report.html; `started` (seconds since 1970) is when the run began."""
    shown = [r for name, r in results.items() if name != "newest"]
    before = pretraining.history(run_folder)
    plots = {} if before is None else {"pretrain_loss": loss_plot(*before, title="Pre-training: loss by epoch")}
    plots |= {
        "loss": loss_plot(model.history_, model.best_epoch_),
        "cumulative_ic": cumulative_plot(shown),
        "score_groups": quantile_plot(shown),
    }
    if portfolio is not None:
        plots["portfolio"] = portfolio_plot(portfolio.backtest.report)
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
    )
    run_folder.write_text("report.html", render_html(page))


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


def _facts(run_folder: RunFolder, workflow: Workflow, model: Any, started: float) -> dict[str, Any]:
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
    return ", ".join(f"{stage} {taken:.1f}" for stage, taken in seconds.items())


def _span(start: str | None, end: str | None) -> str:
    return f"{start or 'the first date'} to {end or 'the newest date'}"


def _tier_text(tiers: Mapping[str, Any], device: str) -> str:
    state = tiers.get("cuda" if device.startswith("cuda") else "cpu", {})
    return f"{state.get('tier', 'torch')} tier ({state.get('reason', 'unknown')})"
