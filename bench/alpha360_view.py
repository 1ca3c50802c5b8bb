"""Memory and CPU time of Alpha360 as a view of prices and as columns.

    python bench/alpha360_view.py [--data PRICES] [--instruments 250] [--days 1250] [--json FILE]

Without --data, the prices are synthetic (`qfast.data.synthetic.prices`), in a Parquet file. For each form, a process of
its own reads the prices, builds the handler with the processors of Qlib's benchmark, trains an LSTM for one epoch and
scores the test segment. A line shows
CPU seconds, the peak memory above that after the imports, and a digest of the scores, which must be equal. --json
appends a line for each form to a file, from which bench/plot_scale.py draws memory and time.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from compare import memory_mb, reset_peak

from qfast.data import Alpha360, DatasetH, synthetic
from qfast.models import LSTM

FORMS = ("view", "columns")
INFER = [
    {"class": "RobustZScoreNorm", "kwargs": {"fields_group": "feature", "clip_outlier": True}},
    {"class": "Fillna", "kwargs": {"fields_group": "feature"}},
]
LEARN = ["DropnaLabel", {"class": "CSRankNorm", "kwargs": {"fields_group": "label"}}]


def measure(form: str, data: str, hidden: int = 4, layers: int = 1) -> dict[str, float | str]:
    """Times, memory and the digest of the scores, in this process."""
    torch.set_num_threads(1)
    reset_peak()
    after_imports = memory_mb("VmRSS")
    begin = time.process_time()
    handler = Alpha360(
        data=data,
        vwap="typical",
        windows=form,
        infer_processors=INFER,
        learn_processors=LEARN,
        fit_start_time="2000-01-01",
        fit_end_time="2100-01-01",
    )
    built, handler_mb, resident_mb = time.process_time(), memory_mb("VmHWM"), memory_mb("VmRSS")
    dates = handler.panel("infer").datetimes
    cut = [dates[int(len(dates) * part)] for part in (0.6, 0.8)]
    dataset = DatasetH(handler, {"train": (None, cut[0]), "valid": (cut[0], cut[1]), "test": (cut[1], None)})
    model = LSTM(d_feat=6, hidden_size=hidden, num_layers=layers, dropout=0.0, n_epochs=1, seed=0, progress=False)
    model.fit(dataset)
    trained = time.process_time()
    scores = model.predict(dataset)
    return {
        "kind": "panel",
        "form": form,
        "rows": handler.panel("infer").n_rows,
        "hidden": hidden,
        "layers": layers,
        "windows": len(dataset.windows("train", "learn")),
        "handler_s": built - begin,
        "fit_s": trained - built,
        "handler_mb": handler_mb - after_imports,
        "resident_mb": resident_mb - after_imports,
        "peak_mb": memory_mb("VmHWM") - after_imports,
        "scores": hashlib.blake2b(scores.to_numpy().tobytes(), digest_size=8).hexdigest(),
    }


def measure_apart(
    form: str, data: str | None, instruments: int, days: int, hidden: int = 4, layers: int = 1
) -> dict[str, float | str]:
    """Call `measure` in a new process, because peak memory is a figure of the whole process."""
    with tempfile.TemporaryDirectory() as folder:
        if data is None:
            data = str(Path(folder) / "prices.parquet")
            synthetic.prices(instruments, days).reset_index().to_parquet(data)
        command = [sys.executable, __file__, "--form", form, "--data", data]
        command += ["--hidden", str(hidden), "--layers", str(layers)]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return cast("dict[str, float | str]", json.loads(output.strip().splitlines()[-1]))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure both forms and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data")
    parser.add_argument("--instruments", type=int, default=250)
    parser.add_argument("--days", type=int, default=1250)
    parser.add_argument("--hidden", type=int, default=4)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--json")
    parser.add_argument("--form", choices=FORMS, help="measure one form of --data in this process and print JSON")
    options = parser.parse_args(arguments)
    network = (options.hidden, options.layers)
    if options.form:
        print(json.dumps(measure(options.form, options.data, *network)))
        return
    print(
        "| form | handler, CPU s | fit, CPU s | handler, MB | handler and fit, MB | scores |\n|---|---|---|---|---|---|"
    )
    for form in FORMS:
        row = measure_apart(form, options.data, options.instruments, options.days, *network)
        times = f"{row['handler_s']:.1f} | {row['fit_s']:.1f}"
        print(f"| {form} | {times} | {row['handler_mb']:.0f} | {row['peak_mb']:.0f} | {row['scores']} |")
        if options.json:
            with open(options.json, "a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
