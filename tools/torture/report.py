"""The report of a run of tools/torture.py: text, JSON, and one reproduction file per fault."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torture.harness import PartResult


def machine() -> dict[str, Any]:
    """What determines the results: versions, instruction sets and cores."""
    import numpy
    import torch

    from qfast import _backend

    model = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return {
        "cpu": model[0] if model else platform.processor(),
        "cores": os.cpu_count(),
        "isa": None if _backend.native is None else _backend.native.isa(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
    }


def _lines(file: str) -> list[str]:
    try:
        return Path(file).read_text().splitlines()
    except OSError:
        return []


def write_report(folder: Path, command: str, seed: int, plant: str | None, results: Sequence[PartResult]) -> str:
    """Write report.json, report.txt and the reproduction files, and return the text."""
    folder.mkdir(parents=True, exist_ok=True)
    parts, lines = {}, [f"{command} (seed {seed})", ", ".join(f"{k} {v}" for k, v in machine().items()), ""]
    for result in results:
        files = [_reproduction(folder, seed, plant, result.part, fault) for fault in result.faults]
        counts = dict(sorted(result.counts.items()))
        parts[result.part] = {
            "cases": result.cases,
            "seconds": round(result.seconds, 1),
            "counts": counts,
            "faults": [{"file": str(file), **fault} for file, fault in zip(files, result.faults, strict=True)],
        }
        lines.append(f"{result.part}: {result.cases:,} cases in {result.seconds:.0f} s, {len(files)} faults")
        lines += [f"    {name}: {count:,}" for name, count in counts.items()]
        for file, fault in zip(files, result.faults, strict=True):
            lines.append(
                f"    FAULT {_last_line(fault['message'])}\n        again: python tools/torture.py --replay {file}"
            )
    text = "\n".join(lines) + "\n"
    content = {"command": command, "seed": seed, "machine": machine(), "parts": parts}
    (folder / "report.json").write_text(json.dumps(content, indent=1) + "\n")
    (folder / "report.txt").write_text(text)
    return text


def _reproduction(folder: Path, seed: int, plant: str | None, part: str, fault: dict[str, Any]) -> Path:
    file = folder / f"{part}-{fault['number']}.json"
    content = {"part": part, "seed": seed, **fault} | ({"plant": plant} if plant else {})
    file.write_text(json.dumps(content, indent=1) + "\n")
    return file


def _last_line(message: str) -> str:
    lines = [line for line in message.splitlines() if line.strip()]
    return lines[-1] if lines else "no message"
