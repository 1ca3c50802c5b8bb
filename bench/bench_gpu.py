"""Operators and epochs on a GPU, compared with torch's layers and with the device's copy bandwidth and FMA peak.

    PYTHONPATH=$PWD python bench/bench_gpu.py [--only step,recurrent,tcn,encoder,attention,gather,adam,ways] [--compile]

The parts `scaling` (exponents of time over size) and `epoch` (three epochs of each model) take minutes and run only if
`--only` names them. The result is a Markdown table with one row per implementation, printed as soon as it is timed.
A case that fails prints its reason and the run continues. If the failure leaves the GPU unusable for this process, a
new process continues with the next case. The exit status is 1 if any case failed.

Times are medians by CUDA events after a warm-up. "graph" is the same call captured as one CUDA graph, which removes
the cost of launches. The column "torch" is the fastest of torch's times above divided by the time of the row, and the
last columns are the share of the copy bandwidth and of the float32 peak. Backward passes start from the sum of
squares. A step is an estimator's: gather, forward, loss, backward, clipping, Adam. Its baseline uses torch's layers,
indexing and Adam. Networks use qfast's recurrent and encoder operators unless the name of the case says otherwise.
`--compile` also times torch.compile of the baseline. `--device cpu --small` tests the script itself.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from bench_epoch import FEATURES, STEP_LEN, alpha158_shaped
from gpu_cases import OF_PART, Call, Case, Recipes, attention_call, lstm_call

from qfast import _backend
from qfast.data import TSDatasetH
from qfast.models import ts

LONG_PARTS = ("scaling", "epoch")
WARM_UP, REPEATS = 5, 30


@dataclass(frozen=True)
class Failures:
    """What a run could not measure."""

    count: int
    continue_at: int | None = None  # index of the next case, if this process can no longer use the GPU


class Clock:
    """Milliseconds of a call on a device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def once(self, call: Call) -> float:
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

    def median(self, call: Call) -> float:
        for _ in range(WARM_UP):
            call()
        return statistics.median(self.once(call) for _ in range(REPEATS))


@dataclass(frozen=True)
class Limits:
    """Bytes moved and multiply-adds per second that the device reaches."""

    bandwidth: float
    products: float

    @staticmethod
    def measure(clock: Clock, small: bool) -> Limits:
        """Time a copy, reads and writes together, and a large float32 matrix product without TF32."""
        size, n = (2**22, 512) if small else (2**30, 8192)
        source = torch.empty(size, dtype=torch.uint8, device=clock.device)
        target = torch.empty_like(source)
        a, b = torch.randn(2, n, n, device=clock.device)
        return Limits(
            2 * size / clock.median(lambda: target.copy_(source)) * 1e3, n**3 / clock.median(lambda: a @ b) * 1e3
        )


def captured(call: Call, device: torch.device) -> Call:
    """The call as one CUDA graph; on other devices the call itself."""
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

    def replay() -> object:
        graph.replay()
        return call  # its closure holds the memory from which the graph reads

    return replay


def variants(case: Case, device: torch.device, compiled: bool) -> Iterator[tuple[str, Callable[[], Call]]]:
    """Names of the implementations, and functions that prepare them. A failed capture can harm only those after it."""
    if case.baseline is not None:
        yield "torch", lambda: case.baseline
    if case.ours is not None:
        yield "qfast", lambda: case.ours
    if device.type == "cuda" and case.baseline is not None and case.captures:
        yield "torch, graph", lambda: captured(case.baseline, device)
    if device.type == "cuda" and case.ours is not None:
        yield "qfast, graph", lambda: captured(case.ours, device)
    if compiled and case.baseline is not None:
        yield "torch, compiled", lambda: torch.compile(case.baseline)
    for name, call in case.graphs.items():
        yield name, lambda call=call: captured(call, device)


def row(case: Case, name: str, variant: str, time: float, torchs: Sequence[float], limits: Limits) -> str:
    """A line of the table for a variant that takes `time` milliseconds."""
    ratio = f"{min(torchs) / time:.2f}x" if torchs and not variant.startswith("torch") else "-"
    copy = f"{case.moved / time * 1e3 / limits.bandwidth:.0%}" if case.moved else "-"
    share = f"{case.products / time * 1e3 / limits.products:.0%}" if case.products else "-"
    return f"| {name} | {variant} | {time * 1e3:,.0f} us | {ratio} | {copy} | {share} |"


def usable(device: torch.device) -> bool:
    """Whether this process can still compute on the device. Some errors and failed captures end that."""
    try:
        return bool(torch.randn(8, device=device).isfinite().all())
    except RuntimeError:
        return False


def reason(error: Exception) -> str:
    """The first line of the error's message."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def time_case(name: str, build: Callable[[], Case], clock: Clock, limits: Limits, compiled: bool) -> int:
    """Print a row for each variant of a case as soon as it is timed. Return how many failed."""
    try:
        case = build()
    except Exception as error:  # reported, whatever it is
        print(f"| {name} | - | FAILED: {reason(error)} |", flush=True)
        return 1
    failed, torchs = 0, []
    for variant, prepare in variants(case, clock.device, compiled):
        try:
            time = clock.median(prepare())
        except Exception as error:
            print(f"| {name} | {variant} | FAILED: {reason(error)} |", flush=True)
            failed += 1
            continue
        if variant.startswith("torch"):
            torchs.append(time)
        print(row(case, name, variant, time, torchs, limits), flush=True)
    return failed


def time_cases(recipes: Recipes, clock: Clock, limits: Limits, compiled: bool = False, skip: int = 0) -> Failures:
    """Time all cases after the first `skip`, until the device is no longer usable."""
    failed = 0
    for number, (name, build) in enumerate(recipes):
        if number >= skip:
            new = time_case(name, build, clock, limits, compiled)
            failed += new
            if new and not usable(clock.device):
                return Failures(failed, number + 1)
    return Failures(failed)


# ---------------------------------------------------------------- epochs and scaling
def epochs(device: torch.device, small: bool) -> int:
    """Time a training pass over about 500,000 windows of each time-series model. Return how many failed."""
    frame = alpha158_shaped(*((20, 60) if small else (300, 1900)))
    dates = frame.index.levels[0]
    cut = dates[int(len(dates) * 0.9)]
    segments = {"train": (None, cut), "valid": (cut + (dates[1] - dates[0]), None)}
    dataset = TSDatasetH(handler=frame, segments=segments, step_len=STEP_LEN)
    print("\n| model | layers | steps | training pass | with both evaluations |\n| --- | --- | --- | --- | --- |")
    failed = 0
    for name in ("LSTM", "GRU", "ALSTM", "GATs", "TCN", "TransformerModel", "LocalformerModel"):
        for layers in _backend.LAYERS if name != "TCN" else ("qfast",):
            _backend.cuda_layers = layers
            for graphs in (False, True):
                title = f"{name} | {layers} | {'graphs' if graphs else 'as written'}"
                try:
                    print(f"| {title} | {epoch_times(name, device, dataset, graphs)} |", flush=True)
                except Exception as error:
                    print(f"| {title} | FAILED: {reason(error)} |", flush=True)
                    failed += 1
    return failed


def epoch_times(name: str, device: torch.device, dataset: TSDatasetH, graphs: bool) -> str:
    """Seconds of the training pass and of the whole epoch, as cells of a table."""
    model = getattr(ts, name)(
        device=str(device), d_feat=FEATURES, n_epochs=3, seed=0, cuda_graphs=graphs, progress=False
    )
    model.fit(dataset)
    last = model.history_.iloc[-1]  # the first epoch pays for memory, kernels and graphs
    return f"{last['train_seconds']:.2f} s | {last['seconds']:.2f} s"


def scaling(clock: Clock, small: bool, picture: str | None) -> int:
    """Print exponents of time over size, by least squares of the logarithms. Return how many failed."""
    points: dict[str, tuple[Sequence[int], list[float]]] = {}
    device, shrink = clock.device, 50 if small else 1
    laws: dict[str, tuple[Sequence[int], Callable[[int], Call]]] = {
        "attention over N stocks": ((100, 300, 1000, 2000), lambda n: attention_call(n, device)),
        "attention over N stocks, many": ((20_000, 100_000, 300_000, 1_000_000), lambda n: attention_call(n, device)),
        "LSTM of B windows of 20 steps": ((5_000, 10_000, 20_000, 50_000), lambda n: lstm_call(n, 20, device)),
        "LSTM of 800 windows of T steps": ((500, 1000, 2000, 4000), lambda n: lstm_call(800 // shrink, n, device)),
    }
    print("\n| case | sizes | times | exponent | R2 |\n| --- | --- | --- | --- | --- |")
    failed = 0
    for name, (full_sizes, call_of) in laws.items():
        sizes = [max(2, size // shrink) for size in full_sizes]
        try:
            times = [clock.median(captured(call_of(size), device)) for size in sizes]
        except Exception as error:
            print(f"| {name} | FAILED: {reason(error)} |", flush=True)
            failed += 1
            continue
        points[name] = sizes, times
        x, y = np.log(sizes), np.log(times)
        slope, offset = np.polyfit(x, y, 1)
        fit = 1 - np.square(y - slope * x - offset).sum() / np.square(y - y.mean()).sum()
        shown = ", ".join(f"{time * 1e3:,.0f} us" for time in times)
        print(f"| {name} | {', '.join(map(str, sizes))} | {shown} | {slope:.2f} | {fit:.3f} |", flush=True)
    if picture is not None:
        draw(points, picture)
    return failed


def draw(points: dict[str, tuple[Sequence[int], list[float]]], picture: str) -> None:
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


# ---------------------------------------------------------------- command line
def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(OF_PART), help="parts, separated by commas")
    parser.add_argument(
        "--skip", type=int, default=0, metavar="N", help="leave out the first N cases of the first part"
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--plot", metavar="FILE", help="draw what `scaling` measures: .png, .svg or .pdf")
    options = parser.parse_args(arguments)
    options.parts = options.only.split(",")
    allowed = (*OF_PART, *LONG_PARTS)
    if not set(options.parts) <= set(allowed):
        parser.error(f"--only: expected names among {', '.join(allowed)}, got {options.only}")
    return options


def run_tables(options: argparse.Namespace, clock: Clock, limits: Limits) -> int:
    """Run the parts that consist of cases. Return how many measurements of this process failed."""
    parts = [part for part in options.parts if part in OF_PART]
    failed = 0
    for number, part in enumerate(parts):
        skip = options.skip if number == 0 else 0
        failures = time_cases(OF_PART[part](clock.device, options.small), clock, limits, options.compile, skip)
        failed += failures.count
        if failures.continue_at is not None:
            print(f"The device is no longer usable after a case of {part}: a new process continues.", flush=True)
            flags = [flag for flag, on in (("--compile", options.compile), ("--small", options.small)) if on]
            rest = ["--only", ",".join(parts[number:]), "--skip", str(failures.continue_at), "--device", options.device]
            subprocess.run([sys.executable, __file__, *rest, *flags], check=False)
            return failed
    return failed


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts on the command line. Return 1 if any case failed, else 0."""
    options = parsed(arguments)
    device = torch.device(options.device)
    clock = Clock(device)
    _backend.cuda_layers = "qfast"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    limits = Limits.measure(clock, options.small)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(
        f"{name}, torch {torch.__version__}: copy {limits.bandwidth / 1e9:,.0f} GB/s, "
        f"float32 {limits.products * 2e-12:,.1f} TFLOP/s\n"
    )
    print("| case | implementation | time | torch | of copy | of float32 |\n| --- | --- | --- | --- | --- | --- |")
    failed = run_tables(options, clock, limits)
    if "scaling" in options.parts:
        failed += scaling(clock, options.small, options.plot)
    if "epoch" in options.parts:
        failed += epochs(device, options.small)
    if failed:
        print(f"{failed} measurements FAILED")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
