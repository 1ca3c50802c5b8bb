"""Finished runs: `qfast.load`, and `predict` on the run's own data, instruments and weights."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import qfast
from qfast.cli import main
from qfast.data import store
from qfast.errors import CheckpointError, ConfigError, DataError
from qfast.workflow.run import run
from support.stores import write_market
from support.workflows import factors, write_case

TEXT = """
experiment_name: members
qlib_init: {{provider_uri: {store}}}
task:
  model:
    class: {model}
    module_path: qfast.models{suffix}
    kwargs: {{d_feat: 2, hidden_size: 4, num_layers: 1, n_epochs: 1, batch_size: 64, seed: 0, GPU: -1}}
  dataset:
    class: {dataset}
    kwargs:
      handler:
        class: FactorHandler
        kwargs:
          instruments: {instruments}
          features: ["$close / Ref($close, 5) - 1", "Std($close, 10) / $close"]
          fit_start_time: 2020-01-01
          fit_end_time: 2020-03-31
          infer_processors:
            - {{class: CSZScoreNorm, kwargs: {{fields_group: feature}}}}
            - {{class: RobustZScoreNorm, kwargs: {{fields_group: feature}}}}
            - {{class: Fillna, kwargs: {{fields_group: feature}}}}
          learn_processors: [DropnaLabel]
      segments: {{train: [2020-01-20, 2020-03-31], valid: [2020-04-01, 2020-04-30], test: [2020-05-01, 2020-07-14]}}
      {step_len}
  record: []
"""
N_DAYS = 140


def write_members(root: Path) -> list[str]:
    """The market `some` of a store: members change, and nobody is a member for ten days."""
    days = (root / "calendars/day.txt").read_text().split()
    spans = {"S01": [(0, 139)], "S02": [(0, 139)], "S03": [(0, 105)], "S04": [(90, 139)], "S05": [(0, 60), (100, 139)]}
    spans |= {f"S{i:02d}": [(0, 139)] for i in range(6, 12)} | {"S12": [(0, 20)]}
    lines = []
    for code, periods in spans.items():
        for first, last in periods:
            for begin, end in ((first, min(last, 119)), (max(first, 130), last)):  # the gap: days 120 to 129
                if begin <= end:
                    lines.append(f"{code}\t{days[begin]}\t{days[end]}")
    (root / "instruments/some.txt").write_text("\n".join(lines) + "\n")
    return days


def train(folder: Path, rolling: bool = True, model: str = "LSTM", instruments: str = "some") -> Path:
    text = TEXT.format(
        store=folder / "store",
        model=model,
        suffix=".ts" if rolling else "",
        dataset="TSDatasetH" if rolling else "DatasetH",
        step_len="step_len: 4" if rolling else "",
        instruments=instruments,
    )
    (folder / "w.yaml").write_text(text)
    return run(folder / "w.yaml", output=folder / "run").path


@pytest.fixture(scope="module", params=[True, False], ids=["ts", "flat"])
def case(request, tmp_path_factory):
    """Run folder, days of the calendar, scores of the segment test."""
    folder = tmp_path_factory.mktemp("members")
    days = write_members(write_market(folder / "store", n_days=N_DAYS))
    path = train(folder, request.param)
    return path, days, scores_of(path)


@pytest.fixture
def copied(case, tmp_path):
    """A copy of the run folder."""
    return Path(shutil.copytree(case[0], tmp_path / "run"))


@pytest.fixture(scope="module")
def factor_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("factors")
    config, data = write_case(folder)
    return run(config, data, output=folder / "run", seed=0, sets=["task.model.kwargs.n_epochs=1"]).path


def scores_of(path: Path) -> pd.Series:
    table = pd.read_parquet(path / "pred.parquet")
    return table.loc[table["segment"] == "test", "score"]


def change_json(file: Path, **changes) -> None:
    content = json.loads(file.read_text())
    for key, value in changes.items():
        if value is None:
            content.pop(key, None)
        else:
            content[key] = value
    file.write_text(json.dumps(content))


# ---------------------------------------------------------------- instruments and days
def close_to(result: pd.Series, expected: pd.Series) -> None:
    """The kernels share work between consecutive windows, so the last bits of a score depend on the period."""
    pd.testing.assert_series_equal(result, expected, check_names=False, check_freq=False, rtol=1e-5, atol=1e-7)


def test_scores_of_any_period_equal_those_of_the_run(case):
    path, days, expected = case
    saved = qfast.load(path)
    whole = saved.predict(start="2020-05-01", end="2020-07-14")
    pd.testing.assert_series_equal(whole, expected, check_exact=True, check_names=False)
    every_feature = saved.dataset().handler.fetch(col_set="feature")
    for first, last in ((95, 95), (110, 110), (130, 130), (132, 132), (139, 139), (126, 134)):  # 130 ends the gap
        close_to(saved.predict(start=days[first], end=days[last]), expected.loc[days[first] : days[last]])
        features = saved.dataset(start=days[first], end=days[last]).handler.fetch(col_set="feature")
        pd.testing.assert_frame_equal(
            features.loc[days[first] :], every_feature.loc[days[first] : days[last]], check_exact=True, check_freq=False
        )


def test_only_the_days_and_members_of_the_windows_are_read(case, monkeypatch):
    path, days, _ = case
    read = []
    original = store._read_bin

    def spy(file, low, high, n_dates):
        read.append((Path(file).parent.name, high - low))
        return original(file, low, high, n_dates)

    monkeypatch.setattr(store, "_read_bin", spy)
    scores = qfast.predict(path, date=days[115])
    needed = 10 + 1 + 4  # lookback and look-ahead of the label, the day itself, the window
    assert max(n for _, n in read) <= needed + 3
    assert {name for name, _ in read} == {name.lower() for name in scores.index.get_level_values("instrument")}
    read.clear()
    qfast.predict(path, date="latest")
    assert sum(n > 40 for _, n in read) <= 3  # earlier closing prices of suspended stocks


@pytest.mark.parametrize(("instruments", "count"), [("all", 25), (["S01", "S20"], 2), ("some", 10)])
def test_other_instruments_can_be_requested(case, instruments, count):
    path, days, _ = case
    assert len(qfast.predict(path, date=days[115], instruments=instruments)) == count


def test_an_unknown_market_is_an_error(case):
    with pytest.raises(DataError, match=r"market 'sone' is not in .* Did you mean 'some'"):
        qfast.predict(case[0], date="latest", instruments="sone")


def test_the_instruments_of_the_command_line(case, tmp_path, capsys):
    out = tmp_path / "scores.csv"
    assert main(["predict", str(case[0]), "--date", case[1][115], "--instruments", "S01,S20", "--out", str(out)]) == 0
    assert pd.read_csv(out)["instrument"].tolist() == ["S01", "S20"]
    assert main(["predict", str(case[0]), "--date", case[1][115], "--instruments", "all", "--out", str(out)]) == 0
    assert len(pd.read_csv(out)) == 25


def test_a_market_whose_file_is_out_of_date_is_reported(case, tmp_path):
    path, days, _ = case
    root = Path(shutil.copytree(path.parent / "store", tmp_path / "store"))
    later = pd.bdate_range(days[-1], periods=4)[1:].strftime("%Y-%m-%d")
    (root / "calendars/day.txt").write_text("\n".join([*days, *later]) + "\n")
    scores = qfast.predict(path, root, date="latest")
    assert set(scores.index.get_level_values("datetime")) == {pd.Timestamp(days[-1])}
    assert f"the calendar of the data ends on {later[-1]}, but no instrument to score" in scores.attrs["notes"][0]


def test_an_instrument_suspended_on_the_first_day_read_has_enough_history(case, tmp_path):
    path, days, _ = case
    root = Path(shutil.copytree(path.parent / "store", tmp_path / "store"))
    for folder in (root / "features").iterdir():
        file = folder / "close.day.bin"
        values = np.fromfile(file, dtype="<f4")
        values[1 + 97 - int(values[0]) : 1 + 104 - int(values[0])] = np.nan
        values.tofile(file)
    assert qfast.predict(path, root, date=days[112]).attrs["notes"] == []


def test_instruments_of_a_list_that_new_tables_lack_are_reported(tmp_path):
    write_market(tmp_path / "store", n_days=N_DAYS)
    path = train(tmp_path, instruments="[S01, S02, S03, S04]")
    prices = qfast.data.sources.load_prices(tmp_path / "store").to_frame(["price"]).droplevel(0, axis=1)
    expected = qfast.predict(path, prices, date="latest")
    assert expected.index.get_level_values("instrument").tolist() == ["S01", "S02", "S03", "S04"]
    fewer = prices[prices.index.get_level_values("instrument") != "S02"]
    scores = qfast.predict(path, fewer, date="latest")
    assert len(scores) == 3
    assert "1 of 4 instruments are not in the data" in scores.attrs["notes"][0]
    with pytest.raises(DataError, match=r"none of the instruments of the run .*--instruments all"):
        qfast.predict(path, prices[prices.index.get_level_values("instrument") == "S20"], date="latest")
    assert len(qfast.predict(path, prices, date="latest", instruments="all")) == 25


# ---------------------------------------------------------------- the data of the run
def test_the_data_of_the_run_is_the_default_from_any_directory(factor_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    expected = qfast.predict(factor_run, factor_run.parent / "factors.csv")
    pd.testing.assert_series_equal(qfast.predict(factor_run), expected, check_exact=True)
    assert main(["predict", str(factor_run), "--date", "latest", "--out", str(tmp_path / "s.csv")]) == 0


def test_a_source_that_is_gone_or_was_in_memory_is_an_error_with_a_remedy(factor_run, tmp_path):
    path = Path(shutil.copytree(factor_run, tmp_path / "run"))
    facts = json.loads((path / "manifest.json").read_text())["data"]
    change_json(path / "manifest.json", data={**facts, "source": str(tmp_path / "gone.csv")})
    with pytest.raises(ConfigError, match=r"gone.csv', no longer exists or has moved. Remedy: --data PATH"):
        qfast.predict(path)
    change_json(path / "manifest.json", data={**facts, "source": "a DataFrame in memory", "given": "memory"})
    with pytest.raises(ConfigError, match=r"a DataFrame in memory, which is not stored. Remedy: --data PATH"):
        qfast.predict(path)
    change_json(path / "manifest.json", data=None)
    with pytest.raises(ConfigError, match=r"Remedy: --data PATH"):
        qfast.predict(path)


def test_a_store_by_frequency_is_found_again(tmp_path):
    write_members(write_market(tmp_path / "store", n_days=N_DAYS))
    path = train(tmp_path)
    expected = qfast.predict(path, date="latest")
    text = (path / "config.yaml").read_text()
    (path / "config.yaml").write_text(text.replace(f"provider_uri: {tmp_path}/store", "provider_uri: {day: store}"))
    manifest = json.loads((path / "manifest.json").read_text())
    change_json(
        path / "manifest.json", data={**manifest["data"], "source": "{'day': 'store'}"}, directory=str(tmp_path)
    )
    pd.testing.assert_series_equal(qfast.predict(path, date="latest"), expected, check_exact=True)


# ---------------------------------------------------------------- load
def test_load_gives_model_processors_and_config(case):
    path, days, expected = case
    saved = qfast.load(path)
    assert saved.config["task"]["model"]["class"] == "LSTM"
    assert [type(p).__name__ for p in saved.processors["infer"]] == ["CSZScoreNorm", "RobustZScoreNorm", "Fillna"]
    assert all(p.frozen for p in saved.processors["infer"])
    assert saved.manifest["status"] == "finished"
    assert repr(saved) == f"SavedRun({str(path)!r}, LSTM, finished)"
    dataset = saved.dataset(start=days[100], end=days[110])
    result = saved.model.predict(dataset, "new").sort_index()
    close_to(result, expected.loc[days[100] : days[110]])
    pd.testing.assert_series_equal(saved.predict(date=days[105]), qfast.predict(path, date=days[105]))


def test_attention_of_a_loaded_run(tmp_path):
    days = write_members(write_market(tmp_path / "store", n_days=N_DAYS))
    saved = qfast.load(train(tmp_path, model="GATs"))
    dataset = saved.dataset(start=days[110], end=days[112])
    table = saved.model.attention(dataset, days[111], instruments=["S01"], top=3)
    assert len(table) == 3


def test_a_folder_of_an_earlier_version_is_loaded(case, copied):
    """Earlier versions recorded neither the instruments nor the hash of the weights nor the options of the readers."""
    _, days, expected = case
    facts = json.loads((copied / "model.json").read_text())
    assert facts["instruments"] == "some"
    change_json(copied / "model.json", instruments=None)
    data = json.loads((copied / "manifest.json").read_text())["data"]
    change_json(
        copied / "manifest.json",
        weights=None,
        directory=None,
        data={key: data[key] for key in ("source", "given", "hash", "rows", "instruments", "first", "last", "label")},
    )
    text = (copied / "config.yaml").read_text()
    (copied / "config.yaml").write_text(f"BASE_CONFIG_PATH: gone.yaml\n{text}")
    scores = qfast.load(copied).predict(date=days[110])
    close_to(scores, expected.loc[[days[110]]])
    assert scores.attrs["notes"] == []


def test_commands_of_a_finished_run_need_no_earlier_command(factor_run, tmp_path):
    """In a process of its own, in which no workflow has registered the classes that the run folder names."""
    copy = shutil.copytree(factor_run, tmp_path / "run")
    code = "import sys; from qfast.cli import main; sys.exit(main(sys.argv[1:]))"
    for command in (["export", str(copy)], ["info", str(copy)]):
        done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert (copy / "artifacts" / "pred.pkl").exists()


def test_export_has_qlibs_row_order_and_no_folder_for_a_missing_backtest(case, copied):
    folder = qfast.export_artifacts(copied)
    assert sorted(item.name for item in folder.iterdir()) == ["label.pkl", "metrics.json", "pred.pkl", "sig_analysis"]
    exported = pd.read_pickle(folder / "pred.pkl")["score"]
    by_instrument = "step_len" in (copied / "config.yaml").read_text()
    levels = ["instrument", "datetime"] if by_instrument else ["datetime", "instrument"]
    assert exported.index.names == ["datetime", "instrument"]
    pd.testing.assert_series_equal(exported, case[2].sort_index(level=levels))
    assert pd.read_pickle(folder / "label.pkl").index.is_monotonic_increasing


# ---------------------------------------------------------------- weights
def test_replaced_weights_are_reported(case, copied, capsys, caplog):
    saved = qfast.load(copied)
    assert saved.notes == []
    change_weights(saved)
    saved.model.save_weights(copied / "best.safetensors")
    scores = qfast.predict(copied, date="latest")
    assert "best.safetensors has been replaced since the run ended" in scores.attrs["notes"][0]
    assert "has been replaced" in caplog.text
    assert main(["info", str(copied)]) == 0
    assert "has been replaced" in capsys.readouterr().out
    assert qfast.load(copied).notes


def test_weights_trained_in_python_are_passed_by_name(case, copied, tmp_path, capsys):
    saved = qfast.load(copied)
    before = saved.predict(date="latest")
    change_weights(saved)
    saved.model.save_weights(tmp_path / "mine.safetensors")
    expected = saved.predict(date="latest")
    assert not np.array_equal(before, expected)
    scores = qfast.predict(copied, date="latest", weights=tmp_path / "mine.safetensors")
    pd.testing.assert_series_equal(scores, expected, check_exact=True)
    out = tmp_path / "s.csv"
    arguments = ["--date", "latest", "--weights", str(tmp_path / "mine.safetensors"), "--out", str(out)]
    assert main(["predict", str(copied), *arguments]) == 0
    np.testing.assert_allclose(pd.read_csv(out)["score"], expected, rtol=1e-6)
    with pytest.raises(CheckpointError, match=r"weight file .*none.safetensors does not exist"):
        qfast.load(copied, weights=tmp_path / "none.safetensors")


def change_weights(saved: qfast.SavedRun) -> None:
    """Stands for training the model further."""
    next(iter(saved.model.network.parameters())).data.add_(0.5)


# ---------------------------------------------------------------- registered classes
def test_a_registered_model_runs_resumes_predicts_and_loads(tmp_path):
    @qfast.register_model
    class TwiceLSTM(qfast.models.LSTM):
        def __init__(self, d_feat: int = 3, **kwargs: object) -> None:
            super().__init__(d_feat=d_feat, **kwargs)

    config, data = write_case(tmp_path)
    text = config.read_text().replace("class: LSTM", "class: TwiceLSTM")
    config.write_text(text.replace("module_path: qlib.contrib.model.pytorch_lstm\n", f"module_path: {__name__}\n"))
    path = run(config, data, ["task.model.kwargs.n_epochs=1"], output=tmp_path / "run", seed=0).path
    assert type(qfast.load(path).model) is TwiceLSTM
    assert len(qfast.predict(path, date="latest")) == 12
    assert len(run(resume=path, sets=["task.model.kwargs.n_epochs=2"]).model.history_) == 2
    assert main(["info", str(path)]) == 0


def test_only_estimators_can_be_registered():
    with pytest.raises(ConfigError, match=r"must derive from qfast.training.estimator.Estimator, got .*dict"):
        qfast.register_model(dict)


def test_factors_in_memory_need_no_instruments(factor_run):
    scores = qfast.load(factor_run).predict(factors().drop(columns="label"), date="latest")
    assert len(scores) == 12
