"""The cone of a temporal convolution stack, in Python and in the kernels' header, compared with gradients."""

from __future__ import annotations

import shutil
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from qfast.ops import temporal_conv_net
from qfast.ops.temporal_conv_plan import Plan
from support.temporal_conv import causal

ROOT = Path(__file__).resolve().parents[1]

STACKS = st.tuples(
    st.integers(1, 40),
    st.lists(st.tuples(st.integers(1, 6), st.integers(1, 12)), min_size=1, max_size=4),
    st.booleans(),
)
Stack = tuple[int, list[tuple[int, int]], bool]


def of(stack: Stack) -> Plan:
    steps, blocks, all_steps = stack
    kernels, dilations = zip(*blocks, strict=True)
    return temporal_conv_net.plan(steps, list(kernels), list(dilations), all_steps=all_steps)


def reached(stack: Stack) -> list[tuple[list[int], list[int], list[int]]]:
    """Steps of each block's input, middle and output that have a gradient, if all values are positive."""
    steps, blocks, all_steps = stack
    x = torch.ones(1, 1, steps, dtype=torch.float64, requires_grad=True)
    states: list[list[Tensor]] = []
    for kernel, dilation in blocks:
        weight, bias = torch.ones(1, 1, kernel).double(), torch.zeros(1).double()
        between = causal(x, weight, bias, dilation)
        out = causal(between, weight, bias, dilation) + x
        states.append([x, between, out])
        for state in states[-1]:
            state.retain_grad()
        x = out
    (x.sum() if all_steps else x[0, 0, -1]).backward()
    return [tuple(state.grad[0, 0].nonzero().flatten().tolist() for state in states_of) for states_of in states]


@settings(max_examples=150, deadline=None)
@given(STACKS)
@example((1, [(1, 1)], False))
@example((20, [(7, 1), (7, 2), (7, 4), (7, 8), (7, 16)], False))
@example((10, [(3, 100)], False))
def test_positions_are_those_a_gradient_reaches(stack: Stack) -> None:
    plan = of(stack)
    for block, (given_in, between, out) in zip(plan.blocks, reached(stack), strict=True):
        assert (list(block.input), list(block.between), list(block.output)) == (given_in, between, out)
    for before, after in pairwise(plan.blocks):
        assert before.output == after.input


@settings(max_examples=100, deadline=None)
@given(STACKS)
def test_taps_are_the_products_inside_the_window(stack: Stack) -> None:
    for block in of(stack).blocks:
        for number, outputs in enumerate((block.between, block.output)):
            pairs = [(t, j) for t in outputs for j in range(block.kernel_size) if t - j * block.dilation >= 0]
            assert block.taps[number] == len(pairs)


@settings(max_examples=60, deadline=None)
@given(STACKS, st.integers(1, 5), st.lists(st.integers(1, 5), min_size=4, max_size=4))
def test_multiply_adds(stack: Stack, features: int, widths: list[int]) -> None:
    steps, blocks, _ = stack
    plan = of(stack)
    needed, dense, padded = plan.multiply_adds(features, widths[: len(blocks)])
    before, sums = features, [0, 0, 0]
    for block, width in zip(plan.blocks, widths, strict=False):
        reach = (block.kernel_size - 1) * block.dilation
        for taps, rows in zip(block.taps, (before, width), strict=True):
            sums[0] += taps * rows * width
            sums[1] += steps * block.kernel_size * rows * width
            sums[2] += (steps + reach) * block.kernel_size * rows * width
        if before != width:
            for i, count in enumerate((len(block.output), steps, steps)):
                sums[i] += count * before * width
        before = width
    assert [needed, dense, padded] == sums
    assert needed <= dense <= padded


def test_qlibs_settings() -> None:
    """The share of the module's work that Qlib's Alpha158 and Alpha360 settings need."""
    for steps, kernel, features, width, expected in ((20, 7, 20, 32, (5.3, 15.4)), (60, 3, 6, 128, (4.8, 5.9))):
        plan = temporal_conv_net.plan(steps, kernel, 5)
        needed, dense, padded = plan.multiply_adds(features, [width] * 5)
        assert (round(dense / needed, 1), round(padded / needed, 1)) == expected
    sizes = [(len(b.output), len(b.between), len(b.input)) for b in temporal_conv_net.plan(60, 3, 5).blocks]
    assert sizes == [(30, 60, 60), (15, 30, 30), (8, 15, 15), (4, 8, 8), (1, 3, 4)]


def test_receptive_field_and_text() -> None:
    plan = temporal_conv_net.plan(100, 3, 2)
    assert plan.receptive_field == 13
    assert plan.blocks[0].input == tuple(range(87, 100))
    assert temporal_conv_net.plan(5, [2, 4], [3, 5]).receptive_field == 1 + 2 * 3 + 2 * 3 * 5
    lines = str(plan).splitlines()
    assert len(lines) == 1 + 2 + 1
    assert lines[-1].startswith("T = 100, receptive field 13: ")
    assert lines[-1].endswith(f"{2 * 2 * 300 / sum(sum(b.taps) for b in plan.blocks):.1f}x less")
    assert len(temporal_conv_net.plan(1, 1, 1).blocks) == 1


def test_refusals() -> None:
    plan = temporal_conv_net.plan
    for arguments, name in (
        ((0, 3, 2), "T"),
        ((5, 0, 2), "kernel_size"),
        ((5, 3, 0), "layers"),
        ((5, 3, [1, 0]), "dilation"),
    ):
        with pytest.raises(ValueError, match=rf"{name}\b.*0"):
            plan(*arguments)
    with pytest.raises(ValueError, match=r"layers\b.*0"):
        plan(5, 3, [])
    with pytest.raises(ValueError, match=r"kernel_size: expected one number per block \(2\), got 3"):
        plan(5, [3, 3, 3], 2)
    with pytest.raises(ValueError, match=r"T\b.*2\.5"):
        plan(2.5, 3, 2)
    with pytest.raises(ValueError, match=r"channels: expected one number per block \(2\), got 1"):
        plan(5, 3, 2).multiply_adds(3, [4])


PROGRAM = r"""
#include <cstdio>
#include "temporal_conv/temporal_conv_plan.h"
using namespace qfast;
static void print(const char* name, const Positions& numbers) {
  std::printf("%s", name);
  for (const auto n : numbers) std::printf(" %d", n);
  std::printf("\n");
}
static void print(const char* name, const TapLists& lists) {
  std::printf("%s", name);
  for (std::int64_t slot = 0; slot < lists.slots(); ++slot)
    for (std::int32_t i = lists.begin[slot]; i < lists.begin[slot + 1]; ++i)
      std::printf(" %d:%d:%d", static_cast<int>(slot), lists.taps[i].tap, lists.taps[i].slot);
  std::printf("\n");
}
int main() {
  long long steps, all_steps, count;
  while (std::scanf("%lld %lld %lld", &steps, &all_steps, &count) == 3) {
    std::vector<std::int64_t> kernels(count), dilations(count);
    for (auto* list : {&kernels, &dilations})
      for (auto& n : *list) {
        long long value;
        if (std::scanf("%lld", &value) != 1) return 1;
        n = value;
      }
    for (const BlockPlan& block : plan_blocks(steps, kernels, dilations, all_steps != 0)) {
      print("input", block.input);
      print("between", block.between);
      print("output", block.output);
      print("residual", block.residual);
      print("residual_of", block.residual_of);
      print("first", block.first.reads);
      print("first_by", block.first.read_by);
      print("second", block.second.reads);
      print("second_by", block.second.read_by);
    }
  }
}
"""
HEADER_STACKS: list[Stack] = [
    (1, [(1, 1)], False),
    (1, [(5, 3)], True),
    (20, [(7, 1), (7, 2), (7, 4), (7, 8), (7, 16)], False),
    (60, [(3, 1), (3, 2), (3, 4), (3, 8), (3, 16)], False),
    (60, [(3, 1), (3, 2), (3, 4), (3, 8), (3, 16)], True),
    (40, [(2, 5), (4, 3), (1, 9)], False),
    (40, [(3, 1), (2, 1)], False),  # longer than the receptive field
    (9, [(9, 2**31 - 1), (2, 4)], False),
    (250, [(9, 1), (9, 2), (9, 4)], True),
]


def tables(stack: Stack) -> list[str]:
    """The expected output of the program, from the plan in Python."""
    steps, _, all_steps = stack
    lines: list[str] = []
    for number, block in enumerate(of(stack).blocks):
        inputs = list(range(steps)) if number == 0 else list(block.input)
        outputs = list(block.output)
        assert not all_steps or outputs == list(range(steps))
        lines += [
            f"{name}{''.join(f' {p}' for p in list_)}"
            for name, list_ in (
                ("input", inputs),
                ("between", block.between),
                ("output", outputs),
                ("residual", [inputs.index(p) for p in outputs]),
                ("residual_of", [outputs.index(p) if p in outputs else -1 for p in inputs]),
            )
        ]
        for name, read, written in (("first", inputs, block.between), ("second", block.between, outputs)):
            taps = [(tap, (block.kernel_size - 1 - tap) * block.dilation) for tap in range(block.kernel_size)]
            reads = [
                f" {o}:{tap}:{list(read).index(p - back)}"
                for o, p in enumerate(written)
                for tap, back in taps
                if p - back >= 0
            ]
            by = [
                f" {i}:{tap}:{list(written).index(p + back)}"
                for i, p in enumerate(read)
                for tap, back in taps
                if p + back in written
            ]
            lines += [name + "".join(reads), name + "_by" + "".join(by)]
    return lines


def test_the_header_that_kernels_share(tmp_path: Path) -> None:
    """csrc/temporal_conv/temporal_conv_plan.h alone, whose tables the kernels walk, forward and backward."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    (tmp_path / "main.cpp").write_text(PROGRAM)
    command = [compiler, "-std=c++20", "-Wall", "-Wextra", "-Werror", "-I", str(ROOT / "csrc"), "main.cpp", "-o", "run"]
    subprocess.run(command, cwd=tmp_path, check=True)
    lines = []
    for steps, blocks, all_steps in HEADER_STACKS:
        kernels, dilations = zip(*blocks, strict=True)
        lines.append(" ".join(map(str, (steps, int(all_steps), len(blocks), *kernels, *dilations))))
    given_to = "\n".join(lines)
    printed = subprocess.run([str(tmp_path / "run")], input=given_to, capture_output=True, text=True, check=True).stdout
    assert printed.splitlines() == [line for stack in HEADER_STACKS for line in tables(stack)]
