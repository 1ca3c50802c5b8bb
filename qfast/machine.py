"""The cores and the memory that this process may use, and how much of the memory is available."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

__all__ = ["available_memory", "may_keep", "usable_cores", "usable_memory"]

MEMINFO = Path("/proc/meminfo")
CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")
OWN_PAGES = Path("/proc/self/statm")
ALWAYS_KEPT = 16 << 20  # bytes of a buffer that is small on any machine
KEPT_SHARE = 8  # a larger buffer may take this part of the available memory


def usable_cores() -> int:
    """Return the number of cores on which this process may run.

    >>> usable_cores() >= 1
    True
    """
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def usable_memory() -> int:
    """Return the memory limit of this process in bytes: the least of RAM, control groups and `ulimit -v`.

    >>> usable_memory() > 0
    True
    """
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return 16 << 30  # a platform that does not report its memory
    for file in _limit_files():
        with contextlib.suppress(OSError, ValueError):  # no such limit, or "max"
            total = min(total, int(file.read_text()))
    limit = _address_limit()
    return total if limit is None else min(total, limit)


def available_memory() -> int:
    """Return the bytes that this process can still allocate within RAM, control groups and `ulimit -v`.

    The file cache counts as available, because the system can reclaim it.

    >>> 0 <= available_memory() <= usable_memory()
    True
    """
    available = usable_memory()
    with contextlib.suppress(OSError, ValueError, KeyError):  # not Linux
        available = min(available, 1024 * _numbers(MEMINFO)["MemAvailable:"])
    for file in _limit_files():
        version2 = file.name == "memory.max"
        used = file.with_name("memory.current" if version2 else "memory.usage_in_bytes")
        files = "inactive_file" if version2 else "total_inactive_file"
        with contextlib.suppress(OSError, ValueError, KeyError):
            reclaimable = _numbers(file.with_name("memory.stat"))[files]
            available = min(available, int(file.read_text()) - int(used.read_text()) + reclaimable)
    limit = _address_limit()
    if limit is not None:
        with contextlib.suppress(OSError, ValueError):
            pages = int(OWN_PAGES.read_text().split()[0])
            available = min(available, limit - pages * os.sysconf("SC_PAGE_SIZE"))
    return max(0, available)


def may_keep(n_bytes: int, threads: int, reusable: int = 0) -> bool:
    """Return whether a buffer that saves time, but is not necessary, leaves enough memory for everything else.

    The share of a process in the available memory is that of its threads in the cores. This leaves memory for a process
    on every core. A buffer may take an eighth of this share. Buffers of at most 16 MiB may always be kept.

    Parameters
    ----------
    n_bytes : int
        Size of the buffer.
    threads : int
        Threads of this process.
    reusable : int
        Bytes that this process has and does not use.

    Examples
    --------
    >>> may_keep(1 << 20, threads=1), may_keep(1 << 60, threads=1)
    (True, False)
    """
    if n_bytes <= ALWAYS_KEPT:
        return True
    share = min(1.0, threads / usable_cores())
    return n_bytes <= (available_memory() + reusable) * share / KEPT_SHARE


def _numbers(file: Path) -> dict[str, int]:
    """Return the numbers of a file with lines such as `name 12` or `name: 12 kB`."""
    words = (line.split() for line in file.read_text().splitlines())
    return {name: int(number) for name, number, *_ in words}


def _address_limit() -> int | None:
    """Return the limit of `ulimit -v` in bytes, or None without one."""
    try:
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    except (ImportError, OSError, ValueError):  # not a POSIX system
        return None
    return None if limit == resource.RLIM_INFINITY else limit


def _limit_files() -> Iterator[Path]:
    """Files that may contain a limit of memory: of the control group of this process and of all groups above it."""
    try:
        lines = OWN_CGROUPS.read_text().splitlines()
    except OSError:
        lines = []
    groups = {"": "/", "memory": "/"}  # of version 2, and of the controller "memory" of version 1
    groups |= {controllers: path for _, controllers, path in (line.split(":", 2) for line in lines)}
    for folder, path, name in (
        (CGROUPS, groups[""], "memory.max"),
        (CGROUPS / "memory", groups["memory"], "memory.limit_in_bytes"),
    ):
        own = folder / path.lstrip("/")  # containers may report the path on the host, which does not exist here
        yield from (group / name for group in (own, *own.parents) if group.is_relative_to(folder))
