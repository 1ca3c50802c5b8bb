"""The base of GATs: weight files, run folders, or pre-training in the same program."""

from __future__ import annotations

import copy
import logging
import re
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch

from qfast.errors import CheckpointError, ConfigError, NotFittedError
from qfast.models import GATs, ts
from qfast.nn import GRUModel, LSTMModel
from support.fits import StopAt, dataset_for, same_weights, weights
from support.frames import flat, make_frame, rolling
from support.qlib import qlib_frames, qlib_model

SMALL = {"d_feat": 3, "hidden_size": 8, "n_epochs": 3, "lr": 0.01, "seed": 1}
BASE = {"base_model": "LSTM"}
both = pytest.mark.parametrize("kind", [GATs, ts.GATs], ids=["flat", "ts"])
NO_EPOCH = {**SMALL, **BASE, "n_epochs": 0}
TRAINING = {"n_epochs": 2, "lr": 0.005, "batch_size": 64}


def base_of(kind: type, name: str = "LSTM") -> type:
    return kind.base_estimators[name]


def parts(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k: v for k, v in state.items() if k.startswith(("rnn.", "fc_out."))}


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(21)
    return LSTMModel(d_feat=3, hidden_size=8).state_dict()


# ---------------------------------------------------------------- files
@pytest.mark.parametrize("form", ["pkl", "pt", "bin", "safetensors", "run folder"])
@both
def test_the_base_is_read_from(kind, form, state, tmp_path, caplog):
    path = tmp_path / f"w.{form}"
    if form == "run folder":
        path = tmp_path
        safetensors.torch.save_file(state, path / "best.safetensors")
    elif form == "safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save(state, path)
    with caplog.at_level(logging.INFO, logger="qfast"):
        model = kind(**NO_EPOCH, model_path=path)
        assert model.pretrained_ == {}
        model.fit(dataset_for(kind))
    assert same_weights(parts(weights(model)), state)
    file = path / "best.safetensors" if path.is_dir() else path
    assert model.pretrained_ == {"source": str(file), "taken": sorted(state), "not_taken": [], "absent": []}
    message = next(r.message for r in caplog.records if r.message.startswith("base model from"))
    assert message == f"base model from {file}: loaded {sorted(state)}; not loaded none; absent none"


@both
def test_more_and_less_than_a_base(kind, state, tmp_path, caplog):
    """All recurrent layers must be present, the output layer may be missing, and the rest is listed."""
    more = {
        **{k: v for k, v in state.items() if k.startswith("rnn.")},
        "head.weight": torch.ones(3),
        "a": torch.ones(1),
    }
    torch.save(more, tmp_path / "w.pt")
    with caplog.at_level(logging.INFO, logger="qfast"):
        model = kind(**NO_EPOCH, model_path=tmp_path / "w.pt").fit(dataset_for(kind))
    fresh = kind(**NO_EPOCH).fit(dataset_for(kind))
    assert torch.equal(model.network.rnn.weight_hh_l1, state["rnn.weight_hh_l1"])
    assert torch.equal(model.network.a, fresh.network.a)
    assert torch.equal(model.network.fc_out.weight, fresh.network.fc_out.weight)  # as without a file
    assert model.pretrained_["not_taken"] == ["a", "head.weight"]
    assert model.pretrained_["absent"] == ["fc_out.weight", "fc_out.bias"]
    assert "not loaded ['a', 'head.weight']; absent ['fc_out.weight', 'fc_out.bias']" in caplog.text


@both
def test_the_base_of_another_gats_is_loaded(kind, tmp_path):
    other = kind(**{**SMALL, **BASE, "n_epochs": 1, "seed": 9}).fit(
        dataset_for(kind), save_path=tmp_path / "gats.safetensors"
    )
    model = kind(**NO_EPOCH, model_path=tmp_path / "gats.safetensors").fit(dataset_for(kind))
    assert same_weights(parts(weights(model)), parts(weights(other)))
    assert not torch.equal(model.network.a, other.network.a)
    assert "transformation.weight" in model.pretrained_["not_taken"]


def wrong_files(tmp_path) -> dict[str, object]:
    files: dict[str, object] = {
        "gru": GRUModel(d_feat=3, hidden_size=8).state_dict(),
        "features": LSTMModel(d_feat=5, hidden_size=8).state_dict(),
        "wide": LSTMModel(d_feat=3, hidden_size=12).state_dict(),
        "deep": LSTMModel(d_feat=3, hidden_size=8, num_layers=3).state_dict(),
        "shallow": LSTMModel(d_feat=3, hidden_size=8, num_layers=1).state_dict(),
        "nothing": {"weight": torch.ones(2)},
        "list": [torch.ones(2)],
    }
    for name, value in files.items():
        torch.save(value, tmp_path / f"{name}.pkl")
    whole = (tmp_path / "gru.pkl").read_bytes()
    (tmp_path / "cut.pkl").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.pkl").write_text("hello")
    (tmp_path / "folder").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "manifest.json").write_text('{"status": "failed"}')
    return files


WRONG = {
    "gru.pkl": r"rnn.weight_ih_l0: \(24, 3\), needed \(32, 3\).*build the model with base_model='GRU' \(now 'LSTM'\)",
    "features.pkl": r"rnn.weight_ih_l0: \(32, 5\), needed \(32, 3\).*build the model with d_feat=5 \(now 3\), or use",
    "wide.pkl": r"build the model with hidden_size=12 \(now 8\)",
    "deep.pkl": r"surplus rnn.weight_ih_l2, .*build the model with num_layers=3 \(now 2\)",
    "shallow.pkl": r"missing rnn.weight_ih_l1, .*build the model with num_layers=1 \(now 2\)",
    "nothing.pkl": r"missing rnn.weight_ih_l0, .*it contains weight. Remedy: the weights of an LSTM or GRU",
    "list.pkl": "contains list, not a state dict",
    "cut.pkl": "cut.pkl is not a readable weight file, it may be truncated",
    "text.pkl": "text.pkl is not a readable weight file",
    "folder": "folder' is a folder without best.safetensors: it is not a run folder",
    "run": "without best.safetensors: its run is 'failed' and has not written any yet",
}


@pytest.mark.parametrize("name", WRONG)
@both
def test_a_file_that_does_not_fit_is_refused_before_anything_else(kind, name, tmp_path):
    wrong_files(tmp_path)
    with pytest.raises(CheckpointError, match=WRONG[name]):
        kind(**SMALL, **BASE, model_path=tmp_path / name)


@both
def test_a_missing_file_is_searched_again_by_fit(kind, state, tmp_path):
    path = tmp_path / "later.pkl"
    model = kind(**NO_EPOCH, model_path=str(path))
    before = weights(model)
    with pytest.raises(CheckpointError, match=re.escape(f"weight file {path} does not exist")):
        model.fit(dataset_for(kind))
    assert same_weights(weights(model), before)
    with pytest.raises(NotFittedError, match="not fitted"):
        model.predict(dataset_for(kind))
    torch.save(state, path)
    assert same_weights(parts(weights(model.fit(dataset_for(kind)))), state)


@both
def test_a_checkpoint_of_a_fit_is_not_accepted_as_weights(kind, tmp_path):
    base_of(kind)(**{**SMALL, "n_epochs": 1}, batch_size=64).fit(dataset_for(kind), checkpoint_dir=tmp_path)
    with pytest.raises(CheckpointError, match=r"For a training checkpoint, use the best.safetensors in"):
        kind(**SMALL, **BASE, model_path=tmp_path / "last.safetensors")


# ---------------------------------------------------------------- the first fit and later ones
@both
def test_the_base_is_drawn_again_at_the_first_fit_only_unless_compat(kind):
    for compat in (None, "qlib"):
        model = kind(**NO_EPOCH, compat=compat)
        built = weights(model)
        first = weights(model.fit(dataset_for(kind)))
        second = weights(model.fit(dataset_for(kind)))
        saved = [k for k in built if not k.startswith(("rnn.", "fc_out."))]
        assert all(torch.equal(built[k], second[k]) for k in saved)
        assert not torch.equal(built["rnn.weight_hh_l0"], first["rnn.weight_hh_l0"])
        assert torch.equal(first["rnn.weight_hh_l0"], second["rnn.weight_hh_l0"]) == (compat is None)


@both
def test_a_fit_starts_from_loaded_weights(kind, tmp_path):
    done = kind(**SMALL, **BASE).fit(dataset_for(kind), save_path=tmp_path / "w.safetensors")
    model = kind(**NO_EPOCH).load_weights(tmp_path / "w.safetensors").fit(dataset_for(kind))
    assert same_weights(weights(model), weights(done))


# ---------------------------------------------------------------- compared with Qlib
@pytest.mark.parametrize("name", ["LSTM", "GRU"])
@pytest.mark.parametrize("suffix", ["", "_ts"])
def test_training_from_qlibs_file_follows_qlib(name, suffix, tmp_path):
    pytest.importorskip("qlib", reason="pyqlib is the oracle; install qfast-models[qlib]")
    dataset, jobs = qlib_frames(suffix), {"n_jobs": 0} if suffix else {}
    sizes = {"d_feat": 3, "hidden_size": 8} if suffix else {}  # Qlib's flat base has its default sizes
    base = qlib_model(name, name.lower(), suffix)(**sizes, **jobs, n_epochs=1, batch_size=16, seed=2)
    base.fit(dataset, {}, save_path=str(tmp_path / "base.pkl"))
    arguments = {**sizes, "n_epochs": 2, "lr": 1e-4, "base_model": name, "model_path": tmp_path / "base.pkl", "seed": 4}
    expected: dict[str, list[float]] = {}
    qlib_estimator = qlib_model("GATs", "gats", suffix)(**arguments, **jobs)
    qlib_estimator.fit(dataset, expected, save_path=str(tmp_path / "x.pkl"))
    model = (ts.GATs if suffix else GATs)(**arguments, compat="qlib").fit(dataset)
    for segment in ("train", "valid"):
        np.testing.assert_allclose(model.evals_result_[segment], expected[segment], rtol=1e-5)
    result = model.predict(dataset)
    pd.testing.assert_series_equal(result, qlib_estimator.predict(dataset), rtol=1e-4, atol=1e-5, check_names=False)


# ---------------------------------------------------------------- pre-training
@pytest.mark.parametrize("name", ["LSTM", "GRU"])
@both
@pytest.mark.parametrize("compat", [None, "qlib"])
def test_pretraining_equals_training_the_base_model(kind, name, compat):
    model = kind(**SMALL, base_model=name, compat=compat)
    built = weights(model)
    base = model.pretrain(dataset_for(kind), **TRAINING)
    alone = base_of(kind, name)(d_feat=3, hidden_size=8, seed=1, compat=compat, **TRAINING).fit(dataset_for(kind))
    assert type(base) is base_of(kind, name)
    assert base.evals_result_ == alone.evals_result_
    assert same_weights(parts(weights(model)), weights(alone))
    assert all(torch.equal(built[k], v) for k, v in weights(model).items() if not k.startswith(("rnn.", "fc_out.")))
    assert model.pretrained_["source"] == f"pre-training of {name}"
    assert model.pretrained_["taken"] == sorted(weights(alone))
    model._params["n_epochs"] = 0
    assert same_weights(
        parts(weights(model.fit(dataset_for(kind)))), weights(alone)
    )  # fit does not initialise it again


@both
def test_pretraining_uses_the_base_models_defaults_and_arguments(kind):
    model = kind(**SMALL, dropout=0.5, compat="qlib", weight_decay=0.25)
    stop = SimpleNamespace(on_fit_start=lambda e: setattr(e, "stop_training", True))
    for moment in ("epoch_start", "batch_end", "valid_end", "epoch_end", "fit_end"):
        setattr(stop, f"on_{moment}", lambda e: None)
    params = model.pretrain(dataset_for(kind), callbacks=[stop], batch_size=64).get_params()
    default = base_of(kind)().get_params()
    expected = {"d_feat": 3, "hidden_size": 8, "num_layers": 2, "seed": 1, "batch_size": 64, "compat": "qlib"}
    assert {**params, "device": "auto"} == {**default, **expected}
    base = model.pretrain(
        dataset_for(kind), n_epochs=1, batch_size=64, seed=3, dropout=0.1, evals_result=(scores := {})
    )
    assert (base.seed, base.dropout, len(scores["valid"])) == (3, 0.1, 1)


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"n_epoch": 3}, r"(LSTM|GRU) has no argument 'n_epoch'\. Did you mean 'n_epochs'"),
        ({"hidden_size": 4}, "pretrain has no argument 'hidden_size', got 4: the base model has .* {'d_feat': 3"),
        ({"lr": -1}, "lr must be a number of at least 0, got -1"),
        ({"resume": True}, "resume=True needs checkpoint_dir"),
    ],
)
@both
def test_wrong_pretraining_arguments_are_reported(kind, training, message):
    model = kind(**SMALL)
    before = weights(model)
    with pytest.raises(ConfigError, match=message):
        model.pretrain(dataset_for(kind), **training)
    assert same_weights(weights(model), before)


@both
def test_a_file_and_pretraining_exclude_each_other(kind, state, tmp_path):
    torch.save(state, tmp_path / "w.pkl")
    with pytest.raises(ConfigError, match=r"already comes from model_path='.*w.pkl'. Remedy: model_path=None"):
        kind(**SMALL, **BASE, model_path=tmp_path / "w.pkl").pretrain(dataset_for(kind))


@both
def test_pretraining_pays(kind):
    """The base can learn the signal, so the first epoch of GATs starts from it. (Before that epoch the score is bad:
    the layer between base and output is still random.)"""
    frame = make_frame(120, 12, 12 if kind is GATs else 3, holes=0.05)
    frame[("label", "LABEL0")] = frame[("feature", "F1")] * 0.9 + 0.1 * frame[("label", "LABEL0")]
    dataset = flat(frame) if kind is GATs else rolling(frame)
    arguments = {**SMALL, "n_epochs": 1}
    model = kind(**arguments)
    model.pretrain(dataset, n_epochs=15, lr=0.01, batch_size=32)
    gain = model.fit(dataset).history_["valid"].iloc[0] - kind(**arguments).fit(dataset).history_["valid"].iloc[0]
    assert gain > 0.3


@pytest.mark.parametrize("stage", ["pretrain", "between", "fit"])
@pytest.mark.parametrize("compat", [None, "qlib"])
@both
def test_broken_off_and_resumed_anywhere_it_ends_as_unbroken(kind, compat, stage, tmp_path):
    arguments = {**SMALL, "n_epochs": 4, "dropout": 0.2, "compat": compat, **BASE}
    training = {**TRAINING, "n_epochs": 4, "dropout": 0.1}
    folders = {"pretrain": tmp_path / "base", "fit": tmp_path / "gats"}

    def run(stop: str = "", resume: tuple[str, ...] = ()):
        model = kind(**arguments)
        at = {name: [StopAt(2, "batch")] if stop == name else [] for name in folders}
        if "fit" not in resume:
            inputs = {"checkpoint_dir": folders["pretrain"], "resume": "pretrain" in resume}
            model.pretrain(dataset_for(kind), **training, **inputs, callbacks=at["pretrain"])
        if stop == "between":
            raise KeyboardInterrupt
        return model.fit(dataset_for(kind), checkpoint_dir=folders["fit"], resume="fit" in resume, callbacks=at["fit"])

    unbroken = run()
    with pytest.raises(KeyboardInterrupt):
        run(stop=stage)
    np.random.seed(99)
    torch.manual_seed(99)
    resumed = run(resume=("fit",) if stage == "fit" else ("pretrain",))
    assert resumed.evals_result_ == unbroken.evals_result_
    assert same_weights(weights(resumed), weights(unbroken))
    assert resumed.pretrained_ == unbroken.pretrained_ != {}
    assert resumed.base_is_trained_


@both
def test_a_resumed_fit_does_not_need_the_file(kind, state, tmp_path):
    path = tmp_path / "w.pkl"
    torch.save(state, path)
    arguments = {**SMALL, **BASE, "model_path": path}
    unbroken = kind(**arguments).fit(dataset_for(kind))
    with pytest.raises(KeyboardInterrupt):
        kind(**arguments).fit(dataset_for(kind), callbacks=[StopAt(1, "batch")], checkpoint_dir=tmp_path)
    path.unlink()
    resumed = kind(**arguments).fit(dataset_for(kind), checkpoint_dir=tmp_path, resume=True)
    assert same_weights(weights(resumed), weights(unbroken))
    assert resumed.pretrained_ == unbroken.pretrained_


@both
def test_pretraining_a_fitted_model_begins_its_optimiser_anew(kind):
    model = kind(**SMALL).fit(dataset_for(kind))
    assert model.train_optimizer.state
    twin = copy.deepcopy(model)
    model.pretrain(dataset_for(kind), **TRAINING)
    assert not model.train_optimizer.state
    assert not same_weights(parts(weights(model)), parts(weights(twin)))
    model.fit(dataset_for(kind))
    assert model.train_optimizer.state


def test_weights_that_are_not_finite_are_refused(tmp_path):
    state = LSTMModel(d_feat=6, hidden_size=8).state_dict()
    state["rnn.weight_hh_l0"][0, 0] = float("nan")
    torch.save(state, tmp_path / "broken.pkl")
    with pytest.raises(CheckpointError, match=r"NaN or infinity in \['rnn.weight_hh_l0'\]"):
        GATs(d_feat=6, hidden_size=8, base_model="LSTM", model_path=tmp_path / "broken.pkl")
