"""Time and memory of Alpha158 with 20 selected columns and with all 158.

    python bench/column_selection.py [--instruments 500] [--days 1250] [--repeats 3]

The selection and the processors come from Qlib's Alpha158 workflow for time-series models. Each form runs in
processes of its own on synthetic prices, alternately. A line shows the lowest CPU seconds of the handler, the peak
resident memory above that before the handler, and a digest of the selected columns, which must be equal. Linux only.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from qfast.benchmarks.cases import COLUMNS
from qfast.data import Alpha158, synthetic
from qfast.data.sources import load_prices

SELECTED = tuple(COLUMNS)
NORMALIZE = (
    {"class": "RobustZScoreNorm", "kwargs": {"fields_group": "feature", "clip_outlier": True}},
    {"class": "Fillna", "kwargs": {"fields_group": "feature"}},
)
LEARN = ("DropnaLabel", {"class": "CSRankNorm", "kwargs": {"fields_group": "label"}})
FORMS = {
    "158": NORMALIZE,
    "20": ({"class": "FilterCol", "kwargs": {"fields_group": "feature", "col_list": list(SELECTED)}}, *NORMALIZE),
}


def peak_mb(*, reset: bool = False) -> float:
    """Peak resident memory of this process, since the last call with reset=True."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return int(re.findall(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[0]) / 1024


def measure(form: str, instruments: int, days: int) -> dict[str, float | str]:
    """Time, memory and the digest of the selected columns, in this process."""
    torch.set_num_threads(1)
    prices = load_prices(synthetic.prices(instruments, days))
    before, begin = peak_mb(reset=True), time.process_time()
    handler = Alpha158(
        "all",
        data=prices,
        vwap="typical",
        infer_processors=FORMS[form],
        learn_processors=LEARN,
        fit_start_time="2000-01-01",
        fit_end_time="2100-01-01",
    )
    seconds, memory = time.process_time() - begin, peak_mb() - before
    panel = handler.panel("infer")
    digest = hashlib.blake2b(digest_size=8)
    for name in SELECTED:
        digest.update(np.ascontiguousarray(panel.column(name, "feature")).data)
    return {"seconds": seconds, "memory": memory, "digest": digest.hexdigest()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure both forms and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instruments", type=int, default=500)
    parser.add_argument("--days", type=int, default=1250)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--form", choices=FORMS, help="measure one form in this process and print JSON")
    options = parser.parse_args(arguments)
    if options.form:
        print(json.dumps(measure(options.form, options.instruments, options.days)))
        return
    rows: dict[str, list[dict[str, float]]] = {form: [] for form in FORMS}
    for _ in range(options.repeats):
        for form, results in rows.items():
            command = [sys.executable, __file__, *(arguments or sys.argv[1:]), "--form", form]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            results.append(json.loads(output.strip().splitlines()[-1]))
    print("| columns | handler, CPU s | handler, MB | selected columns |\n|---|---|---|---|")
    best = {}
    for form, results in rows.items():
        best[form] = [min(result[key] for result in results) for key in ("seconds", "memory")]
        digests = sorted({str(result["digest"]) for result in results})
        print(f"| {form} | {best[form][0]:.2f} | {best[form][1]:.0f} | {' '.join(digests)} |")
    time_ratio, memory_ratio = (best["158"][i] / best["20"][i] for i in range(2))
    print(f"| ratio | {time_ratio:.2f} | {memory_ratio:.2f} | |")


if __name__ == "__main__":
    main()
