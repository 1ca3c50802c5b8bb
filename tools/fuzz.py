"""Fuzz the expression parser, the reader of Qlib's binary stores and the YAML reader with coverage guidance (Atheris).

    pip install atheris
    python tools/fuzz.py expression --minutes 20 [--corpus FOLDER] [--seed 0]
    python tools/fuzz.py store --minutes 20
    python tools/fuzz.py yaml --minutes 20
    python tools/fuzz.py expression FILE        # run one input again

Each input must have a result or raise an error of qfast within `SECONDS` and `MEGABYTES`. Any other exception ends the
script, and Atheris writes the input to a file `crash-...` in the corpus folder. An expression that parses is also
evaluated, on a panel of 2 instruments and 12 days. A store is a small valid one with one of its files replaced by the
input; it is in memory if the system has a folder for that. The corpus is not part of the repository; by default it is a
temporary folder.
"""

from __future__ import annotations

import argparse
import atexit
import logging
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import qfast.ops  # noqa: E402, F401 - before the instrumented imports, so coverage is that of the readers only

with atheris.instrument_imports(include=["qfast"]):
    from qfast.data import expression, factors, load_prices, synthetic
    from qfast.data.store import BinaryStore
    from qfast.errors import QfastError
    from qfast.workflow.yaml_text import InvalidYaml, parse_yaml
from support.stores import write_store  # noqa: E402

SECONDS, MEGABYTES = 20, 2048  # of one input
STORE_DAYS = 62  # about the fewest with which write_store writes all of its irregularities
MAX_BYTES = {"expression": 300, "store": 3000, "yaml": 1000}
SEEDS: dict[str, list[bytes]] = {
    "expression": [
        b"Ref($close, -2) / Ref($close, -1) - 1",
        b"Corr($close / Ref($close, 1), Log($volume / Ref($volume, 1) + 1), 30)",
        b"If(($close > $open) & ~($low < 3), Mean($high, 5), Std($vwap, 0))",
        b"Mask(EMA($close, 0.5), 'S0000') ** 2 | Rank($open, 10)",
    ],
    "store": [],  # the files of a valid store
    "yaml": [b"a: &x [1, 2e-3, .inf]\nb: *x\nc: {d: 2020-01-01, <<: {e: ~}}\n", b"!!python/name:os.system ''"],
}


def expression_target() -> Callable[[bytes], None]:
    """Parses text, and evaluates what parses."""
    panel = load_prices(synthetic.prices(2, 12))

    def run(data: bytes) -> None:
        text = data.decode("utf-8", errors="surrogateescape")  # lone surrogates too
        try:
            expression.parse(text)
        except QfastError:
            return
        expression.reach(text), expression.fields(text), expression.instruments(text)
        try:
            values = factors.evaluate(text, panel)
        except QfastError:
            return
        assert len(values) == panel.n_rows

    return run


def store_target() -> Callable[[bytes], None]:
    """Reads a store with one file replaced. The first byte of the input selects the file."""
    in_memory = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="fuzz-store", dir=in_memory if in_memory.is_dir() else None))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    write_store(folder, n_days=STORE_DAYS)
    names = ["calendars/day.txt", "instruments/all.txt", "instruments/mixed.txt", "features/aaa/close.day.bin"]
    names += ["features/bbb/open.day.bin", "features/ddd/volume.day.bin"]
    original = {name: (folder / name).read_bytes() for name in names}
    SEEDS["store"] = [bytes([number]) + content for number, content in enumerate(original.values())]

    def run(data: bytes) -> None:
        name = names[data[0] % len(names)] if data else names[0]
        (folder / name).write_bytes(data[1:])
        try:
            store = BinaryStore(folder)
            for market in ("all", "mixed"):
                prices = store.read(market, margin=(data[-1] % 3, 1))
                assert len(prices.panel.date_codes) == prices.panel.n_rows
        except QfastError:
            pass
        finally:
            (folder / name).write_bytes(original[name])

    return run


def yaml_target() -> Callable[[bytes], None]:
    """Parses YAML text."""

    def run(data: bytes) -> None:
        try:
            parse_yaml(data.decode("utf-8", errors="replace"))
        except InvalidYaml:
            return

    return run


TARGETS = {"expression": expression_target, "store": store_target, "yaml": yaml_target}


def main() -> None:
    """Fuzz one target for the given time, or run one input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("file", nargs="?", type=Path, help="run only this input")
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--corpus", type=Path, help="folder of inputs, which grows; default: a temporary folder")
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    run = TARGETS[options.target]()
    if options.file is not None:
        run(options.file.read_bytes())
        return
    corpus = options.corpus or Path(tempfile.mkdtemp(prefix=f"fuzz-{options.target}"))
    corpus.mkdir(parents=True, exist_ok=True)
    for number, content in enumerate(SEEDS[options.target]):
        (corpus / f"seed-{number}").write_bytes(content)
    arguments = [f"-max_total_time={int(60 * options.minutes)}", f"-seed={options.seed + 1}", "-print_final_stats=1"]
    arguments += [f"-timeout={SECONDS}", f"-rss_limit_mb={MEGABYTES}", f"-max_len={MAX_BYTES[options.target]}"]
    arguments += [f"-artifact_prefix={corpus}/", str(corpus)]
    atheris.Setup([sys.argv[0], *arguments], run)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
