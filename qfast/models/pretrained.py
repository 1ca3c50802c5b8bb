"""Reading the recurrent base of a graph attention network: from weight files, run folders or a fitted model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from qfast.errors import CheckpointError, some
from qfast.training import checkpoint

PARTS = ("rnn.", "fc_out.")  # what the reference takes of a base
GATES = {"LSTM": 4, "GRU": 3}
RUN_WEIGHTS = "best.safetensors"  # of a run folder

__all__ = ["BaseWeights", "read_base"]


@dataclass(frozen=True)
class BaseWeights:
    """Weights of a base that fit a network, and what was done with each of the source's.

    Attributes
    ----------
    tensors : dict
        What is taken: all rnn.*, and fc_out.* where the source has it.
    source : str
        File, or what else the weights come from.
    not_taken : list of str
        Other keys of the source.
    absent : list of str
        fc_out.* keys that the source does not have.
    """

    tensors: dict[str, Tensor]
    source: str
    not_taken: list[str] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)

    def facts(self) -> dict[str, Any]:
        """For logs and manifests, as JSON can hold it."""
        found = asdict(self)
        found.pop("tensors")
        return {"source": self.source, "taken": sorted(self.tensors), **found}


def read_base(path: str | Path, network: nn.Module) -> BaseWeights:
    """The weights in `path` that `network` takes as its base.

    Parameters
    ----------
    path : path
        A state dict as the reference writes it (.pkl, .pt, .bin; read without running code), a .safetensors file, or
        a run folder, whose best weights are taken.
    network : GATModel
        Says which shapes are needed; it is not changed.

    Raises
    ------
    CheckpointError
        No such file, a damaged one, a folder without weights; an rnn.* that is missing or of another shape: all are
        named, with the arguments under which the file would fit.

    Examples
    --------
    >>> import tempfile, torch
    >>> from qfast.nn import GATModel, LSTMModel
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     torch.save(LSTMModel(d_feat=20).state_dict(), Path(folder, "lstm.pkl"))
    ...     sorted(read_base(Path(folder, "lstm.pkl"), GATModel(d_feat=20, base_model="LSTM")).tensors)[:2]
    ['fc_out.bias', 'fc_out.weight']
    """
    file = _weight_file(Path(path).expanduser())
    return chosen(checkpoint.read_tensors(file), network, str(file))


def chosen(tensors: Mapping[str, Tensor], network: nn.Module, source: str) -> BaseWeights:
    """What `network` takes of the tensors of a base; raises as `read_base` does."""
    own = {key: tuple(value.shape) for key, value in network.state_dict().items() if key.startswith(PARTS)}
    found = {key: tuple(value.shape) for key, value in tensors.items()}
    missing = [key for key in own if key not in found and key.startswith("rnn.")]
    surplus = [key for key in found if key not in own and key.startswith("rnn.")]  # a deeper base
    shapes = [f"{key}: {found[key]}, needed {own[key]}" for key in own if found.get(key, own[key]) != own[key]]
    if missing or surplus or shapes:
        raise CheckpointError(
            f"{source} does not fit as the base: missing {_named(missing)}; too many {_named(surplus)}; other shapes "
            f"{_named(shapes)}; it holds {_named(sorted(found))}.{_remedy(found, network)}"
        )
    broken = [key for key in own if key in found and not bool(tensors[key].isfinite().all())]
    if broken:
        raise CheckpointError(f"{source} holds NaN or infinity in {broken}: nothing can be trained from there.")
    return BaseWeights(
        {key: tensors[key] for key in own if key in found},
        source,
        not_taken=sorted(key for key in found if key not in own),
        absent=[key for key in own if key not in found],
    )


def _named(keys: list[str]) -> str:
    return some(keys, most=3) or "none"


def _weight_file(path: Path) -> Path:
    if not path.is_dir():
        return path
    file = path / RUN_WEIGHTS
    if file.is_file():
        return file
    try:
        status = json.loads((path / "manifest.json").read_text(encoding="utf-8"))["status"]
        why = f"its run is {status!r} and has written none yet"
    except (OSError, ValueError, KeyError, TypeError):
        why = "and it is no run folder"
    raise CheckpointError(
        f"model_path {str(path)!r} is a folder without {RUN_WEIGHTS}: {why}. Remedy: give a weight file, or the folder "
        "of a run that has trained at least one epoch."
    )


def _remedy(found: Mapping[str, tuple[int, ...]], network: Any) -> str:
    """The model's arguments under which the file would fit, as a sentence; empty where its shapes say nothing."""
    inputs, states = found.get("rnn.weight_ih_l0", ()), found.get("rnn.weight_hh_l0", ())
    if len(inputs) != 2 or len(states) != 2 or states[1] == 0:
        return (
            " Remedy: give the weights of an LSTM or GRU model (keys rnn.weight_ih_l0, ...); of a training checkpoint "
            f"the {RUN_WEIGHTS} beside it."
        )
    kind = next((name for name, gates in GATES.items() if gates * states[1] == states[0]), None)
    rnn = network.rnn
    own = {"base_model": network.base_model, "d_feat": rnn.input_size, "hidden_size": rnn.hidden_size,
           "num_layers": rnn.num_layers}  # fmt: skip
    layers = sum(key.startswith("rnn.weight_ih_l") for key in found)
    wanted = {"base_model": kind, "d_feat": inputs[1], "hidden_size": states[1], "num_layers": layers}
    changes = [f"{name}={value!r} (now {own[name]!r})" for name, value in wanted.items() if value != own[name]]
    return f" Remedy: build the model with {', '.join(changes)}, or give another file." if kind and changes else ""
