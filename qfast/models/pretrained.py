"""Weights for the recurrent base of a graph attention network, from weight files, run folders or fitted models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from qfast.errors import CheckpointError, some
from qfast.training import checkpoint
from qfast.training.origin import RUN_WEIGHTS, weight_file

PARTS = ("rnn.", "fc_out.")  # prefixes of the parameters that Qlib loads from a base model
GATES = {"LSTM": 4, "GRU": 3}

__all__ = ["BaseWeights", "read_base", "select_base"]


@dataclass(frozen=True)
class BaseWeights:
    """Weights of a base model that fit a network.

    Attributes
    ----------
    tensors : dict
        Weights to load: all rnn.*, and the fc_out.* that the source has.
    source : str
        The file, or a description of the model that the weights come from.
    not_taken : list of str
        Further keys of the source, which are not loaded.
    absent : list of str
        fc_out.* keys that the source does not have.
    """

    tensors: dict[str, Tensor]
    source: str
    not_taken: list[str] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)

    def facts(self) -> dict[str, Any]:
        """The keys without the tensors, as JSON values for logs and manifests."""
        facts = asdict(self)
        facts.pop("tensors")
        return {"source": self.source, "taken": sorted(self.tensors), **facts}


def read_base(path: str | Path, network: nn.Module) -> BaseWeights:
    """Read the weights of a base model for `network`, without running code from the file.

    Parameters
    ----------
    path : path
        A state dict in torch's format, as Qlib writes it (.pkl, .pt, .bin), a .safetensors file, or a run folder, whose
        best weights are read.
    network : GATModel
        Determines the keys and shapes. It is not changed.

    Returns
    -------
    BaseWeights

    Raises
    ------
    CheckpointError
        The file is missing or damaged, the folder has no weights, an rnn.* is missing or has another shape, or a
        weight is not finite. The message lists the keys and, if possible, the arguments of a model that would fit.

    Source
    ------
    Qlib's GATs (pyqlib 0.9.7, qlib/contrib/model/pytorch_gats.py), which loads the base model in `fit`.

    Examples
    --------
    >>> import tempfile, torch
    >>> from qfast.nn import GATModel, LSTMModel
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     torch.save(LSTMModel(d_feat=20).state_dict(), Path(folder, "lstm.pkl"))
    ...     sorted(read_base(Path(folder, "lstm.pkl"), GATModel(d_feat=20, base_model="LSTM")).tensors)[:2]
    ['fc_out.bias', 'fc_out.weight']
    """
    file = weight_file(Path(path).expanduser(), "model_path")
    return select_base(checkpoint.read_tensors(file), network, str(file))


def select_base(tensors: Mapping[str, Tensor], network: nn.Module, source: str) -> BaseWeights:
    """Select the weights that `network` loads from the tensors of a base model.

    Parameters
    ----------
    tensors : mapping
        State dict of the base model.
    network : GATModel
    source : str
        Description of the origin, for messages.

    Raises
    ------
    CheckpointError
        As in `read_base`.
    """
    needed = {key: tuple(value.shape) for key, value in network.state_dict().items() if key.startswith(PARTS)}
    present = {key: tuple(value.shape) for key, value in tensors.items()}
    missing = [key for key in needed if key not in present and key.startswith("rnn.")]
    surplus = [key for key in present if key not in needed and key.startswith("rnn.")]  # the base has more layers
    shapes = [
        f"{key}: {present[key]}, needed {shape}" for key, shape in needed.items() if present.get(key, shape) != shape
    ]
    if missing or surplus or shapes:
        raise CheckpointError(
            f"{source} does not fit as the base: missing {_first(missing)}; surplus {_first(surplus)}; other shapes "
            f"{_first(shapes)}; it contains {_first(sorted(present))}.{_remedy(present, network)}"
        )
    broken = [key for key in needed if key in present and not bool(tensors[key].isfinite().all())]
    if broken:
        raise CheckpointError(f"{source} contains NaN or infinity in {broken}, so training cannot start from it.")
    return BaseWeights(
        {key: tensors[key] for key in needed if key in present},
        source,
        not_taken=sorted(key for key in present if key not in needed),
        absent=[key for key in needed if key not in present],
    )


def _first(keys: list[str]) -> str:
    return some(keys, most=3) or "none"


def _remedy(shapes: Mapping[str, tuple[int, ...]], network: nn.Module) -> str:
    """A sentence with the model arguments that fit the shapes of a file; empty if the shapes do not determine them."""
    inputs, states = shapes.get("rnn.weight_ih_l0", ()), shapes.get("rnn.weight_hh_l0", ())
    if len(inputs) != 2 or len(states) != 2 or states[1] == 0:
        return (
            " Remedy: the weights of an LSTM or GRU model (keys rnn.weight_ih_l0, ...). For a training checkpoint, use "
            f"the {RUN_WEIGHTS} in the same folder."
        )
    kind = next((name for name, gates in GATES.items() if gates * states[1] == states[0]), None)
    rnn = cast(nn.RNNBase, network.rnn)
    current = {
        "base_model": network.base_model,
        "d_feat": rnn.input_size,
        "hidden_size": rnn.hidden_size,
        "num_layers": rnn.num_layers,
    }
    layers = sum(key.startswith("rnn.weight_ih_l") for key in shapes)
    fitting = {"base_model": kind, "d_feat": inputs[1], "hidden_size": states[1], "num_layers": layers}
    changes = [f"{name}={value!r} (now {current[name]!r})" for name, value in fitting.items() if value != current[name]]
    return f" Remedy: build the model with {', '.join(changes)}, or use another file." if kind and changes else ""
