"""TSDataSampler compared with Qlib's sampler where pyqlib is installed."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from qfast.data.dataset import TSDataSampler
from qfast.errors import ConfigError, DataError
from support.frames import make_frame

FILLS = ("none", "ffill", "ffill+bfill")


def qlib_sampler(frame: pd.DataFrame, *args: object, **kwargs: object):
    dataset = pytest.importorskip("qlib.data.dataset", reason="pyqlib is the oracle; install qfast-models[qlib]")
    return dataset.TSDataSampler(frame.copy(), *args, **kwargs)


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("step_len", [1, 2, 5, 12, 60])
@pytest.mark.parametrize("bounds", [(None, None), ("2020-01-20", "2020-02-10")])
def test_every_sample_equals_qlib(fill, step_len, bounds):
    frame = make_frame(holes=0.25)
    ours = TSDataSampler(frame, *bounds, step_len=step_len, fillna_type=fill)
    theirs = qlib_sampler(frame, *bounds, step_len=step_len, fillna_type=fill)
    assert len(ours) == len(theirs) > 0
    pd.testing.assert_index_equal(ours.get_index(), theirs.get_index(), exact=False)
    every = list(range(len(ours)))
    np.testing.assert_array_equal(ours[every], theirs[every])
    np.testing.assert_array_equal(ours[3], theirs[3])
    np.testing.assert_array_equal(ours.data_arr, theirs.data_arr)


@pytest.mark.parametrize("fill", FILLS)
def test_date_and_instrument_pairs_equal_qlib_even_without_a_row(fill):
    frame = make_frame(n_dates=15, n_instruments=4, holes=0.4)
    ours = TSDataSampler(frame, None, None, step_len=4, fillna_type=fill)
    theirs = qlib_sampler(frame, None, None, step_len=4, fillna_type=fill)
    dates = frame.index.levels[0]
    pairs = [(d, s) for d in dates for s in frame.index.levels[1]] + [(dates[-1] + pd.Timedelta(days=9), "S001")]
    for pair in pairs:
        np.testing.assert_array_equal(ours[pair], theirs[pair], err_msg=str(pair))
    np.testing.assert_array_equal(ours[pairs], theirs[pairs])


def test_flt_data_removes_samples_but_keeps_history():
    frame = make_frame(holes=0.2)
    rng = np.random.default_rng(3)
    keep = pd.Series(rng.random(len(frame)) > 0.5, index=frame.index, dtype=object)
    keep.iloc[::7] = np.nan
    keep = keep.iloc[5:]
    ours = TSDataSampler(frame, None, None, 6, "ffill", flt_data=keep)
    theirs = qlib_sampler(frame, None, None, 6, "ffill", flt_data=keep)
    assert 0 < len(ours) < len(frame)
    pd.testing.assert_index_equal(ours.get_index(), theirs.get_index(), exact=False)
    every = list(range(len(ours)))
    np.testing.assert_array_equal(ours[every], theirs[every])


def test_frame_order_does_not_matter_and_the_callers_frame_is_untouched():
    frame = make_frame()
    shuffled = frame.sample(frac=1.0, random_state=1)
    before = shuffled.copy(deep=True)
    ours = TSDataSampler(shuffled, None, None, 5)
    pd.testing.assert_frame_equal(shuffled, before)
    every = list(range(len(ours)))
    np.testing.assert_array_equal(ours[every], TSDataSampler(frame, None, None, 5)[every])


def test_dtype_follows_the_frame_by_default():
    assert TSDataSampler(make_frame(dtype=np.float64), None, None, 3)[0].dtype == np.float64
    assert TSDataSampler(make_frame(), None, None, 3)[0].dtype == np.float32
    assert TSDataSampler(make_frame(), None, None, 3, dtype=np.float64)[0].dtype == np.float64


def test_config_switches_the_fill_and_refuses_unknown_settings():
    sampler = TSDataSampler(make_frame(holes=0.4), None, None, 6)
    assert np.isnan(sampler[list(range(len(sampler)))]).any()
    sampler.config(fillna_type="ffill+bfill")
    assert not np.isnan(sampler[list(range(len(sampler)))]).any()
    with pytest.raises(ConfigError, match=r"no setting 'filna_type'.*Did you mean 'fillna_type'"):
        sampler.config(filna_type="ffill")
    sampler.config(fillna_type="backwards")
    with pytest.raises(ConfigError, match="fillna_type must be one of"):
        sampler[0]


def test_wrong_indexing_is_answered_clearly():
    sampler = TSDataSampler(make_frame(), None, None, 3)
    for bad in (-1, len(sampler)):
        with pytest.raises(KeyError, match="must be from 0 to"):
            sampler[bad]
    with pytest.raises(TypeError, match=r"sampler\[slice.* is not supported"):
        sampler[0:3]
    with pytest.raises(DataError, match=r"instrument 'S01' is not in the data. Did you mean"):
        sampler["2020-02-01", "S01"]
    with pytest.raises(DataError, match="is not a date or time"):
        sampler["someday", "S001"]
    with pytest.raises(TypeError, match="sample number"):
        sampler["S001"]
    assert sampler[[]].shape == (0, 3, 4)


def test_empty_cases():
    sampler = TSDataSampler(make_frame(), "2030-01-01", None, 3)
    assert sampler.empty
    assert len(sampler.get_index()) == 0
    with pytest.raises(DataError, match="no rows"):
        TSDataSampler(make_frame().iloc[:0], None, None, 3)
    with pytest.raises(ConfigError, match="step_len must be a whole number"):
        TSDataSampler(make_frame(), None, None, 0)
