"""Pre-training in a workflow: where `model_path` leads, and the stage that a `pretrain:` block puts before the fit.

The stage has a folder of its own in the run folder, with the base model's history, best weights and checkpoint, so
that a run that breaks off in either stage goes on in that one.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from qfast import registry
from qfast.errors import ConfigError
from qfast.files import atomic_write
from qfast.training import checkpoint
from qfast.training.callbacks import Callback
from qfast.workflow.folder import BEST, HISTORY, LAST, RunFolder
from qfast.workflow.schema import Spec, Workflow

__all__ = ["SaveHistory", "absolute_model_path", "check_resumable", "history", "pretrain", "require_same_block"]

log = logging.getLogger("qfast")

FOLDER = "pretrain"
PATH_KEY = "task.model.kwargs.model_path"


class SaveHistory(Callback):
    """After every epoch: history.csv, and best.safetensors where the epoch is the best so far."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_epoch_end(self, estimator: Any) -> None:
        self._write_history(estimator)
        if estimator.best_epoch_ in (None, estimator.epoch_):
            estimator.save_weights(self.folder / BEST)

    def save_result(self, estimator: Any) -> None:
        """The same for a fit that has ended, whether or not it ran an epoch."""
        self._write_history(estimator)
        estimator.save_weights(self.folder / BEST)

    def _write_history(self, estimator: Any) -> None:
        text = estimator.history_.to_csv()
        atomic_write(self.folder / HISTORY, lambda file: file.write_bytes(text.encode("utf-8")))


class RecordTransfer(Callback):
    """The manifest gets what a model took of its base's weights, and what not, before it is trained."""

    def __init__(self, run_folder: RunFolder) -> None:
        self.folder = run_folder

    def on_fit_start(self, estimator: Any) -> None:
        taken = getattr(estimator, "pretrained_", None)
        if taken:
            self.folder.update(pretrained=taken)


# ---------------------------------------------------------------- model_path
def absolute_model_path(spec: Spec, file: Path, optional: bool = False) -> None:
    """Turn the model's `model_path` into an absolute one, in place; a model without that argument is left alone.

    A relative path is looked up from the working directory, then from the workflow file's folder and each folder
    above it: the reference's files name weights relative to its folder of examples, two levels up.

    Parameters
    ----------
    spec : Spec
        `task.model` of a checked workflow.
    file : Path
        The workflow file.
    optional : bool
        Leave a path that leads nowhere as it is.

    Raises
    ------
    ConfigError
        It leads nowhere; the message lists where it was looked for, and the ways out.
    """
    given = spec.kwargs.get("model_path")
    factory, _ = registry.MODELS.resolve({"class": spec.class_, "module_path": spec.module_path})
    if not isinstance(given, (str, os.PathLike)) or "model_path" not in registry.parameters(factory):
        return  # none, or one that the model itself refuses
    places = [place.resolve() for place in _places(Path(os.fspath(given)).expanduser(), file)]
    places = list(dict.fromkeys(places))
    found = next((place for place in places if place.exists()), None)
    if found is not None:
        spec.kwargs["model_path"] = str(found)
    elif not optional:
        base = spec.kwargs.get("base_model", "the base model")
        raise ConfigError(
            f"{PATH_KEY}: {str(given)!r} was not found; looked at {[str(place) for place in places]}. Remedy: --set "
            f"{PATH_KEY}=PATH with a weight file or a run folder of {base}; or --set {PATH_KEY}=null for random "
            "initial weights; or both that and a `pretrain:` block (--set 'task.pretrain={}'), which trains "
            f"{base} first."
        )


def without_lost_file(spec: dict[str, Any]) -> dict[str, Any]:
    """A model's description without a `model_path` that leads nowhere.

    Only a run that goes on after its first whole epoch gets so far with one: its checkpoint holds every weight.
    """
    kwargs = spec.get("kwargs", {})
    file = kwargs.get("model_path")
    if not isinstance(file, str) or Path(file).exists():
        return spec
    log.info("%s is not there any more; the run's checkpoint holds what was taken from it", file)
    return {**spec, "kwargs": {**kwargs, "model_path": None}}


def _places(path: Path, file: Path) -> Iterator[Path]:
    yield path
    if not path.is_absolute():
        yield from (folder / path for folder in file.absolute().parents)


# ---------------------------------------------------------------- the stage
def pretrain(
    run_folder: RunFolder, workflow: Workflow, model: Any, dataset: Any, resume: bool, callbacks: Sequence[Callback]
) -> None:
    """Train the model's base on `dataset` and take its weights; everything goes to the folder `pretrain/` of the run.

    With `resume` it goes on after its last whole epoch, or only takes the weights where none is left to run.
    """
    arguments = workflow.task.pretrain
    if not isinstance(arguments, Mapping):
        return
    folder = run_folder / FOLDER
    folder.mkdir(exist_ok=True)
    history = SaveHistory(folder)
    resume = resume and (folder / LAST).exists()
    log.info("pre-training%s: %s", " goes on" if resume else "", folder)
    run_folder.update(stage="pre-training")
    base = model.pretrain(dataset, **arguments, callbacks=[*callbacks, history], checkpoint_dir=folder, resume=resume)
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
    """Refuse a damaged checkpoint of the stage before anything in the folder changes."""
    file = run_folder / FOLDER / LAST
    if file.exists():
        checkpoint.read_tensors(file)


def require_same_block(run_folder: RunFolder, task: Mapping[str, Any], now: dict[str, Any] | Literal[False]) -> None:
    """A resumed run keeps the block of its own file's `task`; while the stage still runs, it may get more epochs.

    Raises
    ------
    ConfigError
        It differs in a way that the run can no longer follow.
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
            f", so {before!r} cannot become {now!r}. Remedy: leave it as it was, or start a new run."
        )


def history(run_folder: RunFolder) -> tuple[pd.DataFrame, int | None] | None:
    """History and best epoch of the stage; None if the run has no such stage."""
    done = run_folder.manifest.get("pretrain")
    if done is None:
        return None
    return pd.read_csv(run_folder / FOLDER / HISTORY, index_col="epoch"), done["best_epoch"]


def facts(manifest: Mapping[str, Any]) -> dict[str, str]:
    """What report and `qfast info` say of it, by heading; nothing for a model without a base."""
    found = {}
    done = manifest.get("pretrain")
    if done is not None:
        name, epochs = done["model"].rpartition(".")[2], done["epochs"]
        found["Pretrained"] = f"{name}, {epochs} epochs, best {done['best_epoch']}, {done['seconds']:.1f} s of training"
    base = manifest.get("pretrained")
    if base:
        left = f"; left there {', '.join(base['not_taken'])}" if base["not_taken"] else ""
        lacking = f"; lacking there {', '.join(base['absent'])}" if base["absent"] else ""
        found["Base"] = f"{_grouped(base['taken'])} from {base['source']}{left}{lacking}"
    return found


def _grouped(keys: Sequence[str]) -> str:
    """Keys of a state dict by their first part: "rnn.* (8), fc_out.* (2)"."""
    parts = [key.split(".", 1)[0] for key in keys]
    return ", ".join(f"{part}.* ({parts.count(part)})" for part in dict.fromkeys(parts))
