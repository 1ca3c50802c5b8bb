"""Operators of qfast: one module each, with its plain-torch twin, fake, backward and registration."""

from qfast.ops.window_gather import WindowIndex, build_window_index, gather_windows, window_rows

__all__ = ["WindowIndex", "build_window_index", "gather_windows", "window_rows"]
