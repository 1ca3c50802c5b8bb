"""Searches with Optuna: the space, the storage, pruning, resuming, and a planted optimum."""

from __future__ import annotations

import json

import pandas as pd
import pytest

from qfast import study
from qfast.errors import ConfigError
from support.workflows import write_case

optuna = pytest.importorskip("optuna", reason="optuna, of the extra tune, is not installed")

KWARGS = "task.model.kwargs"
SETS = [f"{KWARGS}.n_epochs=2"]
HERE = {"on": "inline", "quiet": True}
SPACE = {f"{KWARGS}.lr": {"type": "float", "low": 1e-6, "high": 1e-1, "log": True}}


pytestmark = pytest.mark.usefixtures("undrawn_plots")


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """(workflow file, data file)."""
    return write_case(tmp_path_factory.mktemp("search"))


def test_a_search_finds_a_planted_optimum_and_resumes(case, tmp_path):
    """A learning rate of 1e-6 cannot learn, so the best one is large. More trials can be added."""
    file = tmp_path / "space.yaml"
    file.write_text(
        "space:\n  task.model.kwargs.lr: {type: float, low: 1e-6, high: 1e-1, log: true}\nsampler: RandomSampler\n"
    )
    whole = study(*case, SETS, output=tmp_path / "whole", search=file, trials=5, **HERE)
    assert whole.table["trial"].tolist() == [0, 1, 2, 3, 4]
    assert whole.best["value"] == whole.table["valid.rank_ic"].max()
    assert whole.best[f"{KWARGS}.lr"] > 1e-4
    part = study(*case, SETS, output=tmp_path / "part", search=file, trials=3, **HERE)
    more = study(resume=part.path, trials=5, **HERE)
    pd.testing.assert_frame_equal(more.table, whole.table, check_exact=True)
    stored = optuna.load_study(study_name="search", storage=f"sqlite:///{part.path / 'search.db'}")
    assert [trial.value for trial in stored.trials] == whole.table["valid.rank_ic"].tolist()


def test_a_running_trial_continues(case, tmp_path, monkeypatch):
    """The study is killed after a run has finished and before Optuna knows it."""
    from qfast.studies.search import SearchPoints

    search = {"space": SPACE, "storage": "journal"}
    whole = study(*case, SETS, output=tmp_path / "whole", search=search, trials=3, **HERE)

    def killed(self, point, rows):
        if point.index == 1:
            raise KeyboardInterrupt
        done(self, point, rows)

    done = SearchPoints.done
    with monkeypatch.context() as patch:
        patch.setattr(SearchPoints, "done", killed)
        with pytest.raises(KeyboardInterrupt):
            study(*case, SETS, output=tmp_path / "s", search=search, trials=3, **HERE)
    resumed = study(resume=tmp_path / "s", **HERE)
    pd.testing.assert_frame_equal(resumed.table, whole.table, check_exact=True)
    assert resumed.best == whole.best


def test_pruned_runs_are_rows_with_their_scores(case, tmp_path):
    search = {"space": {f"{KWARGS}.hidden_size": {"type": "int", "low": 2, "high": 8, "step": 2}}}
    search["pruner"] = {"class": "ThresholdPruner", "kwargs": {"lower": 1.5}}  # no rank IC is that high
    result = study(*case, SETS, output=tmp_path / "s", search=search, trials=1, seeds=2, **HERE)
    assert result.table["status"].tolist() == ["pruned", "pruned"]
    assert result.table["epochs"].tolist()[0] == 1
    assert "run 000, which it depends on, pruned" in result.table["reason"][1]
    assert json.loads((result.path / "runs/000/pruned.json").read_text())["epoch"] == 0
    assert result.best == {}
    assert result.failed == 0


def test_each_point_of_a_grid_has_a_search_of_its_own(case, tmp_path):
    search = {"space": {f"{KWARGS}.metric": {"type": "categorical", "choices": ["loss", ""]}}}
    grid = {f"{KWARGS}.lr": [1e-2, 1e-3]}
    result = study(*case, SETS, output=tmp_path / "s", search=search, trials=2, grid=grid, **HERE)
    assert result.table["trial"].tolist() == [0, 1, 0, 1]
    names = optuna.get_all_study_names(f"sqlite:///{result.path / 'search.db'}")
    assert sorted(names) == ["search", "search-1"]


@pytest.mark.parametrize(
    ("search", "message"),
    [
        ({}, "space must name at least one key"),
        ({"space": {f"{KWARGS}.lr": {"type": "flaot"}}}, "got 'flaot'. Did you mean 'float'?"),
        (
            {"space": {f"{KWARGS}.lr": {"type": "float", "low": 1, "high": 0}}},
            "range is empty: low 1 is above high 0",
        ),
        ({"space": {f"{KWARGS}.lr": {"type": "float", "low": 1}}}, "float requires high"),
        ({"space": {f"{KWARGS}.lr": {"type": "float", "low": 0, "high": 1, "log": True}}}, "requires a positive low"),
        ({"space": {f"{KWARGS}.hidden_size": {"type": "int", "low": 1.5, "high": 2}}}, "low must be a whole number"),
        ({"space": {f"{KWARGS}.loss": {"type": "categorical", "choices": "mse"}}}, "choices must be a list"),
        ({"space": {f"{KWARGS}.lrr": {"type": "float", "low": 0.1, "high": 1}}}, "has no argument 'lrr'"),
        ({"space": {"task.modle.lr": {"type": "float", "low": 0.1, "high": 1}}}, "Did you mean"),
        ({"space": SPACE, "sampler": "TPESampler2"}, "optuna.samplers has no 'TPESampler2'"),
        ({"space": SPACE, "sampler": {"class": "TPESampler", "kwargs": {"n_start": 1}}}, "sampler TPESampler:"),
        ({"space": SPACE, "pruner": "MeanPruner"}, "Did you mean 'MedianPruner'?"),
        ({"space": SPACE, "objective": "vaild.rank_ic"}, "needs a segment 'vaild'"),
        ({"space": SPACE, "objective": "valid.rank_icc"}, "Did you mean 'rank_ic'?"),
        ({"space": SPACE, "direction": "up"}, "direction must be one of"),
        ({"spaces": SPACE}, "unknown key 'spaces'"),
        (["lr"], "expected a mapping"),
    ],
    ids=str,
)
def test_a_wrong_search_is_refused(case, tmp_path, search, message):
    file = tmp_path / "space.yaml"
    file.write_text(json.dumps(search))
    with pytest.raises(ConfigError) as caught:
        study(*case, output=tmp_path / "s", search=file, trials=2, **HERE)
    assert message in str(caught.value)
    assert not (tmp_path / "s").exists()


def test_the_objective_needs_its_segment(case, tmp_path):
    without = ["task.dataset.kwargs.segments.valid=__DROP__"]
    with pytest.raises(ConfigError, match=r"objective valid\.rank_ic needs a segment 'valid', but the workflow has"):
        study(*case, without, output=tmp_path / "s", search={"space": SPACE}, trials=2, **HERE)
    with pytest.raises(ConfigError, match="--trials: a search needs a number of trials"):
        study(*case, output=tmp_path / "s", search={"space": SPACE}, **HERE)
