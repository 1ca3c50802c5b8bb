"""What a check finds, line by line."""

from __future__ import annotations

import contextlib
import logging
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from qfast.errors import QfastError

__all__ = ["CheckReport", "Finding"]

log = logging.getLogger("qfast")


@dataclass(frozen=True)
class Finding:
    """One thing found. `level` is "ok", "note", "warning" or "error"."""

    level: str
    topic: str
    text: str


@dataclass
class CheckReport:
    """All findings of a check."""

    findings: list[Finding] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """True if nothing was found that must be mended."""
        return all(finding.level != "error" for finding in self.findings)

    def add(self, level: str, topic: str, text: str) -> None:
        """Append a finding."""
        self.findings.append(Finding(level, topic, text))

    @contextlib.contextmanager
    def attempt(self, topic: str, said: str = "", goes_on: tuple[type[Exception], ...] = ()) -> Iterator[None]:
        """Make an error of the block a finding that begins with `said`, so that the other parts are still reported.

        Errors of the kinds `goes_on` are raised all the same.
        """
        try:
            yield
        except goes_on:
            raise
        except QfastError as error:  # its message says what and where
            self.add("error", topic, f"{said}{error}")
        except Exception as error:
            log.debug("check: %s broke off", topic, exc_info=True)
            place = traceback.extract_tb(error.__traceback__)[-1]
            self.add(
                "error", topic,
                f"{said}{type(error).__name__}: {error} (raised by {place.name}, {Path(place.filename).name} line "
                f"{place.lineno})",
            )  # fmt: skip

    def lines(self) -> list[str]:
        """The findings as lines of text."""
        wide = max((len(f.topic) for f in self.findings), default=0)
        return [f"{f.level:<8}{f.topic:<{wide + 2}}{f.text}" for f in self.findings]
