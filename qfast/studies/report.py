"""The report page of a study."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from qfast.drawing import drawn
from qfast.studies.finish import Finished
from qfast.studies.folder import StudyFolder
from qfast.studies.plots import curves_plot, heat_map, monthly_ic, monthly_plot, parallel_plot, rolling_plot
from qfast.studies.results import PRUNED, Results, point_name, short_names
from qfast.workflow import page
from qfast.workflow.config import dump_yaml
from qfast.workflow.folder import FINISHED

__all__ = ["write_study_report"]

MOST_ROWS = 200  # runs in the table of the page; table.csv has all
MOST_CURVES = 100  # runs whose losses are plotted
EXCESS = "1day.excess_return_with_cost."
RUN_COLUMNS = {
    "best_epoch": "best epoch",
    "valid.rank_ic": "valid rank IC",
    "test.ic": "test IC",
    "test.icir": "test ICIR",
    "test.rank_ic": "test rank IC",
    "test.rank_icir": "test rank ICIR",
    f"{EXCESS}annualized_return": "annualized return",
    f"{EXCESS}information_ratio": "information ratio",
    f"{EXCESS}max_drawdown": "max drawdown",
}
WIDTH = 72  # rem; the page needs no horizontal scrolling from 1,200 pixels on


def write_study_report(
    folder: StudyFolder, results: Results, finished: Finished, best: Sequence[Mapping[str, Any]]
) -> None:
    """Write plots/ and report.html.

    Parameters
    ----------
    folder : StudyFolder
    results : Results
    finished : Finished
    best : sequence of mappings
        The best trials of a search.
    """
    table = results.table()
    images, problems = drawn(_plots(folder, results, table, finished))
    (folder.path / "plots").mkdir(exist_ok=True)
    for name, png in images.items():
        folder.write_bytes(f"plots/{name}.png", png)
    parts = [
        page.header(f"{folder.manifest['experiment']}: study", _subtitle(folder, table)),
        page.notes([*_notes(table), *problems]),
        "<h2>Means over seeds</h2>",
        page.table(_summary_rows(finished.summary), "point", dense=True),
        page.small(
            "Mean ± standard deviation (ddof 1) over the runs. IC and rank IC are means over the days of the segment "
            "test. The portfolio columns are excess returns over the benchmark with costs. An ensemble scores with the "
            f"means of the daily {'ranks' if folder.manifest['ensemble'] == 'rank' else 'z-scores'} of all seeds."
        ),
        *(_best_rows(best) if best else []),
        *(page.figure(name, png) for name, png in images.items()),
        *_monthly(finished),
        "<h2>Runs</h2>",
        page.table(_run_rows(table), "run", dense=True),
        page.small("Complete in table.csv. Each run has its own report in runs/.") if len(table) else "",
        "<h2>Study</h2>",
        page.fact_table(_facts(folder)),
        page.details("Workflow", dump_yaml(folder.workflow())),
    ]
    folder.write_text("report.html", page.render(f"{folder.manifest['experiment']}: study", parts, WIDTH))


def _plots(
    folder: StudyFolder, results: Results, table: pd.DataFrame, finished: Finished
) -> dict[str, Callable[[], bytes]]:
    """Name of each plot of the page -> the function that draws it."""
    specs = [spec for spec in results.specs() if results.status(spec.number) in (FINISHED, PRUNED)]
    specs = [spec for spec in specs if (folder.run(spec.number) / "history.csv").is_file()]
    runs: dict[str, list[Path]] = {}
    for spec in specs[:MOST_CURVES]:
        runs.setdefault(point_name(spec.point) or "all runs", []).append(folder.run(spec.number))
    images: dict[str, Callable[[], bytes]] = {"losses": lambda: curves_plot(runs)}
    ended = table[table["status"] == FINISHED]
    keys = [key for key in dict.fromkeys(key for spec in specs for key in spec.point.values) if key in ended]
    metric = next((name for name in ("test.rank_ic", "valid.rank_ic", "train.rank_ic") if name in ended), None)
    search = folder.axes.search
    if search is not None and search["objective"] in ended:
        metric = search["objective"]
    if keys and metric is not None and len(ended) > 1:
        measured = ended.dropna(subset=[metric])
        if len(keys) == 2 and search is None:
            images["grid"] = partial(heat_map, measured, keys, metric)
        else:
            images["parallel_coordinates"] = partial(parallel_plot, measured, keys, metric)
    if finished.rolling:
        images["cumulative_ic"] = lambda: rolling_plot(finished.rolling)
        images["ic_by_month"] = lambda: monthly_plot(finished.rolling)
    return images


def _subtitle(folder: StudyFolder, table: pd.DataFrame) -> str:
    statuses = list(table["status"]) if len(table) else []
    ends = ", ".join(f"{statuses.count(status)} {status}" for status in dict.fromkeys(statuses))
    return f"{len(table)} runs ({ends}), study {folder.path.name}, qfast {folder.manifest['versions']['qfast']}"


def _notes(table: pd.DataFrame) -> list[str]:
    failed = table[~table["status"].isin([FINISHED, PRUNED])] if len(table) else table
    return [f"Run {row['run']:03d} failed: {row['reason']}" for _, row in failed.iloc[:20].iterrows()]


def _summary_rows(summary: pd.DataFrame) -> dict[str, dict[str, str]]:
    titles = [name for name in summary.columns if f"{name} std" in summary.columns]
    rows = {}
    for name, row in summary.iterrows():
        cells = {"runs": f"{row['runs']:.0f}"}
        for title in titles:
            if summary[title].notna().any():
                cells[title] = f"{row[title]:.4f} ± {row[f'{title} std']:.4f}" if row[title] == row[title] else "–"
        rows[str(name)] = cells
    return rows


def _best_rows(best: Sequence[Mapping[str, Any]]) -> list[str]:
    names = short_names(key for row in best for key in row)
    rows = {f"trial {row['trial']}": {names[key]: _text(value) for key, value in row.items()} for row in best}
    return ["<h2>Best trials</h2>", page.table(rows, "search", dense=True)]


def _run_rows(table: pd.DataFrame) -> dict[str, dict[str, str]]:
    """The main columns of the table, without those that are empty."""
    columns = list(table.columns)
    start = columns.index("status") if "status" in columns else 0
    axes = list(columns[1:start])
    shown = [c for c in (*axes, "status", *RUN_COLUMNS) if c in table and table[c].notna().any()]
    names = short_names(axes) | {"status": "status"} | RUN_COLUMNS
    rows = {}
    for _, row in table.iloc[:MOST_ROWS].iterrows():
        rows[f"{row['run']:03d}"] = {names[column]: _text(row[column]) for column in shown}
    return rows


def _monthly(finished: Finished) -> list[str]:
    """A table of the months of each point of a rolling study."""
    parts = []
    for name, results in finished.rolling.items():
        months = monthly_ic(results)
        rows = {str(m): {"IC": _text(r["ic"]), "Rank IC": _text(r["rank_ic"])} for m, r in months.iterrows()}
        parts += [f"<h2>{page.text(f'IC by month: {name}')}</h2>", page.table(rows, "month")]
    return parts


def _facts(folder: StudyFolder) -> dict[str, object]:
    manifest, axes = folder.manifest, folder.axes
    facts: dict[str, object] = {"Seeds": ", ".join(map(str, axes.seeds))}
    facts |= {f"Grid {key}": ", ".join(map(str, values)) for key, values in axes.grid.items()}
    if axes.rolling is not None:
        kind = "expanding" if axes.rolling.expanding else "sliding"
        facts["Rolling"] = f"{axes.rolling.step} days, {kind}{', warm start' if axes.rolling.warm_start else ''}"
    if axes.search is not None:
        facts["Search"] = (
            f"{axes.trials} trials, {axes.search['sampler']['class']}, objective {axes.search['objective']}"
        )
    return {
        **facts,
        "Data": manifest["data"]["source"],
        "Versions": ", ".join(f"{name} {version}" for name, version in manifest["versions"].items()),
        "Platform": manifest["platform"],
        "Command": shlex.join(manifest["command"]),
    }


def _text(value: object) -> str:
    if isinstance(value, float):
        if value != value:
            return "–"
        return f"{int(value)}" if value.is_integer() and abs(value) < 1e15 else f"{value:.4g}"
    return "–" if value is None else str(value)
