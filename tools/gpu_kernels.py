"""Run every CUDA kernel forward and backward on small shapes, for compute-sanitizer. `tools/gpu_check.sh` calls this.

    compute-sanitizer --tool memcheck python tools/gpu_kernels.py [DEVICE]

The tests compare the results; this program only has to run each kernel. The sizes include whole and partial vectors,
tiles and days.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from qfast import ops
from qfast.doctor import self_tests
from qfast.nn import ALSTMModel, GATModel, GRUModel, Localformer, LSTMModel, TCNModel, Transformer
from qfast.precision import NAMES, using_precision

LONG_DAY = 2100  # rows; a day of this length uses the kernels that sort in several blocks


def networks() -> Iterator[tuple[nn.Module, tuple[int, ...]]]:
    """Pairs of a network and the shape of its input windows."""
    kind: Any
    for kind in (LSTMModel, GRUModel, ALSTMModel):
        for hidden, batch in ((8, 5), (33, 70), (64, 130)):
            yield kind(d_feat=6, hidden_size=hidden, num_layers=2, dropout=0.3), (batch, 7, 6)
    yield GATModel(d_feat=6, hidden_size=20, num_layers=2, dropout=0.3), (37, 7, 6)
    for channels, kernel in ((5, 3), (32, 7), (130, 5)):
        yield TCNModel(6, 1, [channels] * 3, kernel, 0.3), (33, 6, 20)
    for kind in (Transformer, Localformer):
        for width, heads in ((8, 2), (64, 2), (132, 4)):
            yield kind(d_feat=6, d_model=width, nhead=heads, num_layers=2, dropout=0.3), (19, 9, 6)


def feed_forward_in(precision: str, *tensors: Tensor) -> Tensor:
    """`ops.feed_forward` with dropout in a precision of `qfast.precision`."""
    with using_precision(precision):
        return ops.feed_forward(*tensors, dropout=0.3, training=True)


def layers() -> Iterator[tuple[Callable[..., Any], Sequence[Tensor]]]:
    """Pairs of an operator and its tensors, for the operators that the networks do not call on every device."""
    for width, heads, hidden in ((8, 2, 50), (64, 4, 300), (132, 4, 70)):
        weights = list(nn.TransformerEncoderLayer(width, heads, hidden).parameters())
        for last in (False, True):
            settings = {"heads": heads, "dropout": 0.3, "training": True, "last_step": last}
            yield lambda x, *w, s=settings: ops.encoder_layer(x, w, **s), [torch.randn(19, 9, width), *weights]
        block = [torch.randn(hidden, width), torch.randn(hidden), torch.randn(width, hidden), torch.randn(width)]
        for name in NAMES:
            yield partial(feed_forward_in, name), [torch.randn(150, width), *block]
    for hidden, batch in ((8, 5), (33, 70), (64, 130), (150, 9)):
        for operator, kind in ((ops.lstm, nn.LSTM), (ops.gru, nn.GRU)):
            weights = list(kind(6, hidden, 2).parameters())
            yield (
                lambda x, *w, f=operator: f(x, [w[:4], w[4:]], dropout=0.3, training=True, all_steps=True)[0],
                [torch.randn(batch, 7, 6), *weights],
            )
        pool = [torch.randn(batch, 7, hidden), torch.randn(hidden // 2, hidden), torch.randn(hidden // 2)]
        yield partial(ops.attention_pool, dropout=0.3, training=True), [*pool, torch.randn(hidden // 2)]


def attention() -> Iterator[tuple[Callable[..., Any], Sequence[Tensor]]]:
    """Pairs of an attention operator and its tensors; short days use the pairwise kernels and one block per day."""

    def call(operator: Callable[..., Any], offsets: Tensor, algorithm: str, *tensors: Tensor) -> Tensor:
        os.environ["QFAST_CUDA_ATTENTION"] = algorithm  # stays set, because the backward pass reads it too
        return operator(*tensors, offsets)

    cases = [([1, 0, 7, 64, 300], 8), ([LONG_DAY, 3], 33), ([40] * 9, 64), ([70], 130)]
    for (sizes, width), algorithm in product(cases, ("auto", "block")):
        rows = sum(sizes)
        offsets = torch.tensor([0, *sizes]).cumsum(0)
        query, key, value = torch.randn(rows), torch.randn(rows), torch.randn(rows, width)
        yield partial(call, ops.additive_attention, offsets, algorithm), [query, key, value]
        weight, bias = torch.randn(2, width), torch.randn(2)
        yield partial(call, ops.graph_attention, offsets, algorithm), [value, weight, bias]
    del os.environ["QFAST_CUDA_ATTENTION"]


def gathers() -> Iterator[tuple[Callable[..., Any], Sequence[Tensor]]]:
    """Pairs of a gather of windows and its panel."""
    rows = torch.randint(-1, 50, (40, 8))
    for columns in (1, 3, 20):
        for layout in ("BTD", "BDT"):
            panel = torch.randn(50, columns)
            yield lambda x, at=layout: ops.gather_windows(x, rows.to(x.device), layout=at), [panel]


GROUPS = (attention, layers, gathers)


def operators() -> Iterator[tuple[Callable[..., Any], Sequence[Tensor]]]:
    """Pairs of an operator and its tensors, for all operators with CUDA kernels except the temporal convolutions."""
    for group in GROUPS:
        yield from group()


def forward_and_backward(
    call: Callable[..., Any], tensors: Sequence[Tensor], device: torch.device, dtype: torch.dtype
) -> list[Tensor]:
    """The result of a call, and the gradients of the sum of its squares."""
    inputs = [tensor.detach().to(device, dtype).requires_grad_() for tensor in tensors]
    result = call(*inputs)
    result.square().sum().backward()
    return [result.detach(), *(tensor.grad for tensor in inputs if tensor.grad is not None)]


def main() -> None:
    """Run the self-tests, the operators and the networks on the device of the command line."""
    device = torch.device(sys.argv[1] if len(sys.argv) > 1 else "cuda")
    torch.manual_seed(0)
    for name, test in self_tests().items():
        if f"({device.type})" in name:
            test()
            print("self-test", name, flush=True)
    for group in GROUPS:
        for number, (call, tensors) in enumerate(group()):
            for dtype in (torch.float32, torch.float64):
                forward_and_backward(call, tensors, device, dtype)
            print(f"{group.__name__} {number}", flush=True)  # how far a run has got that a time limit ends
    for network, shape in networks():
        for dtype in (torch.float32, torch.float64):
            network.to(device, dtype).train()
            network(torch.randn(shape, device=device, dtype=dtype)).square().sum().backward()
            network.eval()
            with torch.no_grad():
                network(torch.randn(shape, device=device, dtype=dtype))
        print(type(network).__name__, shape, flush=True)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
