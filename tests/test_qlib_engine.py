"""qfast's models inside pyqlib's workflow, and the same workflow without pyqlib."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from test_backtest import write_market

from qfast.cli import main
from qfast.errors import ConfigError
from qfast.integrations.qlib import run as run_in_qlib
from qfast.integrations.qlib import with_our_model
from qfast.workflow.run import run

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
    """A workflow file over a store of 25 stocks; the store has what the factors need."""
    root = write_market(folder / "store")
    for stock in (root / "features").iterdir():
        for field in ("high", "low", "vwap"):
            (stock / f"{field}.day.bin").write_bytes((stock / "close.day.bin").read_bytes())
    file = folder / "workflow.yaml"
    file.write_text(TEXT.replace("PLACE", str(root)).replace("MODULE", module))
    return file


def test_our_model_takes_the_references_place():
    spec = {"model": {"class": "GATs", "module_path": "qlib.contrib.model.pytorch_gats", "kwargs": {"d_feat": 6}}}
    task = with_our_model({**spec, "dataset": 1})
    assert task == {"model": {**spec["model"], "module_path": "qfast.models"}, "dataset": 1}
    assert with_our_model(task) == task
    with pytest.raises(ConfigError, match="LGBModel"):
        with_our_model({"model": {"class": "LGBModel", "module_path": "qlib.contrib.model.gbdt"}})


def test_the_engine_is_named_and_its_limits(tmp_path, capsys):
    file = write_workflow(tmp_path)
    assert main(["run", str(file), "--engine", "qlb"]) == 2
    assert "--engine must be qfast or qlib, got 'qlb'" in capsys.readouterr().err
    assert main(["run", str(file), "--engine", "qlib", "--output", str(tmp_path / "x")]) == 2
    assert "takes no --output" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")
def test_three_ways_give_the_same_numbers(tmp_path, monkeypatch):
    """pyqlib alone, pyqlib with our model, and qfast without pyqlib: IC and portfolio."""
    pytest.importorskip("qlib", reason="pyqlib is not installed")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.chdir(tmp_path)
    file = write_workflow(tmp_path)
    with_ours = run_in_qlib(file, folder=tmp_path / "mlruns").metrics
    from qlib.model.trainer import task_train

    from qfast.workflow.config import load_config

    alone = task_train(load_config(file).values["task"], experiment_name="alone").list_metrics()
    own = run(file, output=tmp_path / "run")
    logging.getLogger("qlib").setLevel(logging.ERROR)
    assert len(alone) == 17
    for name, value in alone.items():
        assert with_ours[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
        mine = own.portfolio[name] if name in own.portfolio else own.metrics["test"][name]
        assert mine == pytest.approx(value, rel=1e-4, abs=1e-6), name
    assert json.loads((own.path / "portfolio_analysis" / "metrics.json").read_text()) == own.portfolio
