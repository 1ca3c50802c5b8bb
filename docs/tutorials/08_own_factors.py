# %% [markdown]
# # Your own factors and extra data columns
#
# Factors are texts in Qlib's expression language. This page computes some, looks at each one alone, adds a column of
# its own and a function of its own, and trains on them, in Python and in a workflow file.

# %%
import logging
import os
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

import qfast
from qfast.data import FactorHandler, TSDatasetH, load_prices, synthetic
from qfast.data.expression import parse
from qfast.data.factors import evaluate, evaluate_all, register_function
from qfast.metrics import daily_ic
from qfast.models.ts import GRU

logging.getLogger("qfast").setLevel(logging.ERROR)
plt.rcParams["figure.facecolor"] = "white"
start, folder = os.getcwd(), tempfile.TemporaryDirectory()
os.chdir(folder.name)

# %% [markdown]
# ## Prices with an extra column
#
# Every numeric column of your table becomes a field: a column `sentiment` is `$sentiment`. This one is a noisy view of
# the return that follows, as a good data vendor might sell it.

# %%
prices = synthetic.prices(
    40, 320, ic=0.1, start="2021-01-01", missing=0.0, seed=5
)
by_stock = prices.groupby(level="instrument")["close"]
following = by_stock.shift(-2) / by_stock.shift(-1) - 1
noise = np.random.default_rng(0).standard_normal(len(prices))
prices["sentiment"] = (following.fillna(0) / 0.02 + 8 * noise).astype("float32")
prices.reset_index().to_csv("prices.csv", index=False)
panel = load_prices("prices.csv")
print(panel.n_rows, "rows,", panel.columns("price"))

# %% [markdown]
# ## Compute factors
#
# `evaluate_all` returns one column per expression. `Ref($close, 5)` is the close five rows earlier, and `Mean`, `Std`
# and the others look at the last n rows of the same stock.

# %%
expressions = {
    "REVERSAL5": "Ref($close, 5) / $close - 1",
    "DAY": "$close / $open - 1",
    "VOLATILITY20": "Std($close / Ref($close, 1) - 1, 20)",
    "VOLUME": "$volume / Mean($volume, 20)",
    "SENTIMENT": "$sentiment",
    "SENTIMENT3": "Mean($sentiment, 3)",
}
values = evaluate_all(list(expressions.values()), panel)
factors = pd.DataFrame(values, panel.index(), columns=list(expressions))
print(factors.sort_index().tail(3).round(3).T.to_string())

# %% [markdown]
# A mistake is an error that points at it:

# %%
try:
    parse("Meen($close, 5) / $open")
except qfast.QfastError as error:
    print(error)

# %% [markdown]
# ## Look at each factor alone
#
# The label is an expression too: the return from the next close to the one after it. The daily IC of a factor says what
# it knows without any model.

# %%
label_text = "Ref($close, -2) / Ref($close, -1) - 1"
label = pd.Series(evaluate(label_text, panel), panel.index())
first_half = slice("2021-01-01", "2021-09-30")
table = {}
for name in factors:
    ic = daily_ic(factors[name], label)[1].loc[first_half].dropna()
    table[name] = {
        "rank IC": ic.mean(),
        "standard error": ic.std() / np.sqrt(len(ic)),
    }
alone = pd.DataFrame(table).T
print(alone.round(3))

# %% alt="Bars of the rank IC of each factor with two standard errors."
figure, axes = plt.subplots(figsize=(8, 3.2), layout="constrained")
axes.bar(
    alone.index, alone["rank IC"], yerr=2 * alone["standard error"], capsize=3
)
axes.axhline(0, color="grey", linewidth=0.8)
axes.set(
    title="rank IC of single factors, January to September, ± 2 standard errors",
    ylabel="rank IC",
)
plt.show()

# %% [markdown]
# Choose factors on the training period only, as here. A factor that you chose on the test period makes the test IC
# worthless.
#
# ## A function of your own
#
# `register_function` adds a function to the language, in this process. It is called with the rows of one stock.

# %%
register_function("Spread", lambda high, low: (high - low) / low, series=2)
expressions["SPREAD10"] = "Mean(Spread($high, $low), 10)"
print(evaluate(expressions["SPREAD10"], panel)[-3:].round(4))

# %% [markdown]
# ## Train on them
#
# `FactorHandler` computes features and label, and applies processors, as `Alpha158` does. The normalization is fitted
# on the training period only.

# %%
segments = {
    "train": ("2021-02-01", "2021-09-28"),
    "valid": ("2021-10-01", "2021-11-26"),
    "test": ("2021-12-01", None),
}
handler = FactorHandler(
    (list(expressions.values()), list(expressions)),
    data=panel,
    label=[label_text],
    fit_start_time="2021-01-01",
    fit_end_time="2021-09-28",
    infer_processors=[
        {
            "class": "RobustZScoreNorm",
            "kwargs": {"fields_group": "feature", "clip_outlier": True},
        },
        {"class": "Fillna", "kwargs": {"fields_group": "feature"}},
    ],
    learn_processors=[
        "DropnaLabel",
        {"class": "CSRankNorm", "kwargs": {"fields_group": "label"}},
    ],
)
dataset = TSDatasetH(handler, segments, step_len=5)
model = GRU(
    d_feat=7,
    hidden_size=16,
    num_layers=1,
    n_epochs=6,
    lr=3e-3,
    batch_size=400,
    seed=0,
    progress=False,
)
model.fit(dataset)
ic = daily_ic(model.predict(dataset, "test"), label)[0].dropna()
print(f"test IC {ic.mean():.3f} ± {ic.std() / np.sqrt(len(ic)):.3f}")

# %% [markdown]
# ## In a workflow file
#
# A file names the expressions. Built-in functions need no permission; the file below leaves out `Spread`, which exists
# in this process only.

# %%
Path("factors.yaml").write_text(f"""
experiment_name: factors
task:
  model:
    class: GRU
    module_path: qfast.models.ts
    kwargs: {{d_feat: 3, hidden_size: 16, num_layers: 1, n_epochs: 6, lr: 3e-3,
             batch_size: 400, seed: 0, progress: false}}
  dataset:
    class: TSDatasetH
    kwargs:
      handler:
        class: FactorHandler
        module_path: qfast.data
        kwargs:
          features:
            -
              - "{expressions["REVERSAL5"]}"
              - "{expressions["VOLUME"]}"
              - "$sentiment"
            - [REVERSAL5, VOLUME, SENTIMENT]
          label: ["{label_text}"]
          fit_start_time: 2021-01-01
          fit_end_time: 2021-09-28
          infer_processors:
            - class: RobustZScoreNorm
              kwargs: {{fields_group: feature, clip_outlier: true}}
            - {{class: Fillna, kwargs: {{fields_group: feature}}}}
          learn_processors:
            - DropnaLabel
            - {{class: CSRankNorm, kwargs: {{fields_group: label}}}}
      segments:
        train: [2021-02-01, 2021-09-28]
        valid: [2021-10-01, 2021-11-26]
        test: [2021-12-01, null]
      step_len: 5
  record: [{{class: SignalRecord}}]
""")
result = qfast.run("factors.yaml", data="prices.csv", output="runs/factors")
print(pd.DataFrame(result.metrics).T[["IC", "Rank IC", "days"]].round(3))

# %% [markdown]
# ## Does a factor look ahead?
#
# `qfast check` analyzes every expression. Replace the volume by a factor that reads tomorrow's close:

# %%
text = Path("factors.yaml").read_text()
Path("cheating.yaml").write_text(
    text.replace(expressions["VOLUME"], "Ref($close, -1) / $close")
)
report = qfast.check("cheating.yaml", data="prices.csv", experiments=False)
print(
    *(
        f"{finding.level}: {finding.text}"
        for finding in report.findings
        if finding.level == "error"
    ),
    sep="\n",
)

# %% [markdown]
# The check reads expressions, and it cannot know where a column comes from. If your vendor stamps a value with the day
# that it describes instead of the day of its publication, no check finds it. The column above is such a case, on
# purpose: it knows the future, and `qfast check` accepts it.

# %%
honest = qfast.check("factors.yaml", data="prices.csv", experiments=False)
print("no errors:", honest.ok)

# %%
os.chdir(start)
folder.cleanup()

# %% [markdown]
# ## What to read next
#
# - [Factors](../factors.md): the whole language, differences from Qlib, the cache
# - [Datasets in Python](../datasets.md): handlers, processors, segments and samples
# - [Data](../data.md): how columns of your files become fields
