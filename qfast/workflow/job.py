"""Everything that `run` decides before it writes a file: the checked workflow, the seed, the data, the model."""

from __future__ import annotations

import contextlib
import os
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qfast import registry
from qfast.errors import ConfigError
from qfast.read_options import ReadOptions
from qfast.training.callbacks import Callback
from qfast.training.origin import Origin
from qfast.workflow import pretraining, resumption, starting
from qfast.workflow.config import load_config
from qfast.workflow.dataset import DataInput, require_data, stored_read_options
from qfast.workflow.folder import LAST, RunFolder
from qfast.workflow.schema import Workflow
from qfast.workflow.validation import check_workflow

if TYPE_CHECKING:
    from qfast.training.estimator import Estimator
    from qfast.workflow.prepared import PreparedData

__all__ = ["Job", "prepare"]


@dataclass
class Job:
    """A checked workflow with its model, and the arguments of `run`.

    Attributes
    ----------
    workflow : Workflow
    model : Estimator
        Not fitted yet.
    source : str
        Path of the workflow file, for the manifest.
    data : path, DataFrame, Panel or None
        None: the workflow's own `provider_uri`.
    read_options : ReadOptions
    seed : int
    seed_drawn : bool
        True if neither the file nor the caller specified a seed.
    resumed : bool
    callbacks : sequence of Callback
    started : float
        Seconds since 1970.
    seconds : dict
        Stage -> wall time.
    facts : dict
        What the manifest records of the data; known once it is loaded.
    source_warnings : list of str
        What the readers have noticed about the data.
    prepared : PreparedData or None
        Data that has already been read and processed.
    origin : Origin or None
        The weights that the training starts from.
    """

    workflow: Workflow
    model: Estimator
    source: str
    data: DataInput | None
    read_options: ReadOptions
    seed: int
    seed_drawn: bool
    resumed: bool
    callbacks: Sequence[Callback] = ()
    started: float = field(default_factory=time.time)
    seconds: dict[str, float] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    source_warnings: list[str] = field(default_factory=list)
    prepared: PreparedData | None = None
    origin: Origin | None = None

    @contextlib.contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the wall time of the block to `seconds`."""
        began = time.perf_counter()
        yield
        self.seconds[stage] = round(self.seconds.get(stage, 0.0) + time.perf_counter() - began, 3)


def prepare(
    config_path: str | os.PathLike[str] | None,
    data: DataInput | None,
    sets: Sequence[str],
    device: str | None,
    seed: int | None,
    resumed: RunFolder | None,
    callbacks: Sequence[Callback],
    read_options: ReadOptions,
    init_from: str | os.PathLike[str] | None = None,
    progress: bool | str | None = None,
) -> Job:
    """Check the arguments of `run` and build the model. Nothing is written.

    Raises
    ------
    ConfigError
        A problem with the workflow, an argument, the folder to resume, or the path of the data.
    """
    if resumed is not None:
        file = resumption.config_of(resumed)
    elif config_path is not None:
        file = Path(config_path)
    else:
        raise ConfigError("no workflow file. Remedy: pass one, or --resume with a run folder.")
    if resumed is not None and init_from is not None:
        raise ConfigError(
            f"--init-from {str(init_from)!r} cannot be combined with --resume {str(resumed.path)!r}, which continues "
            "from the weights of that run. Remedy: pass only one of them."
        )
    workflow = _checked(file, sets, resumed is not None and (resumed / LAST).exists(), init_from)
    if resumed is not None:
        if config_path is not None:
            same = _checked(Path(config_path), sets, started=True)
            resumption.require_same_workflow(resumed, config_path, same, workflow)
        pretraining.require_same_block(resumed, load_config(file).values["task"], workflow.task.pretrain)
        read_options = read_options.over(stored_read_options(resumed.manifest))
    if data is None:
        recorded = resumption.recorded_data(file)
        data, read_options = recorded.data, read_options.over(recorded.read_options)
    kwargs = workflow.task.model.kwargs
    if device is not None:
        kwargs["device"] = device
    if seed is not None:
        kwargs["seed"] = seed
    _require_seed(kwargs.get("seed"))
    seed_drawn = kwargs.get("seed") is None
    if seed_drawn:  # it is recorded, so the run can be repeated
        kwargs["seed"] = random.SystemRandom().randrange(2**31)
    require_data(data, workflow)
    source = str(config_path) if config_path is not None else str(file)
    model = registry.MODELS.build(pretraining.without_lost_file(workflow.task.model.description()), path="task.model")
    if progress is not None:
        model.set_params(progress=progress)
    job = Job(workflow, model, source, data, read_options, kwargs["seed"], seed_drawn, resumed is not None, callbacks)
    job.origin = starting.starting_weights(workflow, model, resumed)
    return job


def _checked(
    file: Path, sets: Sequence[str], started: bool = False, init_from: str | os.PathLike[str] | None = None
) -> Workflow:
    """The checked workflow of a file; if training has `started`, the weights it started from may be deleted."""
    values = load_config(file, sets).values
    if init_from is not None and isinstance(values.get("task"), dict):
        values["task"][starting.KEY] = str(Path(init_from).expanduser().absolute())
    workflow = check_workflow(values, str(file))
    starting.absolute_origin(workflow, file, optional=started)
    pretraining.absolute_model_path(workflow.task.model, file, optional=started)
    resumption.locate_sources(workflow, file)
    return workflow


def _require_seed(seed: int | None) -> None:
    if seed is not None and not 0 <= seed < 2**32:  # the range of NumPy's generator
        raise ConfigError(f"the seed (--seed or task.model.kwargs.seed) must be from 0 to {2**32 - 1}, got {seed!r}.")
