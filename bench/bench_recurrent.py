"""One training step, and inference, of the stacked LSTM and GRU beside torch's own layers.

    python bench/bench_recurrent.py [--threads 1] [--repeats 7] [--quick]

Both sides alternate in one process on the same weights; the figure is the least of the repeats, process CPU
time with one thread and wall clock with more. A step is forward, mean square of the last step read by a
linear unit, and backward; the optimiser is left out. The data need no gradient.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from qfast import _backend
from qfast.ops import recurrent

OURS = {"LSTM": recurrent.lstm, "GRU": recurrent.gru}
# B, T, F, H, layers
SHAPES = [
    (800, 20, 20, 64, 2),
    (800, 60, 6, 64, 2),
    (100, 20, 20, 64, 2),
    (2000, 20, 20, 64, 2),
    (5000, 20, 20, 64, 2),
    (800, 5, 20, 64, 2),
    (800, 20, 158, 64, 2),
    (800, 20, 20, 32, 2),
    (800, 20, 20, 128, 2),
    (100, 5, 6, 32, 1),
]


def layers_of(module: nn.RNNBase) -> list[list[Tensor]]:
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    return [[getattr(module, f"{name}_l{layer}") for name in names] for layer in range(module.num_layers)]


def least_ms(calls: list[Callable[[], object]], repeats: int, threads: int) -> list[float]:
    """Least milliseconds of each call, the calls taking turns; each figure covers about 0.1 s of calls."""
    clock = time.process_time if threads == 1 else time.perf_counter
    best, rounds = [float("inf")] * len(calls), [1] * len(calls)
    for repeat in range(repeats + 1):
        for i, call in enumerate(calls):
            start = clock()
            for _ in range(rounds[i]):
                call()
            each = (clock() - start) / rounds[i]
            if repeat == 0:  # warms up, and says how many calls fill 0.1 s
                rounds[i] = max(1, int(0.1 / max(each, 1e-6)))
            else:
                best[i] = min(best[i], each)
    return [1e3 * seconds for seconds in best]


def measure(name: str, shape: tuple[int, ...], repeats: int, threads: int) -> None:
    batch, steps, features, hidden, n_layers = shape
    torch.manual_seed(0)
    module = getattr(nn, name)(features, hidden, n_layers, batch_first=True)
    head = nn.Linear(hidden, 1)
    x = torch.randn(batch, steps, features)
    parameters = [*module.parameters(), *head.parameters()]

    def theirs() -> Tensor:
        return module(x)[0][:, -1]

    def ours() -> Tensor:
        return OURS[name](x, layers_of(module))[1]

    def train(last: Callable[[], Tensor]) -> None:
        for parameter in parameters:
            parameter.grad = None
        head(last()).square().mean().backward()

    def infer(last: Callable[[], Tensor]) -> None:
        with torch.no_grad():
            head(last())

    calls = [lambda: train(theirs), lambda: train(ours), lambda: infer(theirs), lambda: infer(ours)]
    torch_step, our_step, torch_infer, our_infer = least_ms(calls, repeats, threads)
    print(
        f"{name:4} B={batch:<5} T={steps:<3} F={features:<4} H={hidden:<4} L={n_layers} | "
        f"step: torch {torch_step:8.2f} ms, ours {our_step:8.2f} ms, {torch_step / our_step:4.2f}x | "
        f"inference: torch {torch_infer:8.2f} ms, ours {our_infer:8.2f} ms, {torch_infer / our_infer:4.2f}x",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="the first shape alone")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    clock = "process CPU time" if arguments.threads == 1 else "wall clock"
    print(f"{arguments.threads} threads, {clock}, tier {_backend.status()['cpu']['tier']}")
    for name in OURS:
        for shape in SHAPES[: 1 if arguments.quick else None]:
            measure(name, shape, arguments.repeats, arguments.threads)


if __name__ == "__main__":
    main()
