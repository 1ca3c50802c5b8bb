"""Conventions of other libraries that estimators and datasets follow: repr, parameters, and whole models in files."""

from __future__ import annotations

import json
import logging
import pickle
import shutil

import numpy as np
import pytest
import torch

import qfast
from qfast.errors import CheckpointError, ConfigError
from qfast.models import LSTM, GATs, ts
from qfast.workflow.classes import register_model
from support.fits import dataset_for, parametrize_estimators, same_weights, small_arguments, small_model, weights
from support.frames import flat, rolling


# ---------------------------------------------------------------- repr
def test_repr_of_estimators_and_datasets() -> None:
    model = LSTM(d_feat=3, hidden_size=4, n_epochs=2, batch_size=32, seed=0, device="cpu")
    shown = "LSTM(d_feat=3, hidden_size=4, n_epochs=2, batch_size=32, seed=0, device='cpu'): 309 weights on cpu"
    assert repr(model) == f"<{shown}, not fitted>"
    dataset = flat()
    model.fit(dataset)
    assert repr(model) == f"<{shown}, fitted, 2 epochs>"
    assert repr(dataset).startswith("DatasetH(DataHandlerLP(")
    start, end = dataset.segments["train"]
    assert f"train {start} to {end}" in repr(dataset)
    assert "step_len=" in repr(rolling())
    assert repr(ts.LSTM(d_feat=3, loss=custom_loss)).startswith("<ts.LSTM(d_feat=3, loss=test_conventions.custom_loss")


def custom_loss(pred, label):
    return (pred - label).abs().mean()


# ---------------------------------------------------------------- parameters
@parametrize_estimators()
def test_arguments_round_trip(kind: type) -> None:
    model = small_model(kind)
    assert model.get_params(deep=True) == model.get_params(deep=False) == model.get_params()
    assert kind(**model.get_params()).get_params() == model.get_params()


@parametrize_estimators()
def test_scikit_learns_clone_and_grid(kind: type) -> None:
    sklearn_base = pytest.importorskip("sklearn.base", reason="scikit-learn is not installed")
    model = small_model(kind, loss=custom_loss)
    copied = sklearn_base.clone(model)
    assert type(copied) is kind
    assert copied.get_params() == model.get_params()
    assert same_weights(weights(copied), weights(model)), "the seed determines the initial weights"
    selection = pytest.importorskip("sklearn.model_selection")
    for point in selection.ParameterGrid({"d_feat": [4, 5], "lr": [0.1]}):
        assert sklearn_base.clone(model).set_params(**point).get_params()["d_feat"] == point["d_feat"]


def test_set_params() -> None:
    model = LSTM(d_feat=3, hidden_size=4, seed=0)
    optimizer, network = model.train_optimizer, model.network
    assert model.set_params(lr=0.5, n_epochs=3) is model
    assert (model.lr, model.n_epochs, model.train_optimizer.param_groups[0]["lr"]) == (0.5, 3, 0.5)
    assert model.network is network
    assert model.train_optimizer is optimizer
    model.set_params(hidden_size=8, weight_decay=0.1)
    assert model.network.rnn.hidden_size == 8
    assert (model.get_params()["weight_decay"], model.lr) == (0.1, 0.5)
    expected = LSTM(d_feat=3, hidden_size=8, seed=0)
    assert same_weights(weights(model), weights(expected))
    assert small_model(ts.TransformerModel).set_params(weight_decay=0.25).get_params()["reg"] == 0.25


def test_set_params_changes_all_or_nothing() -> None:
    model = LSTM(d_feat=3, hidden_size=4, seed=0)
    before = model.get_params()
    for wrong, message in (
        ({"lr": 0.5, "hiden_size": 3}, r"no argument 'hiden_size'. Did you mean 'hidden_size'"),
        ({"lr": 0.5, "n_epochs": -1}, "n_epochs must be"),
        ({"lr": 0.5, "optimizer": "adm"}, "optimizer must be"),
        ({"lr": 0.5, "hidden_size": 0}, "hidden_size must be"),
        ({"lr": 0.5, "device": "nowhere"}, "device"),
    ):
        with pytest.raises(Exception, match=message):
            model.set_params(**wrong)
        assert model.get_params() == before
        assert model.train_optimizer.param_groups[0]["lr"] == before["lr"]
    model.fitted = True
    with pytest.raises(ConfigError, match=r"this LSTM is fitted, .* hidden_size needs a new network.*Remedy: LSTM\("):
        model.set_params(hidden_size=8)
    assert model.set_params(hidden_size=4, lr=0.25).lr == 0.25, "the same value needs no new network"


# ---------------------------------------------------------------- whole models in files
@parametrize_estimators()
def test_a_saved_model_predicts_and_trains_as_before(kind: type, tmp_path) -> None:
    dataset = dataset_for(kind)
    model = small_model(kind, n_epochs=2).fit(dataset)
    model.save(tmp_path / "model.qfast")
    loaded = qfast.load(tmp_path / "model.qfast", device="cpu")
    assert type(loaded) is kind
    ignored = {"device"}
    assert {k: v for k, v in loaded.get_params().items() if k not in ignored} == {
        k: v for k, v in model.get_params().items() if k not in ignored
    }
    assert loaded.predict(dataset, "test").equals(model.predict(dataset, "test"))
    assert loaded.history_.equals(model.history_)
    assert loaded.best_epoch_ == model.best_epoch_
    for one in (model, loaded):  # the optimizer's state was saved too
        np.random.seed(3)
        torch.manual_seed(3)
        one.fit(dataset)
    assert same_weights(weights(loaded), weights(model))


def test_a_model_that_was_not_fitted(tmp_path) -> None:
    model = LSTM(d_feat=np.int64(3), hidden_size=4)
    model.network.double()
    model.save(str(tmp_path / "folder" / "model"))
    loaded = qfast.load(tmp_path / "folder" / "model", device="cpu")
    assert not loaded.fitted
    assert loaded.get_params()["d_feat"] == 3
    assert loaded.network.fc_out.weight.dtype == torch.float64
    assert same_weights(weights(loaded), weights(model))


class OwnLSTM(LSTM):
    """A class of the user."""


def test_a_class_of_the_user_needs_permission(tmp_path) -> None:
    OwnLSTM(d_feat=3, hidden_size=4).save(tmp_path / "model")
    with pytest.raises(ConfigError, match=r"unknown model class 'OwnLSTM'.*allow_code"):
        qfast.load(tmp_path / "model")
    (tmp_path / "own_lstm.py").write_text("from qfast.models import LSTM\nclass OwnLSTM2(LSTM):\n    pass\n")
    named = json_of(tmp_path / "model") | {}
    named["model"] |= {"class": "OwnLSTM2", "module_path": "own_lstm"}
    write_json(tmp_path / "model", tmp_path / "other", named)
    assert type(qfast.load(tmp_path / "other", allow_code=tmp_path / "own_lstm.py")).__name__ == "OwnLSTM2"
    register_model(OwnLSTM)  # in this process, which no other test of the name uses
    assert type(qfast.load(tmp_path / "model")) is OwnLSTM


def test_functions_and_foreign_optimizers_are_reported(tmp_path, caplog) -> None:
    model = LSTM(d_feat=3, hidden_size=4, n_epochs=1, batch_size=64, loss=custom_loss)
    model.train_optimizer = torch.optim.RMSprop(model.network.parameters())
    model.fit(flat()).save(tmp_path / "model")
    with caplog.at_level(logging.WARNING, "qfast"):
        loaded = qfast.load(tmp_path / "model")
    assert loaded.get_params()["loss"] == "mse"
    assert "the function test_conventions.custom_loss as loss" in caplog.text
    assert "optimizer RMSprop, which is not restored" in caplog.text


def test_an_argument_that_a_file_cannot_contain(tmp_path) -> None:
    model = LSTM(d_feat=3, hidden_size=4)
    model._params["lr"] = object()
    with pytest.raises(ConfigError, match=r"LSTM: lr is <object .* of type object, which a model file"):
        model.save(tmp_path / "model")
    with pytest.raises(ConfigError, match="is a folder"):
        LSTM(d_feat=3, hidden_size=4).save(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    file = tmp_path_factory.mktemp("saved") / "model"
    GATs(**small_arguments(GATs)).save(file)
    return file


def test_damaged_files_raise_one_clear_error(saved, tmp_path) -> None:
    content = saved.read_bytes()
    random = np.random.default_rng(0)
    target = tmp_path / "file"
    expected = "is damaged|may be truncated|is not a model file"
    for cut in (0, 5, 9, 100, len(content) // 2, len(content) - 1):
        target.write_bytes(content[:cut])
        with pytest.raises(CheckpointError, match=expected):
            qfast.load(target)
    for position in [*range(8, 400, 7), *random.integers(0, len(content), 40), content.index(b"qfast.sha256") + 3]:
        changed = bytearray(content)
        changed[position] ^= 0x55
        target.write_bytes(changed)
        with pytest.raises(CheckpointError, match=expected):
            qfast.load(target)


DAMAGE = {
    "format": ({"format": 9}, "format 9"),
    "no class": ({"model": {"kwargs": {}}}, "class"),
    "wrong kwargs": ({"model": {"class": "GATs", "kwargs": {"hidden_size": "wide"}}}, "hidden_size"),
    "other sizes": ({"model": {"class": "GATs", "kwargs": {"hidden_size": 3}}}, "does not fit"),
    "records": ({"records": [3]}, "records"),
    "foreign class": ({"model": {"class": "os.system", "kwargs": {}}}, "unknown model class 'system'"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_edited_files(saved, tmp_path, name: str) -> None:
    change, message = DAMAGE[name]
    write_json(saved, tmp_path / "edited", json_of(saved) | change)
    with pytest.raises((CheckpointError, ConfigError), match=message):
        qfast.load(tmp_path / "edited")


def test_other_files(saved, tmp_path) -> None:
    with pytest.raises(ConfigError, match="weights="):
        qfast.load(saved, weights="x")
    model = LSTM(d_feat=3, hidden_size=4)
    model.save_weights(tmp_path / "weights.safetensors")
    with pytest.raises(CheckpointError, match=r"contains weights but not the model.*load_weights"):
        qfast.load(tmp_path / "weights.safetensors")
    model.save_weights(tmp_path / "weights.pkl")
    with pytest.raises(CheckpointError, match=r"is not a model file.*load_weights"):
        qfast.load(tmp_path / "weights.pkl")
    (tmp_path / "pickled").write_bytes(pickle.dumps(shutil.rmtree))
    with pytest.raises(CheckpointError, match="is not a model file"):
        qfast.load(tmp_path / "pickled")


def json_of(file) -> dict:
    from qfast.tensor_files import read_metadata

    return json.loads(read_metadata(file)["qfast.estimator"])


def write_json(source, target, facts: dict) -> None:
    """Write a copy of a model file with another description and a valid checksum."""
    from qfast.training.checkpoint import read_safetensors, write_tensors

    write_tensors(target, read_safetensors(source), {"qfast.estimator": json.dumps(facts)})
