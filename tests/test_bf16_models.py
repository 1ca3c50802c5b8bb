"""The argument `precision` of estimators: what it changes, what is refused, and saved runs."""

from __future__ import annotations

import logging
import pickle

import pytest
import torch

from qfast import _backend, nn
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
    StopAt,
    dataset_for,
    parametrize_estimators,
    same_weights,
    small_model,
    weights,
)
from support.workflows import write_case

ONE_OF_EACH = [LSTM, ts.GRU, ts.ALSTM, GATs, TCN, ts.TransformerModel, LocalformerModel]


@pytest.fixture
def no_bf16(monkeypatch):
    """A CPU without the instructions."""
    monkeypatch.setattr(module, "bf16_obstacle", lambda: "this CPU lacks AMX-BF16")


def network_precision(model) -> set[str]:
    return {part.precision for part in model.network.modules() if isinstance(part, PlainTorch)}


# ---------------------------------------------------------------- training
@needs_bf16
@parametrize_estimators()
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


# ---------------------------------------------------------------- networks
NETWORKS = {
    "LSTMModel": lambda **k: nn.LSTMModel(5, 19, **k),
    "GRUModel": lambda **k: nn.GRUModel(5, 19, **k),
    "ALSTMModel": lambda **k: nn.ALSTMModel(5, 19, **k),
    "GATModel": lambda **k: nn.GATModel(5, 19, **k),
    "TCNModel": lambda **k: nn.TCNModel(5, 1, [19, 8], 3, 0.0, **k),
    "TemporalConvNet": lambda **k: nn.TemporalConvNet(5, [19, 8], 3, 0.0, **k),
    "TemporalBlock": lambda **k: nn.TemporalBlock(5, 19, 3, 1, 0.0, **k),
    "Transformer": lambda **k: nn.Transformer(5, 8, 2, 1, 0.0, **k),
    "Localformer": lambda **k: nn.Localformer(5, 8, 2, 1, 0.0, **k),
}


@needs_bf16
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_accept_the_precision(name):
    x = torch.randn(20, 9, 5, generator=torch.Generator().manual_seed(0))
    x = x.transpose(1, 2) if name.startswith("T") and name != "Transformer" else x
    outputs = []
    for settings in ({}, {"precision": "bf16"}, {"precision": "bf16-if-available"}):
        torch.manual_seed(0)
        network = NETWORKS[name](**settings)
        assert network.precision == settings.get("precision", "float32")
        assert not [key for key in network.state_dict() if "precision" in key]
        outputs.append(network(x).detach())
    assert torch.equal(outputs[1], outputs[2])
    assert not torch.equal(outputs[0], outputs[1])
    assert float((outputs[0] - outputs[1]).norm()) < 0.02 * float(outputs[0].norm())
    copy = pickle.loads(pickle.dumps(network))
    assert torch.equal(copy(x).detach(), outputs[1])
    plain = network.to_reference()(x).detach()  # torch's layers compute in float32
    assert float((plain - outputs[0]).norm()) < 1e-5 * float(outputs[0].norm())
    network.precision = "float32"
    assert torch.equal(network(x).detach(), outputs[0])


def test_networks_refuse_an_unknown_precision():
    for build in NETWORKS.values():
        with pytest.raises(ConfigError, match="precision must be one of float32, bf16, bf16-if-available, got 'bf61'"):
            build(precision="bf61")


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
