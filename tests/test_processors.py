"""Processors compared with pyqlib's on irregular frames, and their error messages."""

from __future__ import annotations

import logging

import numpy as np
import pandas as pd
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qfast.data import processors as P
from qfast.data.handlers import DataHandlerLP
from qfast.data.panel import Panel
from qfast.errors import ConfigError, DataError, NotFittedError
from support.frames import FIT_WINDOW, hostile_frame

# (class, keyword arguments) for both sides
CASES = [
    ("RobustZScoreNorm", {**FIT_WINDOW}),
    ("RobustZScoreNorm", {**FIT_WINDOW, "fields_group": "feature", "clip_outlier": False}),
    ("ZScoreNorm", {**FIT_WINDOW, "fields_group": "feature"}),
    ("ZScoreNorm", {**FIT_WINDOW}),
    ("MinMaxNorm", {**FIT_WINDOW, "fields_group": "feature"}),
    ("CSZScoreNorm", {"fields_group": "feature"}),
    ("CSZScoreNorm", {"fields_group": ["feature", "label"]}),
    ("CSZScoreNorm", {"fields_group": "feature", "method": "robust"}),
    ("CSRankNorm", {"fields_group": "feature"}),
    ("CSRankNorm", {"fields_group": "label"}),
    ("CSZFillna", {"fields_group": "feature"}),
    ("Fillna", {}),
    ("Fillna", {"fields_group": "feature", "fill_value": 2}),
    ("DropnaProcessor", {"fields_group": "feature"}),
    ("DropnaLabel", {}),
    ("DropCol", {"col_list": ["x1", "nobody"]}),
    ("FilterCol", {"fields_group": "feature", "col_list": ["x2", "x0", "nobody"]}),
    ("ProcessInf", {}),
    ("TanhProcess", {}),
]


def run_qlib(name: str, kwargs: dict, frame: pd.DataFrame) -> pd.DataFrame:
    processor = pytest.importorskip("qlib.data.dataset.processor", reason="pyqlib is not installed")
    step = getattr(processor, name)(**kwargs)
    frame = frame.copy()
    step.fit(frame)
    return step(frame).sort_index()


def run_ours(name: str, kwargs: dict, panel: Panel) -> Panel:
    step = P.build_processor({"class": name, "kwargs": kwargs})
    step.fit(panel)
    return step(panel)


def assert_same(ours: Panel, theirs: pd.DataFrame) -> None:
    frame = ours.to_frame()
    assert frame.index.tolist() == theirs.index.tolist()
    assert frame.columns.tolist() == theirs.columns.tolist()
    np.testing.assert_allclose(
        frame.to_numpy(np.float64), theirs.to_numpy(np.float64), rtol=2e-5, atol=2e-6, equal_nan=True
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "kwargs"), CASES, ids=lambda v: v if isinstance(v, str) else "-".join(map(str, v)))
def test_equals_qlib(name, kwargs):
    for seed in range(3 if name == "ProcessInf" else 12):
        frame = hostile_frame(seed)
        assert_same(run_ours(name, kwargs, Panel.from_frame(frame)), run_qlib(name, kwargs, frame))


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 10_000),
    days=st.integers(5, 9),
    stocks=st.integers(1, 8),
    case=st.sampled_from([c for c in CASES if c[0] != "ProcessInf"]),
)
def test_equals_qlib_at_any_shape(seed, days, stocks, case):
    frame = hostile_frame(seed, days, stocks)
    assert_same(run_ours(*case, Panel.from_frame(frame)), run_qlib(*case, frame))


def test_robust_norm_is_bit_equal_to_qlib():
    rng = np.random.default_rng(3)
    index = pd.MultiIndex.from_product(
        [pd.date_range("2024-01-01", periods=60), [f"S{i:02d}" for i in range(40)]], names=["datetime", "instrument"]
    )
    columns = pd.MultiIndex.from_product([["feature"], ["a", "b", "c"]])
    values = (rng.standard_normal((len(index), 3)) * [1, 100, 1e-3]).astype(np.float32)
    values[rng.random(values.shape) < 0.1] = np.nan
    frame = pd.DataFrame(values, index=index, columns=columns)
    kwargs = {"fit_start_time": "2024-01-03", "fit_end_time": "2024-02-02"}
    ours = run_ours("RobustZScoreNorm", kwargs, Panel.from_frame(frame)).to_frame().to_numpy()
    theirs = run_qlib("RobustZScoreNorm", kwargs, frame).to_numpy()
    assert ours.dtype == theirs.dtype == np.float32
    np.testing.assert_array_equal(ours, theirs)


# ---------------------------------------------------------------- compared with plain arithmetic, without pyqlib
def reference(name: str, x: np.ndarray, days: np.ndarray, fit: np.ndarray) -> np.ndarray:
    """One column [R] by the definition in float64, a slow loop over days."""
    x = x.astype(np.float64)
    valid = x[fit & ~np.isnan(x)]
    out = x.copy()
    if name == "RobustZScoreNorm":
        med = np.median(valid)
        return np.clip((x - med) / ((np.median(abs(valid - med)) + 1e-12) * 1.4826), -3, 3)
    if name == "ZScoreNorm":
        return x if valid.std() == 0 else (x - valid.mean()) / valid.std()
    if name == "MinMaxNorm":
        return x if valid.min() == valid.max() else (x - valid.min()) / (valid.max() - valid.min())
    for day in np.unique(days):
        at = days == day
        part = x[at]
        seen = part[~np.isnan(part)]
        if name == "CSZScoreNorm":
            std = seen.std(ddof=1) if len(seen) > 1 else np.nan
            out[at] = (part - seen.mean() if len(seen) else part) / (std if std else np.nan)
        elif name == "CSRankNorm":
            ranks = [((seen < v).sum() + ((seen == v).sum() + 1) / 2) / len(seen) if v == v else np.nan for v in part]
            out[at] = (np.array(ranks) - 0.5) * 3.46
        else:
            out[at] = np.where(np.isnan(part), seen.mean() if len(seen) else np.nan, part)
    return out


@pytest.mark.parametrize(
    "name", ["RobustZScoreNorm", "ZScoreNorm", "MinMaxNorm", "CSZScoreNorm", "CSRankNorm", "CSZFillna"]
)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), dead=st.floats(0, 0.5))
def test_equals_definition_and_ignores_dead_rows(name, seed, dead):
    frame = hostile_frame(seed).replace([np.inf, -np.inf], np.nan)
    panel = Panel.from_frame(frame)
    live = np.random.default_rng(seed).random(panel.n_rows) >= dead
    panel = panel.keep(live)
    dates = panel.datetimes[panel.date_codes]  # a date may have lost all its rows, so codes are not dates
    fit = live & (dates >= FIT_WINDOW["fit_start_time"]) & (dates <= FIT_WINDOW["fit_end_time"])
    values = panel.values("feature")
    if any(not np.isfinite(values[fit, j]).any() for j in range(values.shape[1])):
        return
    kwargs = FIT_WINDOW if name.endswith(("ZScoreNorm", "MaxNorm")) and not name.startswith("CS") else {}
    ours = run_ours(name, {**kwargs, "fields_group": "feature"}, panel).values("feature")
    for j in range(values.shape[1]):
        expected = reference(name, values[live, j], panel.date_codes[live], fit[live])
        np.testing.assert_allclose(ours[live, j], expected, rtol=2e-5, atol=2e-6, equal_nan=True)


def test_shared_blocks_are_never_changed():
    panel = Panel.from_frame(hostile_frame(1))
    before = {g: b.values.copy() for g, b in panel.blocks.items()}
    for name, kwargs in CASES:
        after = run_ours(name, kwargs, panel)
        for group, values in before.items():
            np.testing.assert_array_equal(panel.values(group), values)
        if name.startswith("Dropna"):
            assert all(after.values(g) is panel.values(g) for g in before), "dropping rows copies nothing"
        if kwargs.get("fields_group") == "feature" and name not in ("FilterCol",):
            assert after.values("label") is panel.values("label")


def test_owned_blocks_are_overwritten_with_the_same_result():
    for name, kwargs in CASES:
        frame = hostile_frame(2)
        expected = run_ours(name, kwargs, Panel.from_frame(frame))
        panel = Panel.from_frame(frame)
        step = P.build_processor({"class": name, "kwargs": kwargs})
        step.fit(panel)
        space = P.Workspace(panel.blocks)
        result = step.run(panel, space)
        pd.testing.assert_frame_equal(result.to_frame(), expected.to_frame())
        assert all((result.values(g) is panel.values(g)) or g in space.owned for g in result.blocks)


def test_one_column_by_group_and_name():
    panel = Panel.from_frame(hostile_frame(4))
    filled = P.Fillna(("feature", "x1"), 7)(panel)
    before, after = panel.values("feature"), filled.values("feature")
    np.testing.assert_array_equal(after[:, [0, 2, 3]], before[:, [0, 2, 3]])
    assert not np.isnan(after[:, 1]).any()
    assert (after[np.isnan(before[:, 1]), 1] == 7).all()


def test_tanh_selects_columns_by_name_not_by_group():
    panel = Panel.from_frame(hostile_frame(4, label="Ref($close, -1)"))
    np.testing.assert_allclose(P.TanhProcess()(panel).values("label"), np.tanh(panel.values("label") - 1))


def test_config_moves_the_fit_window():
    step = P.RobustZScoreNorm("2000-01-01", "2000-01-02")
    step.config(**FIT_WINDOW)
    step.fit(Panel.from_frame(hostile_frame(0)))
    assert step.fit_end_time == FIT_WINDOW["fit_end_time"]
    with pytest.raises(ConfigError, match="no setting 'fit_end'"):
        step.config(fit_end="2024-01-01")


def test_columns_without_a_value_stay_nan_and_are_logged(caplog):
    frame = hostile_frame(5)
    frame[("feature", "x3")] = np.float32(np.nan)
    panel = Panel.from_frame(frame)
    with caplog.at_level(logging.WARNING, logger="qfast"):
        result = run_ours("RobustZScoreNorm", {**FIT_WINDOW, "fields_group": "feature"}, panel)
    assert np.isnan(result.values("feature")[:, 3]).all()
    assert "x3" in caplog.text
    assert "x1" not in caplog.text


# ---------------------------------------------------------------- building
def test_build_accepts_instances_names_and_mappings():
    step = P.Fillna()
    assert P.build_processor(step) is step
    assert isinstance(P.build_processor("Fillna"), P.Fillna)
    assert isinstance(P.build_processor("qlib.data.dataset.processor.CSRankNorm"), P.CSRankNorm)
    spec = {"class": "Fillna", "module_path": "qlib.data.dataset.processor", "kwargs": {"fill_value": 3}}
    assert P.build_processor(spec).fill_value == 3


def test_fit_window_is_injected_but_never_overrides_nor_edits_the_callers_mapping():
    spec = {"class": "RobustZScoreNorm", "kwargs": {"fit_end_time": "2020-12-31"}}
    step = P.build_processor(spec, "2019-01-01", "2024-01-01")
    assert (step.fit_start_time, step.fit_end_time) == ("2019-01-01", "2020-12-31")
    assert spec == {"class": "RobustZScoreNorm", "kwargs": {"fit_end_time": "2020-12-31"}}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("RobustZscoreNorm", r"unknown processor class 'RobustZscoreNorm'.* Did you mean 'RobustZScoreNorm'\?"),
        ({"class": "Fillna", "kwargs": {"fill_valu": 1}}, r"no argument 'fill_valu'.* Did you mean 'fill_value'\?"),
        ({"class": "Fillna", "kwarg": {}}, r"unknown key 'kwarg'.* Did you mean 'kwargs'\?"),
        ({"class": "Fillna", "module_path": "os"}, "not registered under the module path 'os'"),
        ({"kwargs": {}}, "requires the key 'class'"),
        (3, "must be a processor object, a name, or a mapping"),
        ("ZScoreNorm", "ZScoreNorm needs fit_start_time and fit_end_time"),
        ("HashStockFormat", "HashStockFormat is not available"),
        ({"class": "CSZScoreNorm", "kwargs": {"method": "zscoer"}}, "'zscore' or 'robust', got 'zscoer'"),
        ({"class": "DropCol", "kwargs": {"col_list": "x1"}}, "must be a list of column names, got 'x1'"),
        ({"class": "Fillna", "kwargs": {"fill_value": "0"}}, "fill_value must be a number, got '0'"),
    ],
)
def test_build_refuses(spec, message):
    with pytest.raises(ConfigError, match=message):
        P.build_processor(spec)


def test_fit_refuses_an_empty_window():
    step = P.RobustZScoreNorm("2030-01-01", "2031-01-01")
    with pytest.raises(DataError, match=r"no row is between fit_start_time=2030-01-01.*2024-01-01.*to 2024-01-07"):
        step.fit(Panel.from_frame(hostile_frame(0)))


def test_apply_refuses_before_fit():
    with pytest.raises(NotFittedError, match="MinMaxNorm must be fitted"):
        P.MinMaxNorm(None, None)(Panel.from_frame(hostile_frame(0)))


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (P.Fillna("features"), r"no column group 'features'.* Did you mean 'feature'\?"),
        (P.Fillna(("feature", "x9")), "has no column 'x9'"),
        (P.Fillna(5), "fields_group must be None, a group name"),
        (P.FilterCol("feature", ["nobody"]), "none of the columns"),
    ],
)
def test_apply_refuses(step, message):
    with pytest.raises((DataError, ConfigError), match=message):
        step(Panel.from_frame(hostile_frame(0)))


@pytest.mark.parametrize("stage", ["shared", "infer"])
def test_learn_only_is_refused_as_a_type_error(stage):
    panel = Panel.from_frame(hostile_frame(0))
    with pytest.raises(TypeError, match=rf"{stage}_processors\[0\] is DropnaLabel"):
        P.run_processors(panel, [P.DropnaLabel()], stage=stage, space=P.Workspace())


def test_losing_every_row_is_an_error():
    frame = hostile_frame(0)
    frame[("feature", "x0")] = np.nan
    with pytest.raises(DataError, match=r"dropped all \d+ rows"):
        P.run_processors(Panel.from_frame(frame), [P.DropnaProcessor("feature")], stage="infer", space=P.Workspace())


# ---------------------------------------------------------------- fitted state, saved and loaded
FITTED = [(name, kwargs) for name, kwargs in CASES if "fit_start_time" in kwargs]
LEARN_NOTHING = [(name, kwargs) for name, kwargs in CASES if "fit_start_time" not in kwargs]


def fitted_step(name: str, kwargs: dict) -> P.Processor:
    step = P.build_processor({"class": name, "kwargs": kwargs})
    step.fit(Panel.from_frame(hostile_frame(0)))
    return step


def fresh_step(name: str, kwargs: dict) -> P.Processor:
    """The processor as scoring builds it, without a fit window."""
    return P.build_processor(
        {"class": name, "kwargs": {**kwargs, "fit_start_time": None, "fit_end_time": None}}, inject=False
    )


@pytest.mark.parametrize(("name", "kwargs"), FITTED, ids=lambda v: v if isinstance(v, str) else "-".join(map(str, v)))
def test_a_loaded_state_transforms_new_data_like_the_fitted_step(name, kwargs, tmp_path):
    step = fitted_step(name, kwargs)
    safetensors.numpy.save_file(step.state(), tmp_path / "state.safetensors")
    loaded = fresh_step(name, kwargs)
    assert not loaded.frozen
    loaded.load_state(safetensors.numpy.load_file(tmp_path / "state.safetensors"))
    assert loaded.frozen
    new = Panel.from_frame(hostile_frame(9, n_days=11, n_stocks=8))
    expected, result = step(new), loaded(new)
    changed = [g for g in new.blocks if expected.values(g) is not new.values(g)]
    assert "feature" in changed, "the case must do something"
    for group in new.blocks:
        np.testing.assert_array_equal(result.values(group), expected.values(group))
    for key, array in step.state().items():
        np.testing.assert_array_equal(loaded.state()[key], array)


@pytest.mark.parametrize(("name", "kwargs"), FITTED, ids=lambda v: v if isinstance(v, str) else "-".join(map(str, v)))
def test_a_frozen_step_is_not_fitted_again(name, kwargs):
    step = fitted_step(name, kwargs)
    loaded = fresh_step(name, kwargs)
    loaded.load_state(step.state())
    other = hostile_frame(9)
    other[("feature", "x0")] = other[("feature", "x0")] * 1000  # fitted on this, the statistics would differ
    refitted = P.build_processor({"class": name, "kwargs": kwargs})
    new = Panel.from_frame(other)
    refit = P.run_processors(new, [refitted], stage="infer", space=P.Workspace())
    saved = P.run_processors(new, [loaded], stage="infer", space=P.Workspace())
    np.testing.assert_array_equal(saved.values("feature"), step(new).values("feature"))
    assert not np.array_equal(saved.values("feature"), refit.values("feature"), equal_nan=True)
    handler = DataHandlerLP(other, infer_processors=[loaded])
    np.testing.assert_array_equal(handler.panel("infer").values("feature"), step(new).values("feature"))


@pytest.mark.parametrize("part", ["positions", "shift", "scale"])
@pytest.mark.parametrize("name", ["RobustZScoreNorm", "ZScoreNorm", "MinMaxNorm"])
def test_a_state_that_does_not_fit_is_refused_by_name(name, part):
    step = fitted_step(name, FIT_WINDOW)
    state = step.state()
    loaded = fresh_step(name, FIT_WINDOW)
    missing = {k: v for k, v in state.items() if k != f"label.{part}"}
    with pytest.raises(DataError, match=rf"{name}: the saved state lacks \['label\.{part}'\] and has no unexpected"):
        loaded.load_state(missing)
    with pytest.raises(DataError, match=rf"{name}: .*lacks no array and has \['feature\.{part}s', 'mean'\] unexpected"):
        loaded.load_state({**state, f"feature.{part}s": state["feature.shift"], "mean": state["feature.shift"]})
    with pytest.raises(DataError, match=rf"{name}: the saved arrays of group 'feature' must be equally long"):
        loaded.load_state({**state, f"feature.{part}": state[f"feature.{part}"][:-1]})
    with pytest.raises(DataError, match=rf"{name}: the saved state lacks all arrays"):
        loaded.load_state({})
    assert not loaded.frozen
    with pytest.raises(NotFittedError, match=f"{name} must be fitted"):
        loaded(Panel.from_frame(hostile_frame(0)))


def test_a_step_without_statistics_accepts_only_an_empty_state():
    for name, kwargs in LEARN_NOTHING:
        step = P.build_processor({"class": name, "kwargs": kwargs})
        assert step.state() == {}
        step.load_state({})
        assert step.frozen
        with pytest.raises(DataError, match=rf"{name} learns nothing, but the saved state has \['feature.shift'\]"):
            step.load_state({"feature.shift": np.zeros(4, np.float32)})


def test_state_before_fit_is_refused():
    with pytest.raises(NotFittedError, match="RobustZScoreNorm is not fitted and has no state"):
        P.RobustZScoreNorm(None, None).state()


def test_new_data_with_fewer_columns_than_the_state_is_refused():
    step = fitted_step("MinMaxNorm", {**FIT_WINDOW, "fields_group": "feature"})
    narrow = hostile_frame(3).drop(columns=[("feature", "x3")])
    with pytest.raises(DataError, match="was fitted to 4 columns of group 'feature', but the panel has 3"):
        step(Panel.from_frame(narrow))


# ---------------------------------------------------------------- processors of users, in Qlib's style
class DoubleAfterFilling(P.Fillna):
    """Overrides one method of a processor and calls the original."""

    def __call__(self, df):
        df = super().__call__(df)
        df["feature"] *= 2
        return df


class Demean(P.Processor):
    """Learns from a frame, as Qlib's processors do."""

    def fit(self, df=None):
        self.mean = df["feature"].mean()

    def __call__(self, df):
        df["feature"] = df["feature"].sub(self.mean).to_numpy()
        return df


class PositiveRows(P.Processor):
    def __call__(self, df):
        df[("feature", "sign")] = np.sign(df[("feature", "x0")])
        return df[df[("feature", "x0")] > 0]


def small_frame() -> pd.DataFrame:
    index = pd.MultiIndex.from_product(
        [pd.date_range("2024-01-01", periods=3), ["B", "A"]], names=["datetime", "instrument"]
    )
    values = np.arange(12, dtype=np.float32).reshape(6, 2) - 3
    values[1, 0] = np.nan
    columns = pd.MultiIndex.from_tuples([("feature", "x0"), ("label", "y")])
    return pd.DataFrame(values, index, columns).sort_index()


def test_an_overridden_call_receives_frames_as_in_qlib():
    frame = small_frame()
    doubled = DataHandlerLP(frame, infer_processors=[DoubleAfterFilling("feature")]).fetch(col_set="__raw")
    expected = frame.fillna(0.0).astype(np.float32)
    expected["feature"] *= 2
    pd.testing.assert_frame_equal(doubled, expected, check_freq=False)
    centered = DataHandlerLP(frame, infer_processors=[Demean()]).fetch(col_set="__raw")
    assert centered["feature"]["x0"].mean() == pytest.approx(0, abs=1e-6)
    assert centered["label"].equals(frame["label"])
    assert set(centered.dtypes) == {np.dtype(np.float32)}
    kept = DataHandlerLP(frame, infer_processors=[PositiveRows(), "Fillna"])
    assert kept.fetch()["sign"].tolist() == [1.0] * int((frame["feature"]["x0"] > 0).sum())
    assert len(kept.fetch(data_key="raw")) == len(frame)


def test_processors_of_users_that_cannot_be_run_or_stored():
    class Forgetful(P.Processor):
        def __call__(self, df):
            df["feature"] *= 2

    with pytest.raises(ConfigError, match=r"Forgetful.__call__ must return a frame.*got NoneType"):
        DataHandlerLP(small_frame(), infer_processors=[Forgetful()])
    step = Demean()
    DataHandlerLP(small_frame(), infer_processors=[step])
    with pytest.raises(ConfigError, match=r"Demean.fit sets mean, but the class has no state\(\) and load_state"):
        step.state()
    assert DoubleAfterFilling("feature").state() == {}
