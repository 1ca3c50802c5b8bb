"""Look-ahead and unlimited lookback of expressions, which are known without any data."""

from __future__ import annotations

from qfast.data.expression import Call, Node, Number, parse
from qfast.data.expression_functions import FUNCTIONS
from qfast.data.factors import depends_on_the_start
from qfast.data.handlers.prices import PriceHandler, priced_handler
from qfast.data.protocols import Handler
from qfast.errors import shown, some
from qfast.workflow.check.findings import CheckReport

__all__ = ["check_expressions", "feature_expressions_of", "rows_ahead", "start_dependent_features"]


def check_expressions(report: CheckReport, handler: Handler) -> None:
    """Report the features whose expressions look ahead, even if the data does not reveal it."""
    priced = priced_handler(handler)
    if priced is None:
        return
    expressions = feature_expressions_of(priced)
    ahead = {name: rows for name, text in expressions.items() if (rows := rows_ahead(parse(text))) > 0}
    if ahead:
        listed = some([f"{name} {rows} row(s), {shown(expressions[name])}" for name, rows in ahead.items()], most=3)
        report.add(
            "error",
            "look-ahead",
            f"{len(ahead)} feature(s) look ahead: {listed}. Remedy: use a positive n in Ref(x, n); only labels may "
            "look ahead",
        )
    elif expressions:
        report.add("ok", "look-ahead", f"none of the {len(expressions)} expressions looks ahead")
    elif priced.lookahead > 0:
        report.add(
            "error",
            "look-ahead",
            f"features of {type(priced).__name__} look {priced.lookahead} row(s) ahead, according to its lookahead",
        )


def rows_ahead(node: Node) -> int:
    """Number of rows after its own on which an expression depends; negative if it depends on earlier rows only.

    This is the sum of the shifts. `qfast.data.expression.reach` instead returns the rows that must be read, including
    those of intermediate results.

    Examples
    --------
    >>> rows_ahead(parse("Count(Ref($close, -60), 1)"))
    60
    >>> rows_ahead(parse("Ref(Ref($close, -2) / Ref($close, -1) - 1, 3)"))  # the label of three days ago
    -1
    """
    if not isinstance(node, Call):
        return 0
    ahead = max((rows_ahead(part) for part in node.series if not isinstance(part, Number)), default=0)
    function = FUNCTIONS[node.function]
    if function.reach is not None:
        return ahead + function.reach(*node.settings)[1]
    if function.form == "shift":
        return ahead - int(node.settings[0])
    return max(ahead, ahead - int(node.settings[0])) if function.form == "delta" else ahead


def feature_expressions_of(handler: PriceHandler) -> dict[str, str]:
    """Feature -> expression; empty for handlers that compute their features without expressions."""
    return dict(zip(handler.feature_names, handler.feature_expressions, strict=False))


def start_dependent_features(handler: PriceHandler) -> list[str]:
    """Features whose values depend on the first day of the data, however long ago it is."""
    expressions = feature_expressions_of(handler)
    return [name for name, text in expressions.items() if depends_on_the_start(text, handler.compat)]
