"""The records of a workflow, named and configured as in Qlib: further analysis of the scores.

A run always writes scores, labels, IC and rank IC. Records add to them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import pandas as pd

from qfast.data.protocols import HandlerDataset
from qfast.errors import ConfigError
from qfast.metrics import ic_summary, long_short_return, long_short_summary
from qfast.registry import RECORDS
from qfast.workflow.config import fill_placeholders
from qfast.workflow.portfolio import PortfolioPlan

if TYPE_CHECKING:
    from qfast.training.estimator import Estimator
    from qfast.workflow.results import SegmentResult
    from qfast.workflow.schema import Workflow

__all__ = ["PortAnaRecord", "Record", "SigAnaRecord", "SignalRecord", "build_records"]

MODULES = ("qlib.workflow.record_temp", "qfast.workflow.records", "qfast.workflow")


class Record:
    """Base class of records, which add metrics and daily series to the results of a segment.

    A class with a `notice` is accepted in workflow files, but not supported. The notice is logged and shown in the
    report.
    """

    notice: ClassVar[str] = ""

    def metrics(self, segment: SegmentResult) -> dict[str, float]:
        """Additional metrics of one segment, by name."""
        return {}

    def series(self, segment: SegmentResult) -> dict[str, pd.Series]:
        """Additional daily series of one segment, by name."""
        return {}


@dataclass
class SignalRecord(Record):
    """Scores and raw labels, which a run always writes. The arguments exist for compatibility with Qlib."""

    model: Any = None
    dataset: Any = None
    recorder: Any = None


@dataclass
class SigAnaRecord(Record):
    """IC, ICIR, rank IC and rank ICIR of each segment; with `ana_long_short` also long-short returns.

    Parameters
    ----------
    ana_long_short : bool
        Add the return and Sharpe ratio of the best minus the worst fifth, and of all instruments.
    ann_scaler : float
        Number of trading days in a year.
    label_col : int
        Must be 0, because a model is trained on one label.
    skip_existing, recorder
        Ignored; for compatibility with Qlib.

    Raises
    ------
    ConfigError
        `label_col` is not 0, or `ann_scaler` is not positive.

    Source: qlib/workflow/record_temp.py, SigAnaRecord.
    """

    ana_long_short: bool = False
    ann_scaler: float = 252
    label_col: int = 0
    skip_existing: bool = False
    recorder: Any = None

    def __post_init__(self) -> None:
        if self.label_col != 0:
            raise ConfigError(f"SigAnaRecord: label_col must be 0, the only label; got {self.label_col!r}.")
        if not self.ann_scaler > 0:
            raise ConfigError(
                f"SigAnaRecord: ann_scaler, the number of days in a year, must be positive, got {self.ann_scaler!r}."
            )

    @staticmethod
    def check_arguments(kwargs: Mapping[str, Any]) -> None:
        """Raise a ConfigError for invalid arguments of a workflow file."""
        SigAnaRecord(**kwargs)

    def metrics(self, segment: SegmentResult) -> dict[str, float]:
        """IC, ICIR, Rank IC, Rank ICIR and, with `ana_long_short`, annualized long-short returns."""
        metrics = ic_summary(segment.ic, segment.rank_ic)
        if self.ana_long_short:
            metrics |= long_short_summary(*long_short_return(segment.score, segment.label), ann_scaler=self.ann_scaler)
        return metrics

    def series(self, segment: SegmentResult) -> dict[str, pd.Series]:
        """Daily ic, rank_ic and, with `ana_long_short`, long_short and long_avg."""
        series = {"ic": segment.ic, "rank_ic": segment.rank_ic}
        if self.ana_long_short:
            series["long_short"], series["long_avg"] = long_short_return(segment.score, segment.label)
        return series


class PortAnaRecord(Record):
    """Returns, costs and risk of a portfolio that trades on the scores of the segment test.

    Parameters
    ----------
    config : mapping, optional
        Qlib's configuration with "strategy" and "backtest", see `qfast.workflow.portfolio.PortfolioPlan`.
    risk_analysis_freq, indicator_analysis_freq : str or list of str, optional
        Must be "day" or "1day".
    indicator_analysis_method : str, optional
        Must be "mean".
    skip_existing, recorder
        Ignored; for compatibility with Qlib.

    Raises
    ------
    ConfigError
        The configuration is invalid or not supported.

    Source: qlib/workflow/record_temp.py, PortAnaRecord.
    """

    def __init__(
        self,
        config: Mapping[str, Any] | None = None,
        risk_analysis_freq: object = None,
        indicator_analysis_freq: object = None,
        indicator_analysis_method: str | None = None,
        skip_existing: bool = False,
        recorder: object = None,
    ) -> None:
        frequencies = {
            "risk_analysis_freq": risk_analysis_freq,
            "indicator_analysis_freq": indicator_analysis_freq,
        }
        for name, freq in frequencies.items():
            if freq not in (None, "day", "1day", ["day"], ["1day"]):
                raise ConfigError(f"PortAnaRecord: {name} must be 'day', got {freq!r}.")
        if indicator_analysis_method not in (None, "mean"):
            raise ConfigError(
                f"PortAnaRecord: indicator_analysis_method must be 'mean', got {indicator_analysis_method!r}."
            )
        self.config = config
        self.plan = PortfolioPlan(config)

    @staticmethod
    def check_arguments(kwargs: Mapping[str, Any]) -> None:
        """Raise a ConfigError for invalid arguments of a workflow file."""
        PortAnaRecord(**kwargs)


def build_records(workflow: Workflow, model: Estimator | None, dataset: HandlerDataset) -> list[Record]:
    """The records of a workflow, in the order of the file."""
    # <PRED> stays as it is: the backtest replaces it with the scores.
    objects = {"<MODEL>": model, "<DATASET>": dataset, "<PRED>": "<PRED>"}
    task = workflow.resolved()["task"]
    return [
        RECORDS.build(fill_placeholders(spec.description(), objects, task), path=f"task.record.{position}")
        for position, spec in enumerate(workflow.task.record)
    ]


RECORDS.base = Record
RECORDS.accept(Record)
for _class in (SignalRecord, SigAnaRecord, PortAnaRecord):
    RECORDS.add(_class, modules=MODULES)
for _name in ("HFSignalRecord", "MultiPassPortAnaRecord", "ACRecordTemp", "MultiSegRecord"):
    RECORDS.unavailable(
        _name,
        f"{_name} is not available in qfast. Remedy: remove it from task.record, or use --engine qlib.",
        modules=("qlib.workflow.record_temp", "qlib.contrib.workflow.record_temp", "qlib.contrib.workflow"),
    )
