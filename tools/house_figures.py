"""Print the readability figures of the project, with the goal next to each.

    python tools/house_figures.py            # a minute: counts files, functions, docstrings, checks and hops
    python tools/house_figures.py --build    # also compiles the C++ library and measures the CPU time of each unit

The counts come from the sources. The hops come from `tools/call_chains.py`, which needs a compiled qfast. The docstring
of each function defines the figure that it computes.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import call_chains  # noqa: E402 - the project's root must be on the path first

Row = tuple[str, str, str]  # measure, figure, goal
LONGEST_FUNCTION = 60  # lines, docstring excluded


def python_files(*folders: str) -> list[Path]:
    """The Python files below the folders."""
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def native_files(*suffixes: str) -> list[Path]:
    """The files below csrc with one of the suffixes."""
    return [path for suffix in suffixes for path in sorted((ROOT / "csrc").rglob(f"*{suffix}"))]


def functions_of(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """The functions and methods that a Python file defines, including nested ones."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node


def arguments_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[ast.arg]:
    """All arguments of a function, including *args and **kwargs."""
    arguments = function.args
    variable = [argument for argument in (arguments.vararg, arguments.kwarg) if argument is not None]
    return [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, *variable]


# ---------------------------------------------------------------- hops
def hops_of_operators() -> Row:
    """Hops from the public function of each operator to its CPU kernel, and the files they visit."""
    chains = call_chains.operator_chains()
    counts = {name: (len(hops) - 1, len({hop.file for hop in hops})) for name, hops in chains.items()}
    text = ", ".join(f"{name} {hops} ({files})" for name, (hops, files) in counts.items())
    return "Hops (files) from an operator call to its CPU kernel", text, "3 (4); attention and recurrent 4"


def hops_of_fit() -> Row:
    """Hops from `fit` to the kernel that gathers a training batch, and the files they visit."""
    hops = call_chains.fit_chain()
    text = f"{len(hops) - 1} ({len({hop.file for hop in hops})})"
    return "Hops (files) from model.fit to the gather kernel", text, "at most 8 (5)"


def files_to_touch() -> Row:
    """Files that docs/developing.md lists for a new operator and for a new model, one per numbered item."""
    text = (ROOT / "docs" / "developing.md").read_text()
    counts = [
        len(re.findall(r"^\d+\. ", section, re.MULTILINE))
        for title in ("Add an operator", "Add a model")
        for section in re.findall(rf"^## {title}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    ]
    return "Files to touch for a new operator / a new model", " / ".join(map(str, counts)), "6 / 4"


# ---------------------------------------------------------------- sizes
def largest_files() -> Row:
    """Lines of the longest file of each kind."""
    kinds = {
        "Python": python_files("qfast", "tools"),
        "C++": native_files(".cpp", ".h"),
        "CUDA": native_files(".cu", ".cuh"),
        "test": python_files("tests"),
    }
    longest = []
    for kind, paths in kinds.items():
        lines, path = max((len(path.read_text().splitlines()), path) for path in paths)
        longest.append(f"{kind} {lines} ({path.name})")
    return "Largest file", ", ".join(longest), "split by subject"


def python_length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its docstring."""
    lines = (function.end_lineno or function.lineno) - function.lineno + 1
    first = function.body[0]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        lines -= (first.end_lineno or first.lineno) - first.lineno + 1
    return lines


def native_lengths(paths: list[Path]) -> list[tuple[int, str]]:
    """Lines of every function body in C++ or CUDA sources, with the name of the function."""
    lengths = []
    for path in paths:
        text = call_chains.without_comments(path.read_text())
        for match in call_chains.DEFINITION.finditer(text):
            body = call_chains.enclosed(text, match.end() - 1)
            lengths.append((match[0].count("\n") + body.count("\n") + 1, f"{path.name}: {match[1]}"))
    return lengths


def long_functions() -> Row:
    """Functions of more than `LONGEST_FUNCTION` lines."""
    python = [python_length(f) for path in python_files("qfast", "tools", "bench", "tests") for f in functions_of(path)]
    cpp = [lines for lines, _ in native_lengths(native_files(".cpp", ".h"))]
    cuda = [lines for lines, _ in native_lengths(native_files(".cu", ".cuh"))]
    kinds = {"Python": python, "C++": cpp, "CUDA": cuda}
    text = ", ".join(
        f"{kind} {sum(lines > LONGEST_FUNCTION for lines in all_lines)} (longest {max(all_lines)})"
        for kind, all_lines in kinds.items()
    )
    return f"Functions over {LONGEST_FUNCTION} lines", text, "0"


# ---------------------------------------------------------------- docstrings and messages
def operator_docstrings() -> Row:
    """Public functions of qfast.ops whose docstring gives shapes, the section Raises, and the section Source."""
    from qfast import ops

    documents = [
        inspect.getdoc(getattr(ops, name)) or "" for name in ops.__all__ if inspect.isfunction(getattr(ops, name))
    ]
    shapes = sum(bool(re.search(r"\[[A-Z][\w', *+-]*\]|\(\w, |any shape", text)) for text in documents)
    raises, source = (sum(f"{title}\n---" in text for text in documents) for title in ("Raises", "Source"))
    text = f"{shapes} / {raises} / {source} of {len(documents)}"
    return "Public operators that document shapes / Raises / source", text, "all"


def documented_methods() -> Row:
    """Share of the public methods in qfast that have a docstring."""
    total = documented = 0
    for path in python_files("qfast"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ClassDef) or node.name.startswith("_"):
                continue
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and not method.name.startswith("_"):
                    total += 1
                    documented += ast.get_docstring(method) is not None
    return "Public methods with a docstring", f"{100 * documented / total:.0f}% of {total}", "100%"


def is_text(node: ast.expr) -> bool:
    """Whether an expression is a string or an f-string."""
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def python_checks() -> tuple[int, int]:
    """Number of errors raised with a message, and the number of these messages that show a value."""
    total = shown = 0
    for path in python_files("qfast"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args):
                continue
            message = node.exc.args[0]
            if not any(is_text(part) for part in ast.walk(message) if isinstance(part, ast.expr)):
                continue  # a message that was composed elsewhere
            total += 1
            shown += any(not isinstance(part, ast.Constant) for part in ast.walk(message) if isinstance(part, ast.Name))
    return total, shown


def split_arguments(text: str) -> list[str]:
    """The arguments of a C++ call, split at the commas that no bracket or string literal contains."""
    parts, depth = [""], 0
    for token in re.findall(r'"(?:[^"\\\\]|\\\\.)*"|.', text, re.DOTALL):
        depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(token, 0)
        if token == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += token
    return [part.strip() for part in parts]


def native_checks() -> tuple[int, int]:
    """Number of QFAST_CHECKs, and the number whose message contains a value other than a name."""
    total = shown = 0
    for path in native_files(".cpp", ".h", ".cu", ".cuh"):
        text = call_chains.without_comments(path.read_text())
        for match in re.finditer(r"(?<!#define )\bQFAST_CHECK(?=\()", text):
            call = call_chains.enclosed(text, match.end())
            _, *message = split_arguments(call[1:-1])
            values = [part for part in message if not part.startswith('"') and part not in NAMES_OF_THINGS]
            total += 1
            shown += bool(values)
    return total, shown


NAMES_OF_THINGS = ("op", "name", "operation", "where")


def informative_checks() -> Row:
    """Share of the checks that show the offending value."""
    python_total, python_shown = python_checks()
    native_total, native_shown = native_checks()
    text = (
        f"Python {100 * python_shown / python_total:.0f}% of {python_total}, "
        f"C++ {100 * native_shown / native_total:.0f}% of {native_total}"
    )
    return "Checks that show the offending value", text, "100%"


# ---------------------------------------------------------------- types and layout of the code
def any_arguments() -> Row:
    """Arguments of functions in qfast annotated `Any`; also how many are called `dataset` or `handler`."""
    names = [
        argument.arg
        for path in python_files("qfast")
        for function in functions_of(path)
        for argument in arguments_of(function)
        if argument.annotation is not None and ast.unparse(argument.annotation) == "Any"
    ]
    text = f"{len(names)}, of which dataset {names.count('dataset')} and handler {names.count('handler')}"
    return "Arguments typed Any", text, "under 150"


ASSIGNMENT = r"[\w.>\-\[\]*()]+ [-+*/|&]?= "
COMMA_JOINED = re.compile(rf"^(?:if \(.*\) |else )?{ASSIGNMENT}[^;{{}}]*, {ASSIGNMENT}[^;]*;$")


def dense_code() -> Row:
    """`# fmt: skip` in Python, and statements in csrc that a comma joins to the next one."""
    skip = re.compile(r"\S  # fmt: skip$", re.MULTILINE)
    skips = sum(len(skip.findall(path.read_text())) for path in python_files("qfast", "tests", "bench", "tools"))
    joined = sum(
        bool(COMMA_JOINED.match(line.strip()))
        for path in native_files(".cpp", ".h", ".cu", ".cuh")
        for line in path.read_text().splitlines()
    )
    return "`# fmt: skip` / comma-joined statements in csrc", f"{skips} / {joined}", "under 10 / 0"


def imports_from_tests() -> Row:
    """Imports of one test module by another, or by a tool or a benchmark."""
    pattern = re.compile(r"^\s*(?:from|import) test_\w+", re.MULTILINE)
    count = sum(len(pattern.findall(path.read_text())) for path in python_files("tests", "bench", "tools"))
    return "Imports from test_* modules", str(count), "0"


# ---------------------------------------------------------------- build
def build(environment: dict[str, str], folder: Path) -> list[tuple[float, str]]:
    """Build the C++ library in `folder`. Returns CPU seconds and name of each compiled unit, slowest first."""
    before = set((folder / "build").rglob("*.seconds"))
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    subprocess.run(command, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)
    written = sorted(set((folder / "times").glob("*.seconds")) - before)
    return sorted(((float(path.read_text()), path.stem) for path in written), reverse=True)


COMPILER = """#!{python}
import pathlib, resource, subprocess, sys
status = subprocess.run(["c++", *sys.argv[1:]]).returncode
if "-c" in sys.argv:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    name = pathlib.Path(sys.argv[sys.argv.index("-o") + 1]).stem
    pathlib.Path({times!r}, name + ".seconds").write_text(str(usage.ru_utime + usage.ru_stime))
sys.exit(status)
"""


def build_times() -> list[Row]:
    """CPU seconds of a full build, of its slowest unit, and of the build after an edit to a kernel header."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        times = folder / "times"
        times.mkdir()
        for name in ("setup.py", "pyproject.toml", "README.md", "csrc", "qfast"):
            subprocess.run(["cp", "-r", str(ROOT / name), str(folder)], check=True)
        subprocess.run("rm -rf qfast/*.so build", shell=True, cwd=folder, check=True)
        compiler = folder / "c++"
        compiler.write_text(COMPILER.format(python=sys.executable, times=str(times)))
        compiler.chmod(0o755)
        environment = {**os.environ, "CXX": str(compiler), "QFAST_CUDA": "0", "QFAST_NATIVE": "1"}
        full = build(environment, folder)
        for path in times.iterdir():
            path.unlink()
        header = folder / "csrc" / "recurrent" / "recurrent_kernels.h"
        header.write_text(header.read_text() + "\n")
        again = build(environment, folder)
    total = sum(seconds for seconds, _ in full)
    slowest, unit = full[0]
    units = ", ".join(f"{name} {seconds:.0f}" for seconds, name in again)
    return [
        ("CPU time of a full C++ build / slowest unit", f"{total:.0f} s / {slowest:.0f} s ({unit})", "240 s / 45 s"),
        ("CPU time to recompile after an edit of recurrent_kernels.h", f"{units} s", "its own units, 45 s each"),
    ]


FIGURES: tuple[Callable[[], Row], ...] = (
    hops_of_operators,
    hops_of_fit,
    files_to_touch,
    largest_files,
    long_functions,
    operator_docstrings,
    documented_methods,
    informative_checks,
    any_arguments,
    dense_code,
    imports_from_tests,
)


def computed(figure: Callable[[], Row]) -> Row:
    """The row of a figure, or the reason why it could not be computed."""
    try:
        return figure()
    except (ImportError, LookupError) as error:
        return figure.__name__, f"not measured: {error}", ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", action="store_true", help="measure the compile times too (about five minutes)")
    rows = [computed(figure) for figure in FIGURES]
    rows += build_times() if parser.parse_args().build else []
    print("| Measure | Figure | Goal |\n|---|---|---|")
    for row in rows:
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
