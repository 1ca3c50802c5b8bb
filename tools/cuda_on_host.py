"""Runs the CUDA operators' tests without a GPU: their kernels, compiled as host code, serve tensors on the CPU.

    python tools/cuda_on_host.py [--sanitize] [--only recurrent,window_gather] [pytest's arguments...]

Each .cu is compiled by the C++ compiler against tools/cuda_on_host (threads are fibers in random order; see
cuda_runtime.h there for what that shows and what not), with launches turned into calls. Objects stay in
build/cuda_on_host and are made again when a source changes. Then pytest runs the tests of the kernels, those that
need a real device left out. `--sanitize` builds with AddressSanitizer. QFAST_HOST_SEED sets the order of threads,
QFAST_HOST_SHARED (bytes), QFAST_HOST_MULTIPROCESSORS and QFAST_HOST_GRID (blocks at most) the device.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STANDING_IN = Path(__file__).resolve().with_suffix("")
STABLE_ABI = "0x020a000000000000"
TESTS = (
    "test_ops_attention_cuda.py", "test_ops_attention_pool_cuda.py", "test_ops_encoder_cuda.py",
    "test_ops_encoder_precision_cuda.py", "test_ops_recurrent_cuda.py", "test_ops_temporal_conv_cuda.py",
    "test_ops_window_gather.py", "test_ops_cuda.py",
)  # fmt: skip


def as_host_code(text: str) -> str:
    """A CUDA source with launches and shared memory as C++ knows them, registered for the CPU."""
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
    begin = _kernel_begin(text, at)
    kernel = text[begin:at].strip()
    end = text.index(">>>", at)
    grid, block, shared, *_ = [*_arguments(text[at + 3 : end]), "0", "0"]
    opening = text.index("(", end)
    closing = _closing(text, opening)
    call = f" cuda_on_host::launch({grid}, {block}, {shared}, [&] {{ {kernel}{text[opening:closing]}; }})"
    return text[:begin] + call + text[closing:]


def _kernel_begin(text: str, at: int) -> int:
    """Where the kernel's name begins, template arguments and all, that ends before `at`."""
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
    """Cut at the commas outside parentheses."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def _closing(text: str, opening: int) -> int:
    """Behind the parenthesis that closes the one at `opening`."""
    depth = 0
    for place in range(opening, len(text)):
        depth += (text[place] == "(") - (text[place] == ")")
        if depth == 0:
            return place + 1
    raise ValueError("a parenthesis is not closed")


def build(sanitize: bool, only: set[str]) -> Path:
    """The library of all kernels, or of those sources that `only` names."""
    import pybind11
    from torch.utils import cpp_extension

    folder = ROOT / "build" / ("cuda_on_host_sanitized" if sanitize else "cuda_on_host")
    sources = folder / "csrc"
    sources.mkdir(parents=True, exist_ok=True)
    for path in sorted((ROOT / "csrc").rglob("*.*")):
        place = path.relative_to(ROOT / "csrc")
        other = STANDING_IN / place  # stands for it
        if path.suffix in (".h", ".cuh", ".cu"):
            _write(sources / place, other.read_text() if other.exists() else as_host_code(path.read_text()))
    shared = [*sources.rglob("*.h"), *sources.rglob("*.cuh"), *(p for p in STANDING_IN.rglob("*.*") if p.is_file())]
    system = [pybind11.get_include(), sysconfig.get_paths()["include"], *cpp_extension.include_paths()]
    flags = ["-std=c++20", "-O2", "-g1", "-fPIC", "-mfma", "-ffp-contract=fast"]
    flags += ["-Wno-unknown-pragmas", "-Wno-attributes"]
    if sanitize:
        flags += ["-fsanitize=address", "-fno-omit-frame-pointer"]
    paths = [f"-I{sources}", f"-I{STANDING_IN}", *(part for path in system for part in ("-isystem", path))]
    flags += ["-include", "cuda_runtime.h", f"-DTORCH_TARGET_VERSION={STABLE_ABI}"]  # nvcc includes it as well
    command = [cpp_extension.get_cxx_compiler(), *flags, *paths]
    facts = hashlib.sha256(b"".join(p.read_bytes() for p in sorted(shared)) + repr(command).encode()).hexdigest()

    def compiled(source: Path) -> Path:
        key = hashlib.sha256(source.read_bytes() + facts.encode()).hexdigest()[:16]
        made = folder / f"{source.stem}.{key}.o"
        if not made.exists():
            for old in folder.glob(f"{source.stem}.*.o"):
                old.unlink()
            part = made.with_suffix(".part")
            subprocess.run([*command, "-x", "c++", "-c", str(source), "-o", str(part)], check=True)
            part.rename(made)
        return made

    wanted = [sources / p.relative_to(ROOT / "csrc") for p in sorted((ROOT / "csrc").rglob("*.cu"))]
    wanted = [p for p in wanted if not only or p.stem in only]
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
        objects = list(pool.map(compiled, [*wanted, STANDING_IN / "switch.cpp"]))
    library = folder / "kernels.so"
    torch_libraries = [part for path in cpp_extension.library_paths() for part in (f"-L{path}", f"-Wl,-rpath,{path}")]
    link = ["-shared", "-o", str(library), *map(str, objects), *torch_libraries, "-ltorch_cpu", "-lc10"]
    subprocess.run([command[0], *(["-fsanitize=address"] if sanitize else []), *link], check=True)
    return library


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sanitize", action="store_true")
    parser.add_argument("--only", default="", help="names of .cu files, without .cu")
    given, rest = parser.parse_known_args()
    library = build(given.sanitize, set(filter(None, given.only.split(","))))
    environment = {**os.environ, "QFAST_CUDA_ON_HOST": str(library), "QFAST_BACKEND": "torch"}
    environment.setdefault("OMP_NUM_THREADS", "1")
    if given.sanitize:
        compiler = os.environ.get("CXX", "g++")
        names = ("libasan.so", "libstdc++.so")  # the second so that exceptions are found
        found = [subprocess.check_output([compiler, f"-print-file-name={n}"], text=True).strip() for n in names]
        environment |= {"LD_PRELOAD": " ".join(found), "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0"}
    if not any(part.endswith(".py") or ".py::" in part for part in rest):
        rest += [str(ROOT / "tests" / name) for name in TESTS]
    return subprocess.run([sys.executable, "-m", "pytest", "-q", *rest], env=environment, cwd=ROOT).returncode


if __name__ == "__main__":
    raise SystemExit(main())
