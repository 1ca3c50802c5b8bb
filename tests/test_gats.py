"""GATs: batches of one day, scoring several days at once, unusual days, and tables of attention."""

from __future__ import annotations

import logging

import numpy as np
import pandas as pd
import pytest
import torch

from qfast.errors import ConfigError, DataError, NotFittedError
from qfast.models import GATs, attention, ts
from qfast.nn.recurrent import as_windows
from qfast.training.callbacks import Callback
from support.devices import make_cudnn_exact
from support.fits import dataset_for, frame_for, same_weights, weights
from support.frames import make_frame, rolling

SMALL = {"d_feat": 3, "hidden_size": 8, "n_epochs": 3, "lr": 0.01, "seed": 1}
both = pytest.mark.parametrize("kind", [GATs, ts.GATs], ids=["flat", "ts"])


class Seen(Callback):
    """The samples of each training step, as index entries."""

    def __init__(self, model, dataset) -> None:
        self.index = dataset.windows("train", "learn").keys()
        self.steps: list[pd.MultiIndex] = []
        inner = model.train_step

        def train_step(windows, samples):
            self.steps.append(self.index[samples.numpy()])
            return inner(windows, samples)

        model.train_step = train_step


# ---------------------------------------------------------------- batches are days
@both
def test_every_training_batch_is_all_stocks_of_one_date(kind):
    dataset = dataset_for(kind)
    model = kind(**{**SMALL, "n_epochs": 2})
    seen = Seen(model, dataset)
    model.fit(dataset)
    days = seen.index.get_level_values(0)
    n_days = days.nunique()
    assert len(seen.steps) == 2 * n_days
    sizes = days.value_counts()
    for step in seen.steps:
        assert step.get_level_values(0).nunique() == 1
        assert len(step) == sizes[step[0][0]]
        assert step.get_level_values(1).is_monotonic_increasing
    first, second = ([step[0][0] for step in seen.steps[k * n_days : (k + 1) * n_days]] for k in (0, 1))
    assert sorted(first) == sorted(second) == sorted(days.unique())
    assert first != second != sorted(second)
    # NumPy draws one shuffle of the days per pass
    np.random.seed(1)
    order = np.arange(n_days)
    np.random.shuffle(order)
    assert first == [sorted(days.unique())[k] for k in order]


@both
def test_shuffle_days_false_keeps_the_order(kind):
    dataset = dataset_for(kind)
    model = kind(**SMALL, shuffle_days=False)
    seen = Seen(model, dataset)
    model.fit(dataset)
    dates = [step[0][0] for step in seen.steps]
    assert dates == 3 * sorted(set(dates))


def test_compat_restores_qlibs_batches_of_mixed_dates():
    dataset = rolling()
    model = ts.GATs(**{**SMALL, "n_epochs": 1}, compat="qlib")
    seen = Seen(model, dataset)
    model.fit(dataset)
    assert np.mean([step.get_level_values(0).nunique() for step in seen.steps]) > 5
    counts = seen.index.get_level_values(0).value_counts().sort_index()
    assert [len(step) for step in seen.steps] == counts.tolist()
    assert seen.steps[0].append(seen.steps[1:]).equals(seen.index)


# ---------------------------------------------------------------- scoring and predicting
def test_predictions_have_the_order_and_dates_of_other_models():
    dataset = rolling()
    model = ts.GATs(**SMALL).fit(dataset)
    result = model.predict(dataset)
    other = ts.LSTM(**{**SMALL, "n_epochs": 1, "batch_size": 32}).fit(dataset).predict(dataset)
    assert result.index.equals(other.index)
    assert not result.index.get_level_values(0).is_monotonic_increasing
    windows = dataset.windows("test", "infer")
    with torch.no_grad():
        for date, part in result.groupby(level=0):
            samples = torch.from_numpy(np.flatnonzero(windows.keys().get_level_values(0) == date))
            expected = model.network(windows.batch(samples))
            np.testing.assert_allclose(part.to_numpy(), expected.numpy(), rtol=1e-4, atol=1e-6)


@both
def test_the_rows_order_does_not_matter(kind):
    frame = frame_for(kind)
    model = kind(**SMALL).fit(dataset_for(kind, frame=frame))
    shuffled = frame.sample(frac=1.0, random_state=3)
    result = model.predict(dataset_for(kind, frame=shuffled))
    pd.testing.assert_series_equal(result, model.predict(dataset_for(kind, frame=frame)))


@both
@pytest.mark.parametrize("rows", [0, 1, 25, 10**6])
def test_numbers_do_not_depend_on_how_many_days_go_through_the_network_at_once(kind, rows, monkeypatch):
    dataset = dataset_for(kind)
    model = kind(**SMALL).fit(dataset)
    windows = model.load_segment(dataset, "valid")
    expected, scores = model.predict(dataset), model.score_segment(windows, "valid")
    monkeypatch.setattr(kind, "rows_per_call", rows)
    calls = []
    model.network.register_forward_hook(lambda *_: calls.append(1))
    np.testing.assert_allclose(model.score_segment(windows, "valid"), scores, rtol=1e-6)
    assert len(calls) == (1 if rows == 10**6 else len(windows.days) if rows < 2 else len(calls))
    pd.testing.assert_series_equal(model.predict(dataset), expected, rtol=1e-5, atol=1e-6)


@both
def test_a_score_is_the_mean_over_days_of_the_days_scores(kind):
    dataset = dataset_for(kind)
    model = kind(**{**SMALL, "n_epochs": 1}).fit(dataset)
    windows = dataset.windows("valid", "learn")
    with torch.no_grad():
        errors = [(model.network(windows.batch(samples)) - windows.label[samples]).square() for samples in windows.days]
    record = model.history_.iloc[-1]
    assert record["valid"] == pytest.approx(-np.mean([float(e.mean()) for e in errors]), rel=1e-5)
    assert record["valid_all"] == pytest.approx(-float(torch.cat(errors).mean()), rel=1e-5)


# ---------------------------------------------------------------- unusual days
@both
@pytest.mark.parametrize("compat", [None, "qlib"])
def test_a_day_with_one_stock(kind, compat):
    frame = frame_for(kind)
    for date in ("2020-01-08", "2020-02-19", "2020-03-20"):  # of each segment
        frame = frame[(frame.index.get_level_values(0) != date) | (frame.index.get_level_values(1) == "S003")]
    dataset = dataset_for(kind, frame=frame)
    model = kind(**SMALL, compat=compat).fit(dataset)
    assert np.isfinite(model.history_[["train", "valid", "train_loss"]].to_numpy()).all()
    result = model.predict(dataset)
    assert result.notna().all()
    assert len(result.loc["2020-03-20"]) == 1


@both
def test_one_stock_in_all(kind):
    dataset = dataset_for(kind, frame=frame_for(kind, 70, 1, holes=0.0))
    model = kind(**SMALL)
    before = weights(model)
    assert model.fit(dataset).predict(dataset).notna().all()
    assert not same_weights(weights(model), before)


@both
def test_segments_of_one_day(kind):
    one_day = {
        "train": ("2020-02-03", "2020-02-03"),
        "valid": ("2020-02-04", "2020-02-04"),
        "test": ("2020-02-05",) * 2,
    }
    dataset = dataset_for(kind, segments=one_day)
    model = kind(**SMALL).fit(dataset)
    assert model.history_["train"].iloc[-1] > model.history_["train"].iloc[0]
    assert len(model.predict(dataset)) == len(dataset.windows("test", "infer"))
    assert len(model.predict(dataset, slice("2031-01-01", None))) == 0


@both
def test_days_without_labels(kind):
    frame = frame_for(kind)
    labels = frame[("label", "LABEL0")].copy()
    labels.loc[["2020-01-09", "2020-01-10", "2020-02-20"]] = np.nan  # two of train, one of valid
    frame[("label", "LABEL0")] = labels
    dataset = dataset_for(kind, frame=frame)
    steps = {}
    for compat in (None, "qlib"):
        model = kind(**SMALL, shuffle_days=False, compat=compat)
        seen = Seen(model, dataset)
        model.fit(dataset)
        steps[compat] = len(seen.steps) // 3
        if compat is None:
            assert np.isfinite(model.history_[["train", "valid", "valid_all", "train_loss"]].to_numpy()).all()
        elif kind is GATs:  # the batches of Qlib's time-series model are not days
            assert model.history_[["train", "valid"]].isna().all(axis=None)
    assert steps["qlib"] == steps[None] + 2 if kind is GATs else steps["qlib"] >= steps[None]
    unlabelled = frame.drop(index=["2020-01-09", "2020-01-10"], level=0)
    if kind is GATs:  # removing the days from the data has the same effect: no step, no change in Adam's averages
        other = GATs(**SMALL, shuffle_days=False).fit(dataset_for(kind, frame=unlabelled))
        assert same_weights(weights(kind(**SMALL, shuffle_days=False).fit(dataset)), weights(other))


# ---------------------------------------------------------------- arguments
@both
def test_a_batch_size_is_taken_said_and_ignored(kind, caplog):
    with caplog.at_level(logging.INFO, logger="qfast"):
        model = kind(**SMALL, batch_size=5)
    assert [r.message for r in caplog.records] == ["batch_size=5 has no effect: every batch of GATs is a day"]
    assert model.fit(dataset_for(kind)).evals_result_ == kind(**SMALL).fit(dataset_for(kind)).evals_result_


# ---------------------------------------------------------------- on a GPU, learning, attention tables
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use")
@pytest.mark.parametrize("compat", [None, "qlib"])
@both
def test_a_gpu_equals_the_cpu(kind, compat, monkeypatch):
    make_cudnn_exact(monkeypatch)
    gpu, cpu = (kind(**{**SMALL, "lr": 1e-4}, compat=compat, device=device) for device in ("cuda", "cpu"))
    for model in (gpu, cpu):
        np.random.seed(5)
        torch.manual_seed(5)
        model.pretrain(dataset_for(kind), n_epochs=1, batch_size=64)
        model.fit(dataset_for(kind))
    np.testing.assert_allclose(gpu.history_[["train", "valid"]], cpu.history_[["train", "valid"]], rtol=1e-4)
    pd.testing.assert_series_equal(gpu.predict(dataset_for(kind)), cpu.predict(dataset_for(kind)), rtol=1e-2, atol=1e-3)
    tables = [model.attention(dataset_for(kind), "2020-03-16", top=3) for model in (gpu, cpu)]
    pd.testing.assert_frame_equal(*tables, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("base", ["GRU", "LSTM"])
def test_a_signal_in_the_other_stocks_of_the_day_is_learnt(base):
    """The label is the market's move, which is visible in the features of the other stocks."""
    rng = np.random.default_rng(0)
    frame = make_frame(160, 30, 3, holes=0.05)
    dates = frame.index.get_level_values(0)
    market = pd.Series(rng.standard_normal(dates.nunique()), index=dates.unique())
    move = market.reindex(dates).to_numpy()
    frame[("feature", "F0")] = (0.5 * move + frame[("feature", "F0")].to_numpy()).astype(np.float32)
    frame[("label", "LABEL0")] = move.astype(np.float32)
    segments = {"train": ("2020-01-01", "2020-06-15"), "test": ("2020-06-16", None)}
    dataset = rolling(frame, segments)
    model = ts.GATs(**{**SMALL, "n_epochs": 12}, base_model=base).fit(dataset)
    alone = ts.LSTM(**{**SMALL, "n_epochs": 12, "batch_size": 64}).fit(dataset)
    label = frame[("label", "LABEL0")]
    result, expected = (m.predict(dataset).corr(label) for m in (model, alone))
    assert result > 0.75 > 0.6 > expected


# ---------------------------------------------------------------- attention
def fitted(kind):
    dataset = dataset_for(kind, frame=frame_for(kind, 70, 12))
    return kind(**SMALL).fit(dataset), dataset


@both
def test_attention_is_the_softmax_of_the_day(kind):
    model, dataset = fitted(kind)
    date = pd.Timestamp("2020-03-16")
    windows = dataset.windows(slice(date, date), "infer")
    names = list(windows.keys().get_level_values(1))
    net = model.network
    with torch.no_grad():
        hidden = net.rnn(as_windows(windows.batch(torch.arange(len(windows))), 3))[0][:, -1]
        z = net.transformation(hidden)
        scores = (z @ net.a[8:]) + (z @ net.a[:8]).t()
        dense = torch.nn.functional.leaky_relu(scores, 0.01).softmax(1).numpy()
    whole = model.attention(dataset, date, top=99)
    assert list(whole) == ["instrument", "rank", "neighbour", "weight", "score"]
    assert len(whole) == len(names) ** 2
    grid = whole.pivot(index="instrument", columns="neighbour", values="weight")
    np.testing.assert_allclose(grid.loc[names, names].to_numpy(), dense, rtol=1e-4, atol=1e-7)
    assert (whole.groupby("instrument")["weight"].diff().dropna() <= 1e-9).all()  # largest first
    part = model.attention(dataset, "2020-03-16", [names[3], names[0]], top=2)
    assert list(part["instrument"]) == [names[3]] * 2 + [names[0]] * 2
    assert list(part["rank"]) == [1, 2, 1, 2]
    expected = whole[whole["instrument"].eq(names[3]) & whole["rank"].le(2)]
    np.testing.assert_allclose(part["weight"][:2], expected["weight"], rtol=1e-12)
    assert len(model.attention(dataset, date, names[0], top=1, segment="test")) == 1
    by_segment = model.attention(dataset, date, segment="test")
    pd.testing.assert_frame_equal(by_segment, model.attention(dataset, date), rtol=1e-4, atol=1e-6)


def test_attention_of_few_stocks_of_a_large_market_stays_small(monkeypatch):
    monkeypatch.setattr(attention, "CHUNK_SCORES", 50_000)
    torch.manual_seed(0)
    query, key = torch.randn(2, 20_000)
    largest = 0
    inner = torch.nn.functional.leaky_relu

    def leaky_relu(scores):
        nonlocal largest
        largest = max(largest, scores.numel())
        return inner(scores)

    monkeypatch.setattr(attention.functional, "leaky_relu", leaky_relu)
    names = [f"S{i}" for i in range(20_000)]
    table = attention.neighbours(query, key, names, names[:5], top=3)
    assert largest == 40_000  # two rows at a time
    weights = inner(query[4].double() + key.double(), 0.01).softmax(0)
    np.testing.assert_allclose(table["weight"][12:], weights.topk(3).values, rtol=1e-12)


@both
def test_attention_reports_missing_dates_and_stocks(kind):
    model, dataset = fitted(kind)
    with pytest.raises(NotFittedError, match="not fitted yet"):
        kind(**SMALL).attention(dataset, "2020-03-16")
    with pytest.raises(DataError, match=r"instruments: \['S0003'\] \(1 in all\) have no row .*Did you mean 'S003'"):
        model.attention(dataset, "2020-03-16", ["S0003"])
    with pytest.raises(DataError, match="date '2020-03-15' has no row in the data"):
        model.attention(dataset, "2020-03-15")
    with pytest.raises(ConfigError, match="top must be a whole number of at least 1, got 0"):
        model.attention(dataset, "2020-03-16", top=0)


def test_attention_of_an_intraday_moment():
    frame = make_frame(40, 5, 3, holes=0.0, freq="12h")
    frame.index = frame.index.set_levels(frame.index.levels[0] + pd.Timedelta("3h"), level=0)
    segments = {"train": ("2020-01-01", "2020-01-10"), "test": ("2020-01-11", None)}
    dataset = rolling(frame, segments)
    model = ts.GATs(**SMALL).fit(dataset)
    with pytest.raises(DataError, match=r"has 2 cross-sections. Remedy: the full time stamp"):
        model.attention(dataset, "2020-01-12", segment="test")
    assert len(model.attention(dataset, "2020-01-12 15:00", top=3)) == 15


@both
@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_attention_is_drawn(kind, suffix, tmp_path):
    model, dataset = fitted(kind)
    path = model.plot_attention(dataset, "2020-03-16", tmp_path / "new" / f"day{suffix}", top=4)
    start = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}[suffix]
    assert path.read_bytes().startswith(start)
    assert [f.name for f in path.parent.iterdir()] == [path.name]
    with pytest.raises(ConfigError, match=r"must end in one of \['.png', '.pdf', '.svg'\], got 'day.bmp'"):
        model.plot_attention(dataset, "2020-03-16", tmp_path / "day.bmp")


def test_a_picture_of_many_stocks_shows_some_and_says_so(tmp_path):
    torch.manual_seed(0)
    table = attention.neighbours(*torch.randn(2, 100), [f"S{i:03d}" for i in range(100)], top=5)
    text = attention.plot_attention(table, tmp_path / "a.svg", "Attention").read_text()
    assert "Attention, 40 of 100 stocks" in text
    wide = attention.neighbours(*torch.randn(2, 3000), [f"S{i:04d}" for i in range(3000)], ["S0001"], top=3000)
    assert attention.plot_attention(wide, tmp_path / "w.png").stat().st_size > 1000
    with pytest.raises(DataError, match="the attention table has 0 rows"):
        attention.plot_attention(table[:0], tmp_path / "b.svg")


@both
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 3145728 bytes."),
        MemoryError("no memory for 3.0 MiB on cpu"),
    ],
    ids=["CUDA", "CPU", "kernel"],
)
def test_too_little_memory_is_reported(kind, error):
    model = kind(**SMALL)

    def full(*args, **kwargs):
        raise error

    model.network.forward = full
    with pytest.raises(DataError, match=r"training batch does not fit into the memory of cpu .* Remedy: fewer columns"):
        model.fit(dataset_for(kind))
    other = ts.LSTM(**SMALL, batch_size=7)
    other.network.forward = full
    with pytest.raises(DataError, match=r"Remedy: a smaller batch_size \(now 7\), fewer columns"):
        other.fit(rolling())


# ---------------------------------------------------------------- non-finite windows
@both
def test_a_stock_with_nan_is_left_out_of_its_day(kind, caplog):
    frame = frame_for(kind)
    dataset = dataset_for(kind, frame=frame)
    model = kind(**SMALL).fit(dataset)
    whole = model.predict(dataset)
    date, stock = whole.index[-1]
    spoilt = frame.copy()
    spoilt.loc[(date, stock), spoilt.columns[0]] = np.nan
    result = model.predict(dataset_for(kind, frame=spoilt))
    gone = result.index[result.isna()]
    assert list(gone) == [(date, stock)]  # the last date: no later window holds it
    assert "1 of" in caplog.text
    alone = dataset_for(kind, frame=frame.drop((date, stock)))
    rest = [key for key in whole.index if key[0] == date and key[1] != stock]
    np.testing.assert_allclose(result[rest], model.predict(alone)[rest], rtol=1e-5, atol=1e-6)
    others = [key for key in whole.index if key[0] != date]
    np.testing.assert_allclose(result[others], whole[others], rtol=1e-5, atol=1e-6)
    table = model.attention(dataset_for(kind, frame=spoilt), date, top=3)
    assert stock not in set(table["instrument"]) | set(table["neighbour"])
    assert np.isfinite(table["weight"]).all()
    theirs = kind(**SMALL, compat="qlib")
    theirs.network.load_state_dict(model.network.state_dict())
    theirs.fitted = True
    assert theirs.predict(dataset_for(kind, frame=spoilt)).isna().sum() > 1


@both
def test_an_invalid_date_is_reported(kind):
    dataset = dataset_for(kind)
    model = kind(**{**SMALL, "n_epochs": 1}).fit(dataset)
    for wrong in ("zzz", None):
        with pytest.raises(DataError, match=r"date must be a date or a time stamp, got"):
            model.attention(dataset, wrong)


def test_a_bare_date_finds_the_one_bar_of_an_intraday_day():
    frame = frame_for(GATs)
    frame.index = frame.index.set_levels(frame.index.levels[0] + pd.Timedelta(hours=15), level=0)
    dataset = dataset_for(GATs, frame=frame)
    model = GATs(**{**SMALL, "n_epochs": 1}).fit(dataset)
    date = model.predict(dataset).index[0][0]
    table = model.attention(dataset, date.normalize(), top=2)
    pd.testing.assert_frame_equal(table, model.attention(dataset, date, top=2))
