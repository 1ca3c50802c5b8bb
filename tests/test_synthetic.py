"""Synthetic markets: the planted signal has the documented strength."""

from __future__ import annotations

import time

import numpy as np
import pandas as pd
import pytest

from qfast.data import synthetic
from qfast.data.factors import evaluate
from qfast.data.sources import load_prices
from qfast.errors import ConfigError


def daily_ic(signal: np.ndarray, label: np.ndarray, days: np.ndarray) -> tuple[float, float]:
    """Mean and standard error of the daily Pearson correlation."""
    frame = pd.DataFrame({"s": signal, "y": label, "d": days}).dropna()
    ic = frame.groupby("d")[["s", "y"]].corr().iloc[0::2, 1].dropna()
    return ic.mean(), ic.std() / np.sqrt(len(ic))


@pytest.mark.parametrize("ic", [0.0, 0.1, -0.3])
def test_factors_carry_the_planted_ic(ic):
    frame = synthetic.factors(200, 300, 8, ic=ic, seed=5, with_signal=True)
    days = frame.index.get_level_values(0)
    mean, error = daily_ic(frame["signal"]["S"].to_numpy(), frame["label"]["LABEL0"].to_numpy(), days)
    assert abs(mean - ic) < 4 * error + 0.002
    assert error < 0.01


def test_factor_signal_is_linear_in_a_window_of_features_and_half_of_it_needs_the_past():
    frame = synthetic.factors(60, 200, 4, seed=2, late=0, delisted=0, holes=0, missing=0, with_signal=True)
    x = frame["feature"].to_numpy().reshape(200, 60, 4).astype(float)
    s = frame["signal"]["S"].to_numpy().reshape(200, 60)[5:].ravel()
    now, past = x[5:].reshape(-1, 4), x[:-5].reshape(-1, 4)

    def explained(design: np.ndarray) -> float:
        return 1 - np.var(s - design @ np.linalg.lstsq(design, s, rcond=None)[0]) / np.var(s)

    assert explained(np.hstack([now, past])) > 0.9999
    assert explained(now) < 0.8


@pytest.mark.parametrize("ic", [0.0, 0.15, 0.5])
def test_prices_carry_the_planted_ic(ic):
    frame = synthetic.prices(200, 300, ic=ic, seed=3, with_signal=True)
    panel = load_prices(frame)
    label = evaluate("Ref($close, -2) / Ref($close, -1) - 1", panel)
    mean, error = daily_ic(panel.column("signal"), label, panel.date_codes)
    assert abs(mean - ic) < 4 * error + 0.005


def test_price_signal_is_visible_in_past_closes():
    frame = synthetic.prices(100, 60, seed=3, late=0, delisted=0, holes=0, missing=0, with_signal=True)
    close = np.log(frame["close"].to_numpy(np.float64).reshape(60, 100))
    reversal = -(close[5:] - close[:-5])
    reversal = (reversal - reversal.mean(1, keepdims=True)) / reversal.std(1, keepdims=True)
    np.testing.assert_allclose(reversal, frame["signal"].to_numpy().reshape(60, 100)[5:], atol=2e-4)


def test_same_seed_same_market_and_global_state_untouched():
    state = np.random.get_state()
    for make in (synthetic.factors, synthetic.prices):
        pd.testing.assert_frame_equal(make(10, 30, seed=4), make(10, 30, seed=4))
        assert not make(10, 30, seed=4).equals(make(10, 30, seed=5))
    np.testing.assert_array_equal(np.random.get_state()[1], state[1])


def test_instruments_come_and_go():
    frame = synthetic.prices(80, 250, seed=1, holes=0.03, missing=0.01)
    rows = frame.index.to_frame(index=False).groupby("instrument")["datetime"].agg(["min", "max", "count"])
    first, last = frame.index.levels[0][[0, -1]]
    assert 2 <= (rows["min"] > first).sum() <= 20
    assert 2 <= (rows["max"] < last).sum() <= 20
    full = rows[(rows["min"] == first) & (rows["max"] == last)]
    assert 0.95 < full["count"].mean() / 250 < 0.99
    assert len(rows) == 80
    assert frame["open"].isna().mean() == pytest.approx(0.01, rel=0.1)
    assert (frame["volume"] == 0).sum() > 0
    ordered = frame.dropna()
    assert (ordered["low"] <= ordered[["open", "close"]].min(axis=1)).all()
    assert (ordered["high"] >= ordered[["open", "close"]].max(axis=1)).all()
    assert frame.index.is_monotonic_increasing
    assert set(map(str, frame.dtypes)) == {"float32"}


def test_the_last_labels_of_each_instrument_are_unknown():
    label = synthetic.factors(20, 50, 3, seed=1)["label"]["LABEL0"]
    tail = label.groupby(level="instrument").tail(2)
    assert tail.isna().all()
    assert label.isna().sum() == len(tail)


@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (2, 1), (3, 7)])
def test_smallest_markets(shape):
    for frame in (synthetic.factors(*shape, 2), synthetic.prices(*shape)):
        assert frame.index.get_level_values(1).nunique() == shape[0]


def test_a_market_of_the_usual_size_needs_about_a_second():
    begin = time.process_time()
    frame = synthetic.factors(300, 2500, 20)
    assert len(frame) > 600_000
    assert time.process_time() - begin < 5  # about 0.8 s on one 2020s core; generous for a loaded machine


@pytest.mark.parametrize(
    ("make", "kwargs", "message"),
    [
        (synthetic.factors, {"n_days": 0}, "n_days must be a whole number of at least 1, got 0"),
        (synthetic.factors, {"n_features": 1}, "n_features >= 2"),
        (synthetic.factors, {"ic": 2}, "-1 <= ic <= 1"),
        (synthetic.factors, {"missing": 1.5}, "missing must be a fraction from 0 to 1 .*, got 1.5"),
        (synthetic.prices, {"n_instruments": 2.5}, "n_instruments must be a whole number"),
        (synthetic.prices, {"volatility": 0}, "volatility > 0"),
        (synthetic.prices, {"holes": 1}, "holes must be a fraction"),
    ],
)
def test_refuses(make, kwargs, message):
    with pytest.raises(ConfigError, match=message):
        make(**kwargs)
