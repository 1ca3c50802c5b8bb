"""Factor expressions evaluated with pandas, one instrument at a time: the oracle of qfast.data.factors."""

from __future__ import annotations

import numpy as np
import pandas as pd

FLAT = 2e-5


class S:
    """A pandas series of one instrument, under NumPy's operators."""

    def __init__(self, s: object) -> None:
        self.s = s

    def rolled(self, n: float) -> object:
        return self.s.expanding(min_periods=1) if n == 0 else self.s.rolling(n, min_periods=1)


def plain(x: object) -> object:
    return x.s if isinstance(x, S) else x


def ufunc(name: str):
    return lambda *parts: S(getattr(np, name)(*map(plain, parts)))


for _method, _name in {
    "add": "add",
    "sub": "subtract",
    "mul": "multiply",
    "truediv": "divide",
    "pow": "power",
    "gt": "greater",
    "ge": "greater_equal",
    "lt": "less",
    "le": "less_equal",
    "eq": "equal",
    "ne": "not_equal",
    "and": "bitwise_and",
    "or": "bitwise_or",
}.items():
    setattr(S, f"__{_method}__", ufunc(_name))
    if _method in ("add", "sub", "mul", "truediv", "pow"):
        setattr(S, f"__r{_method}__", lambda a, b, name=_name: ufunc(name)(b, a))
S.__neg__ = lambda a: S(a.s * -1)


def by_method(name: str, **kwargs: object):
    def rolling(x: S, n: float) -> S:
        if isinstance(n, float):
            return S(x.s.ewm(alpha=n, min_periods=1).mean())
        return S(getattr(x.rolled(n), name)(**kwargs))

    return rolling


def by_apply(function):
    return lambda x, n: S(x.rolled(n).apply(function, raw=True))


def line(name: str):
    def of(values: np.ndarray) -> float:
        x = np.arange(1.0, len(values) + 1)
        valid = ~np.isnan(values)
        if valid.sum() < 2 or (name == "resi" and not valid[-1]):
            return np.nan
        slope, intercept = np.polyfit(x[valid], values[valid], 1)
        if name == "slope":
            return slope
        if name == "resi":
            return values[-1] - (slope * x[-1] + intercept)
        with np.errstate(all="ignore"):
            return np.corrcoef(x[valid], values[valid])[0, 1] ** 2

    def rolling(x: S, n: int) -> S:
        result = x.s.astype(float).rolling(n or len(x.s), min_periods=0).apply(of, raw=True)
        if name == "rsquare" and n:
            result[np.isclose(x.rolled(n).std(), 0, atol=FLAT)] = np.nan
        return S(result)

    return rolling


def mad(values: np.ndarray) -> float:
    valid = values[~np.isnan(values)]
    return np.mean(np.abs(valid - valid.mean()))


def wma(values: np.ndarray) -> float:
    weights = np.arange(len(values)) + 1
    return np.nanmean(weights / weights.sum() * values)


def ema(x: S, n: float) -> S:
    if n == 0:

        def growing(values: np.ndarray) -> float:
            weights = (1 - 2 / (1 + len(values))) ** np.arange(len(values))[::-1]
            return np.nansum(weights / weights.sum() * values)

        return by_apply(growing)(x, 0)
    return S(x.s.ewm(**({"alpha": n} if n < 1 else {"span": n}), min_periods=1).mean())


def corr(x: S, y: S, n: int) -> S:
    result = x.rolled(n).corr(y.s)
    if n:
        flat = [np.isclose(side.rolled(n).std(), 0, atol=FLAT) for side in (x, y)]
        result[flat[0] | flat[1]] = np.nan
    return S(result)


SCOPE = {
    **{
        n: ufunc(u)
        for n, u in {
            "Abs": "abs",
            "Log": "log",
            "Not": "bitwise_not",
            "Power": "power",
            "Add": "add",
            "Sub": "subtract",
            "Mul": "multiply",
            "Div": "divide",
            "Greater": "maximum",
            "Less": "minimum",
            "Gt": "greater",
            "Ge": "greater_equal",
            "Lt": "less",
            "Le": "less_equal",
            "Eq": "equal",
            "Ne": "not_equal",
            "And": "bitwise_and",
            "Or": "bitwise_or",
        }.items()
    },
    "Sign": lambda x: S(np.sign(x.s.astype(np.float32))),
    "If": lambda c, a, b: S(pd.Series(np.where(c.s, plain(a), plain(b)), index=c.s.index)),
    "Ref": lambda x, n: S(x.s.shift(n) if n else pd.Series(x.s.iloc[0], index=x.s.index)),
    "Delta": lambda x, n: S(x.s - (x.s.shift(n) if n else x.s.iloc[0])),
    **{
        n: by_method(m)
        for n, m in {
            "Mean": "mean",
            "Sum": "sum",
            "Std": "std",
            "Var": "var",
            "Max": "max",
            "Min": "min",
            "Med": "median",
            "Count": "count",
            "Skew": "skew",
            "Kurt": "kurt",
        }.items()
    },
    "Rank": by_method("rank", pct=True),
    "Quantile": lambda x, n, q: S(x.rolled(n).quantile(q)),
    "IdxMax": by_apply(lambda v: v.argmax() + 1),
    "IdxMin": by_apply(lambda v: v.argmin() + 1),
    "Mad": by_apply(mad),
    "WMA": by_apply(wma),
    "EMA": ema,
    **{n: line(n.lower()) for n in ("Slope", "Rsquare", "Resi")},
    "Corr": corr,
    "Cov": lambda x, y, n: S(x.rolled(n).cov(y.s)),
}


def by_pandas(text: str, series: dict[str, pd.Series]) -> pd.Series:
    """The expression over the series of one instrument, as float32."""
    with np.errstate(all="ignore"):
        result = eval(text.replace("$", "_"), SCOPE, {f"_{k}": S(v) for k, v in series.items()})
        return result.s.astype(np.float32)
