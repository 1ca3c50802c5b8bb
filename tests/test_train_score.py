"""The argument train_score: how the training segment is scored after each epoch."""

from __future__ import annotations

import pytest
import torch

from qfast.data import DatasetH
from qfast.errors import ConfigError
from qfast.models import LSTM, GATs
from qfast.training.callbacks import epoch_text
from qfast.workflow import plots
from support.fits import StopAt, frame_for, parametrize_estimators, same_weights, small_model, weights
from support.frames import SEGMENTS


@parametrize_estimators()
def test_the_score_changes_neither_weights_nor_validation(kind, flat_data, windows_data):
    data = windows_data if kind.__module__ == "qfast.models.ts" else flat_data
    scores = {}
    models = {}
    for how in ("pass", "running", "never"):
        scores[how] = {}
        models[how] = small_model(kind, n_epochs=3, train_score=how).fit(data, evals_result=scores[how])
    for how in ("running", "never"):
        assert same_weights(weights(models["pass"]), weights(models[how]))
    assert scores["pass"]["valid"] == scores["running"]["valid"] == scores["never"]["valid"]
    histories = {how: model.history_ for how, model in models.items()}
    assert list(histories["pass"]["train_loss"]) == list(histories["never"]["train_loss"])
    assert scores["running"]["train"] == [-loss for loss in histories["running"]["train_loss"]]
    assert scores["running"]["train"] != scores["pass"]["train"]
    assert scores["never"]["train"] == []
    assert "train" not in histories["never"]


def test_running_is_the_score_of_a_pass_if_the_weights_do_not_move(flat_data):
    """With lr=0 and no dropout, the batches of the training pass and of the second pass differ only in their order."""
    settings = {"lr": 0.0, "weight_decay": 0.0, "dropout": 0.0, "n_epochs": 1, "batch_size": 1}
    arguments = {name: value for name, value in settings.items() if name in small_model(LSTM).get_params()}
    values = [
        small_model(LSTM, **arguments, train_score=how).fit(flat_data).history_["train"][0]
        for how in ("pass", "running")
    ]
    assert values[0] == pytest.approx(values[1], rel=1e-6)


@pytest.mark.parametrize("metric", ["ic", "rank_ic"])
def test_never_works_with_the_metrics_of_days(flat_data, metric):
    with_pass = small_model(GATs, metric=metric, n_epochs=2).fit(flat_data)
    without = small_model(GATs, metric=metric, n_epochs=2, train_score="never").fit(flat_data)
    assert same_weights(weights(with_pass), weights(without))
    assert without.best_epoch_ == with_pass.best_epoch_
    assert list(without.history_)[:3] == ["train_loss", "valid", f"valid_{metric}"]
    text = epoch_text(without.progress_.records[0])
    assert text.startswith("loss ")
    assert "mean daily" in text
    assert "train " not in text
    assert plots.loss_plot(without.history_, 0).startswith(b"\x89PNG")


def test_a_fit_without_any_score_reports_the_loss(flat_data):
    dataset = DatasetH(frame_for(LSTM), segments={"train": SEGMENTS["train"]})
    model = small_model(LSTM, n_epochs=1, train_score="never").fit(dataset)
    assert "score" not in epoch_text(model.progress_.records[0])
    assert plots.loss_plot(model.history_, None).startswith(b"\x89PNG")


def test_a_fit_resumes_with_another_choice(tmp_path, flat_data):
    whole = small_model(LSTM, n_epochs=3).fit(flat_data)
    with pytest.raises(KeyboardInterrupt):
        small_model(LSTM, n_epochs=3).fit(flat_data, checkpoint_dir=tmp_path, callbacks=[StopAt(1, "checkpoint")])
    resumed = small_model(LSTM, n_epochs=3, train_score="never").fit(flat_data, checkpoint_dir=tmp_path, resume=True)
    assert same_weights(weights(whole), weights(resumed))
    assert len(resumed.history_) == 3
    assert len(resumed.evals_result_["train"]) == 2
    assert len(resumed.evals_result_["valid"]) == 3


class OwnScore(LSTM):
    """Counts the calls of test_epoch."""

    calls = 0

    def test_epoch(self, data_x, data_y):
        type(self).calls += 1
        return super().test_epoch(data_x, data_y)


def test_never_does_not_call_an_overridden_test_epoch_for_the_training_segment(flat_data):
    OwnScore.calls = 0
    model = small_model(OwnScore, n_epochs=2, train_score="never").fit(flat_data)
    assert OwnScore.calls == 2
    assert "train" not in model.history_


class OwnTraining(LSTM):
    def train_epoch(self, x_train, y_train):
        return super().train_epoch(x_train, y_train)


class OwnMetric(LSTM):
    def metric_fn(self, pred, label):
        return -(pred - label).abs().nanmean()


@pytest.mark.parametrize(
    ("kind", "arguments", "expected"),
    [
        (OwnScore, {}, "test_epoch"),
        (OwnMetric, {}, "metric_fn"),
        (OwnTraining, {}, "train_epoch"),
        (GATs, {"metric": "rank_ic"}, "metric='rank_ic'"),
        (GATs, {"metric": "mse", "loss": "ic"}, "metric='mse'"),
        (LSTM, {"metric": lambda pred, label: torch.zeros(())}, "another score"),
    ],
)
def test_running_needs_the_loss_as_metric(flat_data, kind, arguments, expected):
    with pytest.raises(ConfigError, match="train_score='running'") as error:
        small_model(kind, **arguments, train_score="running").fit(flat_data)
    assert expected in str(error.value)
    assert "Remedy" in str(error.value)


@pytest.mark.parametrize("value", ["always", None, True, "Pass", 1, ["pass"]])
def test_other_values_are_refused(value):
    with pytest.raises(ConfigError, match="train_score must be 'pass', 'running' or 'never'"):
        small_model(LSTM, train_score=value)
