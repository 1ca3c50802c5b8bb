"""Prove that the short version of tools/torture.py detects faults: plant each of three, and run the part for it.

    python tools/torture_plants.py [--minutes 3] [--seed 0] [NAME...]

`wrong-kernel` changes one value of the results of an operator by a thousandth, for some sizes. `write-without-rename`
writes checkpoints and all other files in place. `unsafe-yaml` reads YAML with a loader that executes tags. The faults
are planted in the running processes; no file changes. The exit status is 0 if every planted fault is detected.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
SCRIPT = Path(__file__).resolve().with_name("torture.py")


def detects(name: str, part: str, minutes: float, seed: int) -> bool:
    """Run one part with a planted fault. True if it reports a fault, which is printed."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(SCRIPT), "--parts", part, "--minutes", str(minutes), "--seed", str(seed)]
        command += ["--plant", name, "--until-fault", "--output", folder]
        done = subprocess.run(command, capture_output=True, text=True)
        report = Path(folder, "report.json")
        if not report.exists():
            print(f"{name}: torture.py failed\n{done.stdout}{done.stderr}")
            return False
        result = json.loads(report.read_text())["parts"][part]
    seconds, faults = time.monotonic() - started, result["faults"]
    if not faults:
        print(f"{name}: NOT detected by {result['cases']} cases of {part} in {seconds:.0f} s")
        return False
    reason = [line for line in faults[0]["message"].splitlines() if line.strip()][-1]
    print(f"{name}: detected by case {faults[0]['number']} of {part} in {seconds:.0f} s: {reason[:300]}")
    return True


def main() -> int:
    """Plant every requested fault in turn."""
    from torture.plants import PLANTS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(PLANTS)}; default: all")
    parser.add_argument("--minutes", type=float, default=3.0, help="time of torture.py")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    unknown = set(options.names) - set(PLANTS)
    if unknown:
        parser.error(f"there is no {sorted(unknown)}; allowed: {', '.join(PLANTS)}")
    names = options.names or list(PLANTS)
    detected = [detects(name, PLANTS[name].part, options.minutes, options.seed) for name in names]
    return not all(detected)


if __name__ == "__main__":
    raise SystemExit(main())
