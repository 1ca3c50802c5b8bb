"""Fits with losses and metrics of whole days and with days as batches."""

from __future__ import annotations

import logging

import numpy as np
import pandas as pd
import pytest
import torch

from qfast.errors import CheckpointError, ConfigError, DataError
from qfast.metrics import daily_ic
from qfast.models import GRU, LSTM, GATs, ts
from qfast.training.callbacks import Callback
from qfast.training.daily_losses import DAILY_LOSSES
from qfast.workflow import plots
from qfast.workflow.folder import RunFolder
from qfast.workflow.run import run
from support.fits import (
    StopAt,
    dataset_for,
    frame_for,
    parametrize_estimators,
    same_weights,
    small_model,
    weights,
)
from support.workflows import write_case


def by_day(kind, **changes):
    """A small model whose batches are days."""
    is_graph = issubclass(kind, (GATs, ts.GATs))
    return small_model(kind, **{**({} if is_graph else {"batch_by": "day", "batch_size": 20}), **changes})


def mean_metric(model, dataset, metric):
    windows = dataset.windows("valid", "learn")
    label = pd.Series(windows.label.numpy(), windows.keys())
    ic, rank_ic = daily_ic(model.predict(dataset, "valid"), label)
    return float((ic if metric == "ic" else rank_ic).mean())


@parametrize_estimators()
def test_every_model_trains_on_days_and_selects_the_epoch_by_the_rank_ic(kind, flat_data, windows_data):
    dataset = windows_data if kind.__module__ == "qfast.models.ts" else flat_data
    model = by_day(kind, loss="mse+ic", metric="rank_ic", n_epochs=2).fit(dataset)
    history = model.history_
    assert list(history)[:5] == ["train_loss", "train", "valid", "train_rank_ic", "valid_rank_ic"]
    assert "valid_all" not in history
    assert model.best_epoch_ == history["valid"].idxmax()
    assert history["valid"].equals(history["valid_rank_ic"].rename("valid"))
    assert history["valid"].max() == pytest.approx(mean_metric(model, dataset, "rank_ic"), abs=1e-6)


@pytest.mark.parametrize("loss", list(DAILY_LOSSES))
def test_every_loss_decreases_and_is_the_default_metric(loss, flat_data):
    model = by_day(LSTM, loss=loss, n_epochs=6).fit(flat_data)
    history = model.history_
    assert history["train_loss"].iloc[-1] < history["train_loss"].iloc[0]
    assert (history["train"] < 0).all()  # minus the loss
    if loss == "ic":
        model.metric = "ic"
        model.n_epochs, model.lr = 1, 0.0
        again = model.fit(flat_data).history_["valid"].iloc[-1]
        assert again - 1 == pytest.approx(history["valid"].max(), abs=1e-5)


# ---------------------------------------------------------------- batches
def expected_batches(windows, order, size):
    """Days in `order`, combined while they have at most `size` samples."""
    dates = windows.keys().get_level_values(0)
    numbers = [np.flatnonzero(dates == date) for date in dates.unique().sort_values()]
    labelled = [bool(torch.isfinite(windows.label[n]).any()) for n in numbers]
    batches: list[list[int]] = []
    for day in (int(d) for d in order if labelled[int(d)]):
        if batches and len(batches[-1]) + len(numbers[day]) <= size:
            batches[-1].extend(numbers[day].tolist())
        else:
            batches.append(numbers[day].tolist())
    return batches


@pytest.mark.parametrize("size", [1, 20, 10_000])
def test_batches_of_a_flat_model_are_shuffled_days(flat_data, size):
    model = by_day(LSTM, batch_size=size)
    windows = flat_data.windows("train", "learn")
    windows.label[windows.keys().get_level_values(0) == windows.keys()[0][0]] = float("nan")
    np.random.seed(5)
    batches = model.batches(windows, "train")
    np.random.seed(5)
    order = np.arange(len(windows.days))
    np.random.shuffle(order)
    expected = expected_batches(windows, order, size)
    assert [samples.tolist() for samples in batches] == expected
    assert len(expected) == (len(order) - 1 if size == 1 else 1 if size == 10_000 else len(batches))
    scored = model.batches(windows, "valid_score")
    assert (len(scored.order), scored.whole) == (len(windows), len(scored))


def test_batches_of_a_time_series_model_are_days_in_the_order_of_its_loader(windows_data):
    model = by_day(ts.LSTM)
    windows = windows_data.windows("train", "learn")
    torch.manual_seed(7)
    batches = [samples.tolist() for samples in model.batches(windows, "train")]
    torch.manual_seed(7)
    order = model.order.train(len(windows.days))
    assert batches == expected_batches(windows, order, 20)


def test_days_as_batches_do_not_change_the_predictions(flat_data):
    model = small_model(LSTM, n_epochs=1).fit(flat_data)
    before = model.predict(flat_data)
    model.batch_by = "day"
    pd.testing.assert_series_equal(model.predict(flat_data), before, rtol=1e-5)


def test_sample_is_the_default(flat_data):
    default, named = (small_model(LSTM, n_epochs=2, **k).fit(flat_data) for k in ({}, {"batch_by": "sample"}))
    assert same_weights(weights(default), weights(named))


def test_the_batches_of_gats_are_days_already(flat_data):
    default, named = (small_model(GATs, n_epochs=1, loss="ic", **k).fit(flat_data) for k in ({}, {"batch_by": "day"}))
    assert same_weights(weights(default), weights(named))


@pytest.mark.parametrize("kind", [LSTM, ts.LSTM], ids=["flat", "ts"])
def test_a_resumed_fit_equals_an_uninterrupted_one(kind, flat_data, windows_data, tmp_path):
    dataset = flat_data if kind is LSTM else windows_data
    arguments = {"loss": "rank_ic", "metric": "ic"}
    whole = by_day(kind, **arguments).fit(dataset)
    with pytest.raises(KeyboardInterrupt):
        by_day(kind, **arguments).fit(dataset, checkpoint_dir=tmp_path, callbacks=[StopAt(1, "checkpoint")])
    resumed = by_day(kind, **arguments).fit(dataset, checkpoint_dir=tmp_path, resume=True)
    assert same_weights(weights(whole), weights(resumed))
    assert whole.history_["valid_ic"].equals(resumed.history_["valid_ic"])
    with pytest.raises(CheckpointError, match="loss: 'rank_ic' -> 'ic'"):
        by_day(kind, loss="ic", metric="ic").fit(dataset, checkpoint_dir=tmp_path, resume=True)


class Weights:
    """Weights that differ by instrument."""

    def reweight(self, samples):
        return np.linspace(0.5, 1.5, len(samples))


@pytest.mark.parametrize("kind", [LSTM, ts.GRU], ids=["flat", "ts"])
def test_sample_weights_change_the_training(kind, flat_data, windows_data):
    dataset = flat_data if kind is LSTM else windows_data
    plain, weighted = (
        by_day(kind, loss="ic", n_epochs=1).fit(dataset, reweighter=r).history_ for r in (None, Weights())
    )
    assert plain["train_loss"].iloc[0] != weighted["train_loss"].iloc[0]


# ---------------------------------------------------------------- functions of the user
def test_an_overridden_loss_fn_takes_precedence(flat_data):
    class Own(LSTM):
        def loss_fn(self, pred, label):
            return (pred - label).square().nanmean()

    own = by_day(Own, loss="ic", n_epochs=1).fit(flat_data)
    mse = by_day(LSTM, n_epochs=1).fit(flat_data)
    assert own.history_["train_loss"].iloc[0] == pytest.approx(mse.history_["train_loss"].iloc[0])


def test_a_metric_of_days_works_with_a_loss_of_the_user(flat_data):
    model = small_model(LSTM, loss=lambda pred, label: (pred - label).abs().mean(), metric="ic", n_epochs=2)
    model.fit(flat_data)
    assert model.history_["valid_ic"].max() == pytest.approx(mean_metric(model, flat_data, "ic"), abs=1e-6)


@pytest.mark.parametrize("kind", [LSTM, ts.LSTM], ids=["flat", "ts"])
def test_wrappers_of_the_epochs_change_nothing(kind, flat_data, windows_data):
    dataset = flat_data if kind is LSTM else windows_data

    class Wrapped(kind):
        def train_epoch(self, *data):
            return super().train_epoch(*data)

        def test_epoch(self, *data):
            return super().test_epoch(*data)

    arguments = {"loss": "ic", "metric": "rank_ic", "n_epochs": 2}
    plain, wrapped = (by_day(k, **arguments).fit(dataset) for k in (kind, Wrapped))
    assert same_weights(weights(plain), weights(wrapped))
    np.testing.assert_allclose(plain.history_["valid"], wrapped.history_["valid"], rtol=1e-6)


def test_a_loop_over_single_days_calls_the_loss_without_dates(windows_data):
    class Own(ts.LSTM):
        def train_epoch(self, data_loader):
            assert data_loader.batch_size is None
            for data, weight in data_loader:
                pred = self.network(data[:, :, :-1].float())
                self.train_optimizer.zero_grad()
                self.loss_fn(pred, data[:, -1, -1], weight).backward()
                self.train_optimizer.step()

    model = by_day(Own, loss="ic", metric="ic", batch_size=1, n_epochs=1).fit(windows_data)
    assert np.isfinite(model.history_["valid_ic"].iloc[0])
    assert float(model.metric_fn(torch.tensor([1.0, 2, 3]), torch.tensor([1.0, 2, 4]))) > 0.9
    with pytest.raises(ConfigError, match=r"loss='ic' needs the day of each of \d+ samples.*batch_size=1"):
        by_day(Own, loss="ic", n_epochs=1).fit(windows_data)


# ---------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loss": "ic"}, r"loss='ic' compares the stocks of a day.*batch_by=None.*Remedy: batch_by='day'"),
        ({"loss": "listnet", "batch_by": "sample"}, "batch_by='sample'"),
        ({"loss": "rankic"}, "loss must be one of .*Did you mean 'rank_ic'"),
        ({"metric": "rank-ic"}, "metric must be one of .*Did you mean 'rank_ic'"),
        ({"metric": "listnet"}, "metric must be one of"),
        ({"batch_by": "days"}, "batch_by must be 'sample', 'day' or None .* got 'days'. Did you mean 'day'"),
        ({"batch_by": "day", "compat": "qlib"}, "batch_by='day' is not available with compat='qlib'"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        small_model(LSTM, **arguments)
    model = small_model(LSTM, compat=arguments.get("compat"))
    if len(arguments) == 1:
        with pytest.raises(ConfigError, match=message):
            setattr(model, *arguments.popitem())


def test_gats_refuses_samples_and_a_loss_of_days_on_batches_of_qlib():
    with pytest.raises(ConfigError, match="every batch of this model is a day"):
        small_model(GATs, batch_by="sample")
    with pytest.raises(ConfigError, match="loss='ic' is not available with compat='qlib'"):
        small_model(ts.GATs, loss="ic", compat="qlib")


def test_a_metric_of_days_needs_a_validation_segment(tmp_path):
    dataset = dataset_for(LSTM, frame=frame_for(LSTM))
    del dataset.segments["valid"]
    with pytest.raises(ConfigError, match=r"metric='ic' selects the epoch by the segment 'valid'.*Remedy"):
        small_model(LSTM, metric="ic").fit(dataset)
    config, data = write_case(tmp_path)
    sets = ["task.model.kwargs.metric=rank_ic", "task.dataset.kwargs.segments.valid=__DROP__", "task.model.kwargs.x=1"]
    with pytest.raises(ConfigError, match=r"2 problems(.|\n)*task.model.kwargs.metric: 'rank_ic' selects the epoch"):
        run(config, data, sets, output=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("arguments", [{"loss": "ic"}, {"metric": "rank_ic"}], ids=["loss", "metric"])
def test_data_without_a_ranking_is_refused(arguments):
    frame = frame_for(LSTM, n_dates=70, n_instruments=1)
    segment = "train" if "loss" in arguments else "valid"
    with pytest.raises(DataError, match=rf"no day of segment '{segment}' has two different labels \(at most 1 stocks"):
        by_day(LSTM, **arguments).fit(dataset_for(LSTM, frame=frame))


# ---------------------------------------------------------------- output
def test_log_lines_and_plots_name_the_metric(flat_data, caplog, monkeypatch):
    caplog.set_level(logging.INFO, "qfast")
    model = small_model(GRU, metric="ic", n_epochs=1).fit(flat_data)
    assert "mean daily IC (higher is better): train " in caplog.text
    labels = []
    monkeypatch.setattr("matplotlib.axes.Axes.set", lambda axes, **text: labels.append(text))
    plots.loss_plot(model.history_, model.best_epoch_, is_loss=model.scores_are_losses)
    assert labels[0]["ylabel"] == "mean daily IC"


def test_reserved_columns_cannot_be_logged(flat_data):
    class Log(Callback):
        def on_epoch_end(self, estimator):
            estimator.log(valid_ic=1.0)

    with pytest.raises(ConfigError, match="'valid_ic' is recorded by the training loop"):
        small_model(LSTM, n_epochs=1).fit(flat_data, callbacks=[Log()])


def test_a_workflow_trains_with_them(tmp_path):
    config, data = write_case(tmp_path)
    changes = {"loss": "ic", "metric": "rank_ic", "batch_by": "day"}
    result = run(config, data, [f"task.model.kwargs.{k}={v}" for k, v in changes.items()], output=tmp_path / "run")
    assert "valid_rank_ic" in pd.read_csv(result.path / "history.csv").columns
    assert RunFolder.open(result.path).manifest["status"] == "finished"
