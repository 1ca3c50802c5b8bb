"""Functions and attributes that users override, as Qlib calls them; arguments changed after construction; `log`."""

from __future__ import annotations

import copy
import functools
import pickle

import numpy as np
import pandas as pd
import pytest
import torch

from qfast.data import DatasetH
from qfast.errors import CheckpointError, ConfigError, DataError
from qfast.models import GRU, LSTM, GATs, TransformerModel, ts
from qfast.training.callbacks import Callback, epoch_text
from qfast.training.losses import masked_mse
from support import overrides
from support.fits import (
    SMALL,
    assert_states_equal,
    dataset_for,
    is_time_series,
    parametrize_estimators,
    same_weights,
    small_model,
    weights,
)
from support.frames import SEGMENTS, flat, make_frame, rolling

WEIGHTED = (ts.LSTM, ts.GRU, ts.ALSTM)
SCORES = ["train", "valid"]
GATS = {"d_feat": 3, "hidden_size": 4, "n_epochs": 2, "GPU": -1}


class Reweighter:
    def reweight(self, samples):
        return np.linspace(0.5, 1.5, len(samples))


def absolute_error(pred, label):
    return (pred - label).abs().nanmean()


# ---------------------------------------------------------------- overridden functions
@parametrize_estimators()
def test_wrappers_leave_every_result_unchanged(kind):
    dataset, calls = dataset_for(kind), []
    plain = small_model(kind).fit(dataset)
    model = overrides.wrapped(functools.partial(small_model, kind), calls)().fit(dataset)
    assert_states_equal(model, plain)
    epoch = ["train_epoch", "test_epoch", "test_epoch"]
    assert [call[0] for call in calls] == epoch * 3
    assert all(isinstance(call[1], str) == is_time_series(kind) for call in calls)


@pytest.mark.parametrize("kind", WEIGHTED)
def test_wrappers_leave_weighted_results_unchanged(kind):
    plain = small_model(kind).fit(rolling(), reweighter=Reweighter())
    model = overrides.wrapped(functools.partial(small_model, kind), [])().fit(rolling(), reweighter=Reweighter())
    assert_states_equal(model, plain)
    assert not model.history_["train"].equals(small_model(kind).fit(rolling()).history_["train"])


@parametrize_estimators()
def test_metric_fn_selects_the_epoch(kind):
    dataset, calls = dataset_for(kind), []
    model = small_model(overrides.own_metric(kind, calls), n_epochs=4).fit(dataset)
    plain = small_model(kind, n_epochs=4).fit(dataset)
    assert {call[0] for call in calls} == {"metric_fn"}
    assert model.history_["train_loss"].equals(plain.history_["train_loss"])  # it only scores
    assert model.best_epoch_ == int(np.argmax(model.history_["valid"]))
    assert (model.history_["valid"].abs() < 0.5).all()
    windows = dataset.windows("valid", "learn")
    expected = [float(overrides.information_coefficient(*call[1:])) for call in calls]
    per_epoch = len(expected) // 4
    whole = model.batches(windows, "valid_score").whole
    last = expected[-whole:]
    assert per_epoch > whole
    assert model.history_["valid"].iloc[-1] == pytest.approx(np.mean(last))
    assert calls[-1][2].dtype == calls[-1][1].dtype == torch.float32


@parametrize_estimators()
@pytest.mark.parametrize("with_weights", [False, True], ids=["two arguments", "three arguments"])
def test_loss_fn_trains_and_scores(kind, with_weights):
    dataset, calls = dataset_for(kind), []
    model = small_model(overrides.own_loss(kind, calls, weights=with_weights)).fit(dataset)
    passed = calls[0][3:]
    if with_weights and kind in WEIGHTED:
        assert torch.equal(passed[0], torch.ones(len(calls[0][1]), dtype=torch.float64))
    else:
        assert passed in ((), (None,))
    pred, label = calls[-1][1:3]
    assert torch.isfinite(label).all()  # metric_fn passes the labelled samples only
    assert model.history_["valid"].max() < 0
    score = -float(torch.nn.functional.huber_loss(pred, label, delta=0.1))
    assert model.history_["valid"].iloc[-1] == pytest.approx(score, rel=0.5)
    assert model.best_epoch_ == int(np.argmax(model.history_["valid"]))


@parametrize_estimators()
def test_train_epoch_receives_qlibs_data(kind):
    calls: overrides.Calls = []
    dataset = dataset_for(kind)
    model = small_model(overrides.own_train_epoch(kind, calls), n_epochs=1)
    before = weights(model)
    model.fit(dataset)
    assert not same_weights(before, weights(model))
    assert "train_loss" not in model.history_  # the function returns nothing
    assert set(SCORES) < set(model.history_)
    if not is_time_series(kind):
        frame = dataset.prepare("train", col_set=["feature", "label"], data_key="learn")
        pd.testing.assert_frame_equal(calls[0][1], frame["feature"])
        pd.testing.assert_frame_equal(calls[0][2], frame["label"])


@parametrize_estimators([ts.LSTM, ts.GATs, ts.TCN])
def test_batches_of_a_loader_are_the_windows_of_the_sampler(kind):
    dataset, seen = dataset_for(kind), []

    class Collect(kind):
        def train_epoch(self, data_loader):
            assert len(list(data_loader)) == len(data_loader)
            seen.extend(data_loader)
            seen.append(data_loader)

    small_model(Collect, n_epochs=1).fit(dataset)
    loader = seen.pop()
    sampler = dataset.prepare("train", col_set=["feature", "label"], data_key="learn")
    sampler.config(fillna_type="ffill+bfill")
    table = sampler[list(range(len(sampler)))]
    for batch in seen:
        data, *weight = batch if kind is ts.LSTM else (batch,)
        assert all(torch.equal(w, torch.ones(len(data), dtype=torch.float64)) for w in weight)
        for window in data.reshape(-1, *data.shape[-2:]).numpy():
            assert (table == window).all((1, 2)).any()
    samples = loader.dataset
    first = samples[0][0] if kind is ts.LSTM else samples[0]
    np.testing.assert_array_equal(first, table[0])
    assert len(samples) == len(sampler)
    assert loader.batch_size == (None if kind is ts.GATs else SMALL["batch_size"])
    if kind is ts.GATs:
        assert {len(batch) for batch in seen} == {1}


@parametrize_estimators()
def test_test_epoch_scores(kind):
    calls: overrides.Calls = []
    model = small_model(overrides.own_test_epoch(kind, calls), n_epochs=4).fit(dataset_for(kind))
    plain = small_model(kind, n_epochs=4).fit(dataset_for(kind))
    assert [call[0] for call in calls] == ["test_epoch"] * 8
    expected = -(-plain.history_["valid"] - 0.98).abs()
    np.testing.assert_allclose(model.history_["valid"], expected, rtol=1e-4, atol=1e-6)
    assert model.best_epoch_ == int(np.argmax(expected))


@pytest.mark.parametrize("kind", [LSTM, ts.GRU, ts.GATs, ts.TCN])
def test_a_users_fit_calls_the_functions(kind):
    scores: dict[str, list[float]] = {}
    model = small_model(overrides.own_fit(kind, []))
    model.fit(dataset_for(kind), scores)
    assert np.isfinite(scores["valid"]).all()
    assert len(scores["valid"]) == 2
    assert not model.predict(dataset_for(kind)).isna().any()


def test_mse_is_called_with_the_labelled_samples():
    frame = make_frame(70, 9, 12)
    frame.iloc[::5, -1] = np.nan

    class Halved(LSTM):
        def mse(self, pred, label):
            assert torch.isfinite(label).all()
            return super().mse(pred, label) / 2

    class HalvedWindows(ts.LSTM):
        def mse(self, pred, label, weight):
            assert len(weight) == len(label)
            return super().mse(pred, label, weight) / 2

    for kind, dataset in ((Halved, flat(frame)), (HalvedWindows, rolling())):
        for metric in ("", "mse"):
            model = kind(**{**SMALL, "n_epochs": 1}, metric=metric).fit(dataset)
            plain = kind.__mro__[1](**{**SMALL, "n_epochs": 1}).fit(dataset)
            assert model.history_["train_loss"][0] == pytest.approx(plain.history_["train_loss"][0] / 2, rel=1e-2)
            assert model.history_["valid"][0] == pytest.approx(plain.history_["valid"][0] / 2, rel=1e-2)


def test_replacing_and_restoring_a_function():
    model = ts.LSTM(**SMALL)
    inner = model.loss_fn
    model.loss_fn = lambda pred, label, weight: inner(pred, label, weight)
    model.loss_fn = inner  # as pytest's monkeypatch does
    assert not model._has_own_functions()

    @functools.wraps(inner)  # copies name, module and attributes of qfast's function
    def wrapper(*data):
        return inner(*data)

    model.loss_fn = wrapper
    assert model._has_own_functions()
    copied = pickle.loads(pickle.dumps(ts.LSTM(**SMALL)))
    assert not copied._has_own_functions()
    assert not copy.deepcopy(copied)._has_own_functions()


def test_sample_weights_reach_the_users_loss():
    calls: overrides.Calls = []
    model = small_model(overrides.own_loss(ts.LSTM, calls, weights=True), n_epochs=1)
    model.fit(rolling(), reweighter=Reweighter())
    assert calls[0][3].dtype == torch.float64
    assert calls[0][3].std() > 0.1
    calls.clear()
    small_model(overrides.own_loss(LSTM, calls, weights=True), n_epochs=1).fit(flat(), reweighter=Reweighter())
    assert calls[0][3].std() > 0.1
    with pytest.raises(ConfigError, match=r"OwnLoss.loss_fn does not accept weights"):
        small_model(overrides.own_loss(LSTM, [])).fit(flat(), reweighter=Reweighter())
    with pytest.raises(ConfigError, match=r"OwnTrainEpoch.train_epoch receives no sample weights"):
        small_model(overrides.own_train_epoch(LSTM, [])).fit(flat(), reweighter=Reweighter())


# ---------------------------------------------------------------- overrides that cannot work
def test_functions_that_cannot_be_called_are_refused_before_training():
    class OldTrainEpoch(LSTM):
        def train_epoch(self, windows):
            raise AssertionError

    with pytest.raises(ConfigError, match=r"is called as train_epoch\(x_train, y_train\), as in Qlib"):
        OldTrainEpoch(**SMALL).fit(flat())

    class OneArgument(ts.LSTM):
        def metric_fn(self, pred):
            raise AssertionError

    with pytest.raises(ConfigError, match=r"is called as metric_fn\(pred, label\)"):
        OneArgument(**SMALL).fit(rolling())


@pytest.mark.parametrize(
    ("name", "function", "message"),
    [
        ("test_epoch", lambda x, y: 0.5, r"must return \(loss, score\) as in Qlib, got 0.5"),
        (
            "metric_fn",
            lambda pred, label: pred,
            r"the result of metric_fn must be a number, got Tensor of shape \(32,\)",
        ),
        ("train_epoch", lambda x, y: "done", r"the result of train_epoch must be a number, got str 'done'"),
    ],
)
def test_a_wrong_result_is_refused_with_the_name_of_the_function(name, function, message):
    model = LSTM(**SMALL)
    setattr(model, name, function)
    with pytest.raises(ConfigError, match=message):
        model.fit(flat())


def test_weights_that_become_nan_are_reported():
    class Diverging(LSTM):
        def train_epoch(self, x_train, y_train):
            with torch.no_grad():
                self.network.fc_out.bias.fill_(float("nan"))

    with pytest.raises(ConfigError, match=r"made weights NaN or infinite in epoch 0: \['fc_out.bias'\]"):
        Diverging(**SMALL).fit(flat())


def test_a_batch_of_a_wrong_shape_is_refused():
    with pytest.raises(DataError, match=r"a batch must be a tensor \[B, T, F \+ 1\]"):
        ts.LSTM(**SMALL).train_epoch([torch.zeros(3, 4)])
    frame = flat().prepare("train", col_set=["feature", "label"])
    with pytest.raises(DataError, match="expected one label for each of"):
        LSTM(**SMALL).train_epoch(frame["feature"], frame["label"].iloc[1:])
    with pytest.raises(ConfigError, match="must be a DataFrame, got ndarray"):
        LSTM(**SMALL).train_epoch(frame["feature"].to_numpy(), frame["label"])


# ---------------------------------------------------------------- loss and metric as functions
def test_loss_and_metric_accept_functions():
    model = LSTM(**SMALL, loss=absolute_error, metric=overrides.information_coefficient).fit(flat())
    assert (model.history_["valid"].abs() < 0.5).all()
    assert 0.5 < model.history_["train_loss"].iloc[0] < 1.0  # the mean absolute error of standard normal labels is 0.8

    class Overridden(LSTM):
        def loss_fn(self, pred, label):
            return absolute_error(pred, label)

    other = Overridden(**SMALL).fit(flat())
    assert other.history_["train_loss"].equals(model.history_["train_loss"])
    by_loss = LSTM(**SMALL, loss=absolute_error).fit(flat())
    assert by_loss.history_["valid"].equals(other.history_["valid"])  # the default metric is minus the loss
    squared = LSTM(**SMALL, loss=absolute_error, metric="mse").fit(flat())
    assert not squared.history_["valid"].equals(other.history_["valid"])


def test_a_loss_receives_labelled_samples_and_their_weights():
    frame = make_frame(70, 9, 12)
    frame.iloc[::5, -1] = np.nan
    seen = []

    def loss(pred, label, weight):
        assert torch.isfinite(label).all()
        seen.append(weight)
        return masked_mse(pred, label, weight)

    ours = LSTM(**SMALL, loss=loss).fit(flat(frame), reweighter=Reweighter())
    plain = LSTM(**SMALL).fit(flat(frame), reweighter=Reweighter())
    np.testing.assert_allclose(ours.history_["train_loss"], plain.history_["train_loss"], rtol=1e-5)
    assert any(weight is not None for weight in seen)
    with pytest.raises(ConfigError, match=r"absolute_error does not accept weights"):
        LSTM(**SMALL, loss=absolute_error).fit(flat(), reweighter=Reweighter())


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("loss", "mae", r"loss must be one of \['mse', 'ic', .*\] or, in Python, a function of \(pred, label\)"),
        ("loss", lambda: 0.0, r"loss must be a name or a function of \(pred, label\) or \(pred, label, weight\)"),
        ("metric", lambda pred: 0.0, r"metric must be a name or a function of \(pred, label\), got "),
    ],
)
def test_wrong_functions_are_refused(argument, value, message):
    with pytest.raises(ConfigError, match=message):
        LSTM(**SMALL, **{argument: value})


def test_a_fit_with_functions_is_resumed(tmp_path):
    arguments = {"loss": absolute_error, "metric": overrides.information_coefficient}
    whole = LSTM(**SMALL, **arguments).fit(flat())
    LSTM(**{**SMALL, "n_epochs": 2}, **arguments).fit(flat(), checkpoint_dir=tmp_path)
    resumed = LSTM(**SMALL, **arguments).fit(flat(), checkpoint_dir=tmp_path, resume=True)
    assert_states_equal(resumed, whole)
    with pytest.raises(CheckpointError, match=r"loss: 'test_overrides.absolute_error' -> 'mse'\), so it cannot"):
        LSTM(**SMALL).fit(flat(), checkpoint_dir=tmp_path, resume=True)


# ---------------------------------------------------------------- attributes after construction
@parametrize_estimators()
def test_arguments_set_afterwards_equal_those_of_the_constructor(kind):
    changes = {"n_epochs": 2, "early_stop": 1, "lr": 0.003, "metric": "mse", "optimizer": "gd"}
    changes["reg" if kind.decay_name == "reg" else "weight_decay"] = 0.1
    if kind not in (GATs, ts.GATs):
        changes["batch_size"] = 40
    model = small_model(kind)
    for name, value in changes.items():
        setattr(model, name, value)
    expected = small_model(kind, **changes)
    assert model.get_params() == expected.get_params()
    torch.manual_seed(0)
    np.random.seed(0)
    model.fit(dataset_for(kind))
    torch.manual_seed(0)
    np.random.seed(0)
    assert_states_equal(model, expected.fit(dataset_for(kind)))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("metric", "nonsense", "metric must be one of"),
        ("n_epochs", -1, "n_epochs must be a whole number of at least 0, got -1"),
        ("batch_size", 0, "batch_size must be a whole number of at least 1, got 0"),
        ("lr", "fast", "lr must be a number of at least 0, got 'fast'"),
        ("optimizer", torch.optim.SGD, "assign an optimizer of your own to train_optimizer"),
        ("loss", None, "loss must be one of"),
        ("progress", "loud", "progress must be True, False, 'auto' or 'lines', got 'loud'"),
        ("hidden_size", 16, r"built with hidden_size=8, so hidden_size=16 would have no effect. Remedy: LSTM\(hidden"),
        ("seed", 2, "built with seed=1, so seed=2 would have no effect"),
        ("GPU", 1, "built with GPU=0, so GPU=1 would have no effect"),
        ("compat", "qlib", "built with compat=None"),
        ("device", "tpu", "device must be 'auto', 'cpu', 'cuda' or 'cuda:N', got 'tpu'"),
        ("n_epoch", 1, "LSTM has no attribute 'n_epoch'. Did you mean 'n_epochs'"),
        ("learning_rate", 1, "Did you mean 'lr'"),
        ("patience", 1, "Did you mean 'early_stop'"),
        ("train_epochs", 1, "Did you mean 'train_epoch'"),
        ("remark", "mine", "LSTM has no attribute 'remark'. Remedy: to store a value of your own on the model"),
    ],
)
def test_wrong_attributes_are_refused(name, value, message):
    model = LSTM(**SMALL)
    before = model.get_params()
    with pytest.raises(ConfigError, match=message):
        setattr(model, name, value)
    assert model.get_params() == before
    assert not hasattr(model, name) or getattr(model, name) == getattr(LSTM(**SMALL), name)


def test_subclasses_have_attributes_of_their_own_but_no_misspelled_arguments():
    class Own(LSTM):
        def __init__(self, **arguments):
            self.early = 1
            super().__init__(**arguments)
            self.losses, self.dropout2, self.remark = [], 0.1, "mine"
            self.hidden_size = arguments["hidden_size"]

    model = Own(**SMALL)
    model.metrics = {}
    model._anything = 1
    model.score_ = 1
    for name in ("n_epoch", "batchsize", "BatchSize", "early_sotp", "gpu", "trainepoch", "metric_fm"):
        with pytest.raises(ConfigError, match="Did you mean"):
            setattr(model, name, 1)


def test_device_and_optimizer_are_replaced():
    model = LSTM(**SMALL)
    model.device = torch.device("cpu")
    model.train_optimizer = torch.optim.SGD(model.lstm_model.parameters(), lr=0.5)
    model.lr = 0.1
    assert model.train_optimizer.param_groups[0]["lr"] == 0.1
    model.fit(flat())
    assert TransformerModel(d_feat=3, d_model=4, weight_decay=0.5).get_params()["reg"] == 0.5
    encoder = TransformerModel(d_feat=3, d_model=4)
    encoder.weight_decay = 0.25
    assert encoder.reg == encoder.train_optimizer.param_groups[0]["weight_decay"] == 0.25
    with pytest.raises(ConfigError, match=r"reg=0.1 and weight_decay=0.5 are the same argument"):
        TransformerModel(d_feat=3, d_model=4, reg=0.1, weight_decay=0.5)


class Mean(torch.nn.Module):
    """A network of the user: a linear layer of the mean over time."""

    def __init__(self, d_feat=3):
        super().__init__()
        self.linear = torch.nn.Linear(d_feat, 1)

    def forward(self, x):
        return self.linear(x.mean(1)).squeeze(-1)


def test_a_replaced_network_needs_its_own_optimizer():
    model = ts.LSTM(**SMALL)
    model.LSTM_model = Mean()
    assert model.network is model.LSTM_model
    with pytest.raises(ConfigError, match="train_optimizer has none of the parameters of Mean"):
        model.fit(rolling())
    model.train_optimizer = torch.optim.Adam(model.network.parameters(), lr=model.lr)
    before = weights(model)
    model.fit(rolling())
    assert not same_weights(before, weights(model))
    graph = ts.GATs(d_feat=3, hidden_size=4, n_epochs=1)
    graph.GAT_model = Mean()
    graph.run_network = lambda windows, samples, offsets=None: graph.network(windows.batch(samples))
    graph.train_optimizer = torch.optim.Adam(graph.network.parameters())
    assert not graph.fit(rolling()).predict(rolling()).isna().any()


def test_days_of_a_frame_follow_qlib():
    frame = make_frame(6, 4, 2)
    model = GATs(d_feat=2)
    firsts, counts = model.get_daily_inter(frame)
    assert list(counts) == frame.groupby(level=0).size().tolist()
    assert list(firsts) == [0, *np.cumsum(counts)[:-1]]
    np.random.seed(3)
    shuffled = model.get_daily_inter(frame, shuffle=True)
    np.random.seed(3)
    expected = list(zip(firsts, counts, strict=True))
    np.random.shuffle(expected)
    assert list(zip(*shuffled, strict=True)) == expected


# ---------------------------------------------------------------- log, and what fit shows
@pytest.mark.parametrize("shuffle_days", [True, False])
def test_flat_gats_takes_its_days_from_an_overridden_function(shuffle_days):
    dataset = flat()
    calls = []

    class Halves(GATs):
        def get_daily_inter(self, df, shuffle=False):
            calls.append((df, shuffle))
            firsts, counts = super().get_daily_inter(df, shuffle)
            first_half = np.asarray(counts) // 2
            return (
                [row for first, half in zip(firsts, first_half, strict=True) for row in (first, first + half)],
                [size for n, half in zip(counts, first_half, strict=True) for size in (half, n - half)],
            )

    class Same(GATs):
        def get_daily_inter(self, df, shuffle=False):
            return super().get_daily_inter(df, shuffle)

    arguments = {**GATS, "seed": 1, "shuffle_days": shuffle_days}
    plain = GATs(**arguments).fit(dataset)
    same = Same(**arguments).fit(dataset)
    assert same.history_.drop(columns=["train_seconds", "seconds"]).equals(
        plain.history_.drop(columns=["train_seconds", "seconds"])
    )
    assert same.predict(dataset).equals(plain.predict(dataset))
    halves = Halves(**arguments).fit(dataset)
    assert [shuffle for _, shuffle in calls[:3]] == [shuffle_days, False, False]
    frame = calls[0][0]
    assert frame.index.equals(dataset.prepare("train", col_set="feature", data_key="learn").index)
    assert not halves.predict(dataset).equals(plain.predict(dataset))
    assert halves.predict(dataset).index.equals(plain.predict(dataset).index)


@pytest.mark.parametrize(
    ("days", "message"),
    [
        (([0], [0]), "a number of rows from 1"),
        (([0.5, None], [1, 1]), "two sequences of integers"),
        (([0], [10**6]), "within the"),
        (3, "two sequences of integers"),
    ],
)
def test_wrong_days_are_refused(days, message):
    model = GATs(**GATS)
    model.get_daily_inter = lambda df, shuffle=False: days
    with pytest.raises(ConfigError, match=message):
        model.fit(flat())
    model = GATs(**GATS).fit(flat())
    model.get_daily_inter = lambda df, shuffle=False: ([0], [3])
    with pytest.raises(ConfigError, match="each row once for a prediction"):
        model.predict(flat())


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (
            lambda pred, label: (pred - label) ** 2,
            r"must return a 0-d tensor that depends on pred, got a tensor \(64,\)",
        ),
        (lambda pred, label: float((pred - label).detach().abs().mean()), "got float"),
        (lambda pred, label: (pred - label).abs().mean().detach(), "without a gradient"),
        (lambda pred, label: None, "got NoneType None"),
        (lambda pred, label: (pred - label).mean() * np.nan, "the loss function itself returns it"),
    ],
    ids=["vector", "float", "detached", "None", "nan"],
)
def test_losses_that_cannot_train_are_refused(loss, message):
    frame = make_frame(70, 9, 12)
    dataset = flat(frame.fillna(0.0))
    with pytest.raises((ConfigError, DataError), match=message):
        LSTM(**{**SMALL, "batch_size": 64}, loss=loss).fit(dataset)
    model = LSTM(**{**SMALL, "batch_size": 64})
    model.loss_fn = loss
    with pytest.raises((ConfigError, DataError), match=message):
        model.fit(dataset)


def test_scores_that_are_never_numbers_are_reported(caplog):
    model = LSTM(**SMALL, metric=lambda pred, label: pred.sum() * np.nan).fit(flat())
    assert model.best_epoch_ is None
    assert "the score of segment 'valid' is NaN in all" in caplog.text


def test_a_train_epoch_of_another_model_is_reported(caplog):
    model = LSTM(**SMALL)
    original = model.train_epoch
    model.train_epoch = lambda *data: original(*data)
    model.fit(flat())
    assert "has not changed any weight" not in caplog.text
    copy.deepcopy(model).fit(flat())
    assert "has not changed any weight of this model in epoch 0" in caplog.text


class LogValues(Callback):
    def on_epoch_start(self, estimator):
        estimator.log(early=estimator.epoch_)

    def on_batch_end(self, estimator):
        estimator.log(batch=torch.tensor(1.5))

    def on_valid_end(self, estimator):
        if estimator.epoch_ % 2:
            estimator.log(odd=estimator.history_["valid"].iloc[-1])

    def on_epoch_end(self, estimator):
        estimator.log(late=1)


def test_logged_values_are_columns_and_survive_resuming(tmp_path):
    whole = LSTM(**SMALL).fit(flat(), callbacks=[LogValues()])
    history = whole.history_
    assert history["early"].tolist() == [0, 1, 2]
    assert (history["batch"] == 1.5).all()
    assert (history["late"] == 1).all()
    assert history["odd"].isna().tolist() == [True, False, True]
    LSTM(**{**SMALL, "n_epochs": 2}).fit(flat(), callbacks=[LogValues()], checkpoint_dir=tmp_path)
    resumed = LSTM(**SMALL).fit(flat(), callbacks=[LogValues()], checkpoint_dir=tmp_path, resume=True)
    columns = ["early", "batch", "late", "odd", "valid"]
    pd.testing.assert_frame_equal(resumed.history_[columns], history[columns])


def test_log_refuses_what_it_cannot_record():
    class Wrong(Callback):
        def __init__(self, **values):
            self.values = values

        def on_epoch_end(self, estimator):
            estimator.log(**self.values)

    with pytest.raises(ConfigError, match="'valid' is recorded by the training loop"):
        LSTM(**SMALL).fit(flat(), callbacks=[Wrong(valid=1.0)])
    with pytest.raises(ConfigError, match=r"log: ic must be a number, got str 'high'"):
        LSTM(**SMALL).fit(flat(), callbacks=[Wrong(ic="high")])
    with pytest.raises(ConfigError, match=r"log\(ic\) records values of an epoch, but no fit is running"):
        LSTM(**SMALL).fit(flat()).log(ic=1.0)


def test_progress_writes_one_line_per_epoch(capfd, monkeypatch):
    LSTM(**SMALL, progress="lines").fit(flat())
    lines = capfd.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in lines] == ["epoch 0", "epoch 1", "epoch 2", lines[-1].split(":")[0]]
    assert lines[-1].startswith("best epoch ")
    monkeypatch.setattr("logging.Logger.hasHandlers", lambda self: False)  # a script without logging
    LSTM(**SMALL).fit(flat())
    assert len(capfd.readouterr().err.splitlines()) == 4
    LSTM(**SMALL, progress=False).fit(flat())
    assert capfd.readouterr().err == ""
    assert epoch_text({"train": -1.0, "seconds": 2.0}) == "score (higher is better): train -1.000000; 2.00 s"


def test_flat_gru_passes_complete_rows_to_train_epoch():
    frame = make_frame(70, 9, 12)
    frame.iloc[::7, 3] = np.nan
    calls: overrides.Calls = []
    dataset = DatasetH(handler=frame, segments=SEGMENTS)
    small_model(overrides.own_train_epoch(GRU, calls), n_epochs=1).fit(dataset)
    assert not calls[0][1].isna().any(axis=None)
    assert len(calls[0][1]) == len(calls[0][2]) == len(frame.loc[: SEGMENTS["train"][1]].dropna())
