"""Shared fixtures: a small frame, each instruction set, and global generators restored after each test."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd
import pytest
import torch

from qfast import _backend

# The helpers assert too; without this line their failures would not show the values.
pytest.register_assert_rewrite("support")

from qfast.models import LSTM, ts  # noqa: E402
from support.fits import dataset_for, frame_for  # noqa: E402
from support.frames import make_frame  # noqa: E402

# The tensors here are tiny: a second thread only waits, and slows down other test runs on the machine.
# Tests of threads set the number themselves.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _restore_generators() -> Iterator[None]:
    """Restores the global generators, so seeds do not carry over to the next test."""
    numpy_state, torch_state = np.random.get_state(), torch.get_rng_state()
    yield
    np.random.set_state(numpy_state)
    torch.set_rng_state(torch_state)


@pytest.fixture(scope="module")
def flat_data():
    """A small dataset for flat models."""
    return dataset_for(LSTM, frame=frame_for(LSTM))


@pytest.fixture(scope="module")
def windows_data():
    """A small dataset for time-series models."""
    return dataset_for(ts.LSTM, frame=frame_for(ts.LSTM))


@pytest.fixture(params=_backend.native.available_isas() if _backend.native is not None else ["plain torch"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set of the native library in turn; plain torch if there is no native library."""
    if _backend.native is None:
        yield request.param
        return
    before = _backend.native.isa()
    _backend.native.select_isa(request.param)
    yield request.param
    _backend.native.select_isa(before)


@pytest.fixture
def frame() -> pd.DataFrame:
    """A small panel with holes."""
    return make_frame()


@pytest.fixture(scope="module")
def undrawn_plots() -> Iterator[None]:
    """Reports have no plots, which are two thirds of the time of a tiny run. Other tests draw them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qfast.workflow.plots.png", lambda figure: b"not drawn")
        yield
