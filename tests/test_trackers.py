"""Callbacks for TensorBoard and MLflow, with stand-ins for the packages and, where they are installed, with them."""

from __future__ import annotations

import sys
import types

import pytest

from qfast.errors import ConfigError, DataError
from qfast.models import LSTM, GATs
from qfast.training.trackers import MLflowCallback, TensorBoardCallback
from support.fits import StopAt, dataset_for, frame_for, small_model


@pytest.fixture(scope="module")
def dataset():
    return dataset_for(LSTM, frame=frame_for(LSTM))


class Writer:
    """Records what torch's SummaryWriter receives."""

    all: list[Writer]

    def __init__(self, folder, purge_step):
        self.folder, self.purge_step, self.scalars, self.texts, self.closed = folder, purge_step, [], [], False
        self.all.append(self)

    def add_text(self, *text):
        self.texts.append(text)

    def add_scalar(self, *scalar):
        assert not self.closed
        self.scalars.append(scalar)

    def flush(self):
        pass

    def close(self):
        self.closed = True


class Client:
    """Records what a client of MLflow receives."""

    all: list[Client]

    def __init__(self, uri):
        self.uri, self.params, self.metrics, self.tags, self.status = uri, {}, [], {}, None
        self.all.append(self)

    def get_experiment_by_name(self, name):
        return types.SimpleNamespace(experiment_id="7") if name == "old" else None

    def create_experiment(self, name):
        return "8"

    def create_run(self, experiment_id, run_name):
        self.experiment_id, self.run_name = experiment_id, run_name
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id="r"))

    def log_param(self, run_id, name, value):
        self.params[name] = value

    def log_metric(self, run_id, name, value, timestamp, step):
        self.metrics.append((name, value, step))

    def set_tag(self, run_id, name, value):
        self.tags[name] = value

    def set_terminated(self, run_id, status):
        self.status = status


@pytest.fixture
def writers(monkeypatch):
    Writer.all = []
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))
    return Writer.all


@pytest.fixture
def clients(monkeypatch):
    Client.all = []
    monkeypatch.setitem(sys.modules, "mlflow", types.ModuleType("mlflow"))
    monkeypatch.setitem(sys.modules, "mlflow.tracking", types.SimpleNamespace(MlflowClient=Client))
    return Client.all


def test_tensorboard_receives_the_history(dataset, writers, tmp_path):
    model = small_model(LSTM, n_epochs=2, metric="ic").fit(dataset, callbacks=[TensorBoardCallback(tmp_path)])
    (writer,) = writers
    assert writer.folder == str(tmp_path / "LSTM")
    history = model.history_
    assert writer.scalars == [(name, history[name][epoch], epoch) for epoch in (0, 1) for name in history]
    assert "| lr | 0.01 |" in writer.texts[0][1]
    assert writer.closed


def test_a_resumed_fit_continues_the_curves(dataset, writers, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        small_model(LSTM).fit(
            dataset, checkpoint_dir=tmp_path, callbacks=[TensorBoardCallback(tmp_path), StopAt(1, "checkpoint")]
        )
    small_model(LSTM).fit(dataset, checkpoint_dir=tmp_path, resume=True, callbacks=[TensorBoardCallback(tmp_path)])
    assert [(w.purge_step, w.closed, {s[2] for s in w.scalars}) for w in writers] == [
        (None, True, {0, 1}),
        (2, True, {2}),
    ]


def test_a_base_model_has_its_own_curves(dataset, writers, tmp_path):
    model = small_model(GATs, n_epochs=1)
    callback = TensorBoardCallback(tmp_path)
    model.pretrain(dataset, n_epochs=1, batch_size=32, callbacks=[callback])
    model.fit(dataset, callbacks=[callback])
    assert [writer.folder.rpartition("/")[2] for writer in writers] == ["GRU", "GATs"]


@pytest.mark.parametrize(("experiment", "number"), [("old", "7"), ("new", "8")])
def test_mlflow_receives_arguments_and_history(dataset, clients, experiment, number):
    def own_loss(pred, label):
        return (pred - label).abs().mean()

    model = small_model(LSTM, n_epochs=2, loss=own_loss).fit(dataset, callbacks=[MLflowCallback(experiment)])
    (client,) = clients
    assert (client.uri, client.experiment_id, client.run_name) == ("sqlite:///mlflow.db", number, "LSTM")
    assert client.params["hidden_size"] == "8"
    assert client.params["loss"].endswith("own_loss")
    assert ("valid", model.history_["valid"][1], 1) in client.metrics
    assert (client.tags, client.status) == ({"best_epoch": str(model.best_epoch_)}, "FINISHED")


def test_mlflow_records_how_a_fit_ends(dataset, clients):
    with pytest.raises(KeyboardInterrupt):
        small_model(LSTM).fit(dataset, callbacks=[MLflowCallback(), StopAt(0, "batch")])
    with pytest.raises(DataError, match="the training loss became"):
        small_model(LSTM, lr=1e30, optimizer="gd").fit(dataset, callbacks=[MLflowCallback(run_name="large steps")])
    assert [(client.run_name, client.status) for client in clients] == [("LSTM", "KILLED"), ("large steps", "FAILED")]


@pytest.mark.parametrize("uri", ["mlruns", "file:mlruns", "file:///data/mlruns"])
def test_folders_are_refused_with_a_database(uri):
    with pytest.raises(ConfigError, match=r"got the folder .*Remedy: 'sqlite:///.*mlruns/mlflow.db'"):
        MLflowCallback(tracking_uri=uri)


@pytest.mark.parametrize(
    ("callback", "module", "extra"),
    [
        (lambda: TensorBoardCallback("folder"), "torch.utils.tensorboard", "tensorboard"),
        (MLflowCallback, "mlflow", "mlflow"),
    ],
    ids=["tensorboard", "mlflow"],
)
def test_a_missing_package_is_reported_before_training(monkeypatch, callback, module, extra):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=rf"needs the package {extra}.*pip install 'qfast-models\[{extra}\]'"):
        callback()


def test_with_tensorboard(dataset, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model = small_model(LSTM, n_epochs=2).fit(dataset, callbacks=[TensorBoardCallback(tmp_path)])
    events = EventAccumulator(str(tmp_path / "LSTM"))
    events.Reload()
    values = [event.value for event in events.Scalars("valid")]
    assert values == pytest.approx(model.history_["valid"].tolist())


def test_with_mlflow(dataset, tmp_path):
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    model = small_model(LSTM, n_epochs=2).fit(dataset, callbacks=[MLflowCallback("test", uri)])
    client = MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("test").experiment_id])
    assert run.data.metrics["valid"] == pytest.approx(model.history_["valid"].iloc[-1])
    assert (run.info.status, run.data.params["d_feat"]) == ("FINISHED", "3")
