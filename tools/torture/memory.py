"""Thousands of calls of each entry point: the process must not grow."""

from __future__ import annotations

import gc
import random
from collections import Counter
from pathlib import Path

import torch

from support.operator_case import F32, results
from torture.operator_cases import OPERATORS, build, make_inputs
from torture.protocol import Case, Part, require, resident_bytes

CALLS = 10_000
WARM_CALLS = 500
PART_CALLS = 500  # between two measurements
GROWTH_BYTES = 4 << 20  # less than a leak of 512 bytes per call adds
SMALL = {
    "steps": 3,
    "batch": 5,
    "features": 4,
    "hidden": 6,
    "layers": 1,
    "layout": "plain",
    "instruments": 3,
    "dates": 9,
    "columns_all": 4,
    "windows": 5,
    "channels": 4,
    "kernel": 3,
    "width": 6,
    "heads": 2,
    "days": [3, 4],
    "shape": [3, 5],
    "lead": [4],
    "shapes": [[3, 4], [5]],
}
_order = sorted(OPERATORS)


def draw(rng: random.Random, number: int) -> Case:
    """Small sizes of one operator. The operators take turns."""
    name = _order[number % len(_order)]
    sizes = OPERATORS[name].draw(rng)
    sizes |= {key: SMALL[key] for key in sizes.keys() & SMALL.keys()}
    if name == "temporal_conv_net":
        sizes |= {"kernel": [3], "channels": [4], "dilations": None}
    if name == "gather_windows":
        sizes |= {"columns": None, "layout": "BTD"}
    return {"operator": name, "sizes": sizes, "data": 0, "calls": CALLS}


def check(case: Case, folder: Path) -> Counter[str]:
    """Call forward and backward, and compare the memory with that after the first calls."""
    torch.set_num_threads(1)
    _, operator_case = build(case)
    inputs = make_inputs(operator_case, F32, 0)
    sizes = []
    for number in range(case["calls"]):
        results(operator_case.operator, inputs)
        if number >= WARM_CALLS and number % PART_CALLS == 0:
            gc.collect()
            sizes.append(resident_bytes())
    half = len(sizes) // 2
    growth = min(sizes[half:]) - min(sizes[:half])  # a leak raises every later measurement
    require(growth < GROWTH_BYTES, f"{case['calls']} calls of {case['operator']} have added {growth:,} bytes: {sizes}")
    return Counter({"calls": case["calls"], case["operator"]: case["calls"]})


PART = Part(draw, check, unit="calls", seconds=600.0, share=0.15)
__all__ = ["PART", "check", "draw"]
