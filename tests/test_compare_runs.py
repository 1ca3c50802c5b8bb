"""`qfast runs` and `compare_runs`: one row for each run, whatever its state."""

from __future__ import annotations

import json
import shutil

import pandas as pd
import pytest

from qfast import cli, compare_runs
from qfast.errors import ConfigError
from qfast.files import is_locked, locked
from qfast.workflow.run import run
from support.fits import StopAt
from support.workflows import write_case


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two finished runs, one in a subfolder, and an interrupted one."""
    base = tmp_path_factory.mktemp("runs")
    files = write_case(tmp_path_factory.mktemp("files"))
    run(*files, ["task.model.kwargs.n_epochs=1"], output=base / "one", seed=1)
    run(*files, ["task.model.kwargs.n_epochs=2"], output=base / "sub" / "two", seed=1)
    with pytest.raises(KeyboardInterrupt):
        run(*files, output=base / "three", seed=1, callbacks=[StopAt(0, "checkpoint")])
    return base


@pytest.fixture
def copy(runs, tmp_path):
    return shutil.copytree(runs, tmp_path / "runs")


def set_status(folder, status):
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "status": status}))


def test_one_row_per_run_with_the_differences(runs):
    table = compare_runs(runs)
    assert sorted(table.index) == ["one", "sub/two", "three"]
    assert table["status"].to_dict() == {"one": "finished", "sub/two": "finished", "three": "interrupted"}
    assert table["n_epochs"].to_dict() == {"one": 1, "sub/two": 2, "three": 3}
    assert "seed" not in table  # equal in all runs
    metrics = json.loads((runs / "sub" / "two" / "metrics.json").read_text())
    assert table.loc["sub/two", "test.rank_ic"] == metrics["test"]["Rank IC"]
    assert (table.loc[["one", "sub/two"], "total_s"] >= table.loc[["one", "sub/two"], "training_s"]).all()
    assert pd.isna(table.loc["three", "epochs"])


def test_a_missing_key_is_a_difference(copy):
    text = (copy / "one" / "config.yaml").read_text()
    (copy / "one" / "config.yaml").write_text(text.replace("    n_epochs: 1\n", "").replace("      n_epochs: 1\n", ""))
    assert pd.isna(compare_runs(copy).loc["one", "n_epochs"])


def test_the_study_of_a_single_run_is_its_row(runs):
    table = compare_runs(runs / "one")
    assert list(table.index) == ["one"]
    assert "n_epochs" not in table


def test_a_running_run_is_told_from_one_that_died(copy):
    set_status(copy / "one", "running")
    assert not is_locked(copy / "one")
    assert compare_runs(copy).loc["one", "status"] == "died"
    with locked(copy / "one"):
        assert is_locked(copy / "one")
        assert compare_runs(copy).loc["one", "status"] == "running"
    assert not is_locked(copy / "one")


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("manifest.json", None, "manifest.json is missing"),
        ("manifest.json", "{", "JSONDecodeError"),
        ("config.yaml", None, "config.yaml"),
        ("config.yaml", "a: [", "ConfigError"),
        ("history.csv", None, "FileNotFoundError"),
        ("metrics.json", "[", "JSONDecodeError"),
    ],
)
def test_a_broken_folder_is_one_row_with_its_reason(copy, name, content, reason):
    (copy / "one" / name).unlink()
    if content is not None:
        (copy / "one" / name).write_text(content)
    table = compare_runs(copy)
    assert table.loc["one", "status"] == "broken"
    assert reason in table.loc["one", "reason"]
    assert len(table) == 3


def test_folders_without_runs_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="folder 'absent' does not exist"):
        compare_runs("absent")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "manifest.json").write_text('{"name": "another program"}')
    with pytest.raises(ConfigError, match="contains no run"):
        compare_runs(tmp_path)


def test_the_command(runs, tmp_path, capsys):
    assert cli.main(["runs", str(runs), "--sort", "n_epochs", "--out", str(tmp_path / "t.csv")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["run", "status", "reason"]
    assert [line.split()[0] for line in lines[1:4]] == ["three", "sub/two", "one"]
    assert "test.rank_ic" in lines[0]
    assert "test.icir" not in lines[0]
    assert "test.icir" in pd.read_csv(tmp_path / "t.csv").columns
    assert cli.main(["runs", str(runs), "--all"]) == 0
    assert "test.icir" in capsys.readouterr().out
    assert cli.main(["runs", str(runs), "--sort", "n_epoch"]) == 2
    assert "--sort 'n_epoch' is not a column" in capsys.readouterr().err
