"""Insufficient memory in every public operator: the error states the operator, the size, the device and a remedy."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from qfast import ops
from qfast.device import explain_out_of_memory, memory_shortage
from qfast.errors import DataError
from qfast.ops._common import explain_memory

ROWS = 2**50  # float32 values that no address space contains
ZERO = torch.zeros(1)
WEIGHTS = {kind: [list(kind(3, 4).parameters())] for kind in (nn.LSTM, nn.GRU)}
INDEX = ops.build_window_index([0, 0, 0, 1], [0, 1, 2, 2])
LAST = torch.tensor([2]).expand(ROWS)

FORWARD = {
    "additive_attention": lambda: ops.additive_attention(
        *(ZERO.expand(2**30) for _ in range(2)), ZERO.expand(2**30, 2**22)
    ),
    "attention_pool": lambda: ops.attention_pool(ZERO.expand(ROWS, 2, 4), torch.zeros(3, 4), *torch.zeros(2, 3)),
    "build_window_index": lambda: ops.build_window_index(
        *(np.broadcast_to(np.int32(0), (ROWS,)) for _ in range(2)),
    ),
    "encoder_layer": lambda: ops.encoder_layer(
        ZERO.expand(2**30, 2**22, 4), list(nn.TransformerEncoderLayer(4, 2, 8).parameters()), heads=2
    ),
    "feed_forward": lambda: ops.feed_forward(
        ZERO.expand(ROWS, 4), torch.zeros(5, 4), torch.zeros(5), torch.zeros(4, 5), torch.zeros(4)
    ),
    "gather_windows": lambda: ops.gather_windows(torch.zeros(4, 2), INDEX, LAST, 2),
    "graph_attention": lambda: ops.graph_attention(ZERO.expand(2**30, 2**22), ZERO.expand(2, 2**22), torch.zeros(2)),
    "gru": lambda: ops.gru(ZERO.expand(ROWS, 2, 3), WEIGHTS[nn.GRU]),
    "lstm": lambda: ops.lstm(ZERO.expand(ROWS, 2, 3), WEIGHTS[nn.LSTM]),
    "price_windows": lambda: ops.price_windows(
        torch.zeros(1, 3), INDEX.position[:3], torch.zeros(1, 3), torch.tensor([0]), LAST, torch.zeros(0, 4, 1), 1
    ),
    "linear_tanh": lambda: ops.linear_tanh(ZERO.expand(ROWS, 2, 4), torch.zeros(3, 4), torch.zeros(3)),
    "tanh": lambda: ops.tanh(ZERO.expand(ROWS)),
    "temporal_conv_net": lambda: ops.temporal_conv_net(
        ZERO.expand(ROWS, 4, 5), [(torch.zeros(4, 4, 2), None, torch.zeros(4)) * 2]
    ),
    "window_conv": lambda: ops.window_conv(ZERO.expand(ROWS, 2, 4), torch.zeros(4, 4, 3), torch.zeros(4)),
    "window_rows": lambda: ops.window_rows(INDEX, LAST, 2),
}
MESSAGE = r"{}: (no memory for [\d,.]+ MiB on cpu|Unable to allocate [\d.]+ PiB).*\. Remedy: [a-z].*\.$"


def test_every_operator_has_a_case():
    functions = {name for name in ops.__all__ if name[0].islower()}
    assert functions - {"clipped_adam_", "temporal_block"} == FORWARD.keys()  # the first copies nothing, below
    assert set(BACKWARD) == {*FORWARD, "clipped_adam_"} - {"build_window_index", "price_windows", "window_rows"}


@pytest.mark.parametrize("name", FORWARD)
def test_a_result_that_does_not_fit(name):
    with pytest.raises(torch.OutOfMemoryError, match=MESSAGE.format(name)):
        FORWARD[name]()


def test_a_result_with_more_elements_than_an_index_can_count():
    x = ZERO.expand(2**40, 2**20, 1)
    with pytest.raises(torch.OutOfMemoryError, match=MESSAGE.format("window_conv")):
        ops.window_conv(x, torch.zeros(16, 1, 3), torch.zeros(16))


@pytest.mark.parametrize("name", ["feed_forward", "gru", "attention_pool"])
def test_half_precision(name, monkeypatch):
    monkeypatch.setitem(globals(), "ZERO", torch.zeros(1, dtype=torch.bfloat16))
    with pytest.raises(torch.OutOfMemoryError, match=rf"{name}: no memory for .* Remedy: fewer rows per call\.$"):
        FORWARD[name]()


# Each script makes `call`, which needs 48 MiB or more.
ROOM = "x = torch.randn(2**20, {}, requires_grad=True)\n"
CELL = ROOM.format("2, 6") + "out = ops.{}(x, [list(nn.{}(6, 2).parameters())])[0]\n"
BACKWARD = {
    "additive_attention": "x = torch.randn(2**20, 12, requires_grad=True)\n"
    "out = ops.additive_attention(torch.zeros(2**20), torch.zeros(2**20), x, torch.arange(0, 2**20 + 1, 64))\n",
    "attention_pool": ROOM.format("2, 6")
    + "out = ops.attention_pool(x, torch.zeros(3, 6), torch.zeros(3), torch.zeros(3))\n",
    "clipped_adam_": "lists = [[torch.zeros(2**12, 3 * 2**10)] for _ in range(3)]\n"
    "lists += [[torch.zeros(3 * 2**10, 2**12).t()]]\n"
    "call = lambda: ops.clipped_adam_(*lists, [torch.tensor(0.0)], lr=0.1)\n",
    "encoder_layer": ROOM.format("2, 6")
    + "layer = nn.TransformerEncoderLayer(6, 1, 4)\nout = ops.encoder_layer(x, list(layer.parameters()), heads=1)\n",
    "feed_forward": ROOM.format("12")
    + "out = ops.feed_forward(x, torch.zeros(4, 12), torch.zeros(4), torch.zeros(3, 4), torch.zeros(3))\n",
    "gather_windows": "x = torch.randn(2**20, 12, requires_grad=True)\n"
    "out = ops.gather_windows(x, torch.zeros(3, 2, dtype=torch.int64))\n",
    "graph_attention": ROOM.format("12")
    + "out = ops.graph_attention(x, torch.zeros(2, 12), torch.zeros(2), torch.arange(0, 2**20 + 1, 64))\n",
    "gru": CELL.format("gru", "GRU"),
    "lstm": CELL.format("lstm", "LSTM"),
    "linear_tanh": ROOM.format("2, 6") + "out = ops.linear_tanh(x, torch.zeros(3, 6), torch.zeros(3))\n",
    "tanh": ROOM.format("12") + "out = ops.tanh(x)\n",
    "temporal_conv_net": ROOM.format("6, 2")
    + "out = ops.temporal_conv_net(x, [(torch.randn(6, 6, 2), None, torch.zeros(6)) * 2])\n",
    "window_conv": ROOM.format("2, 6") + "out = ops.window_conv(x, torch.randn(3, 6, 3), torch.zeros(3))\n",
}
BEGIN = """
import gc, json, resource, sys
import torch
from torch import nn
from qfast import ops

torch.set_num_threads(1)


def error_of(script):
    here = {"torch": torch, "nn": nn, "ops": ops}
    exec(script, here)
    if "out" in here:
        # A gradient with every stride: the operators copy it, or write one of x.
        grad = torch.zeros_like(here["out"])
        here["call"] = lambda: torch.autograd.grad(here["out"], here["x"], grad, retain_graph=True)
        here["call"]()  # imports modules
    gc.collect()
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**23, hard))
    try:
        here["call"]()
    except BaseException as error:
        return type(error).__name__, str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
    return "None", ""


print(json.dumps({name: error_of(script) for name, script in json.loads(sys.stdin.read()).items()}))
"""


@pytest.fixture(scope="module")
def errors() -> dict[str, list[str]]:
    """Class and message of the error of each script, in a process that may allocate 8 MiB more than it has."""
    if not Path("/proc/self/statm").exists():
        pytest.skip("needs /proc")
    done = subprocess.run(
        [sys.executable, "-c", BEGIN],
        input=json.dumps(BACKWARD),
        # memory that is freed must not stay with the process
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "QFAST_CACHE_MB": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", BACKWARD)
def test_gradients_that_do_not_fit(name, errors):
    kind, message = errors[name]
    assert kind == "OutOfMemoryError", message
    assert re.match(MESSAGE.format(name.rstrip("_")), message), message


# ---------------------------------------------------------------- the helpers
def test_other_errors_are_left_alone():
    @explain_memory("operator")
    def fails(error):
        raise error

    for error in (RuntimeError("sizes do not match"), ValueError("3"), torch.OutOfMemoryError("CUDA out of memory.")):
        with pytest.raises(type(error)) as caught:
            fails(error)
        assert caught.value is error


def test_free_memory_of_a_gpu_is_stated(monkeypatch):
    @explain_memory("lstm")
    def fails():
        raise MemoryError("no memory for 3.0 MiB on cuda:1 (Float of shape (786432,))")

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: {"cuda:1": (2**20, 2**30)}[device])
    expected = r"^lstm: no memory for 3.0 MiB on cuda:1 \(Float .*\), 1.0 MiB are free. Remedy: fewer rows per call.$"
    with pytest.raises(torch.OutOfMemoryError, match=expected):
        fails()

    def broken(device):
        raise torch.AcceleratorError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "mem_get_info", broken)
    with pytest.raises(torch.AcceleratorError, match="illegal memory access"):
        fails()


@pytest.mark.parametrize(
    ("error", "shortage"),
    [
        (
            torch.OutOfMemoryError("lstm: no memory for 3.0 MiB on cpu. Remedy: less."),
            "lstm: no memory for 3.0 MiB on cpu",
        ),
        (MemoryError(), "no memory on cpu"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: you tried to allocate 3145728 bytes. Error 12"),
            "no memory for 3.0 MiB on cpu",
        ),
    ],
    ids=["operator", "Python", "torch"],
)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_user_sees_the_remedy_of_the_estimator(error, shortage, device):
    assert memory_shortage(error) == shortage
    with (
        pytest.raises(DataError) as caught,
        explain_out_of_memory("a batch", torch.device(device), "a smaller batch, "),
    ):
        raise error
    other = ", or device='cpu'" if device == "cuda" else ""
    assert str(caught.value) == (
        f"a batch does not fit into the memory of {device} ({shortage}). Remedy: a smaller batch, fewer columns or a "
        f"shorter period{other}."
    )


def test_only_memory_is_explained():
    with pytest.raises(RuntimeError, match="sizes do not match"), explain_out_of_memory("a batch", torch.device("cpu")):
        raise RuntimeError("sizes do not match")
