"""A dataset over a sample of the instruments, to be built again over other prices or factors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from qfast import registry
from qfast.data.expression import instruments
from qfast.data.handlers.prices import PriceHandler
from qfast.data.panel import Panel
from qfast.data.prices import Prices
from qfast.data.rows import restrict_rows
from qfast.workflow.schema import Workflow

__all__ = [
    "SAMPLE",
    "STAGES",
    "Trial",
    "build_model",
    "feature_source",
    "named_instruments",
    "rebuild_dataset",
    "source_argument",
    "untrained_model",
]


SAMPLE = 60  # instruments of the experiments, besides those that expressions name
STAGES = ("shared", "infer")  # learn processors have no part in scores
OF_THE_SOURCE = ("instruments", "cache", "data", "provider_uri", "source")  # arguments of a handler


@dataclass
class Trial:
    """A workflow's dataset over a sample of the instruments, to be built again over other prices or factors."""

    workflow: Workflow
    source: Panel
    dataset: Any
    model: Any

    @classmethod
    def of(cls, workflow: Workflow, dataset: Any, source: Panel) -> Trial:
        names = [str(name) for name in dataset.handler.panel("infer").instruments]
        wanted = {name.lower() for name in [*names[:: -(-len(names) // SAMPLE)], *named_instruments(dataset.handler)]}
        sample = restrict_rows(source, [n for n in source.instruments if str(n).lower() in wanted], None, None)
        return cls(workflow, sample, rebuild_dataset(workflow, sample), untrained_model(workflow))

    @property
    def size(self) -> str:
        return f"({len(self.dataset.handler.panel('infer').instruments)} instruments)"


def named_instruments(handler: Any) -> list[str]:
    """Instruments that expressions name."""
    if not isinstance(handler, PriceHandler):
        return []
    return [name for text in (*handler.feature_expressions, *handler.label_expressions) for name in instruments(text)]


def feature_source(handler: Any) -> Panel | None:
    """What the handler's features are computed from: prices, or the user's own factors."""
    if not isinstance(handler, PriceHandler):
        return None if handler.drop_raw else handler.panel("raw")
    return None if handler.prices is None else _joined(handler.prices, handler.mask_prices)


def _joined(panel: Panel, others: Mapping[str, Prices]) -> Panel:
    """The panel with the prices of instruments outside the market, which are no samples (not live)."""
    parts = [panel, *(prices.panel for prices in others.values())]
    if len(parts) == 1:
        return panel
    frames = [part.to_frame("price", np.arange(part.n_rows)) for part in parts]
    table = pd.concat(frames)[list(panel.columns("price"))]
    table = table[table.index.get_level_values("datetime").isin(panel.datetimes)]
    found = Panel.from_frame(table, group="price")
    live = np.isin(found.instruments, panel.instruments)[found.instrument_codes]
    if panel.live is not None:
        live[live] = panel.live  # both stand by (instrument, datetime)
    return replace(found, live=live)


def _handler_parameters(workflow: Workflow) -> Mapping[str, Any]:
    bare = {key: value for key, value in workflow.task.dataset.kwargs.handler.given().items() if key != "kwargs"}
    return registry.parameters(registry.HANDLERS.resolve(bare)[0])


def source_argument(workflow: Workflow) -> str | None:
    """The argument by which the handler's class is given prices or factors; None: it has none."""
    taken = _handler_parameters(workflow)
    return next((name for name in ("data", "source") if name in taken), None)


def rebuild_dataset(workflow: Workflow, source: Panel, segments: Any = None, **changes: Any) -> Any:
    """The workflow's dataset over other prices or factors, with other segments and arguments of the handler."""
    spec = workflow.task.dataset.given()
    handler_spec = spec["kwargs"].pop("handler")
    taken = _handler_parameters(workflow)
    own = {key: value for key, value in handler_spec.get("kwargs", {}).items() if key not in OF_THE_SOURCE}
    own |= {key: value for key, value in changes.items() if key in taken}
    own[str(source_argument(workflow))] = source
    handler = registry.HANDLERS.build({**handler_spec, "kwargs": own}, path="task.dataset.kwargs.handler")
    kwargs = {**spec["kwargs"], "handler": handler} | ({} if segments is None else {"segments": segments})
    return registry.DATASETS.build({**spec, "kwargs": kwargs}, path="task.dataset")


def build_model(workflow: Workflow, **changes: Any) -> Any:
    spec = workflow.task.model.given()
    return registry.MODELS.build({**spec, "kwargs": {**spec.get("kwargs", {}), **changes}}, path="task.model")


def untrained_model(workflow: Workflow) -> Any:
    model = build_model(workflow, progress=False)
    model.fitted = True
    return model
