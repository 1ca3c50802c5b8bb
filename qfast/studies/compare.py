"""`qfast runs`: the run folders below a folder as one table: configuration differences, scores and times."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from qfast.errors import ConfigError, QfastError
from qfast.files import is_locked
from qfast.studies.results import run_values, short_names
from qfast.workflow.config import load_config
from qfast.workflow.folder import BEST, CONFIG, FINISHED, HISTORY, LAST, MANIFEST, RUNNING

BROKEN = "broken"
DIED = "died"  # the manifest says that the run is running, but no process does
RUN_FILES = (CONFIG, HISTORY, BEST, LAST)  # a folder with one of them is a run, even without a manifest
# Differences of these keys say where and when a run was started, not what it is.
LOCATIONS = ("qlib_init.provider_uri", "task.dataset.kwargs.handler.kwargs.provider_uri")

# Columns of scores that the command prints without --all.
SHOWN = ("epochs", "best_epoch", "valid.score", "valid.ic", "valid.rank_ic", "test.ic", "test.rank_ic")

__all__ = ["compare_runs", "table_lines"]


def compare_runs(folder: str | os.PathLike[str]) -> pd.DataFrame:
    """Compare all runs below a folder. Nothing is written.

    Parameters
    ----------
    folder : path
        For example `runs`, a study folder, or a single run folder. Subfolders are searched, except those of runs.

    Returns
    -------
    DataFrame
        One row per run, indexed by its path relative to `folder`, in the order of the start times. Columns: "status"
        ("finished", "running", "failed", "interrupted", "died" for a running run whose process has ended, or
        "broken" for a folder that cannot be read); "reason"; the keys of the configuration in which the runs differ,
        under the shortest name that is unique; "epochs", "best_epoch", "valid.score" and "SEGMENT.METRIC" of finished
        runs, as in the table of a study; and the times "started", "training_s" and "total_s".

    Raises
    ------
    ConfigError
        The folder does not exist or contains no run.

    Examples
    --------
    >>> import tempfile
    >>> from qfast.workflow.demo import DEMO, demo_prices
    >>> from qfast.workflow.run import run
    >>> base = tempfile.mkdtemp()
    >>> for epochs in (1, 2):
    ...     _ = run(DEMO, demo_prices(20, 560), [f"task.model.kwargs.n_epochs={epochs}"], output=f"{base}/{epochs}")
    >>> table = compare_runs(base)
    >>> table[["status", "n_epochs"]].to_dict("list")
    {'status': ['finished', 'finished'], 'n_epochs': [1, 2]}
    """
    base = Path(folder)
    if not base.is_dir():
        raise ConfigError(f"folder {str(folder)!r} does not exist. Remedy: a folder with runs, for example 'runs'.")
    rows = [_row(path, base) for path in _run_folders(base)]
    if not rows:
        raise ConfigError(
            f"{str(folder)!r} contains no run: no folder below it has a {MANIFEST} that 'qfast run' has written."
        )
    rows.sort(key=lambda row: (row["started"] or "", row["run"]))
    configs = [row.pop("config") for row in rows]
    keys = _differing(configs)
    names = short_names(keys)
    table = [
        {
            **{name: row.pop(name) for name in ("run", "status", "reason")},
            **{names[key]: config.get(key) for key in keys},
            **row,
        }
        for row, config in zip(rows, configs, strict=True)
    ]
    frame = pd.DataFrame(table).set_index("run")
    times = ["started", "training_s", "total_s"]
    return frame[[column for column in frame if column not in times] + times]


def _run_folders(base: Path) -> Iterator[Path]:
    """Every run folder below `base`, without the folders inside of runs."""
    if _is_run(base):
        yield base
        return
    for child in sorted(base.iterdir()):
        if child.is_dir() and not child.is_symlink():
            try:
                yield from _run_folders(child)
            except PermissionError:
                yield child


def _is_run(folder: Path) -> bool:
    if (folder / MANIFEST).is_file():
        try:
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return any((folder / name).is_file() for name in RUN_FILES)
        return isinstance(manifest, dict) and "status" in manifest and "experiment" in manifest
    return sum((folder / name).is_file() for name in RUN_FILES) > 1


def _row(folder: Path, base: Path) -> dict[str, Any]:
    """Name, status, flat configuration, scores and times of a run."""
    name = folder.name if folder == base else str(folder.relative_to(base))
    row: dict[str, Any] = {"run": name, "status": BROKEN, "reason": "", "config": {}, "started": None}
    row |= {"training_s": None, "total_s": None}
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        row["status"] = str(manifest["status"])
        row["started"] = manifest.get("started")
        row["config"] = dict(_flat(load_config(folder / CONFIG).values, ""))
        row["reason"] = manifest.get("error") or ""
        if row["status"] == RUNNING and not is_locked(folder):
            row["status"], row["reason"] = DIED, "its process has ended without a report"
        seconds = manifest.get("seconds") or {}
        row["training_s"] = seconds.get("training")
        row["total_s"] = round(sum(seconds.values()), 3) if seconds else None
        if row["status"] == FINISHED:
            row |= run_values(folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, QfastError) as error:
        missing = f"{MANIFEST} is missing" if not (folder / MANIFEST).is_file() else f"{type(error).__name__}: {error}"
        row |= {"status": BROKEN, "reason": " ".join(missing.split())}
    return row


def _flat(value: object, path: str) -> Iterator[tuple[str, object]]:
    """Keys "a.b.0" of plain data with their values."""
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        value = dict(enumerate(value))  # other lists are one value
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _flat(item, f"{path}.{key}" if path else str(key))
    else:
        yield path, json.dumps(value) if isinstance(value, (list, dict)) else value


def _differing(configs: list[dict[str, Any]]) -> list[str]:
    """Keys whose values differ between the runs whose configuration can be read, in the order of the files."""
    readable = [config for config in configs if config]
    keys = list(dict.fromkeys(key for config in readable for key in config))
    absent = object()
    return [
        key
        for key in keys
        if key not in LOCATIONS and any(config.get(key, absent) != readable[0].get(key, absent) for config in readable)
    ]


def table_lines(table: pd.DataFrame, *, every: bool = False) -> list[str]:
    """The result of `compare_runs` as aligned text.

    Parameters
    ----------
    table : DataFrame
    every : bool
        All columns. By default the scores are epochs, IC and rank IC of the segments valid and test.
    """
    scores = list(table)[_first_score(table) :]
    hidden = () if every else [c for c in scores if c not in SHOWN and c not in ("training_s", "total_s", "started")]
    shown = table.drop(columns=list(hidden)).reset_index()
    if not every and not shown["reason"].astype(bool).any():
        shown = shown.drop(columns="reason")
    cells = [[str(column) for column in shown], *([_cell(value) for value in row] for row in shown.to_numpy(object))]
    widths = [max(len(row[j]) for row in cells) for j in range(len(cells[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]


def _first_score(table: pd.DataFrame) -> int:
    """Position of the first column after the differences in configuration."""
    columns = list(table)
    return columns.index("epochs") if "epochs" in columns else columns.index("started")


def _cell(value: object) -> str:
    if value is None or value != value:
        return "-"
    if isinstance(value, float):
        return f"{value:.0f}" if value.is_integer() and abs(value) >= 1 else f"{value:.4g}"
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
