"""`qfast new`: a commented workflow file that fits a table of prices."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from qfast.data.panel import Panel
from qfast.data.sources import load_prices
from qfast.dates import date_text
from qfast.errors import DATA_PAGE, ConfigError, some, suggest
from qfast.files import atomic_write, require_file_target
from qfast.read_options import ReadOptions, ReadSettings

__all__ = ["MODELS", "new_workflow"]

MODELS = {
    "LSTM": "hidden_size: 64, num_layers: 2, dropout: 0.0, batch_size: {batch}",
    "GRU": "hidden_size: 64, num_layers: 2, dropout: 0.0, batch_size: {batch}",
    "ALSTM": "hidden_size: 64, num_layers: 2, dropout: 0.0, batch_size: {batch}",
    "GATs": "hidden_size: 64, num_layers: 2, dropout: 0.0, base_model: LSTM",
    "TCN": "n_chans: 32, kernel_size: 5, num_layers: 3, dropout: 0.2, batch_size: {batch}",
    "TransformerModel": "d_model: 32, nhead: 4, num_layers: 2, dropout: 0.1, batch_size: {batch}",
    "LocalformerModel": "d_model: 32, nhead: 4, num_layers: 2, dropout: 0.1, batch_size: {batch}",
}
ALL_FIELDS = ("open", "high", "low", "close", "volume")  # what Alpha360 reads, with or without vwap
LOOKBACK = 60  # days that the features read: no sample has all features before
HORIZON = 2  # trading days that the label looks ahead
LEAST_DATES = 120  # of which 60 are lookback
STEPS = 20
CLOSE_FEATURES = {"RETURN1": "$close / Ref($close, 1) - 1", "RETURN5": "$close / Ref($close, 5) - 1"} | {
    "MEAN20": "Mean($close, 20) / $close - 1",
    "STD20": "Std($close, 20) / $close",
    "MAX60": "Max($close, 60) / $close - 1",
}
VOLUME_FEATURE = {"VOLUME20": "$volume / (Mean($volume, 20) + 1)"}

TEMPLATE = """\
# Written by `qfast new` for {table}: {rows:,} rows of {instruments:,} instruments,
# {first} to {last}.{note}
#
#     qfast check {file}      look for problems first
#     qfast run {file}        train, score, simulate a portfolio, write a report
#     qfast predict runs/RUN --data NEW_PRICES --date latest
experiment_name: {name}

handler: &handler
  data: {source}          # --data replaces it
{read_options}  start_time: {train_start}       # the features also read the {lookback} days before
  end_time: null                  # up to the last date
  # The normalization is fitted on the training dates only, so no statistic contains later data.
  fit_start_time: {train_start}
  fit_end_time: {train_end}
  instruments: all                # or a list of codes
{features}  infer_processors:               # applied to training and to new data
    - class: RobustZScoreNorm
      kwargs: {{fields_group: feature, clip_outlier: true}}
    - class: Fillna
      kwargs: {{fields_group: feature}}
  learn_processors:               # applied to training data only
    - class: DropnaLabel
{label_processor}  # From tomorrow's close to the next one: you see today's prices after the close and trade tomorrow.
  label: ["Ref($close, -2) / Ref($close, -1) - 1"]

task:
  model:
    class: {model}
    module_path: {model_module}
    # Losses, metrics and learning rates are described in docs/training.md.
    kwargs: {{d_feat: {d_feat}, {network}, n_epochs: 50, lr: 1e-3, early_stop: 10, metric: loss}}
  dataset:
    class: {dataset}
    module_path: qfast.data
    kwargs:
{step_len}      handler:
        class: {handler}
        module_path: qfast.data
        kwargs: *handler
      # {horizon} trading days between the segments, because the label looks {horizon} days ahead.
      segments:
        train: [{train_start}, {train_end}]
        valid: [{valid_start}, {valid_end}]
        test: [{test_start}, null]
  record:
    - class: SignalRecord         # scores
      kwargs: {{model: <MODEL>, dataset: <DATASET>}}
    - class: SigAnaRecord         # information coefficients
      kwargs: {{ana_long_short: {long_short}, ann_scaler: 252}}
{portfolio}"""

PORTFOLIO = """\
    - class: PortAnaRecord        # a simulated portfolio
      kwargs:
        config:
          strategy:               # hold the {topk} best instruments, replace {n_drop} a day
            class: TopkDropoutStrategy
            kwargs: {{signal: <PRED>, topk: {topk}, n_drop: {n_drop}}}
          backtest:
            account: 1000000
            benchmark: MARKET     # not an instrument, so the benchmark is the mean return of all
            exchange_kwargs: {{open_cost: 0.0005, close_cost: 0.0015, min_cost: 0, deal_price: close}}
"""


RANKED_LABEL = """\
    - class: CSRankNorm           # the label becomes its rank among the instruments of the day
      kwargs: {fields_group: label}
"""
SCALED_LABEL = """\
    - class: ZScoreNorm           # there are too few instruments to rank the label within a day
      kwargs: {fields_group: label}
"""


class _Segments(NamedTuple):
    """First and last date of each segment; the last one is open."""

    train_start: str
    train_end: str
    valid_start: str
    valid_end: str
    test_start: str


def new_workflow(
    table: str | os.PathLike[str],
    file: str | os.PathLike[str] = "workflow.yaml",
    *,
    model: str = "LSTM",
    read_options: ReadSettings = None,
) -> Path:
    """Inspect a table of prices and write a commented workflow file for it.

    Tables with open, high, low, close and volume use Alpha360; others use factors of the close. The first 60% of the
    dates with features are for training, the next 20% for validation and the rest for testing.

    Parameters
    ----------
    table : path
        Prices in any form that `qfast run --data` accepts.
    file : path
        The workflow file. It must not exist yet.
    model : str
        A key of `MODELS`, in upper or lower case, with or without "Model".
    read_options : ReadOptions or mapping, optional
        How to read the table. They are written to the file.

    Returns
    -------
    Path
        The file.

    Raises
    ------
    ConfigError
        `file` exists or cannot be written, the model is unknown, or the table has too few dates.
    DataError
        The table cannot be read or has no close.

    Examples
    --------
    >>> import tempfile
    >>> from qfast.workflow.demo import demo_prices
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     demo_prices(20, 300).to_parquet(f"{folder}/prices.parquet")
    ...     "class: Alpha360" in new_workflow(f"{folder}/prices.parquet", f"{folder}/mine.yaml").read_text()
    True
    """
    by_lower = {name.lower().removesuffix("model"): name for name in MODELS}
    if model.lower().removesuffix("model") not in by_lower:
        raise ConfigError(f"--model must be one of {sorted(MODELS)}, got {model!r}." + suggest(model, MODELS))
    model = by_lower[model.lower().removesuffix("model")]
    target = Path(file)
    if target.exists():
        raise ConfigError(f"{str(target)!r} exists and is not replaced. Remedy: another name with --output.")
    options = ReadOptions.of(read_options)
    panel = load_prices(os.fspath(table), read_options=options)
    columns = [name for name in panel.columns("price") if np.isfinite(panel.column(name, "price")).any()]
    if "close" not in columns:
        raise ConfigError(
            f"{os.fspath(table)!r} has no prices in a column 'close', only {some(columns) or 'none'}. Remedy: rename "
            f"the column; {DATA_PAGE} lists the accepted names. For finished factors, docs/workflow.md shows a file "
            "with DataHandlerLP."
        )
    require_file_target(target, "--output")
    text = _filled(Path(table), target, panel, columns, model, options)
    atomic_write(target, lambda path: path.write_text(text, encoding="utf-8"))
    return target


def _filled(table: Path, target: Path, panel: Panel, columns: Sequence[str], model: str, options: ReadOptions) -> str:
    has_all = set(ALL_FIELDS) <= set(columns)
    segments, instruments = _segments(panel.datetimes, str(table)), len(panel.instruments)
    features = CLOSE_FEATURES | (VOLUME_FEATURE if "volume" in columns else {})
    topk = max(1, min(50, instruments // 5))
    enough = instruments >= 3
    recorded = options.recorded()
    samples = panel.n_live * 0.6 * (1 - LOOKBACK / len(panel.datetimes))
    return TEMPLATE.format(
        table=table.name,
        rows=panel.n_live,
        instruments=instruments,
        first=date_text(panel.datetimes[0]),
        last=date_text(panel.datetimes[-1]),
        note="" if enough else "\n# With so few instruments, nothing is ranked: there is no portfolio.",
        file=target.name,
        name=json.dumps(target.stem, ensure_ascii=False),
        source=json.dumps(str(table.absolute()), ensure_ascii=False),
        read_options=f"  read_options: {json.dumps(recorded, ensure_ascii=False)}\n" if recorded else "",
        **segments._asdict(),
        features=_alpha360_lines(columns) if has_all else _factor_lines(features),
        model=model,
        model_module="qfast.models" if has_all else "qfast.models.ts",
        d_feat=6 if has_all else len(features),
        network=MODELS[model].format(batch=max(32, min(2000, int(samples // 20)))),
        dataset="DatasetH" if has_all else "TSDatasetH",
        step_len="" if has_all else f"      step_len: {STEPS}\n",
        handler="Alpha360" if has_all else "FactorHandler",
        horizon=HORIZON,
        lookback=LOOKBACK,
        label_processor=RANKED_LABEL if enough else SCALED_LABEL,
        long_short=json.dumps(instruments >= 10),
        portfolio=PORTFOLIO.format(topk=topk, n_drop=max(1, topk // 10)) if enough else "",
    )


def _alpha360_lines(columns: Sequence[str]) -> str:
    if "vwap" in columns:
        return ""
    return "  vwap: typical                   # the table has no vwap: (high + low + close) / 3\n"


def _factor_lines(features: dict[str, str]) -> str:
    """Two parallel lists, expressions and names, as FactorHandler expects them."""
    expressions = "".join(f"      - {json.dumps(expression)}\n" for expression in features.values())
    return (
        "  # The table lacks some of open, high, low and volume. docs/factors.md lists all functions.\n"
        f"  features:\n    -\n{expressions}    - [{', '.join(features)}]\n"
    )


def _segments(dates: pd.DatetimeIndex, table: str) -> _Segments:
    """The dates of the segments, with gaps as long as the horizon of the label."""
    days = dates.normalize().unique()
    if len(days) < LEAST_DATES:
        raise ConfigError(
            f"{table!r} has {len(days)} dates, at least {LEAST_DATES} are needed: the features read {LOOKBACK} days. "
            "Remedy: a longer history."
        )
    usable = len(days) - LOOKBACK
    train_end = LOOKBACK + int(usable * 0.6)
    valid_end = LOOKBACK + int(usable * 0.8)
    chosen = (LOOKBACK, train_end - HORIZON - 1, train_end, valid_end - HORIZON - 1, valid_end)
    return _Segments(*(f"{days[position]:%Y-%m-%d}" for position in chosen))
