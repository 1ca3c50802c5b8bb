"""Processors: the steps between raw columns and what a model is fed.

They follow the processors of pyqlib 0.9.7 (qlib/data/dataset/processor.py) value for value, on panels
instead of frames. Statistics look at live rows only. A step that changes values writes one new block
and touches a few columns or a few thousand rows at a time; it overwrites the old block instead where
the caller owns it (`Processor.run`). Dropping rows flips the panel's mask and copies nothing.

Results are float32 also where the reference answers in float64 (CSRankNorm).
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

PROCESSORS.accept(Processor)
for _class in (
    RobustZScoreNorm, ZScoreNorm, MinMaxNorm, CSZScoreNorm, CSRankNorm, CSZFillna, Fillna,
    DropnaProcessor, DropnaLabel, DropCol, FilterCol, ProcessInf, TanhProcess,
):  # fmt: skip
    PROCESSORS.add(_class, modules=("qlib.data.dataset.processor", "qfast.data.processors", "qfast.data"))
PROCESSORS.unavailable(
    "HashStockFormat",
    "HashStockFormat is not available: qfast keeps its data instrument by instrument already. Remedy: leave it out.",
    modules=("qlib.data.dataset.processor",),
)
