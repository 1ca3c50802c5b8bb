"""Builds qfast._C (CPU, always) and qfast._cuda (where nvcc is found); everything else is in pyproject.toml.

Environment: QFAST_NATIVE=0 builds neither (plain-torch tier, no compiler); QFAST_CUDA=0 skips _cuda, 1 fails
without it; QFAST_WERROR=1 has warnings fail; CUDA_HOME, MAX_JOBS, TORCH_CUDA_ARCH_LIST are torch's own.
"""

import os
import re
import shutil
import subprocess
import sys
from glob import glob
from pathlib import Path

from setuptools import Extension, setup

STABLE_ABI = "0x020a000000000000"  # libtorch's stable ABI as of 2.10: meant for that torch and any later
WARNINGS = ["-Wall", "-Wextra", *(["-Werror"] if os.environ.get("QFAST_WERROR", "0") != "0" else [])]
ARCHS = {(11, 0): ["8.0", "8.6"], (11, 8): ["8.9", "9.0"], (12, 8): ["10.0"]}  # toolkit that first knows them


def find_cuda() -> str | None:
    """Folder of the CUDA toolkit, also beside a CPU-only torch; None if there is none or none is wanted."""
    if (choice := os.environ.get("QFAST_CUDA", "auto")) not in ("auto", "0", "1"):
        raise SystemExit(f"QFAST_CUDA is {choice!r}, allowed: 0 (never), 1 (or fail), auto")
    nvcc = shutil.which("nvcc")
    beside_nvcc = str(Path(nvcc).resolve().parents[1]) if nvcc else None
    places = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), beside_nvcc, "/usr/local/cuda"]
    for home in filter(None, places if choice != "0" else []):
        if glob(f"{home}/bin/nvcc") and glob(f"{home}/lib*/libcudart_static.a"):
            return home
    if choice == "1":
        raise SystemExit(f"QFAST_CUDA=1 but no nvcc and libcudart_static.a in any of {places}. Set CUDA_HOME.")
    return None


def cuda_archs(home: str) -> str:
    """Every architecture of ours that this toolkit knows, and PTX of the newest for later ones."""
    text = subprocess.check_output([f"{home}/bin/nvcc", "--version"], text=True)
    release = [int(part) for part in re.findall(r"release (\d+)\.(\d+)", text)[0]]
    return ";".join(arch for since, archs in ARCHS.items() if release >= [*since] for arch in archs) + "+PTX"


def extensions() -> list[Extension]:
    cuda_home = find_cuda()  # first: a wrong QFAST_CUDA is named even where the packages below are missing
    import pybind11
    from torch.utils import cpp_extension

    system = [pybind11.get_include(), *cpp_extension.include_paths()]  # warnings in these are not ours
    flags = ["-O3", "-std=c++20", *(flag for path in system for flag in ("-isystem", path))]
    cxx = [*flags, "-g0", "-fvisibility=hidden", *WARNINGS]
    facts = {"QFAST_CUDA_TOOLKIT": cuda_home or "none", "QFAST_CUDA_ARCHS": "none"}
    if cuda_home:
        cpp_extension.CUDA_HOME = cuda_home  # None beside a CPU-only torch
        facts["QFAST_CUDA_ARCHS"] = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", cuda_archs(cuda_home))
    macros = [("TORCH_TARGET_VERSION", STABLE_ABI), *((k, f'"{v}"') for k, v in facts.items())]
    paths, headers = cpp_extension.library_paths(), [*glob("csrc/*.h"), *glob("csrc/*.cuh")]
    built = [
        Extension("qfast._C", sorted(glob("csrc/*.cpp")), define_macros=macros, library_dirs=paths,
                  libraries=["torch_cpu"], extra_compile_args={"cxx": cxx}, depends=headers, language="c++")
    ]  # fmt: skip
    if cuda_home:
        nvcc = [*flags, "-isystem", f"{cuda_home}/include", "-Xcompiler", ",".join(cxx[len(flags) :])]
        nvcc += ["-Werror", "all-warnings"] if "-Werror" in WARNINGS else []
        paths = [*paths, f"{cuda_home}/lib64", f"{cuda_home}/lib"]
        libraries = ["torch_cpu", "cudart_static", "dl", "rt", "pthread"]
        link = ["-Wl,--no-as-needed", "-ltorch"]  # libtorch.so brings in libtorch_cuda.so where there is one
        built.append(
            Extension("qfast._cuda", sorted(glob("csrc/*.cu")), define_macros=[*macros, ("USE_CUDA", None)],
                      library_dirs=paths, libraries=libraries, extra_link_args=link,
                      extra_compile_args={"cxx": cxx, "nvcc": nvcc}, depends=headers, language="c++")
        )  # fmt: skip
    return built


def build_command() -> type:
    from torch.utils.cpp_extension import BuildExtension

    class Build(BuildExtension):
        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception as error:  # whatever a toolkit that suits neither torch nor the compiler raises
                if len(self.extensions) == 1 or os.environ.get("QFAST_CUDA") == "1":
                    raise
                print(f"qfast: the CUDA library failed to build and is left out: {error}", file=sys.stderr)
                self.extensions = self.extensions[:1]
                super().build_extensions()

        def build_extension(self, ext: Extension) -> None:
            root, self.build_temp = self.build_temp, os.path.join(self.build_temp, ext.name)
            super().build_extension(ext)  # in a folder of its own: x.cpp and x.cu both become x.o
            self.build_temp = root

    return Build


native = os.environ.get("QFAST_NATIVE", "1") != "0"
setup(**({"ext_modules": extensions(), "cmdclass": {"build_ext": build_command()}} if native else {}))
