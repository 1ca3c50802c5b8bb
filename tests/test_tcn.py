"""TCN estimators: fit, predict and files; windows that follow each other are scored as views and lose nothing by it."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qfast.data import TSDatasetH
from qfast.data.windows import WindowSet
from qfast.errors import ConfigError, DataError
from qfast.models import TCN, _tcn, ts
from qfast.workflow.predict import predict
from qfast.workflow.run import run
from support.fits import StopAt, dataset_for, same, weights
from support.frames import SEGMENTS, flat, make_frame, rolling
from support.workflows import write_case

SMALL = {
    "d_feat": 3, "n_chans": 8, "kernel_size": 2, "num_layers": 2, "n_epochs": 3, "batch_size": 32,
    "lr": 0.01, "seed": 1,
}  # fmt: skip
both = pytest.mark.parametrize("kind", [TCN, ts.TCN], ids=["flat", "ts"])


# ---------------------------------------------------------------- learning
@both
def test_a_planted_signal_is_learnt(kind):
    frame = make_frame(120, 12, 12 if kind is TCN else 3, holes=0.05)
    newest = "F3" if kind is TCN else "F0"  # feature 0 at the last step
    frame[("label", "LABEL0")] = frame[("feature", newest)] * 0.9 + 0.1 * frame[("label", "LABEL0")]
    segments = {
        "train": ("2020-01-01", "2020-04-30"), "valid": ("2020-05-01", "2020-05-31"), "test": ("2020-06-01", None),
    }  # fmt: skip
    dataset = dataset_for(kind, frame=frame, segments=segments)
    model = kind(**{**SMALL, "n_epochs": 20, "dropout": 0.1}).fit(dataset)
    prediction = model.predict(dataset)
    assert prediction.corr(frame[("label", "LABEL0")].reindex(prediction.index)) > 0.9


def test_rolling_windows_train_as_the_same_windows_laid_out_flat():
    dataset = rolling()
    parts = []
    for name in ("train", "valid", "test"):
        windows = dataset.windows(name, "learn")
        table = windows.batch(torch.arange(len(windows))).transpose(1, 2).flatten(1).numpy()  # feature-major
        columns = pd.MultiIndex.from_product([["feature"], [f"F{j}" for j in range(table.shape[1])]])
        frame = pd.DataFrame(table, index=windows.keys(), columns=columns)
        frame[("label", "LABEL0")] = windows.label.numpy()
        parts.append(frame)
    laid_out = flat(frame=pd.concat(parts).sort_index())
    whole = {**SMALL, "batch_size": 4096, "dropout": 0.0}  # one batch: the order of the samples does not matter
    one, other = ts.TCN(**whole).fit(dataset), TCN(**whole).fit(laid_out)
    for name in ("train", "valid", "valid_all", "train_loss"):
        np.testing.assert_allclose(one.history_[name], other.history_[name], rtol=1e-5)
    found, expected = one.predict(dataset), other.predict(laid_out)
    pd.testing.assert_series_equal(found.sort_index(), expected.sort_index(), rtol=1e-4, atol=1e-6)


@both
def test_dropout_repeats_with_the_seed_and_counts_in_training_only(kind):
    fits = [kind(**SMALL, dropout=p).fit(dataset_for(kind)) for p in (0.5, 0.5, 0.0)]
    assert fits[0].evals_result_ == fits[1].evals_result_
    assert fits[0].evals_result_ != fits[2].evals_result_
    pd.testing.assert_series_equal(fits[0].predict(dataset_for(kind)), fits[0].predict(dataset_for(kind)))


# ---------------------------------------------------------------- arguments
@both
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"d_feat": 0}, "d_feat must be a whole number of at least 1, got 0"),
        ({"n_chans": 2.5}, "n_chans must be a whole number of at least 1, got 2.5"),
        ({"num_layers": 0}, "num_layers must be a whole number of at least 1, got 0"),
        ({"kernel_size": 0}, "kernel_size must be a whole number of at least 1, got 0"),
        ({"dropout": 1.5}, r"dropout must be in \[0, 1\], got 1.5"),
        ({"n_chan": 8}, "TCN has no argument 'n_chan'. Did you mean 'n_chans'"),
        ({"hidden_size": 8}, "TCN has no argument 'hidden_size'"),
    ],
)
def test_wrong_arguments_are_named(kind, arguments, message):
    with pytest.raises(ConfigError, match=message):
        kind(**arguments)


def test_data_of_another_width_is_named():
    with pytest.raises(DataError, match=r"the data has 3 features a step, the model d_feat=6. Remedy: d_feat=3"):
        ts.TCN(**{**SMALL, "d_feat": 6}).fit(rolling())
    with pytest.raises(DataError, match=r"the data has 12 columns, which is not a multiple of d_feat=5"):
        TCN(**{**SMALL, "d_feat": 5}).fit(flat())


@both
def test_get_params_rebuild_the_model(kind):
    model = kind(**SMALL, dropout=0.1)
    again = kind(**model.get_params())
    assert again.get_params() == model.get_params()
    assert (again.d_feat, again.n_chans, again.kernel_size, again.num_layers, again.dropout) == (3, 8, 2, 2, 0.1)
    assert same(weights(again), weights(model))


# ---------------------------------------------------------------- files and interruptions
@both
@pytest.mark.parametrize("name", ["best.safetensors", "best.pkl"])
def test_weights_survive_a_file(kind, name, tmp_path):
    model = kind(**SMALL).fit(dataset_for(kind), save_path=tmp_path / name)
    other = kind(**{**SMALL, "seed": 9}).load_weights(tmp_path / name)
    pd.testing.assert_series_equal(other.predict(dataset_for(kind)), model.predict(dataset_for(kind)))


@both
@pytest.mark.parametrize("moment", ["batch", "checkpoint"])
def test_an_interrupted_fit_resumes_to_the_unbroken_result(kind, moment, tmp_path):
    arguments = {**SMALL, "n_epochs": 5, "dropout": 0.3}
    unbroken = kind(**arguments).fit(dataset_for(kind))
    broken = kind(**arguments)
    with pytest.raises(KeyboardInterrupt):
        broken.fit(dataset_for(kind), callbacks=[StopAt(2, moment)], checkpoint_dir=tmp_path)
    torch.manual_seed(99)
    np.random.seed(99)
    resumed = kind(**arguments).fit(dataset_for(kind), checkpoint_dir=tmp_path, resume=True)
    assert len(resumed.history_) == 5
    assert resumed.evals_result_ == unbroken.evals_result_
    assert same(weights(resumed), weights(unbroken))


@both
def test_an_estimator_survives_pickle(kind):
    model = kind(**SMALL).fit(dataset_for(kind))
    again = pickle.loads(pickle.dumps(model))
    pd.testing.assert_series_equal(again.predict(dataset_for(kind)), model.predict(dataset_for(kind)))
    again.fit(dataset_for(kind))


# ---------------------------------------------------------------- windows that follow each other
@pytest.fixture
def always_views(monkeypatch):
    """Views from two windows on: the networks here are too small for them to be worth it."""
    monkeypatch.setattr(_tcn, "CALL_COST", 0)
    monkeypatch.setattr(_tcn, "FEWEST_IN_CALL", 2)


def one_by_one(model, windows: WindowSet) -> np.ndarray:
    """Predictions of gathered windows."""
    with torch.no_grad():
        return model.network.eval()(windows.batch(torch.arange(len(windows))).transpose(1, 2)).numpy()


class Calls:
    """How many windows each call of the network had, and whether they were a view of the panel."""

    def __init__(self, model) -> None:
        self.sizes: list[tuple[int, bool]] = []
        model.network.register_forward_pre_hook(self.note)

    def note(self, network, inputs):
        x = inputs[0]
        self.sizes.append((len(x), x.stride(0) == x.stride(2)))

    def viewed(self) -> int:
        return sum(size for size, is_view in self.sizes if is_view)


@pytest.mark.parametrize("holes", [0.0, 0.05, 0.3])
@pytest.mark.parametrize("batch_size", [7, 4096])
def test_predictions_are_those_of_the_windows_one_by_one(holes, batch_size, always_views):
    dataset = rolling(make_frame(70, 9, 3, holes=holes))
    model = ts.TCN(**{**SMALL, "n_epochs": 1}).fit(dataset)
    model._params["batch_size"] = batch_size
    windows = dataset.windows("test", "infer", with_label=False)
    calls = Calls(model)
    found = model.predict(dataset)
    assert found.index.equals(windows.keys())
    assert sum(size for size, _ in calls.sizes) == len(windows)
    assert max(size for size, _ in calls.sizes) <= batch_size
    share = calls.viewed() / len(windows)
    assert share == 1.0 if holes == 0.0 else 0.0 < share < 1.0
    np.testing.assert_allclose(found.to_numpy(), one_by_one(model, windows), rtol=1e-5, atol=1e-6)


def test_scores_of_shuffled_training_batches_stay_their_own(always_views, monkeypatch):
    frame = make_frame(70, 9, 3, holes=0.05)
    model = ts.TCN(**SMALL)
    calls = Calls(model)
    model.fit(rolling(frame))
    scored = sum(len(rolling(frame).windows(name, "learn")) for name in ("train", "valid"))
    assert calls.viewed() > 0.6 * scored * SMALL["n_epochs"]  # also where the batches leave a tail out
    monkeypatch.setattr(ts.TCN, "_shares", lambda *_: False)
    plain = ts.TCN(**SMALL)
    calls = Calls(plain)
    plain.fit(rolling(frame))
    assert calls.viewed() == 0
    for name in ("train", "valid", "valid_all"):
        np.testing.assert_allclose(model.history_[name], plain.history_[name], rtol=1e-6)
    assert same(weights(model), weights(plain))  # training batches are gathered either way


def test_a_nan_stays_in_the_windows_that_hold_it(always_views):
    frame = make_frame(70, 4, 3, holes=0.0)
    dataset = rolling(frame)
    model = ts.TCN(**{**SMALL, "n_epochs": 1}).fit(dataset)
    clean = model.predict(dataset)
    dates = frame.index.get_level_values(0).unique()
    wrong = frame.copy()
    wrong.loc[(dates[60], "S002"), ("feature", "F1")] = np.nan
    found = model.predict(rolling(wrong))
    touched = found.isna()
    assert 0 < touched.sum() <= 5
    assert set(found.index[touched].get_level_values(1)) == {"S002"}
    assert set(found.index[touched].get_level_values(0)) <= set(dates[60:65])
    pd.testing.assert_series_equal(found[~touched], clean[~touched], rtol=1e-5, atol=1e-6)


def test_a_stage_that_was_overridden_sees_every_sample(always_views):
    class Shifted(ts.TCN):
        def run_network(self, windows, samples, offsets=None):
            return super().run_network(windows, samples, offsets) + 100.0

    dataset = rolling()
    found = Shifted(**{**SMALL, "n_epochs": 0}).fit(dataset).predict(dataset)
    expected = ts.TCN(**{**SMALL, "n_epochs": 0}).fit(dataset).predict(dataset)
    pd.testing.assert_series_equal(found - 100.0, expected, atol=1e-4)


def test_flat_samples_in_a_time_series_model(always_views):
    model = ts.TCN(**{**SMALL, "n_epochs": 1}).fit(flat())
    windows = flat().windows("test", "infer", with_label=False)
    with torch.no_grad():
        expected = model.network.eval()(windows.batch(torch.arange(len(windows))))
    np.testing.assert_allclose(model.predict(flat()).to_numpy(), expected.numpy(), rtol=1e-5, atol=1e-6)


def test_a_call_of_their_own_is_for_windows_that_are_worth_it():
    wide, narrow = ts.TCN(n_chans=128, num_layers=5), ts.TCN(n_chans=4, num_layers=1)
    assert wide.fewest_in_call(6, 60) < 50
    assert narrow.fewest_in_call(6, 5) > 10_000


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**16), holes=st.sampled_from([0.0, 0.1, 0.6]), step_len=st.integers(1, 9),
    first_position=st.integers(0, 12), fewest=st.integers(2, 12),
)  # fmt: skip
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
    parts = windows.stretches(fewest)
    held = torch.cat(parts).tolist() if parts else []
    assert len(held) == len(set(held))
    for part in parts:
        view = windows.view(part)
        assert view is not None
        assert torch.equal(view, windows.batch(part))
        assert view.untyped_storage().data_ptr() == windows.features.untyped_storage().data_ptr()
        assert len(part) >= fewest
    # nothing that could be in one is left out: `fewest` windows that follow each other and are not held give no view
    rows = windows.rows.sort()
    free = [int(s) for s in rows.indices if int(s) not in set(held)]
    for first in range(len(free) - fewest + 1):
        assert windows.view(torch.tensor(free[first : first + fewest])) is None


# ---------------------------------------------------------------- the reference's predictions
def test_quirk_time_series_tcn_transposes_in_predict():
    frame, square = make_frame(70, 9, 3), {**SMALL, "n_epochs": 1}
    dataset = TSDatasetH(handler=frame, segments=SEGMENTS, step_len=3)
    windows = dataset.windows("test", "infer", with_label=False)
    model = ts.TCN(**square).fit(dataset)
    np.testing.assert_allclose(model.predict(dataset).to_numpy(), one_by_one(model, windows), rtol=1e-5, atol=1e-6)
    as_reference = ts.TCN(**square, compat="qlib").fit(dataset)
    assert same(weights(as_reference), weights(model))
    with torch.no_grad():
        expected = model.network.eval()(windows.batch(torch.arange(len(windows))))
    found = as_reference.predict(dataset)
    np.testing.assert_allclose(found.to_numpy(), expected.numpy(), rtol=1e-5, atol=1e-6)
    assert np.abs(found.corr(model.predict(dataset))) < 0.9
    pd.testing.assert_series_equal(as_reference(dataset), found)
    for name in ("train", "valid"):  # training and scores are transposed
        assert as_reference.evals_result_[name] == pytest.approx(model.evals_result_[name], rel=1e-6)
    long = ts.TCN(**square, compat="qlib").fit(rolling())
    with pytest.raises(DataError, match=r"step_len == d_feat, got step_len=5 and d_feat=3. Remedy: compat=None"):
        long.predict(rolling())


@both
def test_quirk_empty_segment_of_tcn(kind):
    for name in ("train", "valid"):
        with pytest.raises(DataError, match=f"segment '{name}' has no samples"):
            kind(**SMALL).fit(dataset_for(kind, segments={**SEGMENTS, name: ("2035-01-01", None)}))


# ---------------------------------------------------------------- a workflow file
@pytest.mark.parametrize(
    "sets",
    [
        ["task.model.module_path=qlib.contrib.model.pytorch_tcn"],
        [
            "task.model.module_path=qlib.contrib.model.pytorch_tcn_ts", "task.dataset.class=TSDatasetH",
            "task.dataset.kwargs.step_len=5", "task.model.kwargs.d_feat=6", "task.model.kwargs.n_jobs=20",
        ],
    ],
    ids=["flat", "ts"],
)  # fmt: skip
def test_a_workflow_file(sets, tmp_path):
    network = (
        "{d_feat: 3, n_chans: 4, kernel_size: 3, num_layers: 2, dropout: 0.1, n_epochs: 2, batch_size: 64, GPU: 0}"
    )
    config, path = write_case(tmp_path)
    replaced = config.read_text().splitlines()
    replaced = [f"    kwargs: {network}" if "hidden_size" in line else line for line in replaced]
    config.write_text("\n".join(replaced))
    run(config, path, ["task.model.class=TCN", *sets], output=tmp_path / "run", seed=1)
    assert json.loads((tmp_path / "run" / "model.json").read_text())
    scores = predict(tmp_path / "run", path)
    assert len(scores) > 0
    assert scores.notna().all()
