"""What qfast requires of a dataset and of a handler, as types for static checking.

Models accept any `Dataset`: the datasets of `qfast.data`, Qlib's `DatasetH` and `TSDatasetH`, or a class of your own.
Workflows also read the handler behind the dataset and therefore need a `HandlerDataset`. No class has to inherit from
these protocols; it only needs the members.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from qfast.dates import DateLike

if TYPE_CHECKING:
    import pandas as pd

    from qfast.data.panel import Panel
    from qfast.data.prices import Prices
    from qfast.data.processors import Processor

__all__ = ["Bounds", "Columns", "Dataset", "Handler", "HandlerDataset", "PricedHandler", "Segment", "Selector"]

Bounds: TypeAlias = "tuple[DateLike | None, DateLike | None]"
"""(start, end) of a segment, both inclusive; None is unbounded."""

Segment: TypeAlias = "str | slice | Bounds"
"""The name of a segment, `slice(start, end)` or `(start, end)`."""

Selector: TypeAlias = "slice | DateLike | Sequence[Any] | pd.Index"
"""Rows of a handler: a slice or pair of dates, one date or instrument, a list of them, or an index."""

Columns: TypeAlias = "str | Sequence[str]"
"""A column group such as "feature", a list of groups, "__all" or "__raw"."""


class Dataset(Protocol):
    """Named segments of data, from which a model is trained or predicts.

    Source: qlib/data/dataset/__init__.py of pyqlib 0.9.7.

    Examples
    --------
    >>> import pandas as pd
    >>> class LastClose:
    ...     segments = {"test": ("2024-01-02", "2024-01-03")}
    ...     def __init__(self, frame):
    ...         self.frame = frame
    ...     def prepare(self, segments, col_set, data_key):
    ...         start, end = self.segments[segments]
    ...         return self.frame.loc[start:end]
    >>> index = pd.MultiIndex.from_product([pd.date_range("2024-01-01", periods=3), ["A"]],
    ...                                    names=["datetime", "instrument"])
    >>> dataset: Dataset = LastClose(pd.DataFrame({"close": [1.0, 2.0, 3.0]}, index=index))
    >>> len(dataset.prepare("test", col_set="feature", data_key="infer"))
    2
    """

    @property
    def segments(self) -> Mapping[str, Bounds]:
        """Bounds of each segment by name. `fit` uses "train" and, if present, "valid"."""

    def prepare(self, segments: Segment, /, *, col_set: Columns, data_key: str) -> Any:
        """Samples of one segment.

        Parameters
        ----------
        segments : str, slice or (start, end)
        col_set : str or list of str
            "feature" or ["feature", "label"].
        data_key : {"learn", "infer"}
            "learn" for training, "infer" for prediction.

        Returns
        -------
        DataFrame or TSDataSampler
            A frame indexed (datetime, instrument) with one sample per row, or a sampler of windows.
        """


class Handler(Protocol):
    """Columns of a panel in their raw, inference and training versions, with the processors in between.

    `qfast.data.DataHandlerLP` and its subclasses satisfy it. Source: qlib/data/dataset/handler.py of pyqlib 0.9.7;
    `panel` is qfast's addition.
    """

    drop_raw: bool
    """True if the raw data is discarded after processing."""

    @property
    def shared_processors(self) -> Sequence[Processor]:
        """Processors whose result both stages below start from."""

    @property
    def infer_processors(self) -> Sequence[Processor]:
        """Processors of the data for prediction."""

    @property
    def learn_processors(self) -> Sequence[Processor]:
        """Processors of the data for training."""

    def panel(self, data_key: str = ..., /) -> Panel:
        """The panel of "raw", "infer" or "learn"."""

    def fetch(self, selector: Selector = ..., /, *, col_set: Columns = ..., data_key: str = ...) -> pd.DataFrame:
        """Selected rows and columns as a frame sorted by (datetime, instrument)."""

    def get_cols(self, col_set: Columns = ..., data_key: str = ..., /) -> list[Any]:
        """Names of the columns that `fetch` returns."""


class PricedHandler(Handler, Protocol):
    """A handler that also has prices, which a backtest needs."""

    def quotes(
        self,
        instruments: Sequence[str],
        fields: Sequence[str],
        start_time: DateLike | None,
        end_time: DateLike | None,
        /,
    ) -> Prices:
        """Prices of any instruments of the source, from one day before `start_time`."""


class HandlerDataset(Dataset, Protocol):
    """A dataset whose handler is accessible, as workflows, checks and reports need it."""

    @property
    def handler(self) -> Handler:
        """The handler that the segments are cut from."""
