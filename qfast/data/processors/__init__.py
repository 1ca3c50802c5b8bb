"""Processors: the steps between raw columns and the data that a model reads.

They compute the same values as the processors of pyqlib 0.9.7 (qlib/data/dataset/processor.py), on panels instead of
frames. Statistics use live rows only. Results are float32. This includes CSRankNorm, whose result is float64 in Qlib.

A step that changes values works on a few columns or a few thousand rows at a time. It writes one new block, or
overwrites the old one if the caller allows it (`Processor.run`). A step that drops rows only changes the panel's mask.
"""

from __future__ import annotations

from qfast.data.processors.base import (
    LearnOnlyProcessorError,
    Processor,
    ProcessorSpec,
    Workspace,
    build_processor,
    run_processors,
)
from qfast.data.processors.cross_section import CSRankNorm, CSZFillna, CSZScoreNorm, ProcessInf
from qfast.data.processors.filling import (
    DropCol,
    DropnaLabel,
    DropnaProcessor,
    Fillna,
    FilterCol,
    TanhProcess,
)
from qfast.data.processors.fitted import MinMaxNorm, RobustZScoreNorm, ZScoreNorm
from qfast.registry import PROCESSORS

__all__ = [
    "CSRankNorm",
    "CSZFillna",
    "CSZScoreNorm",
    "DropCol",
    "DropnaLabel",
    "DropnaProcessor",
    "Fillna",
    "FilterCol",
    "LearnOnlyProcessorError",
    "MinMaxNorm",
    "ProcessInf",
    "Processor",
    "ProcessorSpec",
    "RobustZScoreNorm",
    "TanhProcess",
    "Workspace",
    "ZScoreNorm",
    "build_processor",
    "run_processors",
]

PROCESSORS.base = Processor
PROCESSORS.accept(Processor)
for _class in (
    RobustZScoreNorm,
    ZScoreNorm,
    MinMaxNorm,
    CSZScoreNorm,
    CSRankNorm,
    CSZFillna,
    Fillna,
    DropnaProcessor,
    DropnaLabel,
    DropCol,
    FilterCol,
    ProcessInf,
    TanhProcess,
):
    PROCESSORS.add(_class, modules=("qlib.data.dataset.processor", "qfast.data.processors", "qfast.data"))
PROCESSORS.unavailable(
    "HashStockFormat",
    "HashStockFormat is not available: qfast already stores its data instrument by instrument. Remedy: remove it.",
    modules=("qlib.data.dataset.processor",),
)
