"""The table of all parts."""

from __future__ import annotations

from torture import files, kills, memory, operators, threads
from torture.protocol import Part

PARTS: dict[str, Part] = {
    "kills": kills.PART,
    "operators": operators.PART,
    "files": files.PART,
    "threads": threads.PART,
    "memory": memory.PART,
}
