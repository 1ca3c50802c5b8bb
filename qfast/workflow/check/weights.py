"""Checks of the weights that the training starts from: `task.init_from`."""

from __future__ import annotations

from qfast.data.protocols import HandlerDataset
from qfast.errors import shown
from qfast.workflow.check.findings import CheckReport
from qfast.workflow.check.trial import build_model
from qfast.workflow.schema import Workflow
from qfast.workflow.starting import KEY, starting_weights

__all__ = ["check_starting_weights"]


def check_starting_weights(report: CheckReport, workflow: Workflow, dataset: HandlerDataset) -> None:
    """Check that the weights of `task.init_from` fit the model, and that the data has the columns of their run.

    Raises
    ------
    CheckpointError
        The weights do not fit the model.
    DataError
        The data has the columns of the run in another order.
    """
    origin = starting_weights(workflow, build_model(workflow, progress=False), None)
    if origin is None:
        return
    columns = [str(column) for column in dataset.handler.get_cols("feature", "infer")]
    origin.require_order(columns)
    new = [column for column in columns if column not in origin.columns]
    if origin.columns and new:
        report.add(
            "warning",
            "weights",
            f"task.{KEY}: {origin.file} was trained on other feature columns: {shown(new)} instead of "
            f"{shown([column for column in origin.columns if column not in columns])}",
        )
        return
    fits = "fits the model and the feature columns" if origin.columns else "fits the model; its columns are unknown"
    report.add("ok", "weights", f"task.{KEY}: {origin.file} {fits}")
