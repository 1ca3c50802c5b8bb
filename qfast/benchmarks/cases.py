"""The models and data of a benchmark: all models with Qlib's settings, or the model of a workflow."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from qfast import models, registry
from qfast.data import Alpha158, TSDatasetH
from qfast.data.protocols import Handler, HandlerDataset
from qfast.dates import date_text
from qfast.errors import ConfigError, DataError, suggest
from qfast.models import ts
from qfast.read_options import ReadOptions
from qfast.training.estimator import Estimator
from qfast.workflow.config import load_config
from qfast.workflow.dataset import DataInput, build_dataset, require_data
from qfast.workflow.demo import demo_prices
from qfast.workflow.resumption import locate_sources
from qfast.workflow.schema import Workflow
from qfast.workflow.user_code import AllowCode, allowed_code
from qfast.workflow.validation import check_workflow

__all__ = ["MODELS", "Subject", "default_subject", "workflow_subject"]

STEP_LEN = 20
TRAIN_PART = 0.7  # of the dates; the others are the validation segment
COLUMNS = [  # the selection of Qlib's Alpha158 workflow files
    "RESI5",
    "WVMA5",
    "RSQR5",
    "KLEN",
    "RSQR10",
    "CORR5",
    "CORD5",
    "CORR10",
    "ROC60",
    "RESI10",
    "VSTD5",
    "RSQR60",
    "CORR60",
    "WVMA60",
    "STD5",
    "RSQR20",
    "CORD60",
    "CORD10",
    "CORR20",
    "KLOW",
]
LABEL = "Ref($close, -2) / Ref($close, -1) - 1"

RECURRENT = {"hidden_size": 64, "num_layers": 2, "dropout": 0.0, "batch_size": 800}
GRAPH = {"hidden_size": 64, "num_layers": 2, "dropout": 0.7, "base_model": "LSTM"}
CONVOLUTION = {"num_layers": 5, "dropout": 0.5, "batch_size": 2000}
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "LSTM": ("LSTM", RECURRENT, RECURRENT),
    "GRU": ("GRU", RECURRENT, RECURRENT),
    "ALSTM": ("ALSTM", RECURRENT, RECURRENT),
    "GATs": ("GATs", GRAPH, GRAPH),
    "TCN": (
        "TCN",
        {**CONVOLUTION, "n_chans": 32, "kernel_size": 7},
        {**CONVOLUTION, "n_chans": 128, "kernel_size": 3},
    ),
    "Transformer": ("TransformerModel", {}, {}),
    "Localformer": ("LocalformerModel", {}, {}),
}
"""Name -> class, and its arguments in Qlib's Alpha158 and Alpha360 workflow files, without the training arguments."""


@dataclass(frozen=True)
class Subject:
    """The dataset and the models of a benchmark.

    Attributes
    ----------
    dataset : DatasetH
    estimators : dict
        Not fitted yet, by name.
    source : str
        Where the data comes from.
    """

    dataset: HandlerDataset
    estimators: dict[str, Estimator]
    source: str

    def facts(self) -> dict[str, Any]:
        """Source and size of the data, for the report."""
        panel = self.dataset.handler.panel("infer")
        return {
            "source": self.source,
            "rows": int(panel.n_live),
            "instruments": len(panel.instruments),
            "first": date_text(panel.datetimes[0]),
            "last": date_text(panel.datetimes[-1]),
            "features": len(panel.columns("feature")),
            "step_len": getattr(self.dataset, "step_len", None),
        }


def checked_names(names: Sequence[str] | None) -> list[str]:
    """The names of models, all of them for None.

    Raises
    ------
    ConfigError
        An unknown name.
    """
    by_lower = {name.lower(): name for name in MODELS}
    wanted = list(MODELS) if names is None else [name.strip() for name in names if name.strip()]
    unknown = [name for name in wanted if name.lower() not in by_lower]
    if unknown or not wanted:
        given = unknown[0] if unknown else ""
        raise ConfigError(f"--models {given!r} is unknown; models: {', '.join(MODELS)}.{suggest(given, MODELS)}")
    return list(dict.fromkeys(by_lower[name.lower()] for name in wanted))


def default_subject(names: Sequence[str] | None, data: DataInput | None, read_options: ReadOptions) -> Subject:
    """Time-series models with the settings of Qlib's Alpha158 workflow files.

    Parameters
    ----------
    names : sequence of str, optional
        Default: all models.
    data : path, DataFrame or Panel, optional
        Prices. Default: the synthetic market of `qfast demo`.
    read_options : ReadOptions

    Raises
    ------
    ConfigError, DataError
        An unknown model, or data that cannot be read.
    """
    wanted = checked_names(names)
    if isinstance(data, (str, os.PathLike)) and not Path(data).expanduser().exists():
        raise ConfigError(f"--data {str(data)!r} does not exist (looked in {Path.cwd()}).")
    if isinstance(data, Mapping):
        raise ConfigError("frames by column group need a workflow file; without one, qfast bench reads prices.")
    feature = {"fields_group": "feature"}
    handler = Alpha158(
        data=demo_prices() if data is None else Path(data) if isinstance(data, os.PathLike) else data,
        infer_processors=[
            {"class": "FilterCol", "kwargs": {**feature, "col_list": COLUMNS}},
            {"class": "RobustZScoreNorm", "kwargs": {**feature, "clip_outlier": True}},
            {"class": "Fillna", "kwargs": feature},
        ],
        fit_start_time="1900-01-01",  # all dates: the speed does not depend on them
        fit_end_time="2200-01-01",
        learn_processors=["DropnaLabel", {"class": "CSRankNorm", "kwargs": {"fields_group": "label"}}],
        label=[LABEL],
        read_options=read_options,
    )
    dataset = TSDatasetH(handler=handler, segments=_segments(handler), step_len=STEP_LEN)
    source = "the synthetic market of qfast demo" if data is None else _named(data)
    return Subject(dataset, {name: _estimator(name, dataset, None) for name in wanted}, source)


def workflow_subject(
    path: str | os.PathLike[str],
    names: Sequence[str] | None,
    data: DataInput | None,
    sets: Sequence[str],
    read_options: ReadOptions,
    allow_code: AllowCode = None,
) -> Subject:
    """The model of a workflow file on its dataset, or other models on the same dataset.

    Raises
    ------
    ConfigError, DataError
        A problem with the file, an unknown model, or data that cannot be read.
    """
    wanted = None if names is None else checked_names(names)
    with allowed_code(allow_code):
        workflow = check_workflow(load_config(path, sets).values, str(path))
        locate_sources(workflow, path)
        require_data(data, workflow)
        arguments = workflow.task.model.kwargs
        arguments.pop("model_path", None)  # initial weights do not change the speed
        arguments |= {"device": "cpu", "progress": False}
        dataset = build_dataset(workflow, data, read_options)
        _require_segments(dataset)
        if wanted is None:
            name, estimators = str(workflow.task.model.class_), {}
            estimators[name] = registry.MODELS.build(workflow.task.model.description(), path="task.model")
        else:
            estimators = {name: _estimator(name, dataset, workflow) for name in wanted}
    return Subject(dataset, estimators, _named(data) if data is not None else f"the data of {path}")


def _estimator(name: str, dataset: HandlerDataset, workflow: Workflow | None) -> Estimator:
    """A model with Qlib's settings for the form of the dataset."""
    class_name, rolling, flat = MODELS[name]
    is_rolling = hasattr(dataset, "step_len")
    columns = len(dataset.handler.panel("infer").columns("feature"))
    features = columns if is_rolling or workflow is None else workflow.task.model.kwargs.get("d_feat", 6)
    kind = getattr(ts if is_rolling else models, class_name)
    arguments = rolling if is_rolling else flat
    estimator: Estimator = kind(d_feat=features, seed=0, device="cpu", progress=False, **arguments)
    return estimator


def _segments(handler: Handler) -> dict[str, tuple[pd.Timestamp, pd.Timestamp]]:
    dates = pd.DatetimeIndex(handler.panel("infer").datetimes)
    cut = round(TRAIN_PART * len(dates))
    if cut < 1 or cut >= len(dates):
        raise DataError(f"the data has {len(dates)} dates, too few for a training and a validation segment.")
    return {"train": (dates[0], dates[cut - 1]), "valid": (dates[cut], dates[-1])}


def _require_segments(dataset: HandlerDataset) -> None:
    missing = [name for name in ("train", "valid") if name not in dataset.segments]
    if missing:
        raise ConfigError(
            f"task.dataset.kwargs.segments has no segment {missing[0]!r}, which qfast bench times; it has "
            f"{list(dataset.segments)}."
        )


def _named(data: DataInput) -> str:
    return str(data) if isinstance(data, (str, os.PathLike)) else f"a {type(data).__name__} in memory"
