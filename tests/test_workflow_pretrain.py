"""Pre-training in workflow files: the `pretrain:` block, `model_path`, and runs interrupted in either stage."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch

from qfast import cli
from qfast.errors import CheckpointError, ConfigError, QfastError
from qfast.training.callbacks import Callback
from qfast.workflow import run as run_module
from qfast.workflow.config import load_config
from qfast.workflow.dataset import build_dataset
from qfast.workflow.folder import read_frame
from qfast.workflow.predict import predict
from qfast.workflow.run import run
from qfast.workflow.validation import check_workflow
from support.workflows import FILES, Interrupt, write_case

GATS = [
    "task.model.class=GATs",
    "task.model.module_path=qlib.contrib.model.pytorch_gats",
    "task.model.kwargs.base_model=LSTM",
]
BLOCK = [*GATS, "task.pretrain={n_epochs: 3, lr: 5e-3, batch_size: 64}"]
ONE_EPOCH = "task.model.kwargs.n_epochs=1"
PATH = "task.model.kwargs.model_path"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """(workflow file, data file), not changed by any test."""
    return write_case(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def case(files, tmp_path_factory):
    """(run folder, result) of a run with a block."""
    path = tmp_path_factory.mktemp("case") / "run"
    return path, run(*files, BLOCK, output=path, seed=3)


@pytest.fixture(scope="module")
def base(files, tmp_path_factory):
    """Run folder of an LSTM of the same sizes."""
    path = tmp_path_factory.mktemp("base") / "lstm"
    run(*files, [ONE_EPOCH], output=path, seed=1)
    return path


def manifest(path):
    return json.loads((path / "manifest.json").read_text())


def weights(file):
    return safetensors.torch.load_file(file)


def history(path):
    return pd.read_csv(path / "history.csv", index_col="epoch").filter(regex="^(train|valid)(_loss|_all)?$")


def never(*args, **kwargs):
    pytest.fail("data was loaded before the file was refused")


def same_run(path, other):
    pd.testing.assert_frame_equal(read_frame(path, "pred"), read_frame(other, "pred"))
    for stage in (".", "pretrain"):
        pd.testing.assert_frame_equal(history(path / stage), history(other / stage))
        for name, value in weights(path / stage / "best.safetensors").items():
            assert torch.equal(value, weights(other / stage / "best.safetensors")[name])


# ---------------------------------------------------------------- the pretrain block
def test_both_stages_leave_their_files(case):
    path, _ = case
    assert {f.name for f in path.iterdir()} == {*FILES, "pretrain"}
    assert {f.name for f in (path / "pretrain").iterdir()} == {"history.csv", "best.safetensors", "last.safetensors"}
    assert {f.name for f in (path / "plots").iterdir()} >= {"loss.png", "pretrain_loss.png"}
    assert (len(history(path / "pretrain")), len(history(path))) == (3, 3)


def test_pretraining_and_loaded_weights_are_logged(case, capsys):
    path, _ = case
    result = manifest(path)
    assert result["pretrain"]["model"].endswith(".LSTM")
    assert result["pretrain"]["arguments"] == {"n_epochs": 3, "lr": 5e-3, "batch_size": 64}
    assert (result["pretrain"]["epochs"], result["pretrain"]["best_epoch"] in (0, 1, 2)) == (3, True)
    assert set(weights(path / "pretrain" / "best.safetensors")) <= set(result["pretrained"]["taken"])
    page = (path / "report.html").read_text()
    assert cli.main(["info", str(path)]) == 0
    shown = capsys.readouterr().out
    for text in ("LSTM, 3 epochs, best ", "fc_out"):
        assert text in page
        assert text in shown
    assert page.count("data:image/png;base64,") == 4


def test_the_model_starts_from_the_base(case, files, tmp_path):
    run(*files, [*BLOCK, "task.model.kwargs.n_epochs=0"], output=tmp_path / "r", seed=3)
    base_weights, trained = (
        weights(tmp_path / "r" / "pretrain" / "best.safetensors"),
        weights(tmp_path / "r/best.safetensors"),
    )
    assert all(torch.equal(trained[name], value) for name, value in base_weights.items())
    assert not torch.equal(weights(case[0] / "best.safetensors")["fc_out.weight"], base_weights["fc_out.weight"])


def test_the_run_equals_the_python_calls(case, files):
    from qfast.registry import MODELS

    workflow = check_workflow(load_config(case[0] / "config.yaml").values)
    model = MODELS.build(workflow.task.model.description())
    dataset = build_dataset(workflow, files[1])
    model.pretrain(dataset, n_epochs=3, lr=5e-3, batch_size=64)
    model.fit(dataset)
    expected = read_frame(case[0], "pred").query("segment == 'test'")["score"]
    np.testing.assert_array_equal(model.predict(dataset, "test").sort_index(), expected)


def test_an_empty_block_means_the_defaults_of_the_base(files, tmp_path):
    class Stop(Callback):
        def on_epoch_end(self, estimator) -> None:
            seen.append(estimator.get_params())
            estimator.stop_training = True

    seen = []
    run(*files, [*GATS, "task.pretrain={}"], output=tmp_path / "r", callbacks=[Stop()])
    assert [type(p.get("base_model")) for p in seen] == [type(None), str]
    assert (seen[0]["n_epochs"], seen[0]["lr"], seen[0]["early_stop"]) == (200, 1e-3, 20)
    assert (seen[0]["d_feat"], seen[0]["hidden_size"], seen[0]["num_layers"]) == (3, 4, 1)


def test_zero_epochs_of_pretraining_take_the_base_as_drawn(files, tmp_path):
    path = run(*files, [*GATS, ONE_EPOCH, "task.pretrain={n_epochs: 0}"], output=tmp_path / "r", seed=3).path
    assert manifest(path)["pretrain"]["epochs"] == 0
    assert (path / "report.html").exists()


def test_without_a_block_nothing_is_pretrained(files, tmp_path):
    for name, sets in (("none", []), ("false", ["task.pretrain=false"])):
        path = run(*files, [*GATS, ONE_EPOCH, *sets], output=tmp_path / name, seed=3).path
        assert not (path / "pretrain").exists()
        assert "pretrain" not in manifest(path)
    pd.testing.assert_frame_equal(read_frame(tmp_path / "none", "pred"), read_frame(tmp_path / "false", "pred"))


def test_rolling_windows(files, tmp_path):
    sets = [
        "task.model.class=GATs",
        "task.model.module_path=qlib.contrib.model.pytorch_gats_ts",
        "task.model.kwargs.d_feat=6",
        "task.dataset.class=TSDatasetH",
        "task.dataset.kwargs.step_len=5",
        ONE_EPOCH,
        "task.pretrain={n_epochs: 1, n_jobs: 4, early_stop: 2}",
    ]
    path = run(*files, sets, output=tmp_path / "ts", seed=1).path
    assert manifest(path)["pretrain"]["model"] == "qfast.models.ts.GRU"
    scores = predict(path, files[1], start="2020-02-21")
    pred = read_frame(path, "pred").query("segment != 'valid'")["score"]
    np.testing.assert_allclose(scores.reindex(pred.index), pred, rtol=1e-5, atol=1e-7)


# ---------------------------------------------------------------- failures
class InterruptStage(Interrupt):
    """Ctrl-C in the middle of an epoch of one of the two stages."""

    def __init__(self, stage: str, epoch: int) -> None:
        super().__init__(epoch)
        self.stage = stage

    def on_batch_end(self, estimator) -> None:
        if (self.stage == "pretrain") == (type(estimator).__name__ != "GATs"):
            super().on_batch_end(estimator)


@pytest.mark.parametrize("epoch", [0, 1, 2])
@pytest.mark.parametrize("stage", ["pretrain", "fit"])
def test_ctrl_c_in_either_stage_then_resume_equals_an_unbroken_run(case, files, tmp_path, capsys, stage, epoch):
    path = tmp_path / "broken"
    with pytest.raises(KeyboardInterrupt):
        run(*files, BLOCK, output=path, seed=3, callbacks=[InterruptStage(stage, epoch)])
    assert manifest(path)["status"] == "interrupted"
    done = path / ("pretrain" if stage == "pretrain" else ".") / "history.csv"
    assert (len(pd.read_csv(done)) if done.exists() else 0) == epoch
    assert (path / "last.safetensors").exists() == (stage == "fit" and epoch > 0)
    epochs = []

    class Count(Callback):
        def on_epoch_start(self, estimator) -> None:
            epochs.append((type(estimator).__name__, estimator.epoch_))

    assert cli.main(["info", str(path)]) == 0
    assert f"interrupted ({'pre-training' if stage == 'pretrain' else 'training'})\n" in capsys.readouterr().out
    run(resume=path, callbacks=[Count()])
    left = [("LSTM", e) for e in range(epoch, 3)] if stage == "pretrain" else []
    assert epochs == left + [("GATs", e) for e in range(epoch if stage == "fit" else 0, 3)]
    same_run(path, case[0])
    assert manifest(path)["pretrain"].keys() == manifest(case[0])["pretrain"].keys()
    assert manifest(path)["pretrained"] == {
        k: str(v).replace(str(case[0]), str(path)) if isinstance(v, str) else v
        for k, v in manifest(case[0])["pretrained"].items()
    }


def test_an_early_stop_in_pretraining_persists_after_resuming(files, tmp_path):
    sets = [*GATS, ONE_EPOCH, "task.pretrain={n_epochs: 9, lr: 0.0, early_stop: 2}"]
    run(*files, sets, output=tmp_path / "whole", seed=3)
    with pytest.raises(KeyboardInterrupt):
        run(*files, sets, output=tmp_path / "broken", seed=3, callbacks=[InterruptStage("fit", 0)])
    run(resume=tmp_path / "broken")
    assert len(history(tmp_path / "broken" / "pretrain")) == 3
    same_run(tmp_path / "broken", tmp_path / "whole")


@pytest.mark.parametrize("name", ["history.csv", "best.safetensors", "last.safetensors"])
def test_full_disk_in_pretraining_can_be_resumed(case, files, tmp_path, monkeypatch, name):
    path = tmp_path / "full"
    real = os.replace

    def replace(source, target):
        if Path(target).name == name and Path(target).parent.name == "pretrain":
            raise OSError(errno.ENOSPC, "No space left on device")
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(QfastError, match=r"no space left on the disk while writing to '.*full'; .* --resume"):
            run(*files, BLOCK, output=path, seed=3)
    assert manifest(path)["status"] == "failed"
    assert {f.name for f in (path / "pretrain").iterdir()} <= {"history.csv", "best.safetensors", "last.safetensors"}
    run(resume=path)
    same_run(path, case[0])


def test_a_truncated_checkpoint_of_the_first_stage_is_reported(files, tmp_path):
    path = tmp_path / "broken"
    with pytest.raises(KeyboardInterrupt):
        run(*files, BLOCK, output=path, seed=3, callbacks=[InterruptStage("pretrain", 1)])
    file = path / "pretrain" / "last.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"pretrain/last.safetensors is not a readable weight file"):
        run(resume=path)
    assert manifest(path)["status"] == "interrupted", "a refused resume must leave the run as it was"


def test_a_resumed_run_keeps_its_block_but_may_pretrain_longer(case, files, tmp_path):
    done = shutil.copytree(case[0], tmp_path / "done")
    with pytest.raises(ConfigError, match=r"the pre-training of the run in '.*done' has ended, so .* cannot become"):
        run(resume=done, sets=["task.pretrain.n_epochs=9"])
    path = tmp_path / "broken"
    with pytest.raises(KeyboardInterrupt):
        run(*files, BLOCK, output=path, seed=3, callbacks=[InterruptStage("pretrain", 1)])
    for change in ("task.pretrain.lr=0.5", "task.pretrain=false"):
        with pytest.raises(ConfigError, match=r"has begun, so .* cannot become .* Remedy: restore the block"):
            run(resume=path, sets=[change])
    assert manifest(path)["status"] == "interrupted"
    run(resume=path, sets=["task.pretrain.n_epochs=4"])
    assert len(history(path / "pretrain")) == 4


# ---------------------------------------------------------------- wrong blocks
@pytest.mark.parametrize(
    ("sets", "message"),
    [
        ([*GATS, "task.pretrain={n_epoch: 3}"], r"task.pretrain.n_epoch: LSTM has no .* Did you mean 'n_epochs'\?"),
        ([*GATS, "task.pretrain={n_epochs: many}"], r"task.pretrain.n_epochs: expected a valid integer.* got 'many'"),
        ([*GATS, "task.pretrain={hidden_size: 8}"], r"task.pretrain.hidden_size: .* the value of the model"),
        ([*GATS, "task.pretrain=null"], r"task.pretrain: expected a mapping .* write \{\} for its defaults"),
        ([*GATS, "task.pretrain=[3]"], r"task.pretrain: expected a mapping .* got \[3\]"),
        (["task.pretrain={}"], r"task.pretrain: LSTM has no base model to pre-train, only \['GATs'\] have. Remedy"),
        (
            [*BLOCK, f"{PATH}=weights.pkl"],
            r"pretrain: cannot be combined with task.model.kwargs.model_path 'weights.pkl'.* Remedy: --set .*path=null",
        ),
    ],
)
def test_wrong_blocks_are_refused_by_name_before_data_is_loaded(files, tmp_path, monkeypatch, sets, message):
    monkeypatch.setattr(run_module, "build_dataset", never)
    with pytest.raises(ConfigError, match=message):
        run(*files, sets, output=tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_a_block_is_typed_as_its_estimator_declares(files):
    sets = [*GATS, "task.pretrain.lr='1e-4'", "task.pretrain.n_epochs='7'"]
    assert check_workflow(load_config(files[0], sets).values).task.pretrain == {"lr": 1e-4, "n_epochs": 7}


# ---------------------------------------------------------------- model_path
def test_a_weight_file_is_found_by_the_path_in_qlibs_files(files, base, tmp_path, monkeypatch):
    """Qlib's examples/benchmarks/GATs/x.yaml says benchmarks/LSTM/x.pkl, relative to examples."""
    gats, lstm = tmp_path / "examples" / "benchmarks" / "GATs", tmp_path / "examples" / "benchmarks" / "LSTM"
    gats.mkdir(parents=True)
    lstm.mkdir()
    torch.save(weights(base / "best.safetensors"), lstm / "x.pkl")
    config = Path(shutil.copy(files[0], gats))
    sets = [*GATS, ONE_EPOCH, f"{PATH}=benchmarks/LSTM/x.pkl"]
    monkeypatch.chdir(tmp_path)
    above = run(config, files[1], sets, output=tmp_path / "above", seed=3)
    monkeypatch.chdir(tmp_path / "examples")
    here = run(files[0], files[1], sets, output=tmp_path / "here", seed=3)
    for result in (above, here):
        computed = load_config(result.path / "config.yaml").values["task"]["model"]["kwargs"]["model_path"]
        assert computed == str(lstm / "x.pkl")
        assert str(lstm / "x.pkl") in json.dumps(manifest(result.path)["pretrained"])
    pd.testing.assert_frame_equal(read_frame(above.path, "pred"), read_frame(here.path, "pred"))


def test_a_run_folder_loads_its_best_weights(files, base, tmp_path, capsys):
    result = run(*files, [*GATS, f"{PATH}={base}", "task.model.kwargs.n_epochs=0"], output=tmp_path / "r", seed=3)
    trained = weights(result.path / "best.safetensors")
    for name, value in weights(base / "best.safetensors").items():
        assert torch.equal(trained[name], value)
    assert cli.main(["info", str(result.path)]) == 0
    assert str(base) in capsys.readouterr().out
    assert str(base) in (result.path / "report.html").read_text()


def test_a_missing_path_lists_the_searched_places(files, tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "build_dataset", never)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        run(*files, [*GATS, f"{PATH}=benchmarks/LSTM/none.pkl"], output=tmp_path / "r")
    text = str(caught.value)
    places = [tmp_path, *files[0].parents]
    for place in places:
        assert f"'{place / 'benchmarks' / 'LSTM' / 'none.pkl'}'" in text
    for remedy in (f"--set {PATH}=PATH", f"--set {PATH}=null", "`pretrain:` block"):
        assert remedy in text
    with pytest.raises(ConfigError, match=r"searched \['/no/such/file.pkl'\]"):
        run(*files, [*GATS, f"{PATH}=/no/such/file.pkl"], output=tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_an_unsuitable_file_is_refused_before_data_is_loaded(files, tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "build_dataset", never)
    torch.save({"other.weight": torch.zeros(2)}, tmp_path / "x.pkl")
    with pytest.raises(CheckpointError, match=r"x.pkl"):
        run(*files, [*GATS, f"{PATH}={tmp_path / 'x.pkl'}"], output=tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_the_model_rejects_an_invalid_path(files, tmp_path):
    for value in ("5", "[a]", "{a: 1}"):
        with pytest.raises(ConfigError, match=r"model_path must be a path or None, got"):
            run(*files, [*GATS, f"{PATH}={value}"], output=tmp_path / "r")
    with pytest.raises(ConfigError, match=r"task.model.kwargs.base_model: expected a valid string, got \['LSTM'\]"):
        run(*files, [*BLOCK, "task.model.kwargs.base_model=[LSTM]"], output=tmp_path / "r")


@pytest.mark.parametrize("epoch", [0, 1])
def test_a_resumed_run_finds_its_weight_file_from_anywhere(files, base, tmp_path, monkeypatch, caplog, epoch):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    shutil.copy(base / "best.safetensors", tmp_path / "a" / "w.safetensors")
    sets = [*GATS, f"{PATH}=w.safetensors"]
    monkeypatch.chdir(tmp_path / "a")
    whole = run(*files, sets, output=tmp_path / "whole", seed=3).path
    path = tmp_path / "broken"
    with pytest.raises(KeyboardInterrupt):
        run(*files, sets, output=path, seed=3, callbacks=[Interrupt(epoch)])
    monkeypatch.chdir(tmp_path / "b")
    again = shutil.copytree(path, tmp_path / "again")
    run(resume=path)
    pd.testing.assert_frame_equal(read_frame(path, "pred"), read_frame(whole, "pred"))
    (tmp_path / "a" / "w.safetensors").unlink()
    if epoch == 0:  # nothing is trained yet, so the file is still needed
        with pytest.raises(ConfigError, match=r"a/w.safetensors' was not found; searched \["):
            run(resume=again)
        assert manifest(again)["status"] == "interrupted"
        return
    with caplog.at_level(logging.INFO, "qfast"):
        run(resume=again)
    assert "w.safetensors no longer exists; the checkpoint of the run contains the weights transferred" in caplog.text
    pd.testing.assert_frame_equal(read_frame(again, "pred"), read_frame(whole, "pred"))
    assert manifest(again)["pretrained"] == manifest(whole)["pretrained"]


def test_scoring_needs_no_weight_file(files, base, tmp_path):
    file = Path(shutil.copy(base / "best.safetensors", tmp_path / "w.safetensors"))
    path = run(*files, [*GATS, ONE_EPOCH, f"{PATH}={file}"], output=tmp_path / "r", seed=3).path
    file.unlink()
    pred = read_frame(path, "pred")["score"]
    np.testing.assert_allclose(predict(path, files[1]).reindex(pred.index), pred, rtol=1e-6)


def test_the_workflow_file_of_a_resumed_run_is_compared_by_resolved_path(files, base, tmp_path, monkeypatch):
    shutil.copy(base / "best.safetensors", tmp_path / "w.safetensors")
    monkeypatch.chdir(tmp_path)
    sets = [*GATS, ONE_EPOCH]
    config, data = tmp_path / "w.yaml", files[1]
    config.write_text(files[0].read_text().replace("kwargs: {d_feat", "kwargs: {model_path: w.safetensors, d_feat"))
    path = run(config, data, sets, output=tmp_path / "r").path
    assert run(config, data, sets, resume=path).report.exists()
    shutil.copy(base / "best.safetensors", tmp_path / "other.safetensors")
    config.write_text(config.read_text().replace("w.safetensors", "other.safetensors"))
    with pytest.raises(
        ConfigError, match=r"differs from the workflow of the run .* at \['task.model.kwargs.model_path'"
    ):
        run(config, data, sets, resume=path)
