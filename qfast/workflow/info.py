"""Summary of a run, for `qfast info`."""

from __future__ import annotations

import json
import os
from typing import Any

from qfast.workflow import pretraining
from qfast.workflow.folder import BEST, FINISHED, RunFolder
from qfast.workflow.user_code import option_text

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
    metrics = folder / "metrics.json"
    info["metrics"] = json.loads(metrics.read_text(encoding="utf-8")) if metrics.exists() else {}
    return info
