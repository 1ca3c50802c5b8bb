"""The command-line options of `ReadOptions`, shared by all commands with --data."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

from qfast.read_options import ReadOptions, command_line

__all__ = ["with_read_options"]

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
