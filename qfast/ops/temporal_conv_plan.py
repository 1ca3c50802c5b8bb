"""The positions and taps of a causal convolution stack that its last step depends on."""

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
        Time positions, ascending up to T - 1, at which the block's output and the tensor between its convolutions are
        computed, and at which its input is read.
    taps : (int, int)
        Number of pairs of a computed position and a tap inside the window, for both convolutions. A pair costs one
        product of [B, C_in] and [C_in, C_out].
    """

    kernel_size: int
    dilation: int
    output: tuple[int, ...]
    between: tuple[int, ...]
    input: tuple[int, ...]
    taps: tuple[int, int]


@dataclass(frozen=True)
class Plan:
    """The positions that a stack of residual blocks computes.

    Attributes
    ----------
    steps : int
        T, the length of the window.
    blocks : tuple of BlockPlan
        From the input to the output.
    """

    steps: int
    blocks: tuple[BlockPlan, ...]

    @property
    def receptive_field(self) -> int:
        """Number of steps that the last one depends on in a long window, the last one included."""
        return 1 + sum(2 * (block.kernel_size - 1) * block.dilation for block in self.blocks)

    def multiply_adds(self, features: int, channels: Sequence[int]) -> tuple[int, int, int]:
        """Return the multiply-adds of the convolutions per window in three implementations.

        Parameters
        ----------
        features : int
            F, the width of the first block's input.
        channels : sequence of int
            Output width of each block.

        Returns
        -------
        (int, int, int)
            For this plan; for all T outputs of every block; and with torch.nn.Conv1d padded by (k - 1) * dilation on
            both sides, whose outputs beyond T are discarded, as in Qlib. All include the 1x1 convolutions.

        Raises
        ------
        ConfigError
            The number of channels is not the number of blocks.

        Examples
        --------
        >>> needed, dense, padded = plan(60, 3, 5).multiply_adds(6, [128] * 5)
        >>> round(dense / needed, 1), round(padded / needed, 1)
        (4.8, 5.9)
        """
        if len(channels) != len(self.blocks):
            raise ConfigError(f"channels: expected one number per block ({len(self.blocks)}), got {len(channels)}.")
        needed = dense = padded = 0
        input_width = features
        for block, width in zip(self.blocks, channels, strict=True):
            per_tap = (input_width * width, width * width)
            needed += sum(count * cost for count, cost in zip(block.taps, per_tap, strict=True))
            dense += self.steps * block.kernel_size * sum(per_tap)
            padded += (self.steps + (block.kernel_size - 1) * block.dilation) * block.kernel_size * sum(per_tap)
            if input_width != width:
                needed += len(block.output) * input_width * width
                dense += self.steps * input_width * width
                padded += self.steps * input_width * width
            input_width = width
        return needed, dense, padded

    def __str__(self) -> str:
        lines = [f"{'block':>5} {'dilation':>8} {'output':>7} {'between':>7} {'input':>7} {'taps':>11} {'of':>11}"]
        dense_total = total = 0
        for number, block in enumerate(self.blocks):
            dense = self.steps * block.kernel_size
            taps = f"{block.taps[0]} + {block.taps[1]}"
            sizes = f"{len(block.output):>7} {len(block.between):>7} {len(block.input):>7}"
            lines.append(f"{number:>5} {block.dilation:>8} {sizes} {taps:>11} {f'{dense} + {dense}':>11}")
            total += sum(block.taps)
            dense_total += 2 * dense
        lines.append(
            f"T = {self.steps}, receptive field {self.receptive_field}: {total} of {dense_total} taps, "
            f"{dense_total / total:.1f}x less"
        )
        return "\n".join(lines)


def plan(T: int, kernel_size: int | Sequence[int], layers: int | Sequence[int], *, all_steps: bool = False) -> Plan:
    """Return the positions and taps of each block that the last step of a window depends on.

    A convolution's output at position p reads p, p - d, ..., p - (k - 1) d for dilation d. Taps before position 0 read
    zeros and are not counted. A block's output also reads its input at the same position.

    Parameters
    ----------
    T : int
        Length of the window, at least 1.
    kernel_size : int or sequence of int
        One for all blocks, or one for each block.
    layers : int or sequence of int
        The number of blocks, with dilations 1, 2, 4, ..., or the dilation of each block.
    all_steps : bool
        Plan for all steps of the last block, not only for the last one.

    Returns
    -------
    Plan
        `print(plan)` shows a table.

    Raises
    ------
    ConfigError
        An argument is not a whole number above 0, or the number of kernel sizes is not the number of blocks.

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
    """Return the plan for checked arguments; see `plan`."""
    outputs: tuple[int, ...] = tuple(range(steps)) if all_steps else (steps - 1,)
    blocks: list[BlockPlan] = []
    for size, dilation in zip(reversed(kernels), reversed(dilations), strict=True):
        between, second_taps = _positions_read(outputs, size, dilation)
        read, first_taps = _positions_read(between, size, dilation)
        inputs = tuple(sorted({*read, *outputs}))
        blocks.append(BlockPlan(size, dilation, outputs, between, inputs, (first_taps, second_taps)))
        outputs = inputs
    return Plan(steps, tuple(reversed(blocks)))


def _positions_read(outputs: tuple[int, ...], kernel_size: int, dilation: int) -> tuple[tuple[int, ...], int]:
    """Return the positions that a convolution reads for these outputs, and the number of its taps in the window."""
    reads = [p - j * dilation for p in outputs for j in range(min(kernel_size, p // dilation + 1))]
    return tuple(sorted(set(reads))), len(reads)
