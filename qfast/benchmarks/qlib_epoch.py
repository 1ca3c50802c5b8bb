"""An epoch of Qlib's own model on the same samples, if pyqlib is installed."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import io
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from qfast import models
from qfast.benchmarks.sample import Sample
from qfast.data.windows import WindowSet
from qfast.models import ts
from qfast.training.estimator import Estimator

__all__ = ["QlibEpoch", "is_installed", "qlib_class"]

STEMS = {
    "LSTM": "lstm",
    "GRU": "gru",
    "ALSTM": "alstm",
    "GATs": "gats",
    "TCN": "tcn",
    "TransformerModel": "transformer",
    "LocalformerModel": "localformer",
}
LABEL = ("label", "LABEL0")


def is_installed() -> bool:
    """Whether pyqlib can be imported."""
    return importlib.util.find_spec("qlib") is not None


def qlib_class(estimator: Estimator) -> type | None:
    """Qlib's model of the same name. None without pyqlib, and for classes of the user."""
    kind = type(estimator)
    name = kind.__name__
    if not is_installed() or name not in STEMS:
        return None
    for module, suffix in ((models, ""), (ts, "_ts")):
        if getattr(module, name) is kind:
            with contextlib.redirect_stdout(io.StringIO()):  # the import prints which other models lack a package
                module_of_qlib = importlib.import_module(f"qlib.contrib.model.pytorch_{STEMS[name]}{suffix}")
            found: type = getattr(module_of_qlib, name)
            return found
    return None


class QlibEpoch:
    """Times `train_epoch` and `test_epoch` during a fit of Qlib's model over one epoch.

    Qlib loads batches in the training process (n_jobs=0), because the CPU time of other processes is not counted.

    Parameters
    ----------
    kind : type
        Qlib's class, see `qlib_class`.
    estimator : Estimator
        The model with the same arguments.
    sample : Sample
    """

    title = "Qlib"

    def __init__(self, kind: type, estimator: Estimator, sample: Sample) -> None:
        self.sample = sample
        self.dataset = _Dataset(sample)
        accepted = inspect.signature(kind).parameters
        arguments = {name: value for name, value in estimator.get_params().items() if name in accepted}
        if "reg" in accepted:
            arguments["reg"] = estimator.get_params().get("reg", estimator.get_params().get("weight_decay", 0.0))
        arguments |= {"n_epochs": 1, "GPU": -1, "metric": "", "n_jobs": 0}
        if not sample.segments.by_day:
            arguments["batch_size"] = sample.segments.batch_size
        arguments = {name: value for name, value in arguments.items() if name in accepted}
        with _quiet():
            self.model: Any = kind(**arguments)

    def seconds(self) -> float:
        """CPU seconds of an epoch: a training pass, and the scores of both segments."""
        training: list[float] = []
        scoring: list[float] = []
        with (
            tempfile.TemporaryDirectory() as folder,
            mock.patch.object(self.model, "train_epoch", _timed(self.model.train_epoch, training)),
            mock.patch.object(self.model, "test_epoch", _timed(self.model.test_epoch, scoring, last=2)),
            _quiet(),
            contextlib.suppress(_EnoughError),
        ):
            self.model.fit(self.dataset, {}, save_path=str(Path(folder, "weights")))
        scales = self.dataset.scale
        return training[0] * scales["train"] + scoring[0] * scales["train"] + scoring[1] * scales["valid"]


class _EnoughError(Exception):
    """Ends a fit whose epoch is complete. Some of Qlib's models would now need `qlib.init` for their recorder."""


def _timed(call: Callable[..., Any], seconds: list[float], last: int = 0) -> Callable[..., Any]:
    """Append the CPU seconds of each call, and raise _EnoughError after call number `last`."""

    def timed(*arguments: Any) -> Any:
        start = time.process_time()
        result = call(*arguments)
        seconds.append(time.process_time() - start)
        if len(seconds) == last:
            raise _EnoughError
        return result

    return timed


class _Dataset:
    """The part of Qlib's dataset interface that its models use, over the samples.

    Attributes
    ----------
    scale : dict
        Whole batches of each segment per batch of the part. Qlib leaves out incomplete batches in every pass.
    """

    def __init__(self, sample: Sample) -> None:
        segments = sample.segments
        whole = {"train": segments.train, "valid": segments.valid}
        parts = {"train": sample.train, "valid": sample.valid}
        self.segments = dict.fromkeys(parts)
        make = _frame if sample.train.index is None else _sampler
        self.prepared = {name: make(windows, segments.by_day) for name, windows in parts.items()}
        if segments.by_day:
            self.scale = {name: len(whole[name].days) / len(parts[name].days) for name in parts}
        else:
            size = segments.batch_size
            self.scale = {name: max(1, len(whole[name]) // size) / max(1, len(self[name]) // size) for name in parts}

    def __getitem__(self, segment: str) -> Any:
        return self.prepared[segment if segment in self.prepared else "valid"]

    def prepare(self, segments: str | list[str], **_: Any) -> Any:
        if isinstance(segments, str):
            return self[segments]
        return [self[segment] for segment in segments]


def _frame(windows: WindowSet, by_day: bool) -> pd.DataFrame:
    """Flat samples as Qlib's DatasetH returns them."""
    assert windows.label is not None
    values = windows.batch(torch.arange(len(windows))).numpy()
    columns = pd.MultiIndex.from_tuples([("feature", name) for name in windows.columns] + [LABEL])
    table = np.column_stack([values, windows.label.numpy()]).astype("f4")
    return pd.DataFrame(table, windows.keys(), columns).sort_index()


def _sampler(windows: WindowSet, by_day: bool) -> Any:
    """Qlib's sampler over the rows that the windows read.

    Its samples are all rows from a start date on. Days are therefore consecutive here, as many as in the sample.
    """
    from qlib.data.dataset import TSDataSampler

    assert windows.label is not None
    assert windows.history is not None
    assert isinstance(windows.features, Tensor)
    label = np.full(len(windows.features), np.nan, dtype="f4")
    label[windows.rows.numpy()] = windows.label.numpy()
    rows = windows.history()
    keys = windows.keys_of(rows)
    if not by_day:
        keep = keys.get_level_values("instrument").isin(windows.keys().get_level_values("instrument").unique())
        rows, keys = rows[keep], keys[keep]
    dates = np.unique(windows.keys().get_level_values("datetime"))
    columns = pd.MultiIndex.from_tuples([("feature", name) for name in windows.columns] + [LABEL])
    table = np.column_stack([windows.features[torch.from_numpy(rows)].numpy(), label[rows]])
    frame = pd.DataFrame(table, keys, columns).sort_index()
    start, end = dates[0], dates[-1]
    if by_day:
        all_dates = np.unique(keys.get_level_values("datetime"))
        start = all_dates[max(0, np.searchsorted(all_dates, end) + 1 - len(dates))]
    return TSDataSampler(frame, start, end, windows.step_len)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide Qlib's log and warnings."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
