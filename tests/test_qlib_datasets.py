"""The one-line change of a Qlib user: Qlib builds qfast's models and fits them to its own datasets."""

from __future__ import annotations

import pandas as pd
import pytest
import torch

from qfast.data import DatasetH, TSDatasetH
from qfast.data.adapt import windows_of
from qfast.models import GRU, LSTM, GATs, ts
from support.frames import SEGMENTS, gappy_frame
from support.qlib import qfast_dataset, qlib_dataset

pytest.importorskip("qlib", reason="pyqlib is the oracle; install qfast-models[qlib]")

SMALL = {"hidden_size": 8, "n_epochs": 2, "batch_size": 32, "lr": 0.01, "seed": 1}


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "GATs"])
@pytest.mark.parametrize("module", ["qfast.models", "qfast.models.ts"])
def test_built_by_qlib_and_fitted_on_its_datasets(module, kind):
    from qlib.utils import init_instance_by_config

    frame = gappy_frame()
    rolling = module.endswith("ts")
    d_feat = 4 if rolling else 2
    arguments = {**SMALL, "d_feat": d_feat}
    if kind == "GATs":  # small steps: Adam turns rounding noise into full steps (docs/parity.md)
        arguments["lr"] = 1e-4
    model = init_instance_by_config({"class": kind, "module_path": module, "kwargs": arguments})
    name, qfast_class, step = ("TSDatasetH", TSDatasetH, {"step_len": 5}) if rolling else ("DatasetH", DatasetH, {})
    scores: dict[str, list[float]] = {}
    model.fit(qlib_dataset(name, frame, **step), scores)
    prediction = model.predict(qlib_dataset(name, frame, **step), segment="test")
    again = type(model)(**arguments)
    own_scores: dict[str, list[float]] = {}
    again.fit(qfast_dataset(qfast_class, frame, **step), own_scores)
    assert scores["valid"] == pytest.approx(own_scores["valid"], rel=1e-5)
    pd.testing.assert_series_equal(
        prediction,
        again.predict(qfast_dataset(qfast_class, frame, **step)),
        rtol=1e-4,
        atol=1e-5,
        check_index_type=False,
    )


def test_a_float32_sampler_is_used_as_it_is():
    dataset = qlib_dataset("TSDatasetH", gappy_frame(), step_len=5)

    class Kept:
        """Stores the returned sampler, so the test can compare its memory."""

        step_len = 5

        def prepare(self, *args, **kwargs):
            self.sampler = dataset.prepare(*args, **kwargs, dtype="float32")
            return self.sampler

    saved = Kept()
    windows = windows_of(saved, "train", "learn")
    assert windows.features.data_ptr() == saved.sampler.data_arr.ctypes.data
    saved.sampler.config(fillna_type="ffill+bfill")
    order = torch.randperm(len(windows))[:50]
    assert torch.equal(windows.batch(order), torch.from_numpy(saved.sampler[order.numpy()][:, :, :-1]))
    pd.testing.assert_index_equal(windows.keys(), saved.sampler.get_index())


def test_a_gru_is_trained_without_a_valid_segment_of_qlibs_dataset():
    dataset = qlib_dataset("DatasetH", gappy_frame())
    dataset.segments = {k: v for k, v in SEGMENTS.items() if k != "valid"}
    model = GRU(**SMALL, d_feat=2).fit(dataset)
    assert model.best_epoch_ is None
    assert len(model.predict(dataset)) > 0


def test_any_slice_of_qlibs_dataset_has_the_same_scores():
    dataset = qlib_dataset("DatasetH", gappy_frame())
    model = LSTM(**SMALL, d_feat=2).fit(dataset)
    part = model.predict(dataset, slice("2020-03-20", "2020-03-25"))
    whole = model.predict(dataset)
    pd.testing.assert_series_equal(part, whole.reindex(part.index), rtol=1e-5)


def test_a_qlib_reweighter_sees_the_sampler():
    from qlib.data.dataset.weight import Reweighter

    class Recent(Reweighter):
        def __init__(self) -> None:
            self.seen: list[object] = []

        def reweight(self, data):
            self.seen.append(data)
            dates = data.get_index().get_level_values("datetime")
            return (dates > "2020-02-01").astype(float)

    reweighter = Recent()
    ts.LSTM(**SMALL, d_feat=4).fit(qlib_dataset("TSDatasetH", gappy_frame(), step_len=5), reweighter=reweighter)
    assert len(reweighter.seen) == 2


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_gats_on_qlibs_rolling_dataset_follows_qlib(dtype, tmp_path):
    """CSRankNorm returns float64 labels, with which Qlib's loss is float64 too."""
    from qlib.contrib.model.pytorch_gats_ts import GATs as QlibGATs

    frame = gappy_frame()
    frame = frame.astype(dtype)
    arguments = {"d_feat": 4, "hidden_size": 8, "n_epochs": 2, "lr": 1e-4, "seed": 3}
    expected: dict[str, list[float]] = {}
    qlib_estimator = QlibGATs(**arguments, n_jobs=0)
    qlib_estimator.fit(qlib_dataset("TSDatasetH", frame, step_len=5), expected, save_path=str(tmp_path / "x.pt"))
    model = ts.GATs(**arguments, compat="qlib").fit(qlib_dataset("TSDatasetH", frame, step_len=5))
    for name in ("train", "valid"):
        assert model.evals_result_[name] == pytest.approx(expected[name], rel=1e-6)
    result = model.predict(qlib_dataset("TSDatasetH", frame, step_len=5))
    wanted = qlib_estimator.predict(qlib_dataset("TSDatasetH", frame, step_len=5))
    pd.testing.assert_series_equal(result, wanted, rtol=1e-4, atol=1e-5, check_names=False)


@pytest.mark.parametrize("kind", [GATs, ts.GATs])
def test_attention_on_qlibs_datasets(kind):
    name, qfast_class, step = (
        ("DatasetH", DatasetH, {}) if kind is GATs else ("TSDatasetH", TSDatasetH, {"step_len": 5})
    )
    frame = gappy_frame()
    model = kind(**SMALL, d_feat=2 if kind is GATs else 4).fit(qlib_dataset(name, frame, **step))
    result = model.attention(qlib_dataset(name, frame, **step), "2020-03-20", top=3)
    pd.testing.assert_frame_equal(
        result, model.attention(qfast_dataset(qfast_class, frame, **step), "2020-03-20", top=3), rtol=1e-4
    )
    assert model.pretrain(qlib_dataset(name, frame, **step), n_epochs=1, batch_size=32).fitted
