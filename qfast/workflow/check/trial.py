"""A small version of the workflow's dataset that can be rebuilt from changed prices or factors."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from qfast import registry
from qfast.data.expression import instruments
from qfast.data.handlers.prices import priced_handler
from qfast.data.panel import Panel
from qfast.data.prices import Prices
from qfast.data.protocols import Bounds, Handler, HandlerDataset
from qfast.data.rows import restrict_rows
from qfast.workflow.dataset import source_argument as handler_source_argument
from qfast.workflow.schema import Workflow

if TYPE_CHECKING:
    from qfast.training.estimator import Estimator

__all__ = [
    "STAGES",
    "Trial",
    "build_model",
    "feature_source",
    "named_instruments",
    "rebuild_dataset",
    "source_argument",
    "untrained_model",
]

SAMPLE = 60  # instruments of the experiments, in addition to those that expressions name
STAGES = ("shared", "infer")  # learn processors do not affect scores
SOURCE_ARGUMENTS = ("instruments", "cache", "data", "provider_uri", "source")  # of a handler


@dataclass
class Trial:
    """The dataset of a workflow on a sample of the instruments, with an untrained model.

    Attributes
    ----------
    workflow : Workflow
    source : Panel
        Prices or factors of the sample, from which `rebuild_dataset` builds another dataset.
    dataset : DatasetH
    model : Estimator
        With its initial weights.
    """

    workflow: Workflow
    source: Panel
    dataset: HandlerDataset
    model: Estimator

    @classmethod
    def of(cls, workflow: Workflow, dataset: HandlerDataset, source: Panel) -> Trial:
        """Select the sample from `source` and build its dataset."""
        names = [str(name) for name in dataset.handler.panel("infer").instruments]
        sampled = [*names[:: -(-len(names) // SAMPLE)], *named_instruments(dataset.handler)]
        wanted = {name.lower() for name in sampled}
        sample = restrict_rows(source, [n for n in source.instruments if str(n).lower() in wanted], None, None)
        return cls(workflow, sample, rebuild_dataset(workflow, sample), untrained_model(workflow))

    @property
    def size(self) -> str:
        """Text for findings: "(12 instruments)"."""
        return f"({len(self.dataset.handler.panel('infer').instruments)} instruments)"


def named_instruments(handler: Handler) -> list[str]:
    """Instruments that the expressions of a handler name."""
    priced = priced_handler(handler)
    if priced is None:
        return []
    return [name for text in (*priced.feature_expressions, *priced.label_expressions) for name in instruments(text)]


def feature_source(handler: Handler) -> Panel | None:
    """The prices or factors from which a handler computes its features; None if it has discarded them."""
    priced = priced_handler(handler)
    if priced is None:
        return None if handler.drop_raw else handler.panel("raw")
    return None if priced.prices is None else _joined(priced.prices, priced.mask_prices)


def _joined(panel: Panel, others: Mapping[str, Prices]) -> Panel:
    """Add the prices of instruments outside the market. Their rows are not live, so they are not samples."""
    parts = [panel, *(prices.panel for prices in others.values())]
    if len(parts) == 1:
        return panel
    frames = [part.to_frame("price", np.arange(part.n_rows)) for part in parts]
    table = pd.concat(frames)[list(panel.columns("price"))]
    table = table[table.index.get_level_values("datetime").isin(panel.datetimes)]
    joined = Panel.from_frame(table, group="price")
    live = np.isin(joined.instruments, panel.instruments)[joined.instrument_codes]
    if panel.live is not None:
        live[live] = panel.live  # both are sorted by (instrument, datetime)
    return replace(joined, live=live)


def _handler_parameters(workflow: Workflow) -> Mapping[str, inspect.Parameter]:
    spec = workflow.task.dataset.kwargs.handler.description()
    factory, _ = registry.HANDLERS.resolve({key: value for key, value in spec.items() if key != "kwargs"})
    return registry.all_parameters(factory)


def source_argument(workflow: Workflow) -> str | None:
    """The argument through which the handler accepts prices or factors; None if it has none."""
    return handler_source_argument(workflow.task.dataset.kwargs.handler.description())


def rebuild_dataset(
    workflow: Workflow, source: Panel, segments: Mapping[str, Bounds] | None = None, **changes: object
) -> HandlerDataset:
    """Build the dataset of the workflow from other prices or factors.

    Parameters
    ----------
    workflow : Workflow
    source : Panel
    segments : mapping, optional
        Replaces the segments of the workflow.
    **changes
        Replace arguments of the handler. Names that its class does not accept are ignored.
    """
    spec = workflow.task.dataset.description()
    handler_spec = spec["kwargs"].pop("handler")
    accepted = _handler_parameters(workflow)
    arguments = {name: value for name, value in handler_spec.get("kwargs", {}).items() if name not in SOURCE_ARGUMENTS}
    arguments |= {name: value for name, value in changes.items() if name in accepted}
    arguments[str(source_argument(workflow))] = source
    handler = registry.HANDLERS.build({**handler_spec, "kwargs": arguments}, path="task.dataset.kwargs.handler")
    kwargs = {**spec["kwargs"], "handler": handler} | ({} if segments is None else {"segments": segments})
    dataset: HandlerDataset = registry.DATASETS.build({**spec, "kwargs": kwargs}, path="task.dataset")
    return dataset


def build_model(workflow: Workflow, **changes: object) -> Estimator:
    """Build the model of the workflow with changed arguments."""
    spec = workflow.task.model.description()
    kwargs = {**spec.get("kwargs", {}), **changes}
    model: Estimator = registry.MODELS.build({**spec, "kwargs": kwargs}, path="task.model")
    return model


def untrained_model(workflow: Workflow) -> Estimator:
    """The model of the workflow with its initial weights, ready to predict."""
    model = build_model(workflow, progress=False)
    model.fitted = True
    return model
