"""qfast: the deep models of Qlib's zoo, the same numbers, faster.

The index of the package:

    qfast.models, qfast.models.ts   estimators (fit, predict) and the networks under them
    qfast.data                      panels, datasets, handlers, processors, sources, synthetic markets
    qfast.training                  the training loop, callbacks, losses, optimizer and checkpoints
    qfast.ops                       the operators: C++ and CUDA kernels with plain-torch twins
    qfast.metrics                   information coefficients per day
    qfast.workflow                  YAML workflows: run, predict, report (command line: `qfast --help`)
    qfast.errors                    every error raised on purpose
"""

from importlib.metadata import PackageNotFoundError, version

from qfast import _renamed

_renamed.install()

try:
    __version__ = version("qfast-models")
except PackageNotFoundError:  # imported from a source tree that was never installed
    __version__ = "0+unknown"

__all__ = ["__version__"]
