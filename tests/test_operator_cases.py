"""The tables of operator cases: each follows the protocol, and each operator equals its definition.

A new operator needs a table in tests/support and a row in `TABLES`. Its own test file then adds tolerances for
float32 and the properties that are special to it.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from qfast.errors import DataError
from support.attention import ATTENTION_CASES
from support.attention_pool import ATTENTION_POOL_CASES
from support.encoder import BLOCK_CASES, LAYER_CASES
from support.linear_tanh import LINEAR_TANH_CASES
from support.operator_case import F32, F64, OperatorCase, errors_above, exact_results, results
from support.recurrent import RECURRENT_CASES
from support.temporal_conv import STACK_CASES
from support.window_conv import WINDOW_CONV_CASES
from support.window_gather import GATHER_CASES

TABLES: dict[str, Sequence[OperatorCase]] = {
    "additive_attention": ATTENTION_CASES,
    "attention_pool": ATTENTION_POOL_CASES,
    "encoder_layer": LAYER_CASES,
    "feed_forward": BLOCK_CASES,
    "gather_windows": GATHER_CASES,
    "linear_tanh": LINEAR_TANH_CASES,
    "lstm, gru": RECURRENT_CASES,
    "temporal_conv_net": STACK_CASES,
    "window_conv": WINDOW_CONV_CASES,
}
# A tenth of each table. The operators' test files run all of it.
SAMPLE = [pytest.param(case, id=f"{name}-{case.name}") for name, table in TABLES.items() for case in table[::10]]


@pytest.mark.parametrize("table", TABLES)
def test_names_are_unique(table):
    names = [case.name for case in TABLES[table]]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("case", SAMPLE)
def test_inputs_are_the_same_float32_numbers_in_both_dtypes(case):
    for wide, narrow, again in zip(case.inputs(F64), case.inputs(F32), case.inputs(F32), strict=True):
        assert (wide.dtype, narrow.dtype) == (F64, F32)
        torch.testing.assert_close(narrow, again, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(wide.float(), narrow, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("case", SAMPLE)
def test_values_and_gradients_in_float64_are_those_of_the_definition(case):
    # NaN, which a gather writes where a window has no row, must be at the same places.
    exact, computed = (
        [part.nan_to_num(7.0) for part in parts]
        for parts in (exact_results(case)[0], results(case.operator, case.inputs()))
    )
    size = max(float(part.norm()) for part in exact[1:])
    # A gradient that is 0 in exact arithmetic is rounding noise, which only the other gradients can measure.
    noise = [i for i, part in enumerate(exact) if float(part.norm()) <= 1e-10 * size]
    assert [error for error in errors_above(computed, exact, 1e-10) if error[0] not in noise] == []
    assert all(float(computed[i].norm()) <= 1e-10 * size for i in noise)


@pytest.mark.parametrize("table", TABLES)
def test_sparse_tensors_are_refused(table):
    case = next(case for case in TABLES[table] if all(tensor.numel() for tensor in case.inputs(F32)))
    for place in range(len(case.inputs(F32))):
        tensors = list(case.inputs(F32))
        tensors[place] = tensors[place].to_sparse()
        with pytest.raises(DataError, match=r"expected a dense tensor, got torch.sparse_coo. Remedy: .*to_dense\(\)"):
            case.operator(tensors)
