"""Transformer and Localformer estimators at work: the reference's numbers, files, interruptions, workflows."""

from __future__ import annotations

import importlib
import json
import pickle

import numpy as np
import pandas as pd
import pytest
import torch

from qfast.data import TSDatasetH
from qfast.errors import ConfigError, DataError
from qfast.models import LocalformerModel, TransformerModel, ts
from qfast.workflow.predict import predict
from qfast.workflow.run import run
from support.fits import StopAt, dataset_for, same, weights
from support.frames import SEGMENTS, flat, make_frame, rolling
from support.workflows import TEXT, write_case

FLAT = [TransformerModel, LocalformerModel]
ROLLING = [ts.TransformerModel, ts.LocalformerModel]
all_kinds = pytest.mark.parametrize(
    "kind", [*FLAT, *ROLLING], ids=lambda kind: f"{kind.__module__.split('.')[-1]}.{kind.__name__}"
)
SIZES = {"d_feat": 3, "d_model": 8, "num_layers": 1, "n_epochs": 3, "batch_size": 32, "lr": 0.01, "seed": 1}
SMALL = {**SIZES, "nhead": 2, "lr": 1e-3}
ONE_EPOCH = {**SMALL, "n_epochs": 1}


def reference(kind: type, **arguments):
    """The reference's own model."""
    pytest.importorskip("qlib", reason="pyqlib is the oracle; install qfast-models[qlib]")
    stem, suffix = kind.__name__.removesuffix("Model").lower(), "" if kind in FLAT else "_ts"
    module = importlib.import_module(f"qlib.contrib.model.pytorch_{stem}{suffix}")
    return getattr(module, kind.__name__)(**arguments, **({"n_jobs": 0} if suffix else {}))


def samples(kind: type):
    """Of the same rows for either."""
    pytest.importorskip("qlib", reason="pyqlib is the oracle; install qfast-models[qlib]")
    from support.qlib import qlib_frames

    return qlib_frames("" if kind in FLAT else "_ts")


# ---------------------------------------------------------------- arguments
@all_kinds
def test_get_params_rebuild_the_model(kind):
    model = kind(**SIZES, reg=0.01, dropout=0.1)
    again = kind(**model.get_params())
    assert again.get_params() == model.get_params()
    assert again.reg == 0.01
    assert same(weights(again), weights(model))
    assert again.model is again.network


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
    assert not same(after, weights(kind(**SIZES, reg=0.0).fit(dataset_for(kind))))


@all_kinds
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"d_model": 7}, "d_model must be even.* got 7"),
        ({"nhead": 3}, r"nhead must divide d_model=64, got 3\. Remedy: one of"),
        ({"num_layers": 0}, "num_layers must be a whole number of at least 1, got 0"),
        ({"dropout": 1.5}, r"dropout must be in \[0, 1\], got 1.5"),
        ({"reg": -1}, "reg must be a number of at least 0, got -1"),
        ({"weight_decay": 0.1}, "has no argument 'weight_decay': its name here is 'reg'"),
        ({"hidden_size": 8}, "has no argument 'hidden_size'"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(kind, arguments, message):
    with pytest.raises(ConfigError, match=message):
        kind(**arguments)


# ---------------------------------------------------------------- learning
@all_kinds
def test_a_planted_signal_is_learnt(kind):
    frame = make_frame(120, 12, 12 if kind in FLAT else 3, holes=0.05)
    newest = "F3" if kind in FLAT else "F0"  # feature 0 at the last step
    frame[("label", "LABEL0")] = frame[("feature", newest)] * 0.9 + 0.1 * frame[("label", "LABEL0")]
    segments = {
        "train": ("2020-01-01", "2020-04-30"), "valid": ("2020-05-01", "2020-05-31"), "test": ("2020-06-01", None),
    }  # fmt: skip
    dataset = dataset_for(kind, frame=frame, segments=segments)
    model = kind(**{**SMALL, "n_epochs": 8, "lr": 3e-3, "dropout": 0.05}).fit(dataset)
    prediction = model.predict(dataset)
    assert prediction.corr(frame[("label", "LABEL0")].reindex(prediction.index)) > 0.85


@pytest.mark.parametrize("pair", list(zip(FLAT, ROLLING, strict=True)), ids=lambda pair: pair[0].__name__)
def test_rolling_windows_train_as_the_same_windows_laid_out_flat(pair):
    dataset, parts = rolling(), []
    for name in ("train", "valid", "test"):
        windows = dataset.windows(name, "learn")
        table = windows.batch(torch.arange(len(windows))).transpose(1, 2).flatten(1).numpy()  # feature-major
        columns = pd.MultiIndex.from_product([["feature"], [f"F{j}" for j in range(table.shape[1])]])
        frame = pd.DataFrame(table, index=windows.keys(), columns=columns)
        frame[("label", "LABEL0")] = windows.label.numpy()
        parts.append(frame)
    laid_out = flat(frame=pd.concat(parts).sort_index())
    whole = {**SMALL, "batch_size": 8192}  # one batch, larger than the segment: the order of the samples is nothing
    of_flat, of_rolling = pair[0](**whole).fit(laid_out), pair[1](**whole).fit(dataset)
    for name in ("train", "valid", "valid_all", "train_loss"):
        np.testing.assert_allclose(of_rolling.history_[name], of_flat.history_[name], rtol=1e-5)
    found, expected = of_rolling.predict(dataset), of_flat.predict(laid_out)
    pd.testing.assert_series_equal(found.sort_index(), expected.sort_index(), rtol=1e-4, atol=1e-5)


@all_kinds
def test_dropout_repeats_with_the_seed_and_counts_in_training_only(kind):
    fits = [kind(**{**SMALL, "n_epochs": 2}, dropout=p).fit(dataset_for(kind)) for p in (0.5, 0.5, 0.0)]
    assert fits[0].evals_result_ == fits[1].evals_result_
    assert fits[0].evals_result_ != fits[2].evals_result_
    pd.testing.assert_series_equal(fits[0].predict(dataset_for(kind)), fits[0].predict(dataset_for(kind)))


@all_kinds
def test_predictions_do_not_depend_on_the_batches(kind):
    dataset = dataset_for(kind)
    model = kind(**ONE_EPOCH).fit(dataset)
    whole = model.predict(dataset)
    for batch_size in (1, 7, 8192):
        model._params["batch_size"] = batch_size
        pd.testing.assert_series_equal(model.predict(dataset), whole, rtol=1e-5, atol=1e-6)


@all_kinds
def test_data_with_nan_is_refused(kind):
    frame = make_frame(70, 9, 12 if kind in FLAT else 3)
    frame.iloc[5, 1] = np.nan
    with pytest.raises(DataError, match="F1"):
        kind(**SMALL).fit(dataset_for(kind, frame=frame))


@pytest.mark.parametrize("kind", ROLLING)
def test_windows_of_one_step(kind):
    dataset = TSDatasetH(handler=make_frame(70, 9, 3), segments=SEGMENTS, step_len=1)
    model = kind(**ONE_EPOCH).fit(dataset)
    assert model.predict(dataset).notna().all()


# ---------------------------------------------------------------- beside the reference
@all_kinds
def test_large_weight_decay_follows_the_reference(kind, tmp_path):
    arguments = {**SMALL, "reg": 0.3, "optimizer": "gd", "lr": 0.02}
    expected, found = {}, {}
    theirs = reference(kind, **arguments)
    theirs.fit(samples(kind), expected, save_path=str(tmp_path / "x.pt"))
    model = kind(**arguments).fit(samples(kind), found)
    for name in ("train", "valid"):
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5)
    of_theirs = theirs.model.state_dict()
    for key, value in weights(model).items():
        torch.testing.assert_close(value, of_theirs[key], rtol=1e-4, atol=1e-6)


@all_kinds
def test_compat_draws_the_references_masks(kind, tmp_path):
    arguments = {**SMALL, "dropout": 0.3, "num_layers": 2, "nhead": 4}
    expected, found, own = {}, {}, {}
    theirs = reference(kind, **arguments)
    theirs.fit(samples(kind), expected, save_path=str(tmp_path / "x.pt"))
    model = kind(**arguments, compat="qlib").fit(samples(kind), found)
    for name in ("train", "valid"):
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5)
    prediction = theirs.predict(samples(kind))
    pd.testing.assert_series_equal(model.predict(samples(kind)), prediction, rtol=1e-4, atol=1e-5, check_names=False)
    kind(**arguments).fit(samples(kind), own)
    if torch._C._dispatch_has_kernel_for_dispatch_key("qfast::encoder_layer", "CPU"):  # masks of our own
        assert not np.allclose(own["valid"], expected["valid"], rtol=1e-6)


@all_kinds
@pytest.mark.parametrize("name", ["best.safetensors", "best.pkl"])
def test_weight_files_travel_both_ways(kind, name, tmp_path):
    dataset = dataset_for(kind)
    model = kind(**ONE_EPOCH).fit(dataset, save_path=tmp_path / name)
    again = kind(**{**SMALL, "seed": 9}).load_weights(tmp_path / name)
    pd.testing.assert_series_equal(again.predict(dataset), model.predict(dataset))
    theirs = reference(kind, **{**SMALL, "seed": 5})
    torch.save(theirs.model.state_dict(), tmp_path / "theirs.pkl")
    model.load_weights(tmp_path / "theirs.pkl")
    assert same(weights(model), theirs.model.state_dict())
    if name.endswith("pkl"):
        theirs.model.load_state_dict(torch.load(tmp_path / name, weights_only=True))
        assert same(theirs.model.state_dict(), weights(again))


# ---------------------------------------------------------------- files and interruptions
@all_kinds
@pytest.mark.parametrize("moment", ["batch", "checkpoint"])
def test_an_interrupted_fit_resumes_to_the_unbroken_result(kind, moment, tmp_path):
    arguments = {**SMALL, "n_epochs": 4, "dropout": 0.3}
    unbroken = kind(**arguments).fit(dataset_for(kind))
    broken = kind(**arguments)
    with pytest.raises(KeyboardInterrupt):
        broken.fit(dataset_for(kind), callbacks=[StopAt(2, moment)], checkpoint_dir=tmp_path)
    torch.manual_seed(99)
    np.random.seed(99)
    resumed = kind(**arguments).fit(dataset_for(kind), checkpoint_dir=tmp_path, resume=True)
    assert resumed.evals_result_ == unbroken.evals_result_
    assert same(weights(resumed), weights(unbroken))


@all_kinds
def test_it_is_pickled_with_its_weights(kind):
    model = kind(**ONE_EPOCH).fit(dataset_for(kind))
    again = pickle.loads(pickle.dumps(model))
    pd.testing.assert_series_equal(again.predict(dataset_for(kind)), model.predict(dataset_for(kind)))


# ---------------------------------------------------------------- workflows
@all_kinds
def test_a_workflow_file(kind, tmp_path):
    """As the reference's own workflow files name the model; the run is scored again from its folder."""
    config, path = write_case(tmp_path)
    config.write_text(TEXT.replace("hidden_size: 4, num_layers: 1", "d_model: 8, num_layers: 1, reg: 2e-3"))
    module = f"task.model.module_path=qlib.contrib.model.pytorch_{kind.__name__.removesuffix('Model').lower()}"
    change = [f"task.model.class={kind.__name__}", module]
    if kind in ROLLING:
        change = [
            change[0], f"{module}_ts", "task.dataset.class=TSDatasetH", "task.dataset.kwargs.step_len=5",
            "task.model.kwargs.d_feat=6", "task.model.kwargs.n_jobs=20",
        ]  # fmt: skip
    run(config, path, change, output=tmp_path / "run", seed=1)
    kept = json.loads((tmp_path / "run" / "model.json").read_text())
    assert kind.__name__ in json.dumps(kept)
    assert "0.002" in json.dumps(kept)
    scores = predict(tmp_path / "run", path)
    assert len(scores) > 0
    assert scores.notna().all()
