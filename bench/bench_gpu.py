"""Operators and epochs on a GPU, beside torch's own layers, and beside the device's copy bandwidth and FMA peak.

    python bench/bench_gpu.py [--only gather,attention,recurrent,tcn,encoder,epoch] [--compile] [--device cuda]

Medians by CUDA events after a warm-up, both sides interleaved in one process; a backward is that of the sum of
squares. `--compile` also times torch.compile of the baseline. A Markdown table goes to standard output. `--device
cpu` with `--small` is for trying the script itself. Nothing of it has been run on a GPU yet.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from bench_epoch import FEATURES, STEP_LEN, alpha158_shaped
from torch import Tensor, nn

from qfast import ops
from qfast.data import TSDatasetH
from qfast.models import ts
from qfast.nn import TCNModel
from qfast.precision import NAMES

PARTS = ("gather", "attention", "recurrent", "tcn", "encoder", "epoch")
WARM_UP, REPEATS = 5, 30


@dataclass(frozen=True)
class Case:
    """Two ways to one result. `moved` bytes and `products` (multiply-adds) are the least that it needs."""

    name: str
    ours: Callable[[], Any]
    baseline: Callable[[], Any] | None = None
    moved: float = 0
    products: float = 0


class Clock:
    """Milliseconds of a call on a device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def once(self, call: Callable[[], Any]) -> float:
        if self.device.type != "cuda":
            start = time.perf_counter()
            call()
            return (time.perf_counter() - start) * 1e3
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    def medians(self, calls: Sequence[Callable[[], Any]]) -> list[float]:
        """Of calls that take turns."""
        for call in calls:
            for _ in range(WARM_UP):
                call()
        times = [[self.once(call) for call in calls] for _ in range(REPEATS)]
        return [statistics.median(column) for column in zip(*times, strict=True)]


def captured(call: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """The call as one CUDA graph, so that launches cost nothing; as it is elsewhere."""
    if device.type != "cuda":
        return call
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def both_ways(call: Callable[..., Tensor], tensors: Sequence[Tensor]) -> Callable[[], Any]:
    given = [tensor.detach().requires_grad_() for tensor in tensors]
    return lambda: torch.autograd.grad(call(*given).square().sum(), given)


# ---------------------------------------------------------------- cases
def gathers(device: torch.device, small: bool) -> Iterator[Case]:
    rows = 20_000 if small else 1_000_000
    for batch, columns in ((800, 20), (5000, 20), (2048, 158)):
        panel = torch.randn(rows, columns, device=device)
        index = torch.randint(0, rows - STEP_LEN, (batch, 1), device=device) + torch.arange(STEP_LEN, device=device)
        yield Case(
            f"gather, {batch} windows of {STEP_LEN} x {columns}",
            lambda p=panel, i=index: ops.gather_windows(p, i),
            lambda p=panel, i=index: p[i],
            moved=2.0 * batch * STEP_LEN * columns * 4,
        )


def dense(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return nn.functional.leaky_relu(query.unsqueeze(1) + key.unsqueeze(0)).softmax(1) @ value


def attention(device: torch.device, small: bool) -> Iterator[Case]:
    for n in (300, 1000) if small else (300, 1000, 5000, 100_000):
        given = [torch.randn(n, device=device), torch.randn(n, device=device), torch.randn(n, 64, device=device)]
        baseline = both_ways(dense, given) if n <= 5000 else None
        moved = 4.0 * n * (2 + 64) * 3  # read, written, and their gradients read
        yield Case(
            f"attention over {n} stocks, 64 wide, both ways",
            both_ways(lambda q, k, v: ops.additive_attention(q, k, v), given),
            baseline,
            moved,
        )
    days, n = (4, 100) if small else (256, 800)
    offsets = torch.arange(days + 1) * n
    hidden, weight, bias = (torch.randn(*shape, device=device) for shape in ((days * n, 64), (2, 64), (2,)))
    yield Case(
        f"graph attention, {days} days of {n} stocks, forward",
        lambda: ops.graph_attention(hidden, weight, bias, offsets),
        moved=2.0 * 4 * days * n * 64,
    )


def recurrent(device: torch.device, small: bool) -> Iterator[Case]:
    for operator, kind, gates in ((ops.lstm, nn.LSTM, 4), (ops.gru, nn.GRU, 3)):
        for batch, steps in ((50, 20),) if small else ((800, 20), (5000, 20), (800, 60)):
            yield from _recurrent_pair(operator, kind, gates, torch.randn(batch, steps, FEATURES, device=device))


def _recurrent_pair(operator: Any, kind: Any, gates: int, x: Tensor) -> Iterator[Case]:
    hidden, layers = 64, 2
    torch.manual_seed(0)
    layer = kind(FEATURES, hidden, layers, batch_first=True).to(x.device)
    names, weights = zip(*((name, p.detach()) for name, p in layer.named_parameters()), strict=True)
    products = x.shape[0] * x.shape[1] * gates * hidden * (FEATURES + hidden * (2 * layers - 1))

    def ours(x: Tensor, *w: Tensor) -> Tensor:
        return operator(x, [w[:4], w[4:]], all_steps=True)[0]

    def theirs(x: Tensor, *w: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, w, strict=True)), (x,))[0]

    @torch.no_grad()
    def forward(x: Tensor) -> Tensor:
        return layer(x)[0]

    name = f"{kind.__name__}, {x.shape[0]} x {x.shape[1]}, {layers} layers of {hidden}"
    yield Case(f"{name}, forward", lambda: ours(x, *weights), lambda: forward(x), 0, products)
    given = [x, *weights]
    yield Case(f"{name}, both ways", both_ways(ours, given), both_ways(theirs, given), 0, 3 * products)


def convolutions(device: torch.device, small: bool) -> Iterator[Case]:
    for batch, features, steps, channels, kernel in ((2000, 20, 20, 32, 7), (2000, 6, 60, 128, 3)):
        torch.manual_seed(0)
        network = TCNModel(features, 1, [channels] * 5, kernel, 0.0).to(device).eval()
        x = torch.randn(20 if small else batch, features, steps, device=device)
        plain = network.to_reference()
        parameters = list(network.parameters()), list(plain.parameters())
        name = f"TCN, {len(x)} x {steps}, 5 blocks of {channels}, kernel {kernel}"
        yield Case(
            f"{name}, both ways",
            lambda n=network, p=parameters[0], x=x: torch.autograd.grad(n(x).square().sum(), p),
            lambda n=plain, p=parameters[1], x=x: torch.autograd.grad(n(x).square().sum(), p),
        )


def encoders(device: torch.device, small: bool) -> Iterator[Case]:
    for batch, steps, heads in ((16, 20, 2),) if small else ((2048, 20, 2), (2048, 60, 2)):
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(64, heads, 2048, dropout=0.0, batch_first=True).to(device)
        weights = [p.detach() for p in layer.parameters()]
        names = [name for name, _ in layer.named_parameters()]
        x = torch.randn(batch, steps, 64, device=device)

        def ours(x: Tensor, *w: Tensor, heads: int = heads) -> Tensor:
            return ops.encoder_layer(x, w, heads=heads)

        def theirs(x: Tensor, *w: Tensor, layer: nn.Module = layer, names: list[str] = names) -> Tensor:
            return torch.func.functional_call(layer, dict(zip(names, w, strict=True)), (x,))

        products = batch * steps * (4 * 64 * 64 + 2 * 64 * 2048 + 2 * steps * 64)
        name = f"encoder layer, {batch} x {steps}, 64 wide, feed-forward 2,048"
        yield Case(
            f"{name}, both ways", both_ways(ours, [x, *weights]), both_ways(theirs, [x, *weights]), 0, 3.0 * products
        )
        yield from _precisions(x.flatten(0, 1), weights[4:8])


def _precisions(x: Tensor, weights: Sequence[Tensor]) -> Iterator[Case]:
    """The feed-forward block in each, by the raw operator: the last column may exceed 100 %."""
    for number, name in enumerate(NAMES):
        yield Case(
            f"feed-forward block, {len(x)} rows, forward, {name}",
            lambda n=number: torch.ops.qfast.feed_forward(x, *weights, 0.0, None, n),
            products=len(x) * 2.0 * weights[0].numel(),
        )


OF_PART = {
    "gather": gathers, "attention": attention, "recurrent": recurrent, "tcn": convolutions, "encoder": encoders,
}  # fmt: skip


# ---------------------------------------------------------------- what the device can do
def copy_bandwidth(clock: Clock, small: bool) -> float:
    """Bytes a second, read and written."""
    size = 2**22 if small else 2**30
    source = torch.empty(size, dtype=torch.uint8, device=clock.device)
    target = torch.empty_like(source)
    return 2 * size / clock.medians([lambda: target.copy_(source)])[0] * 1e3


def product_peak(clock: Clock, small: bool) -> float:
    """Multiply-adds a second of a large float32 product, TF32 off."""
    n = 512 if small else 8192
    a, b = torch.randn(2, n, n, device=clock.device)
    return n**3 / clock.medians([lambda: a @ b])[0] * 1e3


def epochs(device: torch.device, small: bool) -> None:
    """A training pass over about 500,000 windows of each time-series model, the panel on the device."""
    frame = alpha158_shaped(*((20, 60) if small else (300, 1900)))
    dates = frame.index.levels[0]
    cut = dates[int(len(dates) * 0.9)]
    segments = {"train": (None, cut), "valid": (cut + (dates[1] - dates[0]), None)}
    dataset = TSDatasetH(handler=frame, segments=segments, step_len=STEP_LEN)
    print("\n| model | training pass | with both evaluations |\n| --- | --- | --- |")
    for name in ("LSTM", "GRU", "ALSTM", "GATs", "TCN", "TransformerModel", "LocalformerModel"):
        model = getattr(ts, name)(d_feat=FEATURES, n_epochs=2, seed=0, device=str(device), progress=False)
        model.fit(dataset)
        last = model.history_.iloc[-1]  # the first epoch pays for memory and kernels
        print(f"| {name} | {last['train_seconds']:.2f} s | {last['seconds']:.2f} s |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--small", action="store_true")
    given = parser.parse_args()
    parts = given.only.split(",")
    if not set(parts) <= set(PARTS):
        parser.error(f"--only takes {', '.join(PARTS)}, got {given.only}")
    device = torch.device(given.device)
    clock = Clock(device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    bandwidth, peak = copy_bandwidth(clock, given.small), product_peak(clock, given.small)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}: copy {bandwidth / 1e9:,.0f} GB/s, float32 {peak * 2e-12:,.1f} TFLOP/s\n")
    print("| case | torch | compiled | qfast | as one graph | ratio | of copy | of float32 |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for part in parts:
        for case in OF_PART[part](device, given.small) if part in OF_PART else ():
            print(row(case, clock, bandwidth, peak, given.compile), flush=True)
    if "epoch" in parts:
        epochs(device, given.small)


def row(case: Case, clock: Clock, bandwidth: float, peak: float, compiled: bool) -> str:
    calls = {"ours": case.ours, "graph": captured(case.ours, clock.device)}
    if case.baseline is not None:
        calls["torch"] = case.baseline
        if compiled:
            calls["compiled"] = torch.compile(case.baseline)
    times = dict(zip(calls, clock.medians(list(calls.values())), strict=True))
    best = min(times["ours"], times["graph"])
    texts = [f"{times[key] * 1e3:,.0f} us" if key in times else "-" for key in ("torch", "compiled", "ours", "graph")]
    ratio = f"{min(times[k] for k in ('torch', 'compiled') if k in times) / best:.2f}x" if case.baseline else "-"
    copy = f"{case.moved / best * 1e3 / bandwidth:.0%}" if case.moved else "-"
    share = f"{case.products / best * 1e3 / peak:.0%}" if case.products else "-"
    return f"| {case.name} | {' | '.join(texts)} | {ratio} | {copy} | {share} |"


if __name__ == "__main__":
    main()
