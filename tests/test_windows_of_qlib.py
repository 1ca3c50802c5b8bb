"""The segments of rolling studies equal those of Qlib's `RollingGen`, date by date."""

from __future__ import annotations

import logging

import numpy as np
import pandas as pd
import pytest

from qfast.studies.rolling import rolling_segments
from support.stores import write_market

qlib = pytest.importorskip("qlib", reason="pyqlib is the oracle; install qfast-models[qlib]")

STEPS = (1, 7, 40)


@pytest.fixture(scope="module")
def calendar(tmp_path_factory) -> pd.DatetimeIndex:
    """The calendar of a store that Qlib uses."""
    from qlib.data import D

    root = write_market(tmp_path_factory.mktemp("windows") / "store")
    qlib.init(provider_uri=str(root), region="us", kernels=1, logging_level=logging.ERROR)
    return pd.DatetimeIndex(D.calendar(future=True))


def timestamp(value: object) -> pd.Timestamp | None:
    return None if value is None else pd.Timestamp(value)


@pytest.mark.parametrize("expanding", [False, True], ids=["sliding", "expanding"])
@pytest.mark.parametrize("step", STEPS)
def test_segments(calendar, step, expanding):
    """Segments begin and end on trading days and between them. Test segments of fewer days than a step are refused."""
    from qlib.workflow.task.gen import RollingGen

    kind = RollingGen.ROLL_EX if expanding else RollingGen.ROLL_SD
    rng = np.random.default_rng(step)
    compared = 0
    for _ in range(20):
        places = np.sort(rng.choice(np.arange(5, 80), 5, replace=False))
        ends = [calendar[place] + pd.Timedelta(days=int(rng.integers(0, 2))) for place in places]
        last = calendar[-2 - max(STEPS)] if step == max(STEPS) else calendar[-10]
        segments = {"train": tuple(ends[:2]), "valid": tuple(ends[2:4]), "test": (ends[4], last)}
        if ((calendar >= ends[4]) & (calendar <= last)).sum() < step:
            continue
        template = {"dataset": {"kwargs": {"handler": "file://handler.pkl", "segments": segments}}}
        tasks = RollingGen(step=step, rtype=kind, trunc_days=2).generate(template)
        windows = [task["dataset"]["kwargs"]["segments"] for task in tasks]
        expected = [{name: tuple(map(timestamp, bounds)) for name, bounds in window.items()} for window in windows]
        assert rolling_segments(calendar, segments, step, 2, expanding=expanding) == expected
        compared += 1
    assert compared >= 5
