"""The worker process of the local engine: reads tasks from stdin and writes outcomes to stdout, as lines of JSON.

The worker ends at once when stdin is closed, which the operating system does when the study's process dies. All output
of a run, including that of native code, is written to the log file of the task.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import signal
import sys
import threading
from pathlib import Path
from types import FrameType

from qfast.studies.tasks import RunTask, execute

__all__ = ["main"]

EXIT_ALONE = 3  # the study's process has died
EXIT_INTERRUPTED = 130


def main() -> int:
    """Execute tasks until the empty line, and return the exit status."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a run prints must not mix with the answers
    signal.signal(signal.SIGTERM, _interrupted)
    logger = logging.getLogger("qfast")
    logger.setLevel(logging.INFO)
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    logger.addHandler(handler)
    lines: queue.Queue[str] = queue.Queue()
    threading.Thread(target=_read, args=(lines,), daemon=True).start()
    try:
        while line := lines.get().strip():
            task = RunTask(**json.loads(line))
            _write_output_to(Path(task.log))
            sys.argv = _command(task)
            answers.write(json.dumps(vars(execute(task))) + "\n")
            answers.flush()
    except KeyboardInterrupt:  # the run has recorded it
        return EXIT_INTERRUPTED
    return 0


def _read(lines: queue.Queue[str]) -> None:
    """Pass on the lines of stdin, and end the process when stdin is closed."""
    for line in sys.stdin:
        lines.put(line)
        if not line.strip():
            return
    os._exit(EXIT_ALONE)


def _interrupted(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _write_output_to(file: Path) -> None:
    """Append stdout and stderr of this process to a file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.close(handle)


def _command(task: RunTask) -> list[str]:
    """The command that repeats the run alone, for its manifest."""
    words = ["qfast", "run", task.config, "--seed", str(task.seed)]
    words += ["--data", task.data] if task.data is not None else []
    words += ["--device", task.device] if task.device is not None else []
    words += ["--init-from", task.init_from] if task.init_from is not None else []
    return [*words, *(word for path in task.allow_code for word in ("--allow-code", path))]


if __name__ == "__main__":
    sys.exit(main())
