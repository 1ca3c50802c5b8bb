"""Try to break qfast with random cases: killed processes, random operator calls, hostile files, threads, many calls.

    python tools/torture.py --minutes 3 [--parts kills,operators,files,threads,memory] [--seed 0] [--jobs 2]
    python tools/torture.py --replay FILE       # run the case of a reproduction file again

`kills` ends training, resumes, pre-training, studies, data-parallel training and cache writes with SIGKILL, SIGTERM and
SIGINT at random and at chosen moments, continues them, and compares the results bit by bit. `operators` calls all
operators with random sizes, dtypes, strides, dropout, function transforms, wrong arguments and tampered saved tensors,
and compares with definitions in float64. `files` passes hostile YAML, checkpoints, run folders, stores, tables,
expressions and names to the commands. `threads` compares results over threads, thread counts, processes and interrupts.
`memory` calls each entry point thousands of times and measures the growth of the process.

Case N of a part depends only on the seed and N, so a longer run contains the cases of a shorter one. The folder of the
report contains report.txt, report.json and one reproduction file per fault. The exit status is 1 if there is a fault or
if a part has run no case. docs/reliability.md contains the figures of a long run.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
NAMES = ("kills", "operators", "files", "threads", "memory")
START_SHARE = 0.85  # of the time for cases; the rest is for the start and the end of workers


def arguments(words: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=3.0, help="time of the whole command")
    parser.add_argument("--parts", default=",".join(NAMES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="parts that run at the same time")
    parser.add_argument("--output", type=Path, help="folder of the report; default: a temporary one")
    parser.add_argument("--replay", type=Path, metavar="FILE", help="run the case of this reproduction file")
    parser.add_argument("--until-fault", action="store_true", help="stop each part at its first fault")
    parser.add_argument("--sanitized", action="store_true", help="the library is built by tools/sanitize.sh")
    parser.add_argument("--plant", help="a fault to plant, see tools/torture_plants.py")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--channel", type=int, help=argparse.SUPPRESS)
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> int:
    """Run the requested parts, write the report and return the exit status."""
    from torture import harness, report
    from torture.parts import PARTS

    options = arguments(words)
    if options.worker is not None:
        harness.work(harness.Job(**json.loads(options.worker)), options.channel)
        return 0
    if options.replay is not None:
        result = harness.replay(options.replay, options.sanitized)
        for fault in result.faults:
            print(fault["message"])
        print(f"{options.replay}: {'the fault is still there' if result.faults else 'no fault'}")
        return bool(result.faults)
    names = options.parts.split(",")
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        raise SystemExit(f"--parts: there is no part {unknown}; allowed: {', '.join(NAMES)}")
    end = time.monotonic() + 60 * options.minutes

    def run_lane(lane: list[tuple[str, float]]) -> list[harness.PartResult]:
        results, total = [], sum(seconds for _, seconds in lane)
        for name, seconds in lane:
            left = end - time.monotonic()
            budget = START_SHARE * left * seconds / total if left > 0 else 0.0
            total -= seconds
            job = harness.Job(name, options.seed, seconds=budget, plant=options.plant, sanitized=options.sanitized)
            results.append(harness.run_part(job, PARTS[name].seconds, options.until_fault))
        return results

    lanes = harness.split_time(names, 60 * options.minutes, options.jobs)
    with ThreadPoolExecutor(len(lanes)) as pool:
        results = [result for lane in pool.map(run_lane, lanes) for result in lane]
    results.sort(key=lambda result: names.index(result.part))
    folder = options.output or Path(tempfile.mkdtemp(prefix="torture-report-"))
    command = shlex.join(["python", "tools/torture.py", *(sys.argv[1:] if words is None else words)])
    print(report.write_report(folder, command, options.seed, options.plant, results), end="")
    print(f"report: {folder}")
    idle = [result.part for result in results if not result.counts[PARTS[result.part].unit] and not result.faults]
    if idle:
        print(f"no case has finished in {', '.join(idle)}. Remedy: more --minutes.")
    return bool(idle or any(result.faults for result in results))


if __name__ == "__main__":
    raise SystemExit(main())
