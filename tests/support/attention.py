"""Cases of attention over the stocks of a day: the dense softmax, and a sorted float64 form for long days."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from qfast.ops import additive_attention
from support import operator_case
from support.operator_case import F32, F64
from support.tensors import randn

# Whether there are kernels for CPU tensors. Plain torch's bits depend on torch's matrix products.
NATIVE = torch._C._dispatch_has_kernel_for_dispatch_key("qfast::additive_attention", "CPU")


def offsets_of(sizes: Sequence[int]) -> Tensor:
    """Offsets of days with these numbers of rows."""
    return torch.tensor([0, *np.cumsum(sizes)], dtype=torch.int64)


def same_bits(result: Tensor, expected: Tensor) -> bool:
    """Whether the tensors are bitwise equal, or equal to rounding if plain torch computed them."""
    if NATIVE:
        return torch.equal(result, expected)
    return torch.allclose(result, expected, rtol=1e-4 if result.dtype == torch.float32 else 1e-11, atol=1e-6)


def results(call: Callable[..., Tensor], tensors: Sequence[Tensor], grad: Tensor) -> list[Tensor]:
    """The result of call(*tensors), then the gradients of `tensors` for the gradient `grad` of the result."""
    return operator_case.results(lambda leaves: call(*leaves), tensors, grad=grad)


def dense(
    query: Tensor, key: Tensor, value: Tensor, offsets: Tensor | None = None, negative_slope: float = 0.01
) -> Tensor:
    """The definition, day by day, in the dtype of the inputs; any leading axes."""
    bounds = [0, query.shape[-1]] if offsets is None else offsets.tolist()
    days = []
    for begin, end in pairwise(bounds):
        scores = query[..., begin:end, None] + key[..., None, begin:end]
        weights = functional.leaky_relu(scores, negative_slope).softmax(-1)
        days.append(weights @ value[..., begin:end, :])
    return torch.cat(days, -2) if days else value.clone()


def dense_graph(
    hidden: Tensor, weight: Tensor, bias: Tensor, offsets: Tensor | None = None, negative_slope: float = 0.01
) -> Tensor:
    query, key = hidden @ weight[0] + bias[0], hidden @ weight[1] + bias[1]
    return hidden + dense(query, key, hidden, offsets, negative_slope)


# ---------------------------------------------------------------- exact results
@dataclass(frozen=True)
class Exact:
    """float64 result and gradients, and for each the sum of the absolute values of its terms.

    Where terms cancel, rounding must be compared with these sums. A query whose scores are all on one side of the bend
    has a gradient that is the difference of nearly equal numbers.
    """

    values: list[Tensor]
    terms: list[Tensor]

    def misses(self, result: Sequence[Tensor], limit: float) -> list[tuple[int, float]]:
        """Index and error, in multiples of the terms, of every result whose error exceeds `limit` times its terms."""
        shares = [
            e / max(float(t.norm()), 1e-300) for e, t in zip(errors(result, self.values), self.terms, strict=True)
        ]
        return [(i, share) for i, share in enumerate(shares) if not share <= limit]


def errors(result: Sequence[Tensor], exact: Sequence[Tensor]) -> list[float]:
    """Norms of the differences."""
    for a, b in zip(result, exact, strict=True):
        assert a.shape == b.shape, (a.shape, b.shape)
    return [float((a.double() - b).norm()) for a, b in zip(result, exact, strict=True)]


def exact_attention(
    query: Tensor, key: Tensor, value: Tensor, grad: Tensor, offsets: Tensor | None = None, slope: float = 0.01
) -> Exact:
    """Result and gradients of query, key and value by the dense softmax in float64, some rows at a time."""
    query, key, value, grad = (t.detach().double() for t in (query, key, value, grad))
    values, terms = ([torch.zeros_like(t) for t in (value, query, key, value)] for _ in range(2))
    bounds = [0, query.shape[-1]] if offsets is None else offsets.tolist()
    pieces = [(begin, end, at) for begin, end in pairwise(bounds) for at in range(begin, end, 256)]
    for begin, end, at in pieces:
        day, rows = slice(begin, end), slice(at, min(at + 256, end))
        scores = query[..., rows, None] + key[..., None, day]
        weights = functional.leaky_relu(scores, slope).softmax(-1)
        bend = torch.full_like(scores, slope).masked_fill(scores > 0, 1.0)
        for sums, v, g, sign in ((values, value, grad, -1.0), (terms, value.abs(), grad.abs(), 1.0)):
            v, g = v[..., day, :], g[..., rows, :]
            of_weights = g @ v.mT
            of_scores = weights * (of_weights + sign * (weights * of_weights).sum(-1, keepdim=True)) * bend
            sums[0][..., rows, :] = weights @ v
            sums[1][..., rows] = of_scores.sum(-1)
            sums[2][..., day] += of_scores.sum(-2)
            sums[3][..., day, :] += weights.mT @ g
    return Exact(values, terms)


def chain_graph(attention: Sequence[Tensor], hidden: Tensor, weight: Tensor, grad: Tensor) -> list[Tensor]:
    """hidden + attention(scores of hidden) and the gradients of hidden, weight and bias, from attention's result and
    gradients."""
    out, of_query, of_key, of_value = attention
    of_scores = torch.stack([of_query, of_key])
    return [hidden + out, grad + of_value + of_scores.t() @ weight, of_scores @ hidden, of_scores.sum(1)]


def exact_graph(
    hidden: Tensor, weight: Tensor, grad: Tensor, scores: Tensor, offsets: Tensor | None = None, slope: float = 0.01
) -> Exact:
    """Like `exact_attention`, for the result, hidden, weight and bias of graph_attention with scores [2, N]."""
    attention = exact_attention(*scores, hidden, grad, offsets, slope)
    hidden, weight, grad = (t.detach().double() for t in (hidden, weight, grad))
    return Exact(
        chain_graph(attention.values, hidden, weight, grad),
        chain_graph(attention.terms, hidden.abs(), weight.abs(), grad.abs()),
    )


# ---------------------------------------------------------------- the accuracy table
PATTERNS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "random": lambda q, k: (q, k),
    # few distinct values: many equal keys and many scores of exactly 0
    "ties": lambda q, k: ((q * 2).round() / 2, (k * 2).round() / 2),
    "equal keys": lambda q, k: (q, k[..., :1].expand_as(k)),
    "all negative": lambda q, k: (-q.abs(), -k.abs() - 0.01),
    "all positive": lambda q, k: (q.abs(), k.abs() + 0.01),
}
SCALES = (0.1, 3, 60, 1e4)


@dataclass(frozen=True)
class AttentionCase:
    """Days of `n` rows. Short days are repeated, so no error is small or large by chance."""

    n: int
    scale: float
    pattern: str = "random"
    slope: float = 0.01
    width: int = 8

    @property
    def name(self) -> str:
        slope = "" if self.slope == 0.01 else f"-slope{self.slope}"
        return f"n{self.n}-scale{self.scale:g}-{self.pattern.replace(' ', '-')}{slope}"

    @property
    def offsets(self) -> Tensor:
        return offsets_of([self.n] * max(1, 400 // self.n))

    def inputs(self, dtype: torch.dtype = F64) -> list[Tensor]:
        """query and key [N], value [N, width]."""
        query, key = PATTERNS[self.pattern](*randn(2, len(self.offsets) - 1, self.n, seed=self._seed))
        scores = [(part * self.scale).float().flatten().to(dtype) for part in (query, key)]
        return [*scores, self._values(dtype)[0]]

    def grad(self, dtype: torch.dtype = F64) -> Tensor:
        """A gradient of the result, [N, width]."""
        return self._values(dtype)[1]

    @property
    def _seed(self) -> int:
        return self.n + list(PATTERNS).index(self.pattern)

    def _values(self, dtype: torch.dtype) -> Tensor:
        return randn(2, int(self.offsets[-1]), self.width, seed=self._seed + 1, dtype=F32).to(dtype)

    def reference(self, tensors: Sequence[Tensor]) -> Tensor:
        """The dense softmax, day by day."""
        return dense(*tensors, self.offsets, self.slope)

    def operator(self, tensors: Sequence[Tensor]) -> Tensor:
        return additive_attention(*tensors, self.offsets, self.slope)


ATTENTION_CASES = [
    *(AttentionCase(n, scale, p) for n in (1, 2, 7, 300, 1500) for scale in SCALES for p in PATTERNS),
    *(AttentionCase(5000, scale) for scale in SCALES),
    *(AttentionCase(n, scale, slope=s) for n in (7, 300) for scale in (3, 60) for s in (0.0, 0.3, 1.0)),
    AttentionCase(300, 1e37),
    AttentionCase(300, 1e-42),
]
SLOW_CASES = [AttentionCase(5000, scale, p) for scale in SCALES for p in PATTERNS if p != "random"]


@cache
def expected(case: AttentionCase) -> tuple[Exact, list[float]]:
    """float64 result and gradients for float32 inputs, and the errors of the dense softmax in float32."""
    tensors, grad = case.inputs(F32), case.grad(F32)
    exact = exact_attention(*tensors, grad, case.offsets, case.slope)
    of_dense = operator_case.results(case.reference, tensors, grad=grad)
    return exact, errors(of_dense, exact.values)


# ---------------------------------------------------------------- days of many rows
def sorted_oracle(query: Tensor, key: Tensor, value: Tensor, grad: Tensor, slope: float = 0.01) -> list[Tensor]:
    """Result and gradients of one day by running sums over sorted scores in float64. Scores must be moderate."""
    s, t, v, g = (x.detach().double().numpy() for x in (query, key, value, grad))
    by_key, by_query = np.argsort(t, kind="stable"), np.argsort(s, kind="stable")
    top = t.max()
    upper, lower = np.exp(t - top), np.exp(slope * (t - top))
    first_key = np.searchsorted(t[by_key], -s, side="right")  # the first key with a score above 0
    first_query = np.searchsorted(s[by_query], -t, side="right")
    c = s + top
    peak = np.maximum(c, slope * c)
    of_upper, of_lower = np.exp(c - peak), np.exp(slope * c - peak)

    def upwards(x: np.ndarray, order: np.ndarray, first: np.ndarray) -> np.ndarray:
        """Sums of x from position `first` to the end."""
        return np.append(np.cumsum(x[order][::-1])[::-1], 0.0)[first]

    def downwards(x: np.ndarray, order: np.ndarray, first: np.ndarray) -> np.ndarray:
        return np.append(0.0, np.cumsum(x[order]))[first]

    total = of_upper * upwards(upper, by_key, first_key) + of_lower * downwards(lower, by_key, first_key)
    of_upper, of_lower = of_upper / total, of_lower / total
    out, of_value = np.empty_like(v), np.empty_like(v)
    of_query = [np.zeros_like(s), np.zeros_like(s)]
    of_key = [np.zeros_like(t), np.zeros_like(t)]
    delta = np.zeros_like(s)
    for h in range(v.shape[1]):
        sides = [
            of_upper * upwards(upper * v[:, h], by_key, first_key),
            of_lower * downwards(lower * v[:, h], by_key, first_key),
        ]
        out[:, h] = sides[0] + sides[1]
        delta += g[:, h] * out[:, h]
        back = [
            upper * upwards(of_upper * g[:, h], by_query, first_query),
            lower * downwards(of_lower * g[:, h], by_query, first_query),
        ]
        of_value[:, h] = back[0] + back[1]
        for side in (0, 1):
            of_query[side] += g[:, h] * sides[side]
            of_key[side] += v[:, h] * back[side]
    of_query[0] -= delta * of_upper * upwards(upper, by_key, first_key)
    of_query[1] -= delta * of_lower * downwards(lower, by_key, first_key)
    of_key[0] -= upper * upwards(of_upper * delta, by_query, first_query)
    of_key[1] -= lower * downwards(of_lower * delta, by_query, first_query)
    gradients = of_query[0] + slope * of_query[1], of_key[0] + slope * of_key[1], of_value
    return [torch.from_numpy(x) for x in (out, *gradients)]


# Tolerances of float32 for the result and the gradients of query, key and value: the largest of three.
TIMES_DENSE = 1.5  # times the error of the dense float32 softmax, which rounds at other places and is sometimes better
ROUNDING = 2e-7  # of the exact norm: float32 rounds to 6e-8, and a result has a few roundings
# ... of the sum of terms. Result and value gradient have no terms that cancel. The query gradient sums over the
# lighter side of the bend, so only underflow remains. The key gradient is a difference of two sums over all queries,
# around a centre that removes most of their common part. The dense softmax subtracts before
# it sums and so retains more digits where one key has all the weight.
OF_TERMS = (0.0, 1e-12, 8e-9, 0.0)


def attention_inputs(n: int, width: int, dtype=torch.float64, seed: int = 0, heads: int | None = None) -> list[Tensor]:
    """query, key, value and a gradient of the result."""
    lead = () if heads is None else (heads,)
    query, key = randn(2, *lead, n, seed=seed, dtype=dtype)
    return [query, key, *randn(2, *lead, n, width, seed=seed + 1, dtype=dtype)]


def graph_inputs(n: int, width: int, dtype=torch.float64, seed: int = 0) -> list[Tensor]:
    """hidden, weight, bias and a gradient of the result; the scores are about standard normal."""
    weight, bias = randn(2, width, seed=seed) / width**0.5, randn(2, seed=seed + 1)
    return [randn(n, width, seed=seed, dtype=dtype), weight.to(dtype), bias.to(dtype), randn(n, width, dtype=dtype)]


def check_accuracy(
    result: Sequence[Tensor], exact: Exact, of_dense: Sequence[float], of_terms: Sequence[float]
) -> None:
    if not NATIVE:
        of_terms = [ROUNDING] * 4
    each = zip(errors(result, exact.values), of_dense, exact.values, exact.terms, of_terms, strict=True)
    for i, (error, theirs, value, terms, share) in enumerate(each):
        allowed = max(TIMES_DENSE * theirs, ROUNDING * float(value.norm()), share * float(terms.norm()))
        assert error <= allowed, (i, error, theirs, float(value.norm()), float(terms.norm()))


VIEWS = {
    "every other row": lambda x: torch.stack([x, x + 1], 1).flatten(0, 1)[::2],
    "backwards in memory": lambda x: x.flip(0).contiguous().flip(0),
    "column of a wider panel": lambda x: torch.stack([x, x + 1, x + 2], -1)[..., 0],
    "time-major": lambda x: x.t().contiguous().t(),
    "off the alignment": lambda x: torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape),
}


# All scores are on one side of the bend, so adding a number to all keys has no effect.
SIDES = {"above": 9.0, "below": -9.0}
INF, NAN = torch.inf, torch.nan
INPUT_NAMES = ("query", "key", "value")
DAY_SIZES = [4, 150, 0, 90]  # the second day has the non-finite values
SPOILED_DAY = slice(4, 154)


def day_inputs(dtype: torch.dtype = torch.float64, heads: int | None = None) -> dict[str, Tensor]:
    lead = () if heads is None else (heads,)
    query, key = randn(2, *lead, sum(DAY_SIZES), dtype=dtype)
    value, grad = randn(2, *lead, sum(DAY_SIZES), 5, seed=1, dtype=dtype)
    return {"query": query, "key": key, "value": value, "grad": grad}


def spoil(where: str, row: int | slice, value: float) -> Callable[[dict[str, Tensor]], None]:
    def change(inputs: dict[str, Tensor]) -> None:
        tensor = inputs[where][SPOILED_DAY]
        tensor[row if tensor.dim() == 1 else (row, 2)] = value

    return change


SPOILED = {
    "query nan": spoil("query", 7, NAN),
    "query inf": spoil("query", 7, INF),
    "query -inf": spoil("query", 7, -INF),
    "key nan": spoil("key", 7, NAN),
    "key inf": spoil("key", 7, INF),
    "key -inf": spoil("key", 7, -INF),
    "many keys -inf": spoil("key", slice(0, 140), -INF),
    "all keys -inf": spoil("key", slice(None), -INF),
    "all queries -inf": spoil("query", slice(None), -INF),
    "value nan": spoil("value", 7, NAN),
    "value inf": spoil("value", 7, INF),
    "value -inf": spoil("value", 7, -INF),
    "values of both infinities": lambda inputs: (spoil("value", 7, INF)(inputs), spoil("value", 70, -INF)(inputs)),
    "grad nan": spoil("grad", 7, NAN),
    "grad inf": spoil("grad", 7, INF),
    "query inf, key -inf": lambda inputs: (spoil("query", 7, INF)(inputs), spoil("key", 9, -INF)(inputs)),
    "query -inf, key inf": lambda inputs: (spoil("query", 7, -INF)(inputs), spoil("key", 9, INF)(inputs)),
    "everything nan": spoil("key", slice(None), NAN),
}


# These gradients are sums with infinities of both signs: infinite or NaN, depending on the order.
INFINITE_TERMS = ("value inf", "value -inf", "values of both infinities", "grad inf")
