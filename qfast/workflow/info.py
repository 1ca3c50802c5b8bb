"""What `qfast info` prints of a run."""

from __future__ import annotations

import json
import os
from typing import Any

from qfast.workflow import folder as folders
from qfast.workflow import pretraining
from qfast.workflow.folder import RunFolder

__all__ = ["run_info"]


def run_info(run_path: str | os.PathLike[str]) -> dict[str, Any]:
    """What `qfast info` prints: status, data, model, metrics of a run."""
    run_folder = RunFolder.open(run_path)
    out = {
        k: run_folder.manifest.get(k) for k in ("experiment", "status", "error", "started", "ended", "device", "seed")
    }
    out["data"] = run_folder.manifest.get("data", {})
    if out["status"] != folders.FINISHED and "stage" in run_folder.manifest:
        out["status"] = f"{out['status']} ({run_folder.manifest['stage']})"
    out["pretraining"] = pretraining.facts(run_folder.manifest)
    out["hint"] = run_folder.resume_hint()
    out["notes"] = run_folder.manifest.get("notes", [])
    metrics = run_folder / "metrics.json"
    out["metrics"] = json.loads(metrics.read_text(encoding="utf-8")) if metrics.exists() else {}
    return out
