"""Inputs and the oracle of the temporal convolution tests: tap by tap in float64, dropout from Philox in NumPy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from qfast.ops import BlockWeights, temporal_conv_net
from support.attention import randn

__all__ = [
    "CASES",
    "NATIVE",
    "Case",
    "Exact",
    "apart",
    "expected",
    "flat",
    "mask",
    "oracle",
    "philox_words",
    "plain",
    "randn",
    "relative",
    "results",
    "same_bits",
    "stack",
]

# Whether kernels serve CPU tensors here. Without them the twin does, whose bits are those of torch's convolutions.
NATIVE = torch._C._dispatch_has_kernel_for_dispatch_key("qfast::temporal_conv_net", "CPU")

Blocks = list[BlockWeights]


# ---------------------------------------------------------------- weights
def stack(
    features: int,
    channels: Sequence[int],
    kernel: int | Sequence[int],
    *,
    norm: bool = True,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Blocks:
    """Random blocks whose activations keep their size from block to block; every fourth gain is negative."""
    kernels = [kernel] * len(channels) if isinstance(kernel, int) else kernel
    blocks, before = [], features
    for number, (width, size) in enumerate(zip(channels, kernels, strict=True)):
        at = 100 * seed + 10 * number
        v1 = randn(width, before, size, seed=at) * (2 / (before * size)) ** 0.5
        v2 = randn(width, width, size, seed=at + 1) * (1 / (width * size)) ** 0.5
        gains = [
            v.norm(dim=(1, 2), keepdim=True) * (0.6 + torch.arange(width).view(-1, 1, 1) % 5 / 5) for v in (v1, v2)
        ]
        signs = torch.where(torch.arange(width) % 4 == 3, -1.0, 1.0).view(-1, 1, 1)
        g1, g2 = (gain * signs for gain in gains) if norm else (None, None)
        beside = (randn(width, before, 1, seed=at + 2) * before**-0.5, randn(width, seed=at + 3) * 0.1)
        down = beside if before != width else (None, None)
        parts = (v1, g1, randn(width, seed=at + 4) * 0.3, v2, g2, randn(width, seed=at + 5) * 0.3, *down)
        blocks.append(BlockWeights(*(None if part is None else part.to(dtype) for part in parts)))
        before = width
    return blocks


def flat(blocks: Blocks) -> list[Tensor]:
    return [part for block in blocks for part in block if part is not None]


def like(blocks: Blocks, parts: Sequence[Tensor]) -> Blocks:
    """`parts`, as `flat` orders them, in the places of the tensors of `blocks`."""
    given = iter(parts)
    return [BlockWeights(*(None if part is None else next(given) for part in block)) for block in blocks]


# ---------------------------------------------------------------- the oracle
def causal(x: Tensor, weight: Tensor, bias: Tensor, dilation: int) -> Tensor:
    """[B, C_in, T] -> [B, C, T]: tap by tap, each adding the input of so many steps before."""
    steps, kernel = x.shape[2], weight.shape[2]
    out = bias.view(1, -1, 1).expand(len(x), len(bias), steps)
    for tap in range(kernel):
        back = (kernel - 1 - tap) * dilation
        if back < steps:
            seen = torch.einsum("oc,bct->bot", weight[:, :, tap], x[:, :, : steps - back])
            out = out + torch.cat((seen.new_zeros(*out.shape[:2], back), seen), 2)
    return out


def weight_of(v: Tensor, g: Tensor | None) -> Tensor:
    return v if g is None else g * v / v.square().sum((1, 2), keepdim=True).sqrt()


def oracle(
    x: Tensor,
    blocks: Blocks,
    dilations: Sequence[int] | None = None,
    *,
    all_steps: bool = False,
    dropout: float = 0.0,
    seed: int = 0,
    note: list[Tensor] | None = None,
    convolution: Callable[..., Tensor] = causal,
) -> Tensor:
    """The definition, all steps of it, in the dtype of its inputs. `note` collects what goes into the ReLUs."""
    for number, block in enumerate(blocks):
        dilation = 2**number if dilations is None else dilations[number]
        y = x
        pairs = ((block.weight_v1, block.weight_g1, block.bias1), (block.weight_v2, block.weight_g2, block.bias2))
        for which, (v, g, bias) in enumerate(pairs):
            y = convolution(y, weight_of(v, g), bias, dilation)
            if note is not None:
                note.append(y.detach())
            y = y.relu()
            if dropout:
                y = y * mask(seed, *y.shape, 2 * number + which, dropout).to(y.dtype)
        if block.downsample_weight is not None:
            x = convolution(x, block.downsample_weight, block.downsample_bias, 1)
        x = y + x
        if note is not None:
            note.append(x.detach())
        x = x.relu()
    return x if all_steps else x[:, :, -1]


def plain(x: Tensor, blocks: Blocks, dilations: Sequence[int] | None = None, *, all_steps: bool = False) -> Tensor:
    """What one would write in torch: its conv1d over zeros put before the window."""

    def conv1d(x: Tensor, weight: Tensor, bias: Tensor, dilation: int) -> Tensor:
        dilation = min(dilation, x.shape[2])  # beyond the window every distance is the same
        before = (weight.shape[2] - 1) * dilation
        return functional.conv1d(functional.pad(x, (before, 0)), weight, bias, dilation=dilation)

    return oracle(x, blocks, dilations, all_steps=all_steps, convolution=conv1d)


def results(call: Callable[..., Tensor], x: Tensor, blocks: Blocks, grad: Tensor) -> list[Tensor]:
    """What call(x, blocks) returns, and the gradients of x and of the weights as `flat` orders them."""
    leaves = [t.detach().requires_grad_() for t in (x, *flat(blocks))]
    out = call(leaves[0], like(blocks, leaves[1:]))
    out.backward(grad)
    return [out.detach(), *(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves)]


def relative(found: Tensor, exact: Tensor) -> float:
    """Norm of the difference over the norm; 0 of what is exactly 0."""
    assert found.shape == exact.shape, (found.shape, exact.shape)
    error = float((found.double() - exact.double()).norm())
    return error / max(float(exact.double().norm()), 1e-300) if error else 0.0


def apart(found: Sequence[Tensor], exact: Sequence[Tensor], limit: float) -> list[tuple[int, float]]:
    """Which of `found` (a result and its gradients) are further off than `limit`, and how far.

    By relative norm; of gradients that are small beside the others, relative to a thousandth of the largest: along
    weight_v that of a normalised weight is 0 but for rounding.
    """
    least = 1e-3 * max((float(t.double().norm()) for t in exact[1:]), default=0.0)
    errors = [
        relative(a, b) * min(1.0, float(b.norm()) / max(least, 1e-300)) if number else relative(a, b)
        for number, (a, b) in enumerate(zip(found, exact, strict=True))
    ]
    return [(i, error) for i, error in enumerate(errors) if not error <= limit]


def same_bits(found: Tensor, expected: Tensor) -> bool:
    """Equal bit for bit where kernels serve, to rounding where the twin does."""
    if NATIVE:
        return torch.equal(found, expected)
    return relative(found, expected) < (1e-5 if found.dtype == torch.float32 else 1e-12)


# ---------------------------------------------------------------- dropout by the definition
def philox_words(seed: int, counter: Sequence[np.ndarray | int]) -> list[np.ndarray]:
    """Philox 4x32-10 in 64-bit arithmetic: the words of each counter, as they broadcast."""
    low = np.uint64(0xFFFFFFFF)
    key = [np.uint64(seed & 0xFFFFFFFF), np.uint64(seed >> 32 & 0xFFFFFFFF)]
    c = [np.asarray(word, dtype=np.uint64) for word in counter]
    for _ in range(10):
        products = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        (high0, low0), (high1, low1) = ((p >> np.uint64(32), p & low) for p in products)
        c = [high1 ^ c[1] ^ key[0], low1, high0 ^ c[3] ^ key[1], low0]
        key = [(key[0] + np.uint64(0x9E3779B9)) & low, (key[1] + np.uint64(0xBB67AE85)) & low]
    return list(np.broadcast_arrays(*c))


def mask(seed: int, batch: int, channels: int, steps: int, convolution: int, dropout: float) -> Tensor:
    """float64 [B, C, T]: 0 where dropped, otherwise 1 / (1 - dropout)."""
    groups, c, t = np.ogrid[: (batch + 3) // 4, :channels, :steps]
    words = np.stack(philox_words(seed, (c, t, convolution, groups)), 1).reshape(-1, channels, steps)[:batch]
    kept = words >= round(dropout * 2**32)
    return torch.from_numpy(kept * (0.0 if dropout == 1 else 1 / (1 - dropout)))


# ---------------------------------------------------------------- the accuracy table
@dataclass(frozen=True)
class Case:
    """One stack. `dilations` None: 1, 2, 4, ..."""

    steps: int
    kernel: int | tuple[int, ...]
    channels: tuple[int, ...]
    features: int
    batch: int
    all_steps: bool = False
    norm: bool = True
    dilations: tuple[int, ...] | None = None

    @property
    def name(self) -> str:
        kernels = (self.kernel,) if isinstance(self.kernel, int) else self.kernel
        lists = zip("kCd", (kernels, self.channels, self.dilations or ()), strict=True)
        parts = [letter + "_".join(map(str, numbers)) for letter, numbers in lists if numbers]
        ends = ["all"] * self.all_steps + ["plain"] * (not self.norm)
        return "-".join([f"T{self.steps}", *parts, f"F{self.features}", f"B{self.batch}", *ends])

    def inputs(self, seed: int) -> tuple[Tensor, Blocks, Tensor]:
        """x [B, F, T] as a view of windows [B, T, F], weights, and the gradient of the result: float32."""
        x = randn(self.batch, self.steps, self.features, seed=seed, dtype=torch.float32).transpose(1, 2)
        shape = (self.batch, self.channels[-1], self.steps) if self.all_steps else (self.batch, self.channels[-1])
        blocks = stack(
            self.features, self.channels, self.kernel, norm=self.norm, seed=seed, dtype=torch.float32
        )  # fmt: skip
        return x, blocks, randn(*shape, seed=seed + 1, dtype=torch.float32)

    def call(self, of: Callable[..., Tensor] = temporal_conv_net) -> Callable[[Tensor, Blocks], Tensor]:
        return lambda x, blocks: of(x, blocks, dilations=self.dilations, all_steps=self.all_steps)


CASES = [
    # the two settings of the reference, with few rows
    Case(20, 7, (32,) * 5, 20, 13),
    Case(60, 3, (128,) * 5, 6, 5),
    # time: the window shorter and longer than the receptive field, one step, and far beyond
    *(Case(T, 3, (16, 16), 5, 7) for T in (1, 2, 3, 5, 12, 13, 14, 61, 250)),
    *(Case(T, 3, (16, 16), 5, 7, all_steps=True) for T in (1, 2, 13, 61)),
    Case(250, 9, (24,), 3, 3, all_steps=True),
    # kernel sizes
    *(Case(19, k, (20, 20), 20, 6) for k in range(1, 10)),
    *(Case(19, k, (20, 12), 4, 6, all_steps=True) for k in (1, 2, 4, 9)),
    Case(31, (1, 5, 2), (9, 9, 17), 9, 5),
    # widths on both sides of every vector and panel length, widening and narrowing
    *(Case(9, 2, (c,), f, 5) for c in (1, 2, 3, 7, 8, 9, 15, 16, 17) for f in (1, c)),
    *(Case(9, 2, (c, c), 3, 4) for c in (31, 32, 33, 47, 48, 49, 63, 64, 65, 80, 96, 112, 127, 128, 129)),
    Case(5, 3, (256, 256), 256, 4),
    Case(7, 3, (1, 40, 3, 66, 2), 5, 6),
    Case(7, 3, (40, 1, 3), 158, 6, all_steps=True),
    # rows: every remainder of the tiles of rows, and none
    *(Case(8, 3, (16, 16), 4, b) for b in (0, 1, 2, 3, 4, 5, 6, 7, 11, 12, 13, 17, 23, 24, 25, 47, 49, 100)),
    *(Case(8, 3, (16, 16), 4, b, all_steps=True) for b in (0, 1, 5, 100)),
    Case(6, 2, (8,), 3, 1000),
    # long series of few rows
    *(Case(1000, 3, (16, 16), 4, b, all_steps=True) for b in (1, 2)),
    Case(1000, 2, (16,) * 5, 16, 1, all_steps=True),
    Case(700, 5, (33,), 4, 3, all_steps=True),
    # depth and dilation
    Case(40, 2, (10,) * 7, 10, 4),
    Case(40, 2, (10,) * 7, 3, 4, all_steps=True),
    Case(30, 3, (12, 12, 12), 6, 4, dilations=(1, 3, 9)),
    Case(30, 3, (12, 12, 12), 6, 4, dilations=(9, 3, 1)),
    Case(30, 4, (12, 12), 6, 4, dilations=(7, 7), all_steps=True),
    Case(10, 3, (12, 12), 6, 4, dilations=(1, 100)),
    Case(10, 3, (12,), 6, 4, dilations=(2**31 - 1,)),
    # no weight normalisation
    Case(20, 7, (32,) * 5, 20, 6, norm=False),
    Case(12, 3, (16, 8), 8, 5, norm=False, all_steps=True),
]  # fmt: skip


@dataclass(frozen=True)
class Exact:
    """float64 result and gradients for float32 inputs of `seed`, and the relative errors of plain torch in float32."""

    seed: int
    values: list[Tensor]
    of_plain: list[float]


@cache
def expected(case: Case) -> Exact:
    """Of the first seed where nothing that goes into a ReLU is so near 0 that float32 may see the other sign.

    Which side of 0 decides over the gradient: there the float32 and the float64 gradient differ rightly. Sums of two
    zeros, of a row that two ReLUs cut off, are 0 in both.
    """
    for seed in range(1, 40):
        x, blocks, grad = case.inputs(seed)
        exact_blocks = like(blocks, [part.double() for part in flat(blocks)])
        note: list[Tensor] = []
        with torch.no_grad():
            oracle(x.double(), exact_blocks, case.dilations, note=note)
        if all(float(y.abs()[y != 0].min()) > 5e-6 * float(y.std(correction=0)) for y in note if y.any()):
            exact = results(case.call(positional(oracle)), x.double(), exact_blocks, grad.double())
            of_plain = results(case.call(positional(plain)), x, blocks, grad)
            return Exact(seed, exact, [relative(a, b) for a, b in zip(of_plain, exact, strict=True)])
    raise AssertionError(f"no seed for {case}")


def positional(of: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda x, blocks, *, dilations, all_steps: of(x, blocks, dilations, all_steps=all_steps)


@st.composite
def stacks(draw: st.DrawFn) -> tuple[Case, str, float]:
    depth = draw(st.integers(1, 4))
    widths = tuple(draw(st.lists(st.integers(1, 40), min_size=depth, max_size=depth)))
    if draw(st.booleans()):
        widths = widths[:1] * depth
    kernels = tuple(draw(st.lists(st.integers(1, 9), min_size=depth, max_size=depth)))
    dilations = draw(st.none() | st.lists(st.integers(1, 12), min_size=depth, max_size=depth).map(tuple))
    case = Case(
        draw(st.integers(1, 30)), kernels, widths, draw(st.sampled_from([widths[0], 1, 2, 3, 5, 20])),
        draw(st.integers(0, 30)), draw(st.booleans()), draw(st.booleans()), dilations,
    )  # fmt: skip
    return case, draw(st.sampled_from(sorted(LAYOUTS))), draw(st.sampled_from([0.0, 0.0, 0.3, 0.9]))


def nan_like(x: Tensor) -> Tensor:
    return torch.full_like(x, torch.nan)


# Of [B, F, T]; each makes the same numbers lie differently in memory, with NaN between them.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "features first": lambda x: x.contiguous(),
    "windows of rows": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "flat": lambda x: x.reshape(len(x), x.shape[1] * x.shape[2]).view(x.shape),
    "batch last": lambda x: x.permute(1, 2, 0).contiguous().permute(2, 0, 1),
    "columns of wider rows": lambda x: torch.cat([nan_like(x), x, nan_like(x)], 1)[:, x.shape[1] : 2 * x.shape[1]],
    "every other step": lambda x: torch.stack([x, nan_like(x)], 3).flatten(2)[:, :, ::2],
    "every other row": lambda x: torch.stack([x, nan_like(x)], 1).flatten(0, 1)[::2],
    "from the third element": lambda x: torch.cat([x.new_full((3,), torch.nan), x.flatten()])[3:].view(x.shape),
}


SEEDS = [0, 1, -1, 2**31, 2**32, 2**63 - 1, -(2**63), 0x9E3779B97F4A7C15 - 2**64]
