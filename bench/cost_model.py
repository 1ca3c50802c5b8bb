"""Time and memory of training an LSTM on Alpha360, predicted from unit costs that a short calibration measures.

    python bench/cost_model.py calibrate COSTS.json     # about four minutes on one core
    python bench/cost_model.py predict COSTS.json       # the table of docs/scale.md
    python bench/cost_model.py validate COSTS.json      # measures two larger sizes in about seven minutes

The unit costs are CPU seconds per training window for the first layer, which has six inputs, and for each further
layer (one epoch: a training pass, and the scores of the training and validation segments), CPU seconds of the handler
per row, bytes per row at the peak of the handler and after it, and seconds and bytes per exchange of gradients. Each is
the slope between two measured sizes, so the fixed cost of a process is separate. Prices are read from a Parquet file.
Each size is measured twice, and the lower figure counts, because other programs only add time.
Everything that a calibration on one CPU core cannot measure is in `Machine` and is an assumption.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from alpha360_view import measure_apart

HIDDEN, LAYERS, BATCH, STEPS, FEATURES = 64, 2, 800, 60, 6  # Qlib's benchmark of the LSTM on Alpha360
TRAIN_PART = 0.6  # of the days
CALIBRATED, VALIDATED = ((100, 500), (300, 1_000)), ((400, 1_200), (500, 1_500))  # (instruments, days)
EXCHANGES = 30
REPEATS = 2


@dataclass(frozen=True)
class Costs:
    """Measured unit costs of one core, in CPU seconds and bytes."""

    first_layer_s: float
    further_layer_s: float
    fit_fixed_s: float
    row_s: float
    handler_fixed_s: float
    handler_row_bytes: float
    handler_fixed_bytes: float
    row_bytes: float
    fit_bytes: float
    exchange_s: float
    exchange_bytes: int

    def epoch_s(self, windows: float, layers: int = LAYERS) -> float:
        """CPU seconds of one epoch over training windows."""
        return windows * (self.first_layer_s + (layers - 1) * self.further_layer_s)

    def memory_bytes(self, rows: float) -> float:
        """The larger of the peaks of the handler and of `fit`, in bytes, for a process with `rows` rows."""
        handler = self.handler_fixed_bytes + rows * self.handler_row_bytes
        return max(handler, self.fit_bytes + rows * self.row_bytes)


@dataclass(frozen=True)
class Machine:
    """Assumed properties of a machine. No GPU, no second machine and no CPU with 64 cores has been measured.

    Attributes
    ----------
    ranks : int
        Processes of a run.
    speed : float
        Speed of a rank in a training step, relative to the calibrated core.
    step_s : float
        Shortest time of a step of a rank: kernel launches of a GPU.
    bandwidth : float
        Bytes per second of an exchange between ranks; 0 for the measured exchange between two processes.
    latency_s : float
        Seconds of each of the log2(ranks) rounds of an exchange.
    cores : int
        Cores that compute the handler.
    """

    ranks: int
    speed: float = 1.0
    step_s: float = 0.0
    bandwidth: float = 0.0
    latency_s: float = 0.0
    cores: int = 1


MACHINES = {
    "one core": Machine(1),
    "2 cores": Machine(2),
    "64 cores": Machine(64, speed=0.7, bandwidth=5e9, latency_s=50e-6, cores=1),
    "one GPU": Machine(1, speed=150, step_s=4e-3),
    "8 GPUs": Machine(8, speed=150, step_s=4e-3, bandwidth=100e9, latency_s=20e-6),
    "16 nodes of 64 cores": Machine(1024, speed=0.7, bandwidth=1.25e9, latency_s=100e-6),
}
MARKETS = {  # instruments, days or bars
    "CSI300, 10 years": (300, 2_430),
    "5,000 stocks, 2,500 days": (5_000, 2_500),
    "10,000 stocks, 20 years": (10_000, 5_040),
    "6,000 stocks, 1,250 days of 240 minutes": (6_000, 300_000),
}


def lowest(sizes: Sequence[tuple[tuple[int, int], int]]) -> dict[tuple[tuple[int, int], int], dict[str, float]]:
    """Measure each ((instruments, days), layers) `REPEATS` times in turn, and return the lowest of each figure."""
    found: dict[tuple[tuple[int, int], int], dict[str, float]] = {}
    for _ in range(REPEATS):
        for size, layers in sizes:
            run = measure_apart("view", None, *size, HIDDEN, layers)
            figures = {name: float(value) for name, value in run.items() if isinstance(value, (int, float))}
            best = found.setdefault((size, layers), figures)
            found[size, layers] = {name: min(value, best[name]) for name, value in figures.items()}
    return found


def exchange(rank: int, port: int, count: int, result: list[float]) -> None:
    """Measure the all-reduce of `count` float32 in two processes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    gradients = torch.ones(count)
    times = []
    for _ in range(EXCHANGES):
        begin = time.perf_counter()
        dist.all_reduce(gradients)
        times.append(time.perf_counter() - begin)
    if rank == 0:
        result.append(sorted(times)[EXCHANGES // 2])
    dist.destroy_process_group()


def parameters(layers: int) -> int:
    """Weights of the LSTM and its output layer."""
    sizes = [FEATURES] + [HIDDEN] * (layers - 1)
    return sum(4 * HIDDEN * (size + HIDDEN + 2) for size in sizes) + HIDDEN + 1


def calibrate() -> Costs:
    """Measure the unit costs."""
    runs = lowest([(size, layers) for size in CALIBRATED for layers in (1, 2)])

    def slope(value: str, over: str, layers: int) -> float:
        small, large = (runs[size, layers] for size in CALIBRATED)
        return (large[value] - small[value]) / (large[over] - small[over])

    one, two = (slope("fit_s", "windows", layers) for layers in (1, 2))
    small = runs[CALIBRATED[0], 2]
    row_s, row_mb, peak_mb = (slope(value, "rows", 2) for value in ("handler_s", "resident_mb", "handler_mb"))
    with mp.get_context("spawn").Manager() as manager:
        medians = manager.list()
        for _ in range(REPEATS):
            mp.spawn(exchange, (29_517, parameters(LAYERS), medians), nprocs=2)
        exchange_s = float(min(medians))
    return Costs(
        first_layer_s=one,
        further_layer_s=two - one,
        fit_fixed_s=small["fit_s"] - two * small["windows"],
        row_s=row_s,
        handler_fixed_s=small["handler_s"] - row_s * small["rows"],
        handler_row_bytes=peak_mb * 2**20,
        handler_fixed_bytes=(small["handler_mb"] - peak_mb * small["rows"]) * 2**20,
        row_bytes=row_mb * 2**20,
        fit_bytes=(small["peak_mb"] - row_mb * small["rows"]) * 2**20,
        exchange_s=exchange_s,
        exchange_bytes=4 * parameters(LAYERS),
    )


def exchange_s(costs: Costs, machine: Machine) -> float:
    """Seconds of one exchange of gradients: a ring over the ranks."""
    if machine.ranks == 1:
        return 0.0
    if not machine.bandwidth:
        return costs.exchange_s
    rounds = (machine.ranks - 1).bit_length()
    return 2 * costs.exchange_bytes / machine.bandwidth + rounds * machine.latency_s


def estimate(costs: Costs, machine: Machine, instruments: int, days: int) -> dict[str, float]:
    """Estimated hours of the handler and of one epoch, and gigabytes of each rank."""
    rows = instruments * days
    windows = TRAIN_PART * rows
    steps = windows / BATCH
    ranks = min(machine.ranks, BATCH, instruments)
    step = max(costs.epoch_s(BATCH) / ranks / machine.speed, machine.step_s) + exchange_s(costs, machine)
    return {
        "handler_h": rows * costs.row_s / machine.cores / 3600,
        "epoch_h": steps * step / 3600,
        "rank_gb": costs.memory_bytes(rows / ranks) / 1e9,
        "all_gb": ranks * costs.memory_bytes(rows / ranks) / 1e9,
    }


def print_predictions(costs: Costs) -> None:
    """Print the table of estimates."""
    print("| market | machine | one epoch, hours | memory of a rank, GB | of all ranks, GB |\n|---|---|---|---|---|")
    for market, size in MARKETS.items():
        for name, machine in MACHINES.items():
            row = estimate(costs, machine, *size)
            print(f"| {market} | {name} | {row['epoch_h']:.3g} | {row['rank_gb']:.3g} | {row['all_gb']:.3g} |")
    print("\n| market | handler, hours on one core |\n|---|---|")
    for market, size in MARKETS.items():
        print(f"| {market} | {estimate(costs, MACHINES['one core'], *size)['handler_h']:.3g} |")


def validate(costs: Costs) -> None:
    """Measure two larger sizes and print measured and predicted figures."""
    print("| instruments x days | | measured | predicted | error |\n|---|---|---|---|---|")
    for (size, _), run in lowest([(size, LAYERS) for size in VALIDATED]).items():
        figures = {
            "handler, CPU s": (run["handler_s"], costs.handler_fixed_s + run["rows"] * costs.row_s),
            "fit of one epoch, CPU s": (run["fit_s"], costs.fit_fixed_s + costs.epoch_s(run["windows"])),
            "peak memory, MB": (run["peak_mb"], costs.memory_bytes(run["rows"]) / 2**20),
        }
        for name, (measured, predicted) in figures.items():
            error = predicted / measured - 1
            print(f"| {size[0]} x {size[1]:,} | {name} | {measured:.1f} | {predicted:.1f} | {error:+.0%} |")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("calibrate", "predict", "validate"))
    parser.add_argument("costs", type=Path)
    options = parser.parse_args(arguments)
    if options.command == "calibrate":
        costs = calibrate()
        options.costs.write_text(json.dumps(asdict(costs), indent=1) + "\n")
        print(options.costs.read_text())
        return
    costs = Costs(**json.loads(options.costs.read_text()))
    print_predictions(costs) if options.command == "predict" else validate(costs)


if __name__ == "__main__":
    main()
