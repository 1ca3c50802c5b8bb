"""qfast new: the file that it writes passes `qfast check`, and what it refuses."""

from __future__ import annotations

import pytest

from qfast import cli
from qfast.errors import ConfigError
from qfast.workflow.check import check
from qfast.workflow.config import load_config
from qfast.workflow.demo import demo_prices
from qfast.workflow.new_workflow import MODELS, new_workflow
from qfast.workflow.validation import check_workflow


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """One table with all columns, one with closes only, one with a single instrument, one with other dates."""
    folder = tmp_path_factory.mktemp("tables")
    prices = demo_prices(12, 260)
    prices.drop(columns="vwap").to_parquet(folder / "all.parquet")
    close = prices[["close"]].reset_index()
    close.to_csv(folder / "close.csv", index=False)
    close[close["instrument"] == close["instrument"][0]].to_csv(folder / "one.csv", index=False)
    close.assign(datetime=close["datetime"].dt.strftime("%d/%m/%Y")).to_csv(folder / "days.csv", index=False, sep=";")
    prices[["volume"]].reset_index().to_csv(folder / "volume.csv", index=False)
    close[close["datetime"] < "2018-03-01"].to_csv(folder / "short.csv", index=False)
    return folder


@pytest.mark.parametrize("table", ["all.parquet", "close.csv", "one.csv", "days.csv"])
def test_check_accepts_the_file_unchanged(tables, tmp_path, table: str) -> None:
    file = tmp_path / "mine.yaml"
    options = ["--separator", ";", "--date-format", "%d/%m/%Y"] if table == "days.csv" else []
    assert cli.main(["new", str(tables / table), "-o", str(file), *options]) == 0
    report = check(file, experiments=False)
    problems = [finding.text for finding in report.findings if finding.level in ("warning", "error")]
    assert problems == []
    constant = [finding.text for finding in report.findings if finding.topic == "constant"]
    assert ("CLOSE0 contains a single value" in constant[0]) == (table == "all.parquet")
    assert file.read_text().count(" # ") > 5, "the file is commented"


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("table", ["all.parquet", "close.csv"])
def test_every_model_is_valid(tables, tmp_path, model: str, table: str) -> None:
    file = new_workflow(tables / table, tmp_path / "mine.yaml", model=model)
    workflow = check_workflow(load_config(file).values)
    assert workflow.task.model.class_ == model


@pytest.mark.parametrize(("name", "model"), [("lstm", "LSTM"), ("Transformer", "TransformerModel"), ("gats", "GATs")])
def test_names_of_models_are_not_strict(tables, tmp_path, name: str, model: str) -> None:
    file = new_workflow(tables / "all.parquet", tmp_path / "mine.yaml", model=name)
    assert load_config(file).values["task"]["model"]["class"] == model


def test_nothing_is_replaced_and_unsuitable_tables_are_refused(tables, tmp_path, capsys) -> None:
    existing = tmp_path / "mine.yaml"
    existing.write_text("mine")
    with pytest.raises(ConfigError, match=r"exists and is not replaced\. Remedy: another name"):
        new_workflow(tables / "all.parquet", existing)
    assert existing.read_text() == "mine"
    target = tmp_path / "other.yaml"
    with pytest.raises(ConfigError, match=r"no prices in a column 'close', only volume"):
        new_workflow(tables / "volume.csv", target)
    with pytest.raises(ConfigError, match=r"has 43 dates, at least 120"):
        new_workflow(tables / "short.csv", target)
    with pytest.raises(ConfigError, match=r"Did you mean 'GATs'"):
        new_workflow(tables / "all.parquet", target, model="GAT")
    assert cli.main(["new", str(tmp_path / "none.csv"), "-o", str(target)]) == 2
    assert "none.csv" in capsys.readouterr().err
    assert not target.exists()
