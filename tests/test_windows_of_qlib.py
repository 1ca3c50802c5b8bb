"""The segments of rolling studies equal those of Qlib's `RollingGen`, date by date."""

from __future__ import annotations

import collections
import copy
import logging
import re
import traceback

import numpy as np
import pandas as pd
import pytest

from qfast.errors import ConfigError
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


# ---------------------------------------------------------------- random cases
REFUSED_BY_QLIB = {  # (exception, function of Qlib) -> why qfast does not need to raise it
    ("TypeError", "truncate"): "a segment other than test is unbounded, which Qlib cannot truncate",
    ("AssertionError", "truncate"): "a segment begins on the first day of the calendar",
    ("TypeError", "gen_following_tasks"): "a further test segment would begin right after the last day of the calendar",
    ("IndexError", "align_time"): "a segment begins after the last day of the calendar",
}


def windows_of_qlib(days, last, segments, step, truncate, expanding):
    """The result of `RollingGen.generate` on a calendar whose last day with data is `last`."""
    from qlib.workflow.task import gen
    from qlib.workflow.task.utils import TimeAdjuster

    adjuster = TimeAdjuster.__new__(TimeAdjuster)  # its constructor reads the calendar of a store
    adjuster.cals = np.array(list(days))
    rolling = gen.RollingGen.__new__(gen.RollingGen)
    kind = gen.RollingGen.ROLL_EX if expanding else gen.RollingGen.ROLL_SD
    rolling.__dict__.update(step=step, rtype=kind, trunc_days=truncate, ta=adjuster, test_key="test", train_key="train")
    rolling.ds_extra_mod_func, rolling.task_copy_func = None, copy.deepcopy
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gen, "transform_end_date", lambda end: last if end is None or last < end else end)
        tasks = rolling.generate({"dataset": {"kwargs": {"segments": segments}}})
    windows = [task["dataset"]["kwargs"]["segments"] for task in tasks]
    return [{name: tuple(map(timestamp, bounds)) for name, bounds in window.items()} for window in windows]


def random_case(rng):
    """(calendar, last day with data, segments, step, days to truncate, expanding), with dates inside and outside."""
    days = pd.bdate_range("2020-01-01", periods=int(rng.integers(40, 150)))
    last = days[-1 - int(rng.choice([0, 0, 5, 20]))]
    dates = pd.bdate_range(days[0] - pd.Timedelta(days=6), days[-1] + pd.Timedelta(days=2))
    places = np.sort(rng.choice(len(dates), 5, replace=False))
    first, second, third, fourth, fifth = (dates[place] + pd.Timedelta(days=int(rng.integers(2))) for place in places)
    end = [None, days[-1] + pd.Timedelta(days=3), *dates[places[4] :]][int(rng.integers(2 + len(dates) - places[4]))]
    segments = {"train": (first, second), "valid": (third, fourth), "test": (fifth, end)}
    if rng.random() < 0.15:
        segments["train"] = (None, second)
    if rng.random() < 0.05:
        segments["valid"] = (third, None)
    steps, truncates = [1, 2, 5, 10, 20], [0, 1, 2, 5, 21]
    return days, last, segments, int(rng.choice(steps)), int(rng.choice(truncates)), bool(rng.integers(2))


def outcome_of_qlib(case):
    """The windows of Qlib, or the class of its exception."""
    try:
        return windows_of_qlib(*case)
    except (TypeError, AssertionError, IndexError) as error:
        return type(error).__name__, traceback.extract_tb(error.__traceback__)[-1].name


def test_every_random_case_is_equal_or_of_a_known_class():
    """Wherever Qlib and qfast both return windows, they are equal. Only the listed cases are refused by one of them."""
    rng = np.random.default_rng(0)
    counts = collections.Counter()
    for _ in range(1500):
        days, last, segments, step, truncate, expanding = case = random_case(rng)
        expected = outcome_of_qlib(case)
        try:
            windows = rolling_segments(days, segments, step, truncate, expanding=expanding, last=last)
        except ConfigError as error:
            text = str(error)
            assert re.match(r"the rolling step is|the segment '\w+' .* has no day|the test segment begins on day", text)
            if isinstance(expected, list):  # a test segment shorter than a step, which Qlib extends beyond its end
                assert text.startswith("the rolling step is"), (text, case)
            counts["refused"] += 1
            continue
        if isinstance(expected, list):
            assert windows == expected, case
            counts["equal"] += 1
            continue
        assert expected in REFUSED_BY_QLIB, (expected, case)
        counts[expected] += 1
        if expected[1] == "gen_following_tasks":  # on a longer calendar Qlib returns these windows
            longer = pd.bdate_range(days[0], periods=len(days) + 50)
            assert windows == [cut(window, days[-1]) for window in windows_of_qlib(longer, last, *case[2:])], case
    assert counts["equal"] > 200
    assert {("TypeError", "truncate"), ("AssertionError", "truncate"), ("TypeError", "gen_following_tasks")} < set(
        counts
    )


def cut(window, last):
    """A window whose days after `last` are None, as at the end of a calendar."""
    return {name: tuple(None if end is None or end > last else end for end in ends) for name, ends in window.items()}
