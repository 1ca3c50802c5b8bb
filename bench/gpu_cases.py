"""The cases of bench_gpu.py: operators and training steps, each with a baseline of torch's layers.

A part is a function that yields pairs of a name and a function that builds the case, so a case that cannot be built is
reported like one that cannot run, and the others are not affected.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from bench_adam import NETWORKS
from bench_epoch import FEATURES, STEP_LEN, alpha158_shaped
from torch import Tensor, nn

from qfast import _backend, ops
from qfast.data import TSDatasetH
from qfast.models import ts
from qfast.nn import TCNModel
from qfast.precision import NAMES
from qfast.training.losses import masked_mse
from qfast.training.optim import ClippedAdam

Call = Callable[[], Any]
ATTENTION = "QFAST_CUDA_ATTENTION"


@dataclass(frozen=True)
class Case:
    """Implementations of one result, which needs at least `moved` bytes and `products` multiply-adds.

    `captures`: the baseline can be captured as a CUDA graph. torch's Adam, as Qlib constructs it, cannot.
    `graphs`: calls that are only timed as CUDA graphs, by name. Each is captured right before it is timed.
    """

    ours: Call | None = None
    baseline: Call | None = None
    moved: float = 0
    products: float = 0
    captures: bool = True
    graphs: Mapping[str, Call] = field(default_factory=dict)


Recipes = Iterator[tuple[str, Callable[[], Case]]]


def forward_and_backward(call: Callable[..., Tensor], tensors: Sequence[Tensor]) -> Call:
    """The gradients of the sum of squares of `call(*tensors)`."""
    arguments = [tensor.detach().requires_grad_() for tensor in tensors]
    return lambda: torch.autograd.grad(call(*arguments).square().sum(), arguments)


# ---------------------------------------------------------------- gathers and attention
def gathers(device: torch.device, small: bool) -> Recipes:
    rows = 20_000 if small else 1_000_000
    for batch, columns in ((800, 20), (5000, 20), (2048, 158)):
        yield f"gather, {batch} windows of {STEP_LEN} x {columns}", partial(_gather, device, rows, batch, columns)


def _gather(device: torch.device, rows: int, batch: int, columns: int) -> Case:
    panel = torch.randn(rows, columns, device=device)
    index = torch.randint(0, rows - STEP_LEN, (batch, 1), device=device) + torch.arange(STEP_LEN, device=device)
    moved = 2.0 * batch * STEP_LEN * columns * 4
    return Case(lambda: ops.gather_windows(panel, index), lambda: panel[index], moved)


def attention(device: torch.device, small: bool) -> Recipes:
    for n in (300, 1000) if small else (300, 1000, 5000, 100_000):
        yield f"attention over {n} stocks, 64 wide, both ways", partial(_attention, device, n)
    days, n = (4, 100) if small else (256, 800)
    yield f"graph attention, {days} days of {n} stocks, forward", partial(_graph_attention, device, days, n)


def _attention(device: torch.device, n: int) -> Case:
    arguments = [torch.randn(n, device=device), torch.randn(n, device=device), torch.randn(n, 64, device=device)]
    baseline = forward_and_backward(dense, arguments) if n <= 5000 else None
    moved = 4.0 * n * (2 + 64) * 3  # read, written, and their gradients read
    return Case(forward_and_backward(lambda q, k, v: ops.additive_attention(q, k, v), arguments), baseline, moved)


def dense(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return nn.functional.leaky_relu(query.unsqueeze(1) + key.unsqueeze(0)).softmax(1) @ value


def _graph_attention(device: torch.device, days: int, n: int) -> Case:
    offsets = day_offsets(days, n, device)
    hidden, weight, bias = (torch.randn(*shape, device=device) for shape in ((days * n, 64), (2, 64), (2,)))
    return Case(lambda: ops.graph_attention(hidden, weight, bias, offsets), moved=2.0 * 4 * days * n * 64)


def day_offsets(days: int, n: int, device: torch.device) -> Tensor:
    """Offsets of equal days in host memory. A CUDA graph can only copy from host memory that is pinned."""
    offsets = torch.arange(days + 1) * n
    return offsets.pin_memory() if device.type == "cuda" else offsets


def ways(device: torch.device, small: bool) -> Recipes:
    """Forward and backward of each implementation of attention, which shows where `auto` should switch."""
    for days in (1, 3) if small else (1, 4, 16, 64):
        for n in (40,) if small else (100, 300, 500, 800, 1000, 1500, 2000):
            yield f"attention by day, {days} x {n} stocks, both ways", partial(_ways, device, days, n)


def _ways(device: torch.device, days: int, n: int) -> Case:
    tensors = [torch.randn(*shape, device=device) for shape in ((days * n,), (days * n,), (days * n, 64))]
    offsets = day_offsets(days, n, device)
    call = forward_and_backward(lambda *arguments: ops.additive_attention(*arguments, offsets), tensors)
    return Case(graphs={name: partial(_in_way, name, call) for name in ("dense", "block", "passes", "auto")})


def _in_way(name: str, call: Call) -> Any:
    """The call with one implementation of attention."""
    before = os.environ.get(ATTENTION)
    os.environ[ATTENTION] = name
    try:
        return call()
    finally:
        os.environ.pop(ATTENTION) if before is None else os.environ.update({ATTENTION: before})


def attention_call(n: int, device: torch.device) -> Call:
    call = _attention(device, n).ours
    assert call is not None
    return call


# ---------------------------------------------------------------- layers
def recurrent(device: torch.device, small: bool) -> Recipes:
    for operator, kind, gates in ((ops.lstm, nn.LSTM, 4), (ops.gru, nn.GRU, 3)):
        for batch, steps in ((50, 20),) if small else ((800, 20), (5000, 20), (800, 60)):
            for backward in (False, True):
                name = f"{kind.__name__}, {batch} x {steps}, 2 layers of 64, {'both ways' if backward else 'forward'}"
                yield name, partial(_recurrent, device, operator, kind, gates, (batch, steps), backward)


def _recurrent(
    device: torch.device, operator: Any, kind: Any, gates: int, shape: tuple[int, int], backward: bool
) -> Case:
    hidden, layers = 64, 2
    torch.manual_seed(0)
    x = torch.randn(*shape, FEATURES, device=device)
    layer = kind(FEATURES, hidden, layers, batch_first=True).to(device)
    names, weights = zip(*((name, p.detach()) for name, p in layer.named_parameters()), strict=True)
    products = shape[0] * shape[1] * gates * hidden * (FEATURES + hidden * (2 * layers - 1))

    def ours(x: Tensor, *w: Tensor) -> Tensor:
        return operator(x, [w[:4], w[4:]], all_steps=True)[0]

    def theirs(x: Tensor, *w: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, w, strict=True)), (x,))[0]

    @torch.no_grad()
    def forward() -> Tensor:
        return layer(x)[0]

    if not backward:
        return Case(lambda: ours(x, *weights), forward, products=products)
    arguments = [x, *weights]
    both = forward_and_backward(ours, arguments), forward_and_backward(theirs, arguments)
    return Case(*both, products=3 * products)


def lstm_call(batch: int, steps: int, device: torch.device) -> Call:
    call = _recurrent(device, ops.lstm, nn.LSTM, 4, (batch, steps), backward=True).ours
    assert call is not None
    return call


def convolutions(device: torch.device, small: bool) -> Recipes:
    for batch, features, steps, channels, kernel in ((2000, 20, 20, 32, 7), (2000, 6, 60, 128, 3)):
        batch = 20 if small else batch
        name = f"TCN, {batch} x {steps}, 5 blocks of {channels}, kernel {kernel}, both ways"
        yield name, partial(_convolutions, device, (batch, features, steps), channels, kernel)


def _convolutions(device: torch.device, shape: tuple[int, int, int], channels: int, kernel: int) -> Case:
    torch.manual_seed(0)
    network = TCNModel(shape[1], 1, [channels] * 5, kernel, 0.0).to(device).eval()
    plain = network.to_reference()
    x = torch.randn(*shape, device=device)

    def gradients(network: nn.Module) -> Call:
        parameters = list(network.parameters())
        return lambda: torch.autograd.grad(network(x).square().sum(), parameters)

    return Case(gradients(network), gradients(plain))


def encoders(device: torch.device, small: bool) -> Recipes:
    for batch, steps, heads in ((16, 20, 2),) if small else ((2048, 20, 2), (2048, 60, 2)):
        name = f"encoder layer, {batch} x {steps}, 64 wide, feed-forward 2,048, both ways"
        yield name, partial(_encoder, device, batch, steps, heads)
        for number, precision in enumerate(NAMES):
            rows = batch * steps
            yield (
                f"feed-forward block, {rows} rows, forward, {precision}",
                partial(_feed_forward, device, rows, number),
            )


def _encoder_layer(device: torch.device, heads: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(64, heads, 2048, dropout=0.0, batch_first=True).to(device)


def _encoder(device: torch.device, batch: int, steps: int, heads: int) -> Case:
    layer = _encoder_layer(device, heads)
    weights = [p.detach() for p in layer.parameters()]
    names = [name for name, _ in layer.named_parameters()]
    x = torch.randn(batch, steps, 64, device=device)

    def ours(x: Tensor, *w: Tensor) -> Tensor:
        return ops.encoder_layer(x, w, heads=heads)

    def theirs(x: Tensor, *w: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, w, strict=True)), (x,))

    products = batch * steps * (4 * 64 * 64 + 2 * 64 * 2048 + 2 * steps * 64)
    both = forward_and_backward(ours, [x, *weights]), forward_and_backward(theirs, [x, *weights])
    return Case(*both, products=3.0 * products)


def _feed_forward(device: torch.device, rows: int, precision: int) -> Case:
    """The feed-forward block in one precision, by the raw operator: the last column may exceed 100 %."""
    weights = [p.detach() for p in _encoder_layer(device, 2).parameters()][4:8]
    x = torch.randn(rows, 64, device=device)
    return Case(
        lambda: torch.ops.qfast.feed_forward(x, *weights, 0.0, None, precision),
        products=len(x) * 2.0 * weights[0].numel(),
    )


# ---------------------------------------------------------------- optimizer and training steps
def optimizers(device: torch.device, small: bool) -> Recipes:
    for name, shapes in NETWORKS.items():
        yield f"clipping and Adam, {name} tensors", partial(_optimizer, device, shapes)


def _optimizer(device: torch.device, shapes: Sequence[tuple[int, ...]]) -> Case:
    ours, theirs = ([torch.randn(shape, device=device) for shape in shapes] for _ in range(2))
    for tensor in (*ours, *theirs):
        tensor.grad = torch.randn_like(tensor)
    optimizer = ClippedAdam(ours, lr=1e-3)
    plain = torch.optim.Adam(theirs, lr=1e-3, foreach=True)

    def clip_and_step() -> None:
        nn.utils.clip_grad_value_(theirs, 3.0)
        plain.step()

    moved = 7.0 * 4 * sum(tensor.numel() for tensor in ours)  # four read, three written
    return Case(optimizer.step, clip_and_step, moved, captures=False)


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


def training(device: torch.device, small: bool) -> Recipes:
    for name, batch, steps, features, arguments in STEPS:
        if small:
            batch, arguments = 12, {**arguments, **({"batch_size": 12} if "batch_size" in arguments else {})}
        title = f"{name} step, {batch} x {steps} x {features}"
        if name == "TCN":
            title += f", kernel {arguments['kernel_size']}, {arguments['n_chans']} wide"
        shape = batch, steps, features
        yield title, partial(_step, device, name, shape, arguments)
        if device.type == "cuda" and name not in ("GATs", "TCN"):
            yield f"{title}, torch's layers", partial(_step_of_torch_layers, device, name, shape, arguments)


def _step(device: torch.device, name: str, shape: tuple[int, int, int], arguments: dict[str, Any]) -> Case:
    """The estimator's step, compared with a step of torch's layers, indexing and Adam."""
    step, windows, samples = _estimator_step(device, name, shape, arguments)
    baseline = getattr(ts, name)(d_feat=shape[2], seed=0, device=str(device), **arguments)
    return Case(step, torch_step(baseline, windows, samples), captures=False)


def _step_of_torch_layers(
    device: torch.device, name: str, shape: tuple[int, int, int], arguments: dict[str, Any]
) -> Case:
    """The estimator's step, with torch's layers in the network."""
    step, _, _ = _estimator_step(device, name, shape, arguments)

    def call() -> Tensor:
        before, _backend.cuda_layers = _backend.cuda_layers, "torch"
        try:
            return step()
        finally:
            _backend.cuda_layers = before

    return Case(call)


def _estimator_step(
    device: torch.device, name: str, shape: tuple[int, int, int], arguments: dict[str, Any]
) -> tuple[Callable[[], Tensor], Any, Tensor]:
    """A step of an estimator, its windows, and the samples of the batch."""
    batch, steps, features = shape
    stocks = batch if name == "GATs" else min(batch, 300)
    dataset = _dataset(stocks, steps + batch // stocks + 9, features, steps)
    model = getattr(ts, name)(d_feat=features, seed=0, device=str(device), **arguments)
    windows = model.load_segment(dataset, "train").to(device)
    day = windows.days
    shuffled = torch.randperm(len(windows))[:batch].to(device)
    samples = day.order[int(day.bounds[-2]) :] if name == "GATs" else shuffled
    for group in model.train_optimizer.param_groups:
        group["capturable"] = device.type == "cuda"

    def step() -> Tensor:
        model.network.train()
        return model.train_step(windows, samples)

    return step, windows, samples


@cache
def _dataset(stocks: int, days: int, features: int, step_len: int) -> TSDatasetH:
    frame = alpha158_shaped(stocks, days, features)
    return TSDatasetH(handler=frame, segments={"train": (None, None)}, step_len=step_len)


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


# In the order of importance, so that a run that ends early has measured what matters most.
OF_PART: dict[str, Callable[[torch.device, bool], Recipes]] = {
    "step": training,
    "recurrent": recurrent,
    "tcn": convolutions,
    "encoder": encoders,
    "attention": attention,
    "gather": gathers,
    "adam": optimizers,
    "ways": ways,
}
