"""Qlib's models and datasets over the frames of the tests; a test that needs them is skipped without pyqlib."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any, ClassVar

import pandas as pd
import pytest

from qfast.data.handlers import DataHandlerLP
from support.frames import SEGMENTS, make_frame

INFER = [{"class": "Fillna", "kwargs": {"fields_group": "feature"}}]
LEARN = [{"class": "DropnaLabel"}, {"class": "CSRankNorm", "kwargs": {"fields_group": "label"}}]


def qfast_dataset(kind: type, frame: pd.DataFrame, **kwargs):
    """qfast's dataset of class `kind` over `frame`, with the processors above."""
    handler = DataHandlerLP(frame, infer_processors=INFER, learn_processors=LEARN)
    return kind(handler=handler, segments=SEGMENTS, **kwargs)


def qlib_dataset(kind: str, frame: pd.DataFrame, **kwargs):
    """Qlib's dataset of class `kind` over the same frame and processors."""
    dataset = pytest.importorskip("qlib.data.dataset", reason="pyqlib is the oracle; install qfast-models[qlib]")
    from qlib.data.dataset.handler import DataHandlerLP as Handler
    from qlib.data.dataset.loader import StaticDataLoader

    loader = StaticDataLoader(frame.copy())
    handler = Handler(data_loader=loader, infer_processors=INFER, learn_processors=LEARN)
    return getattr(dataset, kind)(handler=handler, segments=SEGMENTS, **kwargs)


TRAIN = {"n_epochs": 3, "batch_size": 16, "lr": 0.01}


class QlibFrames:
    """The part of a dataset that Qlib's models use, over one frame: flat frames or Qlib's sampler."""

    segments: ClassVar[dict[str, tuple[str, str]]] = {
        "train": ("2020-01-01", "2020-02-14"),
        "valid": ("2020-02-15", "2020-03-10"),
        "test": ("2020-03-11", "2020-12-31"),
    }

    def __init__(self, frame: pd.DataFrame, step_len: int | None) -> None:
        self.frame = frame
        if step_len is not None:
            self.step_len = step_len

    def prepare(self, segment: Any, col_set: Any = "__all", data_key: str = "infer") -> Any:
        if isinstance(segment, list):
            return [self.prepare(s, col_set, data_key) for s in segment]
        start, end = self.segments[segment]
        if hasattr(self, "step_len"):
            from qlib.data.dataset import TSDataSampler

            return TSDataSampler(self.frame.copy(), start, end, self.step_len)
        part = self.frame.loc[start:end]
        return part[col_set] if isinstance(col_set, str) else part[list(col_set)]


def qlib_frames(suffix: str, holes: float = 0.15, step_len: int = 5) -> QlibFrames:
    """Rolling windows if `suffix` is "_ts", otherwise flat rows."""
    if suffix:
        return QlibFrames(make_frame(70, 9, 3, holes=holes), step_len=step_len)
    frame = make_frame(70, 9, 12, holes=holes)  # 12 columns: 3 features of 4 steps each
    return QlibFrames(frame, None)


def qlib_model(name: str, module: str, suffix: str) -> type:
    """Qlib's model class."""
    loaded = importlib.import_module(f"qlib.contrib.model.pytorch_{module}{suffix}")
    if hasattr(loaded, "R"):  # the flat GRU reports to a running experiment at the end of fit
        loaded.R = SimpleNamespace(get_recorder=lambda: SimpleNamespace(log_metrics=lambda **_: None))
    return getattr(loaded, name)
