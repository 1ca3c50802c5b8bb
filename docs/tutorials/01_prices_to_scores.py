# %% [markdown]
# # Prices to scores in ten minutes
#
# You have a table of daily prices. At the end of this page you have a trained model, a report on it, and a score for
# every stock for tomorrow. The prices come from a synthetic market, so everything runs in seconds. Replace the file by
# your own, and the same calls work.

# %%
import logging
import os
import shutil
import tempfile
import textwrap
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

import qfast
from qfast.data import synthetic
from qfast.metrics import daily_ic
from qfast.workflow.demo import DEMO

logging.getLogger("qfast").setLevel(
    logging.ERROR
)  # a run logs what it does; this page does not show it
plt.rcParams["figure.facecolor"] = "white"
start, folder = os.getcwd(), tempfile.TemporaryDirectory()
os.chdir(folder.name)  # everything below is written here and removed at the end

# %% [markdown]
# ## The prices
#
# One row per stock and day. The columns have their usual names, and the rows may be in any order. CSV, Parquet, pandas
# frames and Qlib data folders [work alike](../data.md).
#
# This market has a planted signal: stocks that have fallen for five days tend to rise. The correlation of the signal
# with the next return is 0.15, which is far more than real markets offer.

# %%
market = synthetic.prices(32, 600, ic=0.15, start="2018-01-01", seed=1)
today = pd.Timestamp("2020-04-16")
prices = market[market.index.get_level_values("datetime") <= today]
prices.reset_index().to_csv("prices.csv", index=False)
print(pd.read_csv("prices.csv", nrows=5).round(2).to_string(index=False))

# %% [markdown]
# ## The workflow file
#
# A workflow file in Qlib's format describes data, model and evaluation. qfast contains a small one to copy. It trains
# an LSTM on the last 60 days of prices of each stock (Alpha360).

# %%
shutil.copy(DEMO, "workflow.yaml")
text = Path("workflow.yaml").read_text()
print("...\n\n" + text[text.index("task:") : text.index("  record:")])

# %% [markdown]
# ## Check
#
# `qfast.check` looks for problems without training. `ok` is good, a `note` is information, and a `warning` deserves a
# look. The look-ahead experiments change all prices after a day. No score up to that day may change.

# %%
report = qfast.check("workflow.yaml", data="prices.csv")
for finding in report.findings:
    if finding.level == "warning" or finding.topic == "look-ahead":
        text = f"{finding.level}, {finding.topic}: {finding.text}"
        print(textwrap.fill(text, 80), end="\n\n")
print("no errors:", report.ok)

# %% [markdown]
# Read the warning: the first days lack values, because Alpha360 looks back 60 days. The processors fill them.
#
# There is no warning about the *horizon*: the label of a day is a return that ends two days later, and this file leaves
# two trading days between the segments. Otherwise the last labels of train would be returns of valid.
#
# ## Run
#
# `sets` changes values of the file, like `--set` of the command line. The network is smaller than the demo's, to save
# time.

# %%
sets = [
    "task.model.kwargs.hidden_size=16",
    "task.model.kwargs.n_epochs=4",
    "task.model.kwargs.lr=0.003",
]
result = qfast.run(
    "workflow.yaml", data="prices.csv", sets=sets, seed=0, output="runs/first",
    progress=False,
)  # fmt: skip
print(result.model.history_[["train_loss", "train", "valid"]].round(4))
print("best epoch:", result.model.best_epoch_)

# %% [markdown]
# `train` and `valid` are scores, higher is better. Here they are minus the loss. The labels have a variance of about 1
# (they are ranks, normalized by day), so a loss slightly below 1 is what a weak signal looks like. The model has the
# weights of the best epoch on *valid*.
#
# ## Read the IC
#
# The information coefficient (IC) of a day is the correlation of the scores with the returns that follow, over the
# stocks of that day. The rank IC uses ranks instead, so single large returns matter less. Look at segment *test*,
# which the training has not seen.

# %%
metrics = pd.DataFrame(result.metrics).T
print(metrics[["IC", "ICIR", "Rank IC", "Rank ICIR", "days"]].round(3))

# %% [markdown]
# - The mean IC says how strong the signal is. The planted signal has 0.15, so a model cannot exceed this by more than
#   luck. On real daily prices the IC is far smaller. If you see 0.3, look for look-ahead.
# - ICIR is the mean of the daily ICs divided by their standard deviation. It says how steady the signal is.
# - The standard error of the mean is the standard deviation divided by the square root of the number of days. A mean
#   below two standard errors is not evidence of anything.

# %%
daily = pd.read_csv(result.path / "daily.csv", parse_dates=["datetime"])
ic = daily[daily["segment"] == "test"].set_index("datetime")["ic"].dropna()
error = ic.std() / np.sqrt(len(ic))
print(f"mean IC {ic.mean():.3f} ± {error:.3f} over {len(ic)} days")
print(f"positive on {(ic > 0).mean():.0%} of them")

# %% [markdown]
# One day is almost noise, and the sum over days is not. On the left, the day whose IC is closest to the mean; on the
# right, the cumulative IC.

# %% alt="Left: scores of one day and the returns that follow. Right: cumulative IC of the segment test."
scores = result.model.predict(result.dataset, "test")
returns = result.dataset.prepare("test", col_set="label", data_key="raw").iloc[
    :, 0
]
assert np.allclose(
    daily_ic(scores, returns)[0].dropna(), ic, atol=1e-6
)  # the same ICs, computed here
day = (ic - ic.mean()).abs().idxmin()

figure, (left, right) = plt.subplots(
    1, 2, figsize=(9, 3.2), layout="constrained"
)
left.scatter(
    scores.xs(day), 100 * returns.xs(day).reindex(scores.xs(day).index), s=14
)
left.set(
    title=f"{day:%Y-%m-%d}: IC {ic[day]:.2f}",
    xlabel="score",
    ylabel="return that follows, %",
)
right.plot(ic.cumsum().to_numpy(), label="model")
right.plot(0.15 * np.arange(1, len(ic) + 1), "--", label="planted signal")
right.set(title="cumulative IC, segment test", xlabel="trading day")
right.legend()
plt.show()

# %% [markdown]
# ## The report
#
# The run folder contains a report page with these plots, the portfolio backtest and the settings. Open `report.html`
# in a browser.

# %%
print(sorted(path.name for path in result.path.iterdir()))
trading = pd.Series(result.portfolio)
print(
    trading.filter(like="excess_return_with_cost")
    .rename(lambda name: name.split(".")[-1])
    .round(4)
    .to_string()
)

# %% [markdown]
# ## Tomorrow's scores
#
# A day has passed, and the newest prices have arrived. They need no label. `qfast.predict` uses the weights and the
# fitted processors of the run and fits nothing again.

# %%
market[
    market.index.get_level_values("datetime") <= today + pd.Timedelta(days=1)
].to_csv("newest_prices.csv")
tomorrow = qfast.predict("runs/first", data="newest_prices.csv", date="latest")
print(tomorrow.sort_values(ascending=False).head().round(3).to_string())

# %% [markdown]
# The score of a day uses prices up to the close of that day. It ranks the stocks by their expected return from the next
# close to the one after it. Only the order has a meaning, not the level.
#
# The same three steps on the command line:
#
# ```sh
# qfast check workflow.yaml --data prices.csv
# qfast run workflow.yaml --data prices.csv --seed 0 --output runs/first
# qfast predict runs/first --data newest_prices.csv --date latest --out tomorrow.csv
# ```

# %%
os.chdir(start)
folder.cleanup()

# %% [markdown]
# ## What to read next
#
# - [Workflows](../workflow.md): everything about `check`, `run`, `predict` and run folders
# - [Results in Python](../results.md): scores, daily IC and finished runs
# - [Data](../data.md): your own files, columns, dates and time zones
# - [Studies](../studies.md): many seeds instead of one, because one run says little
