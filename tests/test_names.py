"""Names that matplotlib, HTML or a file system would interpret: segments, experiments, instruments, columns."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure

from qfast import drawing
from qfast.cli import main
from qfast.data.store import BinaryStore
from qfast.errors import DataError
from qfast.models.attention import neighbours, plot_attention
from qfast.studies.plots import heat_map, parallel_plot
from qfast.workflow import page
from qfast.workflow import report as report_module
from qfast.workflow.run import run
from support.hostile import HOSTILE_NAMES
from support.stores import write_market
from support.workflows import TEXT, factors


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_any_text_in_a_figure_is_literal(name: str) -> None:
    figure, out = Figure(), io.BytesIO()
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], label=drawing.legend_text(name))
    axes.set(title=name, xlabel=name, ylabel=name)
    axes.set_xticks([0, 1], [name, name])
    axes.legend()
    drawing.save_figure(figure, out, "png")
    assert out.getvalue().startswith(b"\x89PNG")
    assert len(axes.get_legend().get_texts()) == 1


def test_plots_of_studies_and_attention_accept_any_name(tmp_path: Path) -> None:
    table = pd.DataFrame({"$a_{$": ["$x_{$", "y"], "b": [1, 2], "$m^{$": [0.1, 0.2]})
    assert heat_map(table, ["$a_{$", "b"], "$m^{$").startswith(b"\x89PNG")
    assert parallel_plot(table, ["$a_{$", "b"], "$m^{$").startswith(b"\x89PNG")
    weights = neighbours(torch.zeros(2), torch.tensor([0.0, 2.0]), ["$x_{$", "B"])
    assert plot_attention(weights, tmp_path / "a.svg", title="$x_{$").exists()


def test_a_run_with_hostile_names_has_its_report(tmp_path: Path) -> None:
    text = TEXT.replace("experiment_name: small", "experiment_name: '$x_{$ {body} {title}'")
    text = text.replace("        test:", "        '$x_{$': [2020-02-21, 2020-03-01]\n        test:")
    (tmp_path / "w.yaml").write_text(text)
    result = run(tmp_path / "w.yaml", factors(), ["task.model.kwargs.n_epochs=1"], output=tmp_path / "run")
    html = result.report.read_text()
    assert html.count("</html>") == 1
    assert html.count(">Metrics</h2>") == 1
    assert "$x_{$ {body} {title}: LSTM" in html
    assert not any("the plot" in note for note in json.loads((tmp_path / "run/manifest.json").read_text())["notes"])
    assert len(list((tmp_path / "run/plots").iterdir())) >= 3


def test_a_failing_plot_costs_only_the_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    def failing(*arguments: object) -> bytes:
        raise ValueError("cannot draw")

    monkeypatch.setattr(report_module, "cumulative_plot", failing)
    (tmp_path / "w.yaml").write_text(TEXT)
    result = run(tmp_path / "w.yaml", factors(), ["task.model.kwargs.n_epochs=1"], output=tmp_path / "run")
    manifest = json.loads((tmp_path / "run/manifest.json").read_text())
    assert manifest["status"] == "finished"
    assert any("'cumulative_ic' was skipped: ValueError: 'cannot draw'" in note for note in manifest["notes"])
    assert "cumulative_ic" in caplog.text
    assert "&#x27;cumulative_ic&#x27; was skipped" in result.report.read_text()
    names = {file.name for file in (tmp_path / "run/plots").iterdir()}
    assert "loss.png" in names
    assert "cumulative_ic.png" not in names


def test_placeholders_in_a_page_are_replaced_once() -> None:
    html = page.render("{body}{width}", ["<p>{title}</p>"])
    assert html.count("<p>{title}</p>") == 1
    assert "<title>{body}{width}</title>" in html


# ---------------------------------------------------------------- names that become paths
@pytest.fixture
def store(tmp_path: Path) -> Path:
    root = write_market(tmp_path / "store", n_stocks=3, n_days=30)
    outside = tmp_path / "outside"
    outside.mkdir()
    for file in (root / "features/s01").iterdir():
        (outside / file.name).write_bytes(file.read_bytes())
    return root


@pytest.mark.parametrize("name", ["../../outside", "..\\outside", "/etc", "a/../../../outside", "a\0b", ""])
def test_an_instrument_cannot_lead_outside_the_store(store: Path, name: str) -> None:
    with pytest.raises(DataError, match=r"leads outside the Qlib data folder"):
        BinaryStore(store).read([name])


def test_no_other_name_can_lead_outside_the_store(store: Path) -> None:
    days = (store / "calendars/day.txt").read_text().split()
    (store / "instruments/bad.txt").write_text(f"S01\t{days[0]}\t{days[-1]}\n../../outside\t{days[0]}\t{days[-1]}\n")
    with pytest.raises(DataError, match=r"bad.txt: line 2: instrument '../../outside' leads outside"):
        BinaryStore(store).read("bad")
    with pytest.raises(DataError, match=r"market '../instruments/all' leads outside"):
        BinaryStore(store).read("../instruments/all")
    with pytest.raises(DataError, match=r"field '../s02/close' leads outside"):
        BinaryStore(store).read(["S01"], ["../s02/close"])
    with pytest.raises(DataError, match=r"freq '../x' leads outside"):
        BinaryStore(store, "../x")


def test_instruments_without_data_cost_no_search(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A glob for each listed instrument took almost a millisecond."""
    monkeypatch.setattr(Path, "glob", lambda *_: pytest.fail("a folder is searched"))
    prices = BinaryStore(store).read(["S01", *(f"none{i}" for i in range(50))])
    assert list(prices.panel.instruments) == ["S01"]


def test_instruments_that_are_lists_are_refused(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    pytest.importorskip("pyarrow")
    frame = pd.DataFrame({"datetime": pd.date_range("2020-01-01", periods=3), "instrument": [["A"]] * 3, "close": 1.0})
    frame.to_parquet(tmp_path / "prices.parquet")
    (tmp_path / "w.yaml").write_text(TEXT)
    assert main(["run", str(tmp_path / "w.yaml"), "--data", str(tmp_path / "prices.parquet"), "-q"]) == 2
    assert "must be text or a number" in capfd.readouterr().err
