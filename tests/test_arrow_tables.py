"""Tables of Arrow and Polars as prices."""

from __future__ import annotations

import importlib

import numpy as np
import pytest

from qfast.data import arrow_tables, load_prices, synthetic
from qfast.errors import ConfigError

pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")


@pytest.mark.parametrize("library", ["pyarrow", "polars"])
def test_tables_of_other_libraries(library: str) -> None:
    frame = synthetic.prices(3, 30).reset_index()
    table = pyarrow.Table.from_pandas(frame, preserve_index=False)
    if library == "polars":
        table = pytest.importorskip("polars", reason="polars is not installed").from_arrow(table)
    panel, expected = load_prices(table), load_prices(frame)
    assert panel.datetimes.equals(expected.datetimes)
    assert list(panel.instruments) == list(expected.instruments)
    np.testing.assert_array_equal(panel.values("price"), expected.values("price"))


def test_a_missing_pyarrow_and_other_objects_are_reported(monkeypatch) -> None:
    table = pyarrow.table({"close": [1.0]})

    def without_pyarrow(name: str):
        raise ImportError(f"No module named {name!r}")

    with pytest.raises(ConfigError, match=r"an Arrow table or a Panel, got int: 3\. docs/data\.md lists"):
        load_prices(3)
    monkeypatch.setattr(arrow_tables.importlib, "import_module", without_pyarrow)
    with pytest.raises(ConfigError, match=r"type Table need pyarrow.*qfast-models\[parquet\]"):
        load_prices(table)
    assert importlib is arrow_tables.importlib
