"""Functions that users override, compared with pyqlib: the same calls, the same scores, the same selected epoch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import qfast.models
import qfast.models.ts
from support import overrides
from support.qlib import qlib_frames, qlib_model

pytest.importorskip("qlib", reason="pyqlib is the oracle; install qfast-models[qlib]")

MODELS = ["LSTM", "GRU", "ALSTM", "GATs", "TCN", "TransformerModel", "LocalformerModel"]
MODULES = {"TransformerModel": "transformer", "LocalformerModel": "localformer"}
WEIGHTED = ("LSTM", "GRU", "ALSTM")
OVERRIDES = {
    "metric": overrides.own_metric,
    "loss": overrides.own_loss,
    "train_epoch": overrides.own_train_epoch,
    "test_epoch": overrides.own_test_epoch,
    "wrapped": overrides.wrapped,
    "fit": overrides.own_fit,
    "attributes": overrides.attributes_set,
}
# LSTM and GRU have every override. The other models share the same loop, so their calls suffice.
CASES = [
    (name, suffix, override)
    for name in MODELS
    for suffix in ("", "_ts")
    for override in OVERRIDES
    if name in ("LSTM", "GRU") or override in ("loss", "train_epoch", "wrapped")
]
OVERRIDES["days"] = overrides.own_days
CASES.append(("GATs", "", "days"))


def arguments_of(name: str, suffix: str) -> dict[str, Any]:
    """A small network and large steps, so scores rise and fall."""
    arguments: dict[str, Any] = {"d_feat": 3, "hidden_size": 8, "num_layers": 2, "n_epochs": 4, "seed": 3}
    arguments |= {"batch_size": 32, "lr": 0.02, "early_stop": 2}
    if name == "TCN":
        arguments |= {"n_chans": arguments.pop("hidden_size"), "kernel_size": 2, "dropout": 0.0}
    if name in MODULES:
        arguments |= {"d_model": arguments.pop("hidden_size"), "num_layers": 1, "lr": 1e-3}
    if name == "GATs":
        del arguments["batch_size"]
        # Qlib's flat model draws its base in the default sizes.
        arguments |= {"lr": 1e-4, "d_feat": 20} if suffix else {"hidden_size": 64, "lr": 1e-4, "d_feat": 6}
        arguments |= {"d_feat": 3} if suffix else {}
    return arguments


def assert_same_calls(ours: overrides.Calls, theirs: overrides.Calls) -> None:
    assert [call[0] for call in ours] == [call[0] for call in theirs]
    assert len(ours) > 1
    for call, expected in zip(ours, theirs, strict=True):
        assert len(call) == len(expected), call[0]
        for position, (value, wanted) in enumerate(zip(call[1:], expected[1:], strict=True)):
            if isinstance(wanted, torch.Tensor):
                assert value.dtype == wanted.dtype
                is_prediction = call[0] in ("loss_fn", "metric_fn") and position == 0
                tolerance = {"rtol": 1e-3, "atol": 1e-4} if is_prediction else {"rtol": 0.0, "atol": 0.0}
                torch.testing.assert_close(value, wanted, **tolerance, equal_nan=True)
            elif isinstance(wanted, pd.DataFrame):
                pd.testing.assert_frame_equal(value, wanted)
            else:
                assert value == wanted


@pytest.mark.parametrize(("name", "suffix", "override"), CASES, ids=["-".join(filter(None, case)) for case in CASES])
def test_an_override_is_called_as_in_qlib(name, suffix, override, tmp_path):
    arguments = arguments_of(name, suffix)
    frames = qlib_frames(suffix, holes=0.0 if name == "GATs" else 0.15, step_len=3 if name == "TCN" else 5)
    if name == "GATs" and not suffix:
        arguments["d_feat"] = 6
    build = OVERRIDES[override]
    options = {"weights": bool(suffix) and name in WEIGHTED} if override == "loss" else {}
    results = {}
    for who in ("theirs", "ours"):
        calls: overrides.Calls = []
        scores: dict[str, list[float]] = {}
        if who == "theirs":
            kind = qlib_model(name, MODULES.get(name, name.lower()), suffix)
            model = build(kind, calls, **options)(**arguments, **({"n_jobs": 0} if suffix else {}))
        else:
            kind = getattr(qfast.models.ts if suffix else qfast.models, name)
            compat = {"compat": "qlib"} if name in ("GATs", "TCN") else {}
            model = build(kind, calls, **options)(**arguments, **compat)
        model.fit(frames, scores, save_path=str(tmp_path / "weights.pt"))
        state = torch.get_rng_state(), np.random.get_state()[1]
        results[who] = calls, scores, model.predict(frames), state
    (calls, scores, prediction, state), (wanted_calls, wanted, wanted_prediction, wanted_state) = (
        results["ours"],
        results["theirs"],
    )
    if override != "attributes":
        assert_same_calls(calls, wanted_calls)
    assert len(scores["valid"]) == len(wanted["valid"])
    for segment in ("train", "valid"):
        np.testing.assert_allclose(scores[segment], wanted[segment], rtol=1e-3, atol=1e-5)
    assert int(np.argmax(scores["valid"])) == int(np.argmax(wanted["valid"]))  # the epoch whose weights remain
    pd.testing.assert_series_equal(prediction, wanted_prediction, rtol=1e-3, atol=1e-4, check_names=False)
    assert torch.equal(state[0], wanted_state[0])
    assert np.array_equal(state[1], wanted_state[1])
