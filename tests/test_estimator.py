"""The training loop: errors, repairs, callbacks, weights and checkpoints."""

from __future__ import annotations

import logging
import pickle
import weakref

import numpy as np
import pandas as pd
import pytest
import torch

from qfast.data import DatasetH
from qfast.errors import BackendError, CheckpointError, ConfigError, DataError, NotFittedError, QfastError
from qfast.models import GRU, LSTM, ts
from qfast.training.callbacks import Callback
from support.fits import SMALL, StopAt, same_weights, weights
from support.frames import SEGMENTS, flat, make_frame, rolling


# ---------------------------------------------------------------- learning
def test_history_has_one_row_per_epoch():
    model = ts.LSTM(**SMALL).fit(rolling())
    assert list(model.history_.index) == [0, 1, 2]
    assert {"train", "valid", "valid_all", "train_loss", "train_seconds", "seconds"} <= set(model.history_)
    assert model.evals_result_["valid"] == model.history_["valid"].tolist()
    assert model.best_epoch_ == int(np.argmax(model.history_["valid"]))


def test_the_score_over_all_validation_samples_is_the_plain_mean():
    dataset = rolling()
    model = ts.LSTM(**{**SMALL, "n_epochs": 1}).fit(dataset)
    windows = dataset.windows("valid", "learn")
    with torch.no_grad():
        prediction = model.network.eval()(windows.batch(torch.arange(len(windows))))
    expected = -torch.mean((prediction.double() - windows.label.double()) ** 2)
    assert model.history_["valid_all"].iloc[-1] == pytest.approx(float(expected), rel=1e-6)


def test_early_stopping_keeps_the_best_weights():
    class Scripted(ts.LSTM):
        """Has scripted validation scores, the best at epoch 1."""

        def score_segment(self, windows, segment):
            if segment == "valid":
                return [-3.0, -1.0, -2.0, -1.0, -9.0][self.epoch_], 0.0
            return super().score_segment(windows, segment)

    seen = []

    class Keep(Callback):
        def on_valid_end(self, estimator):
            seen.append(weights(estimator))

    model = Scripted(**{**SMALL, "n_epochs": 50, "early_stop": 2}).fit(rolling(), callbacks=[Keep()])
    assert len(model.history_) == 4  # 1 + early_stop epochs after the best one would be the third
    assert model.best_epoch_ == 1
    assert same_weights(weights(model), seen[1])


# ---------------------------------------------------------------- predicting
def test_predict_accepts_any_segment_and_a_last_batch_of_one():
    dataset = rolling()
    n = len(dataset.prepare("test"))
    model = ts.LSTM(**{**SMALL, "batch_size": n - 1}).fit(dataset)
    prediction = model.predict(dataset)
    assert len(prediction) == n
    assert prediction.index.names == ["datetime", "instrument"]
    assert not prediction.isna().any()
    part = model.predict(dataset, slice("2020-03-20", "2020-03-25"))
    pd.testing.assert_series_equal(part, prediction.reindex(part.index), rtol=1e-5)  # the same score for every segment
    assert len(model.predict(dataset, slice("2031-01-01", None))) == 0


@pytest.mark.parametrize("build", [rolling, flat])
def test_rows_without_a_label_are_scored(build):
    n_features = 3 if build is rolling else 12
    frame = make_frame(70, 9, n_features)
    last = frame.index.get_level_values("datetime").max()
    frame.loc[last, ("label", "LABEL0")] = np.nan
    kind = ts.LSTM if build is rolling else LSTM
    model = kind(**SMALL).fit(build(frame))
    assert last in model.predict(build(frame)).index.get_level_values("datetime")
    unlabelled = frame[["feature"]]
    pd.testing.assert_series_equal(model.predict(build(unlabelled)), model.predict(build(frame)))


def test_a_day_with_one_stock_is_scored():
    frame = make_frame(70, 1, 3, holes=0.0)
    prediction = ts.GRU(**{**SMALL, "batch_size": 1}).fit(rolling(frame)).predict(rolling(frame))
    assert len(prediction) == 70 - len(frame.loc[:"2020-03-10"])


def test_predictions_of_a_call_are_freed_before_the_next_call(monkeypatch):
    model = LSTM(**SMALL)
    data = flat(make_frame())
    model.fit(data)
    run_network, earlier = LSTM.run_network, []

    def recorded(self, *arguments):
        assert all(prediction() is None for prediction in earlier[:-1])
        prediction = run_network(self, *arguments)
        earlier.append(weakref.ref(prediction))
        return prediction

    monkeypatch.setattr(LSTM, "run_network", recorded)
    expected = model.predict(data, "train")
    monkeypatch.setattr(LSTM, "run_network", run_network)
    assert len(earlier) > 2
    pd.testing.assert_series_equal(model.predict(data, "train"), expected)


def test_predict_before_fit_is_refused():
    with pytest.raises(NotFittedError, match="model is not fitted yet!"):
        ts.LSTM(**SMALL).predict(rolling())


# ---------------------------------------------------------------- data that cannot be trained on
def test_nan_in_features_stops_before_training_and_names_column_and_share():
    frame = make_frame(70, 9, 3)
    values = frame[("feature", "F1")].to_numpy(copy=True)
    values[[5, 17]] = np.nan, np.inf
    frame[("feature", "F1")] = values
    model = ts.LSTM(**SMALL)
    before = weights(model)
    with pytest.raises(
        DataError,
        match=r"segment 'train' contain NaN or infinity in 1 of 3 columns(.|\n)*'F1': 2 of \d+ rows .*first at "
        r"2020-01-0\d 00:00:00, 'S00\d'",
    ):
        model.fit(rolling(frame))
    assert same_weights(weights(model), before)


def test_a_nan_only_in_history_is_found_too():
    frame = make_frame(70, 1, 3, holes=0.0)
    start = frame.index.get_level_values("datetime")[30]
    values = frame[("feature", "F2")].to_numpy(copy=True)
    values[27] = np.nan  # three rows before the first sample, inside its window of five
    frame[("feature", "F2")] = values
    with pytest.raises(DataError, match="'F2': 1 of"):
        ts.LSTM(**SMALL).fit(rolling(frame, {"train": (start, None)}))
    values[27], values[20] = 0.0, np.nan  # outside every window
    frame[("feature", "F2")] = values
    ts.LSTM(**{**SMALL, "n_epochs": 1}).fit(rolling(frame, {"train": (start, None)}))


def test_flat_gru_leaves_incomplete_rows_out_and_lstm_refuses_them():
    frame = make_frame(70, 9, 12)
    values = frame[("feature", "F3")].to_numpy(copy=True)
    values[::11] = np.nan
    frame[("feature", "F3")] = values
    with pytest.raises(DataError, match="'F3'"):
        LSTM(**SMALL).fit(flat(frame))
    model = GRU(**{**SMALL, "n_epochs": 1}).fit(flat(frame))
    assert all(torch.isfinite(v).all() for v in weights(model).values())


def test_labels_that_are_nan_or_infinite_do_not_count():
    frame = make_frame(70, 9, 3)
    values = frame[("label", "LABEL0")].to_numpy(copy=True)
    values[::3], values[1::9] = np.nan, np.inf
    frame[("label", "LABEL0")] = values
    model = ts.LSTM(**SMALL).fit(rolling(frame))
    assert np.isfinite(model.history_[["train", "valid", "train_loss"]].to_numpy()).all()


def test_a_batch_without_any_label_leaves_finite_scores_and_is_nan_with_compat():
    frame = make_frame(70, 8, 3, holes=0.0)
    half = frame.index.get_level_values("instrument") < "S004"
    frame[("label", "LABEL0")] = frame[("label", "LABEL0")].mask(half)
    n_valid = len(rolling(frame).prepare("valid"))
    small = {**SMALL, "batch_size": n_valid // 4}
    assert np.isfinite(ts.LSTM(**small).fit(rolling(frame)).history_["valid"]).all()
    assert np.isnan(ts.LSTM(**small, compat="qlib").fit(rolling(frame)).history_["valid"]).all()


def test_empty_and_missing_segments():
    with pytest.raises(DataError, match="segment 'train' has no samples"):
        ts.LSTM(**SMALL).fit(rolling(segments={"train": ("2035-01-01", None)}))
    with pytest.raises(DataError, match="segment 'valid' has no samples"):
        ts.LSTM(**SMALL).fit(rolling(segments={**SEGMENTS, "valid": ("2035-01-01", None)}))
    with pytest.raises(DataError, match=r"the dataset has no segment 'train'; it has \['test'\]"):
        ts.LSTM(**SMALL).fit(rolling(segments={"test": SEGMENTS["test"]}))
    with pytest.raises(DataError, match="no label column"):
        ts.LSTM(**SMALL).fit(rolling(make_frame(70, 9, 3)[["feature"]]))
    with pytest.raises(DataError, match="dataset must be a qfast or Qlib dataset"):
        ts.LSTM(**SMALL).fit(make_frame())


@pytest.mark.parametrize("kind", [LSTM, GRU])
def test_without_a_validation_segment_the_last_weights_stay(kind):
    model = kind(**SMALL)
    before = weights(model)
    model.fit(flat(segments={"train": SEGMENTS["train"]}))
    assert not same_weights(weights(model), before)
    assert "valid" not in model.history_
    assert model.best_epoch_ is None


def test_a_segment_smaller_than_the_batch_is_one_batch_unless_compat():
    model = ts.LSTM(**{**SMALL, "batch_size": 8192}).fit(rolling())
    assert np.isfinite(model.history_["valid"]).all()
    with pytest.raises(DataError, match="batch_size is 8192 but the segment has"):
        ts.LSTM(**{**SMALL, "batch_size": 8192}, compat="qlib").fit(rolling())


@pytest.mark.parametrize("segment", ["train", "valid"])
def test_a_segment_without_any_label_is_refused(segment):
    frame = make_frame(70, 9, 3)
    start, end = SEGMENTS[segment]
    frame.loc[start:end, ("label", "LABEL0")] = np.nan
    with pytest.raises(DataError, match=f"segment '{segment}' has .* samples but no finite label"):
        ts.LSTM(**SMALL).fit(rolling(frame))


def test_features_in_another_order_are_refused():
    model = LSTM(**SMALL).fit(flat())
    frame = make_frame(70, 9, 12)
    with pytest.raises(DataError, match="feature columns of the training data in another order"):
        model.predict(flat(frame[frame.columns[::-1]]))


def test_features_with_other_names_are_reported(caplog):
    model = LSTM(**SMALL).fit(flat())
    frame = make_frame(70, 9, 12)
    scores = model.predict(flat(frame))
    assert "other names" not in caplog.text
    names = frame.columns.to_list()
    renamed = frame.set_axis(pd.MultiIndex.from_tuples([names[0], ("feature", "other"), *names[2:]]), axis=1)
    assert model.predict(flat(renamed)).equals(scores), "Qlib ignores names"
    assert "1 of 12 feature columns have other names than in training, for example 'other' instead of" in caplog.text
    shifted = frame.set_axis(pd.MultiIndex.from_tuples([("feature", "new"), *names[:-2], names[-1]]), axis=1)
    with pytest.raises(DataError, match="another order"):
        model.predict(flat(shifted))
    with pytest.raises(DataError, match="has 11 feature columns, but the model was trained on 12"):
        model.predict(flat(frame.drop(columns=names[1])))


@pytest.mark.parametrize(("kind", "dataset_of", "columns"), [(LSTM, flat, 12), (ts.LSTM, rolling, 3)])
def test_scores_from_infinite_features_are_reported(kind, dataset_of, columns, caplog):
    dataset = dataset_of(make_frame(70, 9, columns))
    model = kind(**SMALL).fit(dataset)
    model.predict(dataset)
    assert "infinite features" not in caplog.text
    frame = make_frame(70, 9, columns)
    frame.iloc[-3:, 0] = np.inf
    model.predict(dataset_of(frame))
    assert "3 of" in caplog.text
    assert "samples have infinite features, so their scores are not meaningful" in caplog.text


def test_evals_result_is_a_dict():
    with pytest.raises(ConfigError, match="evals_result must be a dict, got list"):
        LSTM(**SMALL).fit(flat(), evals_result=[])


def test_labels_too_large_for_a_first_step_are_reported():
    frame = make_frame(70, 9, 3)
    frame[("label", "LABEL0")] = np.float32(1e30)
    with pytest.raises(DataError, match=r"at batch 1 of epoch 0.*no step has been made yet"):
        LSTM(**SMALL).fit(DatasetH(handler=frame, segments=SEGMENTS))


def test_an_interrupt_before_the_first_epoch_leaves_the_model_unfitted():
    model = ts.LSTM(**SMALL)
    with pytest.raises(KeyboardInterrupt):
        model.fit(rolling(), callbacks=[StopAt(0, "batch")])
    with pytest.raises(NotFittedError, match="not fitted yet"):
        model.predict(rolling())


def test_a_loss_that_explodes_is_reported():
    with pytest.raises(DataError, match=r"training loss became (nan|inf) at batch \d+ of epoch \d+.*lower lr"):
        ts.LSTM(**{**SMALL, "lr": 1e25, "optimizer": "gd", "n_epochs": 50}).fit(rolling())


# ---------------------------------------------------------------- weights
def test_reweighter_is_checked():
    class Wrong:
        def reweight(self, samples):
            return np.ones(3)

    with pytest.raises(DataError, match=r"reweighter returned 3 weights for the \d+ samples of segment 'train'"):
        ts.LSTM(**SMALL).fit(rolling(), reweighter=Wrong())
    with pytest.raises(ConfigError, match=r"must have a method reweight.*got dict"):
        ts.LSTM(**SMALL).fit(rolling(), reweighter={"class": "X"})

    for bad, shown in ((np.nan, "nan"), (-1.0, "-1.0")):

        class Bad:
            def reweight(self, samples, bad=bad):
                return np.where(np.arange(len(samples)) == 3, bad, 1.0)

        with pytest.raises(DataError, match=f"1 weights for segment 'train' that are negative or not finite.*{shown}"):
            ts.LSTM(**SMALL).fit(rolling(), reweighter=Bad())


def test_weights_follow_their_samples_if_rows_are_left_out():
    class ByDate:
        def reweight(self, frame):
            return frame.index.get_level_values("datetime").day.to_numpy() / 31.0

    frame = make_frame(70, 9, 12)
    values = frame[("feature", "F3")].to_numpy(copy=True)
    values[::11] = np.nan
    frame[("feature", "F3")] = values
    with_gaps = GRU(**SMALL).fit(flat(frame), reweighter=ByDate())
    without = GRU(**SMALL).fit(flat(frame.dropna()), reweighter=ByDate())
    assert with_gaps.evals_result_ == without.evals_result_
    assert same_weights(weights(with_gaps), weights(without))


# ---------------------------------------------------------------- arguments
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_a_gpu_asked_for_and_not_there_is_refused():
    with pytest.raises(BackendError, match=r"device='cuda' was requested but this torch .* detects no GPU"):
        LSTM(device="cuda")
    assert LSTM(GPU=0).device.type == "cpu"  # the default uses a GPU only if there is one


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_an_unavailable_gpu_number_is_logged(caplog):
    assert LSTM(GPU=3).device.type == "cpu"
    assert "GPU=3 was requested but no GPU is available" in caplog.text
    caplog.clear()
    for number in (0, -1, None):
        LSTM(GPU=number)
    assert caplog.text == ""


def test_wrong_input_shapes_are_reported():
    network = LSTM(d_feat=6).network
    with pytest.raises(DataError, match=r"x has 20 features .* built with d_feat=6. Remedy: d_feat=20"):
        network(torch.zeros(2, 5, 20))
    with pytest.raises(DataError, match="x has 20 columns, which is not a multiple of d_feat=6"):
        network(torch.zeros(2, 20))
    with pytest.raises(DataError, match=r"x must be \[B, T, F\] or \[B, F\*T\], got 1 axes"):
        network(torch.zeros(2))


# ---------------------------------------------------------------- files and interruptions
def test_damaged_or_foreign_weight_files_are_named(tmp_path):
    model = ts.LSTM(**SMALL)
    model.save_weights(tmp_path / "w.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "w.safetensors").read_bytes()[:-40])
    with pytest.raises(CheckpointError, match=r"cut.safetensors is not a readable weight file, it may be truncated"):
        model.load_weights(tmp_path / "cut.safetensors")
    with pytest.raises(CheckpointError, match="does not exist"):
        model.load_weights(tmp_path / "none.safetensors")
    ts.GRU(**SMALL).save_weights(tmp_path / "gru.safetensors")
    with pytest.raises(CheckpointError, match=r"does not fit LSTMModel.*other shapes .*weight_ih_l0: file"):
        model.load_weights(tmp_path / "gru.safetensors")
    with (tmp_path / "evil.pkl").open("wb") as file:
        pickle.dump({"x": print}, file)
    with pytest.raises(CheckpointError, match="not a readable weight file"):
        model.load_weights(tmp_path / "evil.pkl")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match="contains list, not a state dict"):
        model.load_weights(tmp_path / "list.pt")


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    model = ts.LSTM(**SMALL)
    path = tmp_path / "w.safetensors"
    model.save_weights(path)
    before = path.read_bytes()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(QfastError, match=r"no space left on the disk for .*w\.safetensors"):
        model.save_weights(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]


def test_resume_refuses_other_arguments_and_missing_or_damaged_checkpoints(tmp_path):
    ts.LSTM(**SMALL).fit(rolling(), checkpoint_dir=tmp_path)
    with pytest.raises(CheckpointError, match=r"other arguments \(hidden_size: 8 -> 16\)"):
        ts.LSTM(**{**SMALL, "hidden_size": 16}).fit(rolling(), checkpoint_dir=tmp_path, resume=True)
    with pytest.raises(CheckpointError, match=r"is a checkpoint of qfast.models.ts.LSTM, not of qfast.models.ts.GRU"):
        ts.GRU(**SMALL).fit(rolling(), checkpoint_dir=tmp_path, resume=True)
    with pytest.raises(CheckpointError, match="does not exist"):
        ts.LSTM(**SMALL).fit(rolling(), checkpoint_dir=tmp_path / "nowhere", resume=True)
    with pytest.raises(ConfigError, match="resume=True needs checkpoint_dir"):
        ts.LSTM(**SMALL).fit(rolling(), resume=True)
    with pytest.raises(CheckpointError, match=r"other data: \['train'\] differ"):
        ts.LSTM(**SMALL).fit(
            rolling(segments={**SEGMENTS, "train": ("2020-01-01", "2020-02-01")}), checkpoint_dir=tmp_path, resume=True
        )
    with pytest.raises(CheckpointError, match=r"other arguments \(weight_decay: 0.0 -> 0.5\)"):
        ts.LSTM(**SMALL, weight_decay=0.5).fit(rolling(), checkpoint_dir=tmp_path, resume=True)
    longer = ts.LSTM(**{**SMALL, "n_epochs": 4}).fit(rolling(), checkpoint_dir=tmp_path, resume=True)
    assert len(longer.history_) == 4
    path = tmp_path / "last.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="may be truncated"):
        ts.LSTM(**SMALL).fit(rolling(), checkpoint_dir=tmp_path, resume=True)
    ts.LSTM(**SMALL).save_weights(path)
    with pytest.raises(CheckpointError, match="contains weights but no training state"):
        ts.LSTM(**SMALL).fit(rolling(), checkpoint_dir=tmp_path, resume=True)


def test_nothing_is_printed_and_no_file_appears(tmp_path, monkeypatch, capfd, caplog):
    monkeypatch.chdir(tmp_path)
    with caplog.at_level(logging.INFO, logger="qfast"):
        ts.LSTM(**SMALL).fit(rolling())
    epochs = [r.message.split(":")[0] for r in caplog.records if r.message.startswith("epoch")]
    assert epochs == ["epoch 0", "epoch 1", "epoch 2"]
    assert capfd.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []


def test_callbacks_see_every_moment_in_order():
    seen: list[str] = []

    class Spy(Callback):
        pass

    for name in ("fit_start", "epoch_start", "batch_end", "valid_end", "epoch_end", "fit_end"):
        setattr(Spy, f"on_{name}", lambda self, estimator, name=name: seen.append(name))
    ts.LSTM(**{**SMALL, "n_epochs": 2, "batch_size": 100}).fit(rolling(), callbacks=[Spy()])
    epoch = [
        "epoch_start",
        *["batch_end"] * seen[: seen.index("valid_end")].count("batch_end"),
        "valid_end",
        "epoch_end",
    ]
    assert seen == ["fit_start", *epoch, *epoch, "fit_end"]
