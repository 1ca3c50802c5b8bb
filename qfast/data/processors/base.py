"""What a processor is, and how lists of them are built and run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias, cast

import numpy as np

from qfast.data.panel import Panel
from qfast.dates import DateLike
from qfast.errors import ConfigError, DataError
from qfast.registry import PROCESSORS, parameters


class Workspace:
    """Whose blocks a run of processors may overwrite, and which it did.

    Attributes
    ----------
    owned : set of str
        Groups whose current block nobody else sees.
    overwritten : set of str
        Groups whose original block was written over.
    """

    def __init__(self, owned: Iterable[str] = ()) -> None:
        self.owned = set(owned)
        self.overwritten: set[str] = set()


class LearnOnlyProcessorError(ConfigError, TypeError):
    """A processor that drops rows by their label stands where inference data is made."""


class Processor:
    """One step on a panel: `fit` learns from live rows, calling it gives a new panel.

    Subclasses implement `_apply(panel, space)`; the workspace says which blocks may be overwritten,
    because nobody else sees them. `target` answers with the array to write to.
    """

    def fit(self, panel: Panel) -> None:
        """Learn what the step needs from the live rows of `panel`; nothing by default."""

    def __call__(self, panel: Panel) -> Panel:
        """The processed panel; `panel` and its blocks stay as they are."""
        return self._apply(panel, Workspace())

    def run(self, panel: Panel, space: Workspace) -> Panel:
        """As calling, but blocks that `space` owns may be overwritten; new blocks become its own."""
        before = {group: block.values for group, block in panel.blocks.items()}
        after = self._apply(panel, space)
        space.owned.update(g for g, block in after.blocks.items() if block.values is not before.get(g))
        return after

    frozen = False  # True once a saved state is loaded: `fit` is then no longer called

    def state(self) -> dict[str, np.ndarray]:
        """What `fit` has learnt, as named arrays that a file can hold; empty for a step that learns nothing."""
        return {}

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Take over what `state` gave, and never fit again."""
        if state:
            raise DataError(f"{type(self).__name__} learns nothing, but a saved state holds {sorted(state)}.")
        self.frozen = True

    def is_for_infer(self) -> bool:
        """False for a step that only makes sense where labels are known."""
        return True

    def readonly(self) -> bool:
        """True if the step never changes values in place (the reference's question)."""
        return True

    def config(self, **kwargs: DateLike | None) -> None:
        """Replace `fit_start_time` / `fit_end_time` where the processor has them."""
        for name, value in kwargs.items():
            if name not in ("fit_start_time", "fit_end_time"):
                raise ConfigError(f"{type(self).__name__}.config has no setting {name!r}.")
            if hasattr(self, name):
                setattr(self, name, value)

    def __repr__(self) -> str:
        public = {
            k: v for k, v in vars(self).items() if not k.startswith("_") and not isinstance(v, (dict, np.ndarray))
        }
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in public.items())})"

    def _apply(self, panel: Panel, space: Workspace) -> Panel:
        raise NotImplementedError(f"{type(self).__name__} must implement _apply(panel, space)")


ProcessorSpec: TypeAlias = Processor | Mapping[str, Any] | str
"""A processor, {"class": name, "kwargs": {...}} or a class name."""


# ---------------------------------------------------------------- building and running lists of processors
def build_processor(
    spec: ProcessorSpec,
    fit_start_time: DateLike | None = None,
    fit_end_time: DateLike | None = None,
    *,
    path: str = "",
    inject: bool = True,
) -> Processor:
    """A processor from an instance, a mapping or a name; the caller's mapping stays as it is.

    Parameters
    ----------
    spec : Processor, mapping or str
        ``{"class": "Fillna", "kwargs": {"fields_group": "feature"}}``, "Fillna", or an instance.
    fit_start_time, fit_end_time : date-like or None
        Handed to a processor that takes both, unless its own kwargs give them (the reference
        overwrites the caller's values in that case).
    path : str
        Where the specification stands, for messages.
    inject : bool
        False: the specification must give its own fit window.

    Raises
    ------
    ConfigError
        Unknown class or argument; a processor that needs a fit window and has none.

    Examples
    --------
    >>> build_processor({"class": "Fillna", "kwargs": {"fill_value": 1}})
    Fillna(fields_group=None, fill_value=1)
    """
    if PROCESSORS.is_instance(spec):
        return cast(Processor, spec)
    factory, kwargs = PROCESSORS.resolve(spec, path)
    if inject and {"fit_start_time", "fit_end_time"} <= parameters(factory).keys():
        kwargs = {"fit_start_time": fit_start_time, "fit_end_time": fit_end_time, **kwargs}
        missing = [k for k in ("fit_start_time", "fit_end_time") if kwargs[k] is None]
        if missing:
            raise ConfigError(
                f"{path + ': ' if path else ''}{getattr(factory, '__name__', factory)} needs {' and '.join(missing)}. "
                "Remedy: give fit_start_time and fit_end_time to the handler or to the processor."
            )
    return PROCESSORS.build({"class": factory, "kwargs": kwargs}, path=path)


def run_processors(
    panel: Panel, processors: Sequence[Processor], *, stage: str, space: Workspace, fit: bool = True
) -> Panel:
    """Fit and apply processors one after the other; each is fitted on its predecessor's result.

    Parameters
    ----------
    panel : Panel
    processors : sequence of Processor
    stage : {"shared", "infer", "learn"}
        Learn-only processors are refused elsewhere.
    space : Workspace
        What may be overwritten; on return also owns the blocks that this stage made.
    fit : bool
        False applies without fitting.

    Raises
    ------
    LearnOnlyProcessorError
        A learn-only processor in the shared or infer stage (also a TypeError, as in the reference).
    """
    for number, processor in enumerate(processors):
        name = f"{stage}_processors[{number}]"
        if stage != "learn" and not processor.is_for_infer():
            raise LearnOnlyProcessorError(
                f"{name} is {type(processor).__name__}, which looks at labels and is for learning only. "
                "Remedy: move it to learn_processors."
            )
        if fit and not processor.frozen:
            processor.fit(panel)
        had_rows = panel.n_live
        panel = processor.run(panel, space)
        if had_rows and not panel.n_live:
            raise DataError(f"{name} ({processor!r}) dropped all {had_rows} rows: no row is without NaN.")
    return panel
