"""Philox 4x32-10 in plain torch and in C++, compared with the published vectors and with 64-bit arithmetic."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from qfast.ops import attention_pool, encoder_layer, feed_forward, gru, lstm, temporal_conv_net
from qfast.ops.philox import draw_seed, keep_threshold, philox
from support.tensors import fix_dropout_seed, philox_words, randn

ROOT = Path(__file__).resolve().parents[1]
WORD = st.integers(0, 2**32 - 1)

# Random123's known-answer tests of philox4x32 with 10 rounds: counter, key, words.
PUBLISHED = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def numbers(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def seed_of(low: int, high: int) -> int:
    """The key as torch's signed 64-bit number."""
    return (low | high << 32) - (1 << 64 if high >> 31 else 0)


def in_torch(seed: int, counter: list[int]) -> list[int]:
    words = philox(torch.tensor([seed]), tuple(torch.tensor([word]) for word in counter))
    return [int(word) for word in words]


@pytest.mark.parametrize(("counter", "key", "words"), PUBLISHED)
def test_published_vectors(counter: str, key: str, words: str) -> None:
    seed = seed_of(*numbers(key))
    assert in_torch(seed, numbers(counter)) == numbers(words)
    assert [int(word) for word in philox_words(seed, numbers(counter))] == numbers(
        words
    )  # the implementation of the tests


@given(WORD, WORD, WORD, WORD, WORD, WORD)
def test_any_counter_and_key(c0: int, c1: int, c2: int, c3: int, low: int, high: int) -> None:
    seed, counter = seed_of(low, high), [c0, c1, c2, c3]
    assert in_torch(seed, counter) == [int(word) for word in philox_words(seed, counter)]


def test_counters_broadcast() -> None:
    c, t = torch.arange(3).view(1, 3, 1), torch.arange(5)
    words = philox(torch.tensor([9]), (c, t, torch.tensor(2), torch.arange(4).view(4, 1, 1)))
    assert [word.shape for word in words] == [(4, 3, 5)] * 4
    assert in_torch(9, [2, 4, 2, 3]) == [int(word[3, 2, 4]) for word in words]
    assert all(int(word.min()) >= 0 and int(word.max()) < 2**32 for word in words)


def test_rounds_change_every_bit() -> None:
    """Flipping any bit of counter or key flips about half of the 128 bits."""
    base, seed = [3, 1, 4, 1], 0x5DEECE66D
    words = np.array(in_torch(seed, base))
    for bit in range(192):
        counter, key = list(base), seed
        if bit < 128:
            counter[bit // 32] ^= 1 << bit % 32
        else:
            key = seed_of(*((seed ^ 1 << bit - 128) >> shift & 0xFFFFFFFF for shift in (0, 32)))
        flipped = sum(int(word).bit_count() for word in words ^ np.array(in_torch(key, counter)))
        assert 30 < flipped < 98, bit


def test_seeds_come_from_torchs_generator() -> None:
    torch.manual_seed(3)
    first, second = draw_seed(torch.device("cpu")), draw_seed(torch.device("cpu"))
    assert (first.dtype, first.shape, first.device.type) == (torch.int64, (1,), "cpu")
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(draw_seed(torch.device("cpu")), first)
    drawn = torch.cat([draw_seed(torch.device("cpu")) for _ in range(500)])
    assert len(drawn.unique()) == 500
    high = (drawn >> 62) & 1  # the key's upper half is used as well
    assert 180 < int(high.sum()) < 320


def test_threshold() -> None:
    assert [keep_threshold(p) for p in (0.0, 0.5, 1.0)] == [0, 2**31, 2**32]
    assert keep_threshold(1e-12) == 0
    assert keep_threshold(0.3) == round(0.3 * 2**32)


PROGRAM = """
#include <cstdint>
#include <cstdio>
#define QFAST_DEVICE_INLINE inline
#include "philox.h"
int main() {
  unsigned long long seed;
  unsigned c[4];
  while (std::scanf("%llu %u %u %u %u", &seed, c, c + 1, c + 2, c + 3) == 5) {
    const PhiloxWords words = philox(seed, c[0], c[1], c[2], c[3]);
    std::printf("%u %u %u %u\\n", words.word[0], words.word[1], words.word[2], words.word[3]);
  }
}
"""


def test_the_header_that_kernels_share(tmp_path: Path) -> None:
    """csrc/philox.h alone, which every CPU instruction set and CUDA include."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    (tmp_path / "main.cpp").write_text(PROGRAM)
    command = [compiler, "-std=c++20", "-Wall", "-Wextra", "-Werror", "-I", str(ROOT / "csrc"), "main.cpp", "-o", "run"]
    subprocess.run(command, cwd=tmp_path, check=True)
    rng = np.random.default_rng(0)
    seeds = [0, 1, 2**63, 2**64 - 1, *(int(s) for s in rng.integers(0, 2**63, 200))]
    counters = [[int(w) for w in rng.integers(0, 2**32, 4)] for _ in seeds]
    given_to = "\n".join(f"{seed} {' '.join(map(str, c))}" for seed, c in zip(seeds, counters, strict=True))
    printed = subprocess.run([str(tmp_path / "run")], input=given_to, capture_output=True, text=True, check=True).stdout
    result = [[int(word) for word in line.split()] for line in printed.splitlines()]
    assert result == [[int(w) for w in philox_words(s, c)] for s, c in zip(seeds, counters, strict=True)]


def test_the_tests_of_two_devices_can_fix_the_seed_of_every_operator(monkeypatch):
    """No operator draws its seed in a way that `fix_dropout_seed` misses."""
    dropout = {"dropout": 0.5, "training": True}
    encoder, cells = nn.TransformerEncoderLayer(8, 2, 16), [nn.LSTM(8, 6, 2), nn.GRU(8, 6, 2)]
    layers = [[list(cell.parameters())[i : i + 4] for i in (0, 4)] for cell in cells]
    block = [randn(8, 8, 3, dtype=torch.float32), None, torch.zeros(8)] * 2
    block = [block[0], None, block[2], block[3], None, block[5]]
    matrix = randn(8, 8, dtype=torch.float32)
    calls = [
        lambda x: lstm(x, layers[0], **dropout)[0],
        lambda x: gru(x, layers[1], **dropout)[0],
        lambda x: attention_pool(x, matrix, matrix[0], matrix[1], **dropout),
        lambda x: feed_forward(x, matrix, matrix[0], matrix, matrix[1], **dropout),
        lambda x: encoder_layer(x, list(encoder.parameters()), heads=2, **dropout),
        lambda x: temporal_conv_net(x, [block], **dropout),
    ]
    x = randn(9, 8, 8, dtype=torch.float32)
    assert not any(torch.equal(call(x), call(x)) for call in calls)  # each call draws another seed
    fix_dropout_seed(monkeypatch)
    assert all(torch.equal(call(x), call(x)) for call in calls)
