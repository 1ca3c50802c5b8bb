"""`qfast bench` and `qfast.benchmarks.bench.bench`: reads the data, times the models, and writes the report."""

from __future__ import annotations

import datetime
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from qfast.benchmarks.cases import default_subject, workflow_subject
from qfast.benchmarks.measure import measure
from qfast.benchmarks.report import BenchResult
from qfast.benchmarks.trust import Watch
from qfast.errors import ConfigError
from qfast.files import require_file_target
from qfast.precision import available_products
from qfast.read_options import ReadOptions, ReadSettings
from qfast.workflow.dataset import DataInput
from qfast.workflow.user_code import AllowCode

__all__ = ["bench"]


def bench(
    config: str | os.PathLike[str] | None = None,
    data: DataInput | None = None,
    models: Sequence[str] | None = None,
    *,
    sets: Sequence[str] = (),
    minutes: float = 3.0,
    threads: int | None = None,
    precision: str | None = None,
    output: str | os.PathLike[str] | None = None,
    allow_code: AllowCode = None,
    read_options: ReadSettings = None,
    notify: Callable[[str], object] | None = None,
) -> BenchResult:
    """Time an epoch of every model on the CPU, compared with Qlib if pyqlib is installed and with torch otherwise.

    Parameters
    ----------
    config : path, optional
        Workflow file, whose model is timed on its dataset. Default: all models with the settings of Qlib's Alpha158
        workflow files.
    data : path, DataFrame or Panel, optional
        Prices. Default: the data of the workflow, or without one the synthetic market of `qfast demo`.
    models : sequence of str, optional
        Names of models, see `qfast.benchmarks.cases.MODELS`. With `config` they run on its dataset.
    sets : sequence of str
        Changes of the workflow file, such as "task.model.kwargs.hidden_size=128".
    minutes : float
        Time to plan for all models, without reading the data. Slow models may take longer: each side runs at least two
        times.
    threads : int, optional
        Threads of the second figure of qfast. Default: torch.get_num_threads(). 1: none.
    precision : {"float32", "bf16", "bf16-if-available"}, optional
        Precision of qfast's products (docs/precision.md). Default: that of the workflow, or float32. The reference
        computes in float32.
    output : path, optional
        The JSON file. The picture is written next to it, as .png. Default: bench-<UTC time>.json.
    allow_code, read_options
        As for `qfast.run`.
    notify : callable, optional
        Receives a line of text before each model.

    Returns
    -------
    BenchResult
        `lines()` is the report.

    Raises
    ------
    ConfigError, DataError
        Wrong arguments, or data that cannot be read or has too few samples.
    BackendError
        precision is "bf16" and the CPU lacks the instructions.

    Examples
    --------
    >>> import tempfile
    >>> from qfast.workflow.demo import demo_prices
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     result = bench(None, demo_prices(20, 120), ["LSTM"], minutes=0.01, threads=1, output=f"{folder}/b.json")
    >>> result.models[0].name, result.models[0].reference_name in ("Qlib", "torch's layers")
    ('LSTM', True)
    """
    started = time.perf_counter()
    count = torch.get_num_threads() if threads is None else threads
    if not 0 < minutes < float("inf") or count < 1:
        raise ConfigError(f"--minutes must be positive and --threads at least 1, got {minutes} and {threads}.")
    if precision is not None:
        available_products(precision, torch.device("cpu"))  # raises before the data is read
    target, picture = _targets(output)
    options = ReadOptions.of(read_options)
    if config is None:
        if sets:
            raise ConfigError(f"--set {sets[0]!r} needs a workflow file.")
        subject = default_subject(models, data, options)
    else:
        subject = workflow_subject(config, models, data, sets, options, allow_code)
    facts = {**subject.facts(), "load_seconds": round(time.perf_counter() - started, 2)}
    watch = Watch()
    watch.probe()
    results = []
    for name, estimator in subject.estimators.items():
        if precision is not None:
            setattr(estimator, "precision", precision)  # noqa: B010 - mypy does not know the attributes of arguments
        if notify is not None:
            notify(f"timing {name}")
        results.append(measure(name, estimator, subject.dataset, 60 * minutes / len(subject.estimators), watch, count))
        watch.probe()
    result = BenchResult(results, facts, watch, time.perf_counter() - started, target, picture)
    result.write()
    return result


def _targets(output: str | os.PathLike[str] | None) -> tuple[Path, Path]:
    """The JSON file and the picture, which can be written."""
    now = datetime.datetime.now(datetime.timezone.utc)
    target = Path(f"bench-{now:%Y%m%d-%H%M%S}.json" if output is None else output).expanduser()
    if target.suffix != ".json":
        raise ConfigError(f"--output must end in .json, got {str(target)!r}.")
    picture = target.with_suffix(".png")
    for path in (target, picture):
        require_file_target(path, "--output")
    return target, picture
