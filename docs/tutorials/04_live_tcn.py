# %% [markdown]
# # A TCN that is updated live
#
# Every evening one new row per stock arrives. A TCN can score it from that row alone, because a stream stores what the
# network still needs from the past. This page trains a TCN, starts a stream, and compares its scores with `predict`.

# %%
import logging
import os
import tempfile
import time

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch

from qfast.data import TSDatasetH, synthetic
from qfast.models.ts import TCN
from qfast.ops import temporal_conv_net

logging.getLogger("qfast").setLevel(logging.ERROR)
plt.rcParams["figure.facecolor"] = "white"
start, folder = os.getcwd(), tempfile.TemporaryDirectory()
os.chdir(folder.name)

# %% [markdown]
# ## Choose windows of the receptive field
#
# A stream remembers everything before today, and a window does not. Both agree if the window is at least as long as the
# receptive field, beyond which the network cannot look. `plan` computes it, and shows how few of the products the last
# step needs.

# %%
kernel_size, num_layers = 3, 3
plan = temporal_conv_net.plan(32, kernel_size, num_layers)
print(plan)

# %% [markdown]
# The receptive field is 29 steps, so windows of 32 days suffice.
#
# ## Train

# %%
frame = synthetic.factors(
    30, 220, 6, ic=0.2, late=0.0, delisted=0.0, holes=0.0, missing=0.0, seed=4
)
days = frame.index.get_level_values("datetime").unique().sort_values()
segments = {
    "train": (days[31], days[139]),
    "valid": (days[142], days[169]),
    "live": (days[180], days[219]),
}
dataset = TSDatasetH(handler=frame, segments=segments, step_len=32)
model = TCN(
    d_feat=6, n_chans=16, kernel_size=kernel_size, num_layers=num_layers,
    dropout=0.1, n_epochs=4, lr=3e-3, batch_size=400, seed=0, progress=False,
).fit(dataset)  # fmt: skip
print(model.history_[["train_loss", "valid"]].round(4))

# %% [markdown]
# ## Start the stream
#
# `warm_start` reads the history up to yesterday as an array of stocks x factors x days, the newest day last. Features
# of a real market must be processed as in training; `dataset.handler.fetch(..., data_key="infer")` returns them.

# %%
features = frame["feature"].unstack(
    "instrument"
)  # columns (factor, instrument)
stocks = frame.index.get_level_values("instrument").unique().tolist()
array = np.stack(
    [features[name][stocks].to_numpy() for name in frame["feature"]], axis=1
)  # [days, F, N]
history = torch.from_numpy(array).permute(2, 1, 0).contiguous()  # [N, F, days]

first_live = days.get_loc(segments["live"][0])
stream = model.network.eval().stream()
stream.warm_start(history[:, :, :first_live], stocks)
print(stream)

# %% [markdown]
# ## Score new days
#
# Each evening, `push` receives one row per stock and returns one score per stock. Here 40 evenings pass at once.

# %%
rows, seconds = {}, []
for position in range(first_live, len(days)):
    begin = time.perf_counter()
    scores = stream.push(history[:, :, position], stocks)
    seconds.append(time.perf_counter() - begin)
    rows[days[position]] = scores.numpy()
live = pd.DataFrame(rows, index=stocks).T
milliseconds = 1000 * np.median(seconds)
print(f"median time of a day with {len(stocks)} stocks: {milliseconds:.2f} ms")

# %% [markdown]
# `predict` scores the same days from windows. The scores agree up to rounding.

# %%
windows = model.predict(dataset, "live").unstack("instrument")[stocks]
print(
    f"largest difference: {np.abs(live.to_numpy() - windows.to_numpy()).max():.1e}"
)

# %% alt="Scores of three stocks over forty days: the points of the stream are on the lines of predict."
figure, panel = plt.subplots(figsize=(8, 3.2), layout="constrained")
for stock, colour in zip(stocks[:3], ("C0", "C1", "C2"), strict=True):
    panel.plot(
        windows[stock], color=colour, linewidth=1.5, label=f"{stock}: predict"
    )
    panel.plot(
        live[stock], "o", color=colour, markersize=3.5, label=f"{stock}: stream"
    )
panel.set(title="scores of three stocks", ylabel="score")
panel.legend(ncols=3, fontsize=8)
plt.show()

# %% [markdown]
# ## New, suspended and delisted stocks
#
# Each stock has its own time. A stock without a row today is left out, and its state does not change. A new name starts
# without a past, like a window that is padded with zeros. `forget` removes a name.

# %%
today = history[:, :, -1]
stream.push(today[:2], stocks[:2])  # all other stocks are suspended
stream.push(today[:1], ["NEW"])
stream.forget([stocks[-1]])
print(stream)
seen = dict(zip(stream.instruments, stream.seen.tolist(), strict=True))
print({name: seen[name] for name in (stocks[0], stocks[2], "NEW")})

# %% [markdown]
# ## Overnight
#
# The state is a dictionary for `torch.save`. It belongs to the weights: a stream of a retrained model refuses it, and
# starts again with `warm_start`.

# %%
torch.save(stream.state_dict(), "state.pt")
tomorrow = model.network.stream()
tomorrow.load_state_dict(torch.load("state.pt"))
print(
    "same scores:",
    torch.equal(
        tomorrow.push(today[:2], stocks[:2]), stream.push(today[:2], stocks[:2])
    ),
)

# %% [markdown]
# ## If your windows are shorter
#
# Qlib's TCN workflows use windows of 20 and 60 days with receptive fields of 373 and 125. Such a network has learned
# from steps that saw zeros before the window, and a stream shows it rows instead. Its scores then differ. Train on
# longer windows, use fewer layers, or score windows with `predict`.

# %%
short = TSDatasetH(handler=frame, segments=segments, step_len=12)
cut = model.predict(short, "live").unstack("instrument")[stocks]
differences = np.abs(live.to_numpy() - cut.to_numpy())
print(f"windows of 12 days: largest difference {differences.max():.3f}")
print(f"standard deviation of the scores: {live.to_numpy().std():.3f}")

# %%
os.chdir(start)
folder.cleanup()

# %% [markdown]
# ## What to read next
#
# - [TCN](../tcn.md): the operator, streams in detail, memory per stock
# - [Workflows](../workflow.md): `qfast predict` scores new days with any model
# - [Scale](../scale.md): memory and time of a large market
