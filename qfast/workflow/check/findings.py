"""The findings of a check, one line each."""

from __future__ import annotations

import logging
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from qfast.errors import QfastError

__all__ = ["CheckReport", "Finding"]

log = logging.getLogger("qfast")


@dataclass(frozen=True)
class Finding:
    """One result of a check. `level` is "ok", "note", "warning" or "error"."""

    level: str
    topic: str
    text: str


@dataclass
class CheckReport:
    """All findings of a check, in the order in which they were made.

    Examples
    --------
    >>> report = CheckReport()
    >>> report.add("ok", "segments", "no overlap")
    >>> with report.attempt("data"):
    ...     raise QfastError("prices.csv: no column 'close'.")
    >>> report.ok, report.lines()
    (False, ['ok      segments  no overlap', "error   data      prices.csv: no column 'close'."])
    """

    findings: list[Finding] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """True if no finding is an error."""
        return all(finding.level != "error" for finding in self.findings)

    def add(self, level: str, topic: str, text: str) -> None:
        """Append a finding."""
        self.findings.append(Finding(level, topic, text))

    def attempt(self, topic: str, prefix: str = "", reraise: tuple[type[Exception], ...] = ()) -> _Attempt:
        """Context manager that turns an exception of its block into an error finding, so the check continues.

        Parameters
        ----------
        topic : str
            Topic of the finding.
        prefix : str
            Text before the message of the exception.
        reraise : tuple of exception classes
            Exceptions of these classes are not caught.
        """
        return _Attempt(self, topic, prefix, reraise)

    def lines(self) -> list[str]:
        """The findings as lines of text, in columns: level, topic, text."""
        width = max((len(finding.topic) for finding in self.findings), default=0)
        return [f"{f.level:<8}{f.topic:<{width + 2}}{f.text}" for f in self.findings]


@dataclass(frozen=True)
class _Attempt:
    report: CheckReport
    topic: str
    prefix: str
    reraise: tuple[type[Exception], ...]

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if not isinstance(error, Exception) or isinstance(error, self.reraise):
            return False
        if isinstance(error, QfastError):  # its message is complete
            self.report.add("error", self.topic, f"{self.prefix}{error}")
            return True
        log.debug("check: %s failed", self.topic, exc_info=error)
        frame = traceback.extract_tb(trace)[-1]
        self.report.add(
            "error",
            self.topic,
            f"{self.prefix}{type(error).__name__}: {error} (raised by {frame.name}, {Path(frame.filename).name} line "
            f"{frame.lineno})",
        )
        return True
