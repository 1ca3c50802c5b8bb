"""Cores and memory of this machine, and whether an optional buffer fits."""

from __future__ import annotations

import os

import pytest

from qfast import machine
from qfast.machine import available_memory, may_keep, usable_cores, usable_memory

GB = 1 << 30


@pytest.fixture
def files(monkeypatch, tmp_path):
    """A machine with 64 GB of which 40 GB are available, in files, and a process without limits."""
    monkeypatch.setattr(machine, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(machine, "CGROUPS", tmp_path / "groups")
    monkeypatch.setattr(machine, "OWN_CGROUPS", tmp_path / "own")
    monkeypatch.setattr(machine, "_address_limit", lambda: None)
    monkeypatch.setattr(os, "sysconf", {"SC_PHYS_PAGES": 16 << 20, "SC_PAGE_SIZE": 4096}.__getitem__)
    (tmp_path / "meminfo").write_text(f"MemTotal: {64 << 20} kB\nMemAvailable:  {40 << 20} kB\nHugePages_Total:  0\n")
    (tmp_path / "own").write_text("0::/job\n")
    return tmp_path


def test_memory_of_the_machine(files, monkeypatch):
    assert usable_memory() == 64 * GB
    assert available_memory() == 40 * GB
    monkeypatch.setattr(machine, "_address_limit", lambda: 3 * GB)
    monkeypatch.setattr(machine, "OWN_PAGES", files / "statm")
    (files / "statm").write_text(f"{GB // 4096} 1 2\n")
    assert available_memory() == 2 * GB
    (files / "statm").write_text(f"{4 * GB // 4096} 1 2\n")
    assert available_memory() == 0


@pytest.mark.parametrize(
    ("folder", "limit", "used", "reclaimable"),
    [
        ("job", "memory.max", "memory.current", "inactive_file"),
        ("", "memory.max", "memory.current", "inactive_file"),
        ("memory/job", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ],
)
def test_memory_of_a_control_group(files, folder, limit, used, reclaimable):
    (files / "own").write_text("4:memory:/job\n0::/job\n")
    group = files / "groups" / folder
    group.mkdir(parents=True)
    (group / limit).write_text(f"{8 * GB}\n")
    assert available_memory() == 8 * GB  # the use is not known
    (group / used).write_text(f"{7 * GB}\n")
    (group / "memory.stat").write_text(f"anon 5\n{reclaimable} {2 * GB}\n")
    assert available_memory() == 3 * GB
    (group / limit).write_text("max\n")
    assert available_memory() == 40 * GB


def test_other_platforms(files):
    (files / "meminfo").unlink()
    assert available_memory() == 64 * GB


def test_optional_buffers(files, monkeypatch):
    monkeypatch.setattr(machine, "usable_cores", lambda: 4)
    assert may_keep(16 << 20, threads=1)
    assert may_keep(5 * GB, threads=4)
    assert not may_keep(5 * GB + 1, threads=4)
    assert may_keep(5 * GB + 1, threads=4, reusable=8)
    assert not may_keep(5 * GB, threads=2)
    assert may_keep(5 * GB, threads=9)
    assert not may_keep(5 * GB + 1, threads=9)


def test_this_machine():
    assert 1 <= usable_cores() <= (os.cpu_count() or 1)
    assert 0 < available_memory() < usable_memory()
