"""Behaviour common to the fourteen estimators: learning, arguments, saved weights, interruptions, workflow files.

Most tests run for every estimator, flat and time-series. Tests of a single model are in test_alstm.py, test_gats.py,
test_tcn.py and test_transformer_model.py; tests of the training loop, which all estimators share, in test_estimator.py.
"""

from __future__ import annotations

import copy
import json
import logging
import pickle

import numpy as np
import pandas as pd
import pytest
import torch

from qfast.data import TSDatasetH
from qfast.errors import ConfigError, DataError
from qfast.models import ALSTM, GRU, LSTM, TCN, GATs, LocalformerModel, TransformerModel, ts
from qfast.workflow.predict import predict
from qfast.workflow.run import run
from support.fits import (
    ESTIMATORS,
    FLAT,
    TIME_SERIES,
    StopAt,
    dataset_for,
    estimator_name,
    frame_for,
    is_time_series,
    laid_out_flat,
    parametrize_estimators,
    same_weights,
    small_arguments,
    small_model,
    weights,
)
from support.frames import SEGMENTS, make_frame, rolling
from support.workflows import TEXT, write_case

RECURRENT = [LSTM, ts.LSTM, GRU, ts.GRU]
ATTENTIVE = [ALSTM, ts.ALSTM]
GRAPHS = [GATs, ts.GATs]
CONVOLUTIONS = [TCN, ts.TCN]
ENCODERS = [TransformerModel, ts.TransformerModel, LocalformerModel, ts.LocalformerModel]
ROWS = [kind for kind in ESTIMATORS if kind not in GRAPHS]  # their batches are rows, not days


# ---------------------------------------------------------------- learning
# Changes to `small_arguments`, and the least correlation of predictions with the planted labels.
LEARNING = [
    *((kind, {"n_epochs": 15}, 0.9) for kind in RECURRENT),
    *((kind, {"n_epochs": 10, "lr": 0.02, "dropout": 0.05, "rnn_type": "LSTM"}, 0.9) for kind in ATTENTIVE),
    (ts.ALSTM, {"n_epochs": 10, "lr": 0.02, "dropout": 0.05, "rnn_type": "GRU"}, 0.9),
    *((kind, {"n_epochs": 10}, 0.9) for kind in GRAPHS),
    *((kind, {"n_epochs": 20, "dropout": 0.1}, 0.9) for kind in CONVOLUTIONS),
    *((kind, {"n_epochs": 8, "lr": 3e-3, "dropout": 0.05}, 0.85) for kind in ENCODERS),
]


@pytest.mark.parametrize(
    ("kind", "changes", "correlation"),
    LEARNING,
    ids=["-".join([estimator_name(kind), changes.get("rnn_type", "")]).strip("-") for kind, changes, _ in LEARNING],
)
def test_a_planted_signal_is_learnt(kind, changes, correlation):
    frame = frame_for(kind, 120, 12, holes=0.05)
    newest = "F0" if is_time_series(kind) else "F3"  # feature 0 at the last step
    frame[("label", "LABEL0")] = frame[("feature", newest)] * 0.9 + 0.1 * frame[("label", "LABEL0")]
    segments = {
        "train": ("2020-01-01", "2020-04-30"),
        "valid": ("2020-05-01", "2020-05-31"),
        "test": ("2020-06-01", None),
    }
    dataset = dataset_for(kind, frame=frame, segments=segments)
    model = small_model(kind, **changes).fit(dataset)
    prediction = model.predict(dataset)
    assert prediction.corr(frame[("label", "LABEL0")].reindex(prediction.index)) > correlation
    assert model.history_["train"].iloc[-1] > model.history_["train"].iloc[0]


@pytest.mark.parametrize("pair", list(zip(FLAT, TIME_SERIES, strict=True)), ids=lambda pair: pair[0].__name__)
def test_rolling_windows_train_as_the_same_windows_laid_out_flat(pair):
    """The flat model is compared with Qlib's elsewhere; this test extends that to the time-series model."""
    days = pair[0] in GRAPHS
    # With one batch that holds the whole segment, the order of the samples does not matter.
    changes = {} if days else {"batch_size": 8192, "dropout": 0.0}
    dataset = rolling()
    columns = laid_out_flat(dataset)
    of_flat, of_rolling = (
        small_model(kind, **changes).fit(data) for kind, data in zip(pair, (columns, dataset), strict=True)
    )
    assert len(of_rolling.history_) == 3
    for name in ("train", "valid", "valid_all", "train_loss"):
        np.testing.assert_allclose(of_rolling.history_[name], of_flat.history_[name], rtol=1e-6 if days else 1e-5)
    pd.testing.assert_series_equal(
        of_rolling.predict(dataset).sort_index(),
        of_flat.predict(columns).sort_index(),
        rtol=1e-5 if days else 1e-4,
        atol=1e-5 if pair[0] in ENCODERS else 1e-6,
    )


@parametrize_estimators()
def test_dropout_repeats_with_the_seed_and_applies_in_training_only(kind):
    fits = [small_model(kind, dropout=p).fit(dataset_for(kind)) for p in (0.5, 0.5, 0.0)]
    assert fits[0].evals_result_ == fits[1].evals_result_
    assert fits[0].evals_result_ != fits[2].evals_result_
    pd.testing.assert_series_equal(fits[0].predict(dataset_for(kind)), fits[0].predict(dataset_for(kind)))


@parametrize_estimators(ROWS)
def test_predictions_do_not_depend_on_the_batches(kind):
    dataset = dataset_for(kind)
    model = small_model(kind, n_epochs=1).fit(dataset)
    whole = model.predict(dataset)
    for batch_size in (1, 7, 8192):
        model._params["batch_size"] = batch_size
        pd.testing.assert_series_equal(model.predict(dataset), whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("compat", [None, "qlib"])
@parametrize_estimators(TIME_SERIES)
def test_windows_of_one_step(kind, compat):
    if kind is ts.TCN and compat:
        pytest.skip("with compat='qlib' TCN predicts only where step_len == d_feat, as Qlib's does")
    dataset = TSDatasetH(handler=make_frame(70, 9, 3), segments=SEGMENTS, step_len=1)
    model = small_model(kind, n_epochs=1, compat=compat).fit(dataset)
    assert model.predict(dataset).notna().all()


# ---------------------------------------------------------------- refused data
# GATs leaves out the stock and the flat GRU the row, as Qlib does: see test_gats.py and test_estimator.py.
@parametrize_estimators([kind for kind in ROWS if kind is not GRU])
def test_data_with_nan_is_refused(kind):
    frame = frame_for(kind)
    frame.iloc[5, 1] = np.nan
    with pytest.raises(DataError, match="F1"):
        small_model(kind).fit(dataset_for(kind, frame=frame))


@parametrize_estimators()
def test_a_reweighter_without_reweight_is_refused(kind):
    with pytest.raises(ConfigError, match="reweighter must have a method reweight"):
        small_model(kind).fit(dataset_for(kind), reweighter={"class": "Something"})


# ---------------------------------------------------------------- arguments
WRONG_ARGUMENTS = [
    (
        ESTIMATORS,
        [
            ({"drop_out": 0.1}, r"has no argument 'drop_out'. Did you mean 'dropout'"),
            ({"lr": "1e-3"}, "lr must be a number of at least 0, got '1e-3'"),
            ({"lr": None}, "lr must be a number of at least 0, got None"),
            ({"lr": float("inf")}, "lr must be a number of at least 0, got inf"),
            ({"n_epochs": 1.5}, "n_epochs must be a whole number"),
            ({"n_epochs": -1}, "n_epochs must be a whole number of at least 0"),
            ({"early_stop": -1}, "early_stop must be a whole number of at least 0"),
            ({"loss": "mae"}, r"loss must be one of \['mse', 'ic', .*\] or, in Python, a function of .* got 'mae'"),
            ({"loss": ["mse"]}, "loss must be one of"),
            ({"metric": "mae"}, "metric must be one of"),
            ({"optimizer": "adamw"}, r"optimizer must be 'adam' or 'gd', got 'adamw'. Did you mean 'adam'"),
            ({"compat": "pyqlib"}, "compat must be None or 'qlib'"),
            ({"d_feat": 0}, "d_feat must be a whole number of at least 1, got 0"),
            ({"num_layers": 0}, "num_layers must be a whole number of at least 1, got 0"),
            ({"dropout": 1.5}, r"dropout must be in \[0, 1\], got 1.5"),
            ({"seed": -1}, "seed must be a whole number of at least 0, got -1"),
            ({"seed": 2**32}, r"seed must be below 2\*\*32"),
            ({"seed": 1.0}, "seed must be a whole number"),
            ({"progress": "banana"}, "progress must be True, False, 'auto' or 'lines', got 'banana'"),
            ({"GPU": "0"}, "GPU must be a whole number"),
            ({"device": None}, "device must be 'auto', 'cpu', 'cuda' or 'cuda:N', got None"),
            ({"device": "meta"}, "device must be 'auto', 'cpu', 'cuda' or 'cuda:N', got 'meta'"),
            ({"device": "gpu0"}, "device must be 'auto', 'cpu', 'cuda' or 'cuda:N', got 'gpu0'"),
        ],
    ),
    (ROWS, [({"batch_size": 0}, "batch_size must be a whole number of at least 1, got 0")]),
    (
        [kind for kind in ESTIMATORS if kind not in ENCODERS],
        [({"weight_decay": "a"}, "weight_decay must be a number of at least 0, got 'a'")],
    ),
    (
        [*RECURRENT, *ATTENTIVE, *GRAPHS],
        [
            ({"hidden_size": 0}, "hidden_size must be a whole number of at least 1, got 0"),
            ({"hidden_size": 2.5}, "hidden_size must be a whole number of at least 1, got 2.5"),
            ({"n_chans": 8}, "has no argument 'n_chans'"),
        ],
    ),
    (
        ATTENTIVE,
        [
            ({"rnn_typ": "GRU"}, "ALSTM has no argument 'rnn_typ'. Did you mean 'rnn_type'"),
            ({"rnn_type": "LSTN"}, "rnn_type must be one of .* Did you mean 'LSTM'"),
            ({"rnn_type": None}, "rnn_type must be one of .* got None"),
        ],
    ),
    (
        GRAPHS,
        [
            ({"base_model": "RNN"}, r"base_model must be one of \['GRU', 'LSTM'\], got 'RNN'"),
            ({"base_model": "gru"}, r"got 'gru'\. Did you mean 'GRU'\?"),
            ({"shuffle_days": 1}, "shuffle_days must be True or False, got 1"),
            ({"shuffle_day": True}, r"GATs has no argument 'shuffle_day'\. Did you mean 'shuffle_days'\?"),
            ({"model_path": 3}, "model_path must be a path or None, got 3"),
            ({"compat": "0.9.7"}, "compat must be None or 'qlib'"),
        ],
    ),
    (
        CONVOLUTIONS,
        [
            ({"n_chans": 2.5}, "n_chans must be a whole number of at least 1, got 2.5"),
            ({"kernel_size": 0}, "kernel_size must be a whole number of at least 1, got 0"),
            ({"n_chan": 8}, "TCN has no argument 'n_chan'. Did you mean 'n_chans'"),
            ({"hidden_size": 8}, "TCN has no argument 'hidden_size'"),
        ],
    ),
    (
        ENCODERS,
        [
            ({"d_model": 7}, "d_model must be even.* got 7"),
            ({"nhead": 3}, r"nhead must divide d_model=64, got 3\. Remedy: one of"),
            ({"reg": -1}, "reg must be a number of at least 0, got -1"),
            ({"weight_decay": 0.1, "reg": 0.2}, "reg=0.2 and weight_decay=0.1 are the same argument"),
            ({"hidden_size": 8}, "has no argument 'hidden_size'"),
        ],
    ),
]


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        pytest.param(kind, arguments, message, id=f"{estimator_name(kind)}-{arguments}")
        for kinds, rows in WRONG_ARGUMENTS
        for kind in kinds
        for arguments, message in rows
    ],
)
def test_wrong_arguments_are_named(kind, arguments, message):
    with pytest.raises(ConfigError, match=message):
        kind(**arguments)


# The attribute under which Qlib's class holds its network.
NETWORK_ATTRIBUTES = {
    LSTM: "lstm_model",
    ts.LSTM: "LSTM_model",
    GRU: "gru_model",
    ts.GRU: "GRU_model",
    TCN: "tcn_model",
    ts.TCN: "TCN_model",
    **dict.fromkeys(ATTENTIVE, "ALSTM_model"),
    **dict.fromkeys(GRAPHS, "GAT_model"),
    **dict.fromkeys(ENCODERS, "model"),
}
OWN_ARGUMENTS = {
    **{kind: {"rnn_type": "LSTM"} for kind in ATTENTIVE},
    **{kind: {"base_model": "LSTM", "shuffle_days": False, "compat": "qlib", "device": "cpu"} for kind in GRAPHS},
    **{kind: {"reg": 0.01} for kind in ENCODERS},
}


@parametrize_estimators()
def test_get_params_rebuild_the_model(kind, caplog):
    arguments = small_arguments(kind, dropout=0.1, **OWN_ARGUMENTS.get(kind, {}))
    model = kind(**arguments)
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="qfast"):
        again = kind(**model.get_params())
    assert caplog.records == [] or kind in ATTENTIVE  # ALSTM logs which rnn_type it builds
    assert again.get_params() == model.get_params()
    assert {name: getattr(again, name) for name in arguments if name not in ("seed", "device")} == {
        name: value for name, value in arguments.items() if name not in ("seed", "device")
    }
    assert str(again.device) == "cpu" or "device" not in arguments
    assert same_weights(weights(again), weights(model))
    assert getattr(again, NETWORK_ATTRIBUTES[kind]) is again.network


# ---------------------------------------------------------------- files and interruptions
@parametrize_estimators()
@pytest.mark.parametrize("name", ["best.safetensors", "best.pkl", "best.pt"])
def test_weights_survive_a_file(kind, name, tmp_path):
    model = small_model(kind).fit(dataset_for(kind), save_path=tmp_path / "new folder" / name)
    other = small_model(kind, seed=9).load_weights(tmp_path / "new folder" / name)
    pd.testing.assert_series_equal(other.predict(dataset_for(kind)), model.predict(dataset_for(kind)))
    assert [path.name for path in (tmp_path / "new folder").iterdir()] == [name]  # no temporary file is left


@parametrize_estimators()
@pytest.mark.parametrize("moment", ["batch", "checkpoint"])
def test_an_interrupted_fit_resumes_to_the_unbroken_result(kind, moment, tmp_path):
    extra = {name: value for name, value in OWN_ARGUMENTS.get(kind, {}).items() if name in ("rnn_type", "base_model")}
    arguments = small_arguments(kind, n_epochs=5, dropout=0.3, **extra)
    unbroken = kind(**arguments).fit(dataset_for(kind))
    broken = kind(**arguments)
    with pytest.raises(KeyboardInterrupt):
        broken.fit(dataset_for(kind), callbacks=[StopAt(2, moment)], checkpoint_dir=tmp_path)
    assert broken.predict(dataset_for(kind)).notna().all()  # usable, with the best weights up to here
    np.random.seed(99)
    torch.manual_seed(99)
    resumed = kind(**arguments).fit(dataset_for(kind), checkpoint_dir=tmp_path, resume=True)
    assert len(resumed.history_) == 5
    assert resumed.evals_result_ == unbroken.evals_result_
    assert same_weights(weights(resumed), weights(unbroken))
    assert [path.name for path in tmp_path.iterdir()] == ["last.safetensors"]
    for model in (resumed, unbroken):  # a further fit continues both alike
        np.random.seed(5)
        torch.manual_seed(5)
        model.fit(dataset_for(kind))
    assert resumed.evals_result_ == unbroken.evals_result_


@parametrize_estimators()
def test_a_fitted_model_is_pickled_and_copied(kind):
    extra = {"rnn_type": "LSTM"} if kind in ATTENTIVE else {}
    model = small_model(kind, **extra).fit(dataset_for(kind))
    expected = model.predict(dataset_for(kind))
    for again in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        pd.testing.assert_series_equal(again.predict(dataset_for(kind)), expected)
        again.fit(dataset_for(kind))  # training continues in the copy alone
        assert not same_weights(weights(again), weights(model))


# ---------------------------------------------------------------- workflow files
# Qlib's module and the network's arguments in its workflow files.
WORKFLOWS = [
    *((kind, "lstm", "hidden_size: 4, num_layers: 1", {}) for kind in (LSTM, ts.LSTM)),
    *((kind, "gru", "hidden_size: 4, num_layers: 1", {}) for kind in (GRU, ts.GRU)),
    *(
        (kind, "alstm", "hidden_size: 4, num_layers: 1", {"rnn_type": rnn_type})
        for kind in ATTENTIVE
        for rnn_type in ("GRU", "LSTM")
    ),
    *((kind, "gats", "hidden_size: 4, num_layers: 1", {"base_model": "LSTM"}) for kind in GRAPHS),
    *((kind, "tcn", "n_chans: 4, kernel_size: 3, num_layers: 2, dropout: 0.1", {}) for kind in CONVOLUTIONS),
    *(
        (kind, kind.__name__.removesuffix("Model").lower(), "d_model: 8, num_layers: 1", {"reg": 0.002})
        for kind in ENCODERS
    ),
]


@pytest.mark.parametrize(
    ("kind", "module", "network", "extra"),
    WORKFLOWS,
    ids=["-".join([estimator_name(kind), extra.get("rnn_type", "")]).strip("-") for kind, _, _, extra in WORKFLOWS],
)
def test_a_workflow_file_of_qlib(kind, module, network, extra, tmp_path):
    """Runs with Qlib's class and module; the run is scored again from its folder."""
    config, path = write_case(tmp_path)
    config.write_text(TEXT.replace("hidden_size: 4, num_layers: 1", network))
    module = f"task.model.module_path=qlib.contrib.model.pytorch_{module}"
    changes = [f"task.model.class={kind.__name__}", *(f"task.model.kwargs.{name}={extra[name]}" for name in extra)]
    if is_time_series(kind):
        changes += [
            f"{module}_ts",
            "task.dataset.class=TSDatasetH",
            "task.dataset.kwargs.step_len=5",
            "task.model.kwargs.d_feat=6",
            "task.model.kwargs.n_jobs=20",
        ]
    else:
        changes.append(module)
    run(config, path, changes, output=tmp_path / "run", seed=1)
    saved = json.dumps(json.loads((tmp_path / "run" / "model.json").read_text()))
    assert kind.__name__ in saved
    assert all(str(value) in saved for value in extra.values())
    scores = predict(tmp_path / "run", path)
    assert len(scores) > 0
    assert scores.notna().all()
