"""Score new data with a finished run: saved weights and fitted processors; nothing is fitted again."""

from __future__ import annotations

import os

import pandas as pd

from qfast._renamed import renamed_names
from qfast.data.prices import Instruments
from qfast.dates import DateLike
from qfast.read_options import ReadSettings
from qfast.workflow.dataset import DataInput
from qfast.workflow.saved_run import load
from qfast.workflow.user_code import AllowCode

__all__ = ["predict"]

__getattr__ = renamed_names(
    __name__,
    {
        "build_dataset": "qfast.workflow.dataset.build_dataset",
        "data_facts": "qfast.workflow.dataset.data_facts",
        "data_source": "qfast.workflow.dataset.data_source",
        "save_scoring": "qfast.workflow.saved_model.save_scoring",
        "scoring_summary": "qfast.workflow.info.run_info",
    },
)


def predict(
    run_path: str | os.PathLike[str],
    data: DataInput | None = None,
    *,
    start: DateLike | None = None,
    end: DateLike | None = None,
    date: DateLike | None = None,
    instruments: Instruments = None,
    device: str = "auto",
    allow_code: AllowCode = None,
    read_options: ReadSettings = None,
    weights: str | os.PathLike[str] | None = None,
) -> pd.Series:
    """Score new data with the best weights of a run.

    Parameters
    ----------
    run_path : path
        A run folder. An interrupted run scores with its best weights so far.
    data : path, DataFrame or Panel, optional
        Prices, or factors if the model was trained on factors, as for `run`. Labels are not needed. The data must begin
        early enough for the features: 60 trading days before the first date to score for Alpha360. Default: the source
        that the run was trained on, which may have grown since.
    start, end : date-like, optional
        First and last date to score, both inclusive. Features still use earlier rows.
    date : date-like or "latest", optional
        The only date to score, instead of `start` and `end`. "latest" is the last date for which the data has values.
    instruments : str, list or {code: [(start, end), ...]}, optional
        Instruments to score. Default: those of the workflow, which for a market are its members on each day, as in
        training. "all" scores every instrument of the data.
    device : str
        "auto", "cpu", "cuda", "cuda:1".
    allow_code : path or sequence of paths, optional
        Permits the classes of a run that `qfast.run` has trained with `allow_code`.
    read_options : ReadOptions or mapping, optional
        How to read a table. Default: the options of the run.
    weights : path, optional
        Weights that replace those of the run, for example weights that were trained further in Python.

    Returns
    -------
    Series
        float32, name "score", sorted by (datetime, instrument). Includes the last date of the data, which has no label
        yet. `attrs["notes"]` lists the warnings, for example about dates whose features look back beyond the data.

    Raises
    ------
    ConfigError
        `run_path` is not a run folder, `date` is combined with `start` or `end`, the data of the run is no longer
        where it was, or the run uses classes that require `allow_code`.
    CheckpointError
        A file of the run is missing, truncated or inconsistent.
    DataError
        The columns differ from those in training, no row is between `start` and `end`, or no row has as many days as
        the features need.

    Examples
    --------
    >>> predict("no/such/run", None)
    Traceback (most recent call last):
    ...
    qfast.errors.ConfigError: run folder 'no/such/run' does not exist.
    """
    saved = load(run_path, device=device, allow_code=allow_code, weights=weights)
    return saved.predict(data, start, end, date=date, instruments=instruments, read_options=read_options)
