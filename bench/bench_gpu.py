"""Operators and epochs on a GPU, compared with torch's layers and with the device's copy bandwidth and FMA peak.

    python bench/bench_gpu.py [--only gather,attention,ways,recurrent,tcn,encoder,adam,step,scaling,epoch] [--compile]

Medians by CUDA events after a warm-up, both sides interleaved in one process. Backward passes start from the
sum of squares. A step is an estimator's: gather, forward, loss, backward, clipping, Adam. Its baseline uses torch's
layers, indexing and Adam. Networks use qfast's recurrent and encoder operators unless the name of the case says
otherwise. `--compile` also times torch.compile of the baseline. The result is a Markdown table on standard output.
`--device cpu` with `--small` tests the script itself.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from bench_epoch import FEATURES, STEP_LEN, alpha158_shaped
from torch import Tensor, nn

from qfast import _backend, ops
from qfast.data import TSDatasetH
from qfast.models import ts
from qfast.nn import TCNModel
from qfast.precision import NAMES
from qfast.training.losses import masked_mse
from qfast.training.optim import ClippedAdam

PARTS = ("gather", "attention", "ways", "recurrent", "tcn", "encoder", "adam", "step", "scaling", "epoch")
WARM_UP, REPEATS = 5, 30


@dataclass(frozen=True)
class Case:
    """Two implementations of one result, which needs at least `moved` bytes and `products` multiply-adds.

    `captures`: the baseline can be captured as a CUDA graph. torch's Adam, as Qlib constructs it, cannot.
    """

    name: str
    ours: Callable[[], Any]
    baseline: Callable[[], Any] | None = None
    moved: float = 0
    products: float = 0
    captures: bool = True


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
        """Medians of calls that alternate."""
        for call in calls:
            for _ in range(WARM_UP):
                call()
        times = [[self.once(call) for call in calls] for _ in range(REPEATS)]
        return [statistics.median(column) for column in zip(*times, strict=True)]


def captured(call: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """The call as one CUDA graph, which removes the cost of launches; on other devices the call itself."""
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


def forward_and_backward(call: Callable[..., Tensor], tensors: Sequence[Tensor]) -> Callable[[], Any]:
    arguments = [tensor.detach().requires_grad_() for tensor in tensors]
    return lambda: torch.autograd.grad(call(*arguments).square().sum(), arguments)


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
        arguments = [torch.randn(n, device=device), torch.randn(n, device=device), torch.randn(n, 64, device=device)]
        baseline = forward_and_backward(dense, arguments) if n <= 5000 else None
        moved = 4.0 * n * (2 + 64) * 3  # read, written, and their gradients read
        yield Case(
            f"attention over {n} stocks, 64 wide, both ways",
            forward_and_backward(lambda q, k, v: ops.additive_attention(q, k, v), arguments),
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
    arguments = [x, *weights]
    yield Case(
        f"{name}, both ways",
        forward_and_backward(ours, arguments),
        forward_and_backward(theirs, arguments),
        0,
        3 * products,
    )


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
            f"{name}, both ways",
            forward_and_backward(ours, [x, *weights]),
            forward_and_backward(theirs, [x, *weights]),
            0,
            3.0 * products,
        )
        yield from _precisions(x.flatten(0, 1), weights[4:8])


def _precisions(x: Tensor, weights: Sequence[Tensor]) -> Iterator[Case]:
    """The feed-forward block in each precision, by the raw operator: the last column may exceed 100 %."""
    for number, name in enumerate(NAMES):
        yield Case(
            f"feed-forward block, {len(x)} rows, forward, {name}",
            lambda n=number: torch.ops.qfast.feed_forward(x, *weights, 0.0, None, n),
            products=len(x) * 2.0 * weights[0].numel(),
        )


def optimizers(device: torch.device, small: bool) -> Iterator[Case]:
    from bench_adam import NETWORKS

    for name, shapes in NETWORKS.items():
        ours, theirs = ([torch.randn(shape, device=device) for shape in shapes] for _ in range(2))
        for tensor in (*ours, *theirs):
            tensor.grad = torch.randn_like(tensor)
        optimizer = ClippedAdam(ours, lr=1e-3)
        plain = torch.optim.Adam(theirs, lr=1e-3, foreach=True)

        def clip_and_step(tensors: list[Tensor] = theirs, plain: torch.optim.Adam = plain) -> None:
            nn.utils.clip_grad_value_(tensors, 3.0)
            plain.step()

        moved = 7.0 * 4 * sum(tensor.numel() for tensor in ours)  # four read, three written
        yield Case(f"clipping and Adam, {name} tensors", optimizer.step, clip_and_step, moved, captures=False)


ENCODER = {"d_model": 64, "dropout": 0.0}
STEPS: tuple[tuple[str, int, int, int, dict[str, Any]], ...] = (  # model, batch (stocks of a day), T, F, arguments
    ("LSTM", 800, 20, FEATURES, {"batch_size": 800}),
    ("LSTM", 800, 60, 6, {"batch_size": 800}),
    ("LSTM", 5000, 20, FEATURES, {"batch_size": 5000}),
    ("GRU", 800, 20, FEATURES, {"batch_size": 800}),
    ("ALSTM", 800, 20, FEATURES, {"batch_size": 800}),
    ("GATs", 300, 20, FEATURES, {}),
    ("GATs", 800, 20, FEATURES, {}),
    ("TCN", 2000, 20, FEATURES, {"n_chans": 32, "kernel_size": 7, "num_layers": 5, "batch_size": 2000}),
    ("TCN", 2000, 60, 6, {"n_chans": 128, "kernel_size": 3, "num_layers": 5, "batch_size": 2000}),
    ("TransformerModel", 2048, 20, FEATURES, {"batch_size": 2048, **ENCODER}),
    ("LocalformerModel", 2048, 20, FEATURES, {"batch_size": 2048, **ENCODER}),
)


def training(device: torch.device, small: bool) -> Iterator[Case]:
    for name, batch, steps, features, kwargs in STEPS:
        if small:
            batch, kwargs = 12, {**kwargs, **({"batch_size": 12} if "batch_size" in kwargs else {})}
        stocks = batch if name == "GATs" else min(batch, 300)
        frame = alpha158_shaped(stocks, steps + batch // stocks + 9, features)
        dataset = TSDatasetH(handler=frame, segments={"train": (None, None)}, step_len=steps)
        made = [getattr(ts, name)(d_feat=features, seed=0, device=str(device), **kwargs) for _ in range(2)]
        windows = made[0].load_segment(dataset, "train").to(device)
        day = windows.days
        shuffled = torch.randperm(len(windows))[:batch].to(device)
        samples = day.order[int(day.bounds[-2]) :] if name == "GATs" else shuffled
        for group in made[0].train_optimizer.param_groups:
            group["capturable"] = device.type == "cuda"

        def ours(model: Any = made[0], windows: Any = windows, samples: Tensor = samples) -> Tensor:
            model.network.train()
            return model.train_step(windows, samples)

        title = f"{name} step, {batch} x {steps} x {features}"
        if name == "TCN":
            title += f", kernel {kwargs['kernel_size']}, {kwargs['n_chans']} wide"
        yield Case(title, ours, torch_step(made[1], windows, samples), captures=False)
        if device.type == "cuda" and name not in ("GATs", "TCN"):
            yield Case(f"{title}, torch's layers", with_torch_layers(ours))


def with_torch_layers(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def call() -> Tensor:
        _backend.cuda_layers = "torch"
        try:
            return step()
        finally:
            _backend.cuda_layers = "qfast"

    return call


def torch_step(model: Any, windows: Any, samples: Tensor) -> Callable[[], Tensor]:
    """A step as Qlib writes it, except for the loader: the windows are indexed on the device."""
    network = model.network.to_reference().train()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    rows = ops.window_rows(windows.index, windows.rows, windows.step_len)

    def step() -> Tensor:
        x, label = windows.features[rows[samples]], windows.label[samples]
        if isinstance(network, TCNModel):
            x = x.transpose(1, 2)
        loss = masked_mse(network(x), label)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_value_(network.parameters(), 3.0)
        optimizer.step()
        return loss.detach()

    return step


OF_PART = {
    "gather": gathers,
    "attention": attention,
    "recurrent": recurrent,
    "tcn": convolutions,
    "encoder": encoders,
    "adam": optimizers,
    "step": training,
}


# ---------------------------------------------------------------- limits of the device
def copy_bandwidth(clock: Clock, small: bool) -> float:
    """Bytes per second, reads and writes together."""
    size = 2**22 if small else 2**30
    source = torch.empty(size, dtype=torch.uint8, device=clock.device)
    target = torch.empty_like(source)
    return 2 * size / clock.medians([lambda: target.copy_(source)])[0] * 1e3


def product_peak(clock: Clock, small: bool) -> float:
    """Multiply-adds per second of a large float32 matrix product without TF32."""
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
    print("\n| model | layers | steps | training pass | with both evaluations |\n| --- | --- | --- | --- | --- |")
    for name in ("LSTM", "GRU", "ALSTM", "GATs", "TCN", "TransformerModel", "LocalformerModel"):
        for layers in _backend.LAYERS if name != "TCN" else ("qfast",):
            _backend.cuda_layers = layers
            for graphs in (False, True):
                arguments = {"d_feat": FEATURES, "n_epochs": 3, "seed": 0, "cuda_graphs": graphs, "progress": False}
                model = getattr(ts, name)(device=str(device), **arguments)
                model.fit(dataset)
                last = model.history_.iloc[-1]  # the first epoch pays for memory, kernels and graphs
                how = "graphs" if graphs else "as written"
                times = f"{last['train_seconds']:.2f} s | {last['seconds']:.2f} s"
                print(f"| {name} | {layers} | {how} | {times} |", flush=True)


# ---------------------------------------------------------------- three implementations of attention
def ways(clock: Clock, small: bool) -> None:
    """Forward and backward as one graph for each implementation, which shows where `auto` should switch."""
    names, variable = ("dense", "block", "passes", "auto"), "QFAST_CUDA_ATTENTION"
    before = os.environ.get(variable)
    print(f"\n| days | stocks | {' | '.join(names)} |\n| --- | --- |{' --- |' * len(names)}")
    for days in (1, 3) if small else (1, 4, 16, 64):
        for n in (40,) if small else (100, 300, 500, 800, 1000, 1500, 2000):
            tensors = [torch.randn(*shape, device=clock.device) for shape in ((days * n,), (days * n,), (days * n, 64))]
            offsets = torch.arange(days + 1) * n

            def attend(*arguments: Tensor, days: Tensor = offsets) -> Tensor:
                return ops.additive_attention(*arguments, days)

            calls = []
            for name in names:
                os.environ[variable] = name
                calls.append(captured(forward_and_backward(attend, tensors), clock.device))
            times = " | ".join(f"{time * 1e3:,.0f} us" for time in clock.medians(calls))
            print(f"| {days} | {n} | {times} |", flush=True)
    os.environ.pop(variable) if before is None else os.environ.update({variable: before})


# ---------------------------------------------------------------- scaling
def attention_call(n: int, device: torch.device) -> Callable[[], Any]:
    arguments = [torch.randn(n, device=device), torch.randn(n, device=device), torch.randn(n, 64, device=device)]
    return forward_and_backward(lambda q, k, v: ops.additive_attention(q, k, v), arguments)


def lstm_call(batch: int, steps: int, device: torch.device) -> Callable[[], Any]:
    return next(case.ours for case in _lstm_cases(batch, steps, device) if "both" in case.name)


def _lstm_cases(batch: int, steps: int, device: torch.device) -> Iterator[Case]:
    return _recurrent_pair(ops.lstm, nn.LSTM, 4, torch.randn(batch, steps, FEATURES, device=device))


def scaling(clock: Clock, small: bool, picture: str | None) -> None:
    """Exponents of time over size, by least squares of the logarithms; forward and backward as one graph."""
    points: dict[str, tuple[list[int], list[float]]] = {}
    device, shrink = clock.device, 50 if small else 1
    laws: dict[str, tuple[Sequence[int], Callable[[int], Callable[[], Any]]]] = {
        "attention over N stocks": ((100, 300, 1000, 2000), lambda n: attention_call(n, device)),
        "attention over N stocks, many": ((20_000, 100_000, 300_000, 1_000_000), lambda n: attention_call(n, device)),
        "LSTM of B windows of 20 steps": ((5_000, 10_000, 20_000, 50_000), lambda n: lstm_call(n, 20, device)),
        "LSTM of 800 windows of T steps": ((500, 1000, 2000, 4000), lambda n: lstm_call(800 // shrink, n, device)),
    }
    print("\n| case | sizes | times | exponent | R2 |\n| --- | --- | --- | --- | --- |")
    for name, (sizes, call_of) in laws.items():
        sizes = [max(2, size // shrink) for size in sizes]
        times = [clock.medians([captured(call_of(size), device)])[0] for size in sizes]
        points[name] = sizes, times
        x, y = np.log(sizes), np.log(times)
        slope, offset = np.polyfit(x, y, 1)
        fit = 1 - np.square(y - slope * x - offset).sum() / np.square(y - y.mean()).sum()
        shown = ", ".join(f"{time * 1e3:,.0f} us" for time in times)
        print(f"| {name} | {', '.join(map(str, sizes))} | {shown} | {slope:.2f} | {fit:.3f} |", flush=True)
    if picture is not None:
        draw(points, picture)


def draw(points: dict[str, tuple[list[int], list[float]]], picture: str) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6.5, 4.2), layout="constrained")
    for name, (sizes, times) in points.items():
        axis.loglog(sizes, times, "o-", label=name, markersize=4)
    axis.set_xlabel("size")
    axis.set_ylabel("ms, forward and backward, one graph")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    figure.savefig(picture, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--plot", metavar="FILE", help="draw what `scaling` measures: .png, .svg or .pdf")
    arguments = parser.parse_args()
    parts = arguments.only.split(",")
    if not set(parts) <= set(PARTS):
        parser.error(f"--only takes {', '.join(PARTS)}, got {arguments.only}")
    device = torch.device(arguments.device)
    clock = Clock(device)
    _backend.cuda_layers = "qfast"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    bandwidth, peak = copy_bandwidth(clock, arguments.small), product_peak(clock, arguments.small)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}: copy {bandwidth / 1e9:,.0f} GB/s, float32 {peak * 2e-12:,.1f} TFLOP/s\n")
    print("| case | torch | as one graph | compiled | qfast | as one graph | ratio | of copy | of float32 |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for part in parts:
        for case in OF_PART[part](device, arguments.small) if part in OF_PART else ():
            print(row(case, clock, bandwidth, peak, arguments.compile), flush=True)
    if "ways" in parts:
        ways(clock, arguments.small)
    if "scaling" in parts:
        scaling(clock, arguments.small, arguments.plot)
    if "epoch" in parts:
        epochs(device, arguments.small)


def row(case: Case, clock: Clock, bandwidth: float, peak: float, compiled: bool) -> str:
    calls = {"ours": case.ours, "graph": captured(case.ours, clock.device)}
    if case.baseline is not None:
        calls["torch"] = case.baseline
        if case.captures and clock.device.type == "cuda":
            calls["torch graph"] = captured(case.baseline, clock.device)
        if compiled:
            calls["compiled"] = torch.compile(case.baseline)
    times = dict(zip(calls, clock.medians(list(calls.values())), strict=True))
    best = min(times["ours"], times["graph"])
    texts = [
        f"{times[key] * 1e3:,.0f} us" if key in times else "-"
        for key in ("torch", "torch graph", "compiled", "ours", "graph")
    ]
    theirs = [times[key] for key in ("torch", "torch graph", "compiled") if key in times]
    ratio = f"{min(theirs) / best:.2f}x" if theirs else "-"
    copy = f"{case.moved / best * 1e3 / bandwidth:.0%}" if case.moved else "-"
    share = f"{case.products / best * 1e3 / peak:.0%}" if case.products else "-"
    return f"| {case.name} | {' | '.join(texts)} | {ratio} | {copy} | {share} |"


if __name__ == "__main__":
    main()
