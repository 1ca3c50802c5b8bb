"""DatasetH and TSDatasetH compared with Qlib's, over Qlib's handler where it is installed."""

from __future__ import annotations

import datetime as dt

import numpy as np
import pandas as pd
import pytest
import torch

from qfast.data import DatasetH, TSDatasetH
from qfast.data.handlers import DataHandlerLP
from qfast.errors import ConfigError, DataError
from support.frames import SEGMENTS, gappy_frame, make_frame
from support.qlib import qfast_dataset, qlib_dataset


@pytest.mark.parametrize("data_key", ["infer", "learn", "raw"])
@pytest.mark.parametrize("col_set", ["feature", "label", ["feature", "label"], "__all"])
def test_flat_frames_equal_qlib(data_key, col_set):
    frame = gappy_frame()
    expected = qlib_dataset("DatasetH", frame).prepare(["train", "test"], col_set=col_set, data_key=data_key)
    result = qfast_dataset(DatasetH, frame).prepare(["train", "test"], col_set=col_set, data_key=data_key)
    for a, b in zip(result, expected, strict=True):
        assert len(a) > 0
        pd.testing.assert_frame_equal(a, b, check_dtype=False, check_column_type=False, rtol=1e-6)


@pytest.mark.parametrize("data_key", ["infer", "learn"])
@pytest.mark.parametrize("step_len", [1, 4, 20])
@pytest.mark.parametrize("segment", ["train", "valid", "test", slice("2020-02-20", "2020-03-03")])
def test_rolling_samples_equal_qlib(data_key, step_len, segment):
    frame = gappy_frame()
    groups = ["feature", "label"]
    expected = qlib_dataset("TSDatasetH", frame, step_len=step_len).prepare(segment, col_set=groups, data_key=data_key)
    result = qfast_dataset(TSDatasetH, frame, step_len=step_len).prepare(segment, col_set=groups, data_key=data_key)
    assert len(result) == len(expected) > 0
    pd.testing.assert_index_equal(result.get_index(), expected.get_index(), exact=False)
    every = list(range(len(result)))
    for fill in ("none", "ffill", "ffill+bfill"):
        result.config(fillna_type=fill)
        expected.config(fillna_type=fill)
        np.testing.assert_allclose(result[every], expected[every], rtol=1e-6, equal_nan=True)


def test_flt_col_chooses_the_samples():
    frame = make_frame(60, 6, 2)
    rng = np.random.default_rng(1)
    frame[("universe", "member")] = (rng.random(len(frame)) > 0.4).astype(np.float32)
    handler = DataHandlerLP.from_frame(frame)
    dataset = TSDatasetH(handler=handler, segments=SEGMENTS, step_len=5, flt_col="universe")
    result = dataset.prepare("train", col_set=["feature", "label"])
    member = frame[("universe", "member")].loc["2020-01-01":"2020-02-14"]
    assert len(result) == int(member.sum()) < len(member)
    windows = dataset.windows("train", "learn")
    assert len(windows) == len(result)
    result.config(fillna_type="ffill+bfill")
    np.testing.assert_array_equal(windows.batch(torch.arange(3)).numpy(), result[[0, 1, 2]][:, :, :2])


def test_window_sets_equal_the_samplers():
    frame = gappy_frame()
    dataset = qfast_dataset(TSDatasetH, frame, step_len=6)
    sampler = dataset.prepare("valid", col_set=["feature", "label"], data_key="learn")
    sampler.config(fillna_type="ffill+bfill")
    windows = dataset.windows("valid", "learn")
    order = torch.randperm(len(windows))
    batch = sampler[order.numpy()]
    np.testing.assert_array_equal(windows.batch(order).numpy(), batch[:, :, :-1])
    np.testing.assert_array_equal(windows.label[order].numpy(), batch[:, -1, -1])
    pd.testing.assert_index_equal(windows.keys(), sampler.get_index())


def test_learning_and_inference_share_the_feature_block():
    dataset = qfast_dataset(TSDatasetH, gappy_frame(), step_len=6)
    learn, infer = dataset.handler.panel("learn"), dataset.handler.panel("infer")
    assert np.shares_memory(learn.values("feature"), infer.values("feature"))
    train, valid = dataset.windows("train", "learn"), dataset.windows("valid", "learn")
    assert train.features.data_ptr() == valid.features.data_ptr() == learn.values("feature").ctypes.data


def test_intraday_timestamps_and_time_zones_work():
    frame = make_frame(40, 3, 2, freq="30min")
    dataset = TSDatasetH(handler=frame, segments={"all": (None, None), "day": ("2020-01-01", "2020-01-01")}, step_len=4)
    everything, day = (dataset.prepare(s, col_set="feature") for s in ("all", "day"))
    assert len(day) == len(everything) == len(frame)  # 40 half hours fit in one day, and a bare date covers it
    zoned = frame.copy()
    zoned.index = zoned.index.set_levels(zoned.index.levels[0].tz_localize("Asia/Shanghai"), level=0)
    result = TSDatasetH(handler=zoned, segments={"part": ("2020-01-01 10:00", None)}, step_len=4).prepare("part")
    stamps = result.get_index().get_level_values("datetime")
    assert stamps.min() == pd.Timestamp("2020-01-01 10:00", tz="Asia/Shanghai")


def test_dates_may_be_strings_dates_or_timestamps():
    frame = make_frame()
    lengths = set()
    for start in ("2020-01-10", dt.date(2020, 1, 10), dt.datetime(2020, 1, 10), pd.Timestamp("2020-01-10")):
        dataset = DatasetH(handler=frame, segments={"train": (start, None)})
        lengths.add(len(dataset.prepare("train")))
    assert len(lengths) == 1


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        ({"train": "2020-01-01"}, r"segment 'train' must be \(start, end\), got '2020-01-01'"),
        ({"train": ("2020-02-01", "2020-01-01")}, "segment 'train' starts at 2020-02-01 after its end 2020-01-01"),
        ({"train": ("2020-01-01",)}, "must be"),
    ],
)
def test_wrong_segments_are_refused(segments, message):
    with pytest.raises(ConfigError, match=message):
        DatasetH(handler=make_frame(), segments=segments)


def test_wrong_names_are_answered_with_the_nearest():
    dataset = DatasetH(handler=make_frame(), segments=SEGMENTS)
    with pytest.raises(DataError, match=r"no segment 'vaild'.*Did you mean 'valid'"):
        dataset.prepare("vaild")
    with pytest.raises(ConfigError, match=r"no argument 'segmnts'. Did you mean 'segments'"):
        DatasetH(handler=make_frame(), segments=SEGMENTS, segmnts=1)
    with pytest.raises(ConfigError, match="step_len must be a whole number"):
        TSDatasetH(handler=make_frame(), segments=SEGMENTS, step_len=0)


def test_ts_dataset_accepts_both_orders_of_positional_arguments():
    frame = make_frame(70, 9, 3)
    expected = TSDatasetH(handler=frame, segments=SEGMENTS, step_len=5)
    for dataset in (
        TSDatasetH(frame, SEGMENTS, step_len=5),
        TSDatasetH(frame, segments=SEGMENTS, step_len=5),
        TSDatasetH(5, handler=frame, segments=SEGMENTS),
        TSDatasetH(5, None, handler=frame, segments=SEGMENTS),
    ):
        assert dataset.step_len == 5
        assert dataset.segments == expected.segments
        samples = dataset.prepare("valid", col_set=["feature", "label"])
        np.testing.assert_array_equal(samples[3], expected.prepare("valid", col_set=["feature", "label"])[3])
    with pytest.raises(ConfigError, match="TSDatasetH got 'handler' twice, by position and by name"):
        TSDatasetH(frame, handler=frame, segments=SEGMENTS)
    with pytest.raises(ConfigError, match=r"positional arguments \(step_len, flt_col\) or .*, got 4"):
        TSDatasetH(frame, SEGMENTS, None, 5)
    with pytest.raises(ConfigError, match="step_len must be a whole number of at least 1, got 0"):
        TSDatasetH(frame, SEGMENTS, step_len=0)


def test_two_labels_are_refused():
    frame = make_frame()
    frame[("label", "LABEL1")] = frame[("label", "LABEL0")]
    with pytest.raises(DataError, match=r"2 label columns .*trained on exactly one"):
        DatasetH(handler=frame, segments=SEGMENTS).windows("train", "learn")


def test_segments_share_one_copy_on_another_device():
    dataset = qfast_dataset(TSDatasetH, gappy_frame(), step_len=6)
    moved: dict = {}
    train, valid = (dataset.windows(s, "learn").to(torch.device("meta"), moved) for s in ("train", "valid"))
    assert train.features is valid.features
    assert train.index.position is valid.index.position
    assert train.rows is not valid.rows
