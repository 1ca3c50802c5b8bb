"""The parts of tools/torture.py: random, seeded cases that try to break qfast."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
for folder in (ROOT, ROOT / "tests"):  # tests/support contains generators that tests and this tool share
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
