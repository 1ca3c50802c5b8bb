"""The structure of a workflow file: keys, types and dates, as pydantic models."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
)

from qfast._renamed import renamed_names
from qfast.dates import normal_date, starts_after
from qfast.errors import shown

__all__ = ["DatasetSpec", "HandlerSpec", "Spec", "Task", "Workflow", "as_list"]

__getattr__ = renamed_names(
    __name__,
    {
        "check_model": "qfast.workflow.validation.check_model",
        "check_workflow": "qfast.workflow.validation.check_workflow",
        "register_all": "qfast.workflow.validation.register_all",
    },
)


def _segment(value: object) -> list[str | None]:
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise ValueError(f"expected [start, end], got {value!r}")
    start, end = (normal_date(v) for v in value)
    if start is not None and end is not None and starts_after(start, end):
        raise ValueError(f"the start {start} is after the end {end}")
    return [start, end]


def _none_to_empty(value: object) -> object:
    return {} if value is None else value


When = Annotated[str | None, BeforeValidator(normal_date)]
Segment = Annotated[list[str | None], BeforeValidator(_segment)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class Spec(_Model):
    """Description of an object: its class, a module path of the class, and keyword arguments."""

    class_: str = Field(alias="class", min_length=1)
    module_path: str | None = None
    kwargs: Annotated[dict[str, Any], BeforeValidator(_none_to_empty)] = {}

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: object) -> object:
        if isinstance(value, str) and value.startswith("file://"):
            raise ValueError(
                f"pickled objects are not supported, got {value!r}; describe the object by class and kwargs, "
                "or use --engine qlib"
            )
        return {"class": value} if isinstance(value, str) else value

    def description(self) -> dict[str, Any]:
        """The description as plain data, for a registry. Keys that the file omits are omitted."""
        return self.model_dump(by_alias=True, exclude_unset=True)


def _empty_to_list(value: object) -> object:
    return [] if isinstance(value, Mapping) and not value else value  # people write {} for no processors


def _require_text(instruments: object) -> None:
    """Refuse instruments that YAML has read as numbers, which lose their leading zeros."""
    numbers = [item for item in instruments if not isinstance(item, str)] if isinstance(instruments, list) else []
    if numbers:
        raise ValueError(
            f"instruments must be text, but YAML reads an unquoted code as the {type(numbers[0]).__name__} "
            f"{numbers[0]!r}. Quote the codes, for example ['000001', '600519']"
        )


Processors = Annotated[list[Spec] | None, BeforeValidator(_empty_to_list)]


class HandlerKwargs(_Model):
    """Arguments of a handler: dates and processors are checked here, the others against the handler's signature."""

    model_config = ConfigDict(extra="allow")
    start_time: When = None
    end_time: When = None
    fit_start_time: When = None
    fit_end_time: When = None
    shared_processors: Processors = None
    infer_processors: Processors = None
    learn_processors: Processors = None

    @model_validator(mode="before")
    @classmethod
    def _codes_are_text(cls, value: object) -> object:
        if isinstance(value, Mapping):
            _require_text(value.get("instruments"))
        return value


class HandlerSpec(Spec):
    """Description of a handler."""

    kwargs: Annotated[HandlerKwargs, BeforeValidator(_none_to_empty)] = HandlerKwargs()  # type: ignore[assignment]


class DatasetKwargs(_Model):
    """Arguments of a dataset: handler and segments, and others that are checked against the dataset's signature."""

    model_config = ConfigDict(extra="allow")
    handler: HandlerSpec
    segments: dict[str, Segment]


class DatasetSpec(Spec):
    """Description of a dataset."""

    kwargs: DatasetKwargs  # type: ignore[assignment]


def as_list(value: object) -> object:
    """One description as a list of one; None as an empty list."""
    return [] if value is None else [value] if isinstance(value, (dict, str)) else value


def _pretrain_block(value: object) -> object:
    if value is False or isinstance(value, Mapping):
        return value
    raise ValueError(
        f"expected a mapping of training arguments of the base model such as {{n_epochs: 20}}, got {shown(value)}; "
        "write {} for its defaults, or omit the key (or write false) to train without it"
    )


class Task(_Model):
    """The model, its dataset and its records. As in Qlib, other keys are allowed.

    Two keys are extensions of qfast. `pretrain` contains training arguments of the base model, which is trained before
    the model. `init_from` is a run folder or a weight file whose weights the training starts from.
    """

    model_config = ConfigDict(extra="allow", protected_namespaces=())
    model: Spec
    dataset: DatasetSpec
    record: Annotated[list[Spec], BeforeValidator(as_list)] = []
    reweighter: Spec | None = None
    pretrain: Annotated[dict[str, Any] | Literal[False], BeforeValidator(_pretrain_block)] = False
    init_from: Annotated[str, Field(min_length=1)] | None = None


def _lower(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


class QlibInit(_Model):
    """Arguments of `qlib.init`. Only `provider_uri` and `region` have an effect."""

    model_config = ConfigDict(extra="allow")
    provider_uri: str | dict[str, str] | None = None
    region: Annotated[Literal["cn", "us", "tw"], BeforeValidator(_lower)] = "cn"


class Workflow(_Model):
    """A checked workflow file. Other top-level keys (market, anchors, ...) are allowed and preserved."""

    model_config = ConfigDict(extra="allow")
    task: Task
    qlib_init: Annotated[QlibInit, BeforeValidator(_none_to_empty)] = QlibInit()
    experiment_name: str = "workflow"

    def resolved(self) -> dict[str, Any]:
        """The workflow as plain data, with dates as ISO text."""
        values = self.model_dump(by_alias=True, exclude_unset=True)
        return {name: _plain(value) for name, value in values.items()}


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value.isoformat() if isinstance(value, dt.date) else value
