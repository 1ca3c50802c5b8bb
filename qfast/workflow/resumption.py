"""What a resumed run must have in common with the run that it continues."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from qfast.errors import ConfigError, DataError
from qfast.read_options import ReadOptions
from qfast.workflow.config import run_folder_of
from qfast.workflow.dataset import absolute_sources, stored_read_options
from qfast.workflow.folder import CONFIG, RunFolder
from qfast.workflow.schema import Workflow

__all__ = [
    "RecordedData",
    "config_of",
    "different_keys",
    "locate_sources",
    "recorded_data",
    "require_same_data",
    "require_same_workflow",
    "stored_data",
]

log = logging.getLogger("qfast")

# Keys that may differ between a run and its resumption. `require_same_data` compares the data itself.
HANDLER = "task.dataset.kwargs.handler.kwargs"
MAY_DIFFER = {
    *("task.model.kwargs.seed", "task.model.kwargs.device"),
    *("qlib_init.provider_uri", f"{HANDLER}.provider_uri", f"{HANDLER}.data"),
}


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


class RecordedData(NamedTuple):
    """Path of the data of a run, or None if its workflow file locates the data, and the options for reading it."""

    data: str | None
    read_options: ReadOptions


def recorded_data(file: str | os.PathLike[str]) -> RecordedData:
    """The data for a workflow file if the caller passes none: for the file in a run folder, that of the run.

    Raises
    ------
    ConfigError
        As in `stored_data`.
    """
    folder = run_folder_of(file)
    if folder is None:
        return RecordedData(None, ReadOptions())
    source = stored_data(folder)
    if source is not None:
        log.info("data of the run in %s: %s", folder.path, source)
    return RecordedData(source, stored_read_options(folder.manifest))


def locate_sources(workflow: Workflow, file: str | os.PathLike[str]) -> None:
    """Make the paths of data in a workflow absolute, in place.

    They are relative to the working directory, or to the folder of the file if they do not exist there; in the file of
    a run folder, to the working directory of that run.
    """
    folder = run_folder_of(file)
    if folder is None:
        absolute_sources(workflow, Path.cwd(), Path(file).absolute().parent)
    else:
        absolute_sources(workflow, folder.manifest.get("directory", Path.cwd()))


def require_same_workflow(
    folder: RunFolder, config_path: str | os.PathLike[str], workflow: Workflow, stored: Workflow
) -> None:
    """Refuse a workflow file whose content differs from the one that the run was started with.

    Raises
    ------
    ConfigError
        Names up to five keys that differ. The seed, the device and the location of the data may differ.
    """
    different = different_keys(workflow.resolved(), stored.resolved())
    if different:
        raise ConfigError(
            f"{str(config_path)!r} differs from the workflow of the run {str(folder.path)!r} at {different[:5]}. "
            f"Remedy: omit the file (the run folder contains {CONFIG}), or start a new run."
        )


def different_keys(one: Mapping[str, object], other: Mapping[str, object]) -> list[str]:
    """Keys at which two resolved workflows differ, except seed, device and the location of the data."""
    return sorted(set(_differences(one, other, "")) - MAY_DIFFER)


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
