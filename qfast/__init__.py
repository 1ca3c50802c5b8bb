"""Drop-in replacements for Qlib's deep stock models: the same results in less time.

Check a workflow file, train its model, and score new prices:

    from qfast import check, predict, run

    print("\\n".join(check("workflow.yaml", data="prices.parquet").lines()))
    result = run("workflow.yaml", data="prices.parquet")
    scores = predict(result.path, data="newest_prices.parquet", date="latest")

Or build the parts yourself. Constructors, `fit` and `predict` are Qlib's:

    from qfast.data import Alpha360, DatasetH
    from qfast.models import LSTM

    handler = Alpha360(data="prices.parquet", fit_start_time="2018-01-01", fit_end_time="2021-12-31")
    dataset = DatasetH(handler, {"train": ("2018-01-01", "2021-12-31"), "test": ("2022-01-01", None)})
    model = LSTM(n_epochs=20)
    model.fit(dataset)
    scores = model.predict(dataset, "test")

Names of this module
    run, RunResult          train the model of a workflow file; the result
    study, StudyResult      many runs of a workflow as one job: seeds, grids, searches, rolling windows; the result
    compare_runs            the run folders below a folder as one table
    check, CheckReport      look for problems in a workflow and its data without training; the findings
    predict                 score new data with a finished run
    load, SavedRun          a finished run: model with weights, fitted processors, configuration
    register_model          let workflow files name a model class of your own
    export_artifacts        write the tables of a run as the pickles of Qlib's recorder
    Callback                base class for code that runs during training
    QfastError              base class of every error that qfast raises

Modules
    qfast.models            the seven models with Qlib's defaults for flat samples (Alpha360)
    qfast.models.ts         the same models with Qlib's defaults for rolling windows (Alpha158)
    qfast.training          the training loop, callbacks, losses, the optimizer, checkpoints
    qfast.nn                the networks, (B, T, F) -> (B,)
    qfast.data              handlers, datasets, processors, price sources, panels, synthetic markets
    qfast.data.factors      factors from expressions, and registration of your own expression functions
    qfast.metrics           information coefficients and long-short returns by day
    qfast.backtest          portfolio simulation on scores
    qfast.ops               the operators: C++ and CUDA kernels, each with a plain-torch version
    qfast.workflow          workflow files, run folders, reports
    qfast.studies           studies: axes, engines, tables, reports
    qfast.integrations.qlib run qfast's models inside Qlib
    qfast.doctor            versions, the implementation of each operator, self-tests
    qfast.errors            the error classes

`import qfast` loads none of them. Each name and module above is imported when it is first used. The command line is
`qfast --help`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from qfast import _renamed

if TYPE_CHECKING:
    from qfast.errors import QfastError
    from qfast.studies.study import StudyResult, study
    from qfast.training.callbacks import Callback
    from qfast.workflow.artifacts import export_artifacts
    from qfast.workflow.check import CheckReport, check
    from qfast.workflow.classes import register_model
    from qfast.workflow.predict import predict
    from qfast.workflow.run import RunResult, run
    from qfast.workflow.saved_run import SavedRun, load

    __version__: str

__all__ = [
    "Callback",
    "CheckReport",
    "QfastError",
    "RunResult",
    "SavedRun",
    "StudyResult",
    "__version__",
    "check",
    "export_artifacts",
    "load",
    "predict",
    "register_model",
    "run",
    "study",
]

_MODULE_OF = {
    "Callback": "qfast.training.callbacks",
    "CheckReport": "qfast.workflow.check",
    "QfastError": "qfast.errors",
    "RunResult": "qfast.workflow.run",
    "SavedRun": "qfast.workflow.saved_run",
    "StudyResult": "qfast.studies.study",
    "check": "qfast.workflow.check",
    "compare_runs": "qfast.studies.compare",
    "export_artifacts": "qfast.workflow.artifacts",
    "load": "qfast.workflow.saved_run",
    "predict": "qfast.workflow.predict",
    "register_model": "qfast.workflow.classes",
    "run": "qfast.workflow.run",
    "study": "qfast.studies.study",
}
_SUBMODULES = (
    "backtest",
    "data",
    "doctor",
    "errors",
    "integrations",
    "metrics",
    "models",
    "nn",
    "ops",
    "studies",
    "training",
    "workflow",
)

_renamed.install()


def __getattr__(name: str) -> object:
    if name in _SUBMODULES:
        return importlib.import_module(f"qfast.{name}")
    value: object
    if name in _MODULE_OF:
        value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    elif name == "__version__":
        value = _version()
    elif f"qfast.{name}" in _renamed.RENAMED_MODULES:
        value = _renamed.renamed_module(f"qfast.{name}", stacklevel=3)
    else:
        raise AttributeError(f"module 'qfast' has no attribute {name!r}; its names are {[*__all__, *_SUBMODULES]}")
    globals()[name] = value  # the next access does not call this function
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_SUBMODULES})


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("qfast-models")
    except PackageNotFoundError:  # imported from a source tree that was never installed
        return "0+unknown"
