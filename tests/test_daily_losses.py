"""Losses and scores of whole days: definitions, gradients, missing labels, weights, days without a ranking."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from qfast.metrics import daily_ic
from qfast.training import daily
from qfast.training.daily import Days, day_ranks, day_soft_ranks
from qfast.training.daily_losses import DAILY_LOSSES, DAILY_METRICS, TEMPERATURE, DaySamples, daily_scores
from qfast.training.losses import LOSS_NAMES, METRIC_NAMES, masked_mse

LOSSES = pytest.mark.parametrize("name", list(DAILY_LOSSES))
WEIGHTED = pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])


def batch(weighted: bool, seed: int = 0, dtype: torch.dtype = torch.float64):
    """Labels, weights and days of five days: two ordinary ones, one of equal labels, one stock, and no label."""
    generator = torch.Generator().manual_seed(seed)
    day = torch.tensor([4] * 9 + [1] * 6 + [2] * 4 + [3] + [0] * 3)[torch.randperm(23, generator=generator)]
    label = torch.randn(23, dtype=dtype, generator=generator)
    label[day == 4] = label[day == 4].round(decimals=0)  # ties
    label[(day == 1).nonzero()[:2, 0]] = torch.tensor([float("nan"), float("inf")], dtype=dtype)
    label[day == 2], label[day == 0] = 1.5, float("nan")
    weight = torch.rand(23, dtype=dtype, generator=generator) if weighted else None
    if weight is not None:
        weight[(day == 4).nonzero()[0, 0]] = 0.0
    return label, weight, DaySamples(day, 9)


def predictions(seed: int = 1, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(23, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def weighted_correlation(x, y, w):
    x, y = x - np.average(x, weights=w), y - np.average(y, weights=w)
    return (w * x * y).sum() / np.sqrt((w * x * x).sum() * (w * y * y).sum())


def soft_ranks(x):
    z = (x - x.mean()) / x.std()
    return 0.5 + (1 / (1 + np.exp(-(z[:, None] - z) / TEMPERATURE))).sum(1)


def of_one_day(name, x, y, w):
    """The definition of docs/training.md for one day, with NumPy."""
    if name == "listnet":
        z = (y - y.mean()) / y.std()
        target, log_probability = np.exp(z) / np.exp(z).sum(), x - np.log(np.exp(x).sum())
        return -(w * target * log_probability).sum()
    if name == "rank_ic":
        x, y = soft_ranks(x), pd.Series(y).rank().to_numpy()
    return w.mean() * (1 - weighted_correlation(x, y, w))


@LOSSES
@WEIGHTED
def test_a_loss_is_the_mean_of_its_definition_over_the_days(name, weighted):
    label, weight, samples = batch(weighted)
    x = predictions()
    values = []
    for day in (1, 4):  # the others have no ranking
        rows = (samples.day == day) & label.isfinite()
        w = torch.ones(int(rows.sum())) if weight is None else weight[rows]
        kind = "ic" if name == "mse+ic" else name
        values.append(of_one_day(kind, x[rows].numpy(), label[rows].numpy(), w.double().numpy()))
    expected = np.mean(values) + (float(masked_mse(x, label, weight)) if name == "mse+ic" else 0.0)
    assert float(DAILY_LOSSES[name](x, label, weight, samples)) == pytest.approx(expected, rel=1e-12)


@LOSSES
@WEIGHTED
def test_gradients_in_float64(name, weighted):
    label, weight, samples = batch(weighted)
    x = predictions().requires_grad_()
    assert torch.autograd.gradcheck(lambda p: DAILY_LOSSES[name](p, label, weight, samples), (x,))


@LOSSES
def test_the_order_and_the_numbers_of_the_days_do_not_matter(name):
    label, weight, samples = batch(weighted=True)
    x = predictions()
    order = torch.randperm(23, generator=torch.Generator().manual_seed(5))
    moved = DaySamples(-7 * samples.day[order], 23)
    one = DAILY_LOSSES[name](x, label, weight, samples)
    other = DAILY_LOSSES[name](x[order], label[order], weight[order], moved)
    assert float(one) == pytest.approx(float(other), rel=1e-12)


@pytest.mark.parametrize("name", ["ic", "rank_ic", "listnet"])
def test_days_without_a_ranking_have_zero_gradient(name):
    label, weight, samples = batch(weighted=False)
    x = predictions().requires_grad_()
    DAILY_LOSSES[name](x, label, weight, samples).backward()
    without = (samples.day != 1) & (samples.day != 4) | ~label.isfinite()
    assert (x.grad[without] == 0).all()
    assert (x.grad[~without] != 0).all()
    nothing = (samples.day != 1) & (samples.day != 4)
    rest = DaySamples(samples.day[nothing], 9)
    x = predictions()[nothing].requires_grad_()
    loss = DAILY_LOSSES[name](x, label[nothing], None, rest)
    loss.backward()
    assert (loss.item(), x.grad.abs().sum().item()) == (0.0, 0.0)


@pytest.mark.parametrize("name", ["ic", "rank_ic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_constant_predictions_have_ic_0_and_zero_gradient(name, dtype):
    label, _, samples = batch(weighted=False, dtype=dtype)
    rounding = torch.finfo(dtype).eps * torch.arange(23, dtype=dtype).remainder(3)
    for constant in (torch.zeros(23, dtype=dtype), torch.full((23,), 0.7, dtype=dtype), 1 + rounding):
        x = constant.requires_grad_()
        loss = DAILY_LOSSES[name](x, label, None, samples)
        loss.backward()
        assert (loss.item(), x.grad.abs().sum().item()) == (1.0, 0.0)


@pytest.mark.parametrize("scale", [1e-30, 1e30], ids=["tiny", "huge"])
@pytest.mark.parametrize("name", ["ic", "rank_ic"])
def test_the_scale_of_predictions_and_labels_does_not_matter(name, scale):
    label, _, samples = batch(weighted=False, dtype=torch.float32)
    x = predictions(dtype=torch.float32)
    expected = float(DAILY_LOSSES[name](x, label, None, samples))
    scaled = (scale * x).requires_grad_()
    loss = DAILY_LOSSES[name](scaled, scale * label, None, samples)
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert scaled.grad.isfinite().all()


@LOSSES
def test_constant_weights_multiply_the_loss(name):
    label, _, samples = batch(weighted=False)
    plain = DAILY_LOSSES[name](predictions(), label, None, samples)
    double = DAILY_LOSSES[name](predictions(), label, torch.full((23,), 2.0, dtype=torch.float64), samples)
    assert float(double) == pytest.approx(2 * float(plain), rel=1e-12)


def test_a_day_with_small_weights_counts_less():
    day = torch.tensor([0, 0, 0, 1, 1, 1])
    label, x = torch.tensor([1.0, 2, 3, 1, 2, 3]), torch.tensor([1.0, 2, 3, 3, 2, 1])  # IC 1 and -1
    weight = torch.tensor([1.0, 1, 1, 0.5, 0.5, 0.5])
    assert float(DAILY_LOSSES["ic"](x, label, weight, DaySamples(day, 3))) == pytest.approx((0 + 0.5 * 2) / 2)


def test_no_loss_reads_the_device_from_the_host(monkeypatch):
    """A captured CUDA graph must not depend on values of the batch."""
    label, weight, samples = batch(weighted=True)
    x = predictions().requires_grad_()

    def refuse(*args):
        raise AssertionError("a value was read on the host")

    for method in ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "nonzero", "cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, method, refuse)
    losses = [loss(x, label, weight, samples) for loss in DAILY_LOSSES.values()]
    torch.stack(losses).sum().backward()


# ---------------------------------------------------------------- ranks
def test_ranks_equal_those_of_pandas():
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(0, 6, (200,), generator=generator).double()
    order, days = Days.of(torch.randint(0, 7, (200,), generator=generator), 200)
    values = values[order]
    expected = pd.Series(values.numpy()).groupby(days.number.numpy()).rank()
    assert day_ranks(values, days).tolist() == expected.tolist()


def test_soft_ranks_approach_the_ranks_and_do_not_depend_on_blocks(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(60, dtype=torch.float64, generator=generator)
    order, days = Days.of(torch.randint(0, 4, (60,), generator=generator), 60)
    values, valid = values[order].requires_grad_(), torch.ones(60, dtype=torch.bool)
    assert torch.allclose(day_soft_ranks(values, days, valid, 1e-6), day_ranks(values, days))
    soft = day_soft_ranks(values, days, valid, 0.3)
    (gradient,) = torch.autograd.grad(soft.square().sum(), values)
    monkeypatch.setattr(daily, "PAIRS", 7)
    blocks = day_soft_ranks(values, days, valid, 0.3)
    assert torch.equal(blocks, soft)
    assert torch.equal(torch.autograd.grad(blocks.square().sum(), values)[0], gradient)


# ---------------------------------------------------------------- scores
@pytest.mark.parametrize("metric", list(DAILY_METRICS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_scores_equal_the_metrics_of_a_run(metric, dtype):
    rng = np.random.default_rng(3)
    sizes = [1, 2, 3, 40, 7, 25, 5]
    index = pd.MultiIndex.from_tuples(
        [
            (pd.Timestamp("2024-01-01") + pd.Timedelta(days=d), f"S{i:02d}")
            for d, n in enumerate(sizes)
            for i in range(n)
        ],
        names=["datetime", "instrument"],
    )
    score, label = (pd.Series(rng.standard_normal(len(index)).round(1), index) for _ in range(2))
    day = index.get_level_values(0).day.to_numpy()
    score[day == 7], label[day == 6] = 0.3, -1.0  # a constant day of each
    label[rng.random(len(index)) < 0.1] = np.nan
    score.iloc[20] = np.nan
    expected = dict(zip(DAILY_METRICS, daily_ic(score.astype(np.float64), label), strict=True))[metric].dropna()
    shuffled = torch.from_numpy(rng.permutation(len(index)))
    x, y = (torch.tensor(s.to_numpy(), dtype=dtype)[shuffled] for s in (score, label))
    if dtype == torch.float32:
        expected = dict(zip(DAILY_METRICS, daily_ic(score.astype(np.float32), label.astype(np.float32)), strict=True))
        expected = expected[metric].dropna()
    values = daily_scores(x, y, DaySamples(torch.tensor(day)[shuffled], 40), metric)
    np.testing.assert_allclose(values.numpy(), expected.to_numpy(), rtol=1e-12)


def test_no_sample_has_no_score():
    empty = torch.empty(0)
    assert len(daily_scores(empty, empty, DaySamples(empty.long(), 0), "ic")) == 0


def test_the_names_are_complete():
    assert set(LOSS_NAMES) == {"mse", *DAILY_LOSSES}
    assert set(METRIC_NAMES) == {"", "loss", "mse", *DAILY_METRICS}
