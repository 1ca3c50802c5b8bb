"""Build qfast._C (CPU, always) and qfast._cuda (if nvcc is found). Everything else is in pyproject.toml.

Environment variables:

    QFAST_NATIVE=0    build neither library: the plain-torch tier needs no compiler
    QFAST_CUDA        auto (the default): build _cuda if nvcc is found and torch is built for CUDA;
                      0: never; 1: always, and fail if that is not possible
    QFAST_WERROR=1    treat warnings as errors
    QFAST_ISAS        instruction sets to compile, separated by commas (baseline,avx2,avx512); CPUs without any of
                      them cannot load the library
    QFAST_OBJECTS     build/objects/TAG of an earlier build for another Python: the CPU library is linked from its
                      objects, and only the sources that depend on Python are compiled
    QFAST_SANITIZE    sanitizers of the C++ compiler, e.g. address,undefined; the code is then less optimized
    CUDA_HOME, MAX_JOBS, TORCH_CUDA_ARCH_LIST    as documented by torch
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from glob import glob
from pathlib import Path

from setuptools import Extension, setup

STABLE_ABI = "0x020a000000000000"  # the stable ABI of torch 2.10, which later versions support too
WARNINGS = ["-Wall", "-Wextra"]
if os.environ.get("QFAST_WERROR", "0") != "0":
    WARNINGS.append("-Werror")

# Instruction sets for which each *_kernels*.cpp is compiled. The file cpu_isa_begin.h defines them.
ALL_INSTRUCTION_SETS = ["baseline", "avx2", "avx512"]
INSTRUCTION_SETS = os.environ.get("QFAST_ISAS", ",".join(ALL_INSTRUCTION_SETS)).split(",")
if not INSTRUCTION_SETS or not set(INSTRUCTION_SETS) <= set(ALL_INSTRUCTION_SETS):
    raise SystemExit(f"QFAST_ISAS is {','.join(INSTRUCTION_SETS)!r}, allowed: some of {','.join(ALL_INSTRUCTION_SETS)}")
# Files that are also compiled for AMX, whose products are those of bfloat16. cpu_bf16.h lists their kernels.
BF16_SOURCES = [
    "csrc/panel_kernels.cpp",
    "csrc/attention_pool/attention_pool_kernels.cpp",
    "csrc/encoder_layer/encoder_layer_kernels.cpp",
    "csrc/feed_forward/feed_forward_kernels.cpp",
    "csrc/recurrent/recurrent_kernels.cpp",
    "csrc/recurrent/recurrent_kernels_backward.cpp",
    "csrc/temporal_conv/temporal_conv_kernels.cpp",
    "csrc/temporal_conv/temporal_conv_kernels_backward.cpp",
    "csrc/window_conv/window_conv_kernels.cpp",
]
PYTHON_SOURCES = ["csrc/module.cpp"]  # every other source uses only torch's stable ABI
# The compiler decides, as in cpu_dispatch.cpp: the build machine may be another one. Old compilers lack AMX.
CONDITIONS = {
    "avx2": "defined(__x86_64__)",
    "avx512": "defined(__x86_64__)",
    "amx": "defined(__x86_64__) && __has_include(<amxbf16intrin.h>)",
}

# GPU architectures, by the CUDA release that introduced support for them.
ARCHITECTURES = {(11, 0): ["8.0", "8.6"], (11, 8): ["8.9", "9.0"], (12, 8): ["10.0"]}


def find_cuda() -> str | None:
    """Folder of the CUDA toolkit, or None if there is none or QFAST_CUDA excludes it."""
    choice = os.environ.get("QFAST_CUDA", "auto")
    if choice not in ("auto", "0", "1"):
        raise SystemExit(f"QFAST_CUDA is {choice!r}, allowed: 0 (never), 1 (or fail), auto")
    if choice == "0":
        return None
    nvcc = shutil.which("nvcc")
    next_to_nvcc = str(Path(nvcc).resolve().parents[1]) if nvcc else None
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), next_to_nvcc, "/usr/local/cuda"]
    for home in filter(None, candidates):
        if glob(f"{home}/bin/nvcc") and glob(f"{home}/lib*/libcudart_static.a"):
            return home
    if choice == "1":
        raise SystemExit(f"QFAST_CUDA=1 but no nvcc and libcudart_static.a in any of {candidates}. Set CUDA_HOME.")
    return None


def torch_can_load_cuda(cuda_home: str) -> bool:
    """False, with a message, if torch is a CPU-only build, unless QFAST_CUDA=1 requests the library anyway."""
    import torch

    if torch.version.cuda is not None or os.environ.get("QFAST_CUDA") == "1":
        return True
    print(
        f"qfast: the CUDA library is not built although {cuda_home} has nvcc: torch {torch.__version__} is a CPU-only "
        "build and cannot load it. Set QFAST_CUDA=1 to build it anyway.",
        file=sys.stderr,
    )
    return False


def files_in_csrc(pattern: str) -> list[str]:
    """Sorted paths of the files below csrc whose names match the pattern."""
    return sorted(glob(f"csrc/**/{pattern}", recursive=True))


def kernel_units(source: str) -> list[str]:
    """Write one file per instruction set that includes `source`, a *_kernels*.cpp, and return the paths."""
    units = []
    for isa in [*INSTRUCTION_SETS, *(["amx"] if source in BF16_SOURCES else [])]:
        unit = Path("build", "units", source).with_suffix(f".{isa}.cpp")
        text = f'#define QFAST_{isa.upper()}\n#include "{Path(source).relative_to("csrc").as_posix()}"\n'
        if isa in CONDITIONS:
            text = f"#if {CONDITIONS[isa]}\n{text}#endif\n"
        unit.parent.mkdir(parents=True, exist_ok=True)
        if not unit.exists() or unit.read_text() != text:  # a new time stamp would make ninja recompile it
            unit.write_text(text)
        units.append(str(unit))
    return units


def compiled_sources(sources: list[str]) -> list[str]:
    """The sources with each *_kernels*.cpp replaced by its units."""
    compiled: list[str] = []
    for source in sources:
        is_kernel = re.search(r"_kernels\w*\.cpp$", source)
        compiled += kernel_units(source) if is_kernel else [source]
    return compiled


def objects_of_another_python(name: str) -> list[str]:
    """Objects of the library `name` in QFAST_OBJECTS that do not depend on Python. Empty without QFAST_OBJECTS."""
    folder = os.environ.get("QFAST_OBJECTS")
    if not folder or name != "qfast._C":
        return []
    python_objects = {Path(source).with_suffix(".o") for source in PYTHON_SOURCES}
    root = Path(folder, name)
    objects = [file for file in sorted(root.rglob("*.o")) if file.relative_to(root) not in python_objects]
    if not objects:
        raise SystemExit(f"QFAST_OBJECTS is {folder!r}, but there are no objects in {root}. Remedy: build there first.")
    return [str(file) for file in objects]


def nvcc_release(tools: str) -> tuple[int, ...]:
    """Major and minor version of the CUDA toolkit, from the output of `nvcc --version`."""
    return tuple(map(int, re.findall(r"release (\d+)\.(\d+)", tools)[-1]))


def cuda_architectures(tools: str) -> str:
    """Value of TORCH_CUDA_ARCH_LIST. It includes PTX of the newest architecture, which later GPUs can run."""
    release = nvcc_release(tools)
    supported = [arch for since, archs in ARCHITECTURES.items() if since <= release for arch in archs]
    return ";".join(supported) + "+PTX"


def define_facts(toolkit: str, architectures: str, tools: str) -> list[tuple[str, str | None]]:
    """Macros for all sources. QFAST_TOOLS makes ninja recompile when torch, pybind11 or a compiler changes."""
    import pybind11
    import torch

    versions = repr((torch.version.git_version, pybind11.__version__, tools)).encode()
    facts = {
        "QFAST_CUDA_TOOLKIT": toolkit,
        "QFAST_TOOLS": hashlib.sha256(versions).hexdigest(),
        "QFAST_CUDA_ARCHS": architectures,
    }
    missing = [isa for isa in ALL_INSTRUCTION_SETS if isa not in INSTRUCTION_SETS]
    return [
        ("TORCH_TARGET_VERSION", STABLE_ABI),
        *((name, f'"{value}"') for name, value in facts.items()),
        *((f"QFAST_WITHOUT_{isa.upper()}", None) for isa in missing),
    ]


def sanitizer_flags() -> list[str]:
    """Flags for the compiler and the linker. An undefined operation ends the process, as a bad address does."""
    sanitizers = os.environ.get("QFAST_SANITIZE", "")
    return [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"] if sanitizers else []


def extensions() -> list[Extension]:
    """The extension modules to build: qfast._C, and qfast._cuda if the CUDA toolkit and torch allow it."""
    cuda_home = find_cuda()  # before the imports, so an invalid QFAST_CUDA is reported even if they fail
    import pybind11
    import torch
    from torch.utils import cpp_extension

    toolkit = "none"
    if cuda_home and not torch_can_load_cuda(cuda_home):
        cuda_home, toolkit = None, "none, as torch is a CPU-only build"
    system = [pybind11.get_include(), *cpp_extension.include_paths()]  # -isystem suppresses warnings in these headers
    flags = ["-O3", "-std=c++20", f"-I{os.path.abspath('csrc')}"]
    flags += [flag for path in system for flag in ("-isystem", path)]
    # Without errno and traps, the compiler can vectorize sqrt.
    only_cxx = ["-g0", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden", *WARNINGS]
    cxx = [*flags, *only_cxx]
    if sanitizer_flags():
        cxx += ["-O1", "-g1", "-fno-omit-frame-pointer", *sanitizer_flags()]
    tools = subprocess.getoutput(f"{cpp_extension.get_cxx_compiler()} --version; {cuda_home}/bin/nvcc --version")
    if cuda_home:
        toolkit = f"{'.'.join(map(str, nvcc_release(tools)))} ({cuda_home})"
        cpp_extension.CUDA_HOME = cuda_home  # None if torch is a CPU-only build
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", cuda_architectures(tools))
    macros = define_facts(toolkit, os.environ["TORCH_CUDA_ARCH_LIST"] if cuda_home else "none", tools)
    library_paths = cpp_extension.library_paths()
    headers = [*files_in_csrc("*.h"), *files_in_csrc("*.cuh")]
    cpu_library = Extension(
        "qfast._C",
        files_in_csrc("*.cpp"),
        define_macros=macros,
        library_dirs=library_paths,
        libraries=["torch_cpu"],
        extra_compile_args={"cxx": cxx},
        extra_link_args=sanitizer_flags(),
        depends=[*headers, *files_in_csrc("*_kernels*.cpp")],
        language="c++",
    )
    if not cuda_home:
        return [cpu_library]
    nvcc = [*flags, "-isystem", f"{cuda_home}/include", "-Xcompiler", ",".join(only_cxx)]
    if "-Werror" in WARNINGS:
        nvcc += ["-Werror", "all-warnings"]
    cuda_macros: list[tuple[str, str | None]] = [("USE_CUDA", None)]
    if torch.version.cuda is None:  # a CPU-only torch does not track the headers that nvcc reads
        contents = b"".join(Path(header).read_bytes() for header in headers)
        cuda_macros.append(("QFAST_HEADERS", hashlib.sha256(contents).hexdigest()))
    cuda_library = Extension(
        "qfast._cuda",
        files_in_csrc("*.cu"),
        define_macros=[*macros, *cuda_macros],
        library_dirs=[*library_paths, f"{cuda_home}/lib64", f"{cuda_home}/lib"],
        libraries=["torch_cpu", "cudart_static", "dl", "rt", "pthread"],
        extra_compile_args={"cxx": cxx, "nvcc": nvcc},
        extra_link_args=["-Wl,--no-as-needed", "-ltorch"],  # libtorch.so loads libtorch_cuda.so where it exists
        depends=headers,
        language="c++",
    )
    return [cpu_library, cuda_library]


@contextlib.contextmanager
def only_build_in(folder: str) -> Iterator[None]:
    """Hold a lock on the folder. A concurrent build waits, and then has nothing left to compile."""
    try:
        import fcntl
    except ImportError:  # Windows: two builds at the same time are not protected from each other
        yield
        return
    with open(f"{folder}/lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def build_command() -> type:
    """The class of the `build_ext` command, which needs torch."""
    from torch.utils.cpp_extension import BuildExtension

    class Build(BuildExtension):
        """Builds incrementally. If the CUDA library fails to build, only the CPU library is installed."""

        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception as error:  # for example, a toolkit that suits neither torch nor the compiler
                if len(self.extensions) == 1 or os.environ.get("QFAST_CUDA") == "1":
                    raise
                print(f"qfast: the CUDA library failed to build and is left out: {error}", file=sys.stderr)
                self.extensions = self.extensions[:1]
                super().build_extensions()

        def build_extension(self, ext: Extension) -> None:
            # pip deletes its temporary folder after each build. Each library has its own folder, because x.cpp and x.cu
            # both compile to x.o.
            self.build_temp = os.path.abspath(f"build/objects/{sys.implementation.cache_tag}/{ext.name}")
            os.makedirs(self.build_temp, exist_ok=True)
            with only_build_in(self.build_temp):
                original_sources = ext.sources
                ext.extra_objects = objects_of_another_python(ext.name)
                ext.sources = PYTHON_SOURCES if ext.extra_objects else compiled_sources(original_sources)
                try:
                    super().build_extension(ext)
                finally:
                    ext.sources = original_sources

    return Build


if os.environ.get("QFAST_NATIVE", "1") != "0":
    setup(ext_modules=extensions(), cmdclass={"build_ext": build_command()})
else:
    setup()
