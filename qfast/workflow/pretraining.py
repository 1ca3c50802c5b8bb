"""Pre-training in a workflow: the path of `model_path`, and the stage of a `pretrain:` block before the fit.

The stage writes the history, best weights and checkpoint of the base model to the folder `pretrain` of the run, so an
interrupted run resumes in the stage in which it ended.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import pandas as pd

from qfast import registry
from qfast._renamed import renamed_names
from qfast.data.protocols import HandlerDataset
from qfast.errors import ConfigError
from qfast.files import atomic_write
from qfast.interrupts import raise_discarded
from qfast.training import checkpoint
from qfast.training.callbacks import Callback
from qfast.training.ranks import writes_files
from qfast.workflow.folder import BEST, HISTORY, LAST, RunFolder
from qfast.workflow.schema import Spec, Workflow

if TYPE_CHECKING:
    from qfast.training.estimator import Estimator

__getattr__ = renamed_names(__name__, {"KeepHistory": "qfast.workflow.pretraining.SaveHistory"})

__all__ = [
    "EndAfterSignal",
    "SaveHistory",
    "absolute_model_path",
    "check_resumable",
    "history",
    "pretrain",
    "require_same_block",
]

log = logging.getLogger("qfast")

FOLDER = "pretrain"
PATH_KEY = "task.model.kwargs.model_path"


class SaveHistory(Callback):
    """Writes history.csv after each epoch, and best.safetensors if the epoch is the best so far; on rank 0 only."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_epoch_end(self, estimator: Estimator) -> None:
        """Write the files of this epoch."""
        if not writes_files():
            return
        self._write_history(estimator)
        if estimator.best_epoch_ in (None, estimator.epoch_):
            estimator.save_weights(self.folder / BEST)

    def save_result(self, estimator: Estimator) -> None:
        """Write both files after a fit, even if it ran no epoch."""
        if not writes_files():
            return
        self._write_history(estimator)
        estimator.save_weights(self.folder / BEST)

    def _write_history(self, estimator: Estimator) -> None:
        text = estimator.history_.to_csv()
        atomic_write(self.folder / HISTORY, lambda file: file.write_bytes(text.encode("utf-8")))


class EndAfterSignal(Callback):
    """Ends the fit after an epoch in which SIGINT or SIGTERM arrived, if the exception of the signal was discarded."""

    def on_epoch_end(self, estimator: Estimator) -> None:
        """Raise KeyboardInterrupt."""
        raise_discarded()


class RecordTransfer(Callback):
    """Records in the manifest which weights of the base model were transferred to the model, before training."""

    def __init__(self, run_folder: RunFolder) -> None:
        self.folder = run_folder

    def on_fit_start(self, estimator: Estimator) -> None:
        """Record the transferred weights, if any."""
        transfer = getattr(estimator, "pretrained_", None)
        if transfer:
            self.folder.update(pretrained=transfer)


# ---------------------------------------------------------------- model_path
def absolute_model_path(spec: Spec, file: Path, optional: bool = False) -> None:
    """Make the model's `model_path` absolute, in place. Models without this argument are unchanged.

    A relative path is searched in the working directory, then in the folder of the workflow file and in each folder
    above it. Qlib's workflow files name weights relative to its folder of examples, two levels up.

    Parameters
    ----------
    spec : Spec
        `task.model` of a workflow.
    file : Path
        The workflow file.
    optional : bool
        Leave `model_path` unchanged if the file does not exist.

    Raises
    ------
    ConfigError
        The file does not exist. The message lists the searched paths and the remedies.
    """
    model_path = spec.kwargs.get("model_path")
    factory, _ = registry.MODELS.resolve({"class": spec.class_, "module_path": spec.module_path})
    if not isinstance(model_path, (str, os.PathLike)) or "model_path" not in registry.parameters(factory):
        return  # no path, or one that the model itself rejects
    candidates = [path.resolve() for path in _candidates(Path(os.fspath(model_path)).expanduser(), file)]
    candidates = list(dict.fromkeys(candidates))
    existing = next((path for path in candidates if path.exists()), None)
    if existing is not None:
        spec.kwargs["model_path"] = str(existing)
    elif not optional:
        base = spec.kwargs.get("base_model", "the base model")
        raise ConfigError(
            f"{PATH_KEY}: {str(model_path)!r} was not found; searched {[str(path) for path in candidates]}. Remedy: "
            f"--set {PATH_KEY}=PATH with a weight file or a run folder of {base}, or --set {PATH_KEY}=null for random "
            f"initial weights. To train {base} first, add a `pretrain:` block: --set {PATH_KEY}=null "
            "--set 'task.pretrain={}'."
        )


def without_lost_file(spec: dict[str, Any]) -> dict[str, Any]:
    """Remove a `model_path` that does not exist from a model's description.

    Only a run that resumes after its first complete epoch can have one. Its checkpoint contains every weight.
    """
    kwargs = spec.get("kwargs", {})
    file = kwargs.get("model_path")
    if not isinstance(file, str) or Path(file).exists():
        return spec
    log.info("%s no longer exists; the checkpoint of the run contains the weights transferred from it", file)
    return {**spec, "kwargs": {**kwargs, "model_path": None}}


def _candidates(path: Path, file: Path) -> Iterator[Path]:
    yield path
    if not path.is_absolute():
        yield from (folder / path for folder in file.absolute().parents)


# ---------------------------------------------------------------- the stage
def pretrain(
    run_folder: RunFolder,
    workflow: Workflow,
    model: Estimator,
    dataset: HandlerDataset,
    resume: bool,
    callbacks: Sequence[Callback],
) -> None:
    """Train the model's base and transfer its weights to the model, if the workflow has a `pretrain:` block.

    Parameters
    ----------
    run_folder : RunFolder
        Files are written to its folder `pretrain`.
    workflow : Workflow
    model : Estimator
        A model with a base.
    dataset : DatasetH
    resume : bool
        Continue after the last complete epoch of the base. If all epochs are complete, only transfer the weights.
    callbacks : sequence of Callback
    """
    arguments = workflow.task.pretrain
    if not isinstance(arguments, Mapping):
        return
    folder = run_folder / FOLDER
    folder.mkdir(exist_ok=True)
    history = SaveHistory(folder)
    resume = resume and (folder / LAST).exists()
    log.info("pre-training%s: %s", " resumes" if resume else "", folder)
    run_folder.update(stage="pre-training")
    base = cast(Any, model).pretrain(
        dataset, **arguments, callbacks=[*callbacks, history, EndAfterSignal()], checkpoint_dir=folder, resume=resume
    )
    history.save_result(base)
    frame = base.history_
    run_folder.update(
        stage="training",
        pretrain={
            "model": f"{type(base).__module__}.{type(base).__name__}",
            "arguments": dict(arguments),
            "epochs": len(frame),
            "best_epoch": base.best_epoch_,
            "seconds": float(frame["seconds"].sum()) if len(frame) else 0.0,
        },
    )


def check_resumable(run_folder: RunFolder) -> None:
    """Raise a CheckpointError for a damaged checkpoint of the stage, before anything in the folder changes."""
    file = run_folder / FOLDER / LAST
    if file.exists():
        checkpoint.read_tensors(file)


def require_same_block(run_folder: RunFolder, task: Mapping[str, Any], now: dict[str, Any] | Literal[False]) -> None:
    """Check that a resumed run has its original `pretrain:` block. Until the stage ends, `n_epochs` may change.

    Parameters
    ----------
    run_folder : RunFolder
    task : mapping
        Section `task` of the workflow file in the run folder.
    now : dict or False
        The block of the resumed run.

    Raises
    ------
    ConfigError
        The block has changed after the stage has begun or ended.
    """
    done = (run_folder / LAST).exists()
    if not done and not (run_folder / FOLDER / LAST).exists():
        return
    before = task.get("pretrain", False)
    one, other = ({} if block is False else block for block in (before, now))
    free = set() if done else {"n_epochs"}
    changed = {name for name in one.keys() | other.keys() if one.get(name) != other.get(name)} - free
    if changed or (before is False) != (now is False):
        raise ConfigError(
            f"task.pretrain: the pre-training of the run in {str(run_folder.path)!r} has {'ended' if done else 'begun'}"
            f", so {before!r} cannot become {now!r}. Remedy: restore the block, or start a new run."
        )


def history(run_folder: RunFolder) -> tuple[pd.DataFrame, int | None] | None:
    """Training history and best epoch of the stage; None if the run has no such stage."""
    done = run_folder.manifest.get("pretrain")
    if done is None:
        return None
    return pd.read_csv(run_folder / FOLDER / HISTORY, index_col="epoch"), done["best_epoch"]


def facts(manifest: Mapping[str, Any]) -> dict[str, str]:
    """Lines of the report and of `qfast info`, by heading; empty for a model without a base."""
    lines = {}
    done = manifest.get("pretrain")
    if done is not None:
        name, epochs = done["model"].rpartition(".")[2], done["epochs"]
        lines["Pretrained"] = f"{name}, {epochs} epochs, best {done['best_epoch']}, {done['seconds']:.1f} s of training"
    base = manifest.get("pretrained")
    if origin := manifest.get("init_from"):
        lines["Start"] = f"weights of {origin['source']} (SHA-256 {origin['sha256'][:12]})"
    if base:
        left = f"; unused: {', '.join(base['not_taken'])}" if base["not_taken"] else ""
        lacking = f"; missing: {', '.join(base['absent'])}" if base["absent"] else ""
        lines["Base"] = f"{_grouped(base['taken'])} from {base['source']}{left}{lacking}"
    return lines


def _grouped(keys: Sequence[str]) -> str:
    """Group keys of a state dict by their first part: "rnn.* (8), fc_out.* (2)"."""
    parts = [key.split(".", 1)[0] for key in keys]
    return ", ".join(f"{part}.* ({parts.count(part)})" for part in dict.fromkeys(parts))
