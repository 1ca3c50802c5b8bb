"""Whole periods scored by LSTM, GRU and ALSTM. Consecutive windows are views of the panel; scores are unchanged."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.utils.prune
from torch import Tensor

from qfast.data import TSDatasetH
from qfast.data.windows import WindowSet
from qfast.models import ts
from qfast.models._recurrent import RecurrentTimeSeriesEstimator
from support.fits import NetworkCalls, same_weights, weights
from support.frames import make_frame, rolling

SMALL = {"d_feat": 3, "hidden_size": 8, "batch_size": 4096, "lr": 0.01, "seed": 1, "device": "cpu"}
STEP_LEN = 5
kinds = pytest.mark.parametrize("kind", [ts.LSTM, ts.GRU, ts.ALSTM], ids=lambda kind: kind.__name__)


@pytest.fixture
def always_views(monkeypatch):
    """Uses views from two consecutive windows on, because the periods here are short."""
    monkeypatch.setattr(RecurrentTimeSeriesEstimator, "min_consecutive", lambda *_: 2)


def built(kind: type, **arguments) -> RecurrentTimeSeriesEstimator:
    """A model with weights so large that the values of a window matter, not the biases."""
    model = kind(**{**SMALL, **arguments})
    with torch.no_grad():
        for parameter in model.network.parameters():
            parameter *= 3.0
    model.fitted = True
    return model


def without(frame: pd.DataFrame, instrument: str, days: slice) -> pd.DataFrame:
    """`frame` without these days of an instrument."""
    lost = frame.index.get_level_values(0).unique()[days]
    dates, names = (frame.index.get_level_values(level) for level in (0, 1))
    return frame[~(dates.isin(lost) & (names == instrument))]


def dataset_of(frame: pd.DataFrame, first_day: int = 0, step_len: int = STEP_LEN) -> TSDatasetH:
    first = frame.index.get_level_values(0).unique()[first_day]
    return TSDatasetH(handler=frame, segments={"test": (first, None)}, step_len=step_len)


def scored(dataset: TSDatasetH) -> WindowSet:
    return dataset.windows("test", "infer", with_label=False)


@torch.no_grad()
def one_by_one(model: RecurrentTimeSeriesEstimator, windows: WindowSet, size: int = 50) -> Tensor:
    """The network on gathered windows, in batches of consecutive samples."""
    parts = [windows.batch(samples) for samples in torch.arange(len(windows)).split(size)]
    assert all(x.untyped_storage().data_ptr() != windows.features.untyped_storage().data_ptr() for x in parts)
    return torch.cat([model.network.eval()(x) for x in parts])


def assert_near(result: Tensor | pd.Series, expected: Tensor) -> None:
    """Tolerance relative to the spread of the predictions; a common part would hide a wrong one."""
    result = result if isinstance(result, Tensor) else torch.tensor(result.to_numpy())
    spread = (expected - expected.mean()).norm()
    assert spread > 0.05 * expected.norm()
    assert (result - expected).norm() <= 1e-5 * spread


def windows_in_stretches(frame: pd.DataFrame, first_day: int = 0, end: int | None = None) -> int:
    """Counts, day by day, windows without a missing day that are in runs of two or more."""
    there = frame[("label", "LABEL0")].unstack().notna()
    whole = (there.rolling(STEP_LEN).sum() == STEP_LEN).iloc[first_day:end]
    return int((whole & (whole.shift(1, fill_value=False) | whole.shift(-1, fill_value=False))).to_numpy().sum())


# ---------------------------------------------------------------- predictions
FULL = make_frame(60, 6, 3, holes=0.0)
SHORT = without(without(FULL, "S003", slice(0, 57)), "S005", slice(0, 59))  # 3 days and 1 day of 5 steps
PANELS = {
    "all rows": (FULL, 0),
    "some holes": (make_frame(60, 6, 3, holes=0.05), 0),
    "many holes": (make_frame(60, 6, 3, holes=0.3), 0),
    "listed in mid period": (without(FULL, "S002", slice(0, 45)), 20),
    "suspended in mid period": (without(FULL, "S002", slice(40, 43)), 20),
    "shorter than a window": (SHORT, 0),
    "from mid panel": (FULL, 31),
}


@kinds
@pytest.mark.parametrize("batch_size", [11, 4096])
@pytest.mark.parametrize("panel", PANELS)
def test_predictions_are_those_of_gathered_windows(kind, panel, batch_size, always_views):
    frame, first_day = PANELS[panel]
    dataset, model = dataset_of(frame, first_day), built(kind, batch_size=batch_size)
    windows = scored(dataset)
    expected, calls = one_by_one(model, windows), NetworkCalls(model, time_axis=1)
    result = model.predict(dataset)
    assert result.index.equals(windows.keys())
    assert_near(result, expected)
    assert sum(size for size, _ in calls.sizes) == len(windows)
    assert max(size for size, _ in calls.sizes) <= batch_size
    in_views = windows_in_stretches(frame, first_day)
    assert in_views > 0
    if batch_size == 4096:  # smaller batches may consist of leftover windows that happen to be consecutive
        assert calls.viewed() == in_views
    else:
        assert in_views <= calls.viewed() <= in_views + 2 * batch_size


def test_a_nan_stays_in_the_windows_that_hold_it(always_views):
    wrong = FULL.copy()
    wrong.loc[(FULL.index.get_level_values(0).unique()[30], "S002"), ("feature", "F1")] = np.nan
    model = built(ts.ALSTM)
    clean, result = model.predict(dataset_of(FULL)), model.predict(dataset_of(wrong))
    touched = result.isna()
    assert touched.sum() == STEP_LEN
    assert set(result.index[touched].get_level_values(1)) == {"S002"}
    pd.testing.assert_series_equal(result[~touched], clean[~touched], rtol=1e-5, atol=1e-6)


@kinds
def test_a_separate_call_needs_at_least_min_consecutive_windows(kind):
    """With one window fewer they are gathered with the rest."""
    fewest = built(kind).min_consecutive(3, STEP_LEN)
    assert 10 < fewest < 400
    first_day = STEP_LEN + 3
    frame = make_frame(first_day + fewest, 4, 3, holes=0.0)
    for name in ("S000", "S002"):
        frame = without(frame, name, slice(first_day + fewest - 1, None))
    model = built(kind)
    windows = scored(dataset_of(frame, first_day))
    expected, calls = one_by_one(model, windows), NetworkCalls(model, time_axis=1)
    assert_near(model.predict(dataset_of(frame, first_day)), expected)
    assert calls.sizes == [(fewest, True), (fewest, True), (2 * (fewest - 1), False)]


@kinds
def test_windows_of_one_step_share_no_rows(kind):
    dataset = dataset_of(make_frame(60, 6, 3, holes=0.05), 20, step_len=1)  # an instrument does not fill a batch
    model = built(kind, batch_size=40)
    windows = scored(dataset)
    expected, calls = one_by_one(model, windows), NetworkCalls(model, time_axis=1)
    result = model.predict(dataset)
    sizes = [size for size, _ in calls.sizes]
    assert sizes == [40] * (len(windows) // 40) + [len(windows) % 40]  # no calls beyond those of whole batches
    assert result.index.equals(windows.keys())
    assert_near(result, expected)


# ---------------------------------------------------------------- scores
@kinds
def test_a_shuffled_training_score_is_that_of_its_batches(kind, always_views):
    frame = make_frame(60, 6, 3, holes=0.05)
    windows = TSDatasetH(handler=frame, segments={"train": (None, None)}, step_len=STEP_LEN).windows("train", "learn")
    model = built(kind, batch_size=64)
    torch.manual_seed(5)
    batches = model.batches(windows, "train_score")
    assert 0 < len(windows) - len(batches.order) < 64  # the remainder that the last batch leaves out
    expected = one_by_one(model, windows)
    losses = [(expected[s].double() - windows.label[s].double()).square().mean() for s in batches]
    calls = NetworkCalls(model, time_axis=1)
    torch.manual_seed(5)
    score, _ = model.score_segment(windows, "train")
    assert score == pytest.approx(-float(torch.stack(losses).mean()), rel=1e-6)
    assert calls.viewed() == windows_in_stretches(frame)


@kinds
def test_a_fit_scores_as_without_views(kind, always_views, monkeypatch):
    frame = make_frame(60, 6, 3, holes=0.05)
    days = frame.index.get_level_values(0).unique()
    segments = {"train": (days[0], days[39]), "valid": (days[40], None)}
    fits, viewed = [], []
    for shares in (True, False):
        if not shares:
            monkeypatch.setattr(RecurrentTimeSeriesEstimator, "_uses_views", lambda *_: False)
        model = kind(**{**SMALL, "batch_size": 32, "n_epochs": 2})
        calls = NetworkCalls(model, time_axis=1)
        fits.append(model.fit(TSDatasetH(handler=frame, segments=segments, step_len=STEP_LEN)))
        viewed.append(calls.viewed())
    in_views = windows_in_stretches(frame, 0, 40) + windows_in_stretches(frame, 40)
    assert viewed == [2 * in_views, 0]  # also for the remainder that the training batches leave out
    for name in ("train", "valid", "valid_all"):
        np.testing.assert_allclose(fits[0].history_[name], fits[1].history_[name], rtol=1e-6)
    assert same_weights(weights(fits[0]), weights(fits[1]))  # training batches are gathered either way


# ---------------------------------------------------------------- without views
@kinds
def test_compat_computes_without_views(kind, always_views):
    dataset, model = dataset_of(FULL), built(kind, compat="qlib", batch_size=40)
    expected, calls = one_by_one(model, scored(dataset)), NetworkCalls(model, time_axis=1)
    assert_near(model.predict(dataset), expected)
    assert calls.sizes == [(40, False)] * 9
    calls = NetworkCalls(ours := built(kind, batch_size=40), time_axis=1)
    ours.predict(dataset)
    assert calls.viewed() == windows_in_stretches(FULL)  # and without compat with them


@kinds
def test_no_views_with_gradients(kind, always_views):
    model, windows = built(kind), scored(dataset_of(FULL))
    batches = model.batches(windows, "predict")
    calls = NetworkCalls(model, time_axis=1)
    out = model._predictions(windows, batches)
    assert calls.sizes == [(len(windows), False)]
    out.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.network.parameters())
    with torch.no_grad():
        again = model._predictions(windows, batches)
    assert calls.viewed() == windows_in_stretches(FULL)
    assert_near(again, out.detach())


@kinds
@pytest.mark.parametrize("part", ["rnn", "fc_out", ""])
def test_a_hook_is_called_for_every_window(kind, part, always_views):
    dataset = dataset_of(make_frame(60, 6, 3, holes=0.05))
    windows = scored(dataset)
    expected, model, seen = one_by_one(built(kind), windows), built(kind), []
    model.network.get_submodule(part).register_forward_hook(
        lambda _module, arguments, _out: seen.append(len(arguments[0]))
    )
    calls = NetworkCalls(model, time_axis=1)
    assert_near(model.predict(dataset), expected)
    assert sum(seen) == len(windows)
    assert calls.viewed() > len(windows) / 2


@pytest.mark.parametrize("change", ["pruned", "replaced"])
@kinds
def test_a_changed_layer_is_scored_too(kind, change):
    """Any module may replace `rnn`: the length of a run depends on the sizes, not on its weights."""
    dataset, model = dataset_of(make_frame(40, 3, 3)), built(kind)
    if change == "pruned":
        torch.nn.utils.prune.l1_unstructured(model.network.rnn, "weight_ih_l0", 0.5)
    else:
        model.network.rnn = torch.nn.Sequential(model.network.rnn)
    assert_near(model.predict(dataset), one_by_one(model, scored(dataset)))


@pytest.mark.parametrize("base", [ts.LSTM, ts.GATs, ts.TCN], ids=lambda base: base.__name__)
def test_an_overridden_features_of_is_called_and_deprecated(base):
    """Also in a subclass of the subclass, and in models with a `run_network` of their own."""

    def doubled(self, windows, samples):
        return 2 * super(kind, self).features_of(windows, samples)

    with pytest.warns(DeprecationWarning, match=r"Doubling overrides features_of.*Override run_network instead"):
        kind = type("Doubling", (base,), {"features_of": doubled})
    again = type("Again", (kind,), {"features_of": lambda self, windows, samples: doubled(self, windows, samples)})
    sizes = {"d_feat": 3, "seed": 1, "device": "cpu"}
    plain = base(**sizes)
    plain.network.eval()
    dataset = rolling()
    windows, samples = dataset.windows("valid", "learn"), torch.arange(5)
    twice = dataset.windows("valid", "learn")
    twice.features = 2 * twice.features
    expected = plain.run_network(twice, samples)
    for model in (kind(**sizes), again(**sizes)):
        model.network.eval()
        assert torch.equal(model.run_network(windows, samples), expected)


def test_a_run_network_of_a_user_receives_copies():
    """It may write to its windows. Consecutive windows as views of the panel are for qfast's own code."""

    class Careless(ts.LSTM):
        def run_network(self, windows, samples, offsets=None):
            x = windows.batch(samples)
            result = self.network(x)
            x.zero_()
            return result

    dataset = rolling(make_frame(70, 9, 3, holes=0.0))
    careless, usual = Careless(**SMALL), ts.LSTM(**SMALL)
    for model in (careless, usual):
        model.fitted = True
    first = careless.predict(dataset, "test")
    pd.testing.assert_series_equal(careless.predict(dataset, "test"), first)
    pd.testing.assert_series_equal(first, usual.predict(dataset, "test"), rtol=1e-4, atol=1e-6)
