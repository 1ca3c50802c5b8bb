"""A small complete workflow over custom factors: a file and its data, trained in seconds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from qfast.training.callbacks import Callback

TEXT = """
experiment_name: small
fit: &fit [2020-01-01, 2020-02-05]
task:
  model:
    class: LSTM
    module_path: qlib.contrib.model.pytorch_lstm
    kwargs: {d_feat: 3, hidden_size: 4, num_layers: 1, n_epochs: 3, batch_size: 64, lr: 1e-2, metric: loss, GPU: 0}
  dataset:
    class: DatasetH
    module_path: qlib.data.dataset
    kwargs:
      handler:
        class: DataHandlerLP
        kwargs:
          fit_start_time: 2020-01-01
          fit_end_time: 2020-02-05
          infer_processors:
            - {class: RobustZScoreNorm, kwargs: {fields_group: feature}}
            - {class: Fillna, kwargs: {fields_group: feature}}
          learn_processors: [DropnaLabel, {class: CSRankNorm, kwargs: {fields_group: label}}]
      segments:
        train: *fit
        valid: [2020-02-06, 2020-02-20]
        test: [2020-02-21, 2020-03-05]
  record:
    - class: SignalRecord
      module_path: qlib.workflow.record_temp
      kwargs: {model: <MODEL>, dataset: <DATASET>}
    - class: SigAnaRecord
      module_path: qlib.workflow.record_temp
      kwargs: {ana_long_short: true, ann_scaler: 252}
    - class: PortAnaRecord
      module_path: qlib.workflow.record_temp
      kwargs:
        config:
          strategy: {class: TopkDropoutStrategy, module_path: qlib.contrib.strategy,
                     kwargs: {signal: <PRED>, topk: 4, n_drop: 1}}
          backtest: {start_time: null, end_time: null, account: 1000000, benchmark: SH000300}
"""


def factors(n_days: int = 70, n_stocks: int = 12, seed: int = 0) -> pd.DataFrame:
    """Six factors, one of which carries the label. The last two dates have no label yet."""
    rng = np.random.default_rng(seed)
    index = pd.MultiIndex.from_product(
        [pd.date_range("2020-01-01", periods=n_days), [f"S{i:02d}" for i in range(n_stocks)]],
        names=["datetime", "instrument"],
    )
    values = rng.standard_normal((len(index), 6)).astype(np.float32)
    label = 0.7 * values[:, 2] + rng.standard_normal(len(index)).astype(np.float32)
    values[rng.random(values.shape) < 0.02] = np.nan
    label[-2 * n_stocks :] = np.nan
    frame = pd.DataFrame(values, index, columns=[f"f{i}" for i in range(6)])
    return frame.assign(label=label)


def write_case(folder: Path) -> tuple[Path, Path]:
    """Paths of the workflow file and of its data in `folder`."""
    config, data = folder / "small.yaml", folder / "factors.csv"
    config.write_text(TEXT)
    factors().reset_index().to_csv(data, index=False)
    return config, data


FILES = {
    "config.yaml",
    "manifest.json",
    "history.csv",
    "best.safetensors",
    "last.safetensors",
    "model.json",
    "processors.safetensors",
    "pred.parquet",
    "label.parquet",
    "metrics.json",
    "daily.csv",
    "plots",
    "report.html",
}


class Interrupt(Callback):
    """Ctrl-C in the middle of an epoch."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_batch_end(self, estimator) -> None:
        if estimator.epoch_ == self.epoch:
            raise KeyboardInterrupt
