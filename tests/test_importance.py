"""Permutation importance of features: planted signals, every form of samples, and the exchange itself."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from qfast import models
from qfast.data import Alpha360, DatasetH, TSDatasetH, synthetic
from qfast.data.adapt import windows_of
from qfast.errors import ConfigError, DataError, NotFittedError
from qfast.models import ts
from qfast.models.importance import _exchanged_within_days, _Permuted, feature_importance

SMALL = {"n_epochs": 3, "lr": 0.02, "seed": 0, "progress": False}


@pytest.fixture(scope="module")
def frame() -> pd.DataFrame:
    """Four features, of which only the third determines the label."""
    frame = synthetic.factors(20, 90, 4, missing=0.0, holes=0.0, late=0.0, delisted=0.0)
    noise = np.random.default_rng(0).normal(size=len(frame))
    frame[("label", frame["label"].columns[0])] = (frame["feature"].iloc[:, 2] + noise).astype("float32")
    return frame


def segments(frame: pd.DataFrame) -> dict:
    days = frame.index.get_level_values("datetime").unique().sort_values()
    return {"train": (days[0], days[69]), "test": (days[70], days[-1])}


@pytest.mark.parametrize("kind", [ts.GRU, ts.GATs, ts.TCN], ids=lambda kind: kind.__name__)
def test_the_feature_with_the_signal_is_the_most_important(frame, kind) -> None:
    dataset = TSDatasetH(frame, segments(frame), step_len=4)
    sizes = {"n_chans": 8, "num_layers": 1, "kernel_size": 2} if kind is ts.TCN else {"hidden_size": 8}
    batch = {} if kind is ts.GATs else {"batch_size": 100}
    model = kind(d_feat=4, **sizes, **batch, **SMALL).fit(dataset)
    table = feature_importance(model, dataset, repeats=2)
    names = [str(name) for name in frame["feature"].columns]
    assert table.index[0] == names[2]
    assert sorted(table.index) == sorted(names)
    assert table.attrs["Rank IC"] > 0.3
    assert table["Rank IC"].iloc[0] > 0.2
    assert (table["Rank IC"].iloc[1:].abs() < 0.1).all()
    assert (table["standard error"] >= 0).all()
    again = feature_importance(model, dataset, features=names[2:3], repeats=2)
    assert again.index.tolist() == names[2:3]


def test_flat_samples_have_features_of_several_columns() -> None:
    handler = Alpha360(
        data=synthetic.prices(12, 160),
        fit_start_time="2015-01-01",
        fit_end_time="2015-06-30",
        infer_processors=[
            {"class": "RobustZScoreNorm", "kwargs": {"fields_group": "feature"}},
            {"class": "Fillna", "kwargs": {"fields_group": "feature"}},
        ],
        learn_processors=["DropnaLabel"],
    )
    dataset = DatasetH(handler, {"train": ("2015-04-01", "2015-06-30"), "test": ("2015-07-01", "2015-07-20")})
    model = models.LSTM(d_feat=6, hidden_size=4, n_epochs=1, batch_size=200, seed=0, progress=False).fit(dataset)
    table = feature_importance(model, dataset)
    assert sorted(table.index) == ["CLOSE", "HIGH", "LOW", "OPEN", "VOLUME", "VWAP"]
    assert np.isfinite(table.to_numpy()).all()


def test_samples_exchange_one_feature_within_their_day(frame) -> None:
    windows = windows_of(TSDatasetH(frame, segments(frame), step_len=3), "test", "infer")
    partner = _exchanged_within_days(windows, np.random.default_rng(1))
    dates = windows.keys().get_level_values(0)
    assert sorted(partner.tolist()) == list(range(len(windows)))
    assert (dates[partner.numpy()] == dates).all()
    assert (partner != torch.arange(len(windows))).float().mean() > 0.8
    samples = torch.arange(0, len(windows), 3)
    expected = windows.batch(samples).clone()
    expected[:, :, 1] = windows.batch(partner[samples])[:, :, 1]
    permuted = _Permuted.of(windows, [1], partner)
    assert torch.equal(permuted.batch(samples), expected)
    assert permuted.with_views() is permuted
    assert permuted.view(samples) is None
    assert permuted.consecutive(2) == []
    assert torch.equal(permuted.to(torch.device("cpu")).batch(samples), expected)


def test_bad_arguments(frame) -> None:
    dataset = TSDatasetH(frame, segments(frame), step_len=2)
    model = ts.GRU(d_feat=4, hidden_size=2, n_epochs=1, batch_size=100, seed=0, progress=False)
    with pytest.raises(NotFittedError):
        feature_importance(model, dataset)
    model.fit(dataset)
    with pytest.raises(ConfigError, match=r"features has no 'nonsense'; the features are \["):
        feature_importance(model, dataset, features=["nonsense"])
    with pytest.raises(ConfigError, match="repeats must be a whole number of at least 1, got 0"):
        feature_importance(model, dataset, repeats=0)
    one = frame.xs(frame.index.get_level_values("instrument")[0], level="instrument", drop_level=False)
    with pytest.raises(DataError, match="has no day with two different labels and scores"):
        feature_importance(model, TSDatasetH(one, segments(frame), step_len=2))
