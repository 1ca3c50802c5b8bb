"""The structure of manifest.json, model.json and model files, which is checked when they are read.

Entries that are not listed here are allowed and kept. Every listed entry may be missing unless a file needs it, because
earlier versions did not write all of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qfast.errors import QfastError, shown

__all__ = ["EstimatorFacts", "Manifest", "ModelFacts", "require_structure"]

RESTORE = "Remedy: restore the file from a copy, or start a new run."


class _Facts(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True, protected_namespaces=())


class _DataFacts(_Facts):
    source: str | None = None
    given: Literal["path", "memory", "config"] | None = None
    hash: str | None = None
    rows: int | None = None
    instruments: int | None = None
    first: str | None = None
    last: str | None = None
    label: str | None = None
    read_options: dict[str, Any] | None = None


class _Code(_Facts):
    path: str
    files: dict[str, str]


class _Origin(_Facts):
    source: str
    sha256: str


class _Pretraining(_Facts):
    model: str
    epochs: int
    best_epoch: int | None
    seconds: float


class _Base(_Facts):
    source: str
    taken: list[str]
    not_taken: list[str]
    absent: list[str]


class Manifest(_Facts):
    """manifest.json of a run."""

    status: str
    experiment: str | None = None
    error: str | None = None
    started: str | None = None
    ended: str | None = None
    stage: str | None = None
    device: str | None = None
    seed: int | None = None
    directory: str = ""
    notes: list[str] = Field(default_factory=list)
    versions: dict[str, str] = Field(default_factory=dict)
    weights: dict[str, str] = Field(default_factory=dict)
    data: _DataFacts = Field(default_factory=_DataFacts)
    code: list[_Code] | None = None
    init_from: _Origin | dict[str, str] | None = None
    pretrain: _Pretraining | None = None
    pretrained: _Base | None = None


class _Class(_Facts):
    class_: str = Field(alias="class")
    module_path: str | None = None
    kwargs: dict[str, Any] = Field(default_factory=dict)


class ModelFacts(_Facts):
    """model.json of a run."""

    format: int
    model: _Class
    dataset: _Class
    handler: _Class
    processors: dict[str, list[_Class]]
    columns: list[str]
    raw_columns: list[str] | None = None
    source_columns: list[str] | None = None
    short_history: float = 0.0
    start: str | None = None
    instruments: str | list[str] | dict[str, Any] | None = None


class EstimatorFacts(_Facts):
    """The JSON text of a model file."""

    format: int
    model: _Class
    functions: dict[str, str]
    fitted: bool
    data: dict[str, Any]
    records: list[dict[str, float]]
    best_score: float
    best_epoch: int | None
    optimizer: str
    model_facts: dict[str, Any] | None
    origin: dict[str, str]


def require_structure(kind: type[BaseModel], content: object, file: Path, error: type[QfastError]) -> None:
    """Check the content of a JSON file.

    Parameters
    ----------
    kind : class
        Manifest or ModelFacts.
    content : object
    file : Path
        For the message.
    error : class
        The error to raise.

    Raises
    ------
    QfastError
        Names the first entry that is missing or has another type.

    Examples
    --------
    >>> from qfast.errors import ConfigError
    >>> require_structure(Manifest, {"status": 3}, Path("manifest.json"), ConfigError)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    qfast.errors.ConfigError: manifest.json: 'status': Input should be a valid string, got 3. Remedy: restore the ...
    """
    try:
        kind.model_validate(content)
    except ValidationError as problems:
        first = problems.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "the content"
        raise error(f"{file}: {place!r}: {first['msg']}, got {shown(first['input'])}. {RESTORE}") from None
