"""Gather rolling windows from a panel whose rows are sorted by instrument and date.

This is the smallest operator with gradients and a good template for a new one. The kernels are in csrc/window_gather:
window_gather_kernels.h, called by window_gather.cpp, and window_gather.cu. The index is built by window_index.py.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from qfast.errors import DataError, suggest
from qfast.ops import transforms
from qfast.ops._common import (
    FLOATING,
    check_equal,
    define,
    explain_memory,
    refuse_double_backward,
    require,
    require_tensor,
    skip_autograd,
)
from qfast.ops.window_index import WindowIndex, build_window_index

FILLS = {"none": 0, "ffill": 1, "ffill+bfill": 2}
LAYOUTS = {"BTD": False, "BDT": True}
FEWER_WINDOWS = "fewer windows per call, or a smaller step_len"
_Code = TypeVar("_Code", int, bool)

__all__ = ["FILLS", "LAYOUTS", "gather_windows", "self_test", "window_rows"]


@explain_memory("gather_windows", FEWER_WINDOWS)
def gather_windows(
    panel: Tensor,
    index: Tensor | WindowIndex,
    last_row: Tensor | None = None,
    step_len: int | None = None,
    *,
    fill: str = "ffill+bfill",
    first_position: int = 0,
    columns: tuple[int, int] | None = None,
    layout: str = "BTD",
) -> Tensor:
    """Copy rolling windows from a panel: out[b, t, :] = panel[row(b, t), columns].

    Parameters
    ----------
    panel : Tensor [R, D], float32 or float64
        The row stride is arbitrary. If columns are not adjacent in memory (stride(1) != 1), the panel is copied first.
    index : Tensor [B, T], int32 or int64, or WindowIndex
        Either row numbers, with -1 for "no row", or the tables of `build_window_index`. With the tables, row(b, t) is
        the result of `window_rows`.
    last_row : Tensor [B], int32 or int64
        With a WindowIndex: the last row of each window, in any order. -1 and dead rows give windows of NaN.
    step_len : int
        With a WindowIndex: T, the number of steps.
    fill : "none", "ffill" or "ffill+bfill"
        With a WindowIndex: the value of a step without a row. See `window_rows`.
    first_position : int
        With a WindowIndex: rows at earlier positions are ignored.
    columns : (begin, end), optional
        Half-open range of columns. The default is all columns.
    layout : "BTD" or "BDT"
        Order of the axes of the result.

    Returns
    -------
    Tensor [B, T, D'] or [B, D', T]
        Contiguous, with the dtype and device of the panel. NaN where there is no row. Differentiable in `panel`; the
        order of summation over the windows that share a row is fixed on every device.

    Raises
    ------
    DataError
        Wrong type, dtype, shape, device, step_len, fill, layout or column range.
    IndexError
        On the CPU, a row number below -1 or beyond the panel. On CUDA such a row reads as NaN, because checking it
        would synchronize the stream.
    torch.OutOfMemoryError
        The result does not fit into memory.
    NotImplementedError
        Double backward. Use torch.func.grad twice, or panel[window_rows(...)].

    Notes
    -----
    torch.func transforms and forward mode compute with torch's operations, which support every derivative.

    Source
    ------
    The values equal those of Qlib's TSDataSampler with the same `fillna_type`.

    Examples
    --------
    >>> panel = torch.arange(8.0).reshape(4, 2)
    >>> index = build_window_index([0, 0, 0, 1], [0, 1, 2, 2])
    >>> gather_windows(panel, index, torch.tensor([2, 3]), 2)[..., 0].tolist()
    [[2.0, 4.0], [6.0, 6.0]]
    """
    require_tensor("gather_windows", "panel", panel)
    require(panel.dim() == 2, "gather_windows", f"panel: expected shape [R, D], got {tuple(panel.shape)}.")
    if columns is not None and len(columns) != 2:
        raise DataError(f"gather_windows: columns: expected (begin, end), got {columns!r}.")
    begin, end = (0, panel.shape[1]) if columns is None else columns
    transposed = _lookup("layout", layout, LAYOUTS)
    if panel.stride(1) != 1 and panel.shape[1] > 1:
        panel = panel.contiguous()
    if isinstance(index, WindowIndex):
        if last_row is None or step_len is None:
            raise DataError("gather_windows: a WindowIndex requires last_row and step_len.")
        if transforms.active():
            _check_tables("gather_windows", index, panel.shape[0], panel.device, step_len)
            rows = window_rows(index, last_row, step_len, fill=fill, first_position=first_position)
            _check_panel("gather_windows", panel, begin, end)
            return _index_panel(panel, rows, begin, end, transposed)
        require_tensor("gather_windows", "last_row", last_row)
        steps, fill_code = _checked_step_len(step_len), _lookup("fill", fill, FILLS)
        with skip_autograd():
            return torch.ops.qfast.gather_rolling_windows(
                panel, *index, last_row, steps, fill_code, first_position, begin, end, transposed
            )
    if last_row is not None or step_len is not None:
        raise DataError(
            f"gather_windows: last_row and step_len require a WindowIndex, but index is a {type(index).__name__}."
        )
    require_tensor("gather_windows", "index", index)
    if transforms.active():
        return _gather_windows_twin(panel, index, begin, end, transposed)
    with skip_autograd():
        return torch.ops.qfast.gather_windows(panel, index, begin, end, transposed)


@explain_memory("window_rows", FEWER_WINDOWS)
def window_rows(
    index: WindowIndex,
    last_row: Tensor,
    step_len: int,
    *,
    fill: str = "ffill+bfill",
    first_position: int = 0,
) -> Tensor:
    """Return the panel row of every window step, -1 where there is none.

    The window that ends at row r has one step for each position position[r] - T + 1, ..., position[r]. If the
    instrument has a live row at that position, and the position is at least `first_position`, the step is that row.
    Every other step is a hole, which `fill` determines:

    - "none": -1.
    - "ffill": the last row before the hole inside the window, or -1 if there is none.
    - "ffill+bfill": the same, but a hole before the first row of the window is that first row.

    Parameters
    ----------
    index : WindowIndex
        Tables [R] of `build_window_index`.
    last_row : Tensor [B], int32 or int64
        The last row of each window. -1 and dead rows give -1 at every step.
    step_len : int
        T, at least 1.
    fill : "none", "ffill" or "ffill+bfill"
    first_position : int
        Rows at earlier positions are ignored.

    Returns
    -------
    Tensor [B, T] int64
        `gather_windows` accepts it as `index`.

    Raises
    ------
    DataError
        Wrong type, dtype, shape, device, step_len or fill.
    IndexError
        On the CPU, a last row below -1 or beyond the panel. On CUDA such a window has -1 at every step.
    torch.OutOfMemoryError
        Insufficient memory, on any device. The message states the size.

    Source
    ------
    Qlib's TSDataSampler (`_get_indices`).

    Examples
    --------
    >>> index = build_window_index([0, 0, 1], [0, 2, 1])
    >>> window_rows(index, torch.tensor([1]), 3, fill="ffill").tolist()
    [[0, 0, 1]]
    """
    require_tensor("window_rows", "last_row", last_row)
    fill_code = _lookup("fill", fill, FILLS)
    steps = _checked_step_len(step_len)
    return torch.ops.qfast.window_rows(*index, last_row, steps, fill_code, first_position)


# ---------------------------------------------------------------- argument checks
def _lookup(name: str, value: str, codes: dict[str, _Code]) -> _Code:
    """Return the code of an option."""
    if not isinstance(value, str) or value not in codes:
        raise DataError(f"{name} is {value!r}; allowed: {', '.join(codes)}." + suggest(value, codes))
    return codes[value]


def _checked_step_len(step_len: int) -> int:
    """Check step_len. Positions are 32-bit numbers, so no window is longer than 2**31 - 1."""
    if isinstance(step_len, bool) or not hasattr(step_len, "__index__"):
        raise DataError(f"step_len: expected a whole number, got {step_len!r}.")
    if step_len < 1:
        raise DataError(f"step_len: expected at least 1, got {step_len}.")
    if step_len >= 2**31:
        raise DataError(f"step_len: expected less than 2**31, got {step_len}.")
    return step_len


def _check_panel(operator: str, panel: Tensor, begin: int, end: int) -> None:
    require(panel.dtype in FLOATING, operator, f"panel: expected dtype float32 or float64, got {panel.dtype}.")
    require(panel.dim() == 2, operator, f"panel: expected shape [R, D], got {tuple(panel.shape)}.")
    inside = 0 <= begin <= end <= panel.shape[1]
    require(inside, operator, f"columns: expected 0 <= begin <= end <= {panel.shape[1]}, got ({begin}, {end}).")


def _check_rows(operator: str, name: str, rows: Tensor, dims: int, device: torch.device) -> None:
    is_integer = rows.dtype in (torch.int32, torch.int64)
    require(is_integer, operator, f"{name}: expected dtype int32 or int64, got {rows.dtype}.")
    shape = "[B]" if dims == 1 else "[B, T]"
    require(rows.dim() == dims, operator, f"{name}: expected shape {shape}, got {tuple(rows.shape)}.")
    require(rows.device == device, operator, f"{name}: expected device {device}, got {rows.device}.")


def _check_tables(operator: str, tables: tuple[Tensor, ...], n_rows: int, device: torch.device, step_len: int) -> None:
    for name, table in zip(WindowIndex._fields, tables, strict=True):
        require(table.dtype == torch.int32, operator, f"index.{name}: expected dtype int32, got {table.dtype}.")
        fits = tuple(table.shape) == (n_rows,)
        require(fits, operator, f"index.{name}: expected shape ({n_rows},), got {tuple(table.shape)}.")
        require(table.device == device, operator, f"index.{name}: expected device {device}, got {table.device}.")
    require(step_len >= 1, operator, f"step_len: expected at least 1, got {step_len}.")


def _check_bounds(operator: str, name: str, rows: Tensor, n_rows: int) -> None:
    """Raise an IndexError for the first row number outside [-1, R). On CUDA the check would synchronize the stream."""
    if rows.device.type != "cpu" or not rows.numel() or torch._C._functorch.is_batchedtensor(rows):
        return  # values are not available inside vmap, where the indexing itself raises an error
    wrong = (rows < -1) | (rows >= n_rows)
    if wrong.any():
        at = torch.nonzero(wrong)[0].tolist()
        raise IndexError(
            f"{operator}: {name}{at} is {int(rows[tuple(at)])}, outside the panel's rows 0..{n_rows - 1} "
            "(-1 means no row)."
        )


# ---------------------------------------------------------------- plain-torch twins
def _window_rows_twin(
    position: Tensor,
    back: Tensor,
    run: Tensor,
    last_row: Tensor,
    step_len: int,
    fill: int,
    first_position: int,
) -> Tensor:
    operator, n_rows = "window_rows", position.shape[0]
    _check_tables(operator, (position, back, run), n_rows, position.device, step_len)
    _check_rows(operator, "last_row", last_row, 1, position.device)
    _check_bounds(operator, "last_row", last_row, n_rows)
    out = torch.full((len(last_row), step_len), -1, dtype=torch.int64, device=last_row.device)
    if n_rows == 0:
        return out
    row = last_row.long()
    row = torch.where((row >= 0) & (row < n_rows), row, -1)
    end = torch.where(row >= 0, position[row.clamp(min=0)], -1).long()
    first = torch.clamp(end - step_len + 1, min=first_position)  # rows at earlier positions are ignored
    earliest = torch.full_like(row, -1)  # earliest row of the window so far
    for t in range(step_len - 1, -1, -1):
        target = end - (step_len - 1 - t)
        row_position = torch.where(row >= 0, position[row.clamp(min=0)], -1).long()  # at or before the target
        exists = (row >= 0) & (row_position >= first) & (row_position >= 0)
        hit = exists & (row_position == target)
        earliest = torch.where(exists, row, earliest)
        out[:, t] = torch.where(hit, row, -1) if fill == FILLS["none"] else torch.where(exists, row, -1)
        if fill == FILLS["ffill+bfill"]:
            out[:, t] = torch.where(exists, row, earliest)
        step = back[row.clamp(min=0)].long()
        row = torch.where((row_position == target) & (row >= 0), torch.where(step > 0, row - step, -1), row)
    return out


def _gather_windows_twin(panel: Tensor, rows: Tensor, begin: int, end: int, transposed: bool) -> Tensor:
    _check_panel("gather_windows", panel, begin, end)
    _check_rows("gather_windows", "index", rows, 2, panel.device)
    _check_bounds("gather_windows", "index", rows, panel.shape[0])
    return _index_panel(panel, rows, begin, end, transposed)


def _index_panel(panel: Tensor, rows: Tensor, begin: int, end: int, transposed: bool) -> Tensor:
    n_rows, rows = panel.shape[0], rows.long()
    if n_rows == 0:
        out = panel.new_full((*rows.shape, end - begin), torch.nan)
    else:
        missing = rows == -1
        if rows.device.type == "cpu":
            rows = torch.where(rows < -1, n_rows, rows)  # indexing then raises an error, as for rows beyond the panel
        else:
            missing = (rows < 0) | (rows >= n_rows)
        out = panel[:, begin:end][rows.masked_fill(missing, 0)]
        out = out.masked_fill(missing.unsqueeze(-1), torch.nan)
    return out.transpose(1, 2).contiguous() if transposed else out


def _gather_rolling_windows_twin(
    panel: Tensor,
    position: Tensor,
    back: Tensor,
    run: Tensor,
    last_row: Tensor,
    step_len: int,
    fill: int,
    first_position: int,
    begin: int,
    end: int,
    transposed: bool,
) -> Tensor:
    _check_panel("gather_rolling_windows", panel, begin, end)
    _check_tables("gather_rolling_windows", (position, back, run), panel.shape[0], panel.device, step_len)
    rows = torch.ops.qfast.window_rows(position, back, run, last_row, step_len, fill, first_position)
    return torch.ops.qfast.gather_windows(panel, rows, begin, end, transposed)


def _gather_windows_backward_twin(
    grad: Tensor, rows: Tensor, n_rows: int, n_columns: int, begin: int, transposed: bool
) -> Tensor:
    steps = grad.transpose(1, 2) if transposed else grad
    fits = 0 <= begin <= n_columns - steps.shape[2]
    require(
        fits,
        "gather_windows_backward",
        f"column_begin: expected {steps.shape[2]} columns to fit in {n_columns}, got column_begin {begin}.",
    )
    out = grad.new_zeros((n_rows, n_columns))
    part = out[:, begin : begin + steps.shape[2]]
    flat = rows.reshape(-1).long()
    exists = (flat >= 0) & (flat < n_rows)
    flat, values = flat[exists], steps.reshape(len(flat), steps.shape[2])[exists]
    if grad.device.type == "cpu":
        part.index_add_(0, flat, values)
    else:
        part.index_put_((flat,), values, accumulate=True)  # sorts on CUDA, so the order of summation is fixed
    return out


# ---------------------------------------------------------------- schemas and fakes
_TABLES = "Tensor position, Tensor back, Tensor run, Tensor last_row, int step_len, int fill, int first_position"
_COLUMNS = "int column_begin, int column_end, bool transposed"
define("window_rows", f"({_TABLES}) -> Tensor", _window_rows_twin)
define("gather_windows", f"(Tensor panel, Tensor rows, {_COLUMNS}) -> Tensor", _gather_windows_twin)
define("gather_rolling_windows", f"(Tensor panel, {_TABLES}, {_COLUMNS}) -> Tensor", _gather_rolling_windows_twin)
define(
    "gather_windows_backward",
    "(Tensor grad, Tensor rows, int n_rows, int n_columns, int column_begin, bool transposed) -> Tensor",
    _gather_windows_backward_twin,
)


@torch.library.register_fake("qfast::window_rows")
def _(position, back, run, last_row, step_len, fill, first_position):  # type: ignore[no-untyped-def]
    return last_row.new_empty((last_row.shape[0], step_len), dtype=torch.int64)


@torch.library.register_fake("qfast::gather_windows")
def _(panel, rows, begin, end, transposed):  # type: ignore[no-untyped-def]
    _check_panel("gather_windows", panel, begin, end)
    _check_rows("gather_windows", "index", rows, 2, panel.device)
    b, t = rows.shape
    return panel.new_empty((b, end - begin, t) if transposed else (b, t, end - begin))


@torch.library.register_fake("qfast::gather_rolling_windows")
def _(panel, position, back, run, last_row, step_len, fill, first, begin, end, transposed):  # type: ignore[no-untyped-def]
    _check_panel("gather_rolling_windows", panel, begin, end)
    _check_rows("gather_rolling_windows", "last_row", last_row, 1, panel.device)
    b = last_row.shape[0]
    return panel.new_empty((b, end - begin, step_len) if transposed else (b, step_len, end - begin))


@torch.library.register_fake("qfast::gather_windows_backward")
def _(grad, rows, n_rows, n_columns, begin, transposed):  # type: ignore[no-untyped-def]
    return grad.new_empty((n_rows, n_columns))


# ---------------------------------------------------------------- gradients
def _save_rows(ctx, inputs, output):  # type: ignore[no-untyped-def]
    panel, rows, ctx.begin, _, ctx.transposed = inputs
    ctx.shape = panel.shape
    ctx.save_for_backward(rows)


@explain_memory("gather_windows", FEWER_WINDOWS)
def _gather_gradients(ctx, grad):  # type: ignore[no-untyped-def]
    (rows,) = ctx.saved_tensors
    grad_panel = torch.ops.qfast.gather_windows_backward(grad, rows, *ctx.shape, ctx.begin, ctx.transposed)
    return grad_panel, None, None, None, None


def _save_tables(ctx, inputs, output):  # type: ignore[no-untyped-def]
    panel, *tables, ctx.step_len, ctx.fill, ctx.first, ctx.begin, _, ctx.transposed = inputs
    ctx.shape = panel.shape
    ctx.save_for_backward(*tables)


@explain_memory("gather_windows", FEWER_WINDOWS)
def _rolling_gradients(ctx, grad):  # type: ignore[no-untyped-def]
    rows = torch.ops.qfast.window_rows(*ctx.saved_tensors, ctx.step_len, ctx.fill, ctx.first)
    grad_panel = torch.ops.qfast.gather_windows_backward(grad, rows, *ctx.shape, ctx.begin, ctx.transposed)
    return (grad_panel, *(None,) * 10)


torch.library.register_autograd("qfast::gather_windows", _gather_gradients, setup_context=_save_rows)
torch.library.register_autograd("qfast::gather_rolling_windows", _rolling_gradients, setup_context=_save_tables)
refuse_double_backward(
    "gather_windows",
    remedy="torch's indexing, panel[window_rows(...)], or torch.func.grad within torch.func.grad, which gather_windows "
    "supports",
)


# ---------------------------------------------------------------- self-test
def self_test(device: torch.device) -> None:
    """Compare the operators on `device` with plain torch, for every fill and layout, forward and backward.

    Raises
    ------
    ArithmeticError
        The results differ.
    """
    index = build_window_index([0] * 9 + [1] * 7 + [2], [*range(9), 0, 1, 4, 5, 6, 7, 8, 5]).to(device)
    panel = torch.arange(17 * 5, dtype=torch.float32, device=device).reshape(17, 5)
    last = torch.tensor([0, 8, 11, 15, 16, -1, 12, 8], device=device)
    for fill, code in FILLS.items():
        rows = _window_rows_twin(*index, last, 4, code, 1)
        check_equal(f"window_rows, {fill}", window_rows(index, last, 4, fill=fill, first_position=1), rows)
        for layout, transposed in LAYOUTS.items():
            values = gather_windows(panel, index, last, 4, fill=fill, first_position=1, columns=(1, 4), layout=layout)
            expected = _gather_windows_twin(panel, rows, 1, 4, transposed)
            check_equal(f"gather_windows, {fill}, {layout}", values.nan_to_num(-1), expected.nan_to_num(-1))
            arguments = torch.ones_like(expected), rows, 17, 5, 1, transposed
            gradient = torch.ops.qfast.gather_windows_backward(*arguments)
            check_equal(f"gradient, {fill}, {layout}", gradient, _gather_windows_backward_twin(*arguments))
