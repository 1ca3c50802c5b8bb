"""Hostile and damaged inputs, which tests and tools/torture.py share: names, YAML, templates, changed files."""

from __future__ import annotations

import json
import random

__all__ = [
    "HOSTILE_NAMES",
    "HOSTILE_TEMPLATES",
    "HOSTILE_YAML",
    "REPLACEMENTS",
    "damaged_versions",
    "json_versions",
]

# Names that matplotlib, HTML or a file system would interpret.
HOSTILE_NAMES = ["$x_{$", "$\\frac{$", "a$b$c", "_hidden", "{body}", "<script>", "50% & $5", "\\$"]

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9)
)
HOSTILE_YAML = {  # name -> (text, pattern of the error)
    "alias bomb": (BOMB, r"line \d+: with aliases replaced, this value contains \d+ values"),
    "deep": ("x: " + "{a: " * 500 + "1" + "}" * 500, r"line 1: values are nested more than 64 levels deep"),
    "deep blocks": ("\n".join(" " * i + "a:" for i in range(500)), r"nested more than 64 levels deep"),
    "long integer": ("task: {}\nx: " + "9" * 5000, r"line 2: '9+\.\.\. is not valid \(Exceeds the limit"),
    "zone": ("task: {}\nx: 2020-01-01T00:00:00+99:99", r"line 2: '2020-01-01T00:00:00\+99:99' is not valid"),
    "surrogate": ('task: {}\nexperiment_name: "\\ud800"', r"line 2: '\\ud800' has a character that no file can have"),
    "NUL": ('task: {}\nexperiment_name: "a\\0b"', r"line 2: 'a\\x00b' has a character that no file can have"),
    "surrogate key": ('{task: {}, "\\udfff": 1}', r"line 1: '\\udfff' has a character"),
    "control character": ("task: {}\nx: a\x01b", r"not YAML: unacceptable character #x0001"),
    "itself": ("task: &t {a: *t}", r"contains itself"),
}
HOSTILE_TEMPLATES = {  # name -> (text, pattern of the error)
    "power": ("{{ 9**(9**9) }}", r"needs more than 1 seconds or"),
    "nested loops": (
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        r"needs more than 1 seconds or",
    ),
    "memory": ("{{ 'a' * 20000000000 }}", r"needs more than 1024 MiB of memory"),
    "recursion": ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", r"does not render: .*recursion"),
    "size": ("{% for i in range(99999) %}{{ 'a' * 99 }}{% endfor %}", r"renders to more than \d+ characters"),
    "deep": ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", r"does not render: it is nested too deeply"),
    "syntax": ("{% if %}", r"template error on line 1"),
    "sandbox": ("{{ ''.__class__.__mro__ }}{{ 1 + 1 }}", r"does not render: .*unsafe"),
}

REPLACEMENTS = [b"", b"null", b"[]", b"{}", b'{"format": 1}', b"[" * 5000, b"\xff\xfe\x00", b"\x80\x04x", b"9" * 5000]


def damaged_versions(content: bytes, seed: int) -> list[bytes]:
    """Truncated, flipped and exchanged contents of a file."""
    generator = random.Random(seed)
    cut = [content[: generator.randrange(len(content))] for _ in range(3)]
    flipped = []
    for _ in range(6):
        version = bytearray(content)
        version[generator.randrange(len(version))] ^= 1 << generator.randrange(8)
        flipped.append(bytes(version))
    return [*cut, *flipped, *REPLACEMENTS]


def json_versions(text: str) -> list[bytes]:
    """A JSON file without one of its entries, or with an entry of another type."""
    content = json.loads(text)
    versions = []
    for key in content:
        versions.append({name: value for name, value in content.items() if name != key})
        versions += [{**content, key: value} for value in (None, 7, "x", [1], {"a": 1})]
        if isinstance(content[key], dict):
            versions += [{**content, key: {**content[key], inner: [None]}} for inner in content[key]]
    return [json.dumps(version).encode() for version in versions]
