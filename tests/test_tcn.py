"""TCN estimators: consecutive windows are scored as views without a change in the scores."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qfast.data import TSDatasetH
from qfast.data.windows import WindowSet
from qfast.errors import DataError
from qfast.models import TCN, _tcn, ts
from qfast.nn import TCNModel
from support.fits import NetworkCalls, dataset_for, same_weights, weights
from support.frames import SEGMENTS, flat, make_frame, rolling

SMALL = {
    "d_feat": 3,
    "n_chans": 8,
    "kernel_size": 2,
    "num_layers": 2,
    "n_epochs": 3,
    "batch_size": 32,
    "lr": 0.01,
    "seed": 1,
}
both = pytest.mark.parametrize("kind", [TCN, ts.TCN], ids=["flat", "ts"])


# ---------------------------------------------------------------- arguments
def test_data_of_another_width_is_reported():
    with pytest.raises(DataError, match=r"the data has 3 features per step, .* d_feat=6. Remedy: d_feat=3"):
        ts.TCN(**{**SMALL, "d_feat": 6}).fit(rolling())
    with pytest.raises(DataError, match=r"the data has 12 columns, which is not a multiple of d_feat=5"):
        TCN(**{**SMALL, "d_feat": 5}).fit(flat())


# ---------------------------------------------------------------- consecutive windows
@pytest.fixture
def always_views(monkeypatch):
    """Uses views from two consecutive windows on, because the networks here are too small for the usual threshold."""
    monkeypatch.setattr(_tcn, "CALL_COST", 0)
    monkeypatch.setattr(_tcn, "MIN_CONSECUTIVE", 2)


def one_by_one(model, windows: WindowSet) -> np.ndarray:
    """Predictions of gathered windows."""
    with torch.no_grad():
        return model.network.eval()(windows.batch(torch.arange(len(windows))).transpose(1, 2)).numpy()


@pytest.mark.parametrize("holes", [0.0, 0.05, 0.3])
@pytest.mark.parametrize("batch_size", [7, 4096])
def test_predictions_are_those_of_the_windows_one_by_one(holes, batch_size, always_views):
    dataset = rolling(make_frame(70, 9, 3, holes=holes))
    model = ts.TCN(**{**SMALL, "n_epochs": 1}).fit(dataset)
    model._params["batch_size"] = batch_size
    windows = dataset.windows("test", "infer", with_label=False)
    calls = NetworkCalls(model, time_axis=2)
    result = model.predict(dataset)
    assert result.index.equals(windows.keys())
    assert sum(size for size, _ in calls.sizes) == len(windows)
    assert max(size for size, _ in calls.sizes) <= batch_size
    share = calls.viewed() / len(windows)
    assert share == 1.0 if holes == 0.0 else 0.0 < share < 1.0
    np.testing.assert_allclose(result.to_numpy(), one_by_one(model, windows), rtol=1e-5, atol=1e-6)


def test_scores_of_shuffled_training_batches_keep_their_order(always_views, monkeypatch):
    frame = make_frame(70, 9, 3, holes=0.05)
    model = ts.TCN(**SMALL)
    calls = NetworkCalls(model, time_axis=2)
    model.fit(rolling(frame))
    scored = sum(len(rolling(frame).windows(name, "learn")) for name in ("train", "valid"))
    assert calls.viewed() > 0.6 * scored * SMALL["n_epochs"]  # also where the batches leave out a remainder
    monkeypatch.setattr(ts.TCN, "_uses_views", lambda *_: False)
    plain = ts.TCN(**SMALL)
    calls = NetworkCalls(plain, time_axis=2)
    plain.fit(rolling(frame))
    assert calls.viewed() == 0
    for name in ("train", "valid", "valid_all"):
        np.testing.assert_allclose(model.history_[name], plain.history_[name], rtol=1e-6)
    assert same_weights(weights(model), weights(plain))  # training batches are gathered either way


def test_a_nan_stays_in_the_windows_that_hold_it(always_views):
    frame = make_frame(70, 4, 3, holes=0.0)
    dataset = rolling(frame)
    model = ts.TCN(**{**SMALL, "n_epochs": 1}).fit(dataset)
    clean = model.predict(dataset)
    dates = frame.index.get_level_values(0).unique()
    wrong = frame.copy()
    wrong.loc[(dates[60], "S002"), ("feature", "F1")] = np.nan
    result = model.predict(rolling(wrong))
    touched = result.isna()
    assert 0 < touched.sum() <= 5
    assert set(result.index[touched].get_level_values(1)) == {"S002"}
    assert set(result.index[touched].get_level_values(0)) <= set(dates[60:65])
    pd.testing.assert_series_equal(result[~touched], clean[~touched], rtol=1e-5, atol=1e-6)


def test_a_stage_that_was_overridden_sees_every_sample(always_views):
    class Shifted(ts.TCN):
        def run_network(self, windows, samples, offsets=None):
            return super().run_network(windows, samples, offsets) + 100.0

    dataset = rolling()
    result = Shifted(**{**SMALL, "n_epochs": 0}).fit(dataset).predict(dataset)
    expected = ts.TCN(**{**SMALL, "n_epochs": 0}).fit(dataset).predict(dataset)
    pd.testing.assert_series_equal(result - 100.0, expected, atol=1e-4)


def test_flat_samples_in_a_time_series_model(always_views):
    model = ts.TCN(**{**SMALL, "n_epochs": 1}).fit(flat())
    windows = flat().windows("test", "infer", with_label=False)
    with torch.no_grad():
        expected = model.network.eval()(windows.batch(torch.arange(len(windows))))
    np.testing.assert_allclose(model.predict(flat()).to_numpy(), expected.numpy(), rtol=1e-5, atol=1e-6)


@pytest.fixture
def call_sizes(monkeypatch):
    """The number of windows of each call of a TCN, without hooks, which would prevent joined calls."""
    sizes, forward = [], TCNModel.forward
    monkeypatch.setattr(TCNModel, "forward", lambda network, x: sizes.append(len(x)) or forward(network, x))
    return sizes


@pytest.mark.parametrize("holes", [0.0, 0.02])
@pytest.mark.parametrize("batch_size", [40, 4096])
def test_instruments_share_a_call_and_windows_between_them_are_discarded(
    batch_size, holes, always_views, call_sizes, monkeypatch
):
    monkeypatch.setattr(_tcn, "WINDOWS_SAVED", 1)
    dataset = rolling(make_frame(70, 9, 3, holes=holes), {"test": (None, None)})
    model = ts.TCN(**SMALL)
    model.fitted = True
    windows = dataset.windows("test", "infer", with_label=False)
    expected = one_by_one(model, windows)
    model._params["batch_size"] = batch_size
    sequences = windows.consecutive(4)
    superfluous, samples = 4 * (len(sequences) - 1), sum(map(len, sequences))  # 4 = step_len - 1
    assert len(sequences) == 9 if holes == 0.0 else len(sequences) > 9
    call_sizes.clear()
    result = model.predict(dataset)
    np.testing.assert_allclose(result.to_numpy(), expected, rtol=1e-5, atol=1e-6)
    if batch_size == 4096:
        assert call_sizes == [samples + superfluous, len(windows) - samples]
    else:
        assert max(call_sizes) == batch_size
        assert len(call_sizes) <= (samples + superfluous) // (batch_size - 4) + 2 + len(windows) // batch_size


def test_joined_calls_give_the_bits_of_separate_calls_in_all_convolutions(always_views, monkeypatch):
    """The last layer may round a row differently in another batch."""
    hidden = []

    def run_network(model, windows, samples, offsets=None):
        hidden.append(model.network._last_step(model.network_input(windows, samples)))
        return hidden[-1][:, 0]

    monkeypatch.setattr(ts.TCN, "run_network", run_network)
    monkeypatch.setattr(run_network, "__module__", "qfast.models")
    results = []
    for joined in (40, None):
        monkeypatch.setattr(ts.TCN, "min_joined", lambda *_, fewest=joined: fewest)
        model = ts.TCN(**SMALL)
        model.fitted = True
        results.append(model.predict(rolling(make_frame(70, 9, 3, holes=0.01), {"test": (None, None)})))
        results.append(len(hidden))
    pd.testing.assert_series_equal(results[0], results[2], check_exact=True)
    assert results[1] < results[3] - results[1]


def test_few_joined_windows_have_no_call_of_their_own(monkeypatch, call_sizes):
    monkeypatch.setattr(_tcn, "MIN_CONSECUTIVE", 2)
    monkeypatch.setattr(ts.TCN, "min_consecutive", lambda *_: 9 * 70)
    dataset = rolling(make_frame(70, 9, 3, holes=0.0), {"test": (None, None)})
    model = ts.TCN(**{**SMALL, "batch_size": 4096})
    model.fitted = True
    model.predict(dataset)  # one call of 9 * 66 + 8 * 4 windows would be possible
    assert call_sizes == [9 * 70]


def test_a_changed_network_receives_no_superfluous_windows():
    model = ts.TCN(**SMALL)
    assert model.min_joined(3, 20) == 57
    assert model.min_joined(3, 2) == 16
    model.network.linear.register_forward_hook(lambda *_: None)
    assert model.min_joined(3, 20) is None
    model = ts.TCN(**SMALL)
    model.network.linear = torch.nn.Sequential(model.network.linear)
    assert model.min_joined(3, 20) is None
    model = ts.TCN(**SMALL)
    model.network.tcn.network[0].net[2] = torch.nn.Tanh()
    assert model.min_joined(3, 20) is None


def test_the_smallest_run_of_windows_with_a_separate_call():
    wide, narrow = ts.TCN(n_chans=128, num_layers=5), ts.TCN(n_chans=4, num_layers=1)
    assert wide.min_consecutive(6, 60) < 50
    assert narrow.min_consecutive(6, 5) > 10_000


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    holes=st.sampled_from([0.0, 0.1, 0.6]),
    step_len=st.integers(1, 9),
    first_position=st.integers(0, 12),
    fewest=st.integers(2, 12),
)
def test_stretches_are_all_windows_of_which_there_is_a_view(seed, holes, step_len, first_position, fewest):
    dataset = TSDatasetH(
        handler=make_frame(24, 4, 2, seed=seed, holes=holes), segments={"all": (None, None)}, step_len=step_len
    )
    windows = dataset.windows("all", "infer")
    assert windows.index is not None
    early = windows.index.position[windows.rows] < first_position
    windows = replace(windows.select(~early), first_position=first_position)
    shuffled = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    windows = replace(windows, rows=windows.rows[shuffled])
    parts = windows.consecutive(fewest)
    held = torch.cat(parts).tolist() if parts else []
    assert len(held) == len(set(held))
    for part in parts:
        view = windows.view(part)
        assert view is not None
        assert torch.equal(view, windows.batch(part))
        assert view.untyped_storage().data_ptr() == windows.features.untyped_storage().data_ptr()
        assert len(part) >= fewest
    # no run of at least `fewest` consecutive windows is left out
    rows = windows.rows.sort()
    free = [int(s) for s in rows.indices if int(s) not in set(held)]
    for first in range(len(free) - fewest + 1):
        assert windows.view(torch.tensor(free[first : first + fewest])) is None


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    holes=st.sampled_from([0.0, 0.1, 0.3]),
    shortest=st.integers(2, 5),
    most=st.integers(1, 30),
    join=st.booleans(),
)
def test_calls_contain_the_consecutive_windows(seed, holes, shortest, most, join):
    dataset = TSDatasetH(
        handler=make_frame(24, 4, 2, seed=seed, holes=holes), segments={"all": (None, None)}, step_len=4
    )
    windows = dataset.windows("all", "infer")
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    windows = replace(windows, rows=windows.rows[order])
    calls = list(windows.consecutive_calls(shortest, most, join=join))
    samples = [int(sample) for call in calls for _, part in call.parts for sample in part]
    assert samples == [int(sample) for part in windows.consecutive(shortest) for sample in part]
    for call in calls:
        view = call.windows().batch(torch.arange(len(call)))
        assert view.stride(0) == view.stride(1)
        assert len(view) == len(call.windows()) == len(call) <= most
        is_single = len(call.parts) == 1
        assert is_single or join
        shares_memory = view.untyped_storage().data_ptr() == windows.features.untyped_storage().data_ptr()
        assert shares_memory == is_single
        end = 0
        for begin, part in call.parts:
            assert begin == (end + 3 if end else 0)
            assert torch.equal(view[begin : begin + len(part)], windows.batch(part))
            end = begin + len(part)
        assert end == len(call)
    for before, _ in pairwise(calls):  # no call could be larger
        assert not join or len(before) + 4 > most


# ---------------------------------------------------------------- Qlib's predictions
def test_quirk_time_series_tcn_transposes_in_predict():
    frame, square = make_frame(70, 9, 3), {**SMALL, "n_epochs": 1}
    dataset = TSDatasetH(handler=frame, segments=SEGMENTS, step_len=3)
    windows = dataset.windows("test", "infer", with_label=False)
    model = ts.TCN(**square).fit(dataset)
    np.testing.assert_allclose(model.predict(dataset).to_numpy(), one_by_one(model, windows), rtol=1e-5, atol=1e-6)
    like_qlib = ts.TCN(**square, compat="qlib").fit(dataset)
    assert same_weights(weights(like_qlib), weights(model))
    with torch.no_grad():
        expected = model.network.eval()(windows.batch(torch.arange(len(windows))))
    result = like_qlib.predict(dataset)
    np.testing.assert_allclose(result.to_numpy(), expected.numpy(), rtol=1e-5, atol=1e-6)
    assert np.abs(result.corr(model.predict(dataset))) < 0.9
    pd.testing.assert_series_equal(like_qlib(dataset), result)
    for name in ("train", "valid"):  # training and scores are transposed
        assert like_qlib.evals_result_[name] == pytest.approx(model.evals_result_[name], rel=1e-6)
    long = ts.TCN(**square, compat="qlib").fit(rolling())
    with pytest.raises(DataError, match=r"step_len == d_feat, got step_len=5 and d_feat=3. Remedy: compat=None"):
        long.predict(rolling())


@both
def test_quirk_empty_segment_of_tcn(kind):
    for name in ("train", "valid"):
        with pytest.raises(DataError, match=f"segment '{name}' has no samples"):
            kind(**SMALL).fit(dataset_for(kind, segments={**SEGMENTS, name: ("2035-01-01", None)}))
