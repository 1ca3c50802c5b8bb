# %% [markdown]
# # Training on several processes, or on a GPU
#
# One fit can use several processes. torchrun starts them, and they share the samples of every batch. This page trains
# the same model with one process and with two, and compares. At the end, it says what changes on a GPU.

# %%
import logging
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import torch

import qfast
from qfast.models.ts import LSTM

logging.getLogger("qfast").setLevel(logging.ERROR)
plt.rcParams["figure.facecolor"] = "white"
start, folder = os.getcwd(), tempfile.TemporaryDirectory()
os.chdir(folder.name)

# %% [markdown]
# ## A script for any number of processes
#
# torchrun sets RANK, the number of the process, and the addresses that the processes need. The only additional line is
# `init_process_group`. `fit` and `predict` see the group and share the work. Every process calls both with the same
# arguments, and every process receives all scores.

# %%
Path("train.py").write_text("""
import os
from pathlib import Path

import torch.distributed as dist

from qfast.data import TSDatasetH, synthetic
from qfast.models.ts import LSTM

rank = int(os.environ.get("RANK", 0))
if "RANK" in os.environ:
    dist.init_process_group("gloo")  # for CPUs

frame = synthetic.factors(24, 120, 6, ic=0.2, missing=0.0, seed=8)
days = frame.index.get_level_values("datetime").unique().sort_values()
segments = {
    "train": (days[7], days[79]),
    "valid": (days[82], days[97]),
    "test": (days[100], days[119]),
}
dataset = TSDatasetH(handler=frame, segments=segments, step_len=8)
model = LSTM(
    d_feat=6, hidden_size=8, num_layers=1, n_epochs=4, lr=5e-3, batch_size=200,
    seed=0, progress=False,
)
model.fit(dataset)
scores = model.predict(dataset, "test")

if rank == 0:  # one process writes
    folder = Path(os.environ.get("RESULT", "one"))
    folder.mkdir()
    model.history_.to_csv(folder / "history.csv")
    scores.to_frame("score").to_csv(folder / "scores.csv")
if dist.is_initialized():
    dist.destroy_process_group()
""")
print(len(Path("train.py").read_text().splitlines()), "lines")

# %% [markdown]
# ## One process
#
# This is `python train.py`.

# %%
done = runpy.run_path("train.py")
print(done["model"].history_[["train_loss", "train", "valid"]].round(4))

# %% [markdown]
# ## Two processes
#
# This is `torchrun --nproc-per-node 2 train.py`. Each process computes the samples of its own stocks. Before every
# step, the predictions of the batch are gathered, so the loss is that of the whole batch, and the gradients are added
# up.

# %%
command = [
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--standalone",
    "--nproc-per-node",
    "2",
    "train.py",
]
finished = subprocess.run(
    command,
    env={**os.environ, "RESULT": "two", "OMP_NUM_THREADS": "1"},
    capture_output=True,
    text=True,
)
assert finished.returncode == 0, finished.stderr
print("exit status:", finished.returncode)

# %% [markdown]
# ## The results are equal
#
# The losses, the scores and the selected epoch agree up to rounding, because sums are added in another order. With
# dropout, they would not: each process draws its own masks.

# %%
history = {
    name: pd.read_csv(f"{name}/history.csv", index_col="epoch")
    for name in ("one", "two")
}
scores = {
    name: pd.read_csv(
        f"{name}/scores.csv", index_col=["datetime", "instrument"]
    )["score"]
    for name in history
}
for column in ("train_loss", "train", "valid"):
    error = (history["one"][column] - history["two"][column]).abs().max()
    print(f"{column:10} largest difference {error:.0e}")
error = (scores["one"] - scores["two"]).abs().max()
print(f"{'scores':10} largest difference {error:.0e}")

# %% alt="Loss by epoch and test scores of one and of two processes, which agree."
figure, (left, right) = plt.subplots(
    1, 2, figsize=(9, 3.2), layout="constrained"
)
left.plot(-history["one"]["valid"], label="one process")
left.plot(-history["two"]["valid"], "o", label="two processes")
left.set(title="loss on valid", xlabel="epoch")
left.set_xticks(history["one"].index)
left.legend()
right.scatter(scores["one"], scores["two"].reindex(scores["one"].index), s=6)
right.axline((0, 0), slope=1, color="grey", linewidth=0.8)
right.set(title="test scores", xlabel="one process", ylabel="two processes")
plt.show()

# %% [markdown]
# ## When it pays
#
# Every step exchanges 4 bytes per sample and 4 bytes per weight. This pays for large networks and large batches, not
# for the small ones of this page. On one machine, one process with several threads is simpler: set OMP_NUM_THREADS. To
# use the cores for many models, run a [study](../studies.md).
#
# A workflow file needs no script:
#
# ```sh
# torchrun --nproc-per-node 2 -m qfast run workflow.yaml --data prices.parquet
# torchrun --nproc-per-node 2 --max-restarts 1 -m qfast run workflow.yaml --data prices.parquet
# ```
#
# With the second command, all processes restart after a failure and continue the run after its last complete epoch.
#
# ## On a GPU: not tested
#
# **Nothing in this section has run on a GPU.** The CUDA operators compile, and their kernels were tested as host code
# ([GPU](../gpu.md)).
#
# - `device="auto"`, the default, uses a GPU if torch sees one. `device="cuda"` requires one, and raises an error
#   otherwise. On the command line: `qfast run workflow.yaml --device cuda`.
# - The data is copied to the GPU once, and batches are gathered there.
# - GATs and TCN use qfast's operators there. LSTM, GRU, ALSTM, Transformer and Localformer use torch's layers, until
#   both have been compared.
# - `qfast doctor` shows which implementation each operator uses, and why.
# - `cuda_graphs=True` records a training step and replays it. It is off by default.
# - On several GPUs, torchrun starts one process per GPU. `qfast run` then uses nccl. In a script, replace "gloo" by
#   "cpu:gloo,cuda:nccl".

# %%
print("torch sees a GPU:", torch.cuda.is_available())
if not torch.cuda.is_available():
    try:
        LSTM(d_feat=6, device="cuda")
    except qfast.QfastError as error:
        print(error)

# %%
os.chdir(start)
folder.cleanup()

# %% [markdown]
# ## What to read next
#
# - [Training over several processes](../distributed.md): how the work is shared, rules, failures and restarts
# - [GPU](../gpu.md): what has been tested, and how to build the CUDA library
# - [Scale](../scale.md): memory and time of large markets
