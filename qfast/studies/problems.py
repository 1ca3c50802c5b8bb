"""A list of problems, which one error reports together."""

from __future__ import annotations

from qfast.errors import ConfigError

__all__ = ["Problems"]


class Problems:
    """Problems of a study that are known before anything runs.

    Examples
    --------
    >>> problems = Problems()
    >>> problems.add("--seeds", "the seed 1 occurs 2 times")
    >>> problems.check()
    Traceback (most recent call last):
    ...
    qfast.errors.ConfigError: the study has 1 problem.
      --seeds: the seed 1 occurs 2 times.
    """

    def __init__(self) -> None:
        self.items: list[tuple[str, str]] = []

    def add(self, place: str, text: str) -> None:
        """Add a problem of an option or key. `check` adds a missing full stop."""
        if (place, text) not in self.items:
            self.items.append((place, text))

    def check(self) -> None:
        """Raise a ConfigError that lists all problems, if there are any."""
        if not self.items:
            return
        count = "1 problem" if len(self.items) == 1 else f"{len(self.items)} problems"
        lines = [f"  {place}: {text if text.endswith(('.', '?')) else f'{text}.'}" for place, text in self.items]
        raise ConfigError("\n".join([f"the study has {count}.", *lines]))
