"""Plots are images, the page is self-contained, and its text is escaped."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
import pytest

from qfast.backtest import Backtest
from qfast.models import LSTM
from qfast.workflow import plots
from qfast.workflow.page import header, notes, render, table
from qfast.workflow.plots import _quantile_means as quantile_means
from qfast.workflow.plots import cumulative_plot, loss_plot, quantile_plot
from qfast.workflow.results import SegmentResult
from qfast.workflow.run_page import Report, render_html
from qfast.workflow.signal_quality import SignalQuality, investment
from support.workflows import factors

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def segments():
    frame = factors().fillna(0.0)
    return [SegmentResult.of(name, frame["f2"], frame["label"]) for name in ("train", "valid", "test")]


def test_plots_are_png_images_with_something_on_them(segments):
    history = pd.DataFrame({"train": [-1.0, -0.9], "valid": [-1.1, -1.0]})
    images = [loss_plot(history, 1), cumulative_plot(segments), quantile_plot(segments)]
    empty = [loss_plot(pd.DataFrame(), None), cumulative_plot([]), quantile_plot([])]
    for png, blank in zip(images, empty, strict=True):
        assert png.startswith(PNG)
        assert blank.startswith(PNG)
        assert len(png) > len(blank)


def test_scores_of_a_users_metric_are_plotted_as_they_are(monkeypatch):
    history = pd.DataFrame({"train": [0.1, 0.2], "valid": [0.0, 0.1]})
    drawn = []
    monkeypatch.setattr("qfast.workflow.plots.png", lambda figure: drawn.append(figure.axes[0]) or b"")
    loss_plot(history, 1)
    loss_plot(history, 1, "Score by epoch", is_loss=False)
    labels = [axes.get_ylabel() for axes in drawn]
    assert labels == ["loss", "score (higher is better)"]
    assert [axes.lines[0].get_ydata().tolist() for axes in drawn] == [[-0.1, -0.2], [0.1, 0.2]]
    model = LSTM(d_feat=3, hidden_size=4)
    assert model.scores_are_losses
    model.loss_fn = lambda pred, label: (pred - label).abs().nanmean()
    assert model.scores_are_losses
    model.metric_fn = lambda pred, label: pred.mean()
    assert not model.scores_are_losses
    assert not LSTM(d_feat=3, hidden_size=4, metric=lambda pred, label: pred.mean()).scores_are_losses


def test_each_segment_of_the_cumulative_ic_has_its_own_dates(segments, monkeypatch):
    short = segments[2]
    days = short.ic.index[-5:]
    short = SegmentResult("test", short.score, short.label, short.ic.loc[days], short.rank_ic.loc[days])
    drawn = []
    monkeypatch.setattr(plots, "png", lambda figure: drawn.append(figure) or PNG)
    cumulative_plot([segments[0], short])
    panels = drawn[0].axes
    assert [panel.get_title() for panel in panels] == ["Cumulative IC: train", "Cumulative IC: test"]
    first, last = panels[1].get_xlim()
    assert last - first < 7
    assert [line.get_label() for line in panels[1].get_lines()[:2]] == ["IC", "rank IC"]


@pytest.mark.parametrize("scale", [1.0, 123456.0], ids=["scale1", "scale123456"])
def test_no_label_is_outside_of_the_figure(segments, monkeypatch, scale):
    """The margins are fixed, so they must suffice for long numbers and rotated dates."""
    drawn = []
    monkeypatch.setattr(plots, "png", lambda figure: drawn.append(figure) or PNG)
    loss_plot(pd.DataFrame({"train": [-1.0, -0.9], "valid": [-1.1, -1.0]}) * scale, 1)
    cumulative_plot(segments)
    quantile_plot(segments)
    days = pd.bdate_range("2020-01-01", periods=300)
    returns = np.random.default_rng(0).standard_normal((3, 300)) * scale
    plots.portfolio_plot(pd.DataFrame(dict(zip(["return", "cost", "bench"], returns, strict=True)), index=days))
    for figure in drawn:
        figure.canvas.draw()
        box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
        assert box.x0 >= 0
        assert box.y0 >= 0
        assert box.x1 <= width
        assert box.y1 <= height


def test_plots_take_days_without_a_correlation(segments):
    nothing = SegmentResult.of("test", segments[0].score * np.nan, segments[0].label)
    assert cumulative_plot([nothing]).startswith(PNG)
    assert quantile_plot([nothing]).startswith(PNG)


def test_score_groups_are_those_of_each_day():
    index = pd.MultiIndex.from_product(
        [pd.date_range("2020-01-01", periods=2), list("ABCDE")], names=["datetime", "instrument"]
    )
    score = pd.Series([1, 2, 3, 4, 5, 50, 40, 30, 20, 10.0], index)
    label = pd.Series([1, 2, 3, 4, 5, 5, 4, 3, 2, 1.0], index)
    assert quantile_means(SegmentResult.of("test", score, label)) == [1, 2, 3, 4, 5]


def page(**changes) -> str:
    values = {
        "title": "demo: LSTM",
        "subtitle": "12 instruments",
        "metrics": {"test": {"IC": 0.0412, "ICIR": float("nan"), "days": 10.0}},
        "facts": {"Seed": 7},
        "plots": {"loss": PNG},
        "config": "task: {}",
        "notes": ["PortAnaRecord was left out"],
        "newest": pd.Series([0.3, 0.1, np.nan], ["A", "B", "C"]),
        "newest_date": "2020-01-02",
    }
    return render_html(Report(**{**values, **changes}))


def test_page_needs_no_other_file():
    text = page()
    assert re.findall(r'(?:src|href)="([^#"][^"]{0,21})', text) == ["data:image/png;base64,"]
    for part in ("demo: LSTM", "0.0412", "–", "PortAnaRecord was left out", "task: {}", "<td>A</td>", "<th>Seed</th>"):
        assert part in text


def test_values_are_escaped():
    text = page(title="<script>alert(1)</script>", config="<MODEL>", facts={"<b>": "<i>"}, notes=["<u>"])
    for raw in ("<script>", "<MODEL>", "<b>:", "<i>", "<u>"):
        assert raw not in text
    assert "&lt;MODEL&gt;" in text


def test_page_without_metrics_or_newest_scores():
    text = page(metrics={}, newest=None)
    assert "Scores of the last date" not in text
    assert 'class="card"' not in text


def test_dense_tables_break_between_words_and_within_long_ones():
    rows = {"000": {"IC": "-0.0397 ± 0.0373", "path": "<" * 15 + "x"}}
    text = table(rows, "run", dense=True)
    assert "<td>-0.0397\u00a0±\u00a00.0373</td>" in text
    assert f"<td>{'&lt;' * 14}<wbr>&lt;x</td>" in text
    assert "<wbr>" not in table(rows, "run")


def test_the_table_of_contents_links_to_every_heading():
    text = page()
    links, targets = (re.findall(pattern, text) for pattern in (r'href="#([^"]+)"', r'<h2 id="([^"]+)"'))
    assert links == targets
    assert len(links) == 4
    assert "<nav>" not in render("short", [header("title", "subtitle"), "<h2>One</h2>"])


def test_notes_are_one_line_until_the_reader_opens_it():
    assert notes([]) == ""
    assert notes(["<a>", "b"]).startswith('<details class="note"><summary>2 notes</summary>')
    assert "<li>&lt;a&gt;</li>" in notes(["<a>"])


def test_the_signal_of_a_segment(segments):
    quality = SignalQuality.of(segments[2])
    months = quality.monthly.drop(columns="year")
    daily = segments[2].rank_ic.dropna()
    first = daily[(daily.index.year == daily.index[0].year) & (daily.index.month == daily.index[0].month)]
    assert months.loc[daily.index[0].year, daily.index[0].month] == pytest.approx(first.mean())
    text = page(signal=quality)
    assert "Rank IC by month, in percent" in text
    assert f"{100 * first.mean():.1f}</td>" in text
    assert "<th>20 days</th>" in text


def test_the_investment_of_a_portfolio():
    days = pd.date_range("2020-01-01", periods=2, name="datetime")
    report = pd.DataFrame({"value": [50.0, 90.0], "account": [100.0, 100.0], "turnover": [0.5, 0.1]}, days)
    keys = pd.MultiIndex.from_tuples([(days[0], "A"), (days[1], "A"), (days[1], "B")], names=["datetime", "instrument"])
    table = investment(Backtest(report, pd.DataFrame({"amount": 1.0}, keys), pd.DataFrame()))
    assert table.loc["exposure"].tolist() == [0.7, 0.5, 0.9]
    assert table.loc["holdings"].tolist() == [1.5, 1, 2]
    assert table.loc["turnover", "highest"] == 0.5
