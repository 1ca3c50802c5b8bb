"""The lines of gate.py: each times an operator or a network of qfast and the same computation by torch.

The sizes are small. A call takes milliseconds, so a busy machine interrupts few of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

import qfast.nn
from qfast import ops
from qfast.data.rolling import rolling
from qfast.ops.price_windows import neutral_stage
from qfast.training.optim import ClippedAdam

BATCH, STEPS, FEATURES, WIDTH = 256, 20, 20, 64
SECTION_S = 5e-4  # shortest timed section, by repeating the call

Call = Callable[[], Any]
Timed = Callable[[], float]
"""Runs once and returns the CPU seconds of one call."""

__all__ = ["LINES", "Line", "Pair", "Timed", "cpu_time_of"]


@dataclass(frozen=True)
class Pair:
    """The same computation by qfast and by torch."""

    ours: Timed
    reference: Timed


@dataclass(frozen=True)
class Line:
    """A row of the table. `build` allocates its inputs.

    `is_short`: its calls take less than a millisecond. The lowest times of such calls are steadier than the median of
    their ratios, because one of many short calls is always undisturbed.
    """

    name: str
    build: Callable[[], Pair]
    is_short: bool = False


def cpu_time_of(call: Call) -> Timed:
    """Time `call`, repeated so often that a section takes at least SECTION_S. Calls it twice to warm up."""
    call()
    start = time.process_time()
    call()
    calls = max(1, round(SECTION_S / max(time.process_time() - start, 1e-6)))

    def timed() -> float:
        start = time.process_time()
        for _ in range(calls):
            call()
        return (time.process_time() - start) / calls

    return timed


def forward(ours: Call, reference: Call) -> Pair:
    """Time both without gradients."""
    return Pair(cpu_time_of(torch.no_grad()(ours)), cpu_time_of(torch.no_grad()(reference)))


def backward(ours: Callable[[], Tensor], reference: Callable[[], Tensor], tensors: Sequence[Tensor]) -> Pair:
    """Time the gradients of `tensors` only. Each forward pass before it is not timed."""
    gradient = torch.randn_like(ours())

    def timed(call: Callable[[], Tensor]) -> float:
        result = call()
        start = time.process_time()
        torch.autograd.grad(result, tensors, gradient)
        return time.process_time() - start

    for call in (ours, reference):
        timed(call)
    return Pair(partial(timed, ours), partial(timed, reference))


# ---------------------------------------------------------------- layers
Layer = tuple[Callable[[], Tensor], Callable[[], Tensor], list[Tensor]]
"""qfast's operator, torch's layer, and the tensors that need gradients."""


def windows(features: int = FEATURES, batch: int = BATCH) -> Tensor:
    return torch.randn(batch, STEPS, features)


def recurrent(operator: Any, kind: Any) -> Layer:
    """Two layers of 64 units, last step."""
    x, layer = windows(batch=128), kind(FEATURES, WIDTH, 2, batch_first=True)
    weights = list(layer.parameters())
    return lambda: operator(x, [weights[:4], weights[4:]])[0], lambda: layer(x)[0][:, -1], weights


def encoder() -> Layer:
    """All steps of a layer with 512 hidden features."""
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 512, 0.0)
    x = windows(WIDTH, 64).requires_grad_()
    turned = x.detach().transpose(0, 1).contiguous().requires_grad_()
    weights = list(layer.parameters())
    return lambda: ops.encoder_layer(x, weights, heads=2), lambda: layer(turned).transpose(0, 1), weights


def feed_forward() -> Layer:
    """2,048 hidden features."""
    x = torch.randn(512, WIDTH, requires_grad=True)
    first, second = nn.Linear(WIDTH, 2048), nn.Linear(2048, WIDTH)
    weights = [*first.parameters(), *second.parameters()]
    return lambda: ops.feed_forward(x, *weights), lambda: second(first(x).relu()), [x, *weights]


def convolution() -> Layer:
    """The convolution of Localformer, with kernel 3."""
    x, layer = windows(WIDTH).requires_grad_(), nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
    weights = [layer.weight, layer.bias]
    assert layer.bias is not None
    return (
        lambda: ops.window_conv(x, layer.weight, layer.bias),
        lambda: layer(x.transpose(1, 2)).transpose(1, 2),
        [x, *(weight for weight in weights if weight is not None)],
    )


def temporal_convolution() -> Layer:
    """Five blocks of 32 channels, kernel 7."""
    network = qfast.nn.TCNModel(FEATURES, 1, [32] * 5, 7, 0.0).eval()
    plain, x = network.to_reference(), windows(batch=64).transpose(1, 2)
    weights = list(network.parameters())
    plain.load_state_dict(network.state_dict())
    for name, weight in network.named_parameters():  # both networks share their weights, and so the gradients
        module, _, leaf = name.rpartition(".")
        setattr(plain.get_submodule(module), leaf, weight)
    return lambda: network(x), lambda: plain(x), weights


def input_layer() -> Layer:
    """The input layer of ALSTM."""
    x, layer = windows(FEATURES), nn.Linear(FEATURES, WIDTH)
    weights = [layer.weight, layer.bias]
    return lambda: ops.linear_tanh(x, *weights), lambda: layer(x).tanh(), weights


def pool() -> Layer:
    """The attention of ALSTM over 20 steps."""
    h, inner, score = windows(WIDTH, 64).requires_grad_(), nn.Linear(WIDTH, 32), nn.Linear(32, 1, bias=False)
    weights = [inner.weight, inner.bias, score.weight]

    def plain() -> Tensor:
        share = score(inner(h).tanh()).softmax(1)
        return (h * share).sum(1)

    return lambda: ops.attention_pool(h, *weights), plain, [h, *weights]


def graph() -> Layer:
    """The attention of GATs between 300 stocks."""
    hidden, weight, bias = torch.randn(300, WIDTH), torch.randn(2, WIDTH) / 8, torch.randn(2)
    tensors = [tensor.requires_grad_() for tensor in (hidden, weight, bias)]

    def plain() -> Tensor:
        query, key = (hidden @ weight.T + bias).unbind(1)
        scores = nn.functional.leaky_relu(query.unsqueeze(1) + key.unsqueeze(0))
        return scores.softmax(1) @ hidden + hidden

    return lambda: ops.graph_attention(*tensors), plain, tensors


LAYERS: dict[str, Callable[[], Layer]] = {
    "LSTM layers": partial(recurrent, ops.lstm, nn.LSTM),
    "GRU layers": partial(recurrent, ops.gru, nn.GRU),
    "encoder layer": encoder,
    "feed-forward block": feed_forward,
    "convolution of Localformer": convolution,
    "TCN": temporal_convolution,
    "linear layer with tanh": input_layer,
    "attention pool": pool,
    "graph attention": graph,
}


def forward_of(layer: Callable[[], Layer]) -> Pair:
    ours, reference, _ = layer()
    return forward(ours, reference)


def backward_of(layer: Callable[[], Layer]) -> Pair:
    return backward(*layer())


# ---------------------------------------------------------------- data and optimizer
def gather() -> Pair:
    panel, index = torch.randn(2_000, FEATURES), torch.randint(0, 1_900, (100, 1)) + torch.arange(STEPS)
    return forward(lambda: ops.gather_windows(panel, index), lambda: panel[index])


def gather_by_tables() -> Pair:
    """The gather of training batches, with window tables, and the same in two steps by torch."""
    instruments, days = np.repeat(np.arange(10), 200), np.tile(np.arange(200), 10)
    tables = ops.build_window_index(instruments, days)
    panel, rows = torch.randn(2_000, FEATURES), torch.randint(0, 2_000, (100,))
    steps = torch.arange(1 - STEPS, 1)

    def plain() -> Tensor:
        first = rows - rows % 200
        return panel[torch.maximum(rows.unsqueeze(1) + steps, first.unsqueeze(1))]

    return forward(lambda: ops.gather_windows(panel, tables, rows, STEPS), plain)


def price_windows() -> Pair:
    """Alpha360's windows of 6 prices x 60 days."""
    series, rows = torch.rand(6, 20_000) + 1, torch.randint(0, 19_000, (256,))
    ends, divisor_of = torch.arange(60, 20_000), torch.zeros(6, dtype=torch.int64)
    divisors, stages, steps = series[:1, 60:].contiguous(), neutral_stage(360), torch.arange(-59, 1)

    def plain() -> Tensor:
        values = series[:, ends[rows].unsqueeze(1) + steps] / divisors[divisor_of][:, rows].unsqueeze(2)
        values = (values.transpose(0, 1).reshape(256, 360) - stages[0, 0]) / stages[0, 1]
        values = torch.minimum(torch.maximum(values, -stages[0, 2]), stages[0, 2])
        return torch.where(values.isnan(), stages[0, 3], values)

    return forward(lambda: ops.price_windows(series, ends, divisors, divisor_of, rows, stages, 60), plain)


def rolling_statistic(kind: str) -> Pair:
    """A statistic of 20 rows for 20 instruments, and pandas on one instrument of the same length."""
    series = np.random.default_rng(0).standard_normal(20_000)
    frame, first, end = pd.Series(series), np.arange(0, 20_000, 1000), np.arange(1000, 20_001, 1000)
    reference = getattr(frame.rolling(20, min_periods=1), kind)
    return forward(lambda: rolling(kind, series, first, end, windows=[20]), reference)


def window_index() -> Pair:
    """The tables of 40,000 rows, and NumPy's search for the gaps between them."""
    instruments, days = np.repeat(np.arange(80), 500), np.tile(np.arange(500), 80)
    return forward(
        lambda: ops.build_window_index(instruments, days),
        lambda: np.maximum.accumulate(np.where(np.diff(instruments * 500 + days, prepend=0) != 1, days, 0)),
    )


def optimizer() -> Pair:
    """Clipping and Adam on two large tensors, for which the bookkeeping of an optimizer takes little time."""
    ours, theirs = ([nn.Parameter(torch.randn(256, 1024)) for _ in range(2)] for _ in range(2))
    for parameter in (*ours, *theirs):
        parameter.grad = torch.randn_like(parameter)
    own, plain = ClippedAdam(ours, lr=1e-4), torch.optim.Adam(theirs, lr=1e-4, fused=True)

    def clip_and_step() -> None:
        nn.utils.clip_grad_value_(theirs, 3.0)
        plain.step()

    return forward(own.step, clip_and_step)


def tanh() -> Pair:
    x = torch.randn(100_000)
    return forward(lambda: ops.tanh(x), x.tanh)


# ---------------------------------------------------------------- training steps
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "LSTM": partial(qfast.nn.LSTMModel, FEATURES),
    "GRU": partial(qfast.nn.GRUModel, FEATURES),
    "ALSTM": partial(qfast.nn.ALSTMModel, FEATURES),
    "GATs": partial(qfast.nn.GATModel, FEATURES),
    "TCN": partial(qfast.nn.TCNModel, FEATURES, 1, [32] * 5, 7, 0.0),
    "Transformer": partial(qfast.nn.Transformer, FEATURES, dropout=0.0),
    "Localformer": partial(qfast.nn.Localformer, FEATURES, dropout=0.0),
}


def training_step(name: str) -> Pair:
    """Forward, loss, backward, clipping and Adam of a network, and of its copy with torch's layers."""
    network: Any = NETWORKS[name]()
    batch = {"Transformer": 32, "Localformer": 32, "TCN": 64}.get(name, 128)
    x, label = windows(batch=batch), torch.randn(batch)
    x = x.transpose(1, 2).contiguous() if name == "TCN" else x
    plain = network.to_reference()
    own, adam = ClippedAdam(network.parameters(), lr=1e-4), torch.optim.Adam(plain.parameters(), lr=1e-4, fused=True)

    def step(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        loss = (net(x) - label).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if optimizer is adam:
            nn.utils.clip_grad_value_(net.parameters(), 3.0)
        optimizer.step()

    return Pair(cpu_time_of(partial(step, network, own)), cpu_time_of(partial(step, plain, adam)))


SHORT = ("linear layer with tanh", "attention pool", "graph attention")

LINES: tuple[Line, ...] = (
    *(Line(f"{name}, forward", partial(forward_of, layer), name in SHORT) for name, layer in LAYERS.items()),
    *(Line(f"{name}, backward", partial(backward_of, layer), name in SHORT) for name, layer in LAYERS.items()),
    Line("gather by row numbers", gather, is_short=True),
    Line("gather by window tables", gather_by_tables, is_short=True),
    Line("price windows of Alpha360", price_windows, is_short=True),
    Line("rolling std", partial(rolling_statistic, "std"), is_short=True),
    Line("rolling max", partial(rolling_statistic, "max"), is_short=True),
    Line("window index", window_index, is_short=True),
    Line("clipping and Adam", optimizer, is_short=True),
    Line("tanh", tanh, is_short=True),
    *(Line(f"{name}, training step", partial(training_step, name)) for name in NETWORKS),
)
