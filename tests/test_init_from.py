"""Training that starts from the weights of another run: fit(init_from=...), task.init_from, --init-from."""

from __future__ import annotations

import hashlib
import json
import shutil

import pytest
import torch

from qfast import check, cli, study
from qfast.errors import CheckpointError, ConfigError, DataError
from qfast.integrations.qlib import run as run_in_qlib
from qfast.models import GRU, LSTM, GATs, TransformerModel, ts
from qfast.training.origin import read_origin
from qfast.workflow.folder import RunFolder
from qfast.workflow.info import run_info
from qfast.workflow.run import run
from qfast.workflow.saved_run import load
from support.fits import (
    StopAt,
    dataset_for,
    frame_for,
    parametrize_estimators,
    same_weights,
    small_model,
    weights,
)
from support.workflows import factors, write_case

EPOCHS = "task.model.kwargs.n_epochs="


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_case(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def first(files, tmp_path_factory):
    """A run of one epoch to start from."""
    return run(*files, [EPOCHS + "1"], output=tmp_path_factory.mktemp("first") / "run", seed=3).path


def sha256(file):
    return hashlib.sha256(file.read_bytes()).hexdigest()


# ---------------------------------------------------------------- in Python
@parametrize_estimators([GRU, GATs, ts.GATs, ts.TCN, ts.TransformerModel])
def test_every_model_starts_from_the_weights_of_a_file(kind, tmp_path):
    dataset = dataset_for(kind, frame=frame_for(kind))
    source = small_model(kind, n_epochs=1).fit(dataset)
    source.save_weights(tmp_path / "w.safetensors")
    started = small_model(kind, n_epochs=0, seed=9)
    assert not same_weights(weights(started), weights(source))
    started.fit(dataset, init_from=tmp_path / "w.safetensors")
    assert same_weights(weights(started), weights(source))
    assert started.origin_ == {
        "source": str(tmp_path / "w.safetensors"),
        "sha256": sha256(tmp_path / "w.safetensors"),
        "model": "",
    }
    assert started.fit(dataset) is started
    assert same_weights(weights(started), weights(source))  # GATs does not draw its base again


def test_training_continues_as_from_loaded_weights(tmp_path):
    dataset = dataset_for(ts.GRU, frame=frame_for(ts.GRU))
    small_model(ts.GRU, n_epochs=1).fit(dataset, save_path=tmp_path / "w.safetensors")
    by_hand = small_model(ts.GRU, n_epochs=2).load_weights(tmp_path / "w.safetensors").fit(dataset)
    started = small_model(ts.GRU, n_epochs=2).fit(dataset, init_from=tmp_path / "w.safetensors")
    assert same_weights(weights(started), weights(by_hand))


def test_a_resumed_fit_has_the_origin_of_its_checkpoint(tmp_path):
    dataset = dataset_for(LSTM, frame=frame_for(LSTM))
    small_model(LSTM, n_epochs=1).fit(dataset, save_path=tmp_path / "w.safetensors")
    origin = tmp_path / "w.safetensors"
    whole = small_model(LSTM, n_epochs=3).fit(dataset, init_from=origin)
    small_model(LSTM, n_epochs=2).fit(dataset, init_from=origin, checkpoint_dir=tmp_path)
    origin.unlink()
    resumed = small_model(LSTM, n_epochs=3).fit(dataset, checkpoint_dir=tmp_path, resume=True)
    assert same_weights(weights(resumed), weights(whole))
    assert resumed.origin_ == whole.origin_


def test_init_from_and_resume_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"init_from='w.pkl' cannot be combined with resume=True.*only one"):
        small_model(LSTM).fit(None, init_from="w.pkl", resume=True, checkpoint_dir=tmp_path)


def test_wrong_weights_are_refused_before_the_data_is_loaded(tmp_path):
    file = tmp_path / "w.pkl"
    small_model(GRU).save_weights(file)
    before = weights(model := small_model(LSTM))
    with pytest.raises(CheckpointError, match=r"does not fit LSTMModel.*other shapes.*rnn.weight_ih_l0"):
        model.fit(None, init_from=file)
    with pytest.raises(CheckpointError, match=r"nothing.pkl does not exist"):
        model.fit(None, init_from=tmp_path / "nothing.pkl")
    with pytest.raises(CheckpointError, match=r"init_from .* is a folder without best.safetensors: it is not a run"):
        model.fit(None, init_from=tmp_path)
    state = model.network.state_dict()
    state["fc_out.bias"] = torch.tensor([float("nan")])
    torch.save(state, file)
    with pytest.raises(CheckpointError, match=r"contains NaN or infinity in fc_out.bias"):
        model.fit(None, init_from=file)
    assert same_weights(weights(model), before)


# ---------------------------------------------------------------- runs
def test_a_run_starts_from_another_one_and_records_it(files, first, tmp_path):
    result = run(*files, [EPOCHS + "0"], output=tmp_path / "run", seed=5, init_from=first)
    assert same_weights(weights(result.model), weights(load(first).model))
    origin = {"source": str(first / "best.safetensors"), "sha256": sha256(first / "best.safetensors"), "model": "LSTM"}
    assert RunFolder.open(result.path).manifest["init_from"] == origin
    assert str(first) in (result.path / "config.yaml").read_text()
    assert origin["source"] in run_info(result.path)["pretraining"]["Start"]
    assert origin["source"] in (result.path / "report.html").read_text()


def test_the_key_and_the_option_do_the_same(files, first, tmp_path):
    config, data = files
    by_key = run(config, data, [EPOCHS + "1", f"task.init_from={first}"], output=tmp_path / "key", seed=5)
    arguments = ["run", str(config), "--data", str(data), "--set", EPOCHS + "1", "--seed", "5", "-q"]
    assert cli.main([*arguments, "--output", str(tmp_path / "option"), "--init-from", str(first)]) == 0
    names = ("best.safetensors", "config.yaml")
    assert [sha256(by_key.path / n) for n in names] == [sha256(tmp_path / "option" / n) for n in names]


def test_a_relative_key_is_found_next_to_the_workflow_file(files, first, tmp_path):
    config, data = files
    shutil.copytree(first, tmp_path / "first")
    shutil.copy(config, tmp_path / "small.yaml")
    result = run(tmp_path / "small.yaml", data, [EPOCHS + "0", "task.init_from=first"], output=tmp_path / "run")
    assert RunFolder.open(result.path).manifest["init_from"]["source"] == str(tmp_path / "first" / "best.safetensors")
    with pytest.raises(ConfigError, match=r"task.init_from: 'absent' was not found; searched \["):
        run(tmp_path / "small.yaml", data, ["task.init_from=absent"], output=tmp_path / "other")


@pytest.mark.parametrize("epoch", [None, 1], ids=["before", "after"])
def test_an_interrupted_run_resumes_from_its_origin(files, first, tmp_path, epoch):
    whole = run(*files, output=tmp_path / "whole", seed=5, init_from=first)
    with pytest.raises(KeyboardInterrupt):
        run(
            *files,
            output=tmp_path / "part",
            seed=5,
            init_from=first,
            callbacks=[StopAt(0, "batch") if epoch is None else StopAt(epoch, "checkpoint")],
        )
    assert (tmp_path / "part" / "last.safetensors").exists() == (epoch is not None)
    resumed = run(resume=tmp_path / "part")
    assert same_weights(weights(resumed.model), weights(whole.model))
    assert resumed.model.origin_ == whole.model.origin_


def test_a_changed_origin_is_refused_when_resuming(files, first, tmp_path):
    shutil.copytree(first, tmp_path / "first")
    with pytest.raises(KeyboardInterrupt):
        run(*files, output=tmp_path / "part", init_from=tmp_path / "first", callbacks=[StopAt(0, "batch")])
    small = LSTM(d_feat=3, hidden_size=4, num_layers=1, seed=99)
    small.save_weights(tmp_path / "first" / "best.safetensors")
    with pytest.raises(CheckpointError, match=r"task.init_from: .* has changed since the run"):
        run(resume=tmp_path / "part")


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["task.model.kwargs.hidden_size=5"], r"is a run of LSTM with hidden_size=4 \(now 5\).*Remedy: build LSTM"),
        (["task.model.class=GRU", "task.model.module_path=qfast.models"], "does not fit GRUModel"),
    ],
    ids=["size", "class"],
)
def test_another_model_is_refused_before_a_folder_exists(files, first, tmp_path, sets, message):
    with pytest.raises(CheckpointError, match=message):
        run(*files, sets, output=tmp_path / "run", init_from=first)
    assert not (tmp_path / "run").exists()


def test_an_argument_without_a_shape_is_compared(tmp_path):
    (tmp_path / "manifest.json").write_text("{}")
    model = TransformerModel(d_feat=3, d_model=8, nhead=2, num_layers=1)
    model.save_weights(tmp_path / "best.safetensors")
    facts = {"model": {"class": "TransformerModel", "kwargs": {**model.get_params(), "nhead": 4, "dropout": 0.5}}}
    (tmp_path / "model.json").write_text(json.dumps(facts))
    with pytest.raises(CheckpointError, match=r"with nhead=4 \(now 2\)"):
        read_origin(tmp_path, model)


def test_feature_columns_in_another_order_are_refused(files, first):
    origin = read_origin(first, LSTM(d_feat=3, hidden_size=4, num_layers=1))
    origin.require_order(origin.columns)
    with pytest.raises(DataError, match="in another order"):
        origin.require_order(origin.columns[::-1])


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["task.init_from=3"], "task.init_from: "),
        (["task.pretrain={}"], "task.init_from: .* cannot be combined with task.pretrain"),
        (["task.model.kwargs.model_path=w.pkl"], "task.init_from: .* cannot be combined with task.model.kwargs.model_"),
    ],
    ids=["type", "pretrain", "model_path"],
)
def test_wrong_keys_are_refused_by_name(files, tmp_path, sets, message):
    gats = ["task.model.class=GATs", "task.model.module_path=qfast.models"]
    with pytest.raises(ConfigError, match=message):
        run(*files, [*gats, "task.init_from=w.pkl", *sets], output=tmp_path / "run")


def test_the_option_is_refused_with_resume_and_with_another_engine(files, first, tmp_path, monkeypatch, capsys):
    assert cli.main(["run", "--resume", str(first), "--init-from", str(first)]) == 2
    assert "cannot be combined with --resume" in capsys.readouterr().err
    assert cli.main(["run", str(files[0]), "--engine", "qlib", "--init-from", str(first)]) == 2
    assert "--engine qlib does not support --init-from" in capsys.readouterr().err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    sets = [f"task.init_from={first}", "qlib_init={provider_uri: prices}"]
    with pytest.raises(ConfigError, match=r"--engine qlib does not support task.init_from"):
        run_in_qlib(files[0], sets)


def test_compat_qlib_does_not_draw_the_base_of_gats_again(tmp_path):
    dataset = dataset_for(GATs, frame=frame_for(GATs))
    source = small_model(GATs, n_epochs=1, compat="qlib").fit(dataset, save_path=tmp_path / "w.pkl")
    started = small_model(GATs, n_epochs=0, compat="qlib").fit(dataset, init_from=tmp_path / "w.pkl")
    assert same_weights(weights(started), weights(source))


# ---------------------------------------------------------------- check and study
def findings(files, first, *sets, data=None):
    """The findings of `qfast check` about the weights, as (level, text)."""
    frame = factors() if data is None else data
    report = check(files[0], frame, [f"task.init_from={first}", *sets], experiments=False)
    return [(finding.level, finding.text) for finding in report.findings if finding.topic == "weights"]


def test_check_compares_the_weights_with_the_model_and_the_columns(files, first):
    [(level, text)] = findings(files, first)
    assert level == "ok"
    assert text.endswith("best.safetensors fits the model and the feature columns")
    assert findings(files, first / "best.safetensors")[0][1].endswith("fits the model; its columns are unknown")
    [(level, text)] = findings(files, first, "task.model.kwargs.hidden_size=8")
    assert level == "error"
    assert "is a run of LSTM with hidden_size=4 (now 8)" in text
    [(level, text)] = findings(files, first, data=factors()[["f1", "f0", "f2", "f3", "f4", "f5", "label"]])
    assert level == "error"
    assert "in another order" in text
    [(level, text)] = findings(files, first, data=factors().rename(columns={"f1": "momentum"}))
    assert level == "warning"
    assert "was trained on other feature columns: ['momentum'] instead of ['f1']" in text


def test_a_study_refuses_weights_that_do_not_fit(files, first, tmp_path):
    grid = {"task.model.kwargs.hidden_size": [4, 8]}
    with pytest.raises(ConfigError, match=r"hidden_size: init_from .* is a run of LSTM with hidden_size=4 \(now 8\)"):
        study(*files, [f"task.init_from={first}"], grid=grid, output=tmp_path / "s", on="inline")
    assert not (tmp_path / "s").exists()


def test_a_study_finds_a_relative_key_next_to_the_workflow_file(files, first, tmp_path, undrawn_plots):
    shutil.copytree(first, tmp_path / "first")
    shutil.copy(files[0], tmp_path / "small.yaml")
    sets = [EPOCHS + "0", "task.init_from=first"]
    result = study(tmp_path / "small.yaml", files[1], sets, output=tmp_path / "s", on="inline", quiet=True)
    assert result.failed == 0
    assert (
        sha256(first / "best.safetensors") == RunFolder.open(result.path / "runs/000").manifest["init_from"]["sha256"]
    )
