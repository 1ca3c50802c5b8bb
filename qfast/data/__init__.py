"""From prices to batches: sources, panels, factors, handlers, processors and datasets.

    load_prices                     read prices from files, folders, frames or a Qlib store
    ReadOptions                     formats of dates and numbers, encoding and separator of tables
    Panel                           the table of all (instrument, datetime) rows
    Alpha158, Alpha360, ...         handlers: features and label computed from prices, and processors
    FactorHandler                   a handler with your own factor expressions
    DataHandlerLP                   a handler over given columns
    DatasetH, TSDatasetH            named segments of a handler's data: rows, or windows
    TSDataSampler                   windows by number or by (datetime, instrument)
    Dataset, Handler, HandlerDataset  the types that models and workflows accept

Submodules: `qfast.data.factors` evaluates factor expressions, `qfast.data.processors` contains the processors, and
`qfast.data.synthetic` generates markets for tests.
"""

from qfast.data.dataset import DatasetH, TSDataSampler, TSDatasetH
from qfast.data.handlers import Alpha158, Alpha158vwap, Alpha360, Alpha360vwap, DataHandlerLP, FactorHandler
from qfast.data.panel import Panel
from qfast.data.protocols import Dataset, Handler, HandlerDataset
from qfast.data.sources import load_prices
from qfast.read_options import ReadOptions

__all__ = [
    "Alpha158",
    "Alpha158vwap",
    "Alpha360",
    "Alpha360vwap",
    "DataHandlerLP",
    "Dataset",
    "DatasetH",
    "FactorHandler",
    "Handler",
    "HandlerDataset",
    "Panel",
    "ReadOptions",
    "TSDataSampler",
    "TSDatasetH",
    "load_prices",
]
