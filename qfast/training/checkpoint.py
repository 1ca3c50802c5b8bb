"""Weights and checkpoints on disk, in one file each, which appears complete or not at all.

Reading a file never runs code from it.
"""

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
from qfast.training.overrides import name_of

if TYPE_CHECKING:
    from qfast.training.base import BaseEstimator

FORMAT = 1

__all__ = ["load_fit", "load_weights", "matching_state", "read_tensors", "save_fit", "save_weights"]


def save_weights(network: nn.Module, path: Path) -> None:
    """Write a network's state dict: as safetensors if the file ends in .safetensors, otherwise in torch's format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = network.state_dict()
    if path.suffix == ".safetensors":
        atomic_write(path, lambda target: safetensors.torch.save_file(_storable(state), target))
    else:
        atomic_write(path, lambda target: torch.save(state, target))


def load_weights(network: nn.Module, path: Path) -> None:
    """Read weights into a network. All keys and shapes must match.

    Parameters
    ----------
    network : nn.Module
    path : path
        A .safetensors file or a state dict in torch's format.

    Raises
    ------
    CheckpointError
        As in `matching_state`.
    """
    network.load_state_dict(matching_state(network, path))


def matching_state(network: nn.Module, path: Path) -> dict[str, Tensor]:
    """Read the weights of a file, whose keys and shapes must be those of a network. The network is not changed.

    Parameters
    ----------
    network : nn.Module
    path : path
        As in `load_weights`.

    Returns
    -------
    dict
        State dict of the network, on the CPU.

    Raises
    ------
    CheckpointError
        The file is missing, truncated or not a state dict, or it belongs to another network. In that case the message
        lists the missing and unexpected keys and those with another shape.
    """
    state = read_tensors(path)
    # Networks that accept several names for a parameter. `own_names` is the old name of the method.
    rename = getattr(network, "translate_state_dict", None) or getattr(network, "own_names", None)
    if callable(rename):
        try:
            state = rename(state)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from None
    current = network.state_dict()
    missing, extra = sorted(set(current) - set(state)), sorted(set(state) - set(current))
    shapes = [
        f"{k}: file {tuple(state[k].shape)}, network {tuple(current[k].shape)}"
        for k in current
        if k in state and state[k].shape != current[k].shape
    ]
    if missing or extra or shapes:
        hint = suggest(extra[0], current) if extra else ""
        raise CheckpointError(
            f"{path} does not fit {type(network).__name__}: missing {missing or 'none'}, unexpected {extra or 'none'}, "
            f"other shapes {shapes or 'none'}.{hint} Remedy: build the model with the arguments it was trained with."
        )
    return state


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a .safetensors file or of a state dict in torch's format to the CPU.

    Raises
    ------
    CheckpointError
        The file is missing, damaged, or something other than a state dict.
    """
    if not path.is_file():
        raise CheckpointError(f"weight file {path} does not exist.")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path, device="cpu")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the readers raise many types for damaged files
        raise CheckpointError(f"{path} is not a readable weight file, it may be truncated ({error}).") from None
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise CheckpointError(f"{path} contains {type(state).__name__}, not a state dict of tensors.")
    return dict(state)


def save_fit(estimator: BaseEstimator, path: Path) -> None:
    """Write the state of a running fit: weights, best weights, optimizer, random generators and records."""
    progress = estimator.progress_
    tensors = {f"network.{k}": v for k, v in estimator.network.state_dict().items()}
    tensors |= {f"best.{k}": v for k, v in (progress.best_weights or {}).items()}
    optimizer = estimator.train_optimizer.state_dict()
    for number, entries in optimizer["state"].items():
        tensors |= {f"optimizer.{number}.{k}": v for k, v in entries.items() if isinstance(v, Tensor)}
    tensors["rng.torch"] = torch.get_rng_state()
    if estimator.device.type == "cuda":
        tensors["rng.cuda"] = torch.cuda.get_rng_state(estimator.device)
    kind, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002 - the source of batch orders
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
        "origin": estimator.origin_,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"qfast": json.dumps(facts, default=_text)}
    atomic_write(path, lambda target: safetensors.torch.save_file(_storable(tensors), target, metadata=metadata))


def load_fit(estimator: BaseEstimator, path: Path) -> None:
    """Restore the state that `save_fit` has written, including the global random generators.

    Raises
    ------
    CheckpointError
        The file is missing or damaged, or was written by another model, with other arguments or on other data.
    """
    tensors = read_tensors(path)
    with safetensors.safe_open(path, framework="pt") as file:
        text = (file.metadata() or {}).get("qfast")
    if text is None:
        raise CheckpointError(
            f"{path} contains weights but no training state. Remedy: pass the run's last.safetensors."
        )
    facts = json.loads(text)
    if facts.get("format") != FORMAT:
        raise CheckpointError(f"{path} has checkpoint format {facts.get('format')!r}; this version reads {FORMAT}.")
    if facts["model"] != _model_name(estimator):
        raise CheckpointError(f"{path} is a checkpoint of {facts['model']}, not of {_model_name(estimator)}.")
    _require_same_params(estimator, facts["params"], path)
    if estimator.data_ and facts["data"] != estimator.data_:  # empty before a fit has loaded its data
        differing = [k for k in facts["data"] if facts["data"][k] != estimator.data_.get(k)]
        raise CheckpointError(
            f"{path} was written in training on other data: {differing} differ, so it cannot be resumed."
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
    estimator.origin_ = facts.get("origin", {})
    best = _part(tensors, "best.")
    progress.best_weights = {k: v.to(estimator.device) for k, v in best.items()} or None


def _model_name(estimator: BaseEstimator) -> str:
    return f"{type(estimator).__module__}.{type(estimator).__qualname__}"


def _require_same_params(estimator: BaseEstimator, saved: dict[str, Any], path: Path) -> None:
    """Check that a resumed fit has the arguments of the saved one, except for its length, device and display."""
    # The checkpoint already contains the trained weights, so model_path may differ. train_score changes no weight.
    free = {"device", "n_epochs", "progress", "cuda_graphs", "GPU", "n_jobs", "model_path", "train_score"}
    current = json.loads(json.dumps(estimator.get_params(), default=_text))
    changed = [f"{k}: {v!r} -> {current.get(k)!r}" for k, v in saved.items() if k not in free and v != current.get(k)]
    if changed:
        raise CheckpointError(
            f"{path} was written with other arguments ({'; '.join(changed)}), so it cannot be resumed."
        )


def _text(value: object) -> str:
    """A value that JSON does not have, as text. Functions have the same name in every process."""
    return name_of(value) if callable(value) else str(value)


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
    """Contiguous tensors, copied where two names share memory, which safetensors does not allow."""
    seen: set[int] = set()
    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        value = tensor.detach().contiguous()
        if value.data_ptr() in seen and value.numel():
            value = value.clone()
        seen.add(value.data_ptr())
        out[name] = value
    return out
