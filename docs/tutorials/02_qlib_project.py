# %% [markdown]
# # Moving a Qlib project over
#
# You have a Qlib project: a data folder, a workflow file, perhaps scripts. This page runs them with qfast, first
# without any change, then with one changed line. It makes a small data folder in Qlib's format and does not need
# pyqlib.

# %%
import difflib
import importlib.util
import logging
import os
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch

import qfast
from qfast.data import Alpha158, TSDatasetH, synthetic
from qfast.models.ts import LSTM

logging.getLogger("qfast").setLevel(logging.ERROR)
plt.rcParams["figure.facecolor"] = "white"
start, folder = os.getcwd(), tempfile.TemporaryDirectory()
os.chdir(folder.name)

# %% [markdown]
# ## A Qlib data folder
#
# Your project has one already. Here we write one as Qlib's `dump_bin.py` does: a calendar, the markets, and one small
# file per stock and field.

# %%
prices = synthetic.prices(20, 500, ic=0.15, start="2018-01-01", seed=3)
days = prices.index.get_level_values("datetime").unique().sort_values()


def write_store(root: Path) -> None:
    (root / "calendars").mkdir(parents=True)
    (root / "instruments").mkdir()
    (root / "calendars" / "day.txt").write_text(
        "\n".join(days.strftime("%Y-%m-%d"))
    )
    spans = []
    for code, rows in prices.groupby(level="instrument"):
        rows = rows.droplevel("instrument")
        rows = rows.reindex(
            days[(days >= rows.index[0]) & (days <= rows.index[-1])]
        )
        (root / "features" / code.lower()).mkdir(parents=True)
        for field in rows:
            values = np.concatenate(
                [[days.get_loc(rows.index[0])], rows[field]]
            ).astype("<f4")
            values.tofile(root / "features" / code.lower() / f"{field}.day.bin")
        spans.append(
            f"{code}\t{rows.index[0]:%Y-%m-%d}\t{rows.index[-1]:%Y-%m-%d}"
        )
    for market in ("all", "csi300"):
        (root / "instruments" / f"{market}.txt").write_text("\n".join(spans))


write_store(Path("qlib_data"))
print(
    sorted(path.name for path in Path("qlib_data", "features", "s00").iterdir())
)

# %% [markdown]
# ## The workflow file
#
# This file has the form of Qlib's benchmark files for the LSTM on Alpha158: Qlib's module paths, a market, processors,
# a learner and three records. Nothing in it mentions qfast.

# %%
workflow = """
qlib_init:
    provider_uri: qlib_data
    region: cn
market: &market csi300
benchmark: &benchmark SH000300
data_handler_config: &data_handler_config
    start_time: 2018-01-01
    end_time: 2019-11-29
    fit_start_time: 2018-01-01
    fit_end_time: 2019-03-29
    instruments: *market
    infer_processors:
        - class: FilterCol
          kwargs:
              fields_group: feature
              col_list: [RESI5, RESI10, ROC5, ROC10, STD5, CORR5, KLEN, KLOW]
        - class: RobustZScoreNorm
          kwargs: {fields_group: feature, clip_outlier: true}
        - class: Fillna
          kwargs: {fields_group: feature}
    learn_processors:
        - class: DropnaLabel
        - class: CSRankNorm
          kwargs: {fields_group: label}
    label: ["Ref($close, -2) / Ref($close, -1) - 1"]
task:
    model:
        class: LSTM
        module_path: qlib.contrib.model.pytorch_lstm_ts
        kwargs: {d_feat: 8, hidden_size: 16, num_layers: 2, dropout: 0.0,
                 n_epochs: 4, lr: 2e-3, early_stop: 10, batch_size: 400,
                 metric: loss, loss: mse, n_jobs: 20, GPU: 0, seed: 0}
    dataset:
        class: TSDatasetH
        module_path: qlib.data.dataset
        kwargs:
            handler:
                class: Alpha158
                module_path: qlib.contrib.data.handler
                kwargs: *data_handler_config
            segments:
                train: [2018-01-01, 2019-03-29]
                valid: [2019-04-01, 2019-07-31]
                test: [2019-08-01, 2019-11-29]
            step_len: 20
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
                  strategy:
                      class: TopkDropoutStrategy
                      module_path: qlib.contrib.strategy
                      kwargs: {signal: <PRED>, topk: 6, n_drop: 2}
                  backtest:
                      start_time: 2019-08-01
                      end_time: 2019-11-28
                      account: 1000000
                      benchmark: *benchmark
                      exchange_kwargs:
                          limit_threshold: 0.095
                          deal_price: close
                          open_cost: 0.0005
                          close_cost: 0.0015
                          min_cost: 5
"""
Path("workflow.yaml").write_text(workflow)
print(len(workflow.splitlines()), "lines")

# %% [markdown]
# ## Run it unmodified
#
# On the command line this is `qfast run workflow.yaml`. qfast reads the prices from `provider_uri`, computes the
# factors, trains, scores, and trades on the scores. It has no worker processes, so it accepts and ignores `n_jobs`.

# %%
result = qfast.run(
    "workflow.yaml",
    output="runs/unmodified",
    progress=False,
)
print(
    pd.DataFrame(result.metrics).T[["IC", "ICIR", "Rank IC", "days"]].round(3)
)

# %% [markdown]
# ## The one changed line
#
# To make the choice visible, or to run the file with Qlib's own `qrun`, name qfast's module. A Qlib module whose name
# ends in `_ts` becomes `qfast.models.ts`, and any other becomes `qfast.models`.

# %%
changed = workflow.replace(
    "qlib.contrib.model.pytorch_lstm_ts", "qfast.models.ts"
)
lines = difflib.unified_diff(
    workflow.splitlines(),
    changed.splitlines(),
    "qlib",
    "qfast",
    n=2,
    lineterm="",
)
print("\n".join(lines))

# %% [markdown]
# ## The same in Python
#
# Constructors, `fit` and `predict` are Qlib's, so a script changes its imports and keeps the rest:
#
# ```diff
# -from qlib.contrib.data.handler import Alpha158
# -from qlib.contrib.model.pytorch_lstm_ts import LSTM
# -from qlib.data.dataset import TSDatasetH
# +from qfast.data import Alpha158, TSDatasetH
# +from qfast.models.ts import LSTM
# ```
#
# Instead of `qlib.init(provider_uri=...)`, the handler receives the data. The scores equal those of the workflow.

# %%
kwargs = qfast.load("runs/unmodified").config["task"]["dataset"]["kwargs"]
handler = Alpha158(data="qlib_data", **kwargs["handler"]["kwargs"])
dataset = TSDatasetH(handler, kwargs["segments"], step_len=20)
sizes = {
    "d_feat": 8,
    "hidden_size": 16,
    "num_layers": 2,
    "batch_size": 400,
    "n_epochs": 4,
    "lr": 2e-3,
    "seed": 0,
}
model = LSTM(**sizes, metric="loss", progress=False).fit(dataset)
difference = model.predict(dataset, "test") - result.model.predict(
    result.dataset, "test"
)
print("largest difference of the scores:", difference.abs().max())

# %% [markdown]
# ## Weights
#
# The weights have Qlib's names, so files work in both directions. `load_weights` reads files that Qlib has saved with
# `torch.save`, and reads tensors only, never code.

# %%
print(list(model.network.state_dict())[:4])
torch.save(model.network.state_dict(), "qlib_style.pkl")
again = LSTM(**sizes, progress=False)
again.load_weights("qlib_style.pkl")
print(
    "equal scores:",
    again.predict(dataset, "test").equals(model.predict(dataset, "test")),
)

# %% [markdown]
# ## compat="qlib"
#
# qfast corrects some behaviour of Qlib on purpose. `compat="qlib"` restores it, to compare with Qlib's numbers. Without
# dropout, the LSTM has nothing to restore, so both settings agree up to rounding. With dropout, qfast draws other masks
# than Qlib, from the same distribution, and `compat="qlib"` reproduces Qlib's masks with torch's own layers.

# %%
scores = {}
for dropout in (0.0, 0.3):
    for compat in (None, "qlib"):
        fitted = LSTM(
            **sizes, dropout=dropout, compat=compat, progress=False
        ).fit(dataset)
        scores[dropout, compat] = fitted.predict(dataset, "test")
        valid = fitted.history_["valid"].round(4).tolist()
        print(f"dropout {dropout}, compat {compat!s:5} valid by epoch: {valid}")

# %% alt="Scores of qfast against scores with compat='qlib', without dropout on the diagonal, with dropout around it."
figure, panels = plt.subplots(1, 2, figsize=(8, 3.6), layout="constrained")
for panel, dropout in zip(panels, (0.0, 0.3), strict=True):
    panel.scatter(scores[dropout, None], scores[dropout, "qlib"], s=4)
    panel.axline((0, 0), slope=1, color="grey", linewidth=0.8)
    panel.set(
        title=f"test scores, dropout {dropout}",
        xlabel="qfast",
        ylabel='compat="qlib"',
    )
plt.show()

# %% [markdown]
# With other masks, training follows another random path, as with another seed. Neither model is better.
#
# ## What differs
#
# [Parity with Qlib](../parity.md) lists everything, each line with its test. The differences that you may notice:
#
# - NaN in a training feature raises an error that names the column. Qlib trains on until the weights are NaN. (The flat
#   GRU drops such rows in both.)
# - A misspelled argument raises an error. Qlib ignores it.
# - Time-series GATs trains on true days. In Qlib a "day" mixes dates ([GATs](../gats.md)).
# - ALSTM builds the `rnn_type` that you request. Qlib always builds a GRU.
# - Time-series TCN predicts on the windows that it was trained on. In Qlib, `predict` omits a transpose.

# %%
try:
    LSTM(hiden_size=16)
except qfast.QfastError as error:
    print(error)

# %% [markdown]
# ## With pyqlib installed
#
# Nothing above needs pyqlib. With it, Qlib's own handlers, records and recorder work too: change the line and run
# `qrun workflow.yaml`, or run `qfast run workflow.yaml --engine qlib`, which changes it for you.

# %%
if importlib.util.find_spec("qlib") is None:
    print(
        "pyqlib is not installed, so qrun and --engine qlib cannot run. "
        "Remedy: pip install 'qfast-models[qlib]'"
    )

# %%
os.chdir(start)
folder.cleanup()

# %% [markdown]
# ## What to read next
#
# - [Parity with Qlib](../parity.md): what is equal and what differs
# - [Workflows](../workflow.md): your own classes, data loaders and filters in workflow files; the backtest
# - [Data](../data.md): Qlib data folders and all other sources
