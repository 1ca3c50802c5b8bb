"""Weights and checkpoints on disk, in one file each, which appears complete or not at all.

Reading a file never runs code from it.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from qfast.errors import CheckpointError, QfastError, shown, some, suggest
from qfast.files import atomic_write
from qfast.tensor_files import read_metadata, require_intact, write_checked
from qfast.training.overrides import name_of

if TYPE_CHECKING:
    from qfast.training.base import BaseEstimator

FORMAT = 1
DAMAGE = (KeyError, TypeError, ValueError, AttributeError, RuntimeError, IndexError, OverflowError, RecursionError)
FACTS = "qfast"  # key of the metadata: everything in a checkpoint that is not a tensor

__all__ = [
    "DAMAGE",
    "fitting_state",
    "load_fit",
    "load_optimizer",
    "load_weights",
    "matching_state",
    "optimizer_tensors",
    "part",
    "read_safetensors",
    "read_tensors",
    "save_fit",
    "save_weights",
    "write_tensors",
]


def save_weights(network: nn.Module, path: Path) -> None:
    """Write a network's state dict: as safetensors if the file ends in .safetensors, otherwise in torch's format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = network.state_dict()
    if path.suffix == ".safetensors":
        write_tensors(path, state)
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
        The file is missing, damaged or not a state dict, a weight is not finite or has another kind of dtype, or the
        file belongs to another network. In that case the message lists the missing and unexpected keys and those with
        another shape.
    """
    return fitting_state(network, read_tensors(path), path)


def fitting_state(network: nn.Module, state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Check that the tensors of a file are the weights of a network, and return them under the network's names.

    Parameters
    ----------
    network : nn.Module
    state : dict
        State dict of the file `path`.
    path : Path
        For messages.

    Raises
    ------
    CheckpointError
        As in `matching_state`.
    """
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
    _require_usable(state, current, path)
    return state


def _require_usable(state: Mapping[str, Tensor], current: Mapping[str, Tensor], path: Path) -> None:
    """Refuse weights that the network would convert to other values, or that make every result NaN."""
    _require_same_kinds(state, current, path)
    broken = [key for key in current if state[key].is_floating_point() and not bool(state[key].isfinite().all())]
    if broken:
        raise CheckpointError(
            f"{path} contains NaN or infinity in {some(broken, 4)}, so every result would be NaN. Remedy: other "
            "weights, for example those of an earlier epoch."
        )


def _require_same_kinds(state: Mapping[str, Tensor], current: Mapping[str, Tensor], path: Path) -> None:
    kinds = [
        f"{key}: file {state[key].dtype}, network {value.dtype}"
        for key, value in current.items()
        if _kind(state[key]) != _kind(value)
    ]
    if kinds:
        raise CheckpointError(
            f"{path} has weights of another type: {some(kinds, 4)}. Remedy: a file with floating-point weights."
        )


def _kind(tensor: Tensor) -> str:
    if tensor.is_complex():
        return "complex"
    return "floating" if tensor.is_floating_point() else "integer"


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a .safetensors file or of a state dict in torch's format to the CPU.

    Raises
    ------
    CheckpointError
        The file is missing, damaged, or something other than a state dict.
    """
    if not path.is_file():
        raise CheckpointError(f"weight file {path} does not exist.")
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    try:
        _require_intact_archive(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the reader raises many types for damaged files
        raise _unreadable(path, error) from None
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise CheckpointError(f"{path} contains {type(state).__name__}, not a state dict of tensors.")
    return dict(state)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a file in the safetensors format to the CPU.

    Raises
    ------
    CheckpointError
        The file is damaged.
    """
    require_intact(path)
    try:
        return safetensors.torch.load_file(path, device="cpu")
    except Exception as error:  # the reader raises many types for damaged files
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{path} is not a readable weight file, it may be truncated ({type(error).__name__}: {error}). Remedy: "
        "restore the file from a copy."
    )


def _require_intact_archive(path: Path) -> None:
    """Compare the parts of a file in torch's format with their CRC-32, which torch.load ignores."""
    if not zipfile.is_zipfile(path):  # the format of old versions of torch, which has no checksums
        return
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"{damaged!r} in it does not match its CRC-32")


def save_fit(estimator: BaseEstimator, path: Path) -> None:
    """Write the state of a running fit: weights, best weights, optimizer, random generators and records."""
    progress = estimator.progress_
    tensors = {f"network.{k}": v for k, v in estimator.network.state_dict().items()}
    tensors |= {f"best.{k}": v for k, v in (progress.best_weights or {}).items()}
    tensors |= optimizer_tensors(estimator)
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
    write_tensors(path, tensors, {FACTS: json.dumps(facts, default=_text)})


def load_fit(estimator: BaseEstimator, path: Path) -> None:
    """Restore the state that `save_fit` has written, including the global random generators.

    Raises
    ------
    CheckpointError
        The file is missing or damaged, or was written by another model, with other arguments or on other data.
    """
    tensors = read_tensors(path)
    text = read_metadata(path).get(FACTS)
    if text is None:
        raise CheckpointError(
            f"{path} contains weights but no training state. Remedy: pass the run's last.safetensors."
        )
    try:
        _restore(estimator, tensors, json.loads(text), path)
    except QfastError:
        raise
    except DAMAGE as error:
        raise CheckpointError(
            f"{path} cannot be used: its training state is incomplete ({type(error).__name__}: "
            f"{shown(str(error), 200)}). Remedy: restore the file from a copy, or start a new run."
        ) from None


def _restore(estimator: BaseEstimator, tensors: dict[str, Tensor], facts: dict[str, Any], path: Path) -> None:
    """Set the state of an estimator and of the random generators."""
    if facts.get("format") != FORMAT:
        raise CheckpointError(f"{path} has checkpoint format {facts.get('format')!r}; this version reads {FORMAT}.")
    if facts["model"] != _model_name(estimator):
        raise CheckpointError(f"{path} is a checkpoint of {facts['model']}, not of {_model_name(estimator)}.")
    _require_same_params(estimator, facts["params"], path)
    if not isinstance(facts["data"], dict):
        raise TypeError(f"'data' must be a mapping, got {shown(facts['data'])}")
    if estimator.data_ and facts["data"] != estimator.data_:  # empty before a fit has loaded its data
        differing = [k for k in facts["data"] if facts["data"][k] != estimator.data_.get(k)]
        raise CheckpointError(
            f"{path} was written in training on other data: {differing} differ, so it cannot be resumed."
        )
    weights = part(tensors, "network.")
    estimator.network.load_state_dict(weights)
    _require_same_kinds(weights, estimator.network.state_dict(), path)
    load_optimizer(estimator, part(tensors, "optimizer."))
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
    best = part(tensors, "best.")
    if best:
        _require_same_kinds(best, estimator.network.state_dict(), path)
    progress.best_weights = {k: v.to(estimator.device) for k, v in best.items()} or None


def _model_name(estimator: BaseEstimator) -> str:
    return f"{type(estimator).__module__}.{type(estimator).__qualname__}"


def _require_same_params(estimator: BaseEstimator, saved: dict[str, Any], path: Path) -> None:
    """Check that a resumed fit has the arguments of the saved one, except for its length, device and display."""
    # The checkpoint already contains the trained weights, so model_path may differ. train_score changes no weight.
    free = {"device", "n_epochs", "progress", "cuda_graphs", "GPU", "n_jobs", "model_path", "train_score"}
    current = json.loads(json.dumps(estimator.get_params(), default=_text))
    saved = {"precision": "float32", **saved}  # checkpoints of earlier versions lack it
    changed = [f"{k}: {v!r} -> {current.get(k)!r}" for k, v in saved.items() if k not in free and v != current.get(k)]
    if changed:
        raise CheckpointError(
            f"{path} was written with other arguments ({'; '.join(changed)}), so it cannot be resumed."
        )


def _text(value: object) -> str:
    """A value that JSON does not have, as text. Functions have the same name in every process."""
    return name_of(value) if callable(value) else str(value)


def optimizer_tensors(estimator: BaseEstimator) -> dict[str, Tensor]:
    """The tensors of the optimizer's state, as optimizer.<number of the parameter>.<name>."""
    tensors: dict[str, Tensor] = {}
    for number, entries in estimator.train_optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{k}": v for k, v in entries.items() if isinstance(v, Tensor)}
    return tensors


def load_optimizer(estimator: BaseEstimator, tensors: Mapping[str, Tensor]) -> None:
    """Restore the optimizer's state from the tensors of `optimizer_tensors`, without their first prefix."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        number, name = key.split(".", 1)
        state.setdefault(int(number), {})[name] = value
    current = estimator.train_optimizer.state_dict()
    expected = {number for group in current["param_groups"] for number in group["params"]}
    names = {frozenset(entries) for entries in state.values()}
    if not set(state) <= expected or len(names) > 1:  # parameters without a gradient have no state
        raise ValueError(f"the optimizer's state of some of the {len(expected)} parameters is incomplete")
    estimator.train_optimizer.load_state_dict({"state": state, "param_groups": current["param_groups"]})


def part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with a prefix, without the prefix."""
    return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file with a checksum. It appears complete or not at all."""
    storable = _storable(tensors)
    write_checked(path, lambda target, entries: safetensors.torch.save_file(storable, target, entries), metadata)


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
