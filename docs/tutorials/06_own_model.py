# %% [markdown]
# # Your own model on the operators
#
# qfast's operators are PyTorch functions with gradients. This page builds a new network on three of them, trains it
# with qfast's training loop, and uses it in a workflow file like a built-in model.

# %%
import inspect
import logging
import os
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import nn

import qfast
from qfast.data import TSDatasetH, synthetic
from qfast.data.batching import LoaderOrder
from qfast.metrics import daily_ic
from qfast.ops import attention_pool, build_window_index, gather_windows, lstm
from qfast.training import Estimator

logging.getLogger("qfast").setLevel(logging.ERROR)
plt.rcParams["figure.facecolor"] = "white"
start, folder = os.getcwd(), tempfile.TemporaryDirectory()
os.chdir(folder.name)

# %% [markdown]
# ## Operator 1: gather windows
#
# A model reads the last T days of a stock. Instead of storing all windows, qfast stores each row once, and
# `gather_windows` copies the windows of a batch. Rows are sorted by stock, then by day.

# %%
frame = synthetic.factors(40, 200, 6, ic=0.25, missing=0.0, seed=3)
rows = frame.swaplevel().sort_index()
stock_codes = rows.index.codes[0]
day_codes = rows.index.codes[1]
panel = torch.from_numpy(rows["feature"].to_numpy(copy=True))
index = build_window_index(stock_codes, day_codes)
x = gather_windows(panel, index, torch.tensor([100, 101, 5000]), step_len=10)
print(tuple(panel.shape), "->", tuple(x.shape))

# %% [markdown]
# Windows 100 and 101 belong to one stock and overlap. Where a stock has no row on a day, the window repeats its last
# row, as in Qlib (`fill`). You rarely call this yourself: the training loop gathers every batch.

# %%
print(torch.equal(x[0, 1:], x[1, :-1]))

# %% [markdown]
# ## Operators 2 and 3: LSTM and attention over time
#
# The network runs an LSTM over the window, and predicts from its last step and from a weighted mean of all steps.
# `nn.LSTM` stores the weights, because its initial values and names are familiar. The operators compute.


# %%
class AttentionNetwork(nn.Module):
    """[B, T, F] -> [B]: an LSTM, and attention over its steps."""

    def __init__(self, d_feat, hidden_size):
        super().__init__()
        self.rnn = nn.LSTM(d_feat, hidden_size, batch_first=True)
        self.key = nn.Linear(hidden_size, hidden_size // 2)
        self.score = nn.Linear(hidden_size // 2, 1, bias=False)
        self.out = nn.Linear(2 * hidden_size, 1)

    def forward(self, x):
        steps, _ = lstm(x, self.rnn.all_weights, all_steps=True)
        pooled = attention_pool(
            steps, self.key.weight, self.key.bias, self.score.weight
        )
        return self.out(torch.cat([steps[:, -1], pooled], dim=1)).squeeze(1)


# %% [markdown]
# Test a new network against plain torch, values and gradients:

# %%
torch.manual_seed(0)
network = AttentionNetwork(6, 16)
steps = network.rnn(x)[0]
weights = network.score(torch.tanh(network.key(steps))).softmax(dim=1)
plain = network.out(
    torch.cat([steps[:, -1], (weights * steps).sum(1)], dim=1)
).squeeze(1)
ours = network(x)
parameters = list(network.parameters())
gradients = [
    torch.autograd.grad(value.square().sum(), parameters)
    for value in (ours, plain)
]
print(f"values differ by at most {(ours - plain).abs().max():.0e}")
errors = [(a - b).abs().max() for a, b in zip(*gradients, strict=True)]
print(f"gradients by at most {max(errors):.0e}")

# %% [markdown]
# ## The model
#
# A subclass of `Estimator` adds everything else: batches, scores, early stopping, checkpoints, callbacks, prediction.
# It names the network, passes the network's arguments as a dictionary, and all others by name. `LoaderOrder` is the
# order of batches of Qlib's time-series models.


# %%
class AttentionLSTM(Estimator):
    """`AttentionNetwork` in the training loop of qfast."""

    network_class = AttentionNetwork
    order = LoaderOrder()

    def __init__(self, d_feat=6, hidden_size=16, batch_size=400, **options):
        super().__init__(
            {"d_feat": d_feat, "hidden_size": hidden_size},
            batch_size=batch_size,
            **options,
        )


# %%
days = frame.index.get_level_values("datetime").unique().sort_values()
segments = {
    "train": (days[9], days[119]),
    "valid": (days[122], days[149]),
    "test": (days[152], days[199]),
}
dataset = TSDatasetH(handler=frame, segments=segments, step_len=10)
model = AttentionLSTM(
    n_epochs=8, lr=3e-3, early_stop=3, seed=0, progress=False
).fit(dataset)
print(model.history_[["train_loss", "train", "valid"]].round(4))
ic = daily_ic(model.predict(dataset, "test"), frame["label", "LABEL0"])[
    0
].dropna()
error = ic.std() / np.sqrt(len(ic))
print(f"best epoch {model.best_epoch_}, test IC {ic.mean():.3f} ± {error:.3f}")

# %% [markdown]
# ## Which days does it read?
#
# The operators have gradients, also with respect to the windows. The size of the gradient says how much a score changes
# with the factors of a day.

# %% alt="Bars of the mean size of the gradient for each of the ten days of the window."
test = gather_windows(
    panel, index, torch.arange(0, len(panel), 7), step_len=10
).requires_grad_()
(gradient,) = torch.autograd.grad(model.network(test).sum(), test)  # [B, T, F]
figure, axes = plt.subplots(figsize=(7, 3), layout="constrained")
axes.bar(np.arange(-9, 1), gradient.abs().mean(dim=(0, 2)))
axes.set(
    title="mean size of the gradient by day of the window",
    xlabel="days before today",
    ylabel="|d score / d factor|",
)
plt.show()

# %% [markdown]
# The planted signal contains the factors of today, and their change over the last five days. The network reads mostly
# today.
#
# ## In a workflow file, from Python
#
# `register_model` lets workflow files of this process name the class. `class` and `module_path` are what you register.

# %%
qfast.register_model(AttentionLSTM, module_path="my_models")
Path("workflow.yaml").write_text(f"""
experiment_name: own
task:
  model:
    class: AttentionLSTM
    module_path: my_models
    kwargs: {{d_feat: 6, hidden_size: 16, n_epochs: 3, lr: 3e-3, seed: 0,
             progress: false}}
  dataset:
    class: TSDatasetH
    kwargs:
      handler: {{class: DataHandlerLP, kwargs: {{learn_processors: [DropnaLabel]}}}}
      segments:
        train: [{days[9]:%Y-%m-%d}, {days[119]:%Y-%m-%d}]
        valid: [{days[122]:%Y-%m-%d}, {days[149]:%Y-%m-%d}]
        test: [{days[152]:%Y-%m-%d}, {days[199]:%Y-%m-%d}]
      step_len: 10
  record: [{{class: SignalRecord}}]
""")
first = qfast.run("workflow.yaml", frame, output="runs/registered")
print(
    {
        segment: round(values["IC"], 4)
        for segment, values in first.metrics.items()
    }
)

# %% [markdown]
# ## In a workflow file, from the command line
#
# The command line has no process of yours. Put the two classes into a file, and permit it with `--allow-code`:
#
# ```sh
# qfast run workflow.yaml --data factors.parquet --allow-code my_models.py
# ```
#
# A workflow file alone never imports code. Here the same from Python, with the source of the classes above.

# %%
Path("own_file.py").write_text(f"""
import torch
from torch import nn

from qfast.data.batching import LoaderOrder
from qfast.ops import attention_pool, lstm
from qfast.training import Estimator


class AttentionNetwork(nn.Module):
{inspect.getsource(AttentionNetwork.__init__)}
{inspect.getsource(AttentionNetwork.forward)}

class AttentionLSTM(Estimator):
    network_class = AttentionNetwork
    order = LoaderOrder()

{inspect.getsource(AttentionLSTM.__init__)}
""")
second = qfast.run(
    "workflow.yaml",
    frame,
    sets=["task.model.module_path=own_file"],
    allow_code="own_file.py",
    output="runs/from_file",
)
print(
    {
        segment: round(values["IC"], 4)
        for segment, values in second.metrics.items()
    }
)

# %% [markdown]
# The run folder records the file and its hash. Later commands on the run need the permission again:

# %%
try:
    qfast.load("runs/from_file")
except qfast.QfastError as error:
    print(str(error).replace(f"{folder.name}/", ""))
saved = qfast.load("runs/from_file", allow_code="own_file.py")
print(type(saved.model).__name__)

# %%
os.chdir(start)
folder.cleanup()

# %% [markdown]
# ## What to read next
#
# - [Training](../training.md): a model of your own, its losses and its callbacks
# - [LSTM and GRU](../recurrent.md), [ALSTM](../alstm.md) and [encoder layers](../encoder.md): the operators
# - [Developing qfast](../developing.md): the stages of the loop that a model may override; adding an operator
