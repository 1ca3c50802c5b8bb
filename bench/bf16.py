"""Products of bfloat16 on the CPU compared with float32 and with torch's autocast: time and errors.

    python bench/bf16.py [--models LSTM GRU ...] [--repeats 5] [--output bench/results/28_bf16.json]

The networks have Qlib's sizes on windows of 20 steps with 20 features. A training step is forward, loss, backward,
clipping and Adam. "Qlib" is the same network with torch's layers, which Qlib uses. All sides alternate in one process
on one thread; the figure is the lowest process CPU time. Errors are relative norms of the difference from float64, of
the predictions and of the gradient of all weights. GATs needs pyqlib, whose network computes the attention of all pairs
of stocks. If OpenVINO is installed, its inference of the networks that it
converts is measured too, with float32 and with bfloat16.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import importlib.util
import json
import platform
import time
from collections.abc import Callable
from contextlib import nullcontext
from datetime import date
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from qfast.nn import ALSTMModel, GATModel, GRUModel, Localformer, LSTMModel, TCNModel, Transformer
from qfast.training.optim import ClippedAdam

STEPS, FEATURES = 20, 20
RECURRENT = {"d_feat": FEATURES, "hidden_size": 64, "num_layers": 2, "dropout": 0.0}
ENCODER = {"d_feat": FEATURES, "d_model": 64, "nhead": 2, "num_layers": 2, "dropout": 0.0}
NETWORKS: dict[str, tuple[int, Callable[[], nn.Module]]] = {  # rows of a batch, and the network
    "LSTM": (800, lambda: LSTMModel(**RECURRENT)),
    "GRU": (800, lambda: GRUModel(**RECURRENT)),
    "ALSTM": (800, lambda: ALSTMModel(**RECURRENT)),
    "GATs, 300 stocks": (300, lambda: GATModel(**RECURRENT, base_model="LSTM")),
    "TCN": (2000, lambda: TCNModel(num_input=FEATURES, output_size=1, num_channels=[32] * 5, kernel_size=7, dropout=0)),
    "Transformer": (2048, lambda: Transformer(**ENCODER)),
    "Localformer": (2048, lambda: Localformer(**ENCODER)),
}
OPENVINO = ("LSTM", "GRU", "TCN", "Transformer")  # networks that are converted
SIDES = ("Qlib float32", "Qlib autocast", "qfast float32", "qfast bf16")


class Side:
    """One network with its optimizer, on one of the four sides."""

    def __init__(self, name: str, network: nn.Module, x: Tensor, label: Tensor) -> None:
        self.network: Any = copy.deepcopy(network)
        self.autocast = name == "Qlib autocast"
        self.x, self.label = x, label
        parameters = self.network.parameters
        if name.startswith("Qlib"):
            self.network = qlib_network(self.network)
            self.optimizer: torch.optim.Optimizer = torch.optim.Adam(self.network.parameters(), lr=1e-4)
        else:
            self.optimizer = ClippedAdam(parameters(), lr=1e-4, limit=3.0)
        if name == "qfast bf16":
            self.network.precision = "bf16"
        self.clips = name.startswith("Qlib")

    def predict(self) -> Tensor:
        """Predictions, without gradients."""
        with torch.no_grad(), self._context():
            return self.network(self.x)

    def step(self) -> None:
        """One training step."""
        with self._context():
            loss = (self.network(self.x).float() - self.label).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        if self.clips:
            torch.nn.utils.clip_grad_value_(self.network.parameters(), 3.0)
        self.optimizer.step()

    def outcome(self) -> tuple[Tensor, Tensor]:
        """Predictions and the gradients of all parameters, as vectors in float64."""
        with self._context():
            prediction = self.network(self.x).to(self.label.dtype)
        loss = (prediction - self.label).square().mean()
        gradients = torch.autograd.grad(loss, list(self.network.parameters()), allow_unused=True)
        flat = torch.cat([part.double().flatten() for part in gradients if part is not None])
        return prediction.detach().double(), flat

    def _context(self) -> Any:
        return torch.autocast("cpu", torch.bfloat16) if self.autocast else nullcontext()


def qlib_network(network: Any) -> nn.Module:
    """Qlib's network with the same weights: torch's layers, and for GATs pyqlib's network."""
    if not isinstance(network, GATModel):
        return cast("nn.Module", network.to_reference())
    qlib: Any = importlib.import_module("qlib.contrib.model.pytorch_gats_ts")
    theirs: nn.Module = qlib.GATModel(**RECURRENT, base_model="LSTM").to(next(network.parameters()).dtype)
    theirs.load_state_dict(network.state_dict())
    return theirs


def windows(name: str, rows: int) -> tuple[Tensor, Tensor]:
    """Inputs and labels."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(rows, STEPS, FEATURES, generator=rng)
    return (x.transpose(1, 2) if name == "TCN" else x), torch.randn(rows, generator=rng)


def milliseconds(calls: list[Callable[[], object]], repeats: int) -> list[float]:
    """The lowest CPU time of each call; the calls alternate."""
    lowest = [float("inf")] * len(calls)
    for _ in range(repeats):
        for number, call in enumerate(calls):
            start = time.process_time()
            call()
            lowest[number] = min(lowest[number], time.process_time() - start)
    return [1e3 * seconds for seconds in lowest]


def relative(a: Tensor, b: Tensor) -> float:
    """Norm of the difference over the norm of b."""
    return float((a - b).norm() / b.norm())


def measured(name: str, repeats: int) -> tuple[list[float], list[float], list[tuple[float, float]]]:
    """CPU milliseconds of a training step and of inference, and the errors, for each side."""
    rows, build = NETWORKS[name]
    torch.manual_seed(0)
    network = build()
    x, label = windows(name, rows)
    exact = Side("Qlib float32", network.double(), x.double(), label.double()).outcome()
    network.float()
    sides = [Side(side, network, x, label) for side in SIDES]
    errors = []
    for side in sides:
        prediction, gradient = side.outcome()
        errors.append((relative(prediction, exact[0]), relative(gradient, exact[1])))
    steps = milliseconds([side.step for side in sides], repeats)
    return steps, milliseconds([side.predict for side in sides], repeats), errors


def openvino_calls(network: nn.Module, x: Tensor) -> list[Callable[[], object]]:
    """Inference by OpenVINO on one thread in float32 and in bfloat16, for a fixed shape."""
    openvino: Any = importlib.import_module("openvino")
    plain: Any = network
    model = openvino.convert_model(plain.to_reference().eval(), example_input=x, input=[list(x.shape)])
    calls: list[Callable[[], object]] = []
    for precision in ("f32", "bf16"):
        settings = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1}
        request = openvino.Core().compile_model(model, "CPU", settings).create_infer_request()
        calls.append(lambda request=request: request.infer([x.numpy()]))
    return calls


def openvino_rows(names: list[str], repeats: int) -> list[list[str]]:
    """Milliseconds of inference by OpenVINO and by qfast, which alternate."""
    rows = []
    for name in names:
        count, build = NETWORKS[name]
        torch.manual_seed(0)
        network = build().eval()
        x, label = windows(name, count)
        x = x.contiguous()
        sides = [Side(side, network, x, label) for side in SIDES[2:]]
        times = milliseconds([*openvino_calls(network, x), *(side.predict for side in sides)], repeats)
        _, theirs, _, ours = times
        rows.append([_label(name), *(f"{t:.1f}" for t in times), f"{theirs / ours:.1f}x"])
        print(rows[-1], flush=True)
    return rows


def _label(name: str) -> str:
    return name if "stocks" in name else f"{name}, {NETWORKS[name][0]:,} x {STEPS}"


def tables(names: list[str], repeats: int) -> list[dict[str, Any]]:
    """The blocks of the section: times, errors, and OpenVINO."""
    calls, accuracy = [], []
    for name in names:
        steps, forward, errors = measured(name, repeats)
        label = _label(name)
        both = zip(_times_and_ratios(steps), _times_and_ratios(forward), strict=True)
        calls.append([label, *(f"{step} / {score}" for step, score in both)])
        accuracy.append(errors)
        print(calls[-1], [f"{a:.1e} / {b:.1e}" for a, b in errors], sep="\n", flush=True)
    header = ["model", *SIDES, "autocast / bf16", "float32 / bf16"]
    blocks: list[dict[str, Any]] = [
        {
            "text": f"Command: `python bench/bf16.py`, one core of an Intel Xeon of the fourth generation (AMX), "
            f"{date.today()}, a virtual machine with other work. All sides of a line alternate. CPU milliseconds of a "
            "training step / of inference:"
        },
        {"columns": header, "rows": calls},
        {
            "text": "Relative errors compared with float64, lowest and highest of the models above. The errors of bf16 "
            f"are {'' if _closer(accuracy) else 'not '}smaller than those with autocast for every model:"
        },
        {"columns": ["", *SIDES], "rows": _error_ranges(accuracy)},
    ]
    converted = [name for name in OPENVINO if name in names]
    if importlib.util.find_spec("openvino") is not None and converted:
        version = importlib.import_module("openvino").__version__.partition("-")[0]
        columns = ["model", "OpenVINO float32", "OpenVINO bf16", *SIDES[2:], "OpenVINO bf16 / bf16"]
        blocks += [
            {"text": f"CPU milliseconds of inference by OpenVINO {version} and by qfast, for a fixed batch:"},
            {"columns": columns, "rows": openvino_rows(converted, repeats)},
        ]
    return blocks


def _error_ranges(errors: list[list[tuple[float, float]]]) -> list[list[str]]:
    """For the predictions and for the gradient: the range over the models of the error of each side."""
    rows = []
    for part, name in enumerate(("predictions", "gradient")):
        sides = [[model[side][part] for model in errors] for side in range(len(SIDES))]
        rows.append([name, *(f"{min(values):.1e} to {max(values):.1e}" for values in sides)])
    return rows


def _closer(errors: list[list[tuple[float, float]]]) -> bool:
    """Whether both errors of every model are smaller with bf16 than with autocast."""
    autocast, bf16 = SIDES.index("Qlib autocast"), SIDES.index("qfast bf16")
    return all(model[bf16][part] < model[autocast][part] for model in errors for part in (0, 1))


def _times_and_ratios(times: list[float]) -> list[str]:
    _, autocast, float32, bf16 = times
    return [*(f"{time:.1f}" for time in times), f"{autocast / bf16:.1f}x", f"{float32 / bf16:.1f}x"]


def main() -> None:
    """Measure and write the section."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    blocks = tables(arguments.models, arguments.repeats)
    section = {
        "title": "Products of bfloat16",
        "machine": "one core of an Intel Xeon of the fourth generation (AMX), virtual machine with other work",
        "software": f"torch {torch.__version__}, Python {platform.python_version()}",
        "dates": [str(date.today())],
        "commands": ["python bench/bf16.py --output bench/results/28_bf16.json"],
        "blocks": blocks,
    }
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(section, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
