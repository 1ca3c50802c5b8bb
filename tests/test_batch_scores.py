"""Scores of all batches of a pass, compared bit for bit with the loss of each batch in a call of its own."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from qfast.data.batching import Batches
from qfast.training import losses
from qfast.training.losses import batch_scores, masked_mse


def unlabelled_sometimes(n: int, dtype: torch.dtype) -> torch.Tensor:
    label = torch.randn(n, generator=torch.Generator().manual_seed(1), dtype=dtype)
    label[::7], label[3::50] = torch.nan, torch.inf
    return label


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [1, 97, 1000])
@pytest.mark.parametrize("block", [1, 500, 1 << 16])
def test_scores_are_those_of_separate_calls(dtype, size, block, monkeypatch):
    monkeypatch.setattr(losses, "BLOCK_SAMPLES", block)
    label, prediction = unlabelled_sometimes(1000, dtype), torch.linspace(-2, 2, 1000, dtype=dtype)
    label[97:194] = torch.nan  # the second batch of 97 has no label
    batches = Batches.of_size(torch.arange(1000), size, drop_last=False)
    parts = [slice(*bounds) for bounds in pairwise(batches.bounds.tolist())]
    counts = np.array([int(torch.isfinite(label[part]).sum()) for part in parts])
    scores = np.array([-float(masked_mse(prediction[part], label[part])) for part in parts])
    scores[counts == 0] = np.nan
    mean, overall = batch_scores(prediction, label, batches, "loss")
    assert mean == scores[: batches.whole][counts[: batches.whole] > 0].mean()
    assert overall == (scores * counts)[counts > 0].sum() / counts.sum()
    strict, _ = batch_scores(prediction, label, batches, "loss", skip_unlabelled=False)
    assert np.isnan(strict) if (counts[: batches.whole] == 0).any() else strict == mean


def test_no_label_at_all():
    batches = Batches.of_size(torch.arange(10), 4, drop_last=False)
    scores = batch_scores(torch.zeros(10), torch.full((10,), torch.nan), batches, "")
    assert np.isnan(scores).all()


def test_a_metric_that_is_not_the_loss_is_called_for_each_batch(monkeypatch):
    monkeypatch.setitem(losses.METRICS, "largest", lambda prediction, label, weight: (prediction - label).abs().max())
    batches = Batches.of_size(torch.arange(9), 4, drop_last=False)
    mean, overall = batch_scores(torch.arange(9.0), torch.zeros(9), batches, "largest")
    assert mean == -(3 + 7) / 2
    assert overall == pytest.approx(-(3 * 4 + 7 * 4 + 8) / 9)


def test_errors_of_few_batches_are_in_memory_at_a_time():
    assert [*losses._blocks([0, 3])] == [[0, 3]]
    blocks = [*losses._blocks([0, 40_000, 60_000, 70_000, 200_000])]
    assert blocks == [[0, 40_000, 60_000], [60_000, 70_000], [70_000, 200_000]]
