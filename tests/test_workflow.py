"""Whole runs: the folder, the scores, resuming, new data, and failures."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil

import numpy as np
import pandas as pd
import pytest
import safetensors.numpy

from qfast.backtest import Exchange, Market, TopkDropout, backtest
from qfast.data.sources import read_prices
from qfast.errors import CheckpointError, ConfigError, DataError, QfastError
from qfast.files import atomic_write, is_disk_full
from qfast.metrics import daily_ic, ic_summary
from qfast.training.callbacks import Callback
from qfast.workflow import folder as folders
from qfast.workflow.demo import DEMO, demo_prices
from qfast.workflow.folder import RunFolder, read_frame, write_frame
from qfast.workflow.predict import predict
from qfast.workflow.run import run
from support.workflows import FILES, Interrupt, factors, write_case


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """(workflow file, data file, finished run, its result), made once and not changed."""
    base = tmp_path_factory.mktemp("case")
    config, data = write_case(base)
    result = run(config, data, output=base / "run", seed=3)
    return config, data, base / "run", result


@pytest.fixture
def copied(case, tmp_path):
    """A copy of the finished run that a test may damage."""
    return shutil.copytree(case[2], tmp_path / "copy")


def manifest(path):
    return json.loads((path / "manifest.json").read_text())


# ---------------------------------------------------------------- files of a run
def test_the_folder_has_every_file_and_no_other(case):
    assert {f.name for f in case[2].iterdir()} == FILES
    assert {f.name for f in (case[2] / "plots").iterdir()} == {"loss.png", "cumulative_ic.png", "score_groups.png"}
    modes = {f.stat().st_mode & 0o777 for f in case[2].iterdir() if f.is_file()}
    assert len(modes) <= 2, "files of one run should be readable by the same people"


def test_the_manifest_describes_the_run(case):
    _, data, path, _ = case
    result = manifest(path)
    assert result["status"] == "finished"
    assert result["error"] is None
    assert result["started"] <= result["ended"]
    assert (result["seed"], result["seed_drawn"], result["device"]) == (3, False, "cpu")
    assert result["data"]["source"] == str(data.resolve())
    assert (result["data"]["instruments"], result["data"]["first"], result["data"]["last"]) == (
        12,
        "2020-01-01",
        "2020-03-10",
    )
    assert set(result["versions"]) >= {"qfast", "torch", "numpy", "pandas", "python"}
    assert "PortAnaRecord" in result["notes"][0]
    assert result["tiers"]["cpu"]["tier"] in ("cpu", "torch")


def test_metrics_are_those_of_the_written_scores(case):
    _, _, path, result = case
    pred, label = read_frame(path, "pred"), read_frame(path, "label")["label"]
    written = json.loads((path / "metrics.json").read_text())
    assert set(written) == {"train", "valid", "test"}
    for name in ("valid", "test"):
        score = pred.loc[pred["segment"] == name, "score"]
        expected = ic_summary(*daily_ic(score, label.reindex(score.index)))
        for metric, value in expected.items():
            assert written[name][metric] == pytest.approx(value, rel=1e-12)
            assert result.metrics[name][metric] == written[name][metric]
        assert "Long-Short Ann Return" in written[name]
    assert written["test"]["IC"] > 0.1, "the planted signal was not learnt at all"


def test_scores_reach_the_newest_date_without_a_label(case):
    pred = read_frame(case[2], "pred")
    raw = factors()["label"]
    dates = pred.index.get_level_values("datetime")
    newest = pred[pred["segment"] == "newest"]
    assert dates.max() == raw.index.get_level_values(0).max()
    assert raw.reindex(newest.index).isna().all()
    assert len(newest) == 24
    assert pred["score"].notna().all()
    assert pred.index.is_unique
    assert (
        pred.index.is_monotonic_increasing is True
        or pred.groupby("segment").apply(lambda p: p.index.is_monotonic_increasing).all()
    )


def test_label_is_the_raw_one(case):
    label = read_frame(case[2], "label")["label"]
    expected = factors()["label"].reindex(label.index).astype(np.float32)
    np.testing.assert_allclose(label, expected, rtol=1e-6)


def test_report_and_history(case):
    _, _, path, _ = case
    page = (path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert "PortAnaRecord: the portfolio backtest was skipped: the backtest needs prices" in page
    assert "small: LSTM" in page
    history = pd.read_csv(path / "history.csv", index_col="epoch")
    assert len(history) == 3
    assert {"train", "valid", "train_loss"} <= set(history)


def test_a_backtest_without_prices_is_skipped_and_logged(case, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "qfast"):
        run(case[0], case[1], ["task.model.kwargs.n_epochs=1"], output=tmp_path / "r")
    assert "was skipped: the backtest needs prices, but DataHandlerLP has none" in caplog.text
    assert not (tmp_path / "r" / "portfolio_analysis").exists()


def test_resolved_config_runs_again_to_the_same_scores(case, tmp_path):
    again = run(case[2] / "config.yaml", case[1], output=tmp_path / "again")
    assert manifest(again.path)["seed"] == 3
    pd.testing.assert_frame_equal(read_frame(again.path, "pred"), read_frame(case[2], "pred"))


def test_a_drawn_seed_is_written_down(case, tmp_path):
    first = run(case[0], case[1], ["task.model.kwargs.n_epochs=1"], output=tmp_path / "a")
    result = manifest(first.path)
    assert result["seed_drawn"] is True
    again = run(case[0], case[1], ["task.model.kwargs.n_epochs=1"], output=tmp_path / "b", seed=result["seed"])
    pd.testing.assert_frame_equal(read_frame(first.path, "pred"), read_frame(again.path, "pred"))


def test_time_series_dataset(case, tmp_path):
    sets = [
        "task.model.module_path=qlib.contrib.model.pytorch_gru_ts",
        "task.model.class=GRU",
        "task.model.kwargs.d_feat=6",
        "task.model.kwargs.n_jobs=20",
        "task.dataset.class=TSDatasetH",
        "task.dataset.kwargs.step_len=5",
    ]
    result = run(case[0], case[1], sets, output=tmp_path / "ts", seed=1)
    scores = predict(result.path, case[1], start="2020-02-21")
    pred = read_frame(result.path, "pred")
    pred = pred[pred["segment"] != "valid"]["score"]
    np.testing.assert_allclose(scores.reindex(pred.index), pred, rtol=1e-5, atol=1e-7)


def test_a_segment_outside_the_data_has_no_metrics(case, tmp_path, caplog):
    sets = ["task.model.kwargs.n_epochs=1", "task.dataset.kwargs.segments.test=[2030-01-01, 2030-12-31]"]
    with caplog.at_level(logging.WARNING, "qfast"):
        result = run(case[0], case[1], sets, output=tmp_path / "r")
    assert "segment 'test' (2030-01-01 to 2030-12-31) contains no rows" in caplog.text
    assert np.isnan(result.metrics["test"]["IC"])
    assert json.loads((tmp_path / "r" / "metrics.json").read_text())["test"]["IC"] is None
    assert set(read_frame(tmp_path / "r", "pred")["segment"]) == {"valid", "newest"}


def test_a_train_segment_alone_is_enough(case, tmp_path):
    sets = ["task.model.kwargs.n_epochs=1", "task.dataset.kwargs.segments={train: [2020-01-01, null]}"]
    result = run(case[0], case[1], sets, output=tmp_path / "r")
    assert set(result.metrics) == {"train"}
    assert len(read_frame(tmp_path / "r", "pred")) == len(factors())


def test_empty_training_data_is_refused(case, tmp_path):
    sets = ["task.dataset.kwargs.segments.valid=[2030-01-01, 2030-12-31]"]
    with pytest.raises(DataError, match=r"segment 'valid' has no samples"):
        run(case[0], case[1], sets, output=tmp_path / "r")
    assert manifest(tmp_path / "r")["status"] == "failed"


def test_dropped_raw_data_is_noticed_before_training(case, tmp_path):
    with pytest.raises(DataError, match=r"Remedy: build the handler with drop_raw=False"):
        run(case[0], case[1], ["task.dataset.kwargs.handler.kwargs.drop_raw=true"], output=tmp_path / "r")
    assert not (tmp_path / "r" / "history.csv").exists()


def test_a_frame_in_memory_is_accepted_and_not_changed(case, tmp_path):
    frame = factors()
    before = frame.copy()
    run(case[0], frame, ["task.model.kwargs.n_epochs=1"], output=tmp_path / "r")
    pd.testing.assert_frame_equal(frame, before)


# ---------------------------------------------------------------- folders
def test_an_existing_run_is_never_overwritten(case, tmp_path):
    with pytest.raises(
        ConfigError, match=r"--output '.*run' exists and is not empty; a run is never overwritten.*--resume"
    ):
        run(case[0], case[1], output=case[2])
    (tmp_path / "empty").mkdir()
    run(case[0], case[1], ["task.model.kwargs.n_epochs=1"], output=tmp_path / "empty")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match=r"exists and is not empty"):
        run(case[0], case[1], output=tmp_path / "file")
    with pytest.raises(ConfigError, match=r"cannot be created"):
        run(case[0], case[1], output=tmp_path / "file" / "below")


def test_default_folders_of_one_second_do_not_meet(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = [RunFolder.create(None, "my / experiment").path for _ in range(3)]
    assert len(set(made)) == 3
    assert all(path.parent.name == "runs" and path.name.startswith("my_experiment-") for path in made)


def test_a_wrong_file_leaves_no_folder(case, tmp_path):
    with pytest.raises(ConfigError, match=r"n_epoch"):
        run(case[0], case[1], ["task.model.kwargs.n_epoch=1"], output=tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_writing_is_whole_or_not_at_all(tmp_path):
    target = tmp_path / "a.txt"
    target.write_text("old")

    def half(file):
        file.write_text("ne")
        raise ValueError("in the middle")

    with pytest.raises(ValueError, match=r"in the middle"):
        atomic_write(target, half)
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_tables_without_pyarrow_become_csv(tmp_path, monkeypatch):
    frame = factors().iloc[:5, :2].astype(np.float32)
    monkeypatch.setattr(folders, "_has_pyarrow", lambda: False)
    assert write_frame(tmp_path / "t.parquet", frame).name == "t.csv"
    back = read_frame(tmp_path, "t")
    pd.testing.assert_frame_equal(back.astype(np.float32), frame, check_index_type=False)
    with pytest.raises(ConfigError, match=r"must be .parquet or .csv, got 't.xlsx'"):
        write_frame(tmp_path / "t.xlsx", frame)


# ---------------------------------------------------------------- failures
def test_ctrl_c_then_resume_equals_an_unbroken_run(case, tmp_path, caplog):
    path = tmp_path / "broken"
    with pytest.raises(KeyboardInterrupt), caplog.at_level(logging.WARNING, "qfast"):
        run(case[0], case[1], output=path, seed=3, callbacks=[Interrupt(2)])
    assert manifest(path)["status"] == "interrupted"
    assert f"qfast run --resume {path}" in caplog.text
    assert len(pd.read_csv(path / "history.csv")) == 2
    result = run(resume=path)
    assert manifest(path)["status"] == "finished"
    pd.testing.assert_frame_equal(read_frame(path, "pred"), read_frame(case[2], "pred"))
    pd.testing.assert_frame_equal(
        result.model.history_.filter(regex="^(train|valid)(_loss)?$"),
        case[3].model.history_.filter(regex="^(train|valid)(_loss)?$"),
    )
    assert {f.name for f in path.iterdir()} == FILES


def test_ctrl_c_in_the_first_epoch_can_be_resumed_too(case, tmp_path):
    path = tmp_path / "broken"
    with pytest.raises(KeyboardInterrupt):
        run(case[0], case[1], output=path, seed=3, callbacks=[Interrupt(0)])
    run(resume=path)
    pd.testing.assert_frame_equal(read_frame(path, "pred"), read_frame(case[2], "pred"))


def test_an_interrupted_run_scores_with_its_best_weights_so_far(case, tmp_path, caplog):
    path = tmp_path / "broken"
    with pytest.raises(KeyboardInterrupt):
        run(case[0], case[1], output=path, callbacks=[Interrupt(1)])
    with caplog.at_level(logging.WARNING, "qfast"):
        assert len(predict(path, case[1])) == 840
    assert "is interrupted; scoring with its best weights so far" in caplog.text


@pytest.mark.parametrize("name", ["history.csv", "pred.parquet", "report.html", "best.safetensors"])
def test_full_disk_leaves_a_folder_that_says_so_and_can_be_resumed(case, tmp_path, monkeypatch, name):
    path = tmp_path / "full"
    real = os.replace

    def replace(source, target):
        if os.path.basename(target) == name:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(QfastError, match=r"no space left on the disk while writing to '.*full'; .* qfast run --resume"):
        run(case[0], case[1], output=path, seed=3)
    result = manifest(path)
    assert result["status"] == "failed"
    assert "space" in result["error"]
    assert not (path / name).exists()
    assert {f.name for f in path.iterdir()} <= FILES, "temporary files stayed"
    monkeypatch.setattr(os, "replace", real)
    run(resume=path)
    pd.testing.assert_frame_equal(read_frame(path, "pred"), read_frame(case[2], "pred"))


def test_disk_full_is_seen_through_causes():
    full = OSError(errno.ENOSPC, "No space left on device")
    wrapped = ValueError("outer")
    wrapped.__cause__ = full
    assert is_disk_full(wrapped)
    assert not is_disk_full(OSError(errno.EACCES, "denied"))
    assert not is_disk_full(None)


def test_any_other_failure_is_recorded(case, tmp_path):
    class Fail(Callback):
        def on_epoch_end(self, estimator) -> None:
            raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match=r"something else"):
        run(case[0], case[1], output=tmp_path / "r", callbacks=[Fail()])
    assert manifest(tmp_path / "r")["error"] == "RuntimeError: something else"


# ---------------------------------------------------------------- resume
def test_resume_refuses_another_workflow_or_other_data(case, copied):
    with pytest.raises(
        ConfigError, match=r"differs from the workflow of the run '.*copy' at \['task.model.kwargs.lr'\]"
    ):
        run(_changed(case[0], "lr: 1e-2", "lr: 1e-3"), resume=copied)
    with pytest.raises(DataError, match=r"\(hash \w+\) is not the data that the run was started with \(hash \w+\)"):
        run(data=factors(seed=1), resume=copied)
    with pytest.raises(CheckpointError, match=r"written with other arguments"):
        run(resume=copied, sets=["task.model.kwargs.lr=0.5"])
    assert manifest(copied)["status"] == "finished", "a refused resume must leave the run as it was"
    assert (copied / "config.yaml").read_text() == (case[2] / "config.yaml").read_text()
    with pytest.raises(ConfigError, match=r"are different folders. Pass only one"):
        run(resume=copied, output=copied.parent / "other")


def test_resume_may_train_longer(copied):
    result = run(resume=copied, sets=["task.model.kwargs.n_epochs=5"])
    assert len(result.model.history_) == 5


def test_resume_of_a_truncated_checkpoint(copied):
    _truncate(copied / "last.safetensors")
    with pytest.raises(CheckpointError, match=r"last.safetensors is not a readable weight file, it may be truncated"):
        run(resume=copied)


def test_resume_needs_a_run(tmp_path):
    with pytest.raises(ConfigError, match=r"run folder '.*none' does not exist"):
        run(resume=tmp_path / "none")
    with pytest.raises(ConfigError, match=r"is not a run folder: it has no manifest.json"):
        run(resume=tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ConfigError, match=r"manifest.json' cannot be read"):
        run(resume=tmp_path)
    (tmp_path / "manifest.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"is not the manifest of a run"):
        run(resume=tmp_path)
    with pytest.raises(ConfigError, match=r"no workflow file"):
        run()


# ---------------------------------------------------------------- data
def test_data_must_come_from_somewhere(case, tmp_path):
    with pytest.raises(
        ConfigError, match=r"qlib_init.provider_uri is missing, so there is no data. Remedy: --data PATH"
    ):
        run(case[0])
    uri = _changed(case[0], "experiment_name: small", "qlib_init: {provider_uri: ~/no/such/store}")
    with pytest.raises(
        ConfigError, match=r"the Qlib data folder '~/no/such/store' does not exist. Remedy: --data PATH"
    ):
        run(uri)
    with pytest.raises(ConfigError, match=r"--data '.*none.csv' does not exist \(looked in "):
        run(case[0], tmp_path / "none.csv")


# ---------------------------------------------------------------- predict
def test_predict_repeats_the_scores_of_the_run(case):
    pred = read_frame(case[2], "pred")["score"]
    scores = predict(case[2], case[1])
    assert scores.name == "score"
    np.testing.assert_array_equal(scores.reindex(pred.index), pred)


def test_predict_needs_no_label_and_fits_nothing(case):
    frame = factors().drop(columns="label")
    expected = predict(case[2], case[1], start="2020-03-01")
    # Other rows, including extreme ones, must not change the scores of these dates.
    wild = frame.copy()
    wild.loc[wild.index.get_level_values(0) < "2020-03-01"] *= 1000
    np.testing.assert_array_equal(predict(case[2], wild, start="2020-03-01"), expected)
    np.testing.assert_array_equal(predict(case[2], frame.loc["2020-03-01":]), expected)


def test_predict_accepts_new_instruments(case):
    frame = factors().drop(columns="label").rename(index=lambda name: f"new{name}", level="instrument")
    assert len(predict(case[2], frame, start="2020-03-10")) == 12


def test_codes_in_a_file_of_factors_keep_their_zeros_and_dates_are_checked(case, tmp_path):
    frame = factors().rename(index=lambda name: f"{int(name[1:]):06d}", level="instrument").reset_index()
    frame.to_csv(tmp_path / "codes.csv", index=False)
    scores = predict(case[2], tmp_path / "codes.csv")
    assert scores.index.levels[1].tolist() == [f"{i:06d}" for i in range(12)]
    np.testing.assert_array_equal(scores.to_numpy(), predict(case[2], case[1]).to_numpy())
    frame["datetime"] = frame["datetime"].astype(str)
    frame.loc[5, "datetime"] = "2020-13-45"
    frame.to_csv(tmp_path / "dates.csv", index=False)
    with pytest.raises(DataError, match=r"dates.csv: row 5 is not a date: '2020-13-45' in column 'datetime'"):
        predict(case[2], tmp_path / "dates.csv")
    with pytest.raises(ConfigError, match=r"nowhere.csv' does not exist \(looked in"):
        predict(case[2], tmp_path / "nowhere.csv")


def test_predict_refuses_an_empty_period(case):
    with pytest.raises(
        DataError, match=r"no row is between start=2030-01-01 and end=None; the data is from 2020-01-01 to 2020-03-10"
    ):
        predict(case[2], case[1], start="2030-01-01")
    with pytest.raises(ConfigError, match=r"--start: expected a date such as 2016-12-31 .* got 'soon'"):
        predict(case[2], case[1], start="soon")


def test_predict_refuses_other_columns(case):
    frame = factors().drop(columns="label")
    with pytest.raises(DataError, match=r"feature columns missing \(or empty\) \['f3'\], unexpected none"):
        predict(case[2], frame.drop(columns="f3"))
    with pytest.raises(DataError, match=r"missing \(or empty\) none, unexpected \['f9'\]"):
        predict(case[2], frame.assign(f9=1.0))
    with pytest.raises(DataError, match=r"no column group 'feature', only"):
        predict(case[2], factors()[["label"]])


def test_predict_selects_columns_by_name(case):
    frame = factors().drop(columns="label")
    np.testing.assert_array_equal(predict(case[2], frame[frame.columns[::-1]]), predict(case[2], frame))


def test_predict_rejects_other_folders(case, tmp_path):
    with pytest.raises(ConfigError, match=r"run folder '.*none' does not exist"):
        predict(tmp_path / "none", case[1])
    with pytest.raises(ConfigError, match=r"is not a run folder"):
        predict(tmp_path, case[1])


@pytest.mark.parametrize("name", ["best.safetensors", "processors.safetensors", "model.json"])
def test_predict_names_a_missing_or_truncated_file(case, copied, name):
    whole = (copied / name).read_bytes()
    (copied / name).unlink()
    with pytest.raises(CheckpointError, match=rf"{name}.* (does not exist|is missing)"):
        predict(copied, case[1])
    (copied / name).write_bytes(whole)
    _truncate(copied / name)
    with pytest.raises(CheckpointError, match=rf"{name}.* (truncated|cannot be read)"):
        predict(copied, case[1])


def test_predict_refuses_weights_and_states_of_another_run(case, copied):
    facts = json.loads((copied / "model.json").read_text())
    (copied / "model.json").write_text(json.dumps({**facts, "format": 99}))
    with pytest.raises(CheckpointError, match=r"has format 99; this version reads 1"):
        predict(copied, case[1])
    facts["model"]["kwargs"]["hidden_size"] = 8
    (copied / "model.json").write_text(json.dumps(facts))
    with pytest.raises(CheckpointError, match=r"does not fit LSTMModel"):
        predict(copied, case[1])
    facts["model"]["kwargs"]["hidden_size"] = 4
    (copied / "model.json").write_text(json.dumps(facts))
    safetensors.numpy.save_file({"infer.0.feature.shift": np.zeros(6)}, copied / "processors.safetensors")
    with pytest.raises(CheckpointError, match=r"does not fit model.json: RobustZScoreNorm: the saved state lacks"):
        predict(copied, case[1])


# ---------------------------------------------------------------- prices, with the demo's workflow
@pytest.fixture(scope="module")
def price_case(tmp_path_factory):
    """(prices, finished run) of the demo's workflow, cut short."""
    prices = demo_prices(n_instruments=25, n_days=560)
    path = tmp_path_factory.mktemp("prices") / "run"
    sets = ["task.model.kwargs.n_epochs=1", "task.model.kwargs.hidden_size=4"]
    run(DEMO, prices, sets, output=path, seed=1)
    return prices, path


def test_demo_workflow_scores_prices_up_to_the_newest_date(price_case):
    prices, path = price_case
    pred = read_frame(path, "pred")
    newest = prices.index.get_level_values("datetime").max()
    assert pred.index.get_level_values("datetime").max() == newest
    assert pred["score"].notna().all()
    scores = predict(path, prices)
    np.testing.assert_allclose(scores.reindex(pred.index), pred["score"], rtol=1e-5, atol=1e-7)


def test_the_last_days_of_prices_are_enough_to_score_tomorrow(price_case):
    prices, path = price_case
    dates = prices.index.get_level_values("datetime")
    recent = prices[dates >= dates.unique().sort_values()[-60]]
    expected = predict(path, prices, start=dates.max())
    scores = predict(path, recent, start=dates.max())
    np.testing.assert_allclose(scores, expected.reindex(scores.index), rtol=1e-5, atol=1e-7)


def test_prices_that_lack_a_column_of_training_are_refused(price_case):
    prices, path = price_case
    with pytest.raises(DataError, match=r"price columns missing \(or empty\) \['vwap'\], unexpected none"):
        predict(path, prices.drop(columns="vwap"))
    with pytest.raises(DataError, match=r"missing \(or empty\) \['volume'\]"):
        predict(path, prices.assign(volume=np.nan))


def test_scores_of_a_day_do_not_depend_on_the_requested_period(price_case):
    prices, path = price_case
    every = predict(path, prices)
    some = predict(path, prices, start="2019-12-02", end="2019-12-20")
    assert some.index.get_level_values("datetime").max() <= pd.Timestamp("2019-12-20")
    np.testing.assert_allclose(some, every.reindex(some.index), rtol=1e-5, atol=1e-7)
    with pytest.raises(DataError, match=r"no rows? .*2030"):
        predict(path, prices, start="2030-01-01")


@pytest.mark.parametrize("rolling", [False, True], ids=["flat", "ts"])
def test_features_without_end_are_those_of_training(tmp_path, rolling):
    """EMA and windows of 0 rows depend on the first day of the data, which is not the first scored day."""
    prices = demo_prices(n_instruments=12, n_days=560)
    features = "['EMA($close, 20) / $close', 'Mean($volume, 0) / $volume']"
    sets = [
        "task.dataset.class=" + ("TSDatasetH" if rolling else "DatasetH"),
        *(["task.dataset.kwargs.step_len=3"] if rolling else []),
        "task.model.module_path=" + ("qfast.models.ts" if rolling else "qfast.models"),
        "task.dataset.kwargs.handler.class=FactorHandler",
        f"task.dataset.kwargs.handler.kwargs.features={features}",
        "task.dataset.kwargs.handler.kwargs.start_time=2018-06-01",
        "task.model.kwargs={d_feat: 2, hidden_size: 4, num_layers: 1, n_epochs: 1}",
    ]
    finished = run(DEMO, prices, sets, output=tmp_path / "run", seed=1)
    scores = read_frame(finished.path, "pred")["score"]
    dates = scores.index.get_level_values("datetime").unique()
    for result in (
        predict(finished.path, prices, date=dates[-3].date()),
        predict(finished.path, prices, start=dates[-9].date(), end=dates[-2].date()),
        predict(finished.path, prices, date="latest"),
    ):
        np.testing.assert_allclose(result, scores.reindex(result.index), rtol=1e-5, atol=1e-7)
        assert result.attrs["notes"] == []
    later = prices[prices.index.get_level_values("datetime") >= "2018-09-03"]
    notes = predict(finished.path, later).attrs["notes"]
    assert any("the data begins on 2018-09-03, the training data on 2018-06-01" in note for note in notes)


def test_the_manifest_tells_the_time_of_each_stage(price_case):
    seconds = manifest(price_case[1])["seconds"]
    assert list(seconds) == ["data", "training", "scores", "portfolio"]
    assert all(0 < elapsed < 600 for elapsed in seconds.values())
    assert f"data {seconds['data']:.1f}, training" in (price_case[1] / "report.html").read_text()


def test_a_single_date_can_be_scored(price_case, tmp_path):
    prices, path = price_case
    dates = prices.index.get_level_values("datetime").unique().sort_values()
    every = predict(path, prices)
    for asked, date in (("latest", dates[-1]), ("2019-12-02", pd.Timestamp("2019-12-02"))):
        scores = predict(path, prices, date=asked)
        assert scores.index.get_level_values("datetime").unique().tolist() == [date]
        np.testing.assert_allclose(scores, every.reindex(scores.index), rtol=1e-5, atol=1e-7)
        assert len(scores) == (every.index.get_level_values("datetime") == date).sum()
    frame = prices.reset_index()
    assert predict(path, frame, date="latest").attrs["notes"] == []
    today = frame[frame["datetime"] == dates[-1]].assign(datetime=dates[-1] + pd.Timedelta(days=1))
    empty = today.assign(open=np.nan, high=np.nan, low=np.nan, close=np.nan)
    result = predict(path, pd.concat([frame, empty]), date="latest")
    assert set(result.index.get_level_values("datetime")) == {dates[-1]}
    assert "has no values; scoring" in result.attrs["notes"][0]
    result = predict(path, pd.concat([frame, today.iloc[:2]]), date="latest")
    assert len(result) == 2
    assert re.search("only 2 instruments have values on .*, compared with 21", result.attrs["notes"][0])
    with pytest.raises(ConfigError, match="--date latest cannot be combined with --start"):
        predict(path, prices, date="latest", start="2019-01-01")
    with pytest.raises(ConfigError, match="--date: expected a date such as"):
        predict(path, prices, date="newest")


def test_the_portfolio_of_a_run_is_that_of_its_scores(price_case):
    prices, path = price_case
    folder = path / "portfolio_analysis"
    assert {f.name for f in folder.iterdir()} == {
        "report_normal_1day.parquet",
        "positions_normal_1day.parquet",
        "indicators_normal_1day.parquet",
        "port_analysis_1day.parquet",
        "indicator_analysis_1day.parquet",
        "metrics.json",
    }
    pred = read_frame(path, "pred")
    score = pred.loc[pred["segment"] == "test", "score"]
    exchange = Exchange(open_cost=0.0005, close_cost=0.0015, min_cost=0, limit_threshold=0.095)
    start = score.index.get_level_values("datetime").min()
    market, _ = Market.of(read_prices(prices), exchange, start, None)
    days = pd.DatetimeIndex(prices.index.get_level_values("datetime").unique()).sort_values()
    strategy = TopkDropout(20, 2)
    expected = backtest(score, market, strategy, exchange, account=1e6, day_before=days[days < start][-1])
    report = pd.read_parquet(folder / "report_normal_1day.parquet")
    for column in ("account", "turnover", "cost"):
        np.testing.assert_allclose(report[column], expected.report[column], rtol=1e-9)
    mean = prices.groupby(level="instrument")["close"].pct_change(fill_method=None).groupby(level="datetime").mean()
    alike = np.isclose(report["bench"], mean.reindex(report.index), rtol=1e-3, atol=1e-6)
    assert alike.mean() > 0.9  # pandas fills holes with earlier values; a day's return does not
    metrics = json.loads((folder / "metrics.json").read_text())
    assert len(metrics) == 13
    excess = report["return"] - report["bench"] - report["cost"]
    assert metrics["1day.excess_return_with_cost.annualized_return"] == pytest.approx(excess.mean() * 238)
    page = (path / "report.html").read_text()
    assert ">Portfolio</h2>" in page
    assert "no benchmark MARKET: the mean return of all instruments" in page


def test_prices_from_a_file_have_the_same_scores(price_case, tmp_path):
    prices, path = price_case
    prices.reset_index().to_csv(tmp_path / "prices.csv", index=False)
    from_file = predict(path, tmp_path / "prices.csv", start="2020-01-01")
    np.testing.assert_allclose(from_file, predict(path, prices, start="2020-01-01"), rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- helpers
def _truncate(path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def _changed(config, old: str, new: str):
    text = config.read_text()
    assert old in text
    file = config.with_name(f"changed{abs(hash(new))}.yaml")
    file.write_text(text.replace(old, new))
    return file
