"""The functions of factor expressions: their arguments, and how many rows around the current one they read.

`qfast.data.factor_chunk` and `qfast.data.rolling` compute them. Names, arguments and meaning are those of pyqlib 0.9.7
(qlib/data/ops.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from qfast._renamed import renamed_names
from qfast.errors import ConfigError, shown

__all__ = ["FUNCTIONS", "ExpressionFunction", "Reach", "register_function", "unregister_function"]

Reach = tuple[int, int]  # rows before and after the current one
SYMBOLS = {
    "Add": "+",
    "Sub": "-",
    "Mul": "*",
    "Div": "/",
    "Power": "**",
    "Gt": ">",
    "Ge": ">=",
    "Lt": "<",
    "Le": "<=",
    "Eq": "==",
    "Ne": "!=",
    "And": "&",
    "Or": "|",
}
MAX_ROWS = 10**9  # largest shift and longest window
EMA_TAIL = 1e-6  # Qlib reads an exponential mean back to the row whose weight falls below this
REACH_FORMAT = "(rows before, rows after), two whole numbers of at least 0 such as (5, 0)"


@dataclass(frozen=True)
class ExpressionFunction:
    """One function of the expression language.

    Attributes
    ----------
    name : str
    series : int
        Number of leading arguments that are expressions.
    settings : tuple of str
        Kinds of the trailing arguments, which are constants: "window", "shift", "share" (0 to 1), "instrument" or
        "number".
    form : str
        How it is computed: "elementwise", "condition", "shift", "delta", "rolling", "pair" (rolling over two series),
        "other instrument" or "user" (registered).
    least : int
        Shortest window in rows.
    decays : bool
        True if a window between 0 and 1 is allowed. It is the weight of the newest value of an exponential mean.
    reach : callable, optional
        reach(*settings) returns the rows read before and after the current one. None: derived from `form`.
    function : callable, optional
        The Python function behind a registered function.
    """

    name: str
    series: int
    settings: tuple[str, ...] = ()
    form: str = "elementwise"
    least: int = 1
    decays: bool = False
    reach: Callable[..., Reach] | None = None
    function: Callable[..., Any] | None = None

    def widened(self, settings: tuple[Any, ...], inner: Reach) -> Reach:
        """Rows that a call reads before and after the current one.

        Parameters
        ----------
        settings : tuple
            Constants of the call.
        inner : (int, int)
            Reach of its arguments.

        Raises
        ------
        ConfigError
            The reach of a registered function fails or does not return two whole numbers.
        """
        before, after = inner
        if self.reach is not None:
            try:
                rows = self.reach(*settings)
            except Exception as error:
                raise ConfigError(
                    f"reach of function {self.name!r} failed for the settings {settings}: "
                    f"{type(error).__name__}: {error}"
                ) from error
            if not _is_reach(rows):
                raise ConfigError(
                    f"reach of function {self.name!r} returned {shown(rows)} for the settings {settings}; "
                    f"it must return {REACH_FORMAT}."
                )
            return before + int(rows[0]), after + int(rows[1])
        if self.form in ("shift", "delta"):
            rows = settings[0]
            return max(before + rows, before), max(after - rows, after)
        if self.form in ("rolling", "pair"):
            window = settings[0]
            if 0 < window < 1:
                window = int(min(math.log(EMA_TAIL) / math.log1p(-window), MAX_ROWS))
            return before + max(window - 1, 0), after
        return before, after

    def from_the_first_row(self, settings: tuple[Any, ...]) -> bool:
        """True if the value depends on all earlier rows, and therefore on the first row of the data."""
        if self.form in ("shift", "delta", "rolling", "pair"):
            return self.name == "EMA" or settings[0] == 0 or 0 < settings[0] < 1
        return False


def _is_reach(value: object) -> bool:
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        return False
    return all(hasattr(part, "__index__") and not isinstance(part, bool) and part >= 0 for part in value)


def _builtin() -> dict[str, ExpressionFunction]:
    make = ExpressionFunction
    window = ("window",)
    functions = [
        *(make(name, 2) for name in (*SYMBOLS, "Greater", "Less")),
        *(make(name, 1) for name in ("Abs", "Sign", "Log", "Not")),
        make("If", 3, form="condition"),
        make("Ref", 1, ("shift",), "shift"),
        make("Delta", 1, ("shift",), "delta"),
        *(
            make(name, 1, window, "rolling", decays=True)
            for name in ("Mean", "Sum", "Std", "Var", "Max", "Min", "Med", "Count", "EMA")
        ),
        make("Skew", 1, window, "rolling", least=3),
        make("Kurt", 1, window, "rolling", least=4),
        *(
            make(name, 1, window, "rolling")
            for name in ("Mad", "Rank", "IdxMax", "IdxMin", "Slope", "Rsquare", "Resi", "WMA")
        ),
        make("Quantile", 1, ("window", "share"), "rolling"),
        *(make(name, 2, window, "pair") for name in ("Corr", "Cov")),
        make("Mask", 1, ("instrument",), "other instrument"),
    ]
    return {function.name: function for function in functions}


FUNCTIONS: dict[str, ExpressionFunction] = _builtin()
BUILTIN = frozenset(FUNCTIONS)


def register_function(
    name: str,
    function: Callable[..., Any],
    *,
    series: int = 1,
    settings: int = 0,
    reach: Reach | Callable[..., Reach] = (0, 0),
) -> None:
    """Make a Python function available in factor expressions.

    Parameters
    ----------
    name : str
        The name in expressions. Registering a name again replaces the function; built-in functions cannot be replaced.
    function : callable
        Called once per instrument with `series` read-only arrays [L] of its rows in order of time, followed by the
        settings. It returns L values.
    series : int
        Number of leading arguments that are expressions.
    settings : int
        Number of trailing arguments that are numbers.
    reach : (int, int), or callable of the settings
        Rows before and after the current one that the function reads. Handlers load that many additional rows.

    Raises
    ------
    ConfigError
        The name is built in or is not an identifier, the function is not callable, or a number is out of range.

    Examples
    --------
    >>> import numpy as np, pandas as pd
    >>> from qfast.data.factors import evaluate
    >>> from qfast.data.panel import Panel
    >>> register_function("Twice", lambda x, times: x * 2 * times, settings=1)
    >>> index = pd.MultiIndex.from_product([pd.date_range("2024-01-01", periods=2), ["A"]],
    ...                                    names=["datetime", "instrument"])
    >>> panel = Panel.from_frame(pd.DataFrame({"close": [1.0, 2.0]}, index=index), group="price")
    >>> evaluate("Twice($close, 3) + 1", panel).tolist()
    [7.0, 13.0]
    >>> unregister_function("Twice")
    """
    if not isinstance(name, str) or not name.isidentifier():
        raise ConfigError(f"the name of a function must be an identifier such as 'Alpha', got {shown(name)}.")
    if name in BUILTIN:
        raise ConfigError(f"function {name!r} is built in. Remedy: register it under another name.")
    if not callable(function):
        raise ConfigError(f"function {name!r} must be callable, got {shown(function)}.")
    for what, value, least in (("series", series, 1), ("settings", settings, 0)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ConfigError(f"{what} of function {name!r} must be a whole number of at least {least}, got {value!r}.")
    if callable(reach):
        rows = reach
    else:
        if not _is_reach(reach):
            raise ConfigError(f"reach of function {name!r} must be {REACH_FORMAT}, got {shown(reach)}.")
        before, after = reach

        def rows(*_: object) -> Reach:
            return before, after

    FUNCTIONS[name] = ExpressionFunction(name, series, ("number",) * settings, "user", reach=rows, function=function)


def unregister_function(name: str) -> None:
    """Remove a function that was added with `register_function`.

    Parameters
    ----------
    name : str

    Raises
    ------
    ConfigError
        The name is unknown or built in.

    Examples
    --------
    >>> register_function("Half", lambda x: x / 2)
    >>> unregister_function("Half")
    """
    if name in BUILTIN or name not in FUNCTIONS:
        raise ConfigError(
            f"{name!r} is not a registered function. Remedy: unregister only names passed to register_function."
        )
    del FUNCTIONS[name]


def check_setting(function: ExpressionFunction, kind: str, value: object) -> str | None:
    """The problem with a constant argument of a call, or None if it is valid.

    >>> check_setting(FUNCTIONS["Ref"], "shift", 1.5)
    'Ref(x, n) needs a whole number n, got 1.5'
    """
    name = function.name
    whole = isinstance(value, int) and not isinstance(value, bool)
    if kind == "instrument":
        return None if isinstance(value, str) else f"{name} needs the name of an instrument in quotes"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return f"{name} needs a number here, got {value}"
    if kind in ("shift", "window") and not abs(value) <= MAX_ROWS:
        return f"{name}(x, n): n is limited to {MAX_ROWS:,}, got {value}"
    if kind == "shift":
        return None if whole else f"{name}(x, n) needs a whole number n, got {value}"
    if kind == "window":
        if whole and (value == 0 or value >= function.least):
            return None
        if function.decays and isinstance(value, float) and 0 < value < 1:
            return None
        weight = ", or a weight between 0 and 1" if function.decays else ""
        least = f"a whole number of rows of at least {function.least} (0: all rows so far)"
        return f"{name} needs {least}{weight}, got {value}"
    if kind == "share":
        return None if 0 <= value <= 1 else f"{name} needs a share from 0 to 1, got {value}"
    return None


__getattr__ = renamed_names(
    __name__,
    {
        "OPERATORS": f"{__name__}.FUNCTIONS",
        "Operator": f"{__name__}.ExpressionFunction",
        "register_operator": f"{__name__}.register_function",
        "unregister_operator": f"{__name__}.unregister_function",
    },
)
