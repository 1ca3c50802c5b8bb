"""Every model trained on a GPU, compared with itself on the CPU."""

from __future__ import annotations

import gc
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch

from qfast import _backend
from qfast.errors import DataError
from qfast.models import LSTM, ts
from qfast.training import step_graphs
from qfast.training.callbacks import Callback
from support.devices import make_cudnn_exact
from support.fits import assert_states_equal, dataset_for, device_model, estimator_name, parametrize_estimators
from support.frames import rolling

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch detects no usable GPU"),
]
DEVICE = "cuda"


@pytest.fixture(autouse=True)
def exact_cudnn(monkeypatch):
    make_cudnn_exact(monkeypatch)


@pytest.fixture(params=_backend.LAYERS)
def layers(request, monkeypatch):
    """The layers that networks use on a GPU: qfast's or torch's."""
    monkeypatch.setattr(_backend, "cuda_layers", request.param)
    return request.param


@parametrize_estimators()
def test_a_gpu_trains_to_the_cpus_numbers(kind, layers):
    on_gpu, on_cpu = (device_model(kind, device).fit(dataset_for(kind)) for device in (DEVICE, "cpu"))
    assert all(p.device.type == DEVICE for p in on_gpu.network.parameters())
    pd.testing.assert_frame_equal(
        on_gpu.history_[["train_loss", "train", "valid"]], on_cpu.history_[["train_loss", "train", "valid"]], rtol=1e-3
    )
    scores = [model.predict(dataset_for(kind), "test") for model in (on_gpu, on_cpu)]
    spread = float(scores[1].std())
    np.testing.assert_allclose(scores[0], scores[1], rtol=0, atol=1e-2 * spread)


@parametrize_estimators()
def test_a_gpu_trains_the_same_twice_with_dropout(kind, layers):
    assert_states_equal(*(device_model(kind, DEVICE, dropout=0.4).fit(dataset_for(kind)) for _ in range(2)))


# ---------------------------------------------------------------- steps as CUDA graphs
@pytest.fixture
def recorded(monkeypatch):
    """Batch sizes of the steps that were recorded, in order; a step that waits for the device fails the test."""
    sizes: list[int] = []
    kind, capture, refuse = step_graphs.GraphedStep, step_graphs.GraphedStep._capture, pytest.fail

    def noted(self, samples):
        sizes.append(len(samples))
        return capture(self, samples)

    monkeypatch.setattr(kind, "_capture", noted)
    monkeypatch.setattr(kind, "_refuse", lambda self, why: refuse(why))
    return sizes


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@parametrize_estimators()
def test_recorded_steps_train_to_the_same_bits(kind, dropout, layers, recorded):
    plain, graphs = (
        device_model(kind, DEVICE, dropout=dropout, cuda_graphs=on, n_epochs=3).fit(dataset_for(kind))
        for on in (False, True)
    )
    assert_states_equal(plain, graphs)
    assert recorded
    assert len(recorded) == len(set(recorded))


def test_recorded_steps_follow_the_learning_rate(recorded):
    class Halve(Callback):
        def on_epoch_start(self, estimator):
            for group in estimator.train_optimizer.param_groups:
                group["lr"] *= 0.5

    assert_states_equal(
        *(
            device_model(ts.LSTM, DEVICE, n_epochs=3, cuda_graphs=on).fit(rolling(), callbacks=[Halve()])
            for on in (False, True)
        )
    )
    assert len(recorded) == 3


def test_a_step_that_waits_is_launched_kernel_by_kernel(caplog):
    class Curious(ts.LSTM):
        def loss_fn(self, prediction, label, weight):
            loss = super().loss_fn(prediction, label, weight)
            return loss * 2 if float(loss.detach()) > 1 else loss

    kwargs = {"d_feat": 3, "hidden_size": 8, "n_epochs": 2, "batch_size": 32, "seed": 1, "device": DEVICE}
    pair = [Curious(**kwargs, cuda_graphs=on).fit(rolling()) for on in (False, True)]
    assert_states_equal(*pair)
    assert "not as CUDA graphs: they synchronize with the host" in caplog.text


def test_a_recorded_fit_frees_its_memory():
    device_model(ts.TCN, DEVICE, cuda_graphs=True).fit(rolling())
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    for _ in range(3):
        device_model(ts.TCN, DEVICE, cuda_graphs=True).fit(rolling())
    gc.collect()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before + 2**22


LOAD = """
import sys
import torch
assert not torch.cuda.is_available()
sys.path[:0] = sys.argv[3:]
from support.fits import ESTIMATORS, dataset_for, device_model, estimator_name
kind = next(kind for kind in ESTIMATORS if estimator_name(kind) == sys.argv[1])
model = device_model(kind, "auto").load_weights(sys.argv[2])
print(repr(float(model.predict(dataset_for(kind), "test").sum())))
"""


@parametrize_estimators()
def test_weights_of_a_gpu_are_read_without_one(kind, tmp_path):
    model = device_model(kind, DEVICE).fit(dataset_for(kind))
    model.save_weights(tmp_path / "w.safetensors")
    done = subprocess.run(
        [sys.executable, "-c", LOAD, estimator_name(kind), str(tmp_path / "w.safetensors"), os.path.dirname(__file__)],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    total = float(model.predict(dataset_for(kind), "test").sum())
    assert float(done.stdout.split()[-1]) == pytest.approx(total, rel=1e-3, abs=1e-4)


@parametrize_estimators([LSTM, ts.LSTM])
def test_training_resumes_from_a_checkpoint_of_the_other_device(kind, tmp_path):
    for first, second in ((DEVICE, "cpu"), ("cpu", DEVICE)):
        folder = tmp_path / first
        device_model(kind, first, n_epochs=1).fit(dataset_for(kind), checkpoint_dir=folder)
        resumed = device_model(kind, second).fit(dataset_for(kind), checkpoint_dir=folder, resume=True)
        whole = device_model(kind, "cpu").fit(dataset_for(kind))
        np.testing.assert_allclose(resumed.history_["valid"], whole.history_["valid"], rtol=1e-3)


def test_too_little_memory_is_reported_with_remedies():
    model = device_model(ts.LSTM, DEVICE, hidden_size=512, batch_size=400)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_allocated() + 2**20) / total)
    try:
        with pytest.raises(DataError, match=r"does not fit into the memory of cuda.*a smaller batch_size \(now 400\)"):
            model.fit(rolling())
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    model.fit(rolling())  # the failed fit leaves no memory allocated


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_the_second_gpu_equals_the_first():
    pair = [device_model(ts.LSTM, device).fit(rolling()) for device in ("cuda:0", "cuda:1")]
    assert next(pair[1].network.parameters()).device == torch.device("cuda:1")
    for key, value in pair[0].network.state_dict().items():
        assert torch.equal(value.cpu(), pair[1].network.state_dict()[key].cpu()), key
