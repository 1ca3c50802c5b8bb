# %% [markdown]
# # A rolling study
#
# Markets change, so models are trained again every few weeks. `qfast.study` does this for a test period: it trains one
# model per window and tests each on the days that follow. This page shows a market that changes on a known day, and
# what a rolling study makes of it, month by month.

# %%
import logging
import os
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

import qfast
from qfast.data import synthetic

logging.getLogger("qfast").setLevel(logging.ERROR)
plt.rcParams["figure.facecolor"] = "white"
start, folder = os.getcwd(), tempfile.TemporaryDirectory()
os.chdir(folder.name)

# %% [markdown]
# ## A market that changes
#
# We join two synthetic markets of 50 stocks and 6 factors. Both have a planted IC of 0.25, but in the second one, other
# combinations of the factors predict the returns.

# %%
whole = {"late": 0.0, "delisted": 0.0, "holes": 0.0, "missing": 0.0}
before = synthetic.factors(
    50, 170, 6, ic=0.25, seed=1, start="2022-01-03", **whole
)
change = before.index.get_level_values("datetime").max() + pd.offsets.BDay()
after = synthetic.factors(50, 130, 6, ic=0.25, seed=7, start=change, **whole)
frame = pd.concat([before, after])
first, last = frame.index[0][0], frame.index[-1][0]
print(
    f"{first:%Y-%m-%d} to {last:%Y-%m-%d}, the change is on {change:%Y-%m-%d}"
)

# %% [markdown]
# ## The workflow
#
# The handler `DataHandlerLP` reads a table of finished factors. The first window has the segments of the file. Later
# windows follow until the end of the segment test. It trains on three months.

# %%
_ = Path("workflow.yaml").write_text("""
experiment_name: rolling
task:
  model:
    class: GRU
    module_path: qfast.models.ts
    kwargs: {d_feat: 6, hidden_size: 16, num_layers: 1, n_epochs: 5, lr: 3e-3,
             batch_size: 400, early_stop: 3, progress: false, seed: 0}
  dataset:
    class: TSDatasetH
    kwargs:
      handler:
        class: DataHandlerLP
        kwargs:
          learn_processors:
            - DropnaLabel
            - {class: CSRankNorm, kwargs: {fields_group: label}}
      segments:
        train: [2022-03-01, 2022-05-31]
        valid: [2022-06-01, 2022-06-30]
        test: [2022-07-01, 2023-02-23]
      step_len: 8
  record: [{class: SignalRecord}]
""")

# %% [markdown]
# ## One model for all eight months

# %%
static = qfast.run("workflow.yaml", frame, output="runs/static")
print(pd.DataFrame(static.metrics).T[["IC", "ICIR", "days"]].round(3))

# %% [markdown]
# ## A new model every 34 days
#
# `rolling=34` slides all segments by 34 trading days. The segments train and valid are cut, so no label reads a price
# after the first day of the test segment. The labels of this table are columns, so `label_days` says how far they look
# ahead. For a label expression, qfast computes it. `on="inline"` uses this process; the default uses all cores.

# %%
study = qfast.study(
    "workflow.yaml",
    frame,
    rolling=34,
    label_days=2,
    on="inline",
    quiet=True,
    output="studies/rolling",
)
columns = ["window", "test_start", "test_end", "status", "valid.ic", "test.ic"]
print(study.table[columns].round(3).to_string(index=False))

# %% [markdown]
# Each window is an ordinary run folder in `runs/`. The folder `rolling/` contains the scores of all windows as one
# segment, and their daily IC.

# %%
(all_windows,) = Path("studies/rolling/rolling").iterdir()
print(all_windows.name, sorted(path.name for path in all_windows.iterdir()))

# %% [markdown]
# ## IC by month


# %%
def monthly_ic(run: Path) -> pd.Series:
    daily = pd.read_csv(run / "daily.csv", parse_dates=["datetime"])
    ic = daily[daily["segment"] == "test"].set_index("datetime")["ic"]
    return ic.groupby(ic.index.to_period("M")).mean()


months = pd.DataFrame(
    {"one model": monthly_ic(static.path), "rolling": monthly_ic(all_windows)}
)
print(months.round(3))

# %% alt="Mean daily IC by month of one model and of rolling windows; a line marks the change."
figure, panel = plt.subplots(figsize=(8, 3.2), layout="constrained")
months.set_axis(months.index.strftime("%b %Y")).plot.bar(
    ax=panel, rot=0, width=0.75
)
panel.axvline(
    list(months.index).index(change.to_period("M")) + 0.5,
    color="black",
    linestyle=":",
)
panel.axhline(0, color="grey", linewidth=0.8)
panel.set(
    title="mean daily IC by month; dotted: the market changes",
    xlabel="",
    ylabel="IC",
)
plt.show()

# %% [markdown]
# After the change, the single model loses its signal. The rolling study recovers after the change has entered its
# training segments, which takes months, because they still contain the old market. A shorter training segment recovers
# earlier and is noisier before the change.
#
# ## Choices
#
# - `expanding=True` keeps the first day of the training segment, and here would recover even later.
# - `warm_start=True` begins each window with the weights of the previous one, which saves epochs.
# - `seeds=5` trains each window with five seeds. Their ensemble is in `ensembles/`.
#
# The same on the command line:
#
# ```sh
# qfast study workflow.yaml --data factors.parquet --rolling 34 --label-days 2 --output studies/rolling
# qfast study --resume studies/rolling    # after an interrupt; finished windows remain
# ```

# %%
summary = study.summary[["runs", "IC", "ICIR", "Rank IC"]]
print(summary.round(3).to_string())

# %%
os.chdir(start)
folder.cleanup()

# %% [markdown]
# ## What to read next
#
# - [Studies](../studies.md): seeds, grids, searches, clusters, the study folder
# - [Workflows](../workflow.md): run folders, and starting from the weights of another run
# - [Scale](../scale.md): memory and time of a large market
