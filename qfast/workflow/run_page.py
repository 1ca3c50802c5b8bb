"""The report page of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pandas as pd

from qfast.workflow.page import (
    details,
    fact_table,
    figure,
    header,
    heat_table,
    notes,
    number,
    render,
    small,
    table,
    text,
)
from qfast.workflow.signal_quality import SignalQuality

__all__ = ["Report", "render_html"]

METRICS = ("IC", "ICIR", "Rank IC", "Rank ICIR")
MONTHS = dict(enumerate(["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"], 1))
LISTED = 10  # instruments with the highest and with the lowest scores of the last date


@dataclass
class Report:
    """The content of the page.

    Attributes
    ----------
    title, subtitle, intro : str
    metrics : mapping
        Segment -> metric -> value. None and NaN are shown as a dash.
    facts : mapping
        Heading -> value, shown as a table ("Model", "Device", ...).
    plots : mapping
        Caption -> PNG bytes.
    config : str
        The workflow as YAML text.
    notes : sequence of str
        Warnings shown at the top.
    newest : Series, optional
        Scores of the last date, indexed by instrument.
    newest_date : str, optional
    portfolio : DataFrame, optional
        Risk of the backtest's excess returns: rows are analyses, columns are measures.
    investment : DataFrame, optional
        Result of `qfast.workflow.signal_quality.investment`.
    signal : SignalQuality, optional
    """

    title: str
    subtitle: str
    metrics: Mapping[str, Mapping[str, float | None]]
    facts: Mapping[str, object]
    plots: Mapping[str, bytes]
    config: str
    notes: Sequence[str] = field(default_factory=list)
    intro: str = ""
    newest: pd.Series | None = None
    newest_date: str | None = None
    portfolio: pd.DataFrame | None = None
    investment: pd.DataFrame | None = None
    signal: SignalQuality | None = None


def render_html(report: Report) -> str:
    """Render the page as HTML text. Every value is escaped."""
    parts = [
        header(report.title, report.subtitle),
        f'<p class="lead">{text(report.intro)}</p>' if report.intro else "",
        notes(report.notes),
        _cards(report.metrics),
        "<h2>Metrics</h2>",
        _metric_table(report.metrics),
        small(
            "IC is the correlation of score and raw label across the instruments of a day. Rank IC is the correlation "
            "of their ranks. The table shows means over days. ICIR is the mean of the daily values divided by their "
            "standard deviation."
        ),
        *_signal(report.signal),
        "<h2>Plots</h2>" if report.plots else "",
        *(figure(name, png) for name, png in report.plots.items()),
        *_portfolio(report),
    ]
    if report.newest is not None and len(report.newest):
        parts += [f"<h2>Scores of the last date ({text(report.newest_date)})</h2>", _newest(report.newest)]
    parts += ["<h2>Run</h2>", fact_table(report.facts), details("Configuration", report.config)]
    return render(report.title, parts)


def _signal(signal: SignalQuality | None) -> list[str]:
    """The section about the signal over time."""
    if signal is None:
        return []
    lags = [f"{lag} day" if lag == 1 else f"{lag} days" for lag in signal.decay.index]
    decay = {str(name): dict(zip(lags, map(number, values), strict=True)) for name, values in signal.decay.items()}
    parts = [f"<h2>Signal, {text(signal.segment)}</h2>", "<h3>Rank IC by month, in percent</h3>"]
    parts.append(heat_table(100 * signal.monthly.rename(columns=MONTHS), "year"))
    parts += ["<h3>IC with the labels of later days</h3>", table(decay, "", dense=True)]
    return [
        *parts,
        small(
            f"Of the fifth with the highest scores, {_percent(signal.turnover['top'])} of the instruments are new on "
            f"an average day; of the fifth with the lowest scores, {_percent(signal.turnover['bottom'])}."
        ),
    ]


def _portfolio(report: Report) -> list[str]:
    if report.portfolio is None:
        return []
    rows = {str(name).replace("_", " "): dict(row) for name, row in report.portfolio.iterrows()}
    parts = ["<h2>Portfolio</h2>"]
    parts.append(
        _metric_table({n: {str(k).replace("_", " "): v for k, v in row.items()} for n, row in rows.items()}, "return")
    )
    if report.investment is not None:
        parts.append(_metric_table({str(name): dict(row) for name, row in report.investment.iterrows()}, "by day"))
    return [
        *parts,
        small(
            "Daily excess returns over the benchmark, summed and not compounded. A year has 238 days. The scores of a "
            "day are traded on the next day. Exposure is the value of the positions divided by the account, turnover "
            "the traded value divided by the account of the day before."
        ),
    ]


def _cards(metrics: Mapping[str, Mapping[str, float | None]]) -> str:
    name = next((n for n in ("test", "valid", "train") if n in metrics), None)
    if name is None:
        return ""
    cards = [
        f'<div class="card"><b>{number(metrics[name].get(metric))}</b><span>{metric}, {text(name)}</span></div>'
        for metric in METRICS
    ]
    return f'<section class="cards">{"".join(cards)}</section>'


def _metric_table(metrics: Mapping[str, Mapping[str, float | None]], first: str = "segment") -> str:
    columns = list(dict.fromkeys(key for row in metrics.values() for key in row))
    return table({name: {c: number(row.get(c)) for c in columns} for name, row in metrics.items()}, first, dense=True)


def _newest(scores: pd.Series) -> str:
    ordered = scores.dropna().sort_values(ascending=False, kind="stable")
    count = min(LISTED, (len(ordered) + 1) // 2)
    blocks = []
    for title, part in (("Highest", ordered.iloc[:count]), ("Lowest", ordered.iloc[::-1].iloc[:count])):
        rows = "".join(f"<tr><td>{text(k)}</td><td>{number(float(v))}</td></tr>" for k, v in part.items())
        blocks.append(f"<div><h3>{title}</h3><table class='numbers'>{rows}</table></div>")
    return f"<section class='columns'>{''.join(blocks)}</section>"


def _percent(share: float) -> str:
    return f"{share:.0%}" if math.isfinite(share) else "an unknown share"
