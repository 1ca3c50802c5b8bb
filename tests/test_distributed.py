"""Training over the ranks of a process group equals training in one process, and failures end all ranks."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn import BatchNorm1d, Sequential

from qfast.data import Alpha360, DatasetH, synthetic
from qfast.data.adapt import windows_of
from qfast.errors import ConfigError, DataError, RankError
from qfast.models import GRU, LSTM, GATs, ts
from qfast.training.callbacks import Callback
from qfast.training.distributed import Sharing
from qfast.training.ranks import Ranks
from support.fits import ESTIMATORS, estimator_name, is_time_series, small_arguments
from support.frames import flat, gappy_frame, make_frame, rolling
from support.ranks import run_ranks

SEGMENTS = {
    "train": ("2020-01-08", "2020-01-24"),
    "valid": ("2020-01-25", "2020-02-05"),
    "test": ("2020-02-06", "2020-12-31"),
}
HISTORY = ["train_loss", "train", "valid"]


def small_dataset(kind: type) -> Any:
    """13 training days of 7 instruments with missing rows."""
    frame = make_frame(36, 7, 3 if is_time_series(kind) else 12)
    return rolling(frame, SEGMENTS) if is_time_series(kind) else flat(frame, SEGMENTS)


def model_for(kind: type, **changes: Any) -> Any:
    # Some gradients of GATs are 0 except for rounding, because a softmax ignores what all of its arguments share. Adam
    # would make steps of full length from them.
    descent = {"optimizer": "gd", "lr": 0.1} if kind in (GATs, ts.GATs) else {}
    return kind(**small_arguments(kind, **{"dropout": 0.0, "progress": False, **descent, **changes}))


class CorrelationLSTM(LSTM):
    """A loss and a metric that depend on the whole batch."""

    def loss_fn(self, pred, label, weight=None):
        # The squared error gives the bias of the output a gradient; Adam would amplify the rounding of a zero gradient.
        return (pred - label).square().mean() - torch.corrcoef(torch.stack((pred, label)))[0, 1]

    def metric_fn(self, pred, label):
        return torch.corrcoef(torch.stack((pred, label)))[0, 1]


class DayWeights:
    """A reweighter: weights that differ between samples."""

    def reweight(self, data):
        return np.linspace(0.5, 1.5, len(data))


def with_pretrained_base(kind: type, dataset: Any) -> Any:
    model = model_for(kind, base_model="LSTM")
    model.pretrain(dataset, n_epochs=1, batch_size=32)
    return model


def without_feature_gaps(frame: pd.DataFrame) -> pd.DataFrame:
    frame[("feature", "F1")] = frame[("feature", "F1")].fillna(0.0)
    return frame


CASES: dict[str, Any] = {
    **{estimator_name(kind): (lambda kind=kind: (model_for(kind), small_dataset(kind), {})) for kind in ESTIMATORS},
    "whole-batch loss": lambda: (model_for(CorrelationLSTM), small_dataset(LSTM), {}),
    "daily loss": lambda: (
        model_for(ts.LSTM, loss="mse+ic", metric="rank_ic", batch_by="day"),
        small_dataset(ts.LSTM),
        {},
    ),
    "weights": lambda: (model_for(ts.GRU), small_dataset(ts.GRU), {"reweighter": DayWeights()}),
    "compat": lambda: (model_for(ts.GATs, compat="qlib"), small_dataset(ts.GATs), {}),
    "pretrained base": lambda: (with_pretrained_base(GATs, small_dataset(GATs)), small_dataset(GATs), {}),
    "NaN labels": lambda: (model_for(GATs, d_feat=4), flat(without_feature_gaps(gappy_frame()), SEGMENTS), {}),
    "dropped rows": lambda: (model_for(GRU, d_feat=4), flat(gappy_frame(), SEGMENTS), {}),
    "days": lambda: (
        model_for(ts.LSTM, loss="mse+ic", batch_by="day", metric="rank_ic"),
        small_dataset(ts.LSTM),
        {},
    ),
    "gradient descent": lambda: (model_for(GRU, optimizer="gd", lr=0.1), small_dataset(GRU), {}),
}


def fit_all(rank: int) -> dict[str, Any]:
    results = {}
    for name, case in CASES.items():
        model, dataset, arguments = case()
        model.fit(dataset, **arguments)
        history, scores = model.history_, model.predict(dataset)
        results[name] = history[[c for c in HISTORY if c in history]].to_numpy(), scores, model.best_epoch_
    return results


@pytest.fixture(scope="module")
def expected():
    return fit_all(0)


@pytest.fixture(scope="module")
def fits(tmp_path_factory):
    return {size: run_ranks(size, fit_all, tmp_path_factory.mktemp(f"ranks{size}")) for size in (2, 3)}


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", list(CASES))
def test_a_fit_over_ranks_equals_that_of_one_process(name, size, expected, fits):
    history, scores, best_epoch = expected[name]
    for result in fits[size]:
        assert isinstance(result, dict), result
        losses, predictions, best = result[name]
        np.testing.assert_allclose(losses, history, rtol=0, atol=1e-6)
        assert best == best_epoch
        assert predictions.index.equals(scores.index)
        np.testing.assert_allclose(predictions, scores, rtol=0, atol=1e-5)


# ---------------------------------------------------------------- the parts of the data
class AloneAs:
    """Stands in for `Ranks`, without other processes."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    def require_same(self, facts, remedy):
        pass


class FrameDataset:
    """A dataset of the user, whose rows are sorted by date, so those of an instrument are not consecutive."""

    def prepare(self, segment, **kwargs):
        return make_frame(12, 7, 3)


def price_dataset() -> DatasetH:
    handler = Alpha360(data=synthetic.prices(7, 90), vwap="typical", infer_processors=[], learn_processors=[])
    return DatasetH(handler, {"train": (None, None)})


@pytest.mark.parametrize(
    "dataset",
    [rolling, flat, FrameDataset, price_dataset],
    ids=["rolling", "flat", "frame", "prices"],
)
@pytest.mark.parametrize("size", [1, 3, 7, 9])
def test_each_sample_is_on_one_rank_with_its_window(dataset, size):
    windows = windows_of(dataset(), "train", "learn")
    ranks = [Sharing(AloneAs(rank, size), is_training=False)(windows) for rank in range(size)]
    samples = torch.arange(len(windows))
    expected, seen = windows.batch(samples), torch.zeros(len(windows), dtype=torch.int64)
    for shared in ranks:
        mine = samples[shared.owner == shared.ranks.rank]
        seen[mine] += 1
        assert torch.equal(shared.own.batch(shared.number[mine]).nan_to_num(7.0), expected[mine].nan_to_num(7.0))
        assert shared.own.keys().equals(windows.keys()[mine.numpy()])
        assert torch.equal(shared.own.label.nan_to_num(7.0), windows.label[mine].nan_to_num(7.0))
        assert torch.equal(shared.owner, ranks[0].owner)
        with pytest.raises(DataError, match="spread over"):
            shared.batch(samples)
    assert torch.equal(seen, torch.ones_like(seen))
    rows = sum(shared.own.features.shape[0] for shared in ranks)
    assert rows == windows.features.shape[0]  # no rank has rows of another one


def test_rows_of_prices_that_are_in_memory_are_on_their_rank():
    windows = windows_of(price_dataset(), "train", "learn")
    rows = np.arange(5, len(windows), 97)
    values = np.random.default_rng(0).standard_normal((len(rows), 360)).astype(np.float32)
    windows = dataclasses.replace(windows, features=windows.features.with_stored(rows, values))
    expected = windows.batch(torch.arange(len(windows)))
    for rank in range(3):
        shared = Sharing(AloneAs(rank, 3), is_training=False)(windows)
        mine = torch.nonzero(shared.owner == rank)[:, 0]
        assert torch.equal(shared.own.batch(shared.number[mine]).nan_to_num(7.0), expected[mine].nan_to_num(7.0))


def test_the_ranks_have_about_as_many_samples():
    windows = windows_of(flat(make_frame(60, 40, 3)), "train", "learn")
    counts = torch.bincount(Sharing(AloneAs(0, 4), is_training=True)(windows).owner)
    assert counts.max() < 1.15 * counts.min()


# ---------------------------------------------------------------- rules and errors
class StopOnOneRank(Callback):
    def __init__(self, rank: int) -> None:
        self.rank = rank

    def on_epoch_end(self, estimator):
        estimator.stop_training = self.rank == 1


class OwnStep(LSTM):
    def train_step(self, windows, samples):
        return super().train_step(windows, samples)


class FailOnOneRank(Callback):
    def __init__(self, rank: int) -> None:
        self.rank = rank

    def on_batch_end(self, estimator):
        if self.rank == 1:
            raise ZeroDivisionError("in a callback")


def error_of(function: Any) -> str:
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def timed_error(function: Any) -> tuple[str, float]:
    started = time.monotonic()
    return error_of(function), time.monotonic() - started


def with_batch_norm() -> LSTM:
    model = model_for(LSTM)
    model.network = Sequential(model.network, BatchNorm1d(1))
    model.train_optimizer = torch.optim.Adam(model.network.parameters())
    return model


def try_rules(rank: int) -> dict[str, Any]:
    """Fits that end alike on all ranks, so the group remains usable."""
    other_frame = make_frame(70, 9, 12, seed=rank)
    results: dict[str, Any] = {
        "data": error_of(lambda: model_for(LSTM).fit(flat(other_frame))),
        "arguments": error_of(lambda: model_for(LSTM, lr=0.1 + rank).fit(flat())),
        "instruments": error_of(lambda: model_for(LSTM).fit(flat(make_frame(70, 1, 12)))),
        "train_step": error_of(lambda: model_for(OwnStep).fit(flat())),
        "cuda_graphs": error_of(lambda: model_for(LSTM, cuda_graphs=True).fit(flat())),
        "batch norm": error_of(lambda: with_batch_norm().fit(flat())),
        "loss": error_of(lambda: model_for(LSTM, lr=1e30, optimizer="gd").fit(flat())),
    }
    model = model_for(LSTM, seed=None, dropout=0.5, num_layers=2)  # other initial weights on each rank
    model.fit(flat(), callbacks=[StopOnOneRank(rank)])
    results["epochs"] = len(model.history_)
    results["weights"] = [weight.clone() for weight in model.network.state_dict().values()]
    results["one stock"] = model.predict(flat(make_frame(70, 1, 12)))
    return results


@pytest.fixture(scope="module")
def rules(tmp_path_factory):
    results = run_ranks(2, try_rules, tmp_path_factory.mktemp("rules"))
    assert all(isinstance(result, dict) for result in results), results
    return results


@pytest.mark.parametrize(
    ("name", "on_rank_0", "on_rank_1"),
    [
        ("data", "RankError: rank 1 failed: rank 1 and rank 0 differ in the ", "ConfigError: rank 1 and rank 0 differ"),
        (
            "arguments",
            "RankError: rank 1 failed: rank 1 and rank 0 differ in the argument 'lr' of the model: '1.1' and '0.1'. ",
            "ConfigError: rank 1 and rank 0 differ in the argument 'lr'",
        ),
        (
            "instruments",
            *["DataError: 2 ranks cannot share the 1 instruments of segment 'train'. Remedy: at most 1"] * 2,
        ),
        ("train_step", *["ConfigError: test_distributed.OwnStep.train_step replaces train_step"] * 2),
        ("cuda_graphs", *["ConfigError: cuda_graphs=True works in one process only"] * 2),
        ("batch norm", *["ConfigError: the network normalizes over the samples of a batch (['1'])"] * 2),
        ("loss", *["DataError: the training loss became"] * 2),
    ],
    ids=lambda value: value if " " not in value or len(value) < 15 else "",
)
def test_a_wrong_fit_ends_on_all_ranks_and_leaves_the_group_usable(name, on_rank_0, on_rank_1, rules):
    assert rules[0][name].startswith(on_rank_0)
    assert rules[1][name].startswith(on_rank_1)


def fit_bad_stock(rank: int) -> tuple[str, float]:
    """S008 belongs to rank 1, which alone reads its features."""
    frame = make_frame(70, 9, 12, holes=0.0)
    frame.loc[(slice(None), "S008"), ("feature", "F2")] = np.inf
    return timed_error(lambda: model_for(LSTM).fit(flat(frame)))


def fit_with_failing_callback(rank: int) -> tuple[str, float]:
    return timed_error(lambda: model_for(LSTM).fit(flat(), callbacks=[FailOnOneRank(rank)]))


@pytest.mark.parametrize(
    ("fit", "message"),
    [
        (fit_bad_stock, "DataError: features of segment 'train' contain NaN or infinity in 1 of 12"),
        (fit_with_failing_callback, "ZeroDivisionError: in a callback"),
    ],
    ids=["features", "callback"],
)
def test_an_error_on_one_rank_ends_the_others_with_its_message(fit, message, tmp_path):
    (theirs, seconds), (ours, _) = run_ranks(2, fit, tmp_path)
    assert ours.startswith(message)
    assert theirs.startswith(f"RankError: rank 1 failed: {message.removeprefix('DataError: ')}")
    assert seconds < 60


def test_all_ranks_stop_if_one_stops_and_have_the_same_weights_without_a_seed(rules):
    assert [result["epochs"] for result in rules] == [1, 1]
    for ours, theirs in zip(rules[0]["weights"], rules[1]["weights"], strict=True):
        assert torch.equal(ours, theirs)


def test_predict_allows_more_ranks_than_instruments(rules):
    assert rules[0]["one stock"].notna().all()
    assert rules[0]["one stock"].equals(rules[1]["one stock"])


class DieOnOneRank(Callback):
    def __init__(self, rank: int) -> None:
        self.rank = rank

    def on_batch_end(self, estimator):
        if self.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)


def fit_and_die(rank: int) -> tuple[str, float]:
    return timed_error(lambda: model_for(LSTM).fit(flat(), callbacks=[DieOnOneRank(rank)]))


def test_the_other_ranks_name_a_rank_that_dies(tmp_path):
    results = run_ranks(3, fit_and_die, tmp_path)
    assert results[1] is None
    for error, seconds in (results[0], results[2]):
        assert error.startswith("RankError: rank 1 (process ")
        assert "has ended without an error message" in error
        assert seconds < 60


def test_without_a_group_nothing_is_shared():
    assert Ranks.current() is None
    assert issubclass(RankError, RuntimeError)
    assert not issubclass(RankError, (ConfigError, DataError))
