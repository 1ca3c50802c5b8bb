"""Hostile files: YAML, checkpoints, run folders, stores, tables, expressions and names.

Each ends in a result or in one line of error with exit status 2. Nothing in a file is executed, no damaged run folder
is changed by a command that only reads, and nothing is left half-written.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import pickle
import random
import shutil
import string
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qfast.cli import main
from qfast.data import factors as factor_module
from qfast.data import load_prices, synthetic
from qfast.errors import QfastError
from qfast.files import is_temporary
from qfast.workflow import plots, template
from support.hostile import (
    HOSTILE_NAMES,
    HOSTILE_TEMPLATES,
    HOSTILE_YAML,
    REPLACEMENTS,
    damaged_versions,
    json_versions,
)
from support.stores import write_store
from support.workflows import TEXT, factors
from torture.inputs import workflow_inputs
from torture.protocol import Case, Part, choose, require

CANARY = "CANARY"  # in hostile text, the path of a file that only executed code creates
RUN_FILES = ("manifest.json", "config.yaml", "model.json", "processors.safetensors", "best.safetensors")
EPOCH = ["--set", "task.model.kwargs.n_epochs=1"]
CODE = [
    "!!python/object/apply:os.system ['touch CANARY']",
    "!!python/object/apply:subprocess.check_output [[touch, CANARY]]",
    "!!python/object/new:os.system ['touch CANARY']",
    "!!python/object/apply:builtins.open ['CANARY', 'w']",
    "!<tag:yaml.org,2002:python/object/apply:os.system> ['touch CANARY']",
    "!!python/name:os.system ''",
    "{{ cycler.__init__.__globals__.os.system('touch CANARY') }}",
    "{{ self.__init__.__globals__.__builtins__.open('CANARY', 'w') }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
]
VALUES = ["null", "-1", "1e400", ".nan", "9" * 40, "[]", "{}", "'x'", "2020-13-45", "[[[]]]", "true", "'\\ud800'"]
CELLS = ["", "nan", "inf", "-inf", "1e400", "x", "9" * 400, "2020-01-01", "0x10", "١٢", '"', "=1+1", "\0", "1,5", "--1"]
LETTERS = string.ascii_letters + " $_{}<>&%\\'\"|*?:/.\n\t\0äß中\u202e\U0001f4c8"


def draw(rng: random.Random, number: int) -> Case:
    """A kind of file, and the seed of its content."""
    kinds = {"yaml": 5, "code": 3, "folder": 4, "pickle": 1, "store": 3, "table": 4, "expression": 3, "name": 1}
    return {"kind": choose(rng, kinds), "data": rng.randrange(2**32)}


def check(case: Case, folder: Path) -> Counter[str]:
    """Write a hostile file and pass it to a command."""
    _prepare()
    CHECKS[case["kind"]](random.Random(case["data"]), folder)
    executed = [str(file) for file in folder.rglob("*") if file.name == CANARY] + list(_executed())
    require(not executed, f"code of the file was executed: {executed}")
    return Counter({"files": 1, case["kind"]: 1})


# ---------------------------------------------------------------- surroundings
@cache
def _prepare() -> None:
    plots.png = lambda figure: b"not drawn"
    template.MOST_SECONDS = 1
    torch.set_num_threads(1)


@cache
def _finished() -> Path:
    """A finished run, which cases copy."""
    folder, config, data = workflow_inputs()
    words = ["run", str(config), "--data", str(data), "--output", str(folder / "run"), "-q", *EPOCH]
    require(_run(words)[0] == 0, "the undamaged run fails")
    return folder / "run"


def _executed() -> list[str]:
    """Files that code in a hostile file has created in the working directory."""
    files = list(Path.cwd().glob(CANARY))
    for file in files:
        file.unlink()
    return list(map(str, files))


def _run(words: list[str]) -> tuple[int, list[str]]:
    """Exit status of a command, and the lines that it has written to stderr. A report of `check` is a success."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(words)
    if words[0] == "check" and status == 1 and "error" in out.getvalue():
        status = 0
    return status, err.getvalue().splitlines()


def _require_explained(words: list[str]) -> int:
    """Run a command, which must succeed or end in a line of error with status 2."""
    status, lines = _run(words)
    errors = [line for line in lines if "WARNING" not in line]
    require(status in (0, 2), f"{words} ended with status {status}: {errors}")
    explained = status == 0 or any(line.startswith("qfast: ") for line in errors)
    require(explained, f"{words} ended with status 2 without an error: {errors}")
    require(not any("Traceback" in line for line in errors), f"{words} printed a traceback: {errors}")
    return status


def _require_clean(folder: Path) -> None:
    remains = [str(file) for file in folder.rglob("*") if is_temporary(file.name)]
    require(not remains, f"temporary files remain: {remains}")


def _contents(folder: Path) -> dict[str, str]:
    files = (file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


# ---------------------------------------------------------------- workflow files
def _replaced_value(text: str, value: str, rng: random.Random) -> str:
    """Replace the value of one `key: value` by another."""
    lines = text.splitlines()
    place = rng.choice([number for number, line in enumerate(lines) if ": " in line])
    key, _, _ = lines[place].partition(": ")
    lines[place] = f"{key}: {value}"
    return "\n".join(lines)


def _mangled(content: bytes, rng: random.Random) -> bytes:
    """Flip, delete, repeat or insert some bytes."""
    data = bytearray(content)
    for _ in range(rng.randint(1, 5)):
        at = rng.randrange(len(data) + 1)
        step = rng.randrange(4)
        if step == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif step == 1:
            del data[at : at + rng.randint(1, 30)]
        elif step == 2:
            data[at:at] = data[at : at + rng.randint(1, 30)] * rng.randint(1, 20)
        else:
            data[at:at] = rng.choice([b"\0", b"\xff", b"{{", b"&a ", b"*a", b"- ", b"\t", b"!!", b"{%", b"'", b"\n"])
    return bytes(data)


def _check_workflow(text: bytes, folder: Path, rng: random.Random) -> None:
    config = folder / "w.yaml"
    config.write_bytes(text)
    command = rng.choice(["check", "check", "run"])
    words = [command, str(config), "--data", str(workflow_inputs()[2])]
    words += ["--output", str(folder / "run"), "-q", *EPOCH] if command == "run" else []
    status = _require_explained(words)
    _require_clean(folder)
    if status == 2 and (folder / "run").exists():
        manifest = folder / "run" / "manifest.json"
        require(manifest.exists(), "a refused run has left a folder without a manifest")
        require(json.loads(manifest.read_text())["status"] != "running", "a run that has ended has status running")


def _yaml(rng: random.Random, folder: Path) -> None:
    """Hostile values and damaged text."""
    kind = rng.randrange(4)
    if kind == 0:
        text = rng.choice([text for text, _ in HOSTILE_YAML.values()]).encode()
    elif kind == 1:
        text = rng.choice([text for text, _ in HOSTILE_TEMPLATES.values()]).encode()
    elif kind == 2:
        text = _replaced_value(TEXT, rng.choice(VALUES), rng).encode()
    else:
        text = _mangled(TEXT.encode(), rng)
    _check_workflow(text, folder, rng)


def _code(rng: random.Random, folder: Path) -> None:
    """Text that a careless reader executes."""
    payload = rng.choice(CODE).replace(CANARY, str(folder / CANARY))
    _check_workflow(_replaced_value(TEXT, payload, rng).encode(), folder, rng)


# ---------------------------------------------------------------- run folders
def _folder(rng: random.Random, folder: Path) -> None:
    """A run folder with one damaged file."""
    path = shutil.copytree(_finished(), folder / "run")
    name = rng.choice([*RUN_FILES, "last.safetensors"])
    content = (path / name).read_bytes()
    versions = damaged_versions(content, rng.randrange(2**32))
    if name.endswith(".json"):
        versions += json_versions(content.decode())
    (path / name).write_bytes(rng.choice([*versions, _mangled(content, rng)]))
    before = _contents(path)
    commands = [["info", str(path)], ["predict", str(path), "-q", "--out", str(folder / "scores.csv")]]
    for words in commands:
        _require_explained(words)
    require(_contents(path) == before, "info or predict has changed the run folder")
    _require_explained(["run", "--resume", str(path), "-q", "--data", str(workflow_inputs()[2])])
    _require_clean(folder)


class _Executed:
    """Unpickling this object creates a file."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
        return open, (str(self._file), "w")


def _pickle(rng: random.Random, folder: Path) -> None:
    """Pickles in the places of weights and data."""
    path = shutil.copytree(_finished(), folder / "run")
    payload = pickle.dumps({"fc_out.weight": _Executed(folder / CANARY)}, protocol=rng.choice([2, 4, 5]))
    name = rng.choice(["best.safetensors", "last.safetensors", "processors.safetensors", "data.pkl", "weights.pkl"])
    if name == "data.pkl":
        (folder / name).write_bytes(payload)
        words = ["check", str(workflow_inputs()[1]), "--data", str(folder / name)]
    elif name == "weights.pkl":
        (folder / name).write_bytes(payload)
        words = ["check", str(workflow_inputs()[1]), "--data", str(workflow_inputs()[2])]
        words += ["--set", f"task.model.kwargs.model_path={folder / name}"]
    else:
        (path / name).write_bytes(payload)
        words = ["predict", str(path), "-q", "--out", str(folder / "scores.csv")]
    _require_explained(words)


# ---------------------------------------------------------------- data
def _store(rng: random.Random, folder: Path) -> None:
    """A Qlib store with one damaged file or hostile name."""
    root = write_store(folder / "store", n_days=80)
    files = sorted(file for file in root.rglob("*") if file.is_file())
    file = rng.choice(files)
    kind = rng.randrange(4)
    if kind == 0:
        file.write_bytes(_mangled(file.read_bytes(), rng))
    elif kind == 1:
        file.write_bytes(rng.choice(damaged_versions(file.read_bytes(), rng.randrange(2**32))))
    elif kind == 2:
        line = "\t".join(
            [rng.choice(["../../x", "/etc/passwd", "a\\..\\b", *HOSTILE_NAMES]), "2020-01-01", "2020-03-01"]
        )
        (root / "instruments" / "all.txt").write_text(line + "\n")
    else:
        start, count = rng.choice([-1.0, 0.5, 1e9, float("nan"), 79.0]), rng.choice([0, 1, 79, 500])
        np.full(count + 1, start, "<f4").tofile(root / "features" / "aaa" / "close.day.bin")
    with contextlib.suppress(QfastError):
        load_prices(root, instruments=rng.choice(["all", "mixed"]))


def _table(rng: random.Random, folder: Path) -> None:
    """A table with hostile cells, columns or bytes."""
    frame = factors(n_days=8, n_stocks=3).reset_index().astype(object)
    kind, file = rng.randrange(4), folder / "data.csv"
    for _ in range(rng.randint(1, 6)):
        frame.iat[rng.randrange(len(frame)), rng.randrange(frame.shape[1])] = rng.choice(CELLS)
    if kind == 0:
        frame.columns = rng.sample(
            [*frame.columns[1:], rng.choice([*HOSTILE_NAMES, "", "f0", "datetime"])], frame.shape[1]
        )
    frame.to_csv(file, index=False)
    if kind == 1:
        file.write_bytes(_mangled(file.read_bytes(), rng))
    elif kind == 2:
        file.write_bytes(rng.choice([b"\xff\xfe", b"PAR1", b"\x1f\x8b", b"", b"\n" * 50, *REPLACEMENTS]))
    elif kind == 3:
        file = folder / "data.parquet"
        content = workflow_inputs()[0] / "data.parquet"
        if not content.exists():
            factors(n_days=8, n_stocks=3).to_parquet(content)
        file.write_bytes(_mangled(content.read_bytes(), rng))
    _require_explained(["check", str(workflow_inputs()[1]), "--data", str(file)])


PIECES = [
    "$close",
    "$open",
    "$x",
    "Ref(",
    "Mean(",
    "Corr(",
    "If(",
    "EMA(",
    "Mask(",
    ")",
    ",",
    "1",
    "0",
    "-3",
    "0.5",
    "1e400",
]
PIECES += [
    "+",
    "-",
    "*",
    "/",
    "**",
    "&",
    "|",
    "<",
    "==",
    "'S1'",
    "__import__('os').system('touch CANARY')",
    "lambda: 0",
    "[",
]
PIECES += ["Quantile(", "Slope(", "9999999999", "not ", ".", "\u0661", "\0", "(", "Std($close,", "2**99999", "\ud800"]


@cache
def _prices() -> Any:
    return load_prices(synthetic.prices(3, 30))


def _expression(rng: random.Random, folder: Path) -> None:
    """Expressions from random pieces, some of them valid."""
    text = "".join(rng.choice(PIECES) for _ in range(rng.randint(1, 12))).replace(CANARY, str(folder / CANARY))
    if rng.random() < 0.5:
        text = f"Mean({text}, {rng.choice(['5', '0', '-1', '1e3', '10**30'])})"
    with contextlib.suppress(QfastError):
        values = factor_module.evaluate(text, _prices())
        require(len(values) == _prices().n_rows, f"{text!r} has {len(values)} values")


def _name(rng: random.Random, folder: Path) -> None:
    """A whole run with hostile names of the experiment, a segment, a column and instruments."""
    names = [rng.choice([*HOSTILE_NAMES, "".join(rng.choices(LETTERS, k=rng.randint(1, 40)))]) for _ in range(4)]
    text = TEXT.replace("experiment_name: small", f"experiment_name: {json.dumps(names[0])}")
    text = text.replace("        test:", f"        {json.dumps(names[1])}: [2020-02-21, 2020-03-01]\n        test:")
    (folder / "w.yaml").write_text(text, encoding="utf-8", errors="surrogatepass")
    frame = factors(n_days=70, n_stocks=6).reset_index().rename(columns={"f0": names[2]})
    frame["instrument"] = frame["instrument"].replace("S00", names[3])
    with contextlib.suppress(ValueError):  # NUL cannot be written to a CSV file
        frame.to_csv(folder / "data.csv", index=False)
    words = ["run", str(folder / "w.yaml"), "--data", str(folder / "data.csv"), "--output", str(folder / "run"), "-q"]
    status = _require_explained([*words, *EPOCH])
    _require_clean(folder)
    report = folder / "run" / "report.html"
    require(status == 2 or report.read_text().count("</html>") == 1, "the report is not one page")


CHECKS: dict[str, Callable[[random.Random, Path], None]] = {
    "yaml": _yaml,
    "code": _code,
    "folder": _folder,
    "pickle": _pickle,
    "store": _store,
    "table": _table,
    "expression": _expression,
    "name": _name,
}
PART = Part(draw, check, unit="files", seconds=240.0, share=0.25)
__all__ = ["PART", "check", "draw"]
