"""Summary of a run, for `qfast info`."""

from __future__ import annotations

import os
from typing import Any

from qfast.errors import CheckpointError
from qfast.workflow import pretraining
from qfast.workflow.folder import BEST, FINISHED, RunFolder
from qfast.workflow.saved_facts import RESTORE
from qfast.workflow.user_code import option_text

METRICS = "metrics.json"

__all__ = ["run_info"]


def run_info(run_path: str | os.PathLike[str]) -> dict[str, Any]:
    """Status, data, model and metrics of a run, finished or not.

    Parameters
    ----------
    run_path : path
        A run folder.

    Returns
    -------
    dict
        Keys "experiment", "status", "error", "started", "ended", "device", "seed", "data", "pretraining", "code" (the
        option that permits the run's own classes, if it has any), "hint" (how to resume), "notes" and "metrics"
        (segment -> metric -> value, empty if not available yet).

    Raises
    ------
    ConfigError
        `run_path` is not a run folder.
    CheckpointError
        A file in it is damaged.
    """
    folder = RunFolder.open(run_path)
    manifest = folder.manifest
    info = {key: manifest.get(key) for key in ("experiment", "status", "error", "started", "ended", "device", "seed")}
    info["data"] = manifest.get("data", {})
    if info["status"] != FINISHED and "stage" in manifest:
        info["status"] = f"{info['status']} ({manifest['stage']})"
    info["pretraining"] = pretraining.facts(manifest)
    info["code"] = option_text(manifest)
    info["hint"] = folder.resume_hint()
    replaced = folder.replaced_file(BEST)
    info["notes"] = [*manifest.get("notes", []), *([] if replaced is None else [replaced])]
    info["metrics"] = folder.read_json(METRICS) if (folder / METRICS).exists() else {}
    _require_metrics(info["metrics"], folder)
    return info


def _require_metrics(metrics: object, folder: RunFolder) -> None:
    rows = list(metrics.values()) if isinstance(metrics, dict) else [None]
    numbers = [value for row in rows if isinstance(row, dict) for value in row.values() if value is not None]
    if not all(isinstance(row, dict) for row in rows) or not all(isinstance(value, (int, float)) for value in numbers):
        raise CheckpointError(f"{folder / METRICS} is not a mapping of segments to metrics. {RESTORE}")
