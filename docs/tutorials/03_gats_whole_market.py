# %% [markdown]
# # GATs on a whole market, and what a day means
#
# GATs scores all stocks of a day together: each stock attends to the others. This page shows what its batches are, how
# the cost grows with the market, how the base is trained first, and where the model looks.

# %%
import logging
import os
import tempfile
import time

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch

from qfast import Callback
from qfast.data import TSDatasetH, synthetic
from qfast.metrics import daily_ic
from qfast.models.ts import GATs
from qfast.ops import graph_attention

logging.getLogger("qfast").setLevel(logging.ERROR)
plt.rcParams["figure.facecolor"] = "white"
start, folder = os.getcwd(), tempfile.TemporaryDirectory()
os.chdir(folder.name)

# %% [markdown]
# ## A market
#
# 60 stocks, 160 days, 6 factors and a label with a planted IC of 0.2. Some stocks are listed late or pause, so days
# have different numbers of stocks.

# %%
frame = synthetic.factors(60, 160, 6, ic=0.2, missing=0.0, seed=2)
days = frame.index.get_level_values("datetime").unique().sort_values()
segments = {
    "train": (days[0], days[99]),
    "valid": (days[102], days[124]),
    "test": (days[127], days[159]),
}
dataset = TSDatasetH(handler=frame, segments=segments, step_len=8)
print(
    frame.groupby(level="datetime")
    .size()
    .describe()[["min", "mean", "max"]]
    .round(1)
    .to_string()
)

# %% [markdown]
# ## A batch is a day
#
# A callback counts the optimizer steps of an epoch. There is one for each training day, so GATs has no batch size. The
# days are shuffled in each epoch, and the stocks of a day are never separated.


# %%
class CountSteps(Callback):
    steps = 0

    def on_batch_end(self, estimator):
        self.steps += 1


sizes = {
    "d_feat": 6,
    "hidden_size": 16,
    "num_layers": 1,
    "base_model": "LSTM",
    "seed": 0,
    "progress": False,
}
counter = CountSteps()
alone = GATs(**sizes, n_epochs=3, lr=2e-3).fit(dataset, callbacks=[counter])
print(counter.steps, "steps in", len(alone.history_), "epochs over 100 days")

# %% [markdown]
# ## What a day means in Qlib
#
# Qlib's time-series GATs cuts its rows into pieces as long as the days are, but the rows are sorted by stock. Its "day"
# is therefore one stock over many dates, and a score can see later dates. `compat="qlib"` reproduces this, so we can
# test it: change the features of the last day only, and count the earlier days whose scores change.

# %%
changed = frame.copy()
changed.loc[days[-1], "feature"] = (
    changed.loc[days[-1], "feature"].to_numpy() + 1
)
future = TSDatasetH(handler=changed, segments=segments, step_len=8)
for compat in (None, "qlib"):
    model = (
        alone
        if compat is None
        else GATs(**sizes, n_epochs=1, lr=2e-3, compat="qlib").fit(dataset)
    )
    before, after = (
        model.predict(data, "test").sort_index() for data in (dataset, future)
    )
    moved = (
        before.index[before.to_numpy() != after.to_numpy()]
        .get_level_values("datetime")
        .unique()
    )
    earlier = (moved < days[-1]).sum()
    print(
        f"compat={compat!s:5}: {earlier:2} earlier days depend on the last day"
    )

# %% [markdown]
# True days are the default. Use `compat="qlib"` to compare with Qlib's numbers, and never to trade.
#
# ## A whole market
#
# Qlib compares all N x N pairs of a day in a tensor of N x N x 2H numbers. qfast computes the same attention exactly in
# N log N time. Here is one day of the attention alone, forward and backward, for up to 16,000 stocks.

# %%
torch.set_num_threads(1)
numbers, hidden_size, milliseconds = [250, 1000, 4000, 16000], 64, []
weight, bias = torch.randn(2, hidden_size), torch.randn(2)
for stocks in numbers:
    hidden = torch.randn(stocks, hidden_size, requires_grad=True)
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        graph_attention(hidden, weight, bias).sum().backward()
        times.append(time.perf_counter() - begin)
    milliseconds.append(1000 * min(times))
gigabytes = [4 * n * n * 2 * hidden_size / 1e9 for n in numbers]
table = pd.DataFrame(
    {"ms, qfast": milliseconds, "GB of Qlib's tensor": gigabytes},
    pd.Index(numbers, name="stocks"),
)
print(table.round(2))

# %% [markdown]
# ## Train the base first
#
# A step of GATs is one day, so an epoch has few steps. Qlib trains the LSTM alone first, on shuffled samples, and so
# does `pretrain`. In a workflow file, this is the block `task: {pretrain: {n_epochs: 4, ...}}`.

# %%
model = GATs(**sizes, n_epochs=3, lr=2e-3)
base = model.pretrain(dataset, n_epochs=4, lr=3e-3, batch_size=400)
model.fit(dataset)
print("loaded from:", model.pretrained_["source"])
both = {"alone": alone.history_["valid"], "with base": model.history_["valid"]}
print(pd.DataFrame(both).round(4))

# %%
label = frame.loc[segments["test"][0] :, ("label", "LABEL0")]
for name, fitted in {
    "base LSTM": base,
    "GATs alone": alone,
    "GATs with base": model,
}.items():
    ic = daily_ic(fitted.predict(dataset, "test"), label)[0]
    print(
        f"{name:15} test IC {ic.mean():.3f} ± {ic.std() / np.sqrt(ic.count()):.3f}"
    )

# %% [markdown]
# The stocks of this market do not influence each other, so attention cannot add anything, and the three agree within
# their standard errors. On your data, compare GATs with its base before you pay for it.
#
# ## Where the model looks
#
# `attention` lists the neighbours with the largest weights, and `plot_attention` draws them.

# %%
day = days[140]
names = sorted(frame.loc[day].index)[:12]
print(
    model.attention(dataset, day, instruments=names[:3], top=2)
    .round(4)
    .to_string(index=False)
)

# %% alt="Attention weights of twelve stocks for their eight largest neighbours on one day."
model.plot_attention(dataset, day, "attention.png", names, top=8)
figure, panel = plt.subplots(figsize=(8, 5), layout="constrained")
panel.imshow(plt.imread("attention.png"))
panel.axis("off")
plt.show()

# %% [markdown]
# All stocks of a day rank their neighbours in the same order, and only the weights differ. This is a property of Qlib's
# attention: the score of a pair is a sum of one number per stock, and the activation after it preserves order.

# %%
os.chdir(start)
folder.cleanup()

# %% [markdown]
# ## What to read next
#
# - [GATs](../gats.md): three ways to pre-train, days with missing features, workflow files
# - [Attention in N log N](../attention.md): the derivation
# - [Scale](../scale.md): memory and time of a large market
