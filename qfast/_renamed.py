"""Module paths of earlier releases, which keep working for one release with a DeprecationWarning.

To move a module, add one row to `RENAMED_MODULES` and one to the table in CHANGELOG.md. Imports of the old path, of its
submodules and of names from it then return the objects of the new module, also when a pickle refers to them.

A renamed function or class needs no row here. Add to its module

    __getattr__ = renamed_names(__name__, {"old_name": "package.module.new_name"})
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

__all__ = ["RENAMED_MODULES", "install", "renamed_names"]

RENAMED_MODULES = {
    "qfast.arguments": "qfast.training.arguments",
    "qfast.attention": "qfast.models.attention",
    "qfast.callbacks": "qfast.training.callbacks",
    "qfast.checkpoint": "qfast.training.checkpoint",
    "qfast.data.operators": "qfast.data.expression_functions",
    "qfast.estimator": "qfast.training.estimator",
    "qfast.losses": "qfast.training.losses",
    "qfast.ops.encoder_twin": "qfast.ops.encoder_layer_twin",
    "qfast.ops.recurrent_cells": "qfast.ops.recurrent_twin",
    "qfast.optim": "qfast.training.optim",
    "qfast.pretrain": "qfast.models.pretrained",
    "qfast.step_graphs": "qfast.training.step_graphs",
    "qfast.workflow.experiments": "qfast.workflow.check",
    "qfast.workflow.findings": "qfast.workflow.check.findings",
    "qfast.workflow.history": "qfast.workflow.lookback",
    "qfast.workflow.scoring": "qfast.workflow.predict",
}


class _RenamedModules:  # importlib.abc's base classes would cost half the time of `import qfast`
    """Finds old module paths after every regular finder has failed, and loads the new module in their place."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        new = RENAMED_MODULES.get(fullname)
        if new is None:
            return None
        _warn(fullname, new, stacklevel=3)
        return ModuleSpec(fullname, self)  # type: ignore[arg-type]  # has what a loader needs

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return None  # the import system creates it

    def exec_module(self, module: ModuleType) -> None:
        # The import system returns whatever sys.modules contains after this call.
        sys.modules[module.__name__] = importlib.import_module(RENAMED_MODULES[module.__name__])


def _warn(old: str, new: str, stacklevel: int) -> None:
    message = f"{old} has been renamed to {new}; the old name will be removed in the next release."
    warnings.warn(message, DeprecationWarning, stacklevel=stacklevel)


def renamed_module(old: str, stacklevel: int) -> ModuleType:
    """Return the module that replaces an old path, with a DeprecationWarning at this level of the call stack."""
    new = RENAMED_MODULES[old]
    _warn(old, new, stacklevel + 1)
    return importlib.import_module(new)


def install() -> None:
    """Make `import` accept the old module paths. Calling it again has no effect."""
    if not any(isinstance(finder, _RenamedModules) for finder in sys.meta_path):
        sys.meta_path.append(_RenamedModules())


def renamed_names(module: str, renamed: Mapping[str, str]) -> Callable[[str], object]:
    """Return a module-level `__getattr__` that resolves old names with a DeprecationWarning.

    Parameters
    ----------
    module : str
        The module that had the names, `__name__`.
    renamed : dict
        Old name -> dotted path of the object, for example "qfast.training.optim.ClippedAdam".
    """

    def __getattr__(name: str) -> object:
        path = renamed.get(name)
        if path is None:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        _warn(f"{module}.{name}", path, stacklevel=3)
        owner, _, attribute = path.rpartition(".")
        return getattr(importlib.import_module(owner), attribute)

    return __getattr__
