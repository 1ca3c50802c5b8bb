"""ALSTM estimators: `rnn_type`, `metric="mse"` and prediction of any segment, which Qlib has for ALSTM alone."""

from __future__ import annotations

import importlib
import logging

import numpy as np
import pandas as pd
import pytest
import torch

from qfast.errors import ConfigError
from qfast.models import ALSTM, ts
from support.fits import SMALL, dataset_for, same_weights, weights
from support.qlib import TRAIN, qlib_frames

both = pytest.mark.parametrize("kind", [ALSTM, ts.ALSTM], ids=["flat", "ts"])


# ---------------------------------------------------------------- rnn_type
@both
def test_quirk_rnn_type_is_built(kind, caplog):
    """Qlib accepts any rnn_type and builds a GRU."""
    pytest.importorskip("qlib", reason="pyqlib is the oracle; install qfast-models[qlib]")
    qlib_class = importlib.import_module("qlib.contrib.model.pytorch_alstm" + ("" if kind is ALSTM else "_ts")).ALSTM
    assert type(qlib_class(**SMALL, rnn_type="LSTM").ALSTM_model.rnn) is torch.nn.GRU
    with caplog.at_level(logging.INFO, logger="qfast"):
        model = kind(**SMALL, rnn_type="LSTM")
    assert type(model.network.rnn) is torch.nn.LSTM
    assert model.rnn_type == model.get_params()["rnn_type"] == "LSTM"
    assert "rnn_type='LSTM' is built; Qlib ignores rnn_type and builds a GRU" in caplog.text
    assert type(kind(**SMALL).network.rnn) is torch.nn.GRU
    caplog.clear()
    kind(**SMALL, rnn_type="gru")
    assert caplog.text == ""


@both
def test_compat_builds_a_gru_like_qlib(kind, caplog):
    with caplog.at_level(logging.INFO, logger="qfast"):
        model = kind(**SMALL, rnn_type="LSTM", compat="qlib")
    assert "rnn_type='LSTM' has no effect with compat='qlib': a GRU is built" in caplog.text
    assert same_weights(weights(model), weights(kind(**SMALL)))
    assert type(kind(**SMALL, rnn_type="nonsense", compat="qlib").network.rnn) is torch.nn.GRU
    with pytest.raises(ConfigError, match=r"rnn_type must be one of \['GRU', 'LSTM', 'RNN'\], got 'nonsense'"):
        kind(**SMALL, rnn_type="nonsense")


@both
def test_torchs_plain_layer_trains_too(kind):
    model = kind(**SMALL, rnn_type="RNN")
    before = weights(model)
    model.fit(dataset_for(kind))
    assert not same_weights(weights(model), before)
    assert model.predict(dataset_for(kind)).notna().all()


# ---------------------------------------------------------------- only in Qlib's ALSTM_ts
def test_the_metric_mse_equals_qlib(tmp_path):
    pytest.importorskip("qlib", reason="pyqlib is the oracle; install qfast-models[qlib]")
    from qlib.contrib.model.pytorch_alstm_ts import ALSTM as QlibALSTM

    sizes = {"d_feat": 3, "hidden_size": 8, "num_layers": 2, "seed": 3, "metric": "mse"}
    samples, expected, result = qlib_frames("_ts"), {}, {}
    qlib_estimator = QlibALSTM(**sizes, **TRAIN, n_jobs=0)
    qlib_estimator.fit(samples, expected, save_path=str(tmp_path / "x.pt"))
    ts.ALSTM(**sizes, **TRAIN).fit(samples, result)
    for name in ("train", "valid"):
        np.testing.assert_allclose(result[name], expected[name], rtol=1e-5)
    plain = {}
    ts.ALSTM(**{**sizes, "metric": "loss"}, **TRAIN).fit(samples, plain)
    assert plain == result  # "loss" and "mse" are the same metric


def test_any_segment_is_predicted_like_qlib(tmp_path):
    pytest.importorskip("qlib", reason="pyqlib is the oracle; install qfast-models[qlib]")
    from qlib.contrib.model.pytorch_alstm_ts import ALSTM as QlibALSTM

    sizes = {"d_feat": 3, "hidden_size": 8, "num_layers": 2, "seed": 3}
    samples = qlib_frames("_ts")
    qlib_estimator, model = QlibALSTM(**sizes, **TRAIN, n_jobs=0), ts.ALSTM(**sizes, **TRAIN)
    model.network.load_state_dict(qlib_estimator.ALSTM_model.state_dict())
    qlib_estimator.fitted = model.fitted = True
    for segment in ("valid", "test", "train"):
        expected = qlib_estimator.predict(samples, segment=segment)
        result = model.predict(samples, segment=segment)
        pd.testing.assert_series_equal(result, expected, rtol=1e-4, atol=1e-6, check_names=False)
