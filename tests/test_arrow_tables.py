"""Tables of Arrow and Polars as prices."""

from __future__ import annotations

import importlib

import numpy as np
import pandas as pd
import pytest

import qfast
from qfast.data import DataHandlerLP, TSDatasetH, arrow_tables, load_prices, synthetic
from qfast.data.loaders import StaticDataLoader
from qfast.errors import ConfigError, DataError
from qfast.workflow.demo import DEMO, demo_prices

pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")


LIBRARIES = ("pyarrow", "batches", "polars")


def table_of(frame: pd.DataFrame, library: str):
    """A frame as a table of another library. A stream of batches can be read once."""
    table = pyarrow.Table.from_pandas(frame, preserve_index=False)
    if library == "batches":
        return pyarrow.RecordBatchReader.from_batches(table.schema, table.to_batches(max_chunksize=50))
    if library == "polars":
        return pytest.importorskip("polars", reason="polars is not installed").from_arrow(table)
    return table


@pytest.mark.parametrize("library", LIBRARIES)
def test_tables_of_other_libraries(library: str) -> None:
    frame = synthetic.prices(3, 30).reset_index()
    panel, expected = load_prices(table_of(frame, library)), load_prices(frame)
    assert panel.datetimes.equals(expected.datetimes)
    assert list(panel.instruments) == list(expected.instruments)
    np.testing.assert_array_equal(panel.values("price"), expected.values("price"))


def test_a_missing_pyarrow_and_other_objects_are_reported(monkeypatch) -> None:
    table = pyarrow.table({"close": [1.0]})

    def without_pyarrow(name: str):
        raise ImportError(f"No module named {name!r}")

    with pytest.raises(ConfigError, match=r"an Arrow table or a Panel, got int: 3\. docs/data\.md shows every"):
        load_prices(3)
    monkeypatch.setattr(arrow_tables.importlib, "import_module", without_pyarrow)
    with pytest.raises(ConfigError, match=r"type Table need pyarrow.*qfast-models\[parquet\]"):
        load_prices(table)
    assert importlib is arrow_tables.importlib


SMALL = ["task.model.kwargs.n_epochs=1", "task.model.kwargs.hidden_size=2"]


@pytest.mark.usefixtures("undrawn_plots")
@pytest.mark.parametrize("library", LIBRARIES)
def test_workflows_accept_them(library: str, tmp_path) -> None:
    """Check, run and predict return the same as with a pandas frame."""
    frame = demo_prices(8, 560).reset_index()
    result = qfast.run(DEMO, table_of(frame, library), SMALL, seed=0, output=tmp_path / "a", progress=False)
    expected = qfast.run(DEMO, frame, SMALL, seed=0, output=tmp_path / "b", progress=False)
    assert result.metrics == expected.metrics
    scores = qfast.predict(result.path, table_of(frame, library), date="latest")
    pd.testing.assert_series_equal(scores, qfast.predict(result.path, frame, date="latest"))
    assert qfast.check(DEMO, table_of(frame, library), SMALL, experiments=False).ok


@pytest.mark.parametrize("library", LIBRARIES)
def test_tables_of_factors(library: str) -> None:
    frame = synthetic.factors(4, 30, 3)
    flat = frame.set_axis([*frame["feature"].columns, "label"], axis=1)
    segments = {"test": (None, None)}
    for handler in (
        DataHandlerLP(table_of(flat.reset_index(), library)),
        DataHandlerLP(data_loader=StaticDataLoader(table_of(flat.reset_index(), library))),
    ):
        pd.testing.assert_frame_equal(handler.fetch(col_set="feature"), frame["feature"], check_names=False)
        assert handler.get_cols("label") == ["label"]
    windows = TSDatasetH(table_of(flat.reset_index(), library), segments, step_len=2).prepare("test", ["feature"])
    expected = TSDatasetH(frame, segments, step_len=2).prepare("test", ["feature"])
    np.testing.assert_array_equal(windows[5], expected[5])


def test_a_single_column_is_refused() -> None:
    column = pyarrow.chunked_array([[1.0, 2.0]])
    with pytest.raises(DataError, match=r"the ChunkedArray cannot be converted to a table .* docs/data\.md"):
        load_prices(column)


class LazyFrame:
    """A table that has not been computed, as in Polars."""

    def collect(self) -> None:
        raise AssertionError("only the user decides when to compute")


def test_tables_that_have_to_be_computed_first() -> None:
    for read in (load_prices, DataHandlerLP, lambda table: StaticDataLoader(table).load()):
        with pytest.raises((ConfigError, DataError), match=r"LazyFrame.*Remedy: LazyFrame\.collect\(\) first"):
            read(LazyFrame())


@pytest.mark.parametrize(
    ("source", "remedy"),
    [
        ({"A": pd.DataFrame({"close": [1.0]})}, r"pandas\.concat\(frames, names=\['instrument'\]\)\."),
        ([pd.DataFrame({"close": [1.0]})], r"pandas\.concat\(frames\)\."),
        ({"close": [1.0]}, r"pandas\.DataFrame\(prices\)\."),
    ],
    ids=["frames by name", "list of frames", "columns"],
)
def test_containers_have_a_remedy(source: object, remedy: str) -> None:
    with pytest.raises(ConfigError, match=rf"Remedy: {remedy} docs/data\.md"):
        load_prices(source)


def test_a_column_with_dates_is_named() -> None:
    frame = pd.DataFrame({"who": ["A"], "when": ["2024-01-02"], "close": [1.0]})
    with pytest.raises(DataError, match=r"no datetime column.* Remedy: rename 'when' to 'date', because it contains"):
        load_prices(frame)


@pytest.mark.parametrize(
    "frame",
    [
        pd.DataFrame({"close": [1.0]}),
        pd.DataFrame({"date": ["2024-01-02"], "symbol": "A", "close": ["high"]}),
        pd.DataFrame({"date": ["02/01/2024"], "symbol": "A", "close": [1.0]}),
        pd.DataFrame({"date": ["2024-01-02"] * 2, "symbol": "A", "close": [1.0, 2.0]}),
        pd.DataFrame({"date": [], "symbol": [], "close": []}),
    ],
    ids=["no date", "text", "ambiguous dates", "twice", "no rows"],
)
def test_errors_about_the_form_name_the_page(frame: pd.DataFrame, tmp_path) -> None:
    frame.to_csv(tmp_path / "prices.csv", index=False)
    for source in (frame, pyarrow.Table.from_pandas(frame, preserve_index=False), tmp_path / "prices.csv"):
        with pytest.raises(DataError) as error:
            load_prices(source)
        assert str(error.value).endswith(" docs/data.md shows every accepted form.")
        assert str(error.value).count("docs/data.md") == 1


def test_folders_and_stores_name_the_page(tmp_path) -> None:
    with pytest.raises(DataError, match=r"neither CSV nor Parquet.* docs/data\.md shows every accepted form\.$"):
        load_prices(tmp_path)
    (tmp_path / "calendars").mkdir()
    with pytest.raises(DataError, match=r"is not a Qlib data folder.* docs/data\.md shows every accepted form\.$"):
        load_prices(provider_uri=tmp_path)
