"""Was the machine idle enough for the figures? Probes before and after, CPU time against wall time, and load."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field

from qfast.benchmarks.rates import copy_rate, product_rate

__all__ = ["Watch"]

MOVED = 0.10  # largest accepted change of a rate during the run
SHARE = 0.90  # smallest accepted share of a core that the process received while it worked
LOAD = 0.5  # largest accepted load per core before the run


@dataclass
class Watch:
    """Observes the machine during a run.

    Attributes
    ----------
    products, copies : list of float
        Rates of every probe, see `qfast.benchmarks.rates`.
    load : float or None
        Load average of the last minute when the watch started. None if the system has none.
    cpu, wall : float
        Seconds of the sections that one thread worked without a pause.

    Examples
    --------
    >>> watch = Watch(load=0.0)
    >>> watch.products += [1e9, 1.3e9]
    >>> watch.reasons()
    ['the rate of matrix products changed by 30% between probes (limit 10%)']
    """

    products: list[float] = field(default_factory=list)
    copies: list[float] = field(default_factory=list)
    load: float | None = field(default_factory=lambda: _load())
    cpu: float = 0.0
    wall: float = 0.0

    def probe(self) -> None:
        """Measure both rates."""
        self.products.append(product_rate())
        self.copies.append(copy_rate())

    def add(self, cpu: float, wall: float) -> None:
        """Add a section of one thread."""
        self.cpu += cpu
        self.wall += wall

    @property
    def share(self) -> float:
        """Share of a core that the process received."""
        return self.cpu / self.wall if self.wall else 1.0

    def reasons(self) -> list[str]:
        """Why the figures should not be trusted. Empty on an idle machine."""
        out = []
        if self.share < SHARE:
            out.append(f"this process received {self.share:.0%} of a core while it worked (limit {SHARE:.0%})")
        for title, rates in (("matrix products", self.products), ("copies", self.copies)):
            moved = max(rates) / min(rates) - 1 if rates else 0.0
            if moved > MOVED:
                out.append(f"the rate of {title} changed by {moved:.0%} between probes (limit {MOVED:.0%})")
        cores = os.cpu_count() or 1
        if self.load is not None and self.load > LOAD * cores:
            out.append(f"the load was {self.load:.1f} on {cores} cores before the run (limit {LOAD * cores:.1f})")
        return out


def _load() -> float | None:
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):  # Windows
        return None


def stopwatch() -> tuple[float, float]:
    """CPU and wall seconds now."""
    return time.process_time(), time.perf_counter()
