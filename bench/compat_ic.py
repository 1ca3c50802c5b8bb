"""Effect of the rounding errors in Qlib's factors on the IC of an LSTM: compat=None and compat="qlib".

    python bench/compat_ic.py PRICES [--instruments 100] [--epochs 4] [--seeds 0 1 2]

PRICES is a source of daily prices as in docs/data.md. Twice, with the prices as they are and with three halts of each
stock (`with_halts` of bench/factor_compat.py), a line for each seed shows the mean test IC with exact factors and with
Qlib's, their difference, and the mean correlation of the two scores of a day. The model, the 20 columns and the
processors come from Qlib's benchmark of LSTM on Alpha158. The first 60% of the dates are for training, 20% for
validation and 20% for testing. The seeds show how much the IC changes for other reasons.
"""

from __future__ import annotations

import argparse
import logging

import pandas as pd
import torch
from factor_compat import with_halts

from qfast.data import Alpha158, TSDatasetH, load_prices
from qfast.metrics import daily_ic
from qfast.models import ts

COLUMNS = (
    *("RESI5", "WVMA5", "RSQR5", "KLEN", "RSQR10", "CORR5", "CORD5", "CORR10", "ROC60", "RESI10", "VSTD5", "RSQR60"),
    *("CORR60", "WVMA60", "STD5", "RSQR20", "CORD60", "CORD10", "CORR20", "KLOW"),
)
LEARN = ["DropnaLabel", {"class": "CSRankNorm", "kwargs": {"fields_group": "label"}}]


def dataset_of(prices: pd.DataFrame, compat: str | None) -> TSDatasetH:
    """The dataset of Qlib's benchmark on these prices."""
    dates = prices.index.get_level_values("datetime").unique().sort_values()
    cuts = [dates[int(len(dates) * part)] for part in (0.6, 0.8)]
    day = pd.Timedelta(days=1)
    infer = [
        {"class": "FilterCol", "kwargs": {"fields_group": "feature", "col_list": list(COLUMNS)}},
        {"class": "RobustZScoreNorm", "kwargs": {"fields_group": "feature", "clip_outlier": True}},
        {"class": "Fillna", "kwargs": {"fields_group": "feature"}},
    ]
    handler = Alpha158(
        data=prices,
        compat=compat,
        infer_processors=infer,
        learn_processors=LEARN,
        fit_start_time=dates[0],
        fit_end_time=cuts[0],
    )
    segments = {"train": (dates[0], cuts[0]), "valid": (cuts[0] + day, cuts[1]), "test": (cuts[1] + day, dates[-1])}
    return TSDatasetH(handler=handler, segments=segments, step_len=20)


def scores_of(dataset: TSDatasetH, seed: int, epochs: int) -> pd.Series:
    """Test scores of the LSTM of Qlib's benchmark after a few epochs."""
    model = ts.LSTM(d_feat=20, n_epochs=epochs, batch_size=800, seed=seed, device="cpu", progress=False)
    return model.fit(dataset).predict(dataset)


def daily_correlation(one: pd.Series, other: pd.Series) -> float:
    """Mean over the days of the correlation of two scores."""
    frame = pd.DataFrame({"one": one, "other": other})
    return float(frame.groupby(level="datetime").apply(lambda day: day["one"].corr(day["other"])).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prices")
    parser.add_argument("--instruments", type=int, default=100)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    logging.getLogger("qfast").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    panel = load_prices(arguments.prices)
    names = [str(name) for name in panel.instruments[: arguments.instruments]]
    plain = load_prices(arguments.prices, instruments=names).to_frame("price")
    print(f"{len(plain):,} rows, {len(names)} stocks")
    print(f"{'prices':10}{'seed':>5}{'IC exact':>10}{'IC Qlib':>10}{'difference':>12}{'correlation':>13}")
    for title, prices in (("as found", plain), ("halted", with_halts(plain))):
        datasets = [dataset_of(prices, compat) for compat in (None, "qlib")]
        label = datasets[0].handler.fetch(col_set="label", data_key="raw").iloc[:, 0]
        for seed in arguments.seeds:
            exact, qlib = (scores_of(dataset, seed, arguments.epochs) for dataset in datasets)
            ics = [float(daily_ic(score, label.reindex(score.index))[0].mean()) for score in (exact, qlib)]
            print(
                f"{title:10}{seed:>5}{ics[0]:>10.4f}{ics[1]:>10.4f}{ics[1] - ics[0]:>+12.4f}"
                f"{daily_correlation(exact, qlib):>13.4f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
