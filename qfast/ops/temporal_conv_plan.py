"""Which positions and taps of a causal convolution stack can reach its last step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from qfast.errors import ConfigError, whole_number

__all__ = ["BlockPlan", "Plan", "plan"]


class BlockPlan(NamedTuple):
    """One residual block: two convolutions of the same dilation.

    Attributes
    ----------
    kernel_size, dilation : int
    output, between, input : tuple of int
        Time positions (ascending, the last step is T - 1) that are computed of the block's output and of what
        stands between its convolutions, and those that are read of its input.
    taps : (int, int)
        Pairs of a computed position and a tap inside the window, first and second convolution: a tap of all
        batch rows is one product of [B, C_in] and [C_in, C_out].
    """

    kernel_size: int
    dilation: int
    output: tuple[int, ...]
    between: tuple[int, ...]
    input: tuple[int, ...]
    taps: tuple[int, int]


@dataclass(frozen=True)
class Plan:
    """The cone of a stack of residual blocks, first block first.

    Attributes
    ----------
    steps : int
        T, the length of the window.
    blocks : tuple of BlockPlan
    """

    steps: int
    blocks: tuple[BlockPlan, ...]

    @property
    def receptive_field(self) -> int:
        """Steps back from the last one, itself included, that can reach it in a window that is long enough."""
        return 1 + sum(2 * (block.kernel_size - 1) * block.dilation for block in self.blocks)

    def multiply_adds(self, features: int, channels: Sequence[int]) -> tuple[int, int, int]:
        """Multiplications per window of the convolutions: needed, for all T outputs, and with symmetric padding.

        The last is what torch.nn.Conv1d with padding (k - 1) * dilation on both sides computes before its outputs
        beyond T are cut off, as the reference does. The 1x1 convolution where widths differ is counted.

        >>> needed, dense, padded = plan(60, 3, 5).multiply_adds(6, [128] * 5)
        >>> round(dense / needed, 1), round(padded / needed, 1)
        (4.8, 5.9)
        """
        if len(channels) != len(self.blocks):
            raise ConfigError(f"channels: expected one number per block ({len(self.blocks)}), got {len(channels)}.")
        needed = dense = padded = 0
        before = features
        for block, width in zip(self.blocks, channels, strict=True):
            per_tap = (before * width, width * width)
            needed += sum(count * cost for count, cost in zip(block.taps, per_tap, strict=True))
            dense += self.steps * block.kernel_size * sum(per_tap)
            padded += (self.steps + (block.kernel_size - 1) * block.dilation) * block.kernel_size * sum(per_tap)
            if before != width:
                needed += len(block.output) * before * width
                dense += self.steps * before * width
                padded += self.steps * before * width
            before = width
        return needed, dense, padded

    def __str__(self) -> str:
        lines = [f"{'block':>5} {'dilation':>8} {'output':>7} {'between':>7} {'input':>7} {'taps':>11} {'of':>11}"]
        of = total = 0
        for number, block in enumerate(self.blocks):
            dense = self.steps * block.kernel_size
            taps = f"{block.taps[0]} + {block.taps[1]}"
            sizes = f"{len(block.output):>7} {len(block.between):>7} {len(block.input):>7}"
            lines.append(f"{number:>5} {block.dilation:>8} {sizes} {taps:>11} {f'{dense} + {dense}':>11}")
            total += sum(block.taps)
            of += 2 * dense
        lines.append(
            f"T = {self.steps}, receptive field {self.receptive_field}: {total} of {of} taps, {of / total:.1f}x less"
        )
        return "\n".join(lines)


def plan(T: int, kernel_size: int | Sequence[int], layers: int | Sequence[int], *, all_steps: bool = False) -> Plan:
    """Positions and taps of each block that the last step of a window can see.

    Walks back from position T - 1: a convolution's output at p reads p, p - d, ..., p - (k - 1) d. Taps before
    position 0 read zeros and cost nothing; a block's output also reads its input at the same position.

    Parameters
    ----------
    T : int
        Steps of the window, from 1.
    kernel_size : int, or one for each block
    layers : int, or the dilation of each block
        A number of blocks has the dilations 1, 2, 4, ...
    all_steps : bool
        The plan where every step of the last block is wanted.

    Returns
    -------
    Plan
        Print it.

    Raises
    ------
    ConfigError
        Something is not a whole number above 0.

    Examples
    --------
    >>> print(plan(20, 7, 5))
    block dilation  output between   input        taps          of
        0        1      10      20      20    119 + 61   140 + 140
        1        2       5      10      10     49 + 26   140 + 140
        2        4       3       5       5      15 + 9   140 + 140
        3        8       2       3       3       6 + 4   140 + 140
        4       16       1       2       2       3 + 2   140 + 140
    T = 20, receptive field 373: 294 of 1400 taps, 4.8x less
    """
    whole_number("T", T)
    dilations = list(layers) if isinstance(layers, Sequence) else [2**i for i in range(whole_number("layers", layers))]
    count = whole_number("layers", len(dilations))
    kernels = list(kernel_size) if isinstance(kernel_size, Sequence) else [kernel_size] * count
    if len(kernels) != count:
        raise ConfigError(f"kernel_size: expected one number per block ({count}), got {len(kernels)}.")
    for size in kernels:
        whole_number("kernel_size", size)
    for dilation in dilations:
        whole_number("dilation", dilation)
    return cone(T, tuple(kernels), tuple(dilations), all_steps)


@lru_cache(maxsize=256)
def cone(steps: int, kernels: tuple[int, ...], dilations: tuple[int, ...], all_steps: bool) -> Plan:
    """`plan` once its arguments are checked."""
    wanted: tuple[int, ...] = tuple(range(steps)) if all_steps else (steps - 1,)
    blocks: list[BlockPlan] = []
    for size, dilation in zip(reversed(kernels), reversed(dilations), strict=True):
        between, second = _read_by(wanted, size, dilation)
        read, first = _read_by(between, size, dilation)
        inputs = tuple(sorted({*read, *wanted}))
        blocks.append(BlockPlan(size, dilation, wanted, between, inputs, (first, second)))
        wanted = inputs
    return Plan(steps, tuple(reversed(blocks)))


def _read_by(outputs: tuple[int, ...], kernel_size: int, dilation: int) -> tuple[tuple[int, ...], int]:
    """Positions that a convolution reads for these outputs, and its taps inside the window."""
    reads = [p - j * dilation for p in outputs for j in range(min(kernel_size, p // dilation + 1))]
    return tuple(sorted(set(reads))), len(reads)
