"""Cases of temporal convolution stacks, defined tap by tap, with dropout masks from Philox in NumPy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from qfast.ops import BlockWeights, temporal_conv_net
from support import operator_case
from support.operator_case import F32, F64, relative_error
from support.tensors import philox_mask, randn

# Whether there are kernels for CPU tensors. Plain torch's bits depend on torch's convolutions.
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
    """Random blocks whose activations have about the same size in every block. Every fourth gain is negative."""
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
        projection = (randn(width, before, 1, seed=at + 2) * before**-0.5, randn(width, seed=at + 3) * 0.1)
        down = projection if before != width else (None, None)
        parts = (v1, g1, randn(width, seed=at + 4) * 0.3, v2, g2, randn(width, seed=at + 5) * 0.3, *down)
        blocks.append(BlockWeights(*(None if part is None else part.to(dtype) for part in parts)))
        before = width
    return blocks


def flat(blocks: Blocks) -> list[Tensor]:
    """All tensors of the blocks as one list."""
    return [part for block in blocks for part in block if part is not None]


def like(blocks: Blocks, parts: Sequence[Tensor]) -> Blocks:
    """`parts`, as `flat` orders them, in the places of the tensors of `blocks`."""
    inputs = iter(parts)
    return [BlockWeights(*(None if part is None else next(inputs) for part in block)) for block in blocks]


# ---------------------------------------------------------------- the oracle
def causal(x: Tensor, weight: Tensor, bias: Tensor, dilation: int) -> Tensor:
    """[B, C_in, T] -> [B, C, T]. Each tap adds the input of an earlier step."""
    steps, kernel = x.shape[2], weight.shape[2]
    out = bias.view(1, -1, 1).expand(len(x), len(bias), steps)
    for tap in range(kernel):
        back = (kernel - 1 - tap) * dilation
        if back < steps:
            seen = torch.einsum("oc,bct->bot", weight[:, :, tap], x[:, :, : steps - back])
            out = out + torch.cat((seen.new_zeros(*out.shape[:2], back), seen), 2)
    return out


def weight_of(v: Tensor, g: Tensor | None) -> Tensor:
    """The weight g v / |v|, or v if there is no normalisation."""
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
    """The definition in the dtype of its inputs. `note` collects the inputs of the ReLUs."""
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
                y = y * philox_mask(seed, *y.shape, 2 * number + which, dropout).to(y.dtype)
        if block.downsample_weight is not None:
            x = convolution(x, block.downsample_weight, block.downsample_bias, 1)
        x = y + x
        if note is not None:
            note.append(x.detach())
        x = x.relu()
    return x if all_steps else x[:, :, -1]


def plain(x: Tensor, blocks: Blocks, dilations: Sequence[int] | None = None, *, all_steps: bool = False) -> Tensor:
    """The obvious torch code: conv1d over the window padded with zeros in front."""

    def conv1d(x: Tensor, weight: Tensor, bias: Tensor, dilation: int) -> Tensor:
        dilation = min(dilation, x.shape[2])  # all dilations beyond the window have the same effect
        before = (weight.shape[2] - 1) * dilation
        return functional.conv1d(functional.pad(x, (before, 0)), weight, bias, dilation=dilation)

    return oracle(x, blocks, dilations, all_steps=all_steps, convolution=conv1d)


def results(call: Callable[..., Tensor], x: Tensor, blocks: Blocks, grad: Tensor) -> list[Tensor]:
    """The result of call(x, blocks), then the gradients of x and of the weights in the order of `flat`."""
    return operator_case.results(
        lambda tensors: call(tensors[0], like(blocks, tensors[1:])), [x, *flat(blocks)], grad=grad
    )


def stack_errors_above(result: Sequence[Tensor], exact: Sequence[Tensor], limit: float) -> list[tuple[int, float]]:
    """Index and error of every tensor of `results` (a result and its gradients) whose error exceeds `limit`.

    Errors are relative norms. Errors of small gradients are relative to a thousandth of the largest gradient: along
    weight_v the gradient of a normalised weight is rounding noise.
    """
    least = 1e-3 * max((float(t.double().norm()) for t in exact[1:]), default=0.0)
    errors = [
        relative_error(a, b) * min(1.0, float(b.norm()) / max(least, 1e-300)) if number else relative_error(a, b)
        for number, (a, b) in enumerate(zip(result, exact, strict=True))
    ]
    return [(i, error) for i, error in enumerate(errors) if not error <= limit]


def same_bits(result: Tensor, expected: Tensor) -> bool:
    """Whether the tensors are bitwise equal, or equal to rounding if plain torch computed them."""
    if NATIVE:
        return torch.equal(result, expected)
    return relative_error(result, expected) < (1e-5 if result.dtype == torch.float32 else 1e-12)


# ---------------------------------------------------------------- the accuracy table
@dataclass(frozen=True)
class StackCase:
    """Sizes of one stack. `dilations` None means 1, 2, 4, ..."""

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

    def inputs(self, dtype: torch.dtype = F64, seed: int = 1) -> list[Tensor]:
        """x [B, F, T], a transposed view of windows [B, T, F], and the weights as `flat` orders them."""
        x = randn(self.batch, self.steps, self.features, seed=seed, dtype=F32).to(dtype).transpose(1, 2)
        return [x, *(part.to(dtype) for part in flat(self._blocks(seed)))]

    def grad(self, dtype: torch.dtype = F64, seed: int = 1) -> Tensor:
        """A gradient of the result."""
        shape = (self.batch, self.channels[-1], self.steps) if self.all_steps else (self.batch, self.channels[-1])
        return randn(*shape, seed=seed + 1, dtype=F32).to(dtype)

    def split(self, tensors: Sequence[Tensor]) -> tuple[Tensor, Blocks]:
        """x and the blocks of weights."""
        return tensors[0], like(self._blocks(1), tensors[1:])

    def reference(self, tensors: Sequence[Tensor], **settings: object) -> Tensor:
        """The definition, tap by tap."""
        return oracle(*self.split(tensors), self.dilations, all_steps=self.all_steps, **settings)

    def plain(self, tensors: Sequence[Tensor]) -> Tensor:
        """The same stack by torch's conv1d."""
        return plain(*self.split(tensors), self.dilations, all_steps=self.all_steps)

    def call(self, x: Tensor, blocks: Blocks, **settings: object) -> Tensor:
        """The public function with the settings of this case."""
        return temporal_conv_net(x, blocks, dilations=self.dilations, all_steps=self.all_steps, **settings)

    def operator(self, tensors: Sequence[Tensor], **settings: object) -> Tensor:
        return self.call(*self.split(tensors), **settings)

    def _blocks(self, seed: int) -> Blocks:
        return stack(self.features, self.channels, self.kernel, norm=self.norm, seed=seed, dtype=F32)


STACK_CASES = [
    # Qlib's two settings, with few rows
    StackCase(20, 7, (32,) * 5, 20, 13),
    StackCase(60, 3, (128,) * 5, 6, 5),
    # time: windows shorter and longer than the receptive field, one step, and very long ones
    *(StackCase(T, 3, (16, 16), 5, 7) for T in (1, 2, 3, 5, 12, 13, 14, 61, 250)),
    *(StackCase(T, 3, (16, 16), 5, 7, all_steps=True) for T in (1, 2, 13, 61)),
    StackCase(250, 9, (24,), 3, 3, all_steps=True),
    # kernel sizes
    *(StackCase(19, k, (20, 20), 20, 6) for k in range(1, 10)),
    *(StackCase(19, k, (20, 12), 4, 6, all_steps=True) for k in (1, 2, 4, 9)),
    StackCase(31, (1, 5, 2), (9, 9, 17), 9, 5),
    # widths on both sides of every vector and panel length, widening and narrowing
    *(StackCase(9, 2, (c,), f, 5) for c in (1, 2, 3, 7, 8, 9, 15, 16, 17) for f in sorted({1, c})),
    *(StackCase(9, 2, (c, c), 3, 4) for c in (31, 32, 33, 47, 48, 49, 63, 64, 65, 80, 96, 112, 127, 128, 129)),
    StackCase(5, 3, (256, 256), 256, 4),
    StackCase(7, 3, (1, 40, 3, 66, 2), 5, 6),
    StackCase(7, 3, (40, 1, 3), 158, 6, all_steps=True),
    # rows: none, and every remainder of the tiles
    *(StackCase(8, 3, (16, 16), 4, b) for b in (0, 1, 2, 3, 4, 5, 6, 7, 11, 12, 13, 17, 23, 24, 25, 47, 49, 100)),
    *(StackCase(8, 3, (16, 16), 4, b, all_steps=True) for b in (0, 1, 5, 100)),
    StackCase(6, 2, (8,), 3, 1000),
    # long series of few rows
    *(StackCase(1000, 3, (16, 16), 4, b, all_steps=True) for b in (1, 2)),
    StackCase(1000, 2, (16,) * 5, 16, 1, all_steps=True),
    StackCase(700, 5, (33,), 4, 3, all_steps=True),
    # depth and dilation
    StackCase(40, 2, (10,) * 7, 10, 4),
    StackCase(40, 2, (10,) * 7, 3, 4, all_steps=True),
    StackCase(30, 3, (12, 12, 12), 6, 4, dilations=(1, 3, 9)),
    StackCase(30, 3, (12, 12, 12), 6, 4, dilations=(9, 3, 1)),
    StackCase(30, 4, (12, 12), 6, 4, dilations=(7, 7), all_steps=True),
    StackCase(10, 3, (12, 12), 6, 4, dilations=(1, 100)),
    StackCase(10, 3, (12,), 6, 4, dilations=(2**31 - 1,)),
    # no weight normalisation
    StackCase(20, 7, (32,) * 5, 20, 6, norm=False),
    StackCase(12, 3, (16, 8), 8, 5, norm=False, all_steps=True),
]


@dataclass(frozen=True)
class Exact:
    """float64 result and gradients for float32 inputs of `seed`, and the relative errors of plain torch in float32."""

    seed: int
    values: list[Tensor]
    of_plain: list[float]


@cache
def expected(case: StackCase) -> Exact:
    """Exact results for the first seed with no ReLU input so near 0 that float32 may compute the other sign.

    The sign decides the gradient, so float32 and float64 gradients would rightly differ there. Sums of two
    zeros, from a row that two ReLUs cut off, are 0 in both.
    """
    for seed in range(1, 40):
        tensors, grad = case.inputs(F64, seed), case.grad(F64, seed)
        note: list[Tensor] = []
        with torch.no_grad():
            case.reference(tensors, note=note)
        if all(float(y.abs()[y != 0].min()) > 5e-6 * float(y.std(correction=0)) for y in note if y.any()):
            exact = operator_case.results(case.reference, tensors, grad=grad)
            of_plain = operator_case.results(case.plain, case.inputs(F32, seed), grad=grad.float())
            return Exact(seed, exact, [relative_error(a, b) for a, b in zip(of_plain, exact, strict=True)])
    raise AssertionError(f"no seed for {case}")


@st.composite
def stacks(draw: st.DrawFn) -> tuple[StackCase, str, float]:
    depth = draw(st.integers(1, 4))
    widths = tuple(draw(st.lists(st.integers(1, 40), min_size=depth, max_size=depth)))
    if draw(st.booleans()):
        widths = widths[:1] * depth
    kernels = tuple(draw(st.lists(st.integers(1, 9), min_size=depth, max_size=depth)))
    dilations = draw(st.none() | st.lists(st.integers(1, 12), min_size=depth, max_size=depth).map(tuple))
    case = StackCase(
        draw(st.integers(1, 30)),
        kernels,
        widths,
        draw(st.sampled_from([widths[0], 1, 2, 3, 5, 20])),
        draw(st.integers(0, 30)),
        draw(st.booleans()),
        draw(st.booleans()),
        dilations,
    )
    return case, draw(st.sampled_from(sorted(LAYOUTS))), draw(st.sampled_from([0.0, 0.0, 0.3, 0.9]))


def nan_like(x: Tensor) -> Tensor:
    return torch.full_like(x, torch.nan)


# Layouts of [B, F, T]: the same numbers at different places in memory, with NaN between them.
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
