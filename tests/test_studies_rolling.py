"""Rolling studies: segments, truncation, warm start, and scores of all windows together."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest

from qfast import study
from qfast.errors import ConfigError
from qfast.metrics import daily_ic
from qfast.studies.combine import run_scores
from qfast.studies.plots import monthly_ic
from qfast.studies.rolling import rolling_segments
from qfast.workflow.demo import DEMO, demo_prices
from qfast.workflow.folder import RunFolder, read_frame
from qfast.workflow.results import SegmentResult
from qfast.workflow.run import run
from support.workflows import write_case

HERE = {"on": "inline", "quiet": True}
SETS = ["task.model.kwargs.n_epochs=1"]
DAYS = pd.bdate_range("2020-01-01", periods=120)


pytestmark = pytest.mark.usefixtures("undrawn_plots")


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """(workflow file, data file), whose calendar has 70 days and whose test segment has 14."""
    return write_case(tmp_path_factory.mktemp("rolling"))


@pytest.fixture(scope="module")
def rolled(case, tmp_path_factory):
    """A rolling study of two seeds with windows of 5 days, which is not changed."""
    folder = tmp_path_factory.mktemp("rolled") / "s"
    return study(*case, SETS, output=folder, rolling=5, label_days=2, seeds=2, warm_start=True, **HERE)


# ---------------------------------------------------------------- segments
def test_no_label_reaches_beyond_the_first_day_of_the_test_segment():
    segments = {"train": (DAYS[0], DAYS[49]), "valid": (DAYS[50], DAYS[69]), "test": (DAYS[70], DAYS[99])}
    for reach in (0, 2, 21):
        windows = rolling_segments(DAYS, segments, 10, reach)
        assert len(windows) == 3
        for window in windows:
            first = DAYS.get_loc(window["test"][0])
            assert max(DAYS.get_loc(window[name][1]) for name in ("train", "valid")) + max(reach, 1) <= first
    assert [w["test"] for w in windows] == [(DAYS[s], DAYS[s + 9]) for s in (70, 80, 90)]


def test_expanding_keeps_the_first_day_of_train_only():
    segments = {"train": (DAYS[3], DAYS[49]), "valid": (DAYS[50], DAYS[69]), "test": (DAYS[70], None)}
    sliding, expanding = (rolling_segments(DAYS, segments, 20, 2, expanding=e) for e in (False, True))
    assert [w["train"][0] for w in sliding] == [DAYS[3], DAYS[23], DAYS[43]]
    assert [w["train"] for w in expanding] == [(DAYS[3], DAYS[49]), (DAYS[3], DAYS[69]), (DAYS[3], DAYS[89])]
    assert [w["valid"] for w in expanding] == [w["valid"] for w in sliding]
    assert sliding[-1]["test"] == (DAYS[110], None)  # beyond the calendar, as in Qlib


def test_unbounded_segments_and_days_without_trading():
    saturday = DAYS[70] - pd.Timedelta(days=2) if DAYS[70].weekday() == 0 else DAYS[70]
    windows = rolling_segments(DAYS, {"train": (None, None), "test": (saturday, DAYS[79])}, 5, 2)
    assert windows[0] == {"train": (None, DAYS[68]), "test": (DAYS[70], DAYS[74])}
    assert windows[1]["train"] == (None, DAYS[73])


def test_windows_end_with_the_last_day_with_data():
    """A calendar may have future days, on which nothing can be tested."""
    segments = {"train": (DAYS[0], DAYS[49]), "test": (DAYS[70], DAYS[109])}
    for end in (DAYS[109], None):
        windows = rolling_segments(DAYS, {**segments, "test": (DAYS[70], end)}, 10, 2, last=DAYS[89])
        assert [window["test"] for window in windows] == [(DAYS[70], DAYS[79]), (DAYS[80], DAYS[89])]


@pytest.mark.parametrize("years", [(2000, 2001), (2040, 2041)], ids=["before", "after"])
def test_a_segment_without_a_day_in_the_calendar_is_refused(years):
    valid = tuple(pd.Timestamp(f"{year}-01-01") for year in years)
    segments = {"train": (DAYS[0], DAYS[49]), "valid": valid, "test": (DAYS[70], DAYS[99])}
    with pytest.raises(
        ConfigError, match=r"the segment 'valid' .* has no day in the calendar, .* 2020-01-01 to 2020-06"
    ):
        rolling_segments(DAYS, segments, 10, 2)


def test_a_step_longer_than_the_test_segment_is_refused(case, tmp_path):
    segments = {"train": (DAYS[0], DAYS[49]), "test": (DAYS[70], DAYS[79])}
    with pytest.raises(ConfigError, match=r"the rolling step is 11 days, but the test segment .* has 10 trading days"):
        rolling_segments(DAYS, segments, 11, 2)
    with pytest.raises(ConfigError, match="no day is left to train on"):
        rolling_segments(DAYS, {"train": (DAYS[0], DAYS[1]), "test": (DAYS[1], DAYS[79])}, 5, 2)
    with pytest.raises(ConfigError, match=r"--rolling: the step is 20 days, but the segment 'test' .* has 14"):
        study(*case, output=tmp_path / "s", rolling=20, **HERE)
    with pytest.raises(ConfigError, match="--rolling: there is no segment 'test'"):
        study(*case, ["task.dataset.kwargs.segments.test=__DROP__"], output=tmp_path / "s", rolling=5, **HERE)
    assert not (tmp_path / "s").exists()


def test_labels_of_unknown_reach_need_label_days(case, tmp_path):
    with pytest.raises(ConfigError, match=r"the labels are columns of the data.* Remedy: --label-days N"):
        study(*case, output=tmp_path / "s", rolling=5, **HERE)
    assert not (tmp_path / "s").exists()


# ---------------------------------------------------------------- studies
def test_the_windows_are_runs_with_their_segments(case, rolled, tmp_path):
    assert rolled.table["window"].tolist() == [0, 0, 1, 1, 2, 2]
    assert rolled.table["test_start"].tolist()[::2] == ["2020-02-21", "2020-02-26", "2020-03-02"]
    alone = run(rolled.path / "workflows" / "000-000.yaml", case[1], output=tmp_path / "r", seed=1)
    pd.testing.assert_frame_equal(
        read_frame(rolled.path / "runs" / "001", "pred"), read_frame(alone.path, "pred"), check_exact=True
    )


def test_scores_of_all_windows_together(rolled):
    scores = read_frame(rolled.path / "rolling" / "000-seed-1", "pred")["score"]
    parts = [run_scores(rolled.path / "runs" / f"{n:03d}")["test"] for n in (1, 3, 5)]
    pd.testing.assert_series_equal(scores, pd.concat([p.score for p in parts]).sort_index(), check_names=False)
    labels = pd.concat([part.label for part in parts])
    metrics = json.loads((rolled.path / "rolling" / "000-seed-1" / "metrics.json").read_text())
    assert metrics["test"]["IC"] == pytest.approx(daily_ic(scores, labels)[0].mean())
    assert metrics["test"]["days"] == 15
    summary = rolled.summary.loc["small"]
    assert summary["runs"] == 2
    both = [json.loads((rolled.path / f"rolling/000-seed-{s}/metrics.json").read_text())["test"]["IC"] for s in (0, 1)]
    assert summary["IC"] == pytest.approx(np.mean(both))
    months = monthly_ic({"test": SegmentResult.of("test", parts[0].score, parts[0].label)})
    assert months.index.astype(str).tolist() == ["2020-02"]


def test_a_warm_start_begins_with_the_weights_of_the_previous_window(rolled, case, tmp_path):
    """Without a training step the weights do not change, so those of the previous window are visible."""
    cold = study(*case, SETS, output=tmp_path / "cold", rolling=5, label_days=2, **HERE)
    first, second = (read_frame(rolled.path / "runs" / n, "pred")["score"] for n in ("000", "002"))
    for warm, number, equal in ((first, "000", True), (second, "001", False)):
        assert warm.equals(read_frame(cold.path / "runs" / number, "pred")["score"]) is equal
    frozen = [*SETS, "task.model.kwargs.lr=1e-30"]
    still = study(*case, frozen, output=tmp_path / "still", rolling=5, label_days=2, warm_start=True, **HERE)
    files = [still.path / "runs" / f"{n:03d}" / "best.safetensors" for n in range(3)]
    assert len({file.read_bytes() for file in files}) == 1
    origins = [RunFolder.open(file.parent).manifest.get("init_from") for file in files]
    assert origins[0] is None
    assert [origin["source"] for origin in origins[1:]] == [str(file) for file in files[:2]]


def test_a_warm_start_replaces_the_base_of_gats(case, tmp_path):
    """Only the first window pre-trains the base. The others start from the whole network of the previous window."""
    sets = [
        *SETS,
        "task.model.class=GATs",
        "task.model.module_path=qfast.models",
        "task.model.kwargs={d_feat: 3, hidden_size: 4, num_layers: 1, n_epochs: 1, lr: 1e-30}",
        "task.pretrain={n_epochs: 1}",
    ]
    result = study(*case, sets, output=tmp_path / "s", rolling=7, label_days=2, warm_start=True, **HERE)
    assert result.table["status"].tolist() == ["finished"] * 2
    runs = [result.path / "runs" / name for name in ("000", "001")]
    assert [(run / "pretrain").is_dir() for run in runs] == [True, False]
    assert len({(run / "best.safetensors").read_bytes() for run in runs}) == 1


def test_windows_after_a_failed_one_are_rows_of_a_warm_start(case, tmp_path):
    sets = [*SETS, "task.model.kwargs.lr=1e30", "task.model.kwargs.batch_size=16"]
    result = study(*case, sets, output=tmp_path / "s", rolling=5, label_days=2, warm_start=True, **HERE)
    assert result.table["status"].tolist() == ["failed"] * 3
    assert result.table["reason"].tolist()[1:] == [
        "run 000, which it depends on, failed",
        "run 001, which it depends on, failed",
    ]
    assert result.failed == 3


def test_the_reach_of_a_label_is_known_from_its_expression(tmp_path):
    """Of the demo: 2 days. The backtest of all windows runs on the prices of the handler."""
    without_gaps = {
        "train": "2018-01-01, 2019-06-30",
        "valid": "2019-07-01, 2019-12-31",
        "test": "2020-01-01, 2020-02-14",
    }
    sets = [*SETS, *(f"task.dataset.kwargs.segments.{name}=[{dates}]" for name, dates in without_gaps.items())]
    sets += ["task.dataset.kwargs.handler.kwargs.fit_end_time=2019-06-30"]
    result = study(DEMO, demo_prices(8, 600), sets, output=tmp_path / "s", rolling=20, expanding=True, **HERE)
    segments = json.loads(json.dumps(result.table[["test_start", "test_end"]].to_dict("list")))
    assert segments == {"test_start": ["2020-01-01", "2020-01-29"], "test_end": ["2020-01-28", "2020-02-25"]}
    from qfast.workflow.config import load_config

    window = load_config(result.path / "workflows" / "000-001.yaml").values["task"]["dataset"]["kwargs"]["segments"]
    assert window["train"] == ["2018-01-01", "2019-07-26"]
    assert window["valid"] == ["2019-07-29", "2020-01-27"]
    assert (result.path / "rolling" / "000-seed-0" / "portfolio_analysis" / "metrics.json").is_file()
    assert np.isfinite(result.summary["Information Ratio"].iloc[0])
