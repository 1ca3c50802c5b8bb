"""The argument `precision` of estimators: what it changes, what is refused, and saved runs."""

from __future__ import annotations

import logging
import pickle

import pytest
import torch

from qfast import _backend
from qfast import precision as module
from qfast.doctor import report
from qfast.errors import BackendError, CheckpointError, ConfigError
from qfast.models import LSTM, TCN, GATs, LocalformerModel, ts
from qfast.nn.plain import PlainTorch
from qfast.workflow.predict import predict
from qfast.workflow.run import run
from qfast.workflow.saved_run import load
from support.bf16 import needs_bf16
from support.fits import (
    ESTIMATORS,
    StopAt,
    dataset_for,
    parametrize_estimators,
    same_weights,
    small_model,
    weights,
)
from support.workflows import write_case

WITH_BF16 = [kind for kind in ESTIMATORS if not issubclass(kind, TCN | ts.TCN)]
ONE_OF_EACH = [LSTM, ts.GRU, ts.ALSTM, GATs, ts.TransformerModel, LocalformerModel]


@pytest.fixture
def no_bf16(monkeypatch):
    """A CPU without the instructions."""
    monkeypatch.setattr(module, "bf16_obstacle", lambda: "this CPU lacks AMX-BF16")


def network_precision(model) -> set[str]:
    return {part.precision for part in model.network.modules() if isinstance(part, PlainTorch)}


# ---------------------------------------------------------------- training
@needs_bf16
@parametrize_estimators(WITH_BF16)
def test_products_are_rounded_and_everything_else_is_float32(kind):
    dataset = dataset_for(kind)
    model, reference = (small_model(kind, precision=name, n_epochs=2).fit(dataset) for name in ("bf16", "float32"))
    assert network_precision(model) == {"bf16"}
    assert all(part.dtype == torch.float32 for part in weights(model).values())
    for state in model.train_optimizer.state.values():
        assert all(part.dtype == torch.float32 for part in state.values() if torch.is_tensor(part) and part.dim())
    assert not same_weights(weights(model), weights(reference))
    ours, theirs = model.predict(dataset), reference.predict(dataset)
    assert ours.dtype == "float32"
    assert ours.corr(theirs) > 0.8


@needs_bf16
@parametrize_estimators([TCN, ts.TCN])
def test_tcn_computes_in_float32(kind, caplog):
    dataset = dataset_for(kind)
    with caplog.at_level(logging.WARNING, "qfast"):
        model = small_model(kind, precision="bf16", n_epochs=1).fit(dataset)
    assert "TCN computes in float32: its operator has no products of bfloat16" in caplog.text
    assert same_weights(weights(model), weights(small_model(kind, n_epochs=1).fit(dataset)))


@needs_bf16
@parametrize_estimators(ONE_OF_EACH)
def test_resumed_fits_have_the_same_bits_for_any_number_of_threads(kind, tmp_path):
    dataset, threads = dataset_for(kind), torch.get_num_threads()
    whole = small_model(kind, precision="bf16").fit(dataset)
    with pytest.raises(KeyboardInterrupt):
        small_model(kind, precision="bf16").fit(dataset, checkpoint_dir=tmp_path, callbacks=[StopAt(1, "checkpoint")])
    try:
        torch.set_num_threads(threads + 2)
        resumed = small_model(kind, precision="bf16").fit(dataset, checkpoint_dir=tmp_path, resume=True)
    finally:
        torch.set_num_threads(threads)
    assert same_weights(weights(whole), weights(resumed))
    assert whole.predict(dataset).equals(resumed.predict(dataset))
    with pytest.raises(CheckpointError, match="precision: 'bf16' -> 'float32'"):
        small_model(kind).fit(dataset, checkpoint_dir=tmp_path, resume=True)


@needs_bf16
def test_changes_of_the_argument_take_effect():
    dataset = dataset_for(LSTM)
    model = small_model(LSTM, n_epochs=1).fit(dataset)
    plain = model.predict(dataset)
    model.precision = "bf16"
    assert network_precision(model) == {"bf16"}
    rounded = model.predict(dataset)
    assert not rounded.equals(plain)
    model.precision = "float32"
    assert model.predict(dataset).equals(plain)
    copy = pickle.loads(pickle.dumps(small_model(LSTM, precision="bf16")))
    assert network_precision(copy) == {"bf16"}
    replaced = small_model(LSTM, precision="bf16", n_epochs=1).fit(dataset)
    replaced.network = model.network  # created for float32
    assert replaced.predict(dataset).equals(rounded)


# ---------------------------------------------------------------- errors
@parametrize_estimators()
def test_refused_combinations(kind):
    with pytest.raises(ConfigError, match=r"precision must be one of float32, bf16, bf16-if-available, got 'bf61'"):
        small_model(kind, precision="bf61")
    for value in ("bf16", "bf16-if-available"):
        with pytest.raises(ConfigError, match=f"precision='{value}' is not available with compat='qlib'"):
            small_model(kind, precision=value, compat="qlib")
    with pytest.raises(TypeError):
        kind(*range(30))  # the argument is not positional


@needs_bf16
def test_half_precision_optimizers_are_refused():
    model = small_model(LSTM, precision="bf16")
    model.network.bfloat16()
    with pytest.raises(ConfigError, match=r"weights of train_optimizer are torch.bfloat16\. Remedy: "):
        model.fit(dataset_for(LSTM))
    model = small_model(LSTM, precision="bf16", n_epochs=1).fit(dataset_for(LSTM))
    state = next(iter(model.train_optimizer.state.values()))
    state["exp_avg"] = state["exp_avg"].half()
    with pytest.raises(ConfigError, match=r"state of train_optimizer are torch.float16"):
        model.fit(dataset_for(LSTM))


def test_cpus_without_the_instructions(no_bf16, caplog):
    with pytest.raises(BackendError, match=r"precision='bf16': this CPU lacks AMX-BF16\. Remedy: .*bf16-if-available"):
        small_model(LSTM, precision="bf16")
    dataset = dataset_for(LSTM)
    with caplog.at_level(logging.WARNING, "qfast"):
        model = small_model(LSTM, precision="bf16-if-available", n_epochs=1)
    assert "LSTM computes in float32: this CPU lacks AMX-BF16" in caplog.text
    assert same_weights(weights(model.fit(dataset)), weights(small_model(LSTM, n_epochs=1).fit(dataset)))


# ---------------------------------------------------------------- runs
@needs_bf16
def test_runs_load_on_every_cpu(tmp_path, monkeypatch):
    config, data = write_case(tmp_path)
    config.write_text(config.read_text().replace("GPU: 0}", "GPU: 0, precision: bf16}"))
    folder = run(config, data, output=tmp_path / "run").path
    scores = predict(folder, data)
    with monkeypatch.context() as other_cpu:
        other_cpu.setattr(module, "bf16_obstacle", lambda: "this CPU lacks AMX-BF16")
        assert predict(folder, data).corr(scores) > 0.99
        with pytest.raises(BackendError, match="this CPU lacks AMX-BF16"):
            run(config, data, output=tmp_path / "other")
    assert network_precision(load(folder).model) == {"bf16"}


def test_doctor_reports_it(monkeypatch):
    text = report()["bf16"]
    assert text.startswith(("available", "not available: "))
    monkeypatch.setattr("qfast.doctor.bf16_obstacle", lambda: "this CPU lacks AMX-BF16")
    assert report()["bf16"] == "not available: this CPU lacks AMX-BF16"
    assert _backend.native is not None or not text.startswith("available")
