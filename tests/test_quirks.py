"""One test for each line of docs/parity.md, and one test that every line has a test."""

from __future__ import annotations

import copy
import os
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from qfast.data import DatasetH
from qfast.data.handlers import Alpha360, DataHandlerLP
from qfast.errors import ConfigError, DataError
from qfast.models import GRU, LSTM, TCN, GATs, LocalformerModel, TransformerModel, ts
from qfast.workflow.config import load_config
from support.fits import (
    ESTIMATORS,
    SMALL,
    dataset_for,
    frame_for,
    parametrize_estimators,
    same_weights,
    small_model,
    weights,
)
from support.frames import SEGMENTS, make_frame, rolling

ENCODERS = [TransformerModel, LocalformerModel, ts.TransformerModel, ts.LocalformerModel]
ROWS = [kind for kind in ESTIMATORS if not issubclass(kind, GATs | ts.GATs)]  # their batches are rows, not days
TESTS = Path(__file__).parent


def test_every_line_of_the_table_names_a_test_that_exists():
    table = (TESTS.parent / "docs" / "parity.md").read_text()
    lines = [line.split("|")[-2] for line in table.splitlines() if line.startswith("|")]
    named = [name for cell in lines for name in re.findall(r"\btest_\w+", cell)]
    assert len(named) >= len(lines) - 2 * table.count("| --- |")
    assert len(named) >= 20
    sources = "\n".join(path.read_text() for path in TESTS.glob("test_*.py"))
    assert [name for name in named if f"def {name}(" not in sources] == []


@parametrize_estimators(ROWS)
def test_quirk_remainder_of_one(kind):
    dataset = dataset_for(kind)
    n = len(dataset.windows("test", "infer"))
    model = small_model(kind, n_epochs=1).fit(dataset)
    whole = model.predict(dataset)
    model._params["batch_size"] = n - 1
    pd.testing.assert_series_equal(model.predict(dataset), whole, rtol=1e-5, atol=1e-6)


@parametrize_estimators([LSTM, ts.GRU, TCN, ts.TCN, *ENCODERS])
def test_quirk_batches_of_one(kind):
    model = small_model(kind, n_epochs=1, batch_size=1)
    before = weights(model)
    model.fit(dataset_for(kind, frame=frame_for(kind, 70, 1)))
    assert not same_weights(weights(model), before)


@parametrize_estimators(ROWS)
def test_quirk_no_best_epoch(kind):
    model = small_model(kind, n_epochs=0)
    before = weights(model)
    model.fit(dataset_for(kind))
    assert same_weights(weights(model), before)
    assert len(model.history_) == 0
    large = {"n_epochs": 1, "batch_size": 8192}
    assert small_model(kind, **large).fit(dataset_for(kind)).best_epoch_ == 0
    with pytest.raises(DataError, match="batch_size is 8192 but the segment has"):
        small_model(kind, **large, compat="qlib").fit(dataset_for(kind))


@parametrize_estimators()
def test_quirk_no_validation_segment(kind):
    model = small_model(kind)
    model.fit(dataset_for(kind, segments={"train": SEGMENTS["train"]}))
    again = small_model(kind)
    before = weights(again)
    assert not same_weights(weights(model), before)
    assert len(model.history_) == SMALL["n_epochs"]


@parametrize_estimators(ROWS)
def test_quirk_short_tail_of_scores(kind):
    dataset = dataset_for(kind)
    windows = dataset.windows("valid", "learn")
    batch_size = len(windows) // 2 + 1  # one full batch and a tail
    model = small_model(kind, n_epochs=1, batch_size=batch_size).fit(dataset)
    with torch.no_grad():
        model.network.eval()
        error = (model.run_network(windows, torch.arange(len(windows))) - windows.label) ** 2
    record = model.history_.iloc[-1]
    assert record["valid"] == pytest.approx(-float(error[:batch_size].mean()), rel=1e-5)
    assert record["valid_all"] == pytest.approx(-float(error.mean()), rel=1e-5)


@parametrize_estimators()
def test_quirk_no_test_segment(kind):
    segments = {name: SEGMENTS[name] for name in ("train", "valid")}
    assert small_model(kind).fit(dataset_for(kind, segments=segments)).fitted


@parametrize_estimators()
def test_quirk_scores_without_gradients(kind):
    model = small_model(kind, n_epochs=1)
    seen = []
    model.network.register_forward_hook(lambda module, _, out: seen.append((module.training, out.requires_grad)))
    model.fit(dataset_for(kind))
    assert set(seen) == {(True, True), (False, False)}


@parametrize_estimators()
def test_quirk_infinite_label(kind):
    frame = frame_for(kind)
    values = frame[("label", "LABEL0")].to_numpy(copy=True)
    values[4] = np.inf
    frame[("label", "LABEL0")] = values
    model = small_model(kind).fit(dataset_for(kind, frame=frame))
    assert all(torch.isfinite(v).all() for v in weights(model).values())


def test_quirk_two_labels():
    frame = make_frame(70, 9, 3)
    frame[("label", "LABEL1")] = frame[("label", "LABEL0")]
    for kind in (LSTM, ts.LSTM):
        with pytest.raises(DataError, match=r"2 label columns .*trained on exactly one"):
            small_model(kind).fit(dataset_for(kind, frame=frame))


def prices() -> pd.DataFrame:
    """Two instruments of 80 days; the last two labels of each are missing by construction."""
    rng = np.random.default_rng(0)
    index = pd.MultiIndex.from_product(
        [pd.bdate_range("2020-01-01", periods=80), ["A", "B"]], names=["datetime", "instrument"]
    )
    close = np.exp(np.cumsum(rng.normal(0, 0.02, (80, 2)), axis=0)).reshape(-1)
    frame = pd.DataFrame(dict.fromkeys(("open", "high", "low", "close", "vwap"), close), index=index)
    frame["volume"] = rng.uniform(1e5, 1e6, len(frame))
    return frame


def test_quirk_default_alpha360_processors_fill_labels():
    window = {"fit_start_time": "2020-01-01", "fit_end_time": "2020-03-31"}
    default = Alpha360(data=prices(), **window)
    feature_only = Alpha360(
        data=prices(), infer_processors=[{"class": "Fillna", "kwargs": {"fields_group": "feature"}}], **window
    )
    n_rows = len(default.fetch(data_key="infer"))
    assert len(default.fetch(data_key="learn")) == n_rows
    assert len(feature_only.fetch(data_key="learn")) == n_rows - 4


def test_quirk_processor_dictionaries_are_left_alone():
    arguments = [{"class": "ZScoreNorm", "kwargs": {"fields_group": "feature", "fit_end_time": "2020-01-20"}}]
    before = copy.deepcopy(arguments)
    frame = make_frame(60, 5, 2, holes=0.0)
    handler = DataHandlerLP(frame, infer_processors=arguments, fit_start_time="2020-01-01", fit_end_time="2020-03-01")
    assert arguments == before
    early = handler.fetch(slice("2020-01-01", "2020-01-20"), col_set="feature")
    np.testing.assert_allclose(early.mean(), 0.0, atol=1e-5)  # the value given won


def test_quirk_nothing_shared_between_fits(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    open_files = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    first = ts.LSTM(**SMALL).fit(rolling())
    second = ts.LSTM(**{**SMALL, "n_epochs": 1}).fit(rolling())
    assert len(first.evals_result_["train"]) == 3
    assert len(second.evals_result_["train"]) == 1
    assert list(tmp_path.rglob("*")) == []
    if open_files:
        assert len(os.listdir("/proc/self/fd")) == open_files


@parametrize_estimators()
def test_quirk_empty_prediction(kind):
    model = small_model(kind, n_epochs=1).fit(dataset_for(kind))
    result = model.predict(dataset_for(kind), slice("2031-01-01", "2031-12-31"))
    assert len(result) == 0
    assert result.index.names == ["datetime", "instrument"]
    assert result.dtype == np.float32


def test_quirk_yaml_floats(tmp_path):
    text = "task: {model: {class: LSTM, module_path: qfast.models, kwargs: {lr: 1e-3}}}\nflag: yes\n"
    (tmp_path / "w.yaml").write_text(text)
    loaded = load_config(tmp_path / "w.yaml").values
    assert loaded["task"]["model"]["kwargs"]["lr"] == 0.001
    assert loaded["flag"] == "yes"
    with pytest.raises(ConfigError, match="lr must be a number"):
        LSTM(lr="1e-3")


def test_quirk_gru_needs_no_experiment(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    GRU(**SMALL).fit(DatasetH(handler=make_frame(70, 9, 12), segments=SEGMENTS))
    assert list(tmp_path.iterdir()) == []


@parametrize_estimators([GATs, ts.GATs])
@pytest.mark.parametrize("base", ["GRU", "LSTM"])
def test_quirk_base_of_the_models_own_size(kind, base):
    model = kind(d_feat=3, hidden_size=8, num_layers=1, base_model=base, n_epochs=1).fit(dataset_for(kind))
    assert model.network.rnn.weight_hh_l0.shape[1] == 8
    assert model.predict(dataset_for(kind)).notna().all()


@parametrize_estimators([GATs, ts.GATs])
def test_quirk_weights_of_samples_in_every_model(kind):
    class FirstHalf:
        """Stocks with weight 0 have no influence."""

        def reweight(self, samples):
            index = samples.index if hasattr(samples, "index") else samples.get_index()
            return (index.get_level_values("instrument") < "S005").astype(float)

    frame = frame_for(kind)
    other = frame.copy()
    rest = other.index.get_level_values("instrument") >= "S005"
    other.loc[rest, ("label", "LABEL0")] = 7.0
    result = [small_model(kind).fit(dataset_for(kind, frame=f), reweighter=FirstHalf()) for f in (frame, other)]
    assert same_weights(weights_after_training(result[0]), weights_after_training(result[1]))
    plain = small_model(kind).fit(dataset_for(kind, frame=frame))
    assert not same_weights(weights_after_training(plain), weights_after_training(result[0]))


def weights_after_training(model) -> dict[str, torch.Tensor]:
    """Adam's moments after the last epoch, whichever epoch was best."""
    return {"moments": torch.cat([s["exp_avg"].flatten() for s in model.train_optimizer.state.values()])}
