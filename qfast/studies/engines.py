"""Engines execute the runs of a study. The study itself does not know which one it uses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from qfast.studies.tasks import Outcome, RunTask, execute

__all__ = ["Engine", "InlineEngine"]


class Engine(Protocol):
    """Executes tasks at the same time, and reports how each one ends.

    A context manager: leaving it stops all tasks that are still running. Their runs can be continued later.
    """

    @property
    def slots(self) -> int:
        """Number of tasks that run at the same time."""

    def submit(self, task: RunTask) -> None:
        """Begin a task. The caller has at most `slots` tasks running."""

    def wait(self) -> Sequence[Outcome]:
        """Wait until at least one task has ended. A task whose process or node has died has the status "lost"."""

    def close(self) -> None:
        """Stop all tasks and release everything."""


class InlineEngine:
    """Executes each task at once in the calling process, for debugging and for tests.

    Examples
    --------
    >>> InlineEngine().slots
    1
    """

    slots = 1

    def __init__(self) -> None:
        self._outcomes: list[Outcome] = []

    def submit(self, task: RunTask) -> None:
        """Execute the task before returning."""
        self._outcomes.append(execute(task))

    def wait(self) -> Sequence[Outcome]:
        """The outcomes since the last call."""
        outcomes, self._outcomes = self._outcomes, []
        return outcomes

    def close(self) -> None:
        """Do nothing, because no task is running."""
