"""Transformer and Localformer estimators: weight decay, Qlib's dropout masks, and weight files."""

from __future__ import annotations

import importlib

import numpy as np
import pandas as pd
import pytest
import torch

from qfast.models import LocalformerModel, TransformerModel, ts
from support.fits import dataset_for, parametrize_estimators, same_weights, weights

FLAT = [TransformerModel, LocalformerModel]
ROLLING = [ts.TransformerModel, ts.LocalformerModel]
all_kinds = parametrize_estimators([*FLAT, *ROLLING])
SIZES = {"d_feat": 3, "d_model": 8, "num_layers": 1, "n_epochs": 3, "batch_size": 32, "lr": 0.01, "seed": 1}
SMALL = {**SIZES, "nhead": 2, "lr": 1e-3}
ONE_EPOCH = {**SMALL, "n_epochs": 1}


def qlib_estimator(kind: type, **arguments):
    """Qlib's model."""
    pytest.importorskip("qlib", reason="pyqlib is the oracle; install qfast-models[qlib]")
    stem, suffix = kind.__name__.removesuffix("Model").lower(), "" if kind in FLAT else "_ts"
    module = importlib.import_module(f"qlib.contrib.model.pytorch_{stem}{suffix}")
    return getattr(module, kind.__name__)(**arguments, **({"n_jobs": 0} if suffix else {}))


def samples(kind: type):
    """The same data for both models."""
    pytest.importorskip("qlib", reason="pyqlib is the oracle; install qfast-models[qlib]")
    from support.qlib import qlib_frames

    return qlib_frames("" if kind in FLAT else "_ts")


# ---------------------------------------------------------------- arguments
@all_kinds
def test_the_decay_goes_into_the_optimiser_and_leaves_unused_weights_alone(kind):
    model = kind(**SIZES, reg=0.5)
    assert [group["weight_decay"] for group in model.train_optimizer.param_groups] == [0.5]
    before = weights(model)
    model.fit(dataset_for(kind))
    after = weights(model)
    unused = [key for key in before if key.startswith(("encoder_layer.", "pos_encoder."))]
    assert len(unused) == 13
    assert all(before[key].equal(after[key]) for key in unused)
    assert not before["decoder_layer.weight"].equal(after["decoder_layer.weight"])
    assert not same_weights(after, weights(kind(**SIZES, reg=0.0).fit(dataset_for(kind))))


# ---------------------------------------------------------------- compared with Qlib
@all_kinds
def test_large_weight_decay_follows_qlib(kind, tmp_path):
    arguments = {**SMALL, "reg": 0.3, "optimizer": "gd", "lr": 0.02}
    expected, result = {}, {}
    theirs = qlib_estimator(kind, **arguments)
    theirs.fit(samples(kind), expected, save_path=str(tmp_path / "x.pt"))
    model = kind(**arguments).fit(samples(kind), result)
    for name in ("train", "valid"):
        np.testing.assert_allclose(result[name], expected[name], rtol=1e-5)
    of_theirs = theirs.model.state_dict()
    for key, value in weights(model).items():
        torch.testing.assert_close(value, of_theirs[key], rtol=1e-4, atol=1e-6)


@all_kinds
def test_compat_draws_qlibs_masks(kind, tmp_path):
    arguments = {**SMALL, "dropout": 0.3, "num_layers": 2, "nhead": 4}
    expected, result, without_compat = {}, {}, {}
    theirs = qlib_estimator(kind, **arguments)
    theirs.fit(samples(kind), expected, save_path=str(tmp_path / "x.pt"))
    model = kind(**arguments, compat="qlib").fit(samples(kind), result)
    for name in ("train", "valid"):
        np.testing.assert_allclose(result[name], expected[name], rtol=1e-5)
    prediction = theirs.predict(samples(kind))
    pd.testing.assert_series_equal(model.predict(samples(kind)), prediction, rtol=1e-4, atol=1e-5, check_names=False)
    kind(**arguments).fit(samples(kind), without_compat)
    if torch._C._dispatch_has_kernel_for_dispatch_key("qfast::encoder_layer", "CPU"):  # qfast's masks
        assert not np.allclose(without_compat["valid"], expected["valid"], rtol=1e-6)


@all_kinds
@pytest.mark.parametrize("name", ["best.safetensors", "best.pkl"])
def test_weight_files_travel_both_ways(kind, name, tmp_path):
    dataset = dataset_for(kind)
    model = kind(**ONE_EPOCH).fit(dataset, save_path=tmp_path / name)
    again = kind(**{**SMALL, "seed": 9}).load_weights(tmp_path / name)
    pd.testing.assert_series_equal(again.predict(dataset), model.predict(dataset))
    theirs = qlib_estimator(kind, **{**SMALL, "seed": 5})
    torch.save(theirs.model.state_dict(), tmp_path / "theirs.pkl")
    model.load_weights(tmp_path / "theirs.pkl")
    assert same_weights(weights(model), theirs.model.state_dict())
    if name.endswith("pkl"):
        theirs.model.load_state_dict(torch.load(tmp_path / name, weights_only=True))
        assert same_weights(theirs.model.state_dict(), weights(again))
