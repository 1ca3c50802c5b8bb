"""What a resumed run must have in common with the run that it continues."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from qfast.errors import ConfigError, DataError
from qfast.workflow.folder import CONFIG, RunFolder
from qfast.workflow.schema import Workflow

__all__ = ["config_of", "require_same_data", "require_same_workflow", "stored_data"]

MAY_DIFFER = {"task.model.kwargs.seed", "task.model.kwargs.device"}  # between a run and its resumption


def config_of(folder: RunFolder) -> Path:
    """The workflow file in a run folder.

    Raises
    ------
    ConfigError
        The run ended before it was written.
    """
    if not (folder / CONFIG).is_file():
        raise ConfigError(f"the run in {str(folder.path)!r} has no {CONFIG}: {folder.resume_hint()}.")
    return folder / CONFIG


def stored_data(folder: RunFolder) -> str | None:
    """Path of the data that the run was started with; None if the workflow file itself locates it.

    Raises
    ------
    ConfigError
        The run was started with data in memory, which the folder does not contain.
    """
    facts = folder.manifest.get("data", {})
    if facts.get("given") == "memory":
        raise ConfigError(
            f"the run in {str(folder.path)!r} was started with {facts['source']}, which is not stored. Remedy: pass "
            "the same data again (data=... or --data)."
        )
    source: str | None = facts.get("source")
    return source if facts.get("given", "path") == "path" else None


def require_same_workflow(
    folder: RunFolder, config_path: str | os.PathLike[str], workflow: Workflow, stored: Workflow
) -> None:
    """Refuse a workflow file whose content differs from the one that the run was started with.

    Raises
    ------
    ConfigError
        Names up to five keys that differ. The seed and the device may differ.
    """
    different = sorted(set(_differences(workflow.resolved(), stored.resolved(), "")) - MAY_DIFFER)
    if different:
        raise ConfigError(
            f"{str(config_path)!r} differs from the workflow of the run {str(folder.path)!r} at {different[:5]}. "
            f"Remedy: omit the file (the run folder contains {CONFIG}), or start a new run."
        )


def require_same_data(folder: RunFolder, facts: Mapping[str, object]) -> None:
    """Refuse data whose content hash differs from that of the run's data.

    Raises
    ------
    DataError
        Shows both hashes.
    """
    before = folder.manifest.get("data", {}).get("hash")
    if before is not None and before != facts["hash"]:
        raise DataError(
            f"the data {facts['source']!r} (hash {facts['hash']}) is not the data that the run was started with (hash "
            f"{before}). Remedy: --data with the same data, or a new run."
        )


def _differences(one: object, other: object, path: str) -> Iterator[str]:
    if isinstance(one, dict) and isinstance(other, dict):
        for key in one.keys() | other.keys():
            yield from _differences(one.get(key), other.get(key), f"{path}.{key}" if path else str(key))
    elif one != other:
        yield path
