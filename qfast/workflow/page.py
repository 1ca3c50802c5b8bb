"""The report page of a run: a single HTML file with embedded styles and images."""

from __future__ import annotations

import base64
import html
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pandas as pd

if TYPE_CHECKING:
    pass

__all__ = [
    "Report",
    "details",
    "fact_table",
    "figure",
    "header",
    "note",
    "render",
    "render_html",
    "small",
    "table",
    "text",
]


METRICS = ("IC", "ICIR", "Rank IC", "Rank ICIR")
MISSING = "–"
LONG_WORD = 14  # characters; longer than a number
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


def render_html(report: Report) -> str:
    """Render the page as HTML text. Every value is escaped."""
    parts = [
        header(report.title, report.subtitle),
        f'<p class="lead">{text(report.intro)}</p>' if report.intro else "",
        _cards(report.metrics),
        *map(note, report.notes),
        "<h2>Metrics</h2>",
        _metric_table(report.metrics),
        '<p class="small">IC is the correlation of score and raw label across the instruments of a day. Rank IC is the '
        "correlation of their ranks. The table shows means over days. ICIR is the mean of the daily values divided by "
        "their standard deviation.</p>",
        *(figure(name, png) for name, png in report.plots.items()),
    ]
    if report.portfolio is not None:
        rows = {str(name).replace("_", " "): dict(row) for name, row in report.portfolio.iterrows()}
        parts += [
            "<h2>Portfolio</h2>",
            _metric_table(
                {n: {str(k).replace("_", " "): v for k, v in row.items()} for n, row in rows.items()}, "return"
            ),
            '<p class="small">Daily excess returns over the benchmark, summed and not compounded. A year has 238 days. '
            "The scores of a day are traded on the next day.</p>",
        ]
    if report.newest is not None and len(report.newest):
        parts += [f"<h2>Scores of the last date ({text(report.newest_date)})</h2>", _newest(report.newest)]
    parts += ["<h2>Run</h2>", fact_table(report.facts)]
    parts += [details("Configuration", report.config)]
    return render(report.title, parts)


def render(title: str, parts: Sequence[str], width: int = 60) -> str:
    """A page with the style of all reports.

    Parameters
    ----------
    title : str
    parts : sequence of str
        HTML of the body.
    width : int
        Largest width of the page, in rem.
    """
    values = {"{title}": text(title), "{width}": str(width), "{body}": "\n".join(parts)}
    # One pass: a value that looks like another placeholder remains text.
    return re.sub(r"\{(title|width|body)\}", lambda match: values[match[0]], PAGE)


def header(title: str, subtitle: str) -> str:
    """The title of a page and the line below it."""
    return f"<header><h1>{text(title)}</h1><p>{text(subtitle)}</p></header>"


def note(content: str) -> str:
    """A highlighted warning."""
    return f'<aside class="note">{text(content)}</aside>'


def small(content: str) -> str:
    """An explanation in small type."""
    return f'<p class="small">{text(content)}</p>'


def figure(name: str, png: bytes) -> str:
    """An embedded plot."""
    return f'<figure><img alt="plot: {text(name.replace("_", " "))}" src="{_inline(png)}"></figure>'


def details(title: str, content: str) -> str:
    """Preformatted text that is hidden until the reader opens it."""
    return f"<details><summary>{text(title)}</summary><pre>{text(content)}</pre></details>"


def table(rows: Mapping[str, Mapping[str, str]], first: str, dense: bool = False) -> str:
    """A table of texts.

    Parameters
    ----------
    rows : mapping
        Heading of a row -> heading of a column -> cell.
    first : str
        Heading of the first column.
    dense : bool
        Small type, and lines that break between words and within long ones, so many columns need no scrolling.
    """
    show = _breakable if dense else text
    columns = list(dict.fromkeys(key for row in rows.values() for key in row))
    head = "".join(f"<th>{show(column)}</th>" for column in (first, *columns))
    lines = [
        f"<tr><th>{show(name)}</th>{''.join(f'<td>{show(row.get(c, MISSING))}</td>' for c in columns)}</tr>"
        for name, row in rows.items()
    ]
    kind = "numbers dense" if dense else "numbers"
    return f"<div class='wide'><table class='{kind}'><tr>{head}</tr>{''.join(lines)}</table></div>"


def _breakable(content: str) -> str:
    """Escaped text that may break within words longer than `LONG_WORD` characters, but not around a ±."""
    if "±" in content:
        return text(content.replace(" ", "\u00a0"))
    pieces = [[word[i : i + LONG_WORD] for i in range(0, len(word), LONG_WORD)] for word in content.split(" ")]
    return " ".join("<wbr>".join(map(text, parts)) for parts in pieces)


def _cards(metrics: Mapping[str, Mapping[str, float | None]]) -> str:
    name = next((n for n in ("test", "valid", "train") if n in metrics), None)
    if name is None:
        return ""
    cards = [
        f'<div class="card"><b>{_number(metrics[name].get(metric))}</b><span>{metric}, {text(name)}</span></div>'
        for metric in METRICS
    ]
    return f'<section class="cards">{"".join(cards)}</section>'


def _metric_table(metrics: Mapping[str, Mapping[str, float | None]], first: str = "segment") -> str:
    columns = list(dict.fromkeys(key for row in metrics.values() for key in row))
    return table({name: {c: _number(row.get(c)) for c in columns} for name, row in metrics.items()}, first)


def _newest(scores: pd.Series) -> str:
    ordered = scores.dropna().sort_values(ascending=False, kind="stable")
    count = min(LISTED, (len(ordered) + 1) // 2)
    blocks = []
    for title, part in (("Highest", ordered.iloc[:count]), ("Lowest", ordered.iloc[::-1].iloc[:count])):
        rows = "".join(f"<tr><td>{text(k)}</td><td>{_number(float(v))}</td></tr>" for k, v in part.items())
        blocks.append(f"<div><h3>{title}</h3><table class='numbers'>{rows}</table></div>")
    return f"<section class='columns'>{''.join(blocks)}</section>"


def fact_table(facts: Mapping[str, object]) -> str:
    """A table of headings and values."""
    rows = "".join(f"<tr><th>{text(k)}</th><td>{text(v)}</td></tr>" for k, v in facts.items())
    return f"<table class='facts'>{rows}</table>"


def _number(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "–"
    if float(value).is_integer() and abs(value) >= 1:
        return f"{int(value):,}"
    return f"{value:.4f}"


def _inline(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def text(value: object) -> str:
    """A value as escaped HTML text."""
    return html.escape(str(value))


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body{margin:0 auto;max-width:{width}rem;padding:2rem 1.2rem 4rem;font:15px/1.55 system-ui,"Segoe UI",Roboto,sans-serif;
color:#111827;background:#fafafa}
header p{color:#4b5563;margin:.2rem 0 1.4rem} h1{font-size:1.7rem;margin:0} h2{font-size:1.15rem;margin:2rem 0 .6rem}
h3{font-size:.95rem;margin:.2rem 0;color:#4b5563}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(9rem,1fr));gap:.8rem}
.card{background:#fff;border:1px solid #e5e7eb;border-radius:.6rem;padding:.8rem 1rem}
.card b{display:block;font-size:1.5rem;font-variant-numeric:tabular-nums} .card span{color:#6b7280;font-size:.85rem}
.note{background:#fffbeb;border-left:4px solid #d97706;padding:.6rem .9rem;margin:1rem 0;border-radius:.3rem}
table{border-collapse:collapse;background:#fff;border:1px solid #e5e7eb;max-width:100%}
th,td{padding:.35rem .8rem;border-bottom:1px solid #f3f4f6;text-align:left;vertical-align:top;overflow-wrap:anywhere}
.numbers th,.numbers td{white-space:nowrap;overflow-wrap:normal}
.wide .numbers th{white-space:normal;min-width:4.2rem}
.wide .dense th,.dense td{white-space:normal;min-width:0;padding:.25rem .45rem;font-size:.84rem}
th{font-weight:600;color:#374151} .numbers td{text-align:right;font-variant-numeric:tabular-nums}
.numbers td:first-child{text-align:left}.facts th{white-space:nowrap}
.wide{overflow-x:auto} .lead{color:#374151}
figure{margin:1.2rem 0;background:#fff;border:1px solid #e5e7eb;border-radius:.6rem;padding:.6rem}
img{max-width:100%;height:auto;display:block;margin:auto} .columns{display:flex;flex-wrap:wrap;gap:2.5rem}
.small{color:#6b7280;font-size:.85rem} details{margin-top:1.4rem} summary{cursor:pointer;font-weight:600}
pre{background:#fff;border:1px solid #e5e7eb;border-radius:.6rem;padding:1rem;overflow:auto;font-size:.82rem}
</style></head><body>
{body}
</body></html>
"""
