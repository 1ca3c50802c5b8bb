"""Directions in which the gradient of the scores is 0. Adam turns the rounding noise there into full steps."""

from __future__ import annotations

import pytest
import torch

from qfast.ops import additive_attention, graph_attention
from support.attention import NATIVE, SIDES, dense, dense_graph, offsets_of, results
from support.tensors import randn


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("sizes", [[37], [300], [2000], [64, 1, 500]], ids=str)
@pytest.mark.parametrize("common", [0.0, 10.0])
def test_keys_are_not_pushed_together(side: str, sizes: list[int], common: float, isa: str) -> None:
    n = sum(sizes)
    query, key = randn(n, seed=1, dtype=torch.float32) + SIDES[side], randn(n, seed=2, dtype=torch.float32)
    value, grad = randn(n, 64, seed=3, dtype=torch.float32) + common, randn(n, 64, seed=4, dtype=torch.float32) + 0.5
    days = offsets_of(sizes)
    _, of_query, of_key, _ = results(lambda *t: additive_attention(*t, days), [query, key, value], grad)
    for result in of_key.double().split(sizes):
        # the sum of n numbers rounded to float32; that of the dense softmax is a hundred times as large
        assert abs(float(result.sum())) <= (1e-7 if NATIVE else 1e-4) * float(result.abs().sum()) + 1e-12
    if NATIVE and side == "above":
        assert not of_query.any()  # every score has the slope 1, so a row's common part does not matter at all


@pytest.mark.parametrize("side", SIDES)
def test_a_bias_without_effect_gets_no_gradient(side: str, isa: str) -> None:
    hidden = randn(300, 64, seed=1, dtype=torch.float32) * 0.1 + 0.5
    weight, grad = randn(2, 64, seed=2, dtype=torch.float32) * 0.1, randn(300, 64, seed=3, dtype=torch.float32)
    bias = torch.tensor([SIDES[side] * 2, 0.0])
    tensors = [hidden, weight, bias]
    *_, result = results(graph_attention, tensors, grad)
    *_, noise = results(dense_graph, tensors, grad)
    assert float(result.norm()) <= float(noise.norm()) / (10 if NATIVE else 0.1)


@pytest.mark.parametrize("common", [1.0, 30.0])
def test_a_common_part_of_the_values_costs_less_than_in_the_dense_softmax(common: float, isa: str) -> None:
    tensors = [randn(400, seed=1), randn(400, seed=2), randn(400, 64, seed=3) + common]
    tensors, grad = [t.float() for t in tensors], randn(400, 64, seed=4, dtype=torch.float32)
    exact = results(dense, [t.double() for t in tensors], grad.double())
    result, theirs = results(additive_attention, tensors, grad), results(dense, tensors, grad)
    for ours, plain, true in zip(result[1:3], theirs[1:3], exact[1:3], strict=True):
        assert (ours - true).norm() <= (plain - true).norm() * (1 if NATIVE else 10)
