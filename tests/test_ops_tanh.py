"""tanh against float64: accuracy, tails, gradients, torch's machinery."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qfast.ops import tanh


def test_within_three_units_in_the_last_place(isa):
    magnitudes = torch.logspace(-38, 2, 300_001)
    x = torch.cat((magnitudes, -magnitudes, torch.linspace(-12, 12, 300_001)))
    expected = torch.tanh(x.double())
    spacing = torch.from_numpy(np.spacing(expected.abs().float().numpy())).double()
    assert float(((tanh(x).double() - expected).abs() / spacing).max()) <= 3
    wide = x.double()
    assert float(((tanh(wide) - torch.tanh(wide)).abs() / torch.tanh(wide).abs()).max()) <= 4e-16 * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tails_zeros_and_nan(isa, dtype):
    inf = float("inf")
    x = torch.tensor([0.0, -0.0, 20.0, -20.0, 1e30, -1e30, inf, -inf, float("nan")], dtype=dtype)
    out = tanh(x)
    assert out[:8].tolist() == [0.0, 0.0, 1.0, -1.0, 1.0, -1.0, 1.0, -1.0]
    assert torch.signbit(out[:2]).tolist() == [False, True]
    assert bool(out[8].isnan())


@pytest.mark.parametrize("shape", [(), (0,), (1,), (7, 3), (33_333,)])
def test_shapes_and_strides(isa, shape):
    x = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(tanh(x), torch.tanh(x), rtol=1e-14, atol=0)
    wide = torch.randn(5, 6, 8)
    torch.testing.assert_close(tanh(wide.transpose(0, 2)[::2]), torch.tanh(wide.transpose(0, 2)[::2]))
    assert tanh(wide.transpose(0, 2)).is_contiguous()


def test_derivatives():
    x = torch.randn(11, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(tanh, (x,))
    assert torch.autograd.gradgradcheck(tanh, (x,))
    torch.library.opcheck(torch.ops.qfast.tanh.default, (x,))
    torch.testing.assert_close(
        torch.func.vmap(torch.func.hessian(tanh))(x), torch.func.vmap(torch.func.hessian(torch.tanh))(x)
    )


def test_other_dtypes_are_torchs():
    assert tanh(torch.ones(3, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert tanh(torch.tensor([1])).dtype == torch.float32
