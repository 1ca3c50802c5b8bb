"""What a run keeps besides its weights: scores, their analysis. Named and configured as in the reference.

Scores, labels, IC and rank IC are always written; a record says how they are analysed further.
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
    """Base: adds to a segment's metrics, and says what it could not do."""

    notice: ClassVar[str] = ""

    def metrics(self, segment: SegmentResult) -> dict[str, float]:
        """Further numbers of one segment."""
        return {}

    def series(self, segment: SegmentResult) -> dict[str, pd.Series]:
        """Further daily series of one segment, by name."""
        return {}


@dataclass
class SignalRecord(Record):
    """Scores and raw labels. `model` and `dataset` are accepted for the reference's sake."""

    model: Any = None
    dataset: Any = None
    recorder: Any = None


@dataclass
class SigAnaRecord(Record):
    """IC, ICIR, rank IC, rank ICIR by segment; with `ana_long_short` also long-short returns.

    Parameters
    ----------
    ana_long_short : bool
        Add return and Sharpe ratio of the best against the worst fifth, and of all instruments.
    ann_scaler : float
        Days of a year.
    label_col : int
        Must be 0: a model is trained on exactly one label.
    """

    ana_long_short: bool = False
    ann_scaler: float = 252
    label_col: int = 0
    skip_existing: bool = False
    recorder: Any = None

    def __post_init__(self) -> None:
        if self.label_col != 0:
            raise ConfigError(f"SigAnaRecord: label_col must be 0, the only label there is; got {self.label_col!r}.")
        if not self.ann_scaler > 0:
            raise ConfigError(f"SigAnaRecord: ann_scaler, days of a year, must be positive, got {self.ann_scaler!r}.")

    @staticmethod
    def check_arguments(kwargs: Mapping[str, Any]) -> None:
        """Raise a ConfigError for what a workflow file cannot say."""
        SigAnaRecord(**kwargs)

    def metrics(self, segment: SegmentResult) -> dict[str, float]:
        found = ic_summary(segment.ic, segment.rank_ic)
        if self.ana_long_short:
            found |= long_short_summary(*long_short_return(segment.score, segment.label), ann_scaler=self.ann_scaler)
        return found

    def series(self, segment: SegmentResult) -> dict[str, pd.Series]:
        out = {"ic": segment.ic, "rank_ic": segment.rank_ic}
        if self.ana_long_short:
            out["long_short"], out["long_avg"] = long_short_return(segment.score, segment.label)
        return out


class PortAnaRecord(Record):
    """A portfolio that follows the scores of the segment test: returns, costs, risk.

    Parameters
    ----------
    config : mapping, optional
        The reference's, with "strategy" and "backtest"; see `qfast.workflow.portfolio.PortfolioPlan`.
    risk_analysis_freq, indicator_analysis_freq : str, optional
        Must be a day.
    indicator_analysis_method : str, optional
        Must be "mean".

    Raises
    ------
    ConfigError
        Something in the configuration that is not known or not available.
    """

    def __init__(
        self,
        config: Any = None,
        risk_analysis_freq: Any = None,
        indicator_analysis_freq: Any = None,
        indicator_analysis_method: str | None = None,
        skip_existing: bool = False,
        recorder: Any = None,
    ) -> None:
        for name, freq in (
            ("risk_analysis_freq", risk_analysis_freq), ("indicator_analysis_freq", indicator_analysis_freq),
        ):  # fmt: skip
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
        """Raise a ConfigError for what a workflow file cannot say."""
        PortAnaRecord(**kwargs)


def build_records(workflow: Workflow, model: Estimator | None, dataset: HandlerDataset) -> list[Record]:
    """The records of a workflow, in the order of the file."""
    # <PRED> stays as it is: the backtest replaces it with the scores.
    objects = {"<MODEL>": model, "<DATASET>": dataset, "<PRED>": "<PRED>"}
    task = workflow.resolved()["task"]
    return [
        RECORDS.build(fill_placeholders(spec.given(), objects, task), path=f"task.record.{position}")
        for position, spec in enumerate(workflow.task.record)
    ]


RECORDS.accept(Record)
for _class in (SignalRecord, SigAnaRecord, PortAnaRecord):
    RECORDS.add(_class, modules=MODULES)
for _name in ("HFSignalRecord", "MultiPassPortAnaRecord", "ACRecordTemp", "MultiSegRecord"):
    RECORDS.unavailable(
        _name,
        f"{_name} is not available in this version. Remedy: leave it out of task.record.",
        modules=("qlib.workflow.record_temp", "qlib.contrib.workflow.record_temp", "qlib.contrib.workflow"),
    )
