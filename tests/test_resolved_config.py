"""The configuration in a run folder is resolved: it depends on no other file, variable or working directory."""

from __future__ import annotations

import shutil
from pathlib import Path

import pandas as pd
import pytest

from qfast import check
from qfast.errors import ConfigError
from qfast.workflow.config import load_config
from qfast.workflow.folder import RunFolder
from qfast.workflow.run import run
from qfast.workflow.yaml_text import parse_yaml
from support.workflows import TEXT, Interrupt, factors, write_case

CHILD = """
BASE_CONFIG_PATH: base.yaml
experiment_name: "{{ NAME_OF_RUN }}"
task:
  model:
    kwargs: {lr: __DROP__, dropout: __DROP__, n_epochs: 2, seed: 3}
"""
BASE = TEXT.replace("lr: 1e-2", "lr: 5e-3, dropout: 0.3")
TCN = """
BASE_CONFIG_PATH: base.yaml
task:
  model:
    class: TCN
    module_path: qlib.contrib.model.pytorch_tcn
    kwargs: {hidden_size: __DROP__, num_layers: 1, n_chans: 4, kernel_size: 2, n_epochs: 2, seed: 0}
"""


@pytest.fixture
def case(tmp_path, monkeypatch):
    """Folder with child.yaml over base.yaml, and factors.csv."""
    write_case(tmp_path)
    (tmp_path / "base.yaml").write_text(BASE)
    (tmp_path / "child.yaml").write_text(CHILD)
    (tmp_path / "tcn.yaml").write_text(TCN)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setenv("NAME_OF_RUN", "from the environment")
    return tmp_path


def scores(path: Path) -> pd.Series:
    return pd.read_parquet(path / "pred.parquet")["score"]


def config(path: Path) -> dict:
    return parse_yaml((path / "config.yaml").read_text()).values


def change_base(case: Path, how: str) -> None:
    """Do to the base file what the resumed run must not notice."""
    if how == "renamed":
        (case / "base.yaml").rename(case / "other.yaml")
    else:
        changed = BASE.replace("hidden_size: 4", "hidden_size: 9, weight_decay_of_a_later_version: 1")
        (case / "base.yaml").write_text(changed)


def as_old_folder(path: Path, base: str = "base.yaml") -> None:
    """Rewrite config.yaml as earlier versions wrote it: merged, but with the name of the base file."""
    text = (path / "config.yaml").read_text()
    (path / "config.yaml").write_text(f"BASE_CONFIG_PATH: {base}\n{text}")


def test_the_config_of_a_run_contains_no_reference_to_anything_else(case):
    result = run(case / "child.yaml", data=case / "factors.csv", output=case / "run")
    values = config(result.path)
    assert "BASE_CONFIG_PATH" not in values
    assert values["experiment_name"] == "from the environment"
    assert not {"lr", "dropout"} & set(values["task"]["model"]["kwargs"])
    assert "__DROP__" not in (result.path / "config.yaml").read_text()


@pytest.mark.parametrize("how", ["changed", "renamed"])
def test_the_config_of_a_run_trains_the_same_scores(case, monkeypatch, how):
    first = run(case / "child.yaml", data=case / "factors.csv", output=case / "run")
    change_base(case, how)
    monkeypatch.chdir(case / "elsewhere")
    monkeypatch.delenv("NAME_OF_RUN")
    second = run(case / "run/config.yaml", output=case / "again")  # with the data of the first run
    assert second.model.get_params()["lr"] == 0.001
    assert second.model.get_params()["dropout"] == 0.0
    pd.testing.assert_series_equal(scores(first.path), scores(second.path), check_exact=True)
    assert config(first.path) == config(second.path)


@pytest.mark.parametrize("how", ["changed", "renamed"])
def test_an_interrupted_run_from_a_base_file_resumes_to_the_same_scores(case, monkeypatch, how):
    whole = run(case / "tcn.yaml", data=case / "factors.csv", output=case / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(case / "tcn.yaml", data=case / "factors.csv", output=case / "run", callbacks=[Interrupt(1)])
    change_base(case, how)
    monkeypatch.chdir(case / "elsewhere")
    resumed = run(resume=case / "run")
    pd.testing.assert_series_equal(scores(whole.path), scores(resumed.path), check_exact=True)


def test_resuming_with_the_file_reports_a_changed_base(case):
    with pytest.raises(KeyboardInterrupt):
        run(case / "tcn.yaml", data=case / "factors.csv", output=case / "run", callbacks=[Interrupt(1)])
    (case / "base.yaml").write_text(BASE.replace("metric: loss", "metric: loss, early_stop: 7"))
    with pytest.raises(ConfigError, match=r"task\.model.kwargs.early_stop"):
        run(case / "tcn.yaml", resume=case / "run")


@pytest.mark.parametrize("base", ["base.yaml", "removed.yaml"])
def test_an_old_folder_with_the_key_resumes_and_logs_that_the_base_is_not_merged(case, caplog, base):
    whole = run(case / "tcn.yaml", data=case / "factors.csv", output=case / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(case / "tcn.yaml", data=case / "factors.csv", output=case / "run", callbacks=[Interrupt(1)])
    as_old_folder(case / "run", base)
    with caplog.at_level("INFO", logger="qfast"):
        resumed = run(resume=case / "run")
    assert f"BASE_CONFIG_PATH '{base}'; it is not merged again" in caplog.text
    pd.testing.assert_series_equal(scores(whole.path), scores(resumed.path), check_exact=True)
    assert "BASE_CONFIG_PATH" not in config(case / "run")


def test_text_of_a_variable_is_not_rendered_again(case, monkeypatch):
    monkeypatch.setenv("NAME_OF_RUN", "{{ 7 * 6 }}")
    result = run(case / "child.yaml", data=case / "factors.csv", output=case / "run")
    assert load_config(result.path / "config.yaml").values["experiment_name"] == "{{ 7 * 6 }}"


def test_a_config_next_to_another_programs_manifest_is_an_ordinary_file(case):
    (case / "manifest.json").write_text('{"name": "web app"}')
    shutil.copy(case / "child.yaml", case / "config.yaml")
    values = load_config(case / "config.yaml").values
    assert values["experiment_name"] == "from the environment"
    assert values["task"]["model"]["kwargs"]["hidden_size"] == 4


def test_check_of_the_config_of_a_run_reads_its_data(case, monkeypatch):
    result = run(case / "child.yaml", data=case / "factors.csv", output=case / "run")
    monkeypatch.chdir(case / "elsewhere")
    findings = check(result.path / "config.yaml", experiments=False).findings
    assert {finding.topic for finding in findings if finding.level == "error"} == {"portfolio"}  # it needs prices


def test_data_in_memory_is_not_replaced_by_other_data(case):
    frame = factors()
    frame.columns = pd.MultiIndex.from_tuples([("label" if c == "label" else "feature", c) for c in frame.columns])
    run(case / "child.yaml", data=frame, output=case / "run")
    with pytest.raises(ConfigError, match="in memory, which is not stored"):
        run(case / "run/config.yaml", output=case / "again")


def test_relative_paths_of_data_become_absolute(case, monkeypatch):
    monkeypatch.chdir(case)
    text = (case / "small.yaml").read_text()
    (case / "store.yaml").write_text("qlib_init: {provider_uri: store}\n" + text)
    (case / "store").mkdir()
    result = run(case / "store.yaml", data="factors.csv", output="run", sets=["task.model.kwargs.n_epochs=1"])
    assert config(result.path)["qlib_init"]["provider_uri"] == str(case / "store")
    assert RunFolder.open(result.path).manifest["data"]["source"] == str(case / "factors.csv")


# ---------------------------------------------------------------- __DROP__ and --set
@pytest.mark.parametrize("file", ["small.yaml", "child.yaml"])
def test_set_drop_removes_the_key(case, file):
    values = load_config(case / file, ["task.model.kwargs.metric=__DROP__"]).values
    assert "metric" not in values["task"]["model"]["kwargs"]


def test_set_drop_removes_a_list_item_and_keeps_the_positions_of_later_changes(case):
    sets = ["task.record.0=__DROP__", "task.record.1.kwargs.ann_scaler=99"]
    records = load_config(case / "small.yaml", sets).values["task"]["record"]
    assert [record["class"] for record in records] == ["SigAnaRecord", "PortAnaRecord"]
    assert records[0]["kwargs"]["ann_scaler"] == 99


def test_set_drop_of_an_unknown_key_is_an_error(case):
    with pytest.raises(ConfigError, match=r"Did you mean 'task\.model\.kwargs\.metric'"):
        load_config(case / "small.yaml", ["task.model.kwargs.metrik=__DROP__"])


def test_drop_without_a_base_and_below_a_new_key_is_applied(case):
    (case / "child.yaml").write_text(CHILD + "anchors: {a: {b: __DROP__, c: 1}, d: [__DROP__, 2]}\n")
    assert load_config(case / "child.yaml").values["anchors"] == {"a": {"c": 1}, "d": [2]}
    (case / "small.yaml").write_text(TEXT.replace("metric: loss", "metric: __DROP__"))
    assert "metric" not in load_config(case / "small.yaml").values["task"]["model"]["kwargs"]


def test_the_base_cannot_be_set(case):
    with pytest.raises(ConfigError, match="BASE_CONFIG_PATH"):
        load_config(case / "child.yaml", ["BASE_CONFIG_PATH=other.yaml"])
