"""Values and CPU seconds of Alpha158 and Alpha360, with and without compat="qlib", compared with pyqlib's handlers.

    python bench/factor_parity.py PROVIDER_URI [--start-day 100]             # prices of a Qlib data folder
    python bench/factor_parity.py [--instruments 40] [--days 1250] [--start-day 100]             # synthetic prices

Both sides read the same Qlib data folder, without processors, from the first day or from day `--start-day` on. A line
shows the values of features and label, the share that equals Qlib's bit for bit (NaN equals NaN), the values that are
finite on one side only, the largest difference of two finite numbers, and the seconds of both handlers on one thread:
one run of Qlib's, the lowest of three of qfast's.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_factors import RAW, timed, write_store

from qfast.data import Alpha158, Alpha360, load_prices, synthetic


def comparison(ours: np.ndarray, theirs: np.ndarray) -> str:
    """The figures of a line about two float32 arrays of the same shape."""
    same = (ours.view(np.int32) == theirs.view(np.int32)) | (np.isnan(ours) & np.isnan(theirs))
    finite = np.isfinite(ours) & np.isfinite(theirs)
    one_side = int(np.sum(np.isfinite(ours) != np.isfinite(theirs)))
    largest = np.abs(ours[finite].astype(np.float64) - theirs[finite]).max()
    return f"{same.size:>12,}{same.mean():>12.5%}{one_side:>10,}{largest:>10.1e}"


def compare(folder: str, start_day: int) -> None:
    """Print one line for each handler and value of compat."""
    import qlib
    from qlib.contrib.data import handler as qlib_handlers
    from qlib.data import D

    qlib.init(provider_uri=folder, region="us", kernels=1, joblib_backend="threading", logging_level=logging.ERROR)
    arguments: dict[str, Any] = dict(RAW)
    if start_day:
        arguments["start_time"] = str(D.calendar()[start_day].date())
    columns = f"{'handler':10}{'compat':>7}{'rows':>9}{'values':>12}{'equal':>12}{'one side':>10}{'largest':>10}"
    print(f"{columns}{'Qlib, s':>9}{'qfast, s':>9}")
    for kind in (Alpha158, Alpha360):
        qlib_kind = getattr(qlib_handlers, kind.__name__)
        seconds, _, handler = timed(lambda qlib_kind=qlib_kind: qlib_kind("all", **arguments))
        theirs = handler.fetch(col_set="__all")
        for compat in (None, "qlib"):
            options = {"provider_uri": folder, "compat": compat, **arguments}
            runs = [timed(lambda kind=kind, options=options: kind("all", **options)) for _ in range(3)]
            ours = runs[0][2].fetch(col_set="__all")
            if not ours.index.equals(theirs.index):
                raise ValueError(f"{kind.__name__} has {len(ours)} rows, Qlib's {len(theirs)}, or in another order")
            figures = comparison(ours.to_numpy(np.float32), theirs.to_numpy(np.float32))
            times = f"{seconds:>9.2f}{min(run[0] for run in runs):>9.2f}"
            print(f"{kind.__name__:10}{compat!s:>7}{len(ours):>9,}{figures}{times}", flush=True)


def main() -> None:
    """Compare on the folder, or on synthetic prices in a temporary one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("provider_uri", nargs="?")
    parser.add_argument("--instruments", type=int, default=40)
    parser.add_argument("--days", type=int, default=1250)
    parser.add_argument("--start-day", type=int, default=0)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("qfast").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    if options.provider_uri:
        compare(options.provider_uri, options.start_day)
        return
    with tempfile.TemporaryDirectory() as folder:
        panel = load_prices(synthetic.prices(options.instruments, options.days))
        write_store(Path(folder, "store"), panel, options.instruments)
        compare(str(Path(folder, "store")), options.start_day)


if __name__ == "__main__":
    main()
