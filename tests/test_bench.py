"""`qfast bench`: the sample stands for the epoch, the figures are consistent, and wrong input is refused."""

from __future__ import annotations

import json
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from qfast import cli
from qfast.benchmarks import bench as bench_module
from qfast.benchmarks import measure as measure_module
from qfast.benchmarks.cases import _segments, checked_names
from qfast.benchmarks.clock import PARTS, EpochTimes, epoch_timers
from qfast.benchmarks.memory import STATUS, peak_memory
from qfast.benchmarks.qlib_epoch import QlibEpoch, is_installed, qlib_class
from qfast.benchmarks.rates import forward_multiply_adds, training_multiply_adds
from qfast.benchmarks.sample import Segments
from qfast.benchmarks.torch_epoch import TorchEpoch
from qfast.benchmarks.trust import Watch
from qfast.models import GRU, GATs, ts
from qfast.nn import GRUModel, LSTMModel, TCNModel, Transformer
from qfast.training.estimator import Estimator
from qfast.workflow.demo import demo_prices
from support.fits import TIME_SERIES, dataset_for, parametrize_estimators, small_model
from support.workflows import write_case


@pytest.fixture(autouse=True)
def _fast_probes(monkeypatch):
    """Rates that need no measurement, except where a test replaces them."""
    monkeypatch.setattr("qfast.benchmarks.trust.product_rate", lambda: 1e10)
    monkeypatch.setattr("qfast.benchmarks.trust.copy_rate", lambda: 1e9)


def segments_of(estimator: Estimator) -> Segments:
    dataset = dataset_for(type(estimator))
    return Segments.of(estimator, *(estimator.load_segment(dataset, name) for name in ("train", "valid")))


# ---------------------------------------------------------------- the sample
@parametrize_estimators()
def test_the_sample_has_whole_batches_or_whole_days(kind):
    segments = segments_of(small_model(kind))
    sample = segments.sample(2)
    if segments.by_day:
        sizes = {date: len(part) for date, part in segments.train.keys().to_frame().groupby(level=0)}
        dates = sample.train.keys().get_level_values(0)
        assert all((dates == date).sum() == sizes[date] for date in dates.unique())
        assert sample.batches == len(dates.unique())
    else:
        assert len(sample.train) == 64
        assert sample.batches == 2
    assert len(sample.valid) >= min(len(segments.valid), segments.batch_size)
    assert sample.scale["train"] == len(segments.train) / len(sample.train)
    assert segments.sample(10_000).is_whole


def test_samples_are_spread_over_the_instruments():
    segments = segments_of(small_model(ts.LSTM))
    names = sorted(segments.train.keys().get_level_values("instrument").unique())
    chosen = sorted(segments.sample(2).train.keys().get_level_values("instrument").unique())
    places = np.array([names.index(name) for name in chosen])
    assert places.min() < len(names) / 3
    assert places.max() > len(names) / 2


# ---------------------------------------------------------------- the clocks
@parametrize_estimators(TIME_SERIES)
def test_the_parts_add_up_to_the_epoch(kind):
    estimator = small_model(kind, progress=False)
    sample = segments_of(estimator).sample(2)
    total, parts = measure_module._our_epoch(estimator, sample, clock=iter(range(10**9)).__next__)
    assert tuple(parts) == PARTS
    assert total == pytest.approx(sum(parts.values()))
    assert all(parts[part] > 0 for part in PARTS)
    assert estimator.n_epochs == 3  # the model is as before
    assert "load_segment" not in vars(estimator)
    assert "batch" not in vars(sample.train)


def test_a_timed_epoch_leaves_its_memory_to_the_next(monkeypatch):
    released = []
    monkeypatch.setattr("qfast.training.estimator.release_memory", lambda: released.append(1))
    estimator = small_model(ts.LSTM, progress=False)
    measure_module._our_epoch(estimator, segments_of(estimator).sample(1), clock=time.process_time)
    assert not released
    assert "_release_memory" not in vars(estimator)


def test_the_scale_of_an_epoch():
    times = EpochTimes(training=10.0, gather=1.0, network=5.0, backward=3.0, optimizer=0.5, scored={"valid": 2.0})
    parts = times.parts(3.0, {"valid": 4.0})
    expected = {"gather": 3.0, "forward": 12.0, "backward": 9.0, "optimizer": 1.5, "evaluation": 8.0, "python": 4.5}
    assert parts == pytest.approx(expected)


def test_timers_leave_no_trace():
    estimator = small_model(ts.LSTM)
    before = torch.Tensor.backward, dict(vars(estimator))
    with epoch_timers(estimator, segments_of(estimator).train, EpochTimes()):
        assert "train_pass" in vars(estimator)
    assert (torch.Tensor.backward, dict(vars(estimator))) == before


# ---------------------------------------------------------------- references
@parametrize_estimators()
def test_torchs_layers_train_and_score_every_sample(kind, monkeypatch):
    estimator = small_model(kind)
    reference = TorchEpoch(estimator, segments_of(estimator).sample(2))
    counts = {}
    original = TorchEpoch._loss

    def counted(self, table, samples):
        counts[table.windows.name] = counts.get(table.windows.name, 0) + len(samples)
        return original(self, table, samples)

    monkeypatch.setattr(TorchEpoch, "_loss", counted)
    assert reference.seconds() > 0
    sample = reference.sample
    assert counts == {"train": 2 * len(sample.train), "valid": len(sample.valid)}
    assert all(not torch.equal(a, b) for a, b in zip(_weights(reference), _weights(estimator), strict=True))


def _weights(owner):
    """The weights of the last layer, which every step changes."""
    return list(owner.network.parameters())[-2:]


@pytest.mark.skipif(not is_installed(), reason="pyqlib (extra qlib) is not installed")
@parametrize_estimators()
def test_qlibs_epoch(kind):
    estimator = small_model(kind, loss="mse")
    reference = qlib_class(estimator)
    assert reference.__module__.startswith("qlib.contrib.model.pytorch_")
    epoch = QlibEpoch(reference, estimator, segments_of(estimator).sample(2))
    if kind is GATs:  # Qlib builds its base model with the default sizes
        with pytest.raises(RuntimeError, match="size mismatch"):
            epoch.seconds()
    else:
        assert epoch.seconds() > 0


def test_a_model_that_fails_in_qlib_is_compared_with_torchs_layers(monkeypatch):
    class Broken:
        train_epoch = test_epoch = None

        def __init__(self, **arguments):
            pass

        def fit(self, *arguments, **options):
            raise RuntimeError("size mismatch\nand more lines")

    monkeypatch.setattr(measure_module, "qlib_class", lambda estimator: Broken)
    estimator = small_model(GRU, progress=False)
    times = measure_module.measure("GRU", estimator, dataset_for(GRU), 1e-3, Watch(), 1)
    assert times.reference_name == "torch's layers"
    assert "Qlib's GRU fails with these arguments (RuntimeError: size mismatch), so" in "".join(times.notes)
    assert times.ratio > 0


def test_classes_of_the_user_have_no_counterpart_in_qlib():
    assert qlib_class(small_model(type("Own", (ts.LSTM,), {}))) is None


# ---------------------------------------------------------------- rates, memory and trust
def test_multiply_adds():
    assert forward_multiply_adds(LSTMModel(20, 64, 2), 20) == 20 * 256 * (20 + 3 * 64)
    assert training_multiply_adds(LSTMModel(20, 64, 1), 20) == 20 * 256 * (2 * 20 + 3 * 64)
    assert forward_multiply_adds(GRUModel(20, 64, 2), 20) == 20 * 192 * (20 + 3 * 64)
    assert forward_multiply_adds(torch.nn.Linear(2, 2), 20) is None
    # kernel 1: every block computes one step
    assert forward_multiply_adds(TCNModel(4, 1, [8], 1, 0.0), 20) == 4 * 8 + 8 * 8 + 4 * 8
    # one step: the last layer computes one query, and there is one key
    step = 2 * 8 * 8 + 2 * 8 + 2 * 8 * 2048 + 2 * 8 * 8
    assert forward_multiply_adds(Transformer(6, 8, 2, 1), 1) == 6 * 8 + step


@pytest.mark.skipif(not STATUS.exists(), reason="the peak of memory is known on Linux only")
def test_peak_memory():
    with peak_memory() as peak:
        block = torch.ones(8 << 20)
    if peak.megabytes is not None:  # the system may refuse to reset the peak
        assert 30 < peak.megabytes < 60
    assert len(block) == 8 << 20


@pytest.mark.parametrize(
    ("watch", "reason"),
    [
        (Watch(products=[10.0, 10.5], copies=[1.0, 1.0], load=0.0, cpu=9.5, wall=10.0), None),
        (Watch(load=0.0, cpu=5.0, wall=10.0), "received 50% of a core"),
        (Watch(products=[10.0, 12.0], load=0.0), "matrix products changed by 20%"),
        (Watch(copies=[12.0, 10.0, 11.0], load=0.0), "copies changed by 20%"),
        (Watch(load=1e6), "the load was 1000000.0"),
    ],
    ids=["idle", "share", "products", "copies", "load"],
)
def test_a_busy_machine_is_reported(watch, reason):
    assert [reason in text for text in watch.reasons()] == ([] if reason is None else [True])


# ---------------------------------------------------------------- the command
@pytest.fixture(scope="module")
def prices(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "prices.parquet"
    demo_prices(12, 110).to_parquet(path)
    return path


def test_the_command_writes_table_json_and_picture(prices, tmp_path, capsys):
    out = tmp_path / "new" / "bench.json"
    arguments = ["--data", str(prices), "--models", "lstm,GATs", "--minutes", "0.001", "--threads", "2"]
    assert cli.main(["bench", *arguments, "-o", str(out)]) == 0
    shown = capsys.readouterr()
    facts = json.loads(out.read_text())
    assert [model["name"] for model in facts["models"]] == ["LSTM", "GATs"]
    for model in facts["models"]:
        assert model["reference_name"] == ("Qlib" if is_installed() else "torch's layers")
        assert model["ratio"] == pytest.approx(model["reference"] / model["epoch"])
        assert model["epoch"] == pytest.approx(sum(model["parts"].values()))
        assert model["threads_epoch"] > 0
        assert 0.05 < model["threads_gain"] < 20
        assert f"{model['ratio']:.2f}x" in shown.out
    assert facts["data"]["instruments"] == 12
    assert facts["product_rates"] == [1e10] * 3
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in out.parent.iterdir()) == ["bench.json", "bench.png"]
    assert f"compared with: {facts['models'][0]['reference_name']}" in shown.out
    assert "timing LSTM" in shown.err


def test_the_precision_of_the_products(tmp_path):
    settings = {"minutes": 1e-3, "threads": 1, "output": tmp_path / "b.json"}
    result = bench_module.bench(None, demo_prices(12, 110), ["TCN"], precision="bf16-if-available", **settings)
    assert result.models[0].notes[0] == "precision='bf16-if-available' of qfast; the reference computes in float32"
    assert result.models[0].ratio > 0


def test_the_model_of_a_workflow(tmp_path, capsys):
    config, data = write_case(tmp_path)
    out = tmp_path / "bench.json"
    arguments = [str(config), "--data", str(data), "--minutes", "0.001", "--threads", "1", "-o", str(out)]
    sets = ["--set", "task.model.kwargs.batch_size=5000", "--set", "task.model.kwargs.train_score=never"]
    assert cli.main(["bench", *arguments, *sets]) == 0
    facts = json.loads(out.read_text())["models"][0]
    assert facts["batch_size"] < 300
    assert "only the reference scores the training segment" in facts["notes"][0]
    assert "instead of 5,000 samples" in facts["notes"][1]
    assert facts["threads_epoch"] is None
    assert facts["threads_gain"] is None
    assert facts["notes"][0] in capsys.readouterr().out


def test_a_workflow_with_another_loss_has_no_reference(tmp_path):
    config, data = write_case(tmp_path)
    sets = ["task.model.kwargs.loss=ic", "task.model.kwargs.batch_by=day"]
    result = bench_module.bench(config, data, sets=sets, minutes=1e-3, threads=1, output=tmp_path / "b.json")
    assert result.models[0].ratio is None
    assert "no reference" in "\n".join(result.lines())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "LSTM,Mamba"], "'Mamba' is unknown; models: LSTM, GRU"),
        (["--models", "transformr"], "Did you mean 'Transformer'?"),
        (["--models", ","], "--models '' is unknown"),
        (["--data", "absent.parquet"], "'absent.parquet' does not exist"),
        (["--minutes", "0"], "--minutes must be positive"),
        (["--threads", "0"], "--threads at least 1"),
        (["--set", "a=1"], "needs a workflow file"),
        (["--precision", "bf61"], "precision must be one of float32, bf16, bf16-if-available, got 'bf61'"),
        (["-o", "bench.txt"], "must end in .json"),
        (["-o", "file/bench.json"], "cannot be created"),
        (["absent.yaml"], "absent.yaml"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_wrong_arguments_are_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    assert cli.main(["bench", *arguments]) == 2
    shown = capsys.readouterr()
    assert shown.err.count("\n") == 1
    assert message in shown.err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("task.dataset.kwargs.segments.valid=[2031-01-01, 2031-02-01]", "'valid'"),
        ("task.dataset.kwargs.segments.train=[2020-01-01, 2020-01-03]", "at least 64"),
        ("task.dataset.kwargs.segments={train: [2020-01-01, 2020-02-05]}", "no segment 'valid'"),
    ],
    ids=["empty", "few rows", "missing"],
)
def test_unsuitable_segments(change, message, tmp_path, capsys):
    config, data = write_case(tmp_path)
    out = tmp_path / "bench.json"
    assert cli.main(["bench", str(config), "--data", str(data), "--set", change, "-o", str(out)]) == 2
    shown = capsys.readouterr()
    assert message in shown.err.splitlines()[-1]
    assert not out.exists()


def test_too_few_dates():
    handler = SimpleNamespace(panel=lambda stage: SimpleNamespace(datetimes=np.array(["2020-01-01"], dtype="M8[ns]")))
    with pytest.raises(ValueError, match="1 dates, too few"):
        _segments(handler)


def test_a_model_with_its_own_loop_is_refused():
    own = type("Own", (ts.LSTM,), {"train_epoch": lambda self, loader: None})
    with pytest.raises(ValueError, match="has its own train_epoch"):
        measure_module.measure("Own", small_model(own), dataset_for(own), 1.0, Watch(), 1)


def test_names_of_models():
    assert checked_names(["gats", " LSTM", "LSTM"]) == ["GATs", "LSTM"]
    assert len(checked_names(None)) == 7


def test_rounds_end_with_the_time(monkeypatch):
    """A slow model runs twice, however short the time."""
    now = iter(range(0, 10**6, 100))
    monkeypatch.setattr(measure_module, "_our_epoch", lambda *_: (1.0, {}))
    monkeypatch.setattr(measure_module.time, "perf_counter", lambda: float(next(now)))
    times = measure_module.ModelTimes("slow")
    reference = SimpleNamespace(seconds=lambda: 2.0)
    measure_module._rounds(None, None, reference, times, Watch(), deadline=1.0)
    assert (times.rounds, times.ratio) == (2, 2.0)
