"""Run the tests of the CUDA operators without a GPU, with the kernels compiled as host code.

    python tools/cuda_on_host.py [--sanitize] [--only recurrent,window_gather] [--jobs 2] [pytest arguments...]

The C++ compiler compiles each .cu file against the headers in tools/cuda_on_host. Kernel launches become function
calls, the threads of a block become fibers that run in random order, and the kernels are registered for CPU tensors.
tools/cuda_on_host/cuda_runtime.h describes which errors this detects. Object files are cached in build/cuda_on_host and
compiled again when a source changes. Then pytest runs the tests of the kernels, except tests that need a real GPU.
With `--only`, these are the test files that need no other kernels.
`--jobs` runs several test files at a time, each in its own process; the output of a file is printed when it ends.

Environment variables:

    QFAST_HOST_SEED               seed of the random order of threads (1)
    QFAST_HOST_SHARED             bytes of shared memory per block (227 KiB)
    QFAST_HOST_MULTIPROCESSORS    multiprocessors of the device (132)
    QFAST_HOST_GRID               largest number of blocks of kernels that loop over their tasks (3)
    QFAST_HOST_ALL=1              also run the tests that take minutes as host code
    MAX_JOBS                      files compiled at the same time (all cores)
    CXX                           C++ compiler
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REPLACEMENTS = Path(__file__).resolve().with_suffix("")  # each file here replaces the one of that name in csrc
STABLE_ABI = "0x020a000000000000"
TESTS = {  # test file -> .cu files that it needs
    "test_ops_attention_cuda.py": {"additive_attention"},
    "test_ops_attention_pool_cuda.py": {"attention_pool"},
    "test_ops_encoder_cuda.py": {"encoder_layer", "feed_forward"},
    "test_ops_encoder_precision_cuda.py": {"encoder_layer", "feed_forward"},
    "test_ops_recurrent_cuda.py": {"recurrent"},
    "test_ops_temporal_conv_cuda.py": {"temporal_conv"},
    "test_ops_window_gather.py": {"window_gather"},
    "test_ops_cuda.py": {"window_gather"},
    "test_optim_cuda.py": {"adam"},
}
OPTIONS_WITH_VALUE = ("-k", "-m", "-p", "-n", "--deselect", "--ignore")  # of pytest; their values are not test files


def as_host_code(text: str) -> str:
    """Translate a CUDA source to C++: launches, shared memory, and registration for the CPU instead of CUDA."""
    text = text.replace("(qfast, CUDA, m)", "(qfast, CPU, m)")
    text = re.sub(
        r"extern __shared__ (?:__align__\(\d+\) )?(\w+) (\w+)\[\];",
        r"\1* const \2 = cuda_on_host::shared_memory<\1>();",
        text,
    )
    text = re.sub(r"\b__shared__\b", "static", text)
    while (at := text.find("<<<")) >= 0:
        text = _without_launch(text, at)
    return text


def _without_launch(text: str, at: int) -> str:
    """Replace the kernel launch whose `<<<` is at index `at` by a call of cuda_on_host::launch."""
    begin = _kernel_begin(text, at)
    kernel = text[begin:at].strip()
    end = text.index(">>>", at)
    grid, block, shared, *_ = [*_arguments(text[at + 3 : end]), "0", "0"]
    opening = text.index("(", end)
    closing = _closing(text, opening)
    call = f" cuda_on_host::launch({grid}, {block}, {shared}, [&] {{ {kernel}{text[opening:closing]}; }})"
    return text[:begin] + call + text[closing:]


def _kernel_begin(text: str, at: int) -> int:
    """Index where the kernel's name starts; the name, with its template arguments, ends at index `at`."""
    place = len(text[:at].rstrip())
    if text[place - 1] == ">":
        depth = 0
        while depth or text[place - 1] == ">":
            place -= 1
            depth += (text[place] == ">") - (text[place] == "<")
            if depth == 0:
                break
    while text[place - 1].isalnum() or text[place - 1] in "_:":
        place -= 1
    return place


def _arguments(text: str) -> list[str]:
    """Split at the commas outside brackets."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def _closing(text: str, opening: int) -> int:
    """Index after the parenthesis that closes the one at index `opening`."""
    depth = 0
    for place in range(opening, len(text)):
        depth += (text[place] == "(") - (text[place] == ")")
        if depth == 0:
            return place + 1
    raise ValueError(f"the parenthesis at index {opening} is not closed")


def build(sanitize: bool, only: set[str]) -> Path:
    """Build the library of all kernels, or of the .cu files whose stems are in `only`, and return its path."""
    import pybind11
    from torch.utils import cpp_extension

    folder = ROOT / "build" / ("cuda_on_host_sanitized" if sanitize else "cuda_on_host")
    sources = folder / "csrc"
    sources.mkdir(parents=True, exist_ok=True)
    for path in sorted((ROOT / "csrc").rglob("*.*")):
        place = path.relative_to(ROOT / "csrc")
        replacement = REPLACEMENTS / place
        if path.suffix in (".h", ".cuh", ".cu"):
            host_code = replacement.read_text() if replacement.exists() else as_host_code(path.read_text())
            _write(sources / place, host_code)
    shared = [*sources.rglob("*.h"), *sources.rglob("*.cuh"), *(p for p in REPLACEMENTS.rglob("*.*") if p.is_file())]
    system = [pybind11.get_include(), sysconfig.get_paths()["include"], *cpp_extension.include_paths()]
    flags = ["-std=c++20", "-O2", "-g1", "-fPIC", "-mfma", "-ffp-contract=fast"]
    flags += ["-Wno-unknown-pragmas", "-Wno-attributes"]
    if sanitize:
        flags += ["-fsanitize=address", "-fno-omit-frame-pointer"]
    paths = [f"-I{sources}", f"-I{REPLACEMENTS}", *(part for path in system for part in ("-isystem", path))]
    flags += ["-include", "cuda_runtime.h", f"-DTORCH_TARGET_VERSION={STABLE_ABI}"]  # nvcc also includes cuda_runtime.h
    command = [cpp_extension.get_cxx_compiler(), *flags, *paths]
    facts = hashlib.sha256(b"".join(p.read_bytes() for p in sorted(shared)) + repr(command).encode()).hexdigest()

    def compiled(source: Path) -> Path:
        """The object file of a source, compiled unless it is in the cache."""
        key = hashlib.sha256(source.read_bytes() + facts.encode()).hexdigest()[:16]
        object_file = folder / f"{source.stem}.{key}.o"
        if not object_file.exists():
            for old in folder.glob(f"{source.stem}.*.o"):
                old.unlink()
            part = object_file.with_suffix(".part")  # an interrupted compilation must not leave a partial object file
            subprocess.run([*command, "-x", "c++", "-c", str(source), "-o", str(part)], check=True)
            part.rename(object_file)
        return object_file

    kernels = [sources / p.relative_to(ROOT / "csrc") for p in sorted((ROOT / "csrc").rglob("*.cu"))]
    kernels = [p for p in kernels if not only or p.stem in only]
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
        objects = list(pool.map(compiled, [*kernels, REPLACEMENTS / "switch.cpp"]))
    library = folder / "kernels.so"
    torch_libraries = [part for path in cpp_extension.library_paths() for part in (f"-L{path}", f"-Wl,-rpath,{path}")]
    link = ["-shared", "-o", str(library), *map(str, objects), *torch_libraries, "-ltorch_cpu", "-lc10"]
    subprocess.run([command[0], *(["-fsanitize=address"] if sanitize else []), *link], check=True)
    return library


def _write(path: Path, text: str) -> None:
    """Write a file unless it already has this text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def divide(arguments: Sequence[str], only: set[str]) -> tuple[list[str], list[str]]:
    """Divide the arguments for pytest into test files and flags. Without files: those that `only` is sufficient for.

    >>> divide(["-x", "--deselect", "tests/a.py::test_b", "tests/c.py"], set())
    (['tests/c.py'], ['-x', '--deselect', 'tests/a.py::test_b'])
    """
    files, flags = [], []
    for before, argument in pairwise(["", *arguments]):
        is_file = argument.partition("::")[0].endswith(".py") and not argument.startswith("-")
        (files if is_file and before not in OPTIONS_WITH_VALUE else flags).append(argument)
    return files or [str(ROOT / "tests" / name) for name, needed in TESTS.items() if not only or needed <= only], flags


def main() -> int:
    """Build the library, run pytest with it, and return pytest's exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sanitize", action="store_true", help="build with AddressSanitizer")
    parser.add_argument("--only", default="", help="comma-separated names of .cu files, without the suffix")
    parser.add_argument("--jobs", type=int, default=1, help="test files that run at a time")
    options, pytest_arguments = parser.parse_known_args()
    only = set(filter(None, options.only.split(",")))
    known = {name for needed in TESTS.values() for name in needed}
    if not only <= known:
        parser.error(f"--only: there is no {sorted(only - known)}. Names of .cu files: {', '.join(sorted(known))}.")
    files, flags = divide(pytest_arguments, only)
    if not files:
        needs = [f"{test} needs {','.join(sorted(needed))}" for test, needed in TESTS.items() if needed & only]
        parser.error(f"--only {options.only}: no test file needs only this ({'; '.join(needs)}).")
    library = build(options.sanitize, only)
    environment = {**os.environ, "QFAST_CUDA_ON_HOST": str(library), "QFAST_BACKEND": "torch"}
    environment.setdefault("OMP_NUM_THREADS", "1")
    if options.sanitize:
        compiler = os.environ.get("CXX", "g++")
        names = ("libasan.so", "libstdc++.so")  # AddressSanitizer finds __cxa_throw only if libstdc++ is loaded too
        preloaded = [subprocess.check_output([compiler, f"-print-file-name={n}"], text=True).strip() for n in names]
        environment |= {
            "LD_PRELOAD": " ".join(preloaded),
            "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        }
    command = [sys.executable, "-m", "pytest", "-q", *flags]
    if options.jobs == 1:
        return subprocess.run([*command, *files], env=environment, cwd=ROOT).returncode

    def run(file: str) -> int:
        done = subprocess.run([*command, file], env=environment, cwd=ROOT, capture_output=True, text=True)
        print(f"{file}\n{done.stdout}{done.stderr}", flush=True)
        return done.returncode

    with ThreadPoolExecutor(options.jobs) as pool:
        return max(pool.map(run, files))


if __name__ == "__main__":
    raise SystemExit(main())
