"""Command-line options: those of `ReadOptions`, shared by all commands with --data, and those of `qfast study`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from qfast.read_options import ReadOptions, command_line

__all__ = [
    "EngineOption",
    "EnsembleOption",
    "ExpandingOption",
    "GpusOption",
    "GridOption",
    "JobsOption",
    "LabelDaysOption",
    "ResumeStudyOption",
    "RollingOption",
    "SearchOption",
    "SeedsOption",
    "StudyOutputOption",
    "ThreadsOption",
    "TrialsOption",
    "WarmStartOption",
    "with_read_options",
]

AXES = "Axes, which multiply"
ENGINE = "Where the runs are executed"

StudyOutputOption = Annotated[
    Path | None,
    typer.Option("--output", "-o", help="Study folder to create. Default: studies/<experiment>-<UTC time>."),
]
SeedsOption = Annotated[
    str | None,
    typer.Option(
        help="A number of seeds, counted from the seed of the workflow file or 0, or a list such as 3,5,8.",
        rich_help_panel=AXES,
    ),
]
GridOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KEY=V1,V2",
        help="Values of one key of the workflow file, for example task.model.kwargs.lr=1e-3,1e-4. Repeatable.",
        rich_help_panel=AXES,
    ),
]
SearchOption = Annotated[
    Path | None, typer.Option(help="YAML file of a search with Optuna. Needs the extra tune.", rich_help_panel=AXES)
]
TrialsOption = Annotated[int | None, typer.Option(help="Number of trials of the search.", rich_help_panel=AXES)]
RollingOption = Annotated[
    int | None,
    typer.Option(
        metavar="STEP", help="Train again every STEP days, and test on these days only.", rich_help_panel=AXES
    ),
]
ExpandingOption = Annotated[
    bool,
    typer.Option("--expanding", help="Rolling: the training segment keeps its first day.", rich_help_panel=AXES),
]
WarmStartOption = Annotated[
    bool,
    typer.Option("--warm-start", help="Rolling: begin with the weights of the previous window.", rich_help_panel=AXES),
]
LabelDaysOption = Annotated[
    int | None,
    typer.Option(
        help="Rolling: later days that a label reads. Default: known from the expression of the label.",
        rich_help_panel=AXES,
    ),
]
EnsembleOption = Annotated[
    str | None, typer.Option(help="Ensemble scores: rank (default) or zscore, averaged over the seeds.")
]
JobsOption = Annotated[
    int | None, typer.Option(help="Processes. Default: cores / threads; 1 on a GPU.", rich_help_panel=ENGINE)
]
ThreadsOption = Annotated[int, typer.Option(help="Threads of each process.", rich_help_panel=ENGINE)]
EngineOption = Annotated[
    str, typer.Option(help="local, ray or ray://HOST:PORT. Ray needs the extra ray.", rich_help_panel=ENGINE)
]
GpusOption = Annotated[
    float | None,
    typer.Option(help="Ray: GPUs of each run. Default: 1 if the device is cuda.", rich_help_panel=ENGINE),
]
ResumeStudyOption = Annotated[
    Path | None, typer.Option(help="Continue the study in this folder. Finished runs remain as they are.")
]

PANEL = "How to read --data (default: detected; recorded in the run)"
HELP: dict[str, tuple[type, str]] = {
    "date_format": (
        str,
        "Format of all dates, for example '%d/%m/%Y'; iso; or for numbers excel, unix_s, unix_ms, unix_us or unix_ns.",
    ),
    "encoding": (str, "Text encoding of CSV files, for example gb18030 or latin-1."),
    "separator": (str, "Character between the columns of CSV files, for example ';' or tab."),
    "decimal": (str, "Decimal mark of numbers, '.' or ','. The other one separates thousands."),
    "freq": (
        str,
        "day: normalize times to dates and use the last row of a day. For a Qlib data folder, the frequency to read.",
    ),
    "time_zone": (
        str,
        "Convert times with a UTC offset and Unix times to this zone, for example Asia/Shanghai; others are in it.",
    ),
    "instrument_column": (str, "Column with the instruments."),
    "adjust": (bool, "Multiply prices by adjusted close / close, and divide the volume by it."),
}


def with_read_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add an option for each field of `ReadOptions` to a command, which receives them as the argument `read_options`.

    typer builds the options from the signature of the returned function.
    """

    @functools.wraps(command)
    def with_options(**arguments: Any) -> None:
        options = ReadOptions(**{name: arguments.pop(name) for name in HELP})
        command(**arguments, read_options=options)

    signature = inspect.signature(command, eval_str=True)
    own = [parameter for name, parameter in signature.parameters.items() if name != "read_options"]
    added = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[kind | None, typer.Option(command_line(name), help=text, rich_help_panel=PANEL)],
        )
        for name, (kind, text) in HELP.items()
    ]
    parameters = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own]
    with_options.__signature__ = signature.replace(parameters=[*parameters, *added])  # type: ignore[attr-defined]
    with_options.__annotations__ = {p.name: p.annotation for p in [*parameters, *added]}
    return with_options
