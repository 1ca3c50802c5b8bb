"""What a part of the torture test consists of, and the helpers that all parts share."""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

Case = dict[str, Any]  # plain JSON values, so a case can be stored and run again
T = TypeVar("T")


class Fault(AssertionError):
    """A case has shown a fault. The message describes it."""


class Part(NamedTuple):
    """A source of cases and the function that runs one of them.

    Attributes
    ----------
    draw : callable
        Draws the case with a number. Equal generators and numbers draw equal cases.
    check : callable
        Runs a case, with an empty folder for its files, and returns what it has counted, for example {"kills": 3}. Any
        exception is a fault.
    unit : str
        The count by which the report measures the part.
    seconds : float
        A case that needs more time is a fault.
    share : float
        Share of the time of all parts.
    """

    draw: Callable[[random.Random, int], Case]
    check: Callable[[Case, Path], Counter[str]]
    unit: str
    seconds: float
    share: float


def choose(rng: random.Random, weights: Mapping[T, float]) -> T:
    """Draw a key with the probability of its weight."""
    return rng.choices(list(weights), list(weights.values()))[0]


def size(rng: random.Random, low: int, high: int) -> int:
    """Draw a size from `low` to `high`: small sizes and sizes next to multiples of vectors are most frequent."""
    kind = rng.random()
    if kind < 0.3:
        return rng.randint(low, min(high, max(low, 4)))
    if kind < 0.7:
        near = rng.choice([4, 8, 16, 24, 32, 48, 64, 128]) + rng.randint(-1, 1)
        return min(max(near, low), high)
    return rng.randint(low, high)


def resident_bytes() -> int:
    """Memory of this process in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def require(condition: bool, message: str) -> None:
    """Raise Fault with `message` unless `condition` is true."""
    if not condition:
        raise Fault(message)
