"""The rolling-window gather compared with a slow oracle, plain torch and pyqlib; its gradients."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qfast import _backend
from qfast.errors import DataError
from qfast.ops import WindowIndex, build_window_index, gather_windows, window_rows
from qfast.ops.window_gather import (
    FILLS,
    _gather_windows_backward_twin,
    _gather_windows_twin,
    _window_rows_twin,
)
from qfast.ops.window_index import _build_index_twin
from support.devices import ON_HOST
from support.window_gather import GATHER_CASES, GatherCase, market_codes

ISAS = _backend.native.available_isas() if _backend.native is not None else []
CUDA = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="torch detects no usable GPU"),
    ],
)
needs_native = pytest.mark.skipif(_backend.native is None, reason=f"qfast._C: {_backend.status()['cpu']['reason']}")
cases = pytest.mark.parametrize("case", GATHER_CASES, ids=lambda case: case.name)


@pytest.fixture(params=[*(f"cpu-{isa}" for isa in ISAS or ["torch"]), CUDA])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Each instruction set of this CPU in turn, and the GPU where there is one."""
    kind, _, isa = request.param.partition("-")
    if _backend.native is None or not isa:
        yield torch.device(kind)
        return
    before = _backend.native.isa()
    _backend.native.select_isa(isa)
    yield torch.device(kind)
    _backend.native.select_isa(before)


def inputs(case: GatherCase, device: torch.device, dtype: torch.dtype = torch.float32):
    index = case.index(device)
    rows = len(index.position)
    return case.panel(device, dtype, rows), index, case.last_row(device, rows)


def assert_same(result: torch.Tensor, expected: torch.Tensor) -> None:
    """Asserts bitwise equality, with NaN in the same places."""
    torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)


# ---------------------------------------------------------------- a slow oracle, from the definition
def oracle_rows(
    instruments: np.ndarray, dates: np.ndarray, live: np.ndarray, last_row: list[int], steps: int, fill: str, first: int
) -> list[list[int]]:
    """Windows computed cell by cell over (instrument, date rank), without the tables."""
    ranks = {int(d): k for k, d in enumerate(sorted(set(dates[live].tolist())))}
    at = {(int(i), ranks[int(d)]): r for r, (i, d) in enumerate(zip(instruments, dates, strict=True)) if live[r]}
    windows = []
    for r in last_row:
        if r < 0 or not live[r]:
            windows.append([-1] * steps)
            continue
        end = ranks[int(dates[r])]
        targets = range(end - steps + 1, end + 1)
        window = [at.get((int(instruments[r]), q), -1) if q >= first else -1 for q in targets]
        if fill != "none":
            for t in range(1, steps):
                window[t] = window[t] if window[t] >= 0 else window[t - 1]
        if fill == "ffill+bfill":
            for t in range(steps - 2, -1, -1):
                window[t] = window[t] if window[t] >= 0 else window[t + 1]
        windows.append(window)
    return windows


@cases
def test_rows_follow_the_definition(case: GatherCase, device: torch.device) -> None:
    codes = market_codes(case.instruments, case.dates, holes=case.holes)
    _, index, last = inputs(case, device)
    expected = oracle_rows(*codes, last.tolist(), case.steps, case.fill, case.first_position)
    result = window_rows(index, last, case.steps, fill=case.fill, first_position=case.first_position)
    assert result.dtype == torch.int64
    assert result.device.type == device.type
    assert torch.equal(result.cpu(), torch.tensor(expected, dtype=torch.int64).reshape(case.windows, case.steps))


@cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
def test_values_are_those_of_the_rows(case: GatherCase, dtype: torch.dtype, device: torch.device) -> None:
    panel, index, last = inputs(case, device, dtype)
    rows = _window_rows_twin(*index, last, case.steps, case.fill_code, case.first_position)
    expected = _gather_windows_twin(panel, rows, *case.column_range, case.transposed)
    result = gather_windows(panel, index, last, case.steps, **case.options())
    assert result.is_contiguous()
    assert_same(result, expected)
    for row_dtype in (torch.int32, torch.int64):
        explicit = gather_windows(panel, rows.to(row_dtype), columns=case.columns, layout=case.layout)
        assert_same(explicit, expected)


def test_nan_inside_a_row_is_copied(device: torch.device) -> None:
    panel = torch.arange(12.0, device=device).reshape(6, 2)
    panel[2, 1] = torch.nan
    index = build_window_index([0] * 6, range(6)).to(device)
    window = gather_windows(panel, index, torch.tensor([3], device=device), 3)[0]
    assert window[:, 0].tolist() == [2.0, 4.0, 6.0]
    assert torch.isnan(window[1, 1])
    assert not torch.isnan(window[[0, 2], 1]).any()


def test_panels_of_any_stride(device: torch.device) -> None:
    base = torch.randn(60, 24, device=device)
    index = build_window_index([0] * 30, range(30)).to(device)
    last = torch.arange(30, device=device).flip(0)
    for name, panel in {
        "every second row": base[::2],
        "column-major": base[:30, :8].T.contiguous().T,
        "every second column": base[:30, ::2],
        "one row repeated": base[:1].expand(30, 24),
        "one column": base[:30, 3:4],
        "shifted by one element": base.flatten()[1 : 1 + 30 * 21].reshape(30, 21),
    }.items():
        expected = gather_windows(panel.contiguous(), index, last, 5)
        assert torch.equal(gather_windows(panel, index, last, 5), expected), name


@pytest.mark.parametrize("fill", FILLS)
def test_empty_panel(fill: str, device: torch.device) -> None:
    index = build_window_index([], []).to(device)
    none = torch.full((3,), -1, device=device)
    result = gather_windows(torch.empty(0, 4, device=device), index, none, 5, fill=fill)
    assert result.shape == (3, 5, 4)
    assert torch.isnan(result).all()
    rows = torch.full((2, 5), -1, device=device)
    assert torch.isnan(gather_windows(torch.empty(0, 4, device=device), rows)).all()


def test_hand_made_tables_stay_inside_the_arrays(device: torch.device) -> None:
    """Contradictory tables select some rows of the panel or none. They never cause an out-of-bounds read."""
    bad = torch.tensor([9, 9, -7, 2**30, 5, 5], dtype=torch.int32, device=device)
    index = WindowIndex(bad, bad.flip(0).contiguous(), bad)
    panel = torch.randn(6, 3, device=device)
    for fill in FILLS:
        rows = window_rows(index, torch.arange(6, device=device), 4, fill=fill)
        assert ((rows >= -1) & (rows < 6)).all()
        gather_windows(panel, index, torch.arange(6, device=device), 4, fill=fill)


# ---------------------------------------------------------------- index
@pytest.mark.parametrize("dead", [0.0, 0.3, 1.0])
def test_index_tables_follow_their_definition(dead: float) -> None:
    instruments, dates, live = market_codes(9, 40, dead=dead, seed=3)
    index = build_window_index(instruments, dates, live)
    ranks = {d: k for k, d in enumerate(sorted(set(dates[live].tolist())))}
    for r in range(len(dates)):
        before = [s for s in range(r) if live[s] and instruments[s] == instruments[r]] if live[r] else []
        assert index.position[r] == (ranks[dates[r]] if live[r] else -1)
        assert index.back[r] == (r - before[-1] if before else 0)
        run = 0
        while (
            live[r]
            and r - run - 1 >= 0
            and live[r - run - 1]
            and instruments[r - run - 1] == instruments[r]
            and ranks[dates[r - run - 1]] == ranks[dates[r]] - run - 1
        ):
            run += 1
        assert index.run[r] == run
    for result, twin in zip(index, _build_index_twin(instruments, dates, live), strict=True):
        assert np.array_equal(result.numpy(), twin)


def test_the_index_accepts_any_integer_arrays_and_changes_none() -> None:
    instruments, dates, live = market_codes(4, 12)
    expected = build_window_index(instruments, dates, live)
    strided = np.stack([dates.astype(np.int64), dates.astype(np.int64)], axis=1)[:, 0]
    for given_instruments, given_dates in (
        (instruments.astype(np.uint8), strided),
        (instruments.tolist(), pd.Series(dates)),
    ):
        result = build_window_index(given_instruments, given_dates, live.tolist())
        assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


BAD_CODES = {
    "repeats": ([0, 0, 1], [3, 3, 0], r"row 1 \(instrument code 0, date code 3\) repeats the key of row 0"),
    "date-order": ([0, 0], [1, 0], r"row 1 .* sorts before row 0"),
    "instrument-order": ([1, 0], [0, 1], r"row 1 .* sorts before row 0"),
    "negative-date": ([0, 0], [-1, 2], r"date_codes\[0\] is -1: codes are not negative"),
    "negative-instrument": ([-3, 0], [1, 2], r"instrument_codes\[0\] is -3"),
    "lengths": ([0, 1], [1], r"instrument_codes has 2 rows but date_codes has 1"),
    "float": ([0.0], [0], r"instrument_codes: expected a 1-d integer array, got dtype float64"),
    "timestamps": ([0], [2**40], r"date_codes: codes must fit into int32, got 1099511627776"),
}


@pytest.mark.parametrize(("instruments", "dates", "match"), BAD_CODES.values(), ids=BAD_CODES.keys())
def test_index_refuses_bad_codes(instruments: list, dates: list, match: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=match):
        build_window_index(instruments, dates)
    monkeypatch.setattr(_backend, "native", None)  # plain torch has the same message
    with pytest.raises(DataError, match=match):
        build_window_index(instruments, dates)


@pytest.mark.parametrize("code", [-(2**32), -(2**31) - 1, -(2**63), 2**31, 2**32])
@pytest.mark.parametrize("name", ["instrument_codes", "date_codes"])
def test_index_does_not_wrap_codes(name: str, code: int) -> None:
    codes = {"instrument_codes": np.array([0, 1]), "date_codes": np.array([0, 1])}
    codes[name][0 if code < 0 else 1] = code
    with pytest.raises(DataError, match=rf"{name}: codes must fit into int32, got {code}\."):
        build_window_index(**codes)


def test_a_large_date_code_needs_no_large_table() -> None:
    """A table with an entry for each code would need 8 GiB."""
    dates = [7, 2**31 - 3, 2**31 - 1, 7, 2**31 - 1]
    index = build_window_index([0, 0, 0, 1, 1], dates, [True, False, True, True, True])
    assert index.position.tolist() == [0, -1, 1, 0, 1]
    assert index.back.tolist() == [0, 0, 2, 0, 1]
    assert index.run.tolist() == [0, 0, 0, 0, 1]


def test_sparse_and_dense_codes_have_the_same_tables() -> None:
    generator = np.random.default_rng(0)
    dates = np.sort(generator.choice(50, 30, replace=False)).astype(np.int32)
    live = generator.random(90) < 0.8
    codes = np.repeat(np.arange(3), 30), np.tile(dates, 3)
    dense = build_window_index(*codes, live)
    sparse = build_window_index(codes[0], codes[1].astype(np.int64) * 40_000_000, live)
    assert all(torch.equal(a, b) for a, b in zip(dense, sparse, strict=True))


@pytest.mark.parametrize("first", [-(2**40), -5, -1, 0, 1])
@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("fill", FILLS)
def test_dead_rows_have_no_window(first: int, steps: int, fill: str, device: torch.device) -> None:
    index = build_window_index([0] * 5, range(5), [True, False, True, True, False]).to(device)
    panel, last = torch.arange(1.0, 11.0, device=device).reshape(5, 2), torch.arange(-1, 5, device=device)
    rows = window_rows(index, last, steps, fill=fill, first_position=first)
    assert rows[[0, 2, 5]].unique().tolist() == [-1]
    result = gather_windows(panel, index, last, steps, fill=fill, first_position=first)
    torch.testing.assert_close(result, gather_windows(panel, rows), rtol=0, atol=0, equal_nan=True)


def test_the_kernels_check_sizes_that_overflow() -> None:
    """Only torch.ops reaches these: the public functions check sizes first."""
    index, no_rows = build_window_index([0, 0], [0, 1]), torch.empty(0, dtype=torch.int64)
    operators, grad, rows = torch.ops.qfast, torch.ones(1, 1, 2), torch.zeros(1, 1, dtype=torch.int64)
    for begin in (2**63 - 1, 2**63 - 2, 1, -1):
        with pytest.raises(ValueError, match=r"column_begin: expected 2 columns to fit in 2, got column_begin"):
            operators.gather_windows_backward(grad, rows, 3, 2, begin, False)
    if _backend.native is not None:
        with pytest.raises(ValueError, match=r"expected a panel of at least 0 rows and columns, got -3 and 2"):
            operators.gather_windows_backward(grad, rows, -3, 2, 0, False)
        for steps in (2**31, 2**61, 2**63 - 1):
            with pytest.raises(ValueError, match=r"step_len: expected 1 to 2\^31 - 1, got"):
                operators.window_rows(*index, no_rows, steps, 0, 0)
    assert operators.gather_windows_backward(grad, rows, 0, 2, 0, False).shape == (0, 2)


def test_index_refuses_a_mask_of_another_length() -> None:
    with pytest.raises(DataError, match=r"live: expected shape \(2,\), got \(3,\)"):
        build_window_index([0, 0], [0, 1], [True, True, False])


# ---------------------------------------------------------------- wrong arguments
def arguments(device: str = "cpu") -> tuple[torch.Tensor, WindowIndex, torch.Tensor]:
    return torch.randn(4, 3, device=device), build_window_index([0] * 4, range(4)).to(device), torch.tensor([3])


BAD_CALLS = {
    "dtype": (lambda p, i, r: gather_windows(p.half(), i, r, 2), r"panel: expected dtype float32 or float64, got"),
    "dims": (lambda p, i, r: gather_windows(p[None], i, r, 2), r"panel: expected shape \[R, D\], got \(1, 4, 3\)"),
    "columns": (lambda p, i, r: gather_windows(p, i, r, 2, columns=(2, 9)), r"columns: .* <= 3, got \(2, 9\)"),
    "columns-reversed": (lambda p, i, r: gather_windows(p, i, r, 2, columns=(2, 1)), r"columns: .*got \(2, 1\)"),
    "steps": (lambda p, i, r: gather_windows(p, i, r, 0), r"step_len: expected at least 1, got 0"),
    "rows-dtype": (lambda p, i, r: gather_windows(p, i, r.float(), 2), r"last_row: expected dtype int32 or int64"),
    "rows-dims": (lambda p, i, r: gather_windows(p, i, r[None], 2), r"last_row: expected shape \[B\], got \(1, 1\)"),
    "index-dims": (lambda p, i, r: gather_windows(p, r), r"index: expected shape \[B, T\], got \(1,\)"),
    "table-length": (
        lambda p, i, r: gather_windows(p[:3], i, r, 2),
        r"index.position: expected shape \(3,\), got \(4,\)",
    ),
    "table-dtype": (
        lambda p, i, r: window_rows(WindowIndex(i.position, i.back.long(), i.run), r, 2),
        r"index.back: expected dtype int32, got",
    ),
    "fill": (lambda p, i, r: gather_windows(p, i, r, 2, fill="bfill"), r"fill is 'bfill'; allowed: none, ffill"),
    "layout": (lambda p, i, r: gather_windows(p, i, r, 2, layout="TBD"), r"layout is 'TBD'; allowed: BTD, BDT"),
    "steps-long": (lambda p, i, r: gather_windows(p, i, r, 2**62), r"step_len: expected less than 2\*\*31, got 4611"),
    "steps-long-rows": (lambda p, i, r: window_rows(i, r, 2**62), r"step_len: expected less than 2\*\*31, got 4611"),
    "steps-float": (lambda p, i, r: gather_windows(p, i, r, 2.0), r"step_len: expected a whole number, got 2.0"),
    "panel-0d": (lambda p, i, r: gather_windows(p[0, 0], i, r, 2), r"panel: expected shape \[R, D\], got \(\)"),
    "panel-array": (lambda p, i, r: gather_windows(p.numpy(), i, r, 2), r"panel: expected a tensor, got ndarray"),
    "last-list": (
        lambda p, i, r: gather_windows(p, i, [1], 2),
        r"last_row: expected a tensor, got list. Remedy: torch",
    ),
    "last-list-rows": (lambda p, i, r: window_rows(i, [1], 2), r"window_rows: last_row: expected a tensor, got list"),
    "index-list": (lambda p, i, r: gather_windows(p, [[1]]), r"index: expected a tensor, got list"),
    "columns-three": (
        lambda p, i, r: gather_windows(p, i, r, 2, columns=(0, 1, 2)),
        r"columns: expected \(begin, end\)",
    ),
    "no-last-row": (lambda p, i, r: gather_windows(p, i), r"a WindowIndex requires last_row and step_len"),
    "step-len-too-many": (lambda p, i, r: gather_windows(p, r[None], step_len=2), "require a WindowIndex, .* a Tensor"),
}


@pytest.mark.parametrize(("call", "match"), BAD_CALLS.values(), ids=BAD_CALLS.keys())
def test_wrong_arguments_are_named(call, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        call(*arguments())


@pytest.mark.skipif(bool(ON_HOST), reason="CUDA kernels read such rows as NaN")
@pytest.mark.parametrize("value", [-2, 4, 2**40])
def test_rows_outside_the_panel_are_reported(value: int) -> None:
    panel, index, _ = arguments()
    last = torch.tensor([0, 3, value])
    with pytest.raises(IndexError, match=rf"last_row\[2\] is {value}, outside the panel's rows 0\.\.3"):
        gather_windows(panel, index, last, 2)
    with pytest.raises(IndexError, match=rf"last_row\[2\] is {value}"):
        window_rows(index, last, 2)
    with pytest.raises(IndexError, match=rf"index\[1, 0\] is {value}"):
        gather_windows(panel, torch.tensor([[0, 1], [value, 2]]))


def test_plain_torch_raises_the_same_errors_as_the_kernels() -> None:
    """Runs the same calls in a process without native code. Argument checks must not depend on the tier."""
    environment = {**os.environ, "QFAST_BACKEND": "torch"}
    names = "test_wrong_arguments_are_named or test_rows_outside or test_gradient"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", names]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]


# ---------------------------------------------------------------- gradients
@cases
def test_gradient_is_the_sum_over_windows(case: GatherCase, device: torch.device) -> None:
    """Compared with a float64 sum in plain torch by relative norm; exact where plain torch adds in the same order."""
    panel, index, last = inputs(case, device)
    panel = panel.detach().requires_grad_()
    out = gather_windows(panel, index, last, case.steps, **case.options())
    seed = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(device)
    (result,) = torch.autograd.grad(out, panel, seed)
    rows = _window_rows_twin(*index, last, case.steps, case.fill_code, case.first_position)
    size = (*panel.shape, case.column_range[0], case.transposed)
    exact = _gather_windows_backward_twin(seed.double(), rows, *size)
    assert result.dtype == panel.dtype
    assert torch.linalg.norm(result.double() - exact) <= 1e-6 * torch.linalg.norm(exact)


def test_gradient_of_an_expanded_gradient(device: torch.device) -> None:
    """The gradient of `sum()` has strides of zero."""
    panel, index, last = inputs(GATHER_CASES[0], device)
    panel = panel.detach().requires_grad_()
    gather_windows(panel, index, last, 4, fill="none").nansum().backward()
    rows = window_rows(index, last, 4, fill="none")
    counts = torch.bincount(rows[rows >= 0], minlength=len(panel)).float()
    assert torch.equal(panel.grad, counts[:, None].expand_as(panel))


@pytest.mark.parametrize("layout", ["BTD", "BDT"])
def test_gradcheck(layout: str, device: torch.device) -> None:
    _, index, _ = inputs(GATHER_CASES[0], device)
    panel = torch.randn(len(index.position), 3, dtype=torch.float64, device=device, requires_grad=True)
    last = torch.nonzero(index.position >= 0).flatten()[::9]
    options = {"columns": (1, 3), "layout": layout}
    torch.autograd.gradcheck(lambda p: gather_windows(p, index, last, 4, **options), (panel,))
    rows = window_rows(index, last, 4)
    torch.autograd.gradcheck(lambda p: gather_windows(p, rows, **options), (panel,))


def test_gradient_refuses_a_second_order() -> None:
    panel, index, last = arguments()
    panel.requires_grad_()
    out = gather_windows(panel, index, last, 2).square().sum()
    (first,) = torch.autograd.grad(out, panel, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"double backward is not supported. Remedy: .*panel\[window_rows"):
        first.sum().backward()


def forward_and_backward(index: WindowIndex, last: torch.Tensor, **options) -> list:
    rows = window_rows(index, last, 3)
    return [lambda p: gather_windows(p, index, last, 3, **options), lambda p: gather_windows(p, rows, **options)]


@pytest.mark.parametrize("layout", ["BTD", "BDT"])
def test_forward_mode_and_transforms_are_those_of_indexing(layout: str, device: torch.device) -> None:
    """The gather is linear: its directional derivative is the gather of the direction."""
    _, index, _ = inputs(GATHER_CASES[0], device)
    panel, along = torch.randn(2, len(index.position), 4, dtype=torch.float64, device=device)
    last = torch.nonzero(index.position >= 0).flatten()[::5]
    for gather in forward_and_backward(index, last, columns=(1, 3), layout=layout):
        expected = gather(along)
        assert expected.norm() > 1
        assert not expected.isnan().any()
        value, tangent = torch.func.jvp(gather, (panel,), (along,))
        assert torch.equal(value, gather(panel))
        assert torch.equal(tangent, expected)
        with torch.autograd.forward_ad.dual_level(), torch.no_grad():
            dual = gather(torch.autograd.forward_ad.make_dual(panel, along))
            assert torch.equal(torch.autograd.forward_ad.unpack_dual(dual).tangent, expected)
        leaf = panel.clone().requires_grad_()
        (backward,) = torch.autograd.grad(gather(leaf).square().sum(), leaf)
        result = torch.func.grad(lambda p, gather=gather: gather(p).square().sum())(panel)
        torch.testing.assert_close(result, backward, rtol=1e-12, atol=1e-12)
        assert torch.equal(torch.vmap(gather)(torch.stack([panel, along])), torch.stack([gather(panel), expected]))
    twice = torch.func.hessian(lambda p: gather_windows(p, index, last[:2], 3).pow(2).sum())(panel)
    counts = torch.bincount(window_rows(index, last[:2], 3).flatten(), minlength=len(panel)).double()
    assert torch.equal(torch.einsum("rdrd->rd", twice), 2 * counts[:, None].expand_as(panel))


def test_vmap_over_windows(device: torch.device) -> None:
    panel, index, _ = arguments()
    panel, index = panel.to(device), index.to(device)
    last = torch.tensor([[1, -1], [2, 0]], device=device)
    result = torch.vmap(lambda r: gather_windows(panel, index, r, 2))(last)
    expected = torch.stack([gather_windows(panel, index, r, 2) for r in last])
    torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)
    if device.type == "cpu":
        for row in (-2, len(panel)):
            with pytest.raises(IndexError, match=f"index {len(panel)} is out of bounds"):
                torch.vmap(lambda r: gather_windows(panel, r))(torch.tensor([[[0]], [[row]]]))


@needs_native
def test_bits_do_not_depend_on_threads() -> None:
    case = GatherCase("threads", instruments=40, dates=200, columns_all=21, windows=900, steps=20)
    panel, index, last = inputs(case, torch.device("cpu"))
    rows = window_rows(index, last, case.steps)
    grad = torch.randn(case.windows, case.steps, 21)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(
                (
                    gather_windows(panel, index, last, case.steps),
                    torch.ops.qfast.gather_windows_backward(grad, rows, *panel.shape, 0, False),
                )
            )
    finally:
        torch.set_num_threads(before)
    for out, back in results[1:]:
        assert_same(out, results[0][0])
        assert torch.equal(back, results[0][1])


# ---------------------------------------------------------------- checks by torch
@pytest.mark.parametrize("layout", [False, True], ids=["BTD", "BDT"])
def test_opcheck(layout: bool, device: torch.device) -> None:
    """Only windows without missing rows: opcheck compares outputs without letting NaN equal NaN."""
    index = build_window_index(*market_codes(4, 20)).to(device)
    last = torch.nonzero(index.position >= 0).flatten()[::5]
    panel = torch.randn(len(index.position), 3, device=device, requires_grad=True)
    rows = window_rows(index, last, 4)
    ops = torch.ops.qfast
    torch.library.opcheck(ops.window_rows, (*index, last, 4, 2, 0))
    torch.library.opcheck(ops.gather_windows, (panel, rows, 1, 3, layout))
    torch.library.opcheck(ops.gather_rolling_windows, (panel, *index, last, 4, 2, 0, 0, 3, layout))
    shape = (len(last), 2, 4) if layout else (len(last), 4, 2)
    grad = torch.randn(shape, device=device)
    torch.library.opcheck(ops.gather_windows_backward, (grad, rows, len(panel), 3, 1, layout))


def test_compiles_without_a_graph_break(device: torch.device) -> None:
    panel, index, last = inputs(GATHER_CASES[0], device)

    def scaled(panel: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        return gather_windows(panel, index, last, 4, columns=(0, 2)) * 2

    compiled = torch.compile(scaled, fullgraph=True, backend="aot_eager")
    assert_same(compiled(panel, last), scaled(panel, last))
    assert_same(compiled(panel, last[:7]), scaled(panel, last[:7]))


# ---------------------------------------------------------------- sizes
@pytest.mark.slow
def test_more_than_2_31_elements(device: torch.device) -> None:
    """Offsets beyond 2^31 elements: a panel of zero pages, mapped but never touched, except for a few rows."""
    rows, columns = 40_000_000, 60  # 2.4e9 elements, 9.6 GB of address space
    panel = torch.zeros(rows, columns, device=device) if device.type == "cuda" else lazy_zeros(rows, columns)
    picked = torch.tensor([0, rows // 2, rows - 3, rows - 2, rows - 1])
    panel[picked] = torch.arange(5 * columns, dtype=torch.float32, device=device).reshape(5, columns)
    result = gather_windows(panel, torch.tensor([[rows - 3, rows - 2, rows - 1], [0, rows // 2, -1]], device=device))
    expected = torch.arange(5 * columns, dtype=torch.float32, device=device).reshape(5, columns)
    assert torch.equal(result[0], expected[2:])
    assert torch.equal(result[1, :2], expected[:2])
    assert torch.isnan(result[1, 2]).all()


@pytest.mark.slow
def test_a_row_stride_beyond_2_31_elements(device: torch.device) -> None:
    """The row stride of this panel is 2^31 + 64 elements."""
    stride = 2**31 + 64
    flat = torch.zeros(stride + 8, device=device) if device.type == "cuda" else lazy_zeros(1, stride + 8)[0]
    flat[:8], flat[stride : stride + 8] = 1.0, 2.0
    panel = flat.as_strided((2, 8), (stride, 1))
    index = build_window_index([0, 0], [0, 1]).to(device)
    result = gather_windows(panel, index, torch.tensor([1], device=device), 2)
    assert result[0, :, 3].tolist() == [1.0, 2.0]


def lazy_zeros(rows: int, columns: int) -> torch.Tensor:
    """Zeros in an anonymous map, whose pages need memory only after a write."""
    return torch.from_numpy(np.zeros((rows, columns), dtype=np.float32))


# ---------------------------------------------------------------- properties
@settings(max_examples=60, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**16), fill=st.sampled_from(list(FILLS)))
def test_properties(data: st.DataObject, seed: int, fill: str) -> None:
    instruments = data.draw(st.integers(1, 5))
    dates = data.draw(st.integers(1, 25))
    holes = data.draw(st.sampled_from([0.0, 0.2, 0.7]))
    codes = market_codes(instruments, dates, holes=holes, dead=data.draw(st.sampled_from([0.0, 0.4])), seed=seed)
    rows, steps = len(codes[0]), data.draw(st.integers(1, 30))
    first, width = data.draw(st.integers(0, dates)), data.draw(st.integers(1, 20))
    index = build_window_index(*codes)
    last = data.draw(st.lists(st.integers(-1, rows - 1), max_size=12))
    expected = oracle_rows(*codes, last, steps, fill, first)
    panel = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    wanted = torch.tensor(last, dtype=torch.int64)
    result = gather_windows(panel, index, wanted, steps, fill=fill, first_position=first)
    padded = torch.cat([panel, torch.full((1, width), torch.nan)])
    assert_same(result, padded[torch.tensor(expected, dtype=torch.int64).reshape(len(last), steps)])
    transposed = gather_windows(panel, index, wanted, steps, fill=fill, first_position=first, layout="BDT")
    assert_same(transposed, result.transpose(1, 2).contiguous())


# ---------------------------------------------------------------- Qlib's sampler
@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("steps", [1, 5, 20])
def test_windows_equal_qlib(fill: str, steps: int) -> None:
    qlib_dataset_module = pytest.importorskip("qlib.data.dataset", reason="pyqlib (extra qlib) is not installed")
    instruments, dates, _ = market_codes(12, 60, holes=0.2, seed=7)
    days = pd.date_range("2021-03-01", periods=60)
    keys = pd.MultiIndex.from_arrays(
        [days[dates], [f"S{i:02d}" for i in instruments]], names=["datetime", "instrument"]
    )
    values = np.random.default_rng(8).standard_normal((len(keys), 4)).astype(np.float32)
    frame = pd.DataFrame(values, index=keys, columns=list("abcd"))
    start, end = days[25], days[55]
    sampler = qlib_dataset_module.TSDataSampler(frame.sort_index(), start, end, steps, fillna_type=fill)
    index = build_window_index(instruments, dates)  # codes are (instrument, date) ascending, as the sampler sorts
    last = torch.from_numpy(np.flatnonzero((days[dates] >= start) & (days[dates] <= end)))
    assert len(sampler) == len(last)
    result = gather_windows(torch.from_numpy(values), index, last, steps, fill=fill)
    expected = np.stack([sampler[i] for i in range(len(sampler))])
    assert_same(result, torch.from_numpy(expected))
