"""qfast's models inside pyqlib's workflow, and the same workflow without pyqlib."""

from __future__ import annotations

import importlib.util
import json
import logging
import time
from pathlib import Path

import pandas as pd
import pytest

from qfast.cli import main
from qfast.errors import ConfigError
from qfast.integrations.qlib import _immediate_logging, with_qfast_model
from qfast.integrations.qlib import run as run_in_qlib
from qfast.workflow import folder
from qfast.workflow.artifacts import export_artifacts
from qfast.workflow.run import run
from support.stores import write_market

ARTIFACTS = [
    "pred.pkl",
    "label.pkl",
    "sig_analysis/ic.pkl",
    "sig_analysis/ric.pkl",
    *(
        f"portfolio_analysis/{name}.pkl"
        for name in (
            "report_normal_1day",
            "indicators_normal_1day",
            "port_analysis_1day",
            "indicator_analysis_1day",
        )
    ),
]
TEXT = """
qlib_init: {provider_uri: PLACE, region: us, kernels: 1}
experiment_name: small
task:
  model:
    class: LSTM
    module_path: MODULE
    kwargs: {d_feat: 3, hidden_size: 4, num_layers: 1, n_epochs: 2, batch_size: 64, seed: 0, n_jobs: 0, GPU: -1}
  dataset:
    class: TSDatasetH
    module_path: qlib.data.dataset
    kwargs:
      step_len: 5
      handler:
        class: Alpha158
        module_path: qlib.contrib.data.handler
        kwargs:
          instruments: all
          start_time: 2020-01-01
          end_time: 2020-06-10
          fit_start_time: 2020-01-01
          fit_end_time: 2020-04-01
          infer_processors:
            - {class: FilterCol, kwargs: {fields_group: feature, col_list: [KLEN, ROC5, STD5]}}
            - {class: RobustZScoreNorm, kwargs: {fields_group: feature, clip_outlier: true}}
            - {class: Fillna, kwargs: {fields_group: feature}}
          learn_processors:
            - {class: DropnaLabel}
            - {class: CSRankNorm, kwargs: {fields_group: label}}
      segments: {train: [2020-01-01, 2020-04-01], valid: [2020-04-02, 2020-04-20], test: [2020-04-21, 2020-06-01]}
  record:
    - {class: SignalRecord, module_path: qlib.workflow.record_temp, kwargs: {model: <MODEL>, dataset: <DATASET>}}
    - {class: SigAnaRecord, module_path: qlib.workflow.record_temp, kwargs: {ana_long_short: false, ann_scaler: 252}}
    - class: PortAnaRecord
      module_path: qlib.workflow.record_temp
      kwargs:
        config:
          strategy:
            class: TopkDropoutStrategy
            module_path: qlib.contrib.strategy
            kwargs: {signal: <PRED>, topk: 6, n_drop: 2}
          backtest:
            start_time: 2020-04-22
            end_time: 2020-06-01
            account: 1000000
            benchmark: S01
            exchange_kwargs: {limit_threshold: 0.05, open_cost: 0.0005, close_cost: 0.0015, min_cost: 5}
"""


def write_workflow(folder: Path, module: str = "qlib.contrib.model.pytorch_lstm_ts") -> Path:
    """A workflow file over a store of 25 stocks with the fields of the factors."""
    root = write_market(folder / "store")
    for stock in (root / "features").iterdir():
        for field in ("high", "low", "vwap"):
            (stock / f"{field}.day.bin").write_bytes((stock / "close.day.bin").read_bytes())
    file = folder / "workflow.yaml"
    file.write_text(TEXT.replace("PLACE", str(root)).replace("MODULE", module))
    return file


def test_qfasts_model_replaces_qlibs():
    spec = {"model": {"class": "GATs", "module_path": "qlib.contrib.model.pytorch_gats", "kwargs": {"d_feat": 6}}}
    task = with_qfast_model({**spec, "dataset": 1})
    assert task == {"model": {**spec["model"], "module_path": "qfast.models"}, "dataset": 1}
    assert with_qfast_model(task) == task
    with pytest.raises(ConfigError, match="LGBModel"):
        with_qfast_model({"model": {"class": "LGBModel", "module_path": "qlib.contrib.model.gbdt"}})


def test_the_engine_and_its_limits_are_reported(tmp_path, capsys):
    file = write_workflow(tmp_path)
    assert main(["run", str(file), "--engine", "qlb"]) == 2
    assert "--engine must be qfast or qlib, got 'qlb'" in capsys.readouterr().err
    assert main(["run", str(file), "--engine", "qlib", "--output", str(tmp_path / "x")]) == 2
    assert "does not support --output" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")
def test_the_engine_accepts_classes_that_only_qlib_has(tmp_path, monkeypatch):
    pytest.importorskip("qlib", reason="pyqlib is not installed")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.chdir(tmp_path)
    file = write_workflow(tmp_path)
    sets = ["task.record.2.kwargs.indicator_analysis_method=amount_weighted", "task.model.kwargs.lr='1e-2'"]
    assert len(run_in_qlib(file, sets, folder=tmp_path / "mlruns").metrics) == 17
    with pytest.raises(ConfigError, match=r"task.model.kwargs.hidden: LSTM has no argument 'hidden'"):
        run_in_qlib(file, ["task.model.kwargs.hidden=3"])
    with pytest.raises(ConfigError, match=r"qlib_init.provider_uri is missing"):
        run_in_qlib(file, ["qlib_init.provider_uri=null"])


@pytest.mark.filterwarnings("ignore")
def test_a_slow_disk_does_not_stop_the_engine(tmp_path, monkeypatch):
    """MLflow rejects a metric whose file exists and is still empty. No record may read metrics at that moment."""
    pytest.importorskip("qlib", reason="pyqlib is not installed")
    from mlflow.store.tracking import file_store
    from qlib.workflow import recorder

    write, async_caller = file_store.append_to, recorder.AsyncCaller

    def write_slowly(name: str, data: str) -> None:
        Path(name).touch()
        time.sleep(0.05)
        write(name, data)

    monkeypatch.setattr(file_store, "append_to", write_slowly)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.chdir(tmp_path)
    assert len(run_in_qlib(write_workflow(tmp_path), folder=tmp_path / "mlruns").metrics) == 17
    assert recorder.AsyncCaller is async_caller


@pytest.mark.filterwarnings("ignore")
def test_three_ways_give_the_same_numbers(tmp_path, monkeypatch):
    """IC and portfolio of pyqlib alone, pyqlib with qfast's model, and qfast without pyqlib."""
    pytest.importorskip("qlib", reason="pyqlib is not installed")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.chdir(tmp_path)
    file = write_workflow(tmp_path)
    with_ours = run_in_qlib(file, folder=tmp_path / "mlruns").metrics
    from qlib.model.trainer import task_train

    from qfast.workflow.config import load_config

    with _immediate_logging():
        recorder = task_train(load_config(file).values["task"], experiment_name="alone")
    alone = recorder.list_metrics()
    outcome = run(file, output=tmp_path / "run")
    logging.getLogger("qlib").setLevel(logging.ERROR)
    assert len(alone) == 17
    for name, value in alone.items():
        assert with_ours[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
        mine = outcome.portfolio[name] if name in outcome.portfolio else outcome.metrics["test"][name]
        assert mine == pytest.approx(value, rel=1e-4, abs=1e-6), name
    assert json.loads((outcome.path / "portfolio_analysis" / "metrics.json").read_text()) == outcome.portfolio

    exported = export_artifacts(outcome.path)
    assert json.loads((exported / "metrics.json").read_text()) == pytest.approx(alone, rel=1e-4, abs=1e-6)
    for name in ARTIFACTS:
        mine, theirs = pd.read_pickle(exported / name), recorder.load_object(name)
        assert type(mine) is type(theirs), name
        if isinstance(theirs, pd.Series):
            pd.testing.assert_series_equal(mine, theirs, rtol=1e-3, atol=1e-5, check_freq=False)
        else:
            pd.testing.assert_frame_equal(mine, theirs, rtol=1e-3, atol=1e-5, check_freq=False)
    name = "portfolio_analysis/positions_normal_1day.pkl"
    mine, theirs = pd.read_pickle(exported / name), recorder.load_object(name)
    assert list(mine) == list(theirs)
    for day, position in theirs.items():
        assert set(mine[day].get_stock_list()) == set(position.get_stock_list())
        assert mine[day].calculate_value() == pytest.approx(position.calculate_value(), rel=1e-4)
        assert mine[day].get_stock_weight_dict() == pytest.approx(position.get_stock_weight_dict(), rel=1e-3)


def test_export_without_qlib_and_without_pyarrow(tmp_path, monkeypatch):
    file = write_workflow(tmp_path)
    monkeypatch.setattr(folder, "_has_pyarrow", lambda: False)
    run(file, output=tmp_path / "csv")
    monkeypatch.undo()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    result = export_artifacts(tmp_path / "csv", tmp_path / "there")
    for name in ARTIFACTS:
        table = pd.read_pickle(result / name)
        dated = name.split("/")[-1] not in ("port_analysis_1day.pkl", "indicator_analysis_1day.pkl")
        assert isinstance(table.index.get_level_values(0)[0], pd.Timestamp) is dated
    positions = pd.read_pickle(result / "portfolio_analysis" / "positions_normal_1day.pkl")
    last = positions[max(positions)]
    worth = last.pop("cash") + sum(row["amount"] * row["price"] for name, row in last.items() if name[0] == "S")
    assert worth == pytest.approx(last["now_account_value"], rel=1e-6)


def test_export_errors(tmp_path, capsys):
    file = write_workflow(tmp_path)
    done = run(file, sets=["task.record=[SignalRecord]"], output=tmp_path / "run").path
    (tmp_path / "taken").write_text("")
    assert main(["export", str(done), "--out", str(tmp_path / "taken")]) == 2
    assert "taken' cannot be created" in capsys.readouterr().err
    assert main(["export", str(done)]) == 0
    assert not (done / "artifacts" / "portfolio_analysis" / "report_normal_1day.pkl").exists()
    manifest = json.loads((done / "manifest.json").read_text())
    (done / "manifest.json").write_text(json.dumps({**manifest, "status": "failed"}))
    assert main(["export", str(done)]) == 2
    assert "is failed, but only a finished run can be exported" in capsys.readouterr().err
