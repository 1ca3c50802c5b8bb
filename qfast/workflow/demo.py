"""`qfast demo`: train, score and report on a synthetic market."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pandas as pd

from qfast.data import synthetic
from qfast.workflow.run import RunResult, run

__all__ = ["DEMO", "demo", "demo_prices"]

DEMO = Path(__file__).with_name("demo.yaml")  # a complete workflow file to copy
START = "2018-01-01"


def demo_prices(n_instruments: int = 120, n_days: int = 650, seed: int = 0) -> pd.DataFrame:
    """Prices of a synthetic market with late listings, delistings and gaps, and a planted daily IC of about 0.1.

    Parameters
    ----------
    n_instruments, n_days : int
        Number of instruments and of days.
    seed : int

    Returns
    -------
    DataFrame
        Indexed by (datetime, instrument), with columns open, high, low, close, volume and vwap.

    Examples
    --------
    >>> demo_prices(5, 80).index.names
    FrozenList(['datetime', 'instrument'])
    """
    return synthetic.prices(n_instruments, n_days, start=START, seed=seed)


def demo(
    output: str | os.PathLike[str] | None = None, device: str | None = None, seed: int | None = 0, **options: Any
) -> RunResult:
    """Run the workflow file demo.yaml on `demo_prices()`.

    Parameters
    ----------
    output, device, seed
        As for `qfast.run`.
    **options
        Other arguments of `qfast.run`.

    Returns
    -------
    RunResult

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as base:
    ...     demo(Path(base, "run"), sets=["task.model.kwargs.n_epochs=1"]).report.name
    'report.html'
    """
    return run(DEMO, data=demo_prices(), output=output, device=device, seed=seed, **options)
