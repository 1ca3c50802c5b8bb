# %% [markdown]
# # Callbacks, early stopping, learning-rate schedules and sample weights
#
# All models share one training loop. This page stops it, schedules its learning rate, weights its samples, changes its
# loss, and continues it after an interrupt. It uses a small GRU on a synthetic market.

# %%
import importlib.util
import logging
import os
import tempfile

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch

from qfast import Callback
from qfast.data import TSDatasetH, synthetic
from qfast.metrics import daily_ic
from qfast.models.ts import GRU

logging.getLogger("qfast").setLevel(logging.ERROR)
plt.rcParams["figure.facecolor"] = "white"
start, folder = os.getcwd(), tempfile.TemporaryDirectory()
os.chdir(folder.name)

frame = synthetic.factors(80, 200, 6, ic=0.3, missing=0.0, seed=6)
days = frame.index.get_level_values("datetime").unique().sort_values()
segments = {
    "train": (days[7], days[119]),
    "valid": (days[122], days[149]),
    "test": (days[152], days[199]),
}
dataset = TSDatasetH(handler=frame, segments=segments, step_len=8)
small = {
    "d_feat": 6,
    "hidden_size": 16,
    "num_layers": 1,
    "batch_size": 800,
    "seed": 0,
    "progress": False,
}

# %% [markdown]
# ## Early stopping
#
# The fit ends after `early_stop` consecutive epochs without a better score on the segment *valid*. The model then has
# the weights of the best epoch. The learning rate is high on purpose, so the fit ends early.

# %%
plain = GRU(**small, n_epochs=20, lr=0.02, early_stop=3).fit(dataset)
print(plain.history_[["train_loss", "train", "valid"]].round(4))
print(f"{len(plain.history_)} of 20 epochs, best epoch {plain.best_epoch_}")

# %% [markdown]
# `train` and `valid` are scores, higher is better: here minus the mean squared error. A `train` score that rises while
# `valid` falls is overfitting.
#
# ## A learning-rate schedule
#
# A callback is called at fixed points of the loop, and may read and change the model. Any scheduler of torch works:
# create it when the fit starts, and step it after each epoch. `log` adds a column to the history.


# %%
class Schedule(Callback):
    """Steps a scheduler of torch after every epoch."""

    def __init__(self, make):
        self.make = make  # optimizer -> scheduler

    def on_fit_start(self, estimator):
        self.scheduler = self.make(estimator.train_optimizer)

    def on_epoch_end(self, estimator):
        estimator.log(lr=estimator.train_optimizer.param_groups[0]["lr"])
        self.scheduler.step()


def cosine(optimizer):
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=8)


scheduled = GRU(**small, n_epochs=8, lr=0.02, early_stop=8).fit(
    dataset, callbacks=[Schedule(cosine)]
)
print(scheduled.history_[["valid", "lr"]].round(4))

# %% alt="Left: the validation loss by epoch with a constant and a cosine learning rate. Right: both learning rates."
figure, (left, right) = plt.subplots(
    1, 2, figsize=(9, 3.2), layout="constrained"
)
for name, model in {"constant": plain, "cosine": scheduled}.items():
    left.plot(-model.history_["valid"], "o-", label=name)
left.set(title="loss on valid", xlabel="epoch")
left.legend()
right.plot(
    scheduled.history_.index,
    0 * scheduled.history_["lr"] + 0.02,
    "o-",
    label="constant",
)
right.plot(scheduled.history_["lr"], "o-", label="cosine")
right.set(title="learning rate", xlabel="epoch")
plt.show()

# %% [markdown]
# ## A callback of your own
#
# This one records the largest gradient of each epoch, and stops a fit whose training loss explodes.


# %%
class Watch(Callback):
    def on_epoch_start(self, estimator):
        self.largest = 0.0

    def on_batch_end(self, estimator):
        gradients = (
            p.grad.abs().max()
            for p in estimator.network.parameters()
            if p.grad is not None
        )
        self.largest = max(self.largest, *map(float, gradients))

    def on_epoch_end(self, estimator):
        estimator.log(gradient=self.largest)
        if estimator.history_["train_loss"].iloc[-1] > 10:
            estimator.stop_training = True


watched = GRU(**small, n_epochs=3, lr=0.005).fit(dataset, callbacks=[Watch()])
print(watched.history_[["train_loss", "valid", "gradient"]].round(4))

# %% [markdown]
# `on_batch_end` comes after the clipping and the step: as in Qlib, every element of a gradient is clipped to ±3.
#
# TensorBoard and MLflow are callbacks as well.

# %%
if importlib.util.find_spec("tensorboard") is None:
    print(
        "TensorBoardCallback needs TensorBoard. "
        "Remedy: pip install 'qfast-models[tensorboard]'"
    )
else:
    from qfast.training import TensorBoardCallback

    GRU(**small, n_epochs=1).fit(
        dataset, callbacks=[TensorBoardCallback("tensorboard")]
    )

# %% [markdown]
# ## Sample weights
#
# A reweighter is any object with a method `reweight`. It receives the training samples and returns one weight for
# each. For windows, `get_index` returns the day and the stock of each sample. Here the weight of a day halves every 60
# trading days into the past.


# %%
class HalfLife:
    def __init__(self, days):
        self.days = days

    def reweight(self, samples):
        dates = samples.get_index().get_level_values("datetime")
        age = dates.max() - dates
        return 0.5 ** (age.days.to_numpy() * 5 / 7 / self.days)


weights = HalfLife(60).reweight(
    dataset.prepare("train", col_set=["feature", "label"], data_key="learn")
)
print(f"{len(weights)} weights from {weights.min():.2f} to {weights.max():.2f}")
recent = GRU(**small, n_epochs=6, lr=0.005).fit(
    dataset, reweighter=HalfLife(60)
)

# %% [markdown]
# Only the training loss uses the weights. The scores that select the epoch do not. For flat data (`DatasetH`),
# `samples` is a frame, whose index is (datetime, instrument). In a workflow file, `task: {reweighter: ...}` names a
# class that `--allow-code` permits.
#
# ## Another loss, another metric
#
# `loss` is minimized, and `metric` selects the epoch. The daily IC is both a loss and a metric. A loss of whole days
# needs batches of whole days, and qfast says so.

# %%
try:
    GRU(**small, loss="ic")
except ValueError as error:
    print(error)

# %%
ranked = GRU(
    **small, n_epochs=6, lr=0.005, loss="ic", metric="rank_ic", batch_by="day"
).fit(dataset)
print(
    ranked.history_[["train_loss", "train_rank_ic", "valid_rank_ic"]]
    .round(4)
    .tail(3)
)

# %% [markdown]
# Functions work too. They receive the predictions and labels of a batch, without missing labels:


# %%
def huber(prediction, label):
    return torch.nn.functional.huber_loss(prediction, label, delta=1.0)


robust = GRU(**small, n_epochs=6, lr=0.005, loss=huber, metric="ic").fit(
    dataset
)

# %% [markdown]
# ## Which is better?

# %%
label = frame["label", "LABEL0"]
models = {
    "constant lr": plain,
    "cosine": scheduled,
    "half-life": recent,
    "loss ic": ranked,
    "huber": robust,
}
table = {}
for name, model in models.items():
    ic = daily_ic(model.predict(dataset, "test"), label)[0].dropna()
    table[name] = {
        "best epoch": model.best_epoch_,
        "test IC": ic.mean(),
        "standard error": ic.std() / np.sqrt(len(ic)),
    }
print(pd.DataFrame(table).T.round(3))

# %% [markdown]
# These differences are within a standard error, and this is one seed on one market. Decide with many seeds on your own
# data ([studies](../studies.md)).
#
# ## Continue after an interrupt
#
# With `checkpoint_dir`, the fit writes its state after every epoch. `resume=True` continues from it, and the result
# equals that of an uninterrupted fit. Here a callback plays the power failure.


# %%
class PowerFailure(Callback):
    def on_epoch_start(self, estimator):
        if estimator.epoch_ == 2:
            raise KeyboardInterrupt


try:
    GRU(**small, n_epochs=4).fit(
        dataset, callbacks=[PowerFailure()], checkpoint_dir="state"
    )
except KeyboardInterrupt:
    print("interrupted:", os.listdir("state"))
resumed = GRU(**small, n_epochs=4).fit(
    dataset, checkpoint_dir="state", resume=True
)
whole = GRU(**small, n_epochs=4).fit(dataset)
print(
    "equal:",
    resumed.predict(dataset, "test").equals(whole.predict(dataset, "test")),
)

# %%
os.chdir(start)
folder.cleanup()

# %% [markdown]
# ## What to read next
#
# - [Training](../training.md): every loss, metric, callback and function that you may override
# - [Studies](../studies.md): many seeds, grids and searches
# - [Training over several processes](../distributed.md)
