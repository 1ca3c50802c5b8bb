"""Shared fixtures: seeded frames shaped like real panels, and global generators put back after each test."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd
import pytest
import torch

from qfast import _backend

# The tensors here are tiny: a second thread only waits, and two test runs on one machine starve each other.
# Tests about threads set their own number.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _restore_generators() -> Iterator[None]:
    """A test that seeds the global generators must not decide what the next one draws."""
    numpy_state, torch_state = np.random.get_state(), torch.get_rng_state()
    yield
    np.random.set_state(numpy_state)
    torch.set_rng_state(torch_state)


@pytest.fixture(params=_backend.native.available_isas() if _backend.native is not None else ["plain torch"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set of the native library in turn; the twin where there is none."""
    if _backend.native is None:
        yield request.param
        return
    before = _backend.native.isa()
    _backend.native.select_isa(request.param)
    yield request.param
    _backend.native.select_isa(before)


def make_frame(
    n_dates: int = 40,
    n_instruments: int = 7,
    n_features: int = 3,
    *,
    seed: int = 0,
    holes: float = 0.1,
    dtype: type = np.float32,
    freq: str = "B",
) -> pd.DataFrame:
    """(datetime, instrument) frame with ("feature", ...) and ("label", ...) columns and missing rows."""
    rng = np.random.default_rng(seed)
    dates = pd.date_range("2020-01-01", periods=n_dates, freq=freq)
    names = [f"S{i:03d}" for i in range(n_instruments)]
    index = pd.MultiIndex.from_product([dates, names], names=["datetime", "instrument"])
    keep = rng.random(len(index)) >= holes
    index = index[keep]
    columns = pd.MultiIndex.from_tuples([("feature", f"F{j}") for j in range(n_features)] + [("label", "LABEL0")])
    values = rng.standard_normal((len(index), n_features + 1)).astype(dtype)
    return pd.DataFrame(values, index=index, columns=columns)


@pytest.fixture
def frame() -> pd.DataFrame:
    """A small panel with holes."""
    return make_frame()
