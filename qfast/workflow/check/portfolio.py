"""The portfolio backtest, rehearsed on scores drawn at random."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from qfast.dates import date_text
from qfast.errors import DataError
from qfast.workflow.check.findings import CheckReport
from qfast.workflow.portfolio import PortfolioPlan
from qfast.workflow.records import PortAnaRecord, build_records
from qfast.workflow.schema import Workflow

__all__ = ["check_portfolio"]


TRADED = 20  # instruments of a rehearsed backtest


def check_portfolio(report: CheckReport, workflow: Workflow, dataset: Any) -> None:
    """The backtest that the file asks for, on scores drawn at random."""
    records = build_records(workflow, None, dataset)
    plans = [record.plan for record in records if isinstance(record, PortAnaRecord)]
    if not plans:
        return
    for plan in plans:
        plan.check_prices(dataset.handler, workflow.qlib_init.region)
    with report.attempt("portfolio", "`qfast run` will leave the backtest out: "):
        _rehearse(report, plans[0], workflow, dataset)  # the first one is the one that is run


def _rehearse(report: CheckReport, plan: PortfolioPlan, workflow: Workflow, dataset: Any) -> None:
    if "test" not in dataset.segments:
        raise DataError("there is no segment test, whose scores it trades on.")
    panel = dataset.handler.panel("infer")
    rows = panel.rows_between(*dataset.segments["test"])
    there = np.unique(panel.instrument_codes[rows])
    rows = rows[np.isin(panel.instrument_codes[rows], there[:: -(-len(there) // TRADED)])]
    score = pd.Series(np.random.default_rng(0).standard_normal(len(rows)), panel.index(rows), name="score")
    found = plan.run(score, dataset.handler, workflow.qlib_init.region)
    days = found.backtest.report.index
    report.add(
        "ok", "portfolio",
        f"{len(days)} days can be traded, {date_text(days[0])} to {date_text(days[-1])} (tried on "
        f"{min(len(there), TRADED)} instruments)",
    )  # fmt: skip
    for note in found.notes:
        report.add("note", "portfolio", note)
