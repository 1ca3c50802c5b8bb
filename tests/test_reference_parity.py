"""Every model compared with pyqlib's: the same weights, batches, scores and predictions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import qfast.models
import qfast.models.ts
from support.frames import make_frame
from support.qlib import TRAIN, QlibFrames, qlib_frames, qlib_model

pytest.importorskip("qlib", reason="pyqlib is the oracle; install qfast-models[qlib]")

CASES = [
    ("LSTM", "lstm", ""),
    ("GRU", "gru", ""),
    ("ALSTM", "alstm", ""),
    ("GATs", "gats", ""),
    ("TCN", "tcn", ""),
    ("LSTM", "lstm", "_ts"),
    ("GRU", "gru", "_ts"),
    ("ALSTM", "alstm", "_ts"),
    ("GATs", "gats", "_ts"),
    ("TCN", "tcn", "_ts"),
    ("TransformerModel", "transformer", ""),
    ("LocalformerModel", "localformer", ""),
    ("TransformerModel", "transformer", "_ts"),
    ("LocalformerModel", "localformer", "_ts"),
]
ENCODERS = ("TransformerModel", "LocalformerModel")
IDS = [f"{name}{suffix}" for name, _, suffix in CASES]
SIZES = {"d_feat": 3, "hidden_size": 8, "num_layers": 2}
NETWORK = {
    "lstm": "lstm_model",
    "gru": "gru_model",
    "alstm": "ALSTM_model",
    "gats": "GAT_model",
    "tcn": "tcn_model",
    "lstm_ts": "LSTM_model",
    "gru_ts": "GRU_model",
    "alstm_ts": "ALSTM_model",
    "gats_ts": "GAT_model",
    "tcn_ts": "TCN_model",
    "transformer": "model",
    "localformer": "model",
    "transformer_ts": "model",
    "localformer_ts": "model",
}


def sizes(name: str, d_feat: int = 3, width: int = 8, num_layers: int = 2) -> dict[str, int]:
    names = {"TCN": "n_chans", **dict.fromkeys(ENCODERS, "d_model")}
    return {"d_feat": d_feat, names.get(name, "hidden_size"): width, "num_layers": num_layers}


def training(name: str, suffix: str) -> dict[str, float]:
    """TCN has no dropout, because qfast's masks differ.

    GATs has small steps: Adam turns gradients that are pure rounding noise (a bias under the softmax) into full steps,
    and with large steps two equal implementations diverge. Transformer and Localformer likewise: the gradient of the
    key bias is rounding noise. Qlib's flat GATs can only be trained with the default sizes, which its base always has.
    """
    if name == "TCN":
        return {**sizes(name), **TRAIN, "dropout": 0.0, "lr": 1e-3}
    if name in ENCODERS:
        return {**sizes(name), **TRAIN, "nhead": 4, "lr": 1e-3}
    if name != "GATs":
        return {**SIZES, **TRAIN}
    network_sizes = SIZES if suffix else {"d_feat": 6, "hidden_size": 64, "num_layers": 2}
    return {**network_sizes, **TRAIN, "lr": 1e-4}


def ours(name: str, suffix: str) -> type:
    return getattr(qfast.models.ts if suffix else qfast.models, name)


@pytest.mark.parametrize(("name", "module", "suffix"), CASES, ids=IDS)
def test_the_same_seed_yields_the_same_weights_and_generator_states(name, module, suffix):
    qlib_estimator = qlib_model(name, module, suffix)(**sizes(name), seed=7)
    after = torch.get_rng_state(), np.random.get_state()
    model = ours(name, suffix)(**sizes(name), seed=7)
    expected = getattr(qlib_estimator, NETWORK[module + suffix]).state_dict()
    assert list(model.network.state_dict()) == list(expected)
    for key, value in model.network.state_dict().items():
        assert torch.equal(value, expected[key]), key
    assert torch.equal(torch.get_rng_state(), after[0])
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), after[1], strict=True))
    assert getattr(model, NETWORK[module + suffix]) is model.network


@pytest.mark.parametrize(("name", "module", "suffix"), CASES, ids=IDS)
def test_positional_arguments_have_qlibs_order(name, module, suffix):
    import inspect

    expected = list(inspect.signature(qlib_model(name, module, suffix)).parameters.values())[:-1]
    result = list(inspect.signature(ours(name, suffix)).parameters.values())[:-1]
    assert [(p.name, p.default) for p in result] == [(p.name, p.default) for p in expected]


@pytest.mark.parametrize(("name", "module", "suffix"), CASES, ids=IDS)
def test_batches_scores_and_predictions_follow_qlib(name, module, suffix, monkeypatch, tmp_path):
    data = qlib_frames(suffix, step_len=3 if name == "TCN" else 5)  # otherwise Qlib's time-series TCN cannot predict
    arguments = {**training(name, suffix), "seed": 3}
    qlib_estimator = qlib_model(name, module, suffix)(**arguments, **({"n_jobs": 0} if suffix else {}))
    seen: dict[str, list[torch.Tensor]] = {"ours": [], "theirs": []}

    def spy(model: Any, who: str) -> None:
        inner = model.loss_fn

        def loss_fn(prediction, label, *args, **kwargs):
            if torch.is_grad_enabled() and prediction.requires_grad and model_is_training(model):
                seen[who].append(label.detach().clone().double())
            return inner(prediction, label, *args, **kwargs)

        monkeypatch.setattr(model, "loss_fn", loss_fn)

    def model_is_training(model: Any) -> bool:
        network = getattr(model, "network", None) or getattr(model, NETWORK[module + suffix])
        return network.training

    spy(qlib_estimator, "theirs")
    expected: dict[str, list[float]] = {}
    qlib_estimator.fit(data, expected, save_path=str(tmp_path / "qlib.pt"))
    expected_prediction = qlib_estimator.predict(data)
    after = torch.get_rng_state(), np.random.get_state()[1]

    model = ours(name, suffix)(**arguments, compat="qlib" if name in ("GATs", "TCN") else None)
    spy(model, "ours")
    result: dict[str, list[float]] = {"kept": [1.0]}
    model.fit(data, result, save_path=tmp_path / "ours.pt")
    prediction = model.predict(data)

    assert len(seen["ours"]) == len(seen["theirs"]) > 6
    for a, b in zip(seen["ours"], seen["theirs"], strict=True):
        assert torch.equal(a, b)  # the same samples in the same batches, bit for bit
    assert result["kept"] == [1.0]
    for segment in ("train", "valid"):
        np.testing.assert_allclose(result[segment], expected[segment], rtol=1e-5)
    pd.testing.assert_series_equal(prediction, expected_prediction, rtol=1e-4, atol=1e-5, check_names=False)
    assert prediction.dtype == np.float32
    assert prediction.name is None
    assert torch.equal(torch.get_rng_state(), after[0])
    assert np.array_equal(np.random.get_state()[1], after[1])
    # files are exchangeable: qfast's weights load in Qlib, and Qlib's in qfast
    torch.save(torch.load(tmp_path / "ours.pt", weights_only=True), tmp_path / "copy.pt")
    getattr(qlib_estimator, NETWORK[module + suffix]).load_state_dict(
        torch.load(tmp_path / "copy.pt", weights_only=True)
    )
    model.load_weights(tmp_path / "qlib.pt")


@pytest.mark.parametrize(("name", "module", "suffix"), CASES, ids=IDS)
def test_copied_weights_have_qlibs_predictions(name, module, suffix):
    network_sizes = sizes(name, d_feat=6, width=64)
    qlib_estimator = qlib_model(name, module, suffix)(**network_sizes)
    network = getattr(qlib_estimator, NETWORK[module + suffix])
    model = ours(name, suffix)(**network_sizes)
    model.network.load_state_dict(network.state_dict())
    x = torch.randn(33, 20, 6)
    steps_last = x.transpose(1, 2)
    x = steps_last if name == "TCN" else x
    arguments = x if suffix else steps_last.reshape(33, -1)
    network.eval()
    with torch.no_grad():
        expected = network(arguments)
        torch.testing.assert_close(model.network.eval()(arguments), expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(model.network(x), expected, rtol=1e-6, atol=1e-6)
        assert model.network(arguments[:1]).shape == (1,)


@pytest.mark.parametrize(("name", "module"), [("LSTM", "lstm"), ("GRU", "gru"), ("ALSTM", "alstm")])
def test_sample_weights_follow_qlib(name, module, tmp_path):
    from qlib.data.dataset.weight import Reweighter

    class ByRank(Reweighter):
        def __init__(self) -> None:
            pass

        def reweight(self, data):
            return np.linspace(0.1, 2.0, len(data))

    data = qlib_frames("_ts")
    expected, result = {}, {}
    qlib_estimator = qlib_model(name, module, "_ts")(**SIZES, **TRAIN, seed=3, n_jobs=0)
    qlib_estimator.fit(data, expected, save_path=str(tmp_path / "x.pt"), reweighter=ByRank())
    ours(name, "_ts")(**SIZES, **TRAIN, seed=3).fit(data, result, reweighter=ByRank())
    np.testing.assert_allclose(result["valid"], expected["valid"], rtol=1e-5)
    unweighted: dict[str, list[float]] = {}
    ours(name, "_ts")(**SIZES, **TRAIN, seed=3).fit(data, unweighted)
    assert not np.allclose(result["valid"], unweighted["valid"], rtol=1e-5)


@pytest.mark.parametrize("suffix", ["", "_ts"])
def test_fitting_twice_continues_weights_and_optimiser(suffix, tmp_path):
    data = qlib_frames(suffix)
    expected, result = {}, {}
    qlib_estimator = qlib_model("LSTM", "lstm", suffix)(**SIZES, **TRAIN, seed=3, **({"n_jobs": 0} if suffix else {}))
    for _ in range(2):
        qlib_estimator.fit(data, expected, save_path=str(tmp_path / "x.pt"))
    model = ours("LSTM", suffix)(**SIZES, **TRAIN, seed=3)
    for _ in range(2):
        model.fit(data, result)
    np.testing.assert_allclose(result["valid"], expected["valid"], rtol=1e-5)


@pytest.mark.parametrize("name", ["LSTM", "GRU", "ALSTM"])
def test_dropout_draws_interleave_as_in_qlib(name, tmp_path):
    """With compat="qlib". Otherwise the operator draws its masks by counter."""
    data = qlib_frames("_ts")
    expected, result = {}, {}
    qlib_model(name, name.lower(), "_ts")(**SIZES, **TRAIN, dropout=0.3, seed=3, n_jobs=0).fit(
        data, expected, save_path=str(tmp_path / "x.pt")
    )
    ours(name, "_ts")(**SIZES, **TRAIN, dropout=0.3, seed=3, compat="qlib").fit(data, result)
    np.testing.assert_allclose(result["valid"], expected["valid"], rtol=1e-5)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_time_series_tcn_trains_like_qlib_at_any_step_len(dtype, tmp_path):
    """The loss has the label's precision. Predictions are compared with Qlib's network on transposed windows."""
    frame = make_frame(70, 9, 3, holes=0.15, dtype=dtype)
    data = QlibFrames(frame, step_len=7)
    arguments = {**training("TCN", "_ts"), "kernel_size": 3, "num_layers": 3, "seed": 3}
    expected, result = {}, {}
    qlib_estimator = qlib_model("TCN", "tcn", "_ts")(**arguments, n_jobs=0)
    qlib_estimator.fit(data, expected, save_path=str(tmp_path / "qlib.pkl"))
    model = ours("TCN", "_ts")(**arguments)
    seen = []
    inner = model.loss_fn
    model.loss_fn = lambda *inputs: seen.append(inputs[1].dtype) or inner(*inputs)
    model.fit(data, result)
    assert set(seen) == {torch.from_numpy(np.zeros(1, dtype)).dtype}
    for segment in ("train", "valid"):
        np.testing.assert_allclose(result[segment], expected[segment], rtol=1e-5)
    windows = data.prepare("test")
    windows.config(fillna_type="ffill+bfill")
    x = torch.from_numpy(windows[list(range(len(windows)))][:, :, :-1]).float().transpose(1, 2)
    with torch.no_grad():
        expected_prediction = qlib_estimator.TCN_model.eval()(x).numpy()
    np.testing.assert_allclose(model.predict(data).to_numpy(), expected_prediction, rtol=1e-4, atol=1e-5)
    other = ours("TCN", "_ts")(**{**arguments, "seed": 9}).load_weights(tmp_path / "qlib.pkl")
    np.testing.assert_allclose(other.predict(data).to_numpy(), expected_prediction, rtol=1e-4, atol=1e-5)
