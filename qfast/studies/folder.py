"""The study folder: what the study is, its runs, and its results.

study.json        status, axes, source of the data, versions
workflow.yaml     the resolved workflow
workflows/        one resolved workflow file for each combination of values and rolling window
runs/NNN/         ordinary run folders
logs/NNN.txt      the output of each run
table.csv         one row for each run
prepared/         the data of all runs, while the study is running
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shlex
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qfast.errors import ConfigError
from qfast.files import locked, sweep
from qfast.studies.axes import Axes
from qfast.workflow.config import dump_yaml, load_config
from qfast.workflow.folder import (
    FAILED,
    FINISHED,
    INTERRUPTED,
    MANIFEST,
    RUNNING,
    RunFolder,
    environment,
    new_content,
    new_default,
    new_folder,
    now,
)
from qfast.workflow.overrides import AliasGroups
from qfast.workflow.saved_facts import RESTORE
from qfast.workflow.user_code import option_text

__all__ = ["StudyFolder"]

log = logging.getLogger("qfast")

STUDY, WORKFLOW = "study.json", "workflow.yaml"
RUNS, WORKFLOWS, LOGS, PREPARED = "runs", "workflows", "logs", "prepared"
FORMAT = 1


class StudyFolder(RunFolder):
    """The files of one study. Writing and the manifest work as in a run folder.

    Attributes
    ----------
    path : Path
    manifest : dict
        The content of `study.json`.
    """

    @classmethod
    def begin(cls, output: str | os.PathLike[str] | None, workflow: Mapping[str, Any], **fields: Any) -> StudyFolder:
        """Create the folder of a new study.

        Parameters
        ----------
        output : path or None
            A new or empty folder. None: studies/<experiment>-<UTC time>.
        workflow : mapping
            The resolved workflow.
        **fields
            Entries of the manifest.

        Raises
        ------
        ConfigError
            `output` contains files; if it contains a study, the message recommends to resume it.
        """
        target = None if output is None else Path(output)
        if target is not None and (target / STUDY).is_file():
            raise ConfigError(
                f"--output {str(output)!r} contains a study. Remedy: --resume {shlex.quote(str(output))} to continue "
                "it, or another folder."
            )
        experiment = str(workflow.get("experiment_name", "workflow"))
        try:
            path = new_default(experiment, "studies") if target is None else new_folder(target)
        except OSError as error:
            raise ConfigError(
                f"the study folder {str(target or 'studies')!r} cannot be created: {error.strerror}."
            ) from None
        folder = cls(path, {"format": FORMAT, "kind": "study", "experiment": experiment, "started": now()})
        with new_content(path, (WORKFLOW, STUDY)):
            folder.write_text(WORKFLOW, dump_yaml(workflow))
            folder.update(**{"status": RUNNING, "error": None, **fields, **environment()})
        return folder

    @classmethod
    def reopen(cls, path: str | os.PathLike[str]) -> StudyFolder:
        """Open an existing study.

        Raises
        ------
        ConfigError
            The folder does not contain a study.
        """
        file = Path(path) / STUDY
        if not file.is_file():
            what = "contains a run, not a study" if (Path(path) / MANIFEST).is_file() else f"has no {STUDY}"
            raise ConfigError(
                f"--resume {str(path)!r} is not the folder of a study: it {what}. Remedy: a folder that 'qfast study' "
                "has written."
            )
        try:
            manifest = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError(f"{str(file)!r} cannot be read: {error}. {RESTORE}") from None
        if not isinstance(manifest, dict) or not all(isinstance(manifest.get(key), dict) for key in ("axes", "data")):
            raise ConfigError(f"{str(file)!r} is not the manifest of a study. {RESTORE}")
        return cls(Path(path), manifest)

    def update(self, **fields: object) -> None:
        """Set entries of the manifest and write it."""
        self.manifest.update(fields)
        self.write_json(STUDY, self.manifest)

    @property
    def axes(self) -> Axes:
        """The axes of the study."""
        return Axes.of(self.manifest["axes"])

    @property
    def aliases(self) -> AliasGroups:
        """Groups of keys that are aliases of one anchor in the workflow file."""
        return [[tuple(path) for path in group] for group in self.manifest["aliases"]]

    def workflow(self) -> dict[str, Any]:
        """The resolved workflow."""
        return load_config(self.path / WORKFLOW).values

    def write_workflow(self, name: str, values: Mapping[str, Any]) -> Path:
        """Write the workflow of a point and window, and return its absolute path. An existing file remains."""
        file = self.path.resolve() / WORKFLOWS / f"{name}.yaml"
        file.parent.mkdir(exist_ok=True)
        if not file.exists():
            self.write_text(f"{WORKFLOWS}/{file.name}", dump_yaml(values))
        return file

    def run(self, number: int) -> Path:
        """Folder of a run."""
        return self.path / RUNS / f"{number:03d}"

    def log_file(self, number: int) -> Path:
        """File with the output of a run."""
        return self.path / LOGS / f"{number:03d}.txt"

    def resume_hint(self) -> str:
        """How to resume the study."""
        if self.manifest["data"].get("given") == "memory":
            return f"resume with: qfast.study(resume={str(self.path)!r}, data=...) and the same data"
        option = option_text(self.manifest)
        return f"resume with: qfast study --resume {shlex.quote(str(self.path))}" + (f" {option}" if option else "")

    def finish(self, status: str, error: str | None = None) -> None:
        """Record the end of the study."""
        self.update(status=status, error=error, ended=now())

    @contextlib.contextmanager
    def working(self) -> Iterator[Path]:
        """Lock the folder, record the outcome of the block, and yield a folder for prepared data that is removed.

        Raises
        ------
        ConfigError
            Another process works on the study.
        """
        with locked(self.path, "study"):
            prepared = self.path / PREPARED
            shutil.rmtree(prepared, ignore_errors=True)
            _sweep_own(self.path)
            self.update(status=RUNNING, error=None)
            try:
                yield prepared
                self.finish(FINISHED)
            except KeyboardInterrupt:
                self.finish(INTERRUPTED, "interrupted")
                log.warning("interrupted; %s", self.resume_hint())
                raise
            except BaseException as error:
                self.finish(FAILED, f"{type(error).__name__}: {error}")
                raise
            finally:
                shutil.rmtree(prepared, ignore_errors=True)


def _sweep_own(path: Path) -> None:
    """Remove temporary files of a killed study, but not those of runs, which a dying worker may still write."""
    for entry in path.iterdir():
        if entry.is_dir() and entry.name != RUNS:
            sweep(entry)
