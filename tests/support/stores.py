"""Writes small Qlib binary stores for tests, and derives Alpha360 from them with pandas alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

FIELDS = ("close", "open", "high", "low", "vwap", "volume")


def write_store(root: Path, *, seed: int = 0, n_days: int = 120, freq: str = "day") -> Path:
    """A small store with every irregularity that Qlib's files can have.

    Late listing, early end, suspensions stored as NaN, a field whose file is shorter than the others, a
    field without a file, a code that is a Windows device name, a code without any file, zero volume and a
    zero price, markets with one and with two membership spans, dates of a span outside the calendar.
    """
    rng = np.random.default_rng(seed)
    calendar = pd.bdate_range("2020-01-01", periods=n_days) if freq == "day" else minutes(n_days)
    stamp = "%Y-%m-%d" if freq == "day" else "%Y-%m-%d %H:%M:%S"
    for part in ("calendars", "instruments", "features"):
        (root / part).mkdir(parents=True)
    (root / "calendars" / f"{freq}.txt").write_text("\n".join(calendar.strftime(stamp)) + "\n")
    stored = {
        "AAA": (0, n_days),
        "BBB": (n_days // 3, n_days),
        "CCC": (0, n_days // 2),
        "CON": (5, n_days - 5),
        "DDD": (0, n_days),
        "EEE": (n_days - 3, n_days),
    }
    for code, (first, stop) in stored.items():
        folder = root / "features" / ("_qlib_con" if code == "CON" else code.lower())
        folder.mkdir()
        close = 20 * np.exp(np.cumsum(0.02 * rng.standard_normal(stop - first)))
        for field in FIELDS:
            if code == "CCC" and field == "vwap":
                continue
            values = close * (1 + 0.01 * rng.standard_normal(stop - first))
            if field == "close":
                values = close
            if field == "volume":
                values = np.floor(rng.lognormal(10, 1, stop - first))
                values[rng.random(len(values)) < 0.05] = 0
            values = values.astype("<f4")
            values[rng.random(len(values)) < 0.06] = np.nan  # a suspension, or a hole in one field
            begin = first
            if code == "DDD" and field in ("open", "volume"):  # files that cover fewer days than the close
                values, begin = values[7:-4], first + 7
            if code == "BBB" and field == "close":  # rows before and after the stored close
                values, begin = values[3:-2], first + 3
            if code == "DDD" and field == "close":
                values[30] = 0
            np.concatenate([[begin], values]).astype("<f4").tofile(folder / f"{field}.{freq}.bin")
    day = calendar.strftime(stamp)
    whole = [f"{code}\t{day[0]}\t{day[-1]}" for code in (*stored, "NOFILE")]
    (root / "instruments" / "all.txt").write_text("\n".join(whole) + "\n")
    spans = [
        f"BBB\t1999-01-01\t{day[n_days // 2]}",
        f"AAA\t{day[10]}\t{day[40]}\tmore",
        f"AAA\t{day[60]}\t2099-12-31",
        f"DDD\t{day[0]}\t{day[3]}",
    ]
    (root / "instruments" / "mixed.txt").write_text("\n".join(spans) + "\n")
    return root


def minutes(n: int) -> pd.DatetimeIndex:
    """Calendar of 5-minute bars, 12 a day."""
    days = [
        pd.date_range(d + pd.Timedelta(hours=9, minutes=30), periods=12, freq="5min")
        for d in pd.bdate_range("2020-01-01", periods=-(-n // 12))
    ]
    return pd.DatetimeIndex(np.concatenate([d.to_numpy() for d in days]))[:n]


def read_series(root: Path, code: str, field: str, freq: str = "day") -> pd.Series:
    """One .bin file as a Series over calendar positions."""
    folder = root / "features" / (f"_qlib_{code}" if code == "CON" else code).lower()
    path = folder / f"{field}.{freq}.bin"
    if not path.exists():
        return pd.Series(dtype=np.float32)
    raw = np.fromfile(path, dtype="<f4")
    return pd.Series(raw[1:], index=pd.RangeIndex(int(raw[0]), int(raw[0]) + len(raw) - 1))


def alpha360(root: Path, code: str, label_field: str = "close", freq: str = "day") -> pd.DataFrame:
    """Raw Alpha360 columns and label of one instrument over calendar positions, computed with pandas."""
    series = {field: read_series(root, code, field, freq) for field in FIELDS}
    with np.errstate(all="ignore"):
        columns = {}
        for field in FIELDS:
            base = series["volume"] + 1e-12 if field == "volume" else series["close"]
            for i in range(59, -1, -1):
                columns[f"{field.upper()}{i}"] = (series[field].shift(i) / base).astype(np.float32)
        price = series[label_field]
        columns["LABEL0"] = (price.shift(-2) / price.shift(-1) - 1).astype(np.float32)
    return pd.DataFrame(columns)


def write_market(root: Path, n_stocks: int = 25, n_days: int = 140, factor: bool = True, seed: int = 0) -> Path:
    """A Qlib store with suspensions, late listings and days at the price limit."""
    rng = np.random.default_rng(seed)
    calendar = pd.bdate_range("2020-01-01", periods=n_days)
    for part in ("calendars", "instruments", "features"):
        (root / part).mkdir(parents=True)
    (root / "calendars" / "day.txt").write_text("\n".join(calendar.strftime("%Y-%m-%d")) + "\n")
    lines = []
    for stock in range(n_stocks):
        first = int(rng.integers(0, 60)) if stock % 5 == 0 and stock else 0
        close = 20 * np.exp(np.cumsum(0.03 * rng.standard_normal(n_days - first)))
        fields = {"close": close, "open": close * (1 + 0.01 * rng.standard_normal(len(close)))}
        fields["volume"] = rng.lognormal(12, 1, len(close))
        gone = rng.random(len(close)) < 0.03
        for values in fields.values():
            values[gone] = np.nan
        fields["open"][rng.random(len(close)) < 0.01] = 0  # no deal price: the close is used
        fields["change"] = fields["close"] / np.concatenate([[np.nan], fields["close"][:-1]]) - 1
        if factor:
            fields["factor"] = np.where(gone, np.nan, 1 + stock / 7)
        folder = root / "features" / f"s{stock:02d}"
        folder.mkdir()
        for name, values in fields.items():
            np.concatenate([[first], values]).astype("<f4").tofile(folder / f"{name}.day.bin")
        lines.append(f"S{stock:02d}\t2020-01-01\t2099-12-31")
    (root / "instruments" / "all.txt").write_text("\n".join(lines) + "\n")
    return root


def write_halted_store(
    root: Path, n_stocks: int = 12, n_days: int = 300, seed: int = 0, *, special: bool = True
) -> Path:
    """A Qlib store full of halts: rows of NaN, flat prices, zero volume, and combinations of them.

    Every third stock is listed late. Each stock has five such stretches of 2 to 90 days. Some stocks also have an
    infinite price, a price of 0 or an infinite volume.
    """
    rng = np.random.default_rng(seed)
    calendar = pd.bdate_range("2018-01-01", periods=n_days)
    for part in ("calendars", "instruments", "features"):
        (root / part).mkdir(parents=True)
    (root / "calendars" / "day.txt").write_text("\n".join(calendar.strftime("%Y-%m-%d")) + "\n")
    lines = []
    for stock in range(n_stocks):
        first = int(rng.integers(0, n_days // 2)) if stock % 3 == 2 else 0
        fields = _halted_fields(rng, n_days - first)
        name, value = [("volume", 1e3), ("close", np.inf), ("close", 0.0), ("volume", np.inf)][stock % 4]
        fields[name][int(rng.integers(0, n_days - first))] = value
        folder = root / "features" / f"s{stock:02d}"
        folder.mkdir()
        for name, values in fields.items():
            np.concatenate([[first], values]).astype("<f4").tofile(folder / f"{name}.day.bin")
        lines.append(f"S{stock:02d}\t{calendar[first].date()}\t2099-12-31")
    (root / "instruments" / "all.txt").write_text("\n".join(lines) + "\n")
    return root


def _halted_fields(rng: np.random.Generator, n_days: int) -> dict[str, np.ndarray]:
    close = np.exp(rng.normal(2, 1)) * np.exp(np.cumsum(0.02 * rng.standard_normal(n_days)))
    fields = {name: close * (1 + 0.01 * rng.standard_normal(n_days)) for name in ("open", "vwap")}
    fields["close"] = close.copy()
    fields["high"] = np.maximum(close, fields["open"]) * (1 + 0.01 * rng.random(n_days))
    fields["low"] = np.minimum(close, fields["open"]) * (1 - 0.01 * rng.random(n_days))
    fields["volume"] = np.floor(rng.lognormal(12 + 3 * rng.random(), 1, n_days))
    for _ in range(5):
        begin = int(rng.integers(0, n_days - 1))
        days = slice(begin, begin + int(rng.integers(2, 90)))
        kind = rng.choice(["missing", "flat without volume", "without volume", "flat"])
        for name, values in fields.items():
            if kind == "missing":
                values[days] = np.nan
            elif name == "volume":
                values[days] = 0 if "volume" in kind else values[days]
            elif "flat" in kind:
                values[days] = close[begin]
    return fields
