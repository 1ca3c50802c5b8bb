"""Helpers shared by several test files: frames, fits, stores, workflows, and the cases of each operator."""
