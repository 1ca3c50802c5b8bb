"""ALSTM estimators: fit, predict, files, `rnn_type`, and the rest of what the reference's ALSTM has alone."""

from __future__ import annotations

import importlib
import json
import logging
import pickle

import numpy as np
import pandas as pd
import pytest
import torch

from qfast.data import TSDatasetH
from qfast.errors import ConfigError, DataError
from qfast.models import ALSTM, ts
from qfast.workflow.predict import predict
from qfast.workflow.run import run
from support.fits import SMALL, StopAt, dataset_for, same, weights
from support.frames import SEGMENTS, flat, make_frame, rolling
from support.qlib import TRAIN, qlib_frames
from support.workflows import write_case

both = pytest.mark.parametrize("kind", [ALSTM, ts.ALSTM], ids=["flat", "ts"])


# ---------------------------------------------------------------- learning
@pytest.mark.parametrize(("kind", "rnn_type"), [(ALSTM, "LSTM"), (ts.ALSTM, "GRU")], ids=["flat", "ts"])
def test_a_planted_signal_is_learnt(kind, rnn_type):
    frame = make_frame(120, 12, 12 if kind is ALSTM else 3, holes=0.05)
    newest = "F3" if kind is ALSTM else "F0"  # feature 0 at the last step
    frame[("label", "LABEL0")] = frame[("feature", newest)] * 0.9 + 0.1 * frame[("label", "LABEL0")]
    segments = {
        "train": ("2020-01-01", "2020-04-30"), "valid": ("2020-05-01", "2020-05-31"), "test": ("2020-06-01", None),
    }  # fmt: skip
    dataset = dataset_for(kind, frame=frame, segments=segments)
    model = kind(**{**SMALL, "n_epochs": 10, "lr": 0.02, "dropout": 0.05, "rnn_type": rnn_type}).fit(dataset)
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
    whole = {**SMALL, "batch_size": 4096}  # one batch: the order of the samples does not matter
    one, other = ts.ALSTM(**whole).fit(dataset), ALSTM(**whole).fit(laid_out)
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


# ---------------------------------------------------------------- rnn_type
@both
def test_quirk_rnn_type_is_built(kind, caplog):
    """The reference takes any and builds a GRU."""
    pytest.importorskip("qlib", reason="pyqlib is the oracle; install qfast-models[qlib]")
    reference = importlib.import_module("qlib.contrib.model.pytorch_alstm" + ("" if kind is ALSTM else "_ts")).ALSTM
    assert type(reference(**SMALL, rnn_type="LSTM").ALSTM_model.rnn) is torch.nn.GRU
    with caplog.at_level(logging.INFO, logger="qfast"):
        model = kind(**SMALL, rnn_type="LSTM")
    assert type(model.network.rnn) is torch.nn.LSTM
    assert model.rnn_type == model.get_params()["rnn_type"] == "LSTM"
    assert "rnn_type='LSTM' is built; the reference would ignore it and build a GRU" in caplog.text
    assert type(kind(**SMALL).network.rnn) is torch.nn.GRU
    caplog.clear()
    kind(**SMALL, rnn_type="gru")
    assert caplog.text == ""


@both
def test_compat_builds_a_gru_as_the_reference_does(kind, caplog):
    with caplog.at_level(logging.INFO, logger="qfast"):
        model = kind(**SMALL, rnn_type="LSTM", compat="qlib")
    assert "rnn_type='LSTM' has no effect with compat='qlib': a GRU is built" in caplog.text
    assert same(weights(model), weights(kind(**SMALL)))
    assert type(kind(**SMALL, rnn_type="nonsense", compat="qlib").network.rnn) is torch.nn.GRU
    with pytest.raises(ConfigError, match=r"rnn_type must be one of \['GRU', 'LSTM', 'RNN'\], got 'nonsense'"):
        kind(**SMALL, rnn_type="nonsense")


@both
def test_torchs_plain_layer_trains_too(kind):
    model = kind(**SMALL, rnn_type="RNN")
    before = weights(model)
    model.fit(dataset_for(kind))
    assert not same(weights(model), before)
    assert model.predict(dataset_for(kind)).notna().all()


# ---------------------------------------------------------------- what the reference's ALSTM_ts has alone
def test_the_metric_mse_is_that_of_the_reference(tmp_path):
    pytest.importorskip("qlib", reason="pyqlib is the oracle; install qfast-models[qlib]")
    from qlib.contrib.model.pytorch_alstm_ts import ALSTM as Reference

    sizes = {"d_feat": 3, "hidden_size": 8, "num_layers": 2, "seed": 3, "metric": "mse"}
    samples, expected, found = qlib_frames("_ts"), {}, {}
    reference = Reference(**sizes, **TRAIN, n_jobs=0)
    reference.fit(samples, expected, save_path=str(tmp_path / "x.pt"))
    ts.ALSTM(**sizes, **TRAIN).fit(samples, found)
    for name in ("train", "valid"):
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5)
    plain = {}
    ts.ALSTM(**{**sizes, "metric": "loss"}, **TRAIN).fit(samples, plain)
    assert plain == found  # the same number by another name


def test_any_segment_is_predicted_as_by_the_reference(tmp_path):
    pytest.importorskip("qlib", reason="pyqlib is the oracle; install qfast-models[qlib]")
    from qlib.contrib.model.pytorch_alstm_ts import ALSTM as Reference

    sizes = {"d_feat": 3, "hidden_size": 8, "num_layers": 2, "seed": 3}
    samples = qlib_frames("_ts")
    reference, model = Reference(**sizes, **TRAIN, n_jobs=0), ts.ALSTM(**sizes, **TRAIN)
    model.network.load_state_dict(reference.ALSTM_model.state_dict())
    reference.fitted = model.fitted = True
    for segment in ("valid", "test", "train"):
        expected = reference.predict(samples, segment=segment)
        found = model.predict(samples, segment=segment)
        pd.testing.assert_series_equal(found, expected, rtol=1e-4, atol=1e-6, check_names=False)


# ---------------------------------------------------------------- arguments
@both
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"d_feat": 0}, "d_feat must be a whole number of at least 1, got 0"),
        ({"hidden_size": 2.5}, "hidden_size must be a whole number of at least 1, got 2.5"),
        ({"num_layers": 0}, "num_layers must be a whole number of at least 1, got 0"),
        ({"dropout": 1.5}, r"dropout must be in \[0, 1\], got 1.5"),
        ({"rnn_typ": "GRU"}, "ALSTM has no argument 'rnn_typ'. Did you mean 'rnn_type'"),
        ({"rnn_type": "LSTN"}, "rnn_type must be one of .* Did you mean 'LSTM'"),
        ({"rnn_type": None}, "rnn_type must be one of .* got None"),
        ({"metric": "ic"}, "metric must be one of"),
        ({"n_chans": 8}, "ALSTM has no argument 'n_chans'"),
    ],
)
def test_wrong_arguments_are_named(kind, arguments, message):
    with pytest.raises(ConfigError, match=message):
        kind(**arguments)


@both
def test_a_reweighter_that_is_none_is_refused(kind):
    with pytest.raises(ConfigError, match="reweighter must have a method reweight"):
        kind(**SMALL).fit(dataset_for(kind), reweighter={"class": "Something"})


@both
def test_data_with_nan_is_refused(kind):
    frame = make_frame(70, 9, 12 if kind is ALSTM else 3)
    frame.iloc[5, 1] = np.nan
    with pytest.raises(DataError, match="F1"):
        kind(**SMALL).fit(dataset_for(kind, frame=frame))


@both
def test_get_params_rebuild_the_model(kind):
    model = kind(**SMALL, dropout=0.1, rnn_type="LSTM")
    again = kind(**model.get_params())
    assert again.get_params() == model.get_params()
    assert (again.d_feat, again.hidden_size, again.num_layers, again.dropout) == (3, 8, 2, 0.1)
    assert same(weights(again), weights(model))
    assert again.ALSTM_model is again.network


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
    arguments = {**SMALL, "n_epochs": 5, "dropout": 0.3, "rnn_type": "LSTM"}
    unbroken = kind(**arguments).fit(dataset_for(kind))
    broken = kind(**arguments)
    with pytest.raises(KeyboardInterrupt):
        broken.fit(dataset_for(kind), callbacks=[StopAt(2, moment)], checkpoint_dir=tmp_path)
    torch.manual_seed(99)
    np.random.seed(99)
    resumed = kind(**arguments).fit(dataset_for(kind), checkpoint_dir=tmp_path, resume=True)
    assert resumed.evals_result_ == unbroken.evals_result_
    assert same(weights(resumed), weights(unbroken))


@both
def test_it_is_pickled_with_its_weights(kind):
    model = kind(**SMALL, rnn_type="LSTM").fit(dataset_for(kind))
    again = pickle.loads(pickle.dumps(model))
    pd.testing.assert_series_equal(again.predict(dataset_for(kind)), model.predict(dataset_for(kind)))


def test_windows_of_one_step():
    dataset = TSDatasetH(handler=make_frame(70, 9, 3), segments=SEGMENTS, step_len=1)
    model = ts.ALSTM(**SMALL).fit(dataset)
    assert model.predict(dataset).notna().all()


# ---------------------------------------------------------------- workflows
MODEL = "task.model.module_path=qlib.contrib.model.pytorch_alstm"
ROLLING = [
    f"{MODEL}_ts", "task.dataset.class=TSDatasetH", "task.dataset.kwargs.step_len=5", "task.model.kwargs.d_feat=6",
    "task.model.kwargs.n_jobs=20",
]  # fmt: skip


@pytest.mark.parametrize("sets", [[MODEL], ROLLING], ids=["flat", "ts"])
@pytest.mark.parametrize("rnn_type", ["GRU", "LSTM"])
def test_a_workflow_file(sets, rnn_type, tmp_path):
    """With the `rnn_type` that the reference's own workflow files carry."""
    config, path = write_case(tmp_path)
    change = ["task.model.class=ALSTM", f"task.model.kwargs.rnn_type={rnn_type}", *sets]
    run(config, path, change, output=tmp_path / "run", seed=1)
    kept = json.loads((tmp_path / "run" / "model.json").read_text())
    assert rnn_type in json.dumps(kept)
    scores = predict(tmp_path / "run", path)
    assert len(scores) > 0
    assert scores.notna().all()
