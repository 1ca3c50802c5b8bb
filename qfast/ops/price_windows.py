"""Windows of prices divided by the current price: the features of Alpha360, computed when they are read.

The kernel is csrc/price_windows/price_windows_kernels.h, called by price_windows.cpp. There is no CUDA kernel: on a GPU
the plain-torch twin computes the windows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qfast.ops._common import check_equal, define, explain_memory, require, require_tensor

__all__ = ["neutral_stage", "price_windows", "self_test"]

SHIFT, SCALE, LIMIT, FILL = range(4)  # parts of a stage


@explain_memory("price_windows")
def price_windows(
    series: Tensor,
    ends: Tensor,
    divisors: Tensor,
    divisor_of: Tensor,
    rows: Tensor,
    stages: Tensor,
    window: int,
) -> Tensor:
    """The last T values of each of F series at some rows, divided by a value of the row and normalized.

    out[b, f * T + k] = stages(series[f, ends[r] - T + 1 + k] / divisors[divisor_of[f], r]) with r = rows[b]. Each stage
    computes (x - shift) / scale, limits the result to [-limit, limit] and replaces NaN by `fill`.

    Parameters
    ----------
    series : Tensor [F, P], float32
        Series of all instruments, one after the other, with T - 1 NaN before each.
    ends : Tensor [R], int32 or int64
        Place of each row in the series, from T - 1 to P - 1.
    divisors : Tensor [K, R], float32
    divisor_of : Tensor [F], int64
        The divisor of each field, from 0 to K - 1.
    rows : Tensor [B], int64
        -1 is a row of NaN, to which no stage is applied.
    stages : Tensor [M, 4, F * T], float32
        shift, scale, limit and fill of each column, see `neutral_stage`.
    window : int
        T.

    Returns
    -------
    Tensor [B, F * T], float32
        On the device of `series`. It has no gradient, because prices and processors are constants.

    Raises
    ------
    DataError
        An argument has the wrong type, dtype, shape or device.
    IndexError
        On the CPU, a row or a place is out of range.
    torch.OutOfMemoryError
        Insufficient memory, on any device. The message states the size.

    Notes
    -----
    The result equals NumPy's division, subtraction, division, clip and where in float32 to the bit.

    Source
    ------
    Alpha360DL in qlib/contrib/data/loader.py of pyqlib 0.9.7.

    Examples
    --------
    >>> series = torch.tensor([[torch.nan, 1.0, 2.0, 4.0]])
    >>> rows = torch.tensor([2, 0])
    >>> price_windows(series, torch.tensor([1, 2, 3]), series[:, 1:], torch.tensor([0]), rows, neutral_stage(2), 2)
    tensor([[0.5000, 1.0000],
            [   nan, 1.0000]])
    """
    tensors = {"series": series, "ends": ends, "divisors": divisors, "divisor_of": divisor_of, "rows": rows}
    for name, tensor in {**tensors, "stages": stages}.items():
        require_tensor("price_windows", name, tensor)
    return torch.ops.qfast.price_windows(series, ends, divisors, divisor_of, rows, stages, window)


def neutral_stage(columns: int) -> Tensor:
    """One stage [1, 4, columns] that changes nothing.

    >>> neutral_stage(1)[0, :, 0]
    tensor([0., 1., inf, nan])
    """
    stage = torch.zeros(1, 4, columns)
    stage[0, SCALE], stage[0, LIMIT], stage[0, FILL] = 1.0, torch.inf, torch.nan
    return stage


# ---------------------------------------------------------------- plain-torch twin
def _price_windows_twin(
    series: Tensor, ends: Tensor, divisors: Tensor, divisor_of: Tensor, rows: Tensor, stages: Tensor, window: int
) -> Tensor:
    _check(series, ends, divisors, divisor_of, rows, stages, window)
    columns = series.shape[0] * window
    _check_range("rows", rows, -1, len(ends) - 1)
    if not len(ends):
        return series.new_full((len(rows), columns), torch.nan)
    exists = rows >= 0
    numbers = rows.clamp(min=0)
    places = ends[numbers].long()
    _check_range("ends", places[exists], window - 1, series.shape[1] - 1)
    places = torch.where(exists, places, window - 1)
    steps = places.unsqueeze(1) + torch.arange(1 - window, 1, device=places.device)
    out = series[:, steps] / divisors[divisor_of][:, numbers].unsqueeze(2)  # [F, B, T]
    out = out.transpose(0, 1).reshape(len(rows), columns)
    for shift, scale, limit, fill in stages:
        out = torch.minimum(torch.maximum((out - shift) / scale, -limit), limit)
        out = torch.where(out.isnan(), fill, out)
    return torch.where(exists.unsqueeze(1), out, torch.nan)


def _check(
    series: Tensor, ends: Tensor, divisors: Tensor, divisor_of: Tensor, rows: Tensor, stages: Tensor, window: int
) -> None:
    operator = "price_windows"
    for name, tensor, dims, shape in (
        ("series", series, 2, "[F, P]"),
        ("divisors", divisors, 2, "[K, R]"),
        ("stages", stages, 3, "[M, 4, F * T]"),
    ):
        require(tensor.dim() == dims, operator, f"{name}: expected shape {shape}, got {tuple(tensor.shape)}.")
        is_float = tensor.dtype == torch.float32
        require(is_float, operator, f"{name}: expected dtype float32, got {tensor.dtype}.")
    for name, tensor, dtypes in (
        ("ends", ends, (torch.int32, torch.int64)),
        ("divisor_of", divisor_of, (torch.int64,)),
        ("rows", rows, (torch.int64,)),
    ):
        require(tensor.dim() == 1, operator, f"{name}: expected one dimension, got {tuple(tensor.shape)}.")
        require(tensor.dtype in dtypes, operator, f"{name}: expected dtype {dtypes[-1]}, got {tensor.dtype}.")
    fields = series.shape[0]
    require(window >= 1, operator, f"window: expected at least 1, got {window}.")
    fits = divisors.shape[1] == len(ends)
    require(fits, operator, f"divisors: expected {len(ends)} rows, as in ends, got {tuple(divisors.shape)}.")
    fits = len(divisor_of) == fields
    require(fits, operator, f"divisor_of: expected shape ({fields},), got {tuple(divisor_of.shape)}.")
    fits = tuple(stages.shape[1:]) == (4, fields * window)
    require(fits, operator, f"stages: expected shape (M, 4, {fields * window}), got {tuple(stages.shape)}.")


def _check_range(name: str, numbers: Tensor, low: int, high: int) -> None:
    """Raise an IndexError for a number outside [low, high]. On CUDA the check would synchronize the stream."""
    if numbers.device.type == "cpu" and bool(((numbers < low) | (numbers > high)).any()):
        raise IndexError(f"price_windows: {name} must be from {low} to {high}, got {numbers.tolist()[:8]}.")


define(
    "price_windows",
    "(Tensor series, Tensor ends, Tensor divisors, Tensor divisor_of, Tensor rows, Tensor stages, int window)"
    " -> Tensor",
    _price_windows_twin,
)


@torch.library.register_fake("qfast::price_windows")
def _(series, ends, divisors, divisor_of, rows, stages, window):  # type: ignore[no-untyped-def]
    _check(series, ends, divisors, divisor_of, rows, stages, window)
    return series.new_empty((rows.shape[0], series.shape[0] * window))


# ---------------------------------------------------------------- self-test
def self_test(device: torch.device) -> None:
    """Compare the operator on `device` with plain torch.

    Raises
    ------
    ArithmeticError
        The results differ.
    """
    generator = torch.Generator().manual_seed(0)
    series = torch.rand(3, 30, generator=generator)
    series[:, :3], series[1, 12] = torch.nan, torch.inf
    ends, rows = torch.arange(3, 30), torch.tensor([0, 26, -1, 4, 4])
    divisors, divisor_of = torch.rand(2, 27, generator=generator), torch.tensor([0, 1, 0])
    stages = neutral_stage(12).repeat(2, 1, 1)
    stages[0] = torch.rand(4, 12, generator=generator)
    tensors = [tensor.to(device) for tensor in (series, ends, divisors, divisor_of, rows, stages)]
    result = torch.ops.qfast.price_windows(*tensors, 4)
    expected = _price_windows_twin(*tensors, window=4)  # type: ignore[misc, arg-type]
    check_equal("price_windows", result.nan_to_num(-1), expected.nan_to_num(-1))
