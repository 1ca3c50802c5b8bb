"""The results of a study: one row for each run, and means and standard deviations over runs."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from qfast.files import atomic_write
from qfast.studies.axes import Point
from qfast.studies.plan import RunSpec
from qfast.workflow.folder import FINISHED, HISTORY, MANIFEST
from qfast.workflow.portfolio import FOLDER as PORTFOLIO

__all__ = ["PRUNED", "Ending", "Results", "markdown_summary", "metric_id", "short_names", "summarize"]

PRUNED = "pruned"  # status of a run that a search has stopped early
PRUNED_FILE = "pruned.json"
TABLE = "table.csv"
EXCESS = "1day.excess_return_with_cost"
# Columns of Qlib's benchmark table -> columns of our table, after the segment.
BENCHMARK = {"IC": "ic", "ICIR": "icir", "Rank IC": "rank_ic", "Rank ICIR": "rank_icir"}
PORTFOLIO_COLUMNS = {
    "Annualized Return": f"{EXCESS}.annualized_return",
    "Information Ratio": f"{EXCESS}.information_ratio",
    "Max Drawdown": f"{EXCESS}.max_drawdown",
}


@dataclass(frozen=True)
class Ending:
    """The status of a run that has ended, and why it failed."""

    status: str
    reason: str = ""


def metric_id(name: str) -> str:
    """Name of a metric in tables and objectives.

    >>> metric_id("Rank IC")
    'rank_ic'
    """
    return name.lower().replace(" ", "_").replace("-", "_")


class Results:
    """The rows of the runs that have ended.

    Parameters
    ----------
    path : Path
        The study folder.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rows: dict[int, dict[str, Any]] = {}
        self._specs: dict[int, RunSpec] = {}

    def earlier(self, folder: Path) -> Ending | None:
        """The ending of a run that is finished already; None if it must run."""
        try:
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return Ending(FINISHED) if manifest.get("status") == FINISHED else None

    def add(self, spec: RunSpec, ending: Ending, folder: Path) -> dict[str, Any]:
        """Add the row of a run and return it."""
        status = ending.status
        if status == FINISHED and (folder / PRUNED_FILE).is_file():
            status = PRUNED
        row: dict[str, Any] = {"run": spec.number}
        if spec.point.trial is not None:
            row["trial"] = spec.point.trial
        row |= spec.point.values
        if spec.window is not None:
            test = spec.window.segments.get("test", (None, None))
            row |= {"window": spec.window.number, "test_start": test[0], "test_end": test[1]}
        row |= {"seed": spec.seed, "status": status, "reason": ending.reason}
        if ending.status == FINISHED:
            row |= run_values(folder)
        self._rows[spec.number], self._specs[spec.number] = row, spec
        return row

    def status(self, number: int) -> str | None:
        """The status of a run; None if it has not ended."""
        row = self._rows.get(number)
        return None if row is None else str(row["status"])

    def specs(self) -> list[RunSpec]:
        """The runs that have ended, in order of their numbers."""
        return [self._specs[number] for number in sorted(self._specs)]

    def of_point(self, point: Point) -> list[Mapping[str, Any]]:
        """The rows of a point."""
        return [self._rows[spec.number] for spec in self.specs() if spec.point == point]

    @property
    def failed(self) -> int:
        """Number of runs that failed."""
        return sum(row["status"] not in (FINISHED, PRUNED) for row in self._rows.values())

    def table(self) -> pd.DataFrame:
        """One row for each run that has ended, in order of their numbers."""
        rows = [self._rows[number] for number in sorted(self._rows)]
        columns = list(dict.fromkeys(column for row in rows for column in row))
        return pd.DataFrame(rows, columns=columns)

    def write(self) -> None:
        """Write table.csv, which contains no times and is therefore equal for equal results."""
        text = self.table().to_csv(index=False)
        atomic_write(self._path / TABLE, lambda file: file.write_bytes(text.encode("utf-8")))

    def summary_line(self, row: Mapping[str, Any]) -> str:
        """The main metrics of a row, for the log."""
        segment = next((name for name in ("test", "valid", "train") if f"{name}.ic" in row), None)
        if segment is None:
            return str(row["status"])
        return f"{row['status']}, {segment} IC {row[f'{segment}.ic']:.4f}, rank IC {row[f'{segment}.rank_ic']:.4f}"


def run_values(folder: Path) -> dict[str, Any]:
    """The values of a finished run for the table: epochs, and metrics by segment."""
    values: dict[str, Any] = {}
    history = pd.read_csv(folder / HISTORY)
    values["epochs"] = len(history)
    if "valid" in history and len(history):
        values["best_epoch"] = int(history["valid"].fillna(-math.inf).to_numpy().argmax())
        values["valid.score"] = float(history["valid"].max())
    values |= metric_values(folder)
    return values


def metric_values(folder: Path) -> dict[str, float]:
    """The metrics in a folder with metrics.json and, after a backtest, a portfolio: segment.metric -> value."""
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    values = {f"{segment}.{metric_id(n)}": v for segment, row in metrics.items() for n, v in row.items()}
    portfolio = folder / PORTFOLIO / "metrics.json"
    if portfolio.is_file():
        values |= json.loads(portfolio.read_text(encoding="utf-8"))
    return {name: math.nan if value is None else value for name, value in values.items()}


# ---------------------------------------------------------------- summary
def summarize(groups: Mapping[str, Sequence[Mapping[str, Any]]]) -> pd.DataFrame:
    """Mean and standard deviation of the metrics of Qlib's benchmark table.

    Parameters
    ----------
    groups : mapping
        Name -> rows with values such as "test.ic".

    Returns
    -------
    DataFrame
        Indexed by name. Columns: "runs", and for each metric its mean and "<metric> std", the standard deviation with
        ddof 1, which is 0 for one run as in Qlib.

    Notes
    -----
    Source: cal_mean_std in examples/run_all_model.py of Qlib.
    """
    rows = {}
    for name, values in groups.items():
        segment = next((s for s in ("test", "valid", "train") if any(f"{s}.ic" in row for row in values)), "test")
        columns = {title: f"{segment}.{key}" for title, key in BENCHMARK.items()} | PORTFOLIO_COLUMNS
        row: dict[str, float] = {"runs": len(values)}
        for title, column in columns.items():
            numbers = [float(v[column]) for v in values if column in v and math.isfinite(v[column])]
            row[title] = statistics.fmean(numbers) if numbers else math.nan
            row[f"{title} std"] = math.nan if not numbers else statistics.stdev(numbers) if len(numbers) > 1 else 0.0
        rows[name] = row
    frame = pd.DataFrame.from_dict(rows, orient="index")
    frame.index.name = "name"
    return frame


def markdown_summary(summary: pd.DataFrame, dataset: str) -> str:
    """A summary in the format of Qlib's benchmark tables, as Markdown.

    Notes
    -----
    Source: gen_and_save_md_table in examples/run_all_model.py of Qlib.

    Examples
    --------
    >>> row = {"test.ic": 0.04, "test.icir": 0.3, "test.rank_ic": 0.05, "test.rank_icir": 0.4}
    >>> print(markdown_summary(summarize({"LSTM": [row]}), "Alpha158").splitlines()[2])
    | LSTM | Alpha158 | 0.0400±0.00 | 0.3000±0.00 | 0.0500±0.00 | 0.4000±0.00 | - | - | - |
    """
    titles = [*BENCHMARK, *PORTFOLIO_COLUMNS]
    lines = [f"| Model Name | Dataset | {' | '.join(titles)} |", "|---" * (len(titles) + 2) + "|"]
    for name, row in summary.iterrows():
        cells = [_cell(row[title], row[f"{title} std"]) for title in titles]
        lines.append(f"| {' | '.join([str(name).replace('|', '/'), dataset, *cells])} |")
    return "\n".join(lines) + "\n"


def _cell(mean: float, deviation: float) -> str:
    return "-" if not math.isfinite(mean) else f"{mean:.4f}±{deviation:.2f}"


def short_names(keys: Iterable[str]) -> dict[str, str]:
    """Key of a workflow -> its shortest end that no other key has.

    >>> short_names(["task.model.kwargs.lr", "task.model.kwargs.n_epochs"])
    {'task.model.kwargs.lr': 'lr', 'task.model.kwargs.n_epochs': 'n_epochs'}
    """
    listed = list(keys)
    names = {}
    for key in listed:
        parts = key.split(".")
        ends = [".".join(parts[-n:]) for n in range(1, len(parts) + 1)]
        names[key] = next(
            (end for end in ends if not any(o != key and (o == end or o.endswith(f".{end}")) for o in listed)), key
        )
    return names


def point_name(point: Point) -> str:
    """The values of a point as text.

    >>> point_name(Point(0, {"task.model.kwargs.lr": 0.01}))
    'lr=0.01'
    """
    names = short_names(point.values)
    return ", ".join(f"{names[key]}={value}" for key, value in point.values.items())
