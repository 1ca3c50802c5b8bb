"""docs/developing.md agrees with the code: the files it names exist, and the call chains it prints match a run."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path

import pytest

from qfast import _backend

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "developing.md").read_text()
FOLDERS = "qfast|csrc|tests|bench|tools|docs"


def named_paths() -> list[str]:
    """Paths in the text, with `<op>`, `<model>` and the like replaced by the worked example of their section."""
    examples = {"op": "window_gather", "model": "alstm", "isa": "avx2"}
    paths = re.findall(rf"(?<![\w/.])((?:{FOLDERS})/[\w/.<>*-]*[\w>*/])", TEXT)
    return sorted({re.sub(r"<(\w+)>", lambda match: examples[match[1]], path) for path in paths})


def printed_chain(title: str) -> list[tuple[str, str]]:
    """(function, file) of each line of the block under a title."""
    section = re.search(rf"^###? {re.escape(title)}\n(.*?)(?=^##|\Z)", TEXT, re.MULTILINE | re.DOTALL)
    assert section is not None, f"docs/developing.md has no section {title!r}"
    block = re.search(r"^```text\n(.*?)^```", section[1], re.MULTILINE | re.DOTALL)
    assert block is not None, f"section {title!r} has no block that starts with ```text"
    lines = [line.split() for line in block[1].splitlines() if line.strip()]
    return [(words[0], words[1]) for words in lines]


@pytest.fixture(scope="module")
def call_chains():
    spec = importlib.util.spec_from_file_location("call_chains", ROOT / "tools" / "call_chains.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def layers() -> list[str]:
    """The layers of qfast from the top down, in the order of the table in docs/developing.md."""
    rows = re.search(r"^\| folder or file \|.*?\n\n", TEXT, re.MULTILINE | re.DOTALL)
    assert rows is not None
    names = [name for row in rows[0].split("\n") if row for name in re.findall(r"`qfast/(\w+)", row.split("|")[1])]
    return names[: names.index("ops") + 1]


def imported_layers(path: Path) -> set[str]:
    """The parts of qfast that a file imports anywhere, also within functions."""
    modules: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "qfast":
            modules |= {f"qfast.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            modules.add(node.module)
    return {module.split(".")[1] for module in modules if module.startswith("qfast.")}


def test_a_layer_imports_only_the_layers_below_it():
    order = layers()
    assert order[0] == "cli"
    upward = [
        f"{path.relative_to(ROOT)} imports qfast.{other}"
        for path in sorted((ROOT / "qfast").rglob("*.py"))
        if (layer := path.relative_to(ROOT / "qfast").parts[0].removesuffix(".py")) in order
        for other in imported_layers(path) & set(order)
        if order.index(other) < order.index(layer)
    ]
    assert upward == []


def test_named_files_exist():
    paths = named_paths()
    assert len(paths) > 40
    assert [path for path in paths if not list(ROOT.glob(path))] == []


@pytest.mark.skipif(_backend.native is None, reason="the chains end in the C++ library, which is not built")
def test_the_fit_chain_is_that_of_a_run(call_chains):
    chain = call_chains.fit_chain()
    assert printed_chain("From `fit` to the gather kernel") == [tuple(hop) for hop in chain]
    assert len(chain) - 1 <= 8
    assert len({hop.file for hop in chain}) <= 5


@pytest.mark.skipif(_backend.native is None, reason="the chains end in the C++ library, which is not built")
def test_the_lstm_chain_is_that_of_a_call(call_chains):
    chain = call_chains.operator_chains()["lstm"]
    assert printed_chain("From an operator to its kernel") == [tuple(hop) for hop in chain]


@pytest.mark.skipif(_backend.native is None, reason="the chains end in the C++ library, which is not built")
def test_every_operator_reaches_its_kernel_in_four_hops(call_chains):
    hops = {name: len(chain) - 1 for name, chain in call_chains.operator_chains().items()}
    assert {name: count for name, count in hops.items() if count > 4} == {}
