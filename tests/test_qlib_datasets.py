"""The one-line change of a Qlib user: Qlib builds our models from its configuration and hands them its own datasets."""

from __future__ import annotations

import pandas as pd
import pytest
import torch
from test_datasets import SEGMENTS, gappy_frame, ours, theirs

from qfast.data import DatasetH, TSDatasetH
from qfast.data.adapt import windows_of
from qfast.models import GRU, LSTM, ts

pytest.importorskip("qlib", reason="pyqlib is the oracle; install qfast-models[qlib]")

SMALL = {"hidden_size": 8, "n_epochs": 2, "batch_size": 32, "lr": 0.01, "seed": 1}


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
@pytest.mark.parametrize("module", ["qfast.models", "qfast.models.ts"])
def test_built_by_qlib_and_fitted_on_its_datasets(module, kind):
    from qlib.utils import init_instance_by_config

    frame = gappy_frame()
    rolling = module.endswith("ts")
    d_feat = 4 if rolling else 2
    arguments = {**SMALL, "d_feat": d_feat}
    model = init_instance_by_config({"class": kind, "module_path": module, "kwargs": arguments})
    name, own, step = ("TSDatasetH", TSDatasetH, {"step_len": 5}) if rolling else ("DatasetH", DatasetH, {})
    scores: dict[str, list[float]] = {}
    model.fit(theirs(name, frame, **step), scores)
    prediction = model.predict(theirs(name, frame, **step), segment="test")
    again = type(model)(**arguments)
    own_scores: dict[str, list[float]] = {}
    again.fit(ours(own, frame, **step), own_scores)
    assert scores["valid"] == pytest.approx(own_scores["valid"], rel=1e-5)
    pd.testing.assert_series_equal(
        prediction, again.predict(ours(own, frame, **step)), rtol=1e-4, atol=1e-5, check_index_type=False
    )


def test_a_float32_sampler_is_used_as_it_is():
    dataset = theirs("TSDatasetH", gappy_frame(), step_len=5)

    class Kept:
        """Keeps the sampler that was handed out, so that its memory can be compared."""

        step_len = 5

        def prepare(self, *args, **kwargs):
            self.sampler = dataset.prepare(*args, **kwargs, dtype="float32")
            return self.sampler

    kept = Kept()
    windows = windows_of(kept, "train", "learn")
    assert windows.features.data_ptr() == kept.sampler.data_arr.ctypes.data
    kept.sampler.config(fillna_type="ffill+bfill")
    order = torch.randperm(len(windows))[:50]
    assert torch.equal(windows.batch(order), torch.from_numpy(kept.sampler[order.numpy()][:, :, :-1]))
    pd.testing.assert_index_equal(windows.keys(), kept.sampler.get_index())


def test_a_gru_is_trained_without_a_valid_segment_of_qlibs_dataset():
    dataset = theirs("DatasetH", gappy_frame())
    dataset.segments = {k: v for k, v in SEGMENTS.items() if k != "valid"}
    model = GRU(**SMALL, d_feat=2).fit(dataset)
    assert model.best_epoch_ is None
    assert len(model.predict(dataset)) > 0


def test_any_slice_of_qlibs_dataset_is_scored_alike():
    dataset = theirs("DatasetH", gappy_frame())
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
    ts.LSTM(**SMALL, d_feat=4).fit(theirs("TSDatasetH", gappy_frame(), step_len=5), reweighter=reweighter)
    assert len(reweighter.seen) == 2
