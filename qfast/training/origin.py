"""The run or weight file whose weights a fit starts from (`fit(init_from=...)`)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qfast.errors import CheckpointError, DataError
from qfast.files import file_hash
from qfast.training import checkpoint

if TYPE_CHECKING:
    import os

    from qfast.training.base import BaseEstimator

RUN_WEIGHTS = "best.safetensors"  # weight file of a run folder
RUN_MODEL = "model.json"  # the class and the arguments of a run's model
FREE = ("dropout",)  # arguments of a network that do not change what its weights mean

__all__ = ["Origin", "read_origin", "weight_file"]


@dataclass(frozen=True)
class Origin:
    """Weights that have been checked for one estimator.

    Attributes
    ----------
    run : Path
        The run folder, or the weight file; absolute.
    file : Path
        The weight file.
    sha256 : str
        Hash of the file.
    model : str
        Class of the run's model; "" for a weight file.
    columns : list of str
        Feature columns of the run; empty for a weight file.
    """

    run: Path
    file: Path
    sha256: str
    model: str = ""
    columns: list[str] = field(default_factory=list)

    def facts(self) -> dict[str, str]:
        """Source, hash and class, as JSON values for manifests and checkpoints."""
        return {"source": str(self.file), "sha256": self.sha256, "model": self.model}

    def require_order(self, columns: Sequence[str]) -> None:
        """Raise a DataError if the data has the feature columns of the run in another order."""
        if list(columns) != self.columns and sorted(columns) == sorted(self.columns):
            raise DataError(
                f"the dataset has the feature columns of init_from={str(self.file)!r} in another order, so its weights "
                f"would read other features: {list(columns)[:4]}... instead of {self.columns[:4]}... Remedy: reorder "
                "the columns."
            )


def read_origin(path: str | os.PathLike[str], estimator: BaseEstimator) -> Origin:
    """Check that the weights of a run, or of a weight file, fit an estimator. The estimator is not changed.

    Parameters
    ----------
    path : path
        A run folder, whose best weights are read, or a weight file as in `Estimator.load_weights`.
    estimator : Estimator

    Returns
    -------
    Origin

    Raises
    ------
    CheckpointError
        The path does not exist, the folder has no weights, the file is damaged, the run's model has other arguments or
        another architecture, or a weight is not finite. The message lists all of these arguments and keys.

    Examples
    --------
    >>> import tempfile
    >>> from qfast.models import GRU
    >>> file = Path(tempfile.mkdtemp(), "gru.safetensors")
    >>> GRU(d_feat=3, hidden_size=4, seed=0).save_weights(file)
    >>> read_origin(file, GRU(d_feat=3, hidden_size=4)).file.name
    'gru.safetensors'
    """
    source = Path(path).expanduser().absolute()
    file = weight_file(source, "init_from")
    facts = _model_facts(source)
    kwargs = facts.get("kwargs", {})
    current = estimator.get_params()
    compared = [name for name in estimator._network_names if name not in FREE and name in kwargs]
    differing = [f"{n}={kwargs[n]!r} (now {current[n]!r})" for n in compared if kwargs[n] != _plain(current[n])]
    if differing:
        raise CheckpointError(
            f"init_from {str(source)!r} is a run of {facts.get('class')} with {', '.join(differing)}. Remedy: build "
            f"{type(estimator).__name__} with these arguments, or start from another run."
        )
    checkpoint.matching_state(estimator.network, file)  # raises if a weight does not fit or is not finite
    columns = facts.get("columns", [])
    names = [column for column in columns if isinstance(column, str)]
    return Origin(source, file, file_hash(file), str(facts.get("class", "")), names)


def weight_file(path: Path, argument: str) -> Path:
    """The weight file of a run folder; any other path unchanged.

    Parameters
    ----------
    path : Path
    argument : str
        Name of the argument that contains the path, for messages.

    Raises
    ------
    CheckpointError
        A folder without weights.
    """
    if not path.is_dir():
        return path
    file = path / RUN_WEIGHTS
    if file.is_file():
        return file
    try:
        status = json.loads((path / "manifest.json").read_text(encoding="utf-8"))["status"]
        reason = f"its run is {status!r} and has not written any yet"
    except (OSError, ValueError, KeyError, TypeError):
        reason = "it is not a run folder"
    raise CheckpointError(
        f"{argument} {str(path)!r} is a folder without {RUN_WEIGHTS}: {reason}. Remedy: a weight file, or the folder "
        "of a run that has trained at least one epoch."
    )


def _model_facts(path: Path) -> dict[str, Any]:
    """Class, arguments and feature columns of the model of a run folder; empty for a weight file."""
    file = path / RUN_MODEL
    if not file.is_file():
        return {}
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
        return {**facts["model"], "columns": facts.get("columns", [])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{str(file)!r} cannot be read: {type(error).__name__}: {error}.") from None


def _plain(value: object) -> object:
    """A value as JSON represents it."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
