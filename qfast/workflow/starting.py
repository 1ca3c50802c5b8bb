"""The weights that the training of a workflow starts from: `task.init_from`, a run folder or a weight file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qfast.errors import CheckpointError, ConfigError
from qfast.training.origin import Origin, read_origin
from qfast.workflow.folder import LAST, RunFolder
from qfast.workflow.schema import Workflow

if TYPE_CHECKING:
    from qfast.training.estimator import Estimator

KEY = "init_from"

__all__ = ["KEY", "absolute_origin", "starting_weights"]


def absolute_origin(workflow: Workflow, file: Path, optional: bool = False) -> None:
    """Make `task.init_from` absolute, in place.

    A relative path is searched in the working directory, then in the folder of the workflow file.

    Parameters
    ----------
    workflow : Workflow
    file : Path
        The workflow file.
    optional : bool
        Leave the path unchanged if it does not exist.

    Raises
    ------
    ConfigError
        The path does not exist. The message lists the searched paths.
    """
    origin = workflow.task.init_from
    if origin is None:
        return
    path = Path(origin).expanduser()
    candidates = list(dict.fromkeys([path.absolute(), (file.absolute().parent / path).resolve()]))
    existing = next((candidate for candidate in candidates if candidate.exists()), None)
    if existing is not None:
        workflow.task.init_from = str(existing)
    elif not optional:
        raise ConfigError(
            f"task.{KEY}: {origin!r} was not found; searched {[str(candidate) for candidate in candidates]}. Remedy: "
            "--init-from with a run folder or a weight file."
        )


def starting_weights(workflow: Workflow, model: Estimator, resumed: RunFolder | None) -> Origin | None:
    """Check the weights of `task.init_from`. None without this key, and for a run that resumes from a checkpoint.

    Raises
    ------
    CheckpointError
        The weights do not fit the model, or they are not those that the resumed run has started from.
    """
    if workflow.task.init_from is None or (resumed is not None and (resumed / LAST).exists()):
        return None
    origin = read_origin(workflow.task.init_from, model)
    recorded = {} if resumed is None else resumed.manifest.get(KEY, {})
    if recorded.get("sha256", origin.sha256) != origin.sha256:
        raise CheckpointError(
            f"task.{KEY}: {str(origin.file)!r} has changed since the run in {str(resumed and resumed.path)!r} was "
            f"started: its SHA-256 is {origin.sha256}, expected {recorded['sha256']}. Remedy: restore the file, or "
            "start a new run."
        )
    return origin
