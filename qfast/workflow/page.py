"""Building blocks of report pages: single HTML files with embedded styles and images."""

from __future__ import annotations

import base64
import html
import math
import re
from collections.abc import Mapping, Sequence

import pandas as pd

__all__ = [
    "details",
    "fact_table",
    "figure",
    "header",
    "heat_table",
    "notes",
    "number",
    "render",
    "small",
    "table",
    "text",
]


MISSING = "–"
LONG_WORD = 14  # characters; longer than a number


def render(title: str, parts: Sequence[str], width: int = 60) -> str:
    """A page with the style of all reports, and a table of contents with its headings <h2>.

    Parameters
    ----------
    title : str
    parts : sequence of str
        HTML of the body.
    width : int
        Largest width of the page, in rem.
    """
    body = "\n".join(parts)
    titles = re.findall("<h2>(.*?)</h2>", body)
    links = "".join(f'<a href="#part-{number}">{title}</a>' for number, title in enumerate(titles))
    numbers = iter(range(len(titles)))
    body = re.sub("<h2>", lambda _: f'<h2 id="part-{next(numbers)}">', body)
    body = body.replace("</header>", f"</header><nav>{links}</nav>", 1) if len(titles) > 1 else body
    values = {"{title}": text(title), "{width}": str(width), "{body}": body}
    # One pass: a value that looks like another placeholder remains text.
    return re.sub(r"\{(title|width|body)\}", lambda match: values[match[0]], PAGE)


def header(title: str, subtitle: str) -> str:
    """The title of a page and the line below it."""
    return f"<header><h1>{text(title)}</h1><p>{text(subtitle)}</p></header>"


def notes(contents: Sequence[str]) -> str:
    """Warnings in one line, which the reader opens. An empty text without warnings."""
    if not contents:
        return ""
    count = "1 note" if len(contents) == 1 else f"{len(contents)} notes"
    items = "".join(f"<li>{text(content)}</li>" for content in contents)
    return f'<details class="note"><summary>{count}</summary><ul>{items}</ul></details>'


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


def heat_table(values: pd.DataFrame, first: str) -> str:
    """A dense table of numbers with one decimal, whose cells are coloured by their sign and size.

    Parameters
    ----------
    values : DataFrame
    first : str
        Heading of the first column.
    """
    largest = values.abs().max(axis=None)
    columns = "".join(f"<th>{text(column)}</th>" for column in (first, *values))
    lines = []
    for name, row in values.iterrows():
        cells = "".join(_heat_cell(float(value), float(largest)) for value in row)
        lines.append(f"<tr><th>{text(name)}</th>{cells}</tr>")
    return f"<div class='wide'><table class='numbers dense heat'><tr>{columns}</tr>{''.join(lines)}</table></div>"


def _heat_cell(value: float, largest: float) -> str:
    if not math.isfinite(value):
        return f"<td>{MISSING}</td>"
    colour = "29,78,216" if value > 0 else "217,119,6"
    strength = abs(value) / largest if largest else 0.0
    return f'<td style="background:rgba({colour},{0.5 * strength:.2f})">{value:.1f}</td>'


def _breakable(content: str) -> str:
    """Escaped text that may break within words longer than `LONG_WORD` characters, but not around a ±."""
    if "±" in content:
        return text(content.replace(" ", "\u00a0"))
    pieces = [[word[i : i + LONG_WORD] for i in range(0, len(word), LONG_WORD)] for word in content.split(" ")]
    return " ".join("<wbr>".join(map(text, parts)) for parts in pieces)


def fact_table(facts: Mapping[str, object]) -> str:
    """A table of headings and values."""
    rows = "".join(f"<tr><th>{text(k)}</th><td>{text(v)}</td></tr>" for k, v in facts.items())
    return f"<table class='facts'>{rows}</table>"


def number(value: float | None) -> str:
    """A number with four decimals, or a whole number without decimals; a dash for None, NaN and infinity."""
    if value is None or not math.isfinite(value):
        return MISSING
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
:root{color-scheme:light dark;--text:#111827;--soft:#4b5563;--page:#fafafa;--card:#fff;--line:#e5e7eb;--warn:#fffbeb;
--link:#1d4ed8}
@media (prefers-color-scheme:dark){:root{--text:#e5e7eb;--soft:#9ca3af;--page:#111418;--card:#1b1f24;--line:#30363d;
--warn:#2b2410;--link:#8ab4f8} figure img{filter:invert(.89) hue-rotate(180deg)}}
body{margin:0 auto;max-width:{width}rem;padding:2rem 1.2rem 4rem;font:15px/1.55 system-ui,"Segoe UI",Roboto,sans-serif;
color:var(--text);background:var(--page)}
header p{color:var(--soft);margin:.2rem 0 .8rem;overflow-wrap:anywhere} h1{font-size:1.7rem;margin:0}
h2{font-size:1.15rem;margin:2rem 0 .6rem} h3{font-size:.95rem;margin:1rem 0 .3rem;color:var(--soft)}
nav{display:flex;flex-wrap:wrap;gap:.3rem 1.1rem;margin:0 0 1.2rem;font-size:.9rem} a{color:var(--link)}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(9rem,1fr));gap:.8rem}
.card{background:var(--card);border:1px solid var(--line);border-radius:.6rem;padding:.8rem 1rem}
.card b{display:block;font-size:1.5rem;font-variant-numeric:tabular-nums} .card span{color:var(--soft);font-size:.85rem}
.note{background:var(--warn);border-left:4px solid #d97706;padding:.4rem .9rem;margin:1rem 0;border-radius:.3rem}
.note ul{margin:.4rem 0;padding-left:1.2rem;overflow-wrap:anywhere}
table{border-collapse:collapse;background:var(--card);border:1px solid var(--line);max-width:100%;margin-bottom:.8rem}
th,td{padding:.35rem .8rem;border-bottom:1px solid var(--line);text-align:left;vertical-align:top;
overflow-wrap:anywhere}
.numbers th,.numbers td{white-space:nowrap;overflow-wrap:normal}
.wide .numbers th{white-space:normal;min-width:4.2rem}
.wide .dense th,.dense td{white-space:normal;min-width:0;padding:.25rem .45rem;font-size:.84rem}
.wide .heat th,.heat td{padding:.25rem .35rem}
@media (max-width:800px){.wide .dense th,.dense td{padding:.2rem .25rem;font-size:.76rem}}
th{font-weight:600} .numbers td{text-align:right;font-variant-numeric:tabular-nums}
.numbers th{text-align:right} .numbers tr>:first-child{text-align:left}.facts th{white-space:nowrap}
.wide{overflow-x:auto} .lead{color:var(--soft)}
figure{margin:1.2rem 0;background:var(--card);border:1px solid var(--line);border-radius:.6rem;padding:.6rem}
img{max-width:100%;height:auto;display:block;margin:auto} .columns{display:flex;flex-wrap:wrap;gap:2.5rem}
.small{color:var(--soft);font-size:.85rem} details{margin-top:1.4rem} summary{cursor:pointer;font-weight:600}
pre{background:var(--card);border:1px solid var(--line);border-radius:.6rem;padding:1rem;overflow:auto;font-size:.82rem}
</style></head><body>
{body}
</body></html>
"""
