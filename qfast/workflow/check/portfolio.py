"""A rehearsal of the portfolio backtest with random scores."""

from __future__ import annotations

import numpy as np
import pandas as pd

from qfast.data.protocols import HandlerDataset
from qfast.dates import date_text
from qfast.errors import DataError
from qfast.workflow.check.findings import CheckReport
from qfast.workflow.portfolio import PortfolioPlan
from qfast.workflow.records import PortAnaRecord, build_records
from qfast.workflow.schema import Workflow

__all__ = ["check_portfolio"]

TRADED = 20  # instruments of the rehearsal


def check_portfolio(report: CheckReport, workflow: Workflow, dataset: HandlerDataset) -> None:
    """Run the backtest of the workflow, if it has one, on random scores of a few instruments."""
    records = build_records(workflow, None, dataset)
    plans = [record.plan for record in records if isinstance(record, PortAnaRecord)]
    if not plans:
        return
    for plan in plans:
        plan.check_prices(dataset.handler, workflow.qlib_init.region)
    with report.attempt("portfolio", "`qfast run` would skip the backtest: "):
        _rehearse(report, plans[0], workflow, dataset)  # `qfast run` also uses the first one


def _rehearse(report: CheckReport, plan: PortfolioPlan, workflow: Workflow, dataset: HandlerDataset) -> None:
    if "test" not in dataset.segments:
        raise DataError(f"the backtest trades on the segment test, but there is only {list(dataset.segments)}.")
    panel = dataset.handler.panel("infer")
    rows = panel.rows_between(*dataset.segments["test"])
    present = np.unique(panel.instrument_codes[rows])
    rows = rows[np.isin(panel.instrument_codes[rows], present[:: -(-len(present) // TRADED)])]
    score = pd.Series(np.random.default_rng(0).standard_normal(len(rows)), panel.index(rows), name="score")
    result = plan.run(score, dataset.handler, workflow.qlib_init.region)
    days = result.backtest.report.index
    report.add(
        "ok",
        "portfolio",
        f"{len(days)} trading days, {date_text(days[0])} to {date_text(days[-1])} (rehearsed with "
        f"{min(len(present), TRADED)} instruments)",
    )
    for note in result.notes:
        report.add("note", "portfolio", note)
