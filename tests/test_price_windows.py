"""Windows of prices as a view: the operator, and Alpha360 as a view compared with columns in memory."""

from __future__ import annotations

import logging
import pickle
import re
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qfast import check, predict, run
from qfast.data import DatasetH, TSDatasetH, load_prices, synthetic
from qfast.data.column_maps import Fill, Normalize, ShiftedTanh
from qfast.data.handlers import Alpha360
from qfast.data.panel import Panel, WindowBlock
from qfast.data.price_windows import PriceWindows
from qfast.data.prices import Extent, Prices
from qfast.data.processors import RobustZScoreNorm
from qfast.data.storage import map_at
from qfast.errors import ConfigError, DataError
from qfast.models import LSTM
from qfast.ops import price_windows
from qfast.ops.price_windows import _price_windows_twin, neutral_stage
from qfast.workflow.artifacts import export_artifacts
from qfast.workflow.folder import read_frame
from support.fits import FLAT, parametrize_estimators, small_model
from support.workflows import Interrupt

FIT = {"fit_start_time": "2015-01-01", "fit_end_time": "2015-04-30"}
ROBUST = {"class": "RobustZScoreNorm", "kwargs": {"fields_group": "feature", "clip_outlier": True}}
FILL = {"class": "Fillna", "kwargs": {"fields_group": "feature"}}
ZSCORE = {"class": "ZScoreNorm", "kwargs": {"fields_group": "feature"}}
ONE_FILL = {"class": "Fillna", "kwargs": {"fields_group": ("feature", "VWAP3")}}
LEARN = ["DropnaLabel", {"class": "CSRankNorm", "kwargs": {"fields_group": "label"}}]


def alpha360_columns(prices: Prices, rows: np.ndarray, names: list[str], window: int) -> np.ndarray:
    """The definition, one value at a time in float32."""
    panel, extents = prices
    out = np.full((len(rows), len(names), window), np.nan, dtype=np.float32)
    for i, row in enumerate(rows):
        for f, name in enumerate(names):
            if name not in panel.columns("price"):
                continue
            code = panel.instrument_codes[row]
            extent = extents.get(name)
            if extent is not None and not extent.start[code] <= row < extent.stop[code]:
                continue
            divisor = panel.column("volume" if name == "volume" else "close", "price")[row]
            divisor = divisor + np.float32(1e-12) if name == "volume" else divisor
            for k in range(window):
                source = row - (window - 1) + k
                if source >= 0 and panel.instrument_codes[source] == code:
                    with np.errstate(all="ignore"):
                        out[i, f, k] = panel.column(name, "price")[source] / divisor
    return out.reshape(len(rows), -1)


def hostile_prices(days: int = 90, instruments: int = 4, seed: int = 0) -> pd.DataFrame:
    """Prices with holes, late listings, NaN, zeros, infinities and a flat instrument."""
    frame = synthetic.prices(instruments, days, seed=seed).copy()
    rng = np.random.default_rng(seed)
    for value in (np.nan, 0.0, np.inf):
        for column in frame.columns:
            frame.loc[rng.random(len(frame)) < 0.01, column] = value
    frame = frame[rng.random(len(frame)) > 0.05]
    names = frame.index.get_level_values("instrument")
    dates = frame.index.get_level_values("datetime")
    late = (names == names.unique()[1]) & (dates < dates.unique()[days // 3])
    return frame[~late]


def view_and_columns(data: pd.DataFrame, **kwargs: Any) -> tuple[Alpha360, Alpha360]:
    return tuple(Alpha360(data=data, windows=windows, **FIT, **kwargs) for windows in ("auto", "columns"))  # type: ignore[return-value]


def assert_same_bits(actual: np.ndarray, expected: np.ndarray) -> None:
    """Asserts equal float32 values. NaN equals NaN, and 0 does not equal -0."""
    assert actual.dtype == expected.dtype == np.float32
    np.testing.assert_array_equal(actual, expected)
    np.testing.assert_array_equal(np.signbit(actual[~np.isnan(actual)]), np.signbit(expected[~np.isnan(expected)]))


# ---------------------------------------------------------------- the operator
@st.composite
def arguments(draw: st.DrawFn) -> tuple[Any, ...]:
    fields, window = draw(st.integers(1, 4)), draw(st.integers(1, 70))
    rows, count, stages = draw(st.integers(1, 40)), draw(st.integers(0, 30)), draw(st.integers(0, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    series = torch.randn(fields, window - 1 + rows, generator=generator)
    special = torch.rand(series.shape, generator=generator)
    series[special < 0.1], series[special > 0.95] = torch.nan, torch.inf
    divisors = torch.randn(2, rows, generator=generator)
    divisors[divisors.abs() < 0.1] = 0.0
    stage = neutral_stage(fields * window).repeat(stages, 1, 1)
    stage[:, 0] += torch.randn(stage[:, 0].shape, generator=generator)
    stage[:, 1] *= torch.randn(stage[:, 1].shape, generator=generator)
    if draw(st.booleans()):
        stage[:, 2] = 0.5
    if draw(st.booleans()):
        stage[:, 3] = -1.0
    dtype = draw(st.sampled_from([torch.int32, torch.int64]))
    ends = torch.arange(window - 1, window - 1 + rows, dtype=dtype)
    numbers = torch.randint(-1, rows, (count,), generator=generator)
    return series, ends, divisors, torch.randint(0, 2, (fields,), generator=generator), numbers, stage, window


@settings(max_examples=60, deadline=None)
@given(arguments())
def test_the_operator_equals_its_twin(isa_arguments: tuple[Any, ...]) -> None:
    assert_same_bits(price_windows(*isa_arguments).numpy(), _price_windows_twin(*isa_arguments).numpy())


def example() -> list[Any]:
    series = torch.rand(3, 40)
    ends = torch.arange(4, 40)
    stage = neutral_stage(15)
    return [series, ends, torch.rand(2, 36), torch.tensor([0, 1, 0]), torch.tensor([3, -1, 35]), stage, 5]


def test_every_instruction_set_and_thread_count_gives_the_same_bits(isa: str) -> None:
    series, divisors = torch.randn(6, 5059), torch.randn(2, 5000)
    stage = neutral_stage(360).repeat(2, 1, 1)
    stage[0, 1], stage[0, 2], stage[1, 3] = torch.rand(360) + 0.1, 3.0, 0.0
    rows = torch.randint(0, 5000, (3000,))
    tensors = (series, torch.arange(59, 5059), divisors, torch.tensor([0, 0, 0, 0, 0, 1]), rows, stage)
    expected = _price_windows_twin(*tensors, 60)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(price_windows(*tensors, 60), expected)
    finally:
        torch.set_num_threads(before)


def test_opcheck() -> None:
    inputs = example()
    inputs[4] = torch.tensor([3, 0, 35])  # opcheck does not accept that NaN equals NaN
    inputs[0][:] = 1.5
    torch.library.opcheck(torch.ops.qfast.price_windows, inputs)


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.rand(3, 40).double(), r"series: expected dtype float32, got"),
        (0, torch.rand(40), r"series: expected shape \[F, P\], got \(40,\)"),
        (1, torch.arange(35), r"divisors: expected .*35 rows"),
        (1, torch.rand(36), r"ends: expected dtype"),
        (2, torch.rand(36), r"divisors: expected shape \[K, R\], got \(36,\)"),
        (3, torch.tensor([0, 1]), r"divisor_of: expected"),
        (4, torch.tensor([3], dtype=torch.int32), r"rows: expected dtype"),
        (5, torch.rand(1, 4, 14), r"stages: expected shape \(M, 4, 15\), got \(1, 4, 14\)"),
        (6, 0, r"window: expected at least 1, got 0"),
        (4, None, r"rows: expected a tensor, got NoneType"),
    ],
)
def test_wrong_arguments_are_named(position: int, value: object, message: str) -> None:
    changed = example()
    changed[position] = value
    with pytest.raises((DataError, ValueError), match=message):
        price_windows(*changed)


@pytest.mark.parametrize(
    ("position", "value"),
    [(4, torch.tensor([36])), (4, torch.tensor([-2])), (1, torch.arange(3, 39)), (1, torch.arange(5, 41))],
)
def test_rows_and_places_out_of_range_are_refused(position: int, value: torch.Tensor) -> None:
    changed = example()
    changed[position] = value
    changed[4] = torch.tensor([0, 35]) if position == 1 else value
    with pytest.raises(IndexError, match="price_windows"):
        price_windows(*changed)


# ---------------------------------------------------------------- PriceWindows
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("window", [1, 2, 60])
def test_values_follow_the_definition(seed: int, window: int) -> None:
    frame = hostile_prices(40, 3, seed)
    panel = load_prices(frame)
    extents = {"open": Extent(np.array([2, 0, 0]), np.array([10, 5000, 5000]))}
    names = ["close", "open", "volume", "absent"]
    rows = np.arange(0, panel.n_rows, 2)
    windows = PriceWindows.of_prices(Prices(panel, extents), rows, names, window)
    expected = alpha360_columns(Prices(panel, extents), rows, names, window)
    assert_same_bits(windows[:], expected)
    assert_same_bits(windows[5:9], expected[5:9])
    assert_same_bits(windows[np.array([7, 0, 7])], expected[[7, 0, 7]])
    for column in (0, window, 4 * window - 1):
        assert_same_bits(windows[:, column], expected[:, column])
        assert_same_bits(windows.columns(np.array([column]), rows[:3] * 0), expected[[0, 0, 0]][:, [column]].T)


def test_a_map_of_some_columns_and_a_map_that_is_no_stage() -> None:
    panel = load_prices(synthetic.prices(2, 20))
    windows = PriceWindows.of_prices(Prices(panel, {}), np.arange(panel.n_rows), ["close", "open"], 3)
    plain, positions = windows[:], np.array([1, 4])
    normalize = Normalize(np.float32([0.5, 1.5]), np.float32([0.1, 3.0]), 2.0)
    mapped = windows.mapped(normalize, positions)
    assert mapped is not None
    expected = plain.copy()
    expected[:, positions] = normalize(plain[:, positions])
    assert_same_bits(mapped[:], expected)
    filled = mapped.mapped(Fill(7.0), np.array([0]))
    assert filled is not None
    assert len(filled.stages) == 1  # a fill joins the stage before it
    expected[np.isnan(expected[:, 0]), 0] = 7.0
    assert_same_bits(filled[:], expected)
    assert_same_bits(filled[:, 0], expected[:, 0])
    again = filled.mapped(Fill(8.0), np.array([0, 1]))
    assert again is not None
    assert len(again.stages) == 2
    squashed = again.mapped(ShiftedTanh(), positions).mapped(normalize, positions)
    assert len(squashed.stages) == 2  # after tanh, which is not a stage, no map is a stage
    expected = again[:]
    expected[:, positions] = normalize(ShiftedTanh()(expected[:, positions]))
    assert_same_bits(squashed[:], expected)
    assert_same_bits(squashed[:, 4], expected[:, 4])
    assert squashed.mapped(Fill(0.0), np.arange(6)).gather(torch.tensor([-1])).isnan().all()


def test_stored_rows_and_their_later_maps() -> None:
    panel = load_prices(synthetic.prices(2, 20))
    windows = PriceWindows.of_prices(Prices(panel, {}), np.arange(panel.n_rows), ["close", "open"], 3)
    expected = windows[:]
    expected[[3, 9]] = np.float32([[1], [np.nan]])
    windows = windows.with_stored(np.array([3, 9]), expected[[3, 9]])
    assert_same_bits(windows[:], expected)
    expected[[2, 9]] = np.float32([[2], [4]])
    windows = windows.with_stored(np.array([2, 9]), expected[[2, 9]])
    assert windows.with_stored(np.array([], dtype=np.int64), expected[:0]).stored is not None
    assert_same_bits(windows[np.array([9, 3, 2, 1])], expected[[9, 3, 2, 1]])
    windows = windows.mapped(ShiftedTanh(), np.array([1])).mapped(Fill(5.0), np.arange(6))
    expected[:, 1] = ShiftedTanh()(expected[:, 1])
    expected = Fill(5.0)(expected)
    assert_same_bits(windows[:], expected)
    assert_same_bits(windows[:, 1], expected[:, 1])


def test_values_that_cannot_be_missing_are_known_without_a_look() -> None:
    panel = load_prices(hostile_prices(70, 2))
    windows = PriceWindows.of_prices(Prices(panel, {}), np.arange(panel.n_rows), ["close", "open"], 3)
    every = np.arange(6)
    clip = Normalize(np.zeros(6, np.float32), np.ones(6, np.float32), 3.0)
    facts = {
        "raw": (windows, False, False),
        "clipped": (windows.mapped(clip, every), False, False),
        "filled": (windows.mapped(Fill(0.0), every), True, False),
        "filled with infinity": (windows.mapped(Fill(np.inf), every), True, False),
        "one column": (windows.mapped(clip, every).mapped(Fill(0.0), every[:1]), False, False),
        "clipped and filled": (windows.mapped(clip, every).mapped(Fill(0.0), every), True, True),
    }
    for name, (view, never_nan, always_finite) in facts.items():
        assert (view.never_nan(), view.always_finite()) == (never_nan, always_finite), name
        assert not view.never_nan() or not np.isnan(view[:]).any()
        assert not view.always_finite() or np.isfinite(view[:]).all()
    stored = facts["clipped and filled"][0].with_stored(np.array([0]), np.full((1, 6), np.inf, dtype=np.float32))
    assert (stored.never_nan(), stored.always_finite()) == (True, False)


# ---------------------------------------------------------------- Alpha360 as a view
PROCESSORS: dict[str, dict[str, Any]] = {
    "none": {"infer_processors": [], "learn_processors": []},
    "benchmark": {"infer_processors": [ROBUST, FILL], "learn_processors": LEARN},
    "not clipped": {"infer_processors": [{"class": "RobustZScoreNorm", "kwargs": {"clip_outlier": False}}, FILL]},
    "zscore": {"infer_processors": ["ZScoreNorm", "Fillna"]},
    "minmax": {"infer_processors": [FILL, "MinMaxNorm"], "learn_processors": LEARN},
    "one column": {"infer_processors": [ONE_FILL]},
    "dropna": {
        "infer_processors": [{"class": "DropnaProcessor", "kwargs": {"fields_group": ("feature", "OPEN3")}}, ROBUST]
    },
    "tanh": {"infer_processors": ["TanhProcess"]},
    "tanh between": {"infer_processors": [ROBUST, "TanhProcess", ONE_FILL, ZSCORE, FILL]},
    "without a column": {"infer_processors": [ROBUST, {"class": "DropCol", "kwargs": {"col_list": ["CLOSE0"]}}, FILL]},
    "two fields": {
        "infer_processors": [
            *(ROBUST, "TanhProcess", ONE_FILL),
            {"class": "FilterCol", "kwargs": {"col_list": [f"{n}{k}" for n in ("VOLUME", "OPEN") for k in range(60)]}},
            {"class": "DropCol", "kwargs": {"col_list": ["OPEN0", "OPEN9", "OPEN59", "VOLUME30"]}},
            *(ZSCORE, {"class": "Fillna", "kwargs": {"fields_group": ("feature", "VOLUME3")}}),
        ],
        "learn_processors": LEARN,
    },
    "independent": {"infer_processors": [ROBUST], "learn_processors": [FILL], "process_type": "independent"},
    "shared": {"shared_processors": [ROBUST], "infer_processors": [FILL], "drop_raw": True},
}


@pytest.mark.parametrize("processors", PROCESSORS.values(), ids=PROCESSORS)
def test_views_equal_columns(processors: dict[str, Any], tmp_path: Path) -> None:
    """Also after a round trip through a panel folder, which remains a view."""
    view, columns = view_and_columns(hostile_prices(), **processors)
    for key in ("raw", "infer", "learn"):
        if key == "raw" and processors.get("drop_raw"):
            continue
        left, right = view.panel(key), columns.panel(key)
        assert isinstance(left.table("feature"), PriceWindows)
        assert isinstance(right.table("feature"), np.ndarray)
        assert_same_bits(left.values("feature"), right.values("feature"))
        assert_same_bits(left.table("feature")[:, 70], right.values("feature")[:, 70])
        np.testing.assert_array_equal(left.live_rows(), right.live_rows())
        left.save(tmp_path / key)
        opened = Panel.open(tmp_path / key)
        assert isinstance(opened.table("feature"), PriceWindows)
        assert_same_bits(opened.values("feature"), right.values("feature"))
        assert_same_bits(opened.table("feature")[:, 70], right.values("feature")[:, 70])
        np.testing.assert_array_equal(opened.live_rows(), right.live_rows())
        assert opened.content_hash() == left.content_hash()
        pd.testing.assert_frame_equal(view.fetch(data_key=key), columns.fetch(data_key=key))


NEEDS_COLUMNS: dict[str, Any] = {
    "CSZScoreNorm": {"class": "CSZScoreNorm", "kwargs": {"fields_group": "feature"}},
    "CSRankNorm": {"class": "CSRankNorm", "kwargs": {"fields_group": "feature"}},
    "CSZFillna": {"class": "CSZFillna", "kwargs": {"fields_group": "feature"}},
    "FilterCol": {"class": "FilterCol", "kwargs": {"fields_group": "feature", "col_list": ["CLOSE0", "VOLUME9"]}},
    "CSZScoreNorm of a selection": {"class": "CSZScoreNorm", "kwargs": {"fields_group": ("feature", "CLOSE5")}},
}


@pytest.mark.parametrize("name", NEEDS_COLUMNS)
def test_other_processors_store_columns_and_are_logged(name: str, caplog: pytest.LogCaptureFixture) -> None:
    processors = [ROBUST, NEEDS_COLUMNS[name], FILL]
    with caplog.at_level(logging.INFO, logger="qfast"):
        view, columns = view_and_columns(hostile_prices(), infer_processors=processors)
    n_columns = len(view.panel("infer").columns("feature"))
    assert f"{NEEDS_COLUMNS[name]['class']}: group 'feature' is stored as {n_columns} columns" in caplog.text
    assert ("GiB, because few columns remain" if name == "FilterCol" else "GiB, because its constants") in caplog.text
    assert isinstance(view.panel("infer").table("feature"), np.ndarray)
    pd.testing.assert_frame_equal(view.fetch(), columns.fetch())
    pd.testing.assert_frame_equal(view.fetch(data_key="raw"), columns.fetch(data_key="raw"))
    if name == "FilterCol":  # only the columns are smaller than the view
        forced = Alpha360(data=hostile_prices(), windows="view", infer_processors=processors, **FIT)
        assert isinstance(forced.panel("infer").table("feature"), PriceWindows)
        pd.testing.assert_frame_equal(forced.fetch(), columns.fetch())
        return
    with pytest.raises(ConfigError, match=r"CS\w+ needs 360 columns of group 'feature' in memory"):
        Alpha360(data=hostile_prices(), windows="view", infer_processors=processors, **FIT)


DROPNA = {"class": "DropnaProcessor", "kwargs": {"fields_group": ("feature", "OPEN3")}}
INFINITE: dict[str, dict[str, Any]] = {
    "alone": {"infer_processors": ["ProcessInf"]},
    "between": {"infer_processors": [DROPNA, "ProcessInf", "TanhProcess", "ProcessInf", ROBUST, FILL]},
    "twice": {"infer_processors": ["ProcessInf", "MinMaxNorm"], "learn_processors": ["ProcessInf", *LEARN]},
    "selected": {"infer_processors": ["ProcessInf", {"class": "DropCol", "kwargs": {"col_list": ["OPEN9"]}}, ROBUST]},
}


@pytest.mark.parametrize("processors", INFINITE.values(), ids=INFINITE)
def test_process_inf_stores_few_rows(processors: dict[str, Any], tmp_path: Path) -> None:
    frame = synthetic.prices(4, 90).copy()
    close = list(frame.columns).index("close")
    frame.iloc[[5, 130, 131, 210], close] = 0.0
    frame.iloc[[1, 31], close] = np.nan
    view, columns = view_and_columns(frame, **processors)
    for key in ("raw", "infer", "learn"):
        windows = view.panel(key).table("feature")
        assert isinstance(windows, PriceWindows)
        assert_same_bits(windows[:], columns.panel(key).values("feature"))
        assert_same_bits(windows[:, 70], columns.panel(key).values("feature")[:, 70])
        view.panel(key).save(tmp_path / key)
        opened = Panel.open(tmp_path / key).table("feature")
        assert isinstance(opened, PriceWindows)
        assert (opened.stored is None) == (windows.stored is None) == (key == "raw")
        assert_same_bits(opened[:], windows[:])


@pytest.mark.parametrize(("zeros", "kind"), [(0, PriceWindows), (60, np.ndarray)], ids=["none", "many"])
def test_process_inf_stores_many_rows_as_columns(zeros: int, kind: type) -> None:
    frame = synthetic.prices(4, 90).copy()
    frame.iloc[:zeros, list(frame.columns).index("close")] = 0.0
    view, columns = view_and_columns(frame, infer_processors=["ProcessInf", ROBUST])
    assert isinstance(view.panel("infer").table("feature"), kind)
    assert_same_bits(view.panel("infer").values("feature"), columns.panel("infer").values("feature"))


def test_windows_has_three_values() -> None:
    with pytest.raises(ConfigError, match=r"windows must be one of \['auto', 'view', 'columns'\], got 'colums'"):
        Alpha360(data=synthetic.prices(3, 70), windows="colums")


@pytest.mark.parametrize("flat", [True, False])
def test_batches_training_and_scores_are_the_same(flat: bool) -> None:
    view, columns = view_and_columns(hostile_prices(80), infer_processors=[ROBUST, FILL], learn_processors=LEARN)
    segments = {"train": (None, "2015-03-20"), "valid": ("2015-03-21", "2015-04-03"), "test": ("2015-04-04", None)}
    scores, samples = [], []
    for handler in (view, columns):
        if flat:
            dataset = DatasetH(handler, segments)
            model = LSTM(d_feat=6, hidden_size=4, n_epochs=2, batch_size=50, seed=1)
            model.fit(dataset)
            scores.append(model.predict(dataset))
        else:
            dataset = TSDatasetH(5, handler=handler, segments=segments)
            sampler = dataset.prepare("train", col_set=["feature", "label"])
            scores.append(pd.Series(sampler[list(range(len(sampler)))].ravel()))
        windows = dataset.windows("train", "learn")
        samples.append(windows.batch(torch.arange(len(windows)).flip(0)).numpy())
    assert_same_bits(*samples)
    pd.testing.assert_series_equal(*scores, check_exact=True)


def test_a_view_survives_pickle_and_folders(tmp_path: Any) -> None:
    view, columns = view_and_columns(hostile_prices(), infer_processors=[ROBUST, FILL])
    copy = pickle.loads(pickle.dumps(view))
    pd.testing.assert_frame_equal(copy.fetch(), columns.fetch())


def test_columns_replace_a_view_in_a_folder(tmp_path: Path) -> None:
    view, columns = view_and_columns(hostile_prices(), infer_processors=[ROBUST])
    for panel in (view.panel("infer"), columns.panel("infer"), view.panel("infer")):
        panel.save(tmp_path)
        opened = Panel.open(tmp_path)
        assert type(opened.table("feature")) is type(panel.table("feature"))
        assert_same_bits(opened.values("feature"), panel.values("feature"))


def test_processes_share_the_prices_of_a_view(tmp_path: Path) -> None:
    """The files contain the prices, not the columns, and are mapped by `Panel.open` and by a study."""
    view, columns = view_and_columns(synthetic.prices(20, 500), infer_processors=[ROBUST, FILL])
    panel = view.panel("learn")
    panel.save(tmp_path / "panel")
    size = sum(file.stat().st_size for file in (tmp_path / "panel").rglob("*"))
    assert size * 15 < columns.panel("learn").nbytes
    opened = Panel.open(tmp_path / "panel").table("feature")
    assert isinstance(opened, PriceWindows)
    for tensor in (opened.series, opened.ends, opened.divisors, opened.stages):
        assert map_at(tensor.data_ptr()) is not None


@pytest.mark.parametrize("name", ["series", "ends", "divisors", "divisor_of", "stages"])
@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing"])
def test_damaged_files_of_a_view_are_named(tmp_path: Path, name: str, damage: str) -> None:
    view = Alpha360(data=synthetic.prices(3, 70), infer_processors=[ROBUST, FILL], **FIT)
    view.panel("infer").save(tmp_path)
    (file,) = tmp_path.glob(f"contents-*/block-*-{name}.values")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(content if damage == "flipped" else content[:-1])
    with pytest.raises(DataError, match="lacks files" if damage == "missing" else rf"block-\d+-{name}\.values"):
        Panel.open(tmp_path)


def test_a_view_with_an_unknown_map_is_not_saved(tmp_path: Path) -> None:
    panel = Alpha360(data=synthetic.prices(3, 70), infer_processors=[], **FIT).panel("infer")

    class Sign(ShiftedTanh):
        """A map of the user, which a folder cannot describe."""

    windows = panel.table("feature")
    assert isinstance(windows, PriceWindows)
    panel.save(tmp_path / "panel")
    other = panel.with_block("feature", WindowBlock(windows.mapped(Sign(), np.arange(360)), panel.columns("feature")))
    with pytest.raises(DataError, match="a view with the map Sign cannot be saved"):
        other.save(tmp_path / "panel")
    assert_same_bits(Panel.open(tmp_path / "panel").values("feature"), panel.values("feature"))


def test_a_view_needs_a_small_part_of_the_memory() -> None:
    view, columns = view_and_columns(synthetic.prices(20, 500), infer_processors=[ROBUST, FILL])
    assert view.panel("infer").nbytes * 20 < columns.panel("infer").nbytes


def test_constants_are_fitted_a_few_columns_at_a_time() -> None:
    handler = Alpha360(data=synthetic.prices(40, 500), windows="view", infer_processors=[], **FIT)
    panel = handler.panel("raw")
    step = RobustZScoreNorm(None, None, "feature")
    tracemalloc.start()
    try:
        step.fit(panel)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < panel.n_rows * 360 * 4 / 6, f"{peak} bytes for {panel.n_rows} rows"
    columns = panel.replace("feature", panel.values("feature"))
    expected = RobustZScoreNorm(None, None, "feature")
    expected.fit(columns)
    for name, values in step.state().items():
        np.testing.assert_array_equal(values, expected.state()[name])


# ---------------------------------------------------------------- models, runs and later commands
@pytest.fixture(scope="module")
def both_datasets() -> list[DatasetH]:
    handlers = view_and_columns(hostile_prices(80), infer_processors=[ROBUST, FILL], learn_processors=LEARN)
    segments = {"train": (None, "2015-03-20"), "valid": ("2015-03-21", "2015-04-03"), "test": ("2015-04-04", None)}
    return [DatasetH(handler, segments) for handler in handlers]


@parametrize_estimators(FLAT)
def test_every_model_has_the_same_losses_and_scores(kind: Any, both_datasets: list[DatasetH]) -> None:
    models = [small_model(kind, d_feat=6, n_epochs=2, dropout=0.2).fit(dataset) for dataset in both_datasets]
    timeless = [model.history_.drop(columns=["train_seconds", "seconds"]) for model in models]
    pd.testing.assert_frame_equal(*timeless, check_exact=True)
    scores = [model.predict(dataset) for model, dataset in zip(models, both_datasets, strict=True)]
    pd.testing.assert_series_equal(*scores, check_exact=True)


WORKFLOW = """
task:
  model:
    class: LSTM
    module_path: qlib.contrib.model.pytorch_lstm
    kwargs: {d_feat: 6, hidden_size: 4, num_layers: 1, n_epochs: 2, batch_size: 64, metric: loss, GPU: 0}
  dataset:
    class: DatasetH
    module_path: qlib.data.dataset
    kwargs:
      handler:
        class: Alpha360
        module_path: qlib.contrib.data.handler
        kwargs:
          fit_start_time: 2015-01-01
          fit_end_time: 2015-04-30
          infer_processors:
            - {class: RobustZScoreNorm, kwargs: {fields_group: feature, clip_outlier: true}}
            - {class: Fillna, kwargs: {fields_group: feature}}
          learn_processors: [DropnaLabel, {class: CSRankNorm, kwargs: {fields_group: label}}]
      segments:
        train: [2015-01-01, 2015-04-15]
        valid: [2015-04-16, 2015-05-05]
        test: [2015-05-06, 2015-06-30]
  record:
    - {class: SignalRecord, module_path: qlib.workflow.record_temp}
"""
WINDOWS = "task.dataset.kwargs.handler.kwargs.windows"


def test_run_predict_and_resume_are_the_same(tmp_path: Path) -> None:
    config, prices = tmp_path / "w.yaml", synthetic.prices(5, 120)
    config.write_text(WORKFLOW)
    runs = {w: run(config, prices, [f"{WINDOWS}={w}"], output=tmp_path / w, seed=2) for w in ("view", "columns")}
    for form, result in runs.items():
        kind = PriceWindows if form == "view" else np.ndarray
        assert isinstance(result.dataset.handler.panel("infer").table("feature"), kind)
    losses = [result.model.history_["train_loss"] for result in runs.values()]
    pd.testing.assert_series_equal(*losses, check_exact=True)
    tables = [read_frame(result.path, "pred") for result in runs.values()]
    pd.testing.assert_frame_equal(*tables, check_exact=True)
    new = [predict(result.path, prices, start="2015-05-06") for result in runs.values()]
    pd.testing.assert_series_equal(*new, check_exact=True)
    common = tables[0].index.intersection(new[0].index)
    assert len(common) > 50
    np.testing.assert_allclose(new[0][common], tables[0].loc[common].iloc[:, 0], rtol=1e-6)

    with pytest.raises(KeyboardInterrupt):
        run(config, prices, [f"{WINDOWS}=view"], output=tmp_path / "broken", seed=2, callbacks=[Interrupt(1)])
    resumed = run(data=prices, resume=tmp_path / "broken")
    pd.testing.assert_frame_equal(read_frame(resumed.path, "pred"), tables[0], check_exact=True)

    exported = [pd.read_pickle(export_artifacts(result.path) / "pred.pkl") for result in runs.values()]
    pd.testing.assert_frame_equal(*exported, check_exact=True)


def test_check_reads_a_view_without_storing_its_columns(tmp_path: Path) -> None:
    config, prices = tmp_path / "w.yaml", synthetic.prices(5, 120)
    config.write_text(WORKFLOW)
    fit_end = "task.dataset.kwargs.handler.kwargs.fit_end_time=2015-04-15"
    reports = {w: check(config, prices, [f"{WINDOWS}={w}", fit_end]) for w in ("view", "columns")}
    assert reports["view"].ok, reports["view"].lines()
    texts = {
        form: [(f.level, f.topic, f.text) for f in report.findings if f.topic not in ("data", "time", "memory")]
        for form, report in reports.items()
    }
    assert texts["view"] == texts["columns"]
    megabytes = {
        form: int(re.search(r"occupy (\d+) MB", next(f.text for f in report.findings if f.topic == "memory"))[1])
        for form, report in reports.items()
    }
    assert megabytes["view"] < megabytes["columns"]
