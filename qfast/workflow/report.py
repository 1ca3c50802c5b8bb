"""A run's plots, and the one page that shows them: a single HTML file that needs nothing else."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from qfast.metrics import daily_ic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Report", "SegmentResult", "cumulative_plot", "loss_plot", "quantile_plot", "render_html"]

COLOURS = {"train": "#8a94a6", "valid": "#d97706", "test": "#1d4ed8"}
OTHER_COLOURS = ("#047857", "#9d174d", "#6d28d9")
METRICS = ("IC", "ICIR", "Rank IC", "Rank ICIR")
QUANTILES = 5
LISTED = 10  # instruments shown at either end of the newest day's ranking


@dataclass(frozen=True)
class SegmentResult:
    """Scores and labels of one segment, and what is computed from them.

    `score` and `label` are indexed (datetime, instrument); `ic` and `rank_ic` by datetime.
    """

    name: str
    score: pd.Series
    label: pd.Series
    ic: pd.Series
    rank_ic: pd.Series

    @classmethod
    def of(cls, name: str, score: pd.Series, label: pd.Series) -> SegmentResult:
        ic, rank_ic = daily_ic(score, label)
        return cls(name, score, label, ic, rank_ic)


@dataclass
class Report:
    """Everything the page shows; plain values only.

    Attributes
    ----------
    title, subtitle, intro : str
    metrics : mapping
        Segment -> metric -> value (None or NaN: could not be computed).
    facts : mapping
        Label -> value, shown as a table ("Model", "Device", ...).
    plots : mapping
        Caption -> PNG bytes.
    newest : Series, optional
        Scores of the newest date, indexed by instrument.
    portfolio : DataFrame, optional
        Risk of the backtest's excess returns: rows are analyses, columns measures.
    """

    title: str
    subtitle: str
    metrics: Mapping[str, Mapping[str, float | None]]
    facts: Mapping[str, Any]
    plots: Mapping[str, bytes]
    config: str
    notes: Sequence[str] = field(default_factory=list)
    intro: str = ""
    newest: pd.Series | None = None
    newest_date: Any = None
    portfolio: pd.DataFrame | None = None


# ---------------------------------------------------------------- plots
def loss_plot(history: pd.DataFrame, best_epoch: int | None, title: str = "Loss by epoch") -> bytes:
    """PNG of the score per epoch, train and valid, with the chosen epoch marked.

    The scores are the reference's: minus the loss, averaged over batches, so higher is better.
    """
    figure, axes = _figure()
    for name in ("train", "valid"):
        if name in history:
            values = -history[name].to_numpy(dtype=float)
            axes.plot(
                history.index,
                values,
                color=COLOURS[name],
                label=name,
                marker="o",
                markersize=3,
                linewidth=1.8,
            )
    if best_epoch is not None:
        axes.axvline(best_epoch, color="#111827", linewidth=1, linestyle=":", label=f"best epoch ({best_epoch})")
    axes.set(xlabel="epoch", ylabel="loss", title=title)
    axes.xaxis.get_major_locator().set_params(integer=True)
    _legend(axes)
    return _png(figure)


def cumulative_plot(segments: Sequence[SegmentResult]) -> bytes:
    """PNG of the running sums of daily IC and rank IC over time, one colour a segment.

    Each segment begins at zero; a steady slope means a steady signal.
    """
    figure, axes = _figure(columns=2)
    for panel, kind, title in zip(axes, ("ic", "rank_ic"), ("Cumulative IC", "Cumulative rank IC"), strict=True):
        for position, segment in enumerate(segments):
            daily = getattr(segment, kind).dropna()
            if len(daily):
                panel.plot(
                    daily.index,
                    daily.cumsum(),
                    color=_colour(segment.name, position),
                    label=segment.name,
                    linewidth=1.8,
                )
        panel.axhline(0, color="#9ca3af", linewidth=0.8)
        panel.set(title=title, ylabel="sum of daily values")
        panel.tick_params(axis="x", rotation=30)
        _legend(panel)
    return _png(figure)


def quantile_plot(segments: Sequence[SegmentResult]) -> bytes:
    """PNG of the mean label of five equal groups of each day's instruments, worst scored to best."""
    shown = [s for s in segments if s.name != "train"] or list(segments)
    figure, axes = _figure()
    width = 0.8 / max(len(shown), 1)
    for position, segment in enumerate(shown):
        means = _quantile_means(segment)
        where = np.arange(QUANTILES) + (position - (len(shown) - 1) / 2) * width
        axes.bar(where, means, width * 0.92, color=_colour(segment.name, position), label=segment.name)
    axes.axhline(0, color="#6b7280", linewidth=0.8)
    axes.set_xticks(range(QUANTILES), ["lowest", "2", "3", "4", "highest"])
    axes.set(xlabel="group of the day's scores", ylabel="mean label", title="Mean label by score group")
    _legend(axes)
    return _png(figure)


def portfolio_plot(report: pd.DataFrame) -> bytes:
    """PNG of a backtest: running sums of the portfolio's and the benchmark's returns, and of what it is ahead."""
    figure, axes = _figure(columns=2)
    returns = {
        "portfolio": report["return"] - report["cost"], "without costs": report["return"], "benchmark": report["bench"],
    }  # fmt: skip
    colours = ("#1d4ed8", "#93c5fd", "#8a94a6")
    for (name, series), colour in zip(returns.items(), colours, strict=True):
        axes[0].plot(report.index, series.cumsum(), color=colour, label=name, linewidth=1.8)
    excess = (returns["portfolio"] - report["bench"]).cumsum()
    axes[1].plot(report.index, excess, color="#1d4ed8", label="ahead, with costs", linewidth=1.8)
    axes[1].fill_between(report.index, excess - excess.cummax(), 0, color="#d97706", alpha=0.35, label="drawdown")
    for panel, title in zip(axes, ("Sum of returns", "Ahead of the benchmark"), strict=True):
        panel.axhline(0, color="#9ca3af", linewidth=0.8)
        panel.set(title=title)
        panel.tick_params(axis="x", rotation=30)
        _legend(panel)
    return _png(figure)


def _quantile_means(segment: SegmentResult) -> list[float]:
    frame = pd.DataFrame({"score": segment.score, "label": segment.label}).dropna()
    if frame.empty:
        return [math.nan] * QUANTILES
    share = frame.groupby(level="datetime")["score"].rank(pct=True, method="first")
    group = np.ceil(share.to_numpy() * QUANTILES).clip(1, QUANTILES)
    daily = frame["label"].groupby([frame.index.get_level_values("datetime"), group]).mean()
    means = daily.groupby(level=1).mean()
    return [float(means.get(q, math.nan)) for q in range(1, QUANTILES + 1)]


def _figure(columns: int = 1) -> tuple[Figure, Any]:
    # The object interface: no global state, no display, no interactive backend.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.2, 3.4) if columns == 2 else (6.4, 3.4), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, columns)
    for panel in np.atleast_1d(axes):
        panel.grid(True, color="#e5e7eb", linewidth=0.8)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
        panel.spines[["left", "bottom"]].set_color("#9ca3af")
        panel.tick_params(colors="#374151", labelsize=9)
    return figure, axes


def _legend(axes: Axes) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=9)
    else:
        axes.text(0.5, 0.5, "nothing to show", ha="center", va="center", transform=axes.transAxes, color="#6b7280")


def _colour(name: str, position: int) -> str:
    return COLOURS.get(name, OTHER_COLOURS[position % len(OTHER_COLOURS)])


def _png(figure: Figure) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


# ---------------------------------------------------------------- page
def render_html(report: Report) -> str:
    """The whole page as text: styles and images are inside, every value is escaped."""
    head = _text(report.title)
    parts = [
        f"<header><h1>{head}</h1><p>{_text(report.subtitle)}</p></header>",
        f'<p class="lead">{_text(report.intro)}</p>' if report.intro else "",
        _cards(report.metrics),
        *(f'<aside class="note">{_text(note)}</aside>' for note in report.notes),
        "<h2>Metrics</h2>",
        _metric_table(report.metrics),
        '<p class="small">IC is the correlation of score and raw label over the instruments of a day, rank IC that of '
        "their ranks; the table shows means over days, and ICIR = mean / standard deviation of the daily values.</p>",
        *(
            f'<figure><img alt="plot: {_text(name.replace("_", " "))}" src="{_inline(png)}"></figure>'
            for name, png in report.plots.items()
        ),
    ]
    if report.portfolio is not None:
        rows = {str(name).replace("_", " "): dict(row) for name, row in report.portfolio.iterrows()}
        parts += [
            "<h2>Portfolio</h2>",
            _metric_table(
                {n: {str(k).replace("_", " "): v for k, v in row.items()} for n, row in rows.items()}, "return"
            ),
            '<p class="small">Daily returns beyond the benchmark, added up and not compounded; a year has 238 days. '
            "The scores of a day are traded on the next.</p>",
        ]
    if report.newest is not None and len(report.newest):
        parts += [f"<h2>Newest scores ({_text(report.newest_date)})</h2>", _newest(report.newest)]
    parts += ["<h2>Run</h2>", _fact_table(report.facts)]
    parts += [f"<details><summary>Configuration</summary><pre>{_text(report.config)}</pre></details>"]
    return PAGE.replace("{title}", head).replace("{body}", "\n".join(parts))


def _cards(metrics: Mapping[str, Mapping[str, float | None]]) -> str:
    name = next((n for n in ("test", "valid", "train") if n in metrics), None)
    if name is None:
        return ""
    cards = [
        f'<div class="card"><b>{_number(metrics[name].get(metric))}</b><span>{metric}, {_text(name)}</span></div>'
        for metric in METRICS
    ]
    return f'<section class="cards">{"".join(cards)}</section>'


def _metric_table(metrics: Mapping[str, Mapping[str, float | None]], first: str = "segment") -> str:
    columns = list(dict.fromkeys(key for row in metrics.values() for key in row))
    head = "".join(f"<th>{_text(column)}</th>" for column in (first, *columns))
    rows = [
        f"<tr><th>{_text(name)}</th>{''.join(f'<td>{_number(row.get(c))}</td>' for c in columns)}</tr>"
        for name, row in metrics.items()
    ]
    return f"<div class='wide'><table class='numbers'><tr>{head}</tr>{''.join(rows)}</table></div>"


def _newest(scores: pd.Series) -> str:
    ordered = scores.dropna().sort_values(ascending=False, kind="stable")
    count = min(LISTED, (len(ordered) + 1) // 2)
    blocks = []
    for title, part in (("Highest", ordered.iloc[:count]), ("Lowest", ordered.iloc[::-1].iloc[:count])):
        rows = "".join(f"<tr><td>{_text(k)}</td><td>{_number(float(v))}</td></tr>" for k, v in part.items())
        blocks.append(f"<div><h3>{title}</h3><table class='numbers'>{rows}</table></div>")
    return f"<section class='columns'>{''.join(blocks)}</section>"


def _fact_table(facts: Mapping[str, Any]) -> str:
    rows = "".join(f"<tr><th>{_text(k)}</th><td>{_text(v)}</td></tr>" for k, v in facts.items())
    return f"<table class='facts'>{rows}</table>"


def _number(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "–"
    if float(value).is_integer() and abs(value) >= 1:
        return f"{int(value):,}"
    return f"{value:.4f}"


def _inline(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def _text(value: Any) -> str:
    return html.escape(str(value))


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body{margin:0 auto;max-width:60rem;padding:2rem 1.2rem 4rem;font:15px/1.55 system-ui,"Segoe UI",Roboto,sans-serif;
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
