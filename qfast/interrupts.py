"""SIGINT and SIGTERM end a run of the command line, even if Python discards the exception of the signal handler."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

__all__ = ["raise_discarded", "raised_as_keyboard_interrupt"]

_received = False


@contextlib.contextmanager
def raised_as_keyboard_interrupt() -> Iterator[None]:
    """Raise KeyboardInterrupt on SIGINT and SIGTERM inside the block.

    Outside the main thread the block changes nothing, because Python allows signal handlers only there. A signal that
    the process ignores, for example SIGINT under nohup, stays ignored.

    Examples
    --------
    >>> import os, signal
    >>> with raised_as_keyboard_interrupt():
    ...     try:
    ...         os.kill(os.getpid(), signal.SIGTERM)
    ...     except KeyboardInterrupt:
    ...         print("interrupted")
    interrupted
    """
    global _received
    _received = False
    before = {}
    with contextlib.suppress(ValueError):
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, _raise)
    try:
        yield
    finally:
        _received = False
        for number, handler in before.items():
            signal.signal(number, handler)


def raise_discarded() -> None:
    """Raise KeyboardInterrupt if a signal arrived and its exception was discarded.

    Python prints and discards an exception in a finalizer or in a callback of a weak reference. A run interrupted there
    would continue, so its training loop calls this function after each epoch.

    Raises
    ------
    KeyboardInterrupt
    """
    if _received:
        raise KeyboardInterrupt


def _raise(number: int, frame: FrameType | None) -> None:
    global _received
    _received = True
    raise KeyboardInterrupt
