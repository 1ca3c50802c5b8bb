"""A day of a TCN stream, compared with the same scores from whole windows.

    python -m pytest bench/bench_tcn_stream.py -s

Both sides score 1,000 instruments, the stream from one new row of each, the network from a window of each. A window as
long as the receptive field has the stream's score. The windows of Qlib's workflows are shorter, so their scores differ.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from compare import compare, cpu_seconds

from qfast.nn import TCNModel

INSTRUMENTS = 1_000


@pytest.mark.parametrize(("kernel", "channels", "features", "T"), [(3, 128, 6, 60), (7, 32, 20, 20)])
@pytest.mark.parametrize("threads", [1, 2])
@torch.no_grad()
def test_a_day_compared_with_windows(kernel: int, channels: int, features: int, T: int, threads: int) -> None:
    torch.manual_seed(0)
    model = TCNModel(features, 1, [channels] * 5, kernel, dropout=0.5).eval()
    stream = model.stream()
    history = torch.randn(INSTRUMENTS, features, stream.receptive_field)
    warm = cpu_seconds(partial(stream.warm_start, history[:, :, :-1]))
    torch.testing.assert_close(stream.push(history[:, :, -1]), model(history), rtol=1e-4, atol=1e-5)
    rows = history[:, :, -1].contiguous()
    print(f"\n{stream}, warm start {warm:.2f} s of CPU time")
    for steps in (T, stream.receptive_field):
        windows = history[:, :, -steps:].contiguous()
        result = compare(partial(stream.push, rows), partial(model, windows), rounds=5, threads=threads)
        print(f"windows of {steps}, {threads} threads: {result}")
        if threads == 1:
            assert result.ratio >= (4 if steps > T else 1)
