"""Weights and checkpoints on disk: safetensors, one file, written atomically, read without running code."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from qfast.errors import CheckpointError, suggest
from qfast.files import atomic_write

if TYPE_CHECKING:
    from qfast.training.base import BaseEstimator

FORMAT = 1

__all__ = ["load_fit", "load_weights", "read_tensors", "save_fit", "save_weights"]


def save_weights(network: nn.Module, path: Path) -> None:
    """Write a network's state dict: safetensors for that suffix, otherwise torch's own format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = network.state_dict()
    if path.suffix == ".safetensors":
        atomic_write(path, lambda target: safetensors.torch.save_file(_storable(state), target))
    else:
        atomic_write(path, lambda target: torch.save(state, target))


def load_weights(network: nn.Module, path: Path) -> None:
    """Read weights into a network; every key and shape must fit.

    Raises
    ------
    CheckpointError
        The file is missing, truncated, not a state dict, or belongs to another network: missing,
        unexpected and differently shaped keys are named.
    """
    state = read_tensors(path)
    rename = getattr(network, "translate_state_dict", None)  # networks that accept several names for a parameter
    if callable(rename):
        try:
            state = rename(state)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from None
    own = network.state_dict()
    missing, extra = sorted(set(own) - set(state)), sorted(set(state) - set(own))
    shapes = [
        f"{k}: file {tuple(state[k].shape)}, network {tuple(own[k].shape)}"
        for k in own
        if k in state and state[k].shape != own[k].shape
    ]
    if missing or extra or shapes:
        hint = suggest(extra[0], own) if extra else ""
        raise CheckpointError(
            f"{path} does not fit {type(network).__name__}: missing {missing or 'none'}, unexpected {extra or 'none'}, "
            f"other shapes {shapes or 'none'}.{hint} Remedy: build the model with the arguments it was trained with."
        )
    network.load_state_dict(state)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a .safetensors file or of a torch state dict, on the CPU, without running code."""
    if not path.is_file():
        raise CheckpointError(f"weight file {path} does not exist.")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path, device="cpu")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # each reader raises its own kinds for a damaged file
        raise CheckpointError(f"{path} is not a readable weight file, it may be truncated ({error}).") from None
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise CheckpointError(f"{path} holds {type(state).__name__}, not a state dict of tensors.")
    return dict(state)


def save_fit(estimator: BaseEstimator, path: Path) -> None:
    """Write weights, best weights, optimiser state, generator states and records of a running fit."""
    progress = estimator.progress_
    tensors = {f"network.{k}": v for k, v in estimator.network.state_dict().items()}
    tensors |= {f"best.{k}": v for k, v in (progress.best_weights or {}).items()}
    optimizer = estimator.train_optimizer.state_dict()
    for number, entries in optimizer["state"].items():
        tensors |= {f"optimizer.{number}.{k}": v for k, v in entries.items() if isinstance(v, Tensor)}
    tensors["rng.torch"] = torch.get_rng_state()
    if estimator.device.type == "cuda":
        tensors["rng.cuda"] = torch.cuda.get_rng_state(estimator.device)
    kind, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002 - batch orders come from it
    tensors["rng.numpy"] = torch.from_numpy(np.asarray(keys).astype(np.int64))
    facts = {
        "format": FORMAT,
        "model": _model_name(estimator),
        "params": {k: v for k, v in estimator.get_params().items() if k != "device"},
        "data": estimator.data_,
        "numpy": [kind, position, has_gauss, gauss],
        "records": progress.records,
        "best_score": progress.best_score,
        "best_epoch": progress.best_epoch,
        "stop_steps": progress.stop_steps,
        "finished": progress.finished,
        "model_facts": estimator.checkpoint_facts(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"qfast": json.dumps(facts, default=str)}
    atomic_write(path, lambda target: safetensors.torch.save_file(_storable(tensors), target, metadata=metadata))


def load_fit(estimator: BaseEstimator, path: Path) -> None:
    """Put an estimator where `save_fit` left it, global generators included."""
    tensors = read_tensors(path)
    with safetensors.safe_open(path, framework="pt") as file:
        text = (file.metadata() or {}).get("qfast")
    if text is None:
        raise CheckpointError(f"{path} holds weights but no training state. Remedy: pass the run's last.safetensors.")
    facts = json.loads(text)
    if facts.get("format") != FORMAT:
        raise CheckpointError(f"{path} has checkpoint format {facts.get('format')!r}; this version reads {FORMAT}.")
    if facts["model"] != _model_name(estimator):
        raise CheckpointError(f"{path} is a checkpoint of {facts['model']}, not of {_model_name(estimator)}.")
    _require_same_params(estimator, facts["params"], path)
    if estimator.data_ and facts["data"] != estimator.data_:  # empty until a fit has looked at its data
        differing = [k for k in facts["data"] if facts["data"][k] != estimator.data_.get(k)]
        raise CheckpointError(
            f"{path} was written in training on other data: {differing} differ, it cannot be resumed."
        )
    estimator.network.load_state_dict(_part(tensors, "network."))
    _load_optimizer(estimator, _part(tensors, "optimizer."))
    torch.set_rng_state(tensors["rng.torch"])
    if estimator.device.type == "cuda" and "rng.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["rng.cuda"], estimator.device)
    kind, position, has_gauss, gauss = facts["numpy"]
    keys = tensors["rng.numpy"].numpy().astype(np.uint32)
    np.random.set_state((kind, keys, position, has_gauss, gauss))  # noqa: NPY002
    progress = estimator.progress_
    progress.records = facts["records"]
    progress.best_score, progress.best_epoch = facts["best_score"], facts["best_epoch"]
    progress.stop_steps, progress.finished = facts["stop_steps"], facts["finished"]
    estimator.restore_facts(facts.get("model_facts", {}))
    best = _part(tensors, "best.")
    progress.best_weights = {k: v.to(estimator.device) for k, v in best.items()} or None


def _model_name(estimator: BaseEstimator) -> str:
    return f"{type(estimator).__module__}.{type(estimator).__qualname__}"


def _require_same_params(estimator: BaseEstimator, saved: dict[str, Any], path: Path) -> None:
    """A resumed fit must be the same fit, except that it may run longer or elsewhere."""
    # of the model_path's weights the checkpoint has what became of them
    free = {"device", "n_epochs", "progress", "cuda_graphs", "GPU", "n_jobs", "model_path"}
    own = json.loads(json.dumps(estimator.get_params(), default=str))
    changed = [f"{k}: {saved[k]!r} -> {own.get(k)!r}" for k in saved if k not in free and saved[k] != own.get(k)]
    if changed:
        raise CheckpointError(f"{path} was written with other arguments ({'; '.join(changed)}): it cannot be resumed.")


def _load_optimizer(estimator: BaseEstimator, tensors: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        number, name = key.split(".", 1)
        state.setdefault(int(number), {})[name] = value
    current = estimator.train_optimizer.state_dict()
    estimator.train_optimizer.load_state_dict({"state": state, "param_groups": current["param_groups"]})


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}


def _storable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous copies where two names share memory (safetensors refuses aliases)."""
    seen: set[int] = set()
    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        value = tensor.detach().contiguous()
        if value.data_ptr() in seen and value.numel():
            value = value.clone()
        seen.add(value.data_ptr())
        out[name] = value
    return out
