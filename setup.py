"""Builds qfast._C (CPU, always) and qfast._cuda (where nvcc is found); everything else is in pyproject.toml.

Environment: QFAST_NATIVE=0 builds neither (plain-torch tier, needs no compiler); QFAST_CUDA=0 skips _cuda,
QFAST_CUDA=1 fails if it cannot be built; QFAST_WERROR=1 turns warnings into errors; CUDA_HOME, MAX_JOBS and
TORCH_CUDA_ARCH_LIST mean what they mean to torch.
"""

import os
import re
import shutil
import subprocess
from glob import glob
from pathlib import Path

from setuptools import Extension, setup

STABLE_ABI = "0x020a000000000000"  # libtorch's stable ABI as of 2.10: builds run on that torch and any later
WARNINGS = ["-Wall", "-Wextra", *(["-Werror"] if os.environ.get("QFAST_WERROR", "0") != "0" else [])]
ARCHS = {(11, 0): ["8.0", "8.6"], (11, 8): ["8.9", "9.0"], (12, 8): ["10.0"]}  # toolkit that first knows them


def find_cuda() -> str | None:
    """Folder of the CUDA toolkit, also beside a CPU-only torch; None if there is none or none is wanted."""
    choice = os.environ.get("QFAST_CUDA", "auto")
    if choice not in ("auto", "0", "1"):
        raise SystemExit(f"QFAST_CUDA is {choice!r}, allowed: 0 (never), 1 (or fail), auto")
    if choice == "0":
        return None
    nvcc = shutil.which("nvcc")
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    if nvcc:
        candidates.insert(2, str(Path(nvcc).resolve().parents[1]))
    for home in filter(None, candidates):
        static_runtime = [p for lib in ("lib64", "lib") for p in glob(f"{home}/{lib}/libcudart_static.a")]
        if (Path(home) / "bin" / "nvcc").exists() and static_runtime:
            return home
    if choice == "1":
        tried = ", ".join(filter(None, candidates))
        raise SystemExit(f"QFAST_CUDA=1 but no bin/nvcc with libcudart_static.a in: {tried}. Set CUDA_HOME.")
    return None


def cuda_archs(home: str) -> str:
    """Every architecture of ours that this toolkit knows, and PTX of the newest for later ones."""
    text = subprocess.check_output([f"{home}/bin/nvcc", "--version"], text=True)
    found = re.search(r"release (\d+)\.(\d+)", text)
    version = (int(found[1]), int(found[2])) if found else (11, 0)
    return ";".join(arch for since, archs in ARCHS.items() if version >= since for arch in archs) + "+PTX"


def extensions() -> list[Extension]:
    import pybind11
    from torch.utils import cpp_extension

    system = [pybind11.get_include(), *cpp_extension.include_paths()]  # warnings in these are not ours
    cuda_home = find_cuda()
    facts = {"QFAST_CUDA_TOOLKIT": "none", "QFAST_CUDA_ARCHS": "none"}
    if cuda_home:
        cpp_extension.CUDA_HOME = cuda_home  # None beside a CPU-only torch
        archs = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", cuda_archs(cuda_home))
        facts = {"QFAST_CUDA_TOOLKIT": cuda_home, "QFAST_CUDA_ARCHS": archs}
    macros = [("TORCH_TARGET_VERSION", STABLE_ABI), *((k, f'"{v}"') for k, v in facts.items())]
    flags = ["-O3", "-std=c++20", "-fvisibility=hidden", *(f"-isystem{path}" for path in system)]
    common = {"language": "c++", "library_dirs": cpp_extension.library_paths(), "depends": glob("csrc/*.h*")}
    built = [
        Extension(
            "qfast._C",
            sorted(glob("csrc/*.cpp")),
            define_macros=macros,
            libraries=["torch_cpu"],
            extra_compile_args={"cxx": [*flags, *WARNINGS]},
            **common,
        )
    ]
    if cuda_home:
        # libtorch.so, present in every torch, is what pulls in libtorch_cuda.so on a machine that has it.
        common["library_dirs"] = [*common["library_dirs"], f"{cuda_home}/lib64", f"{cuda_home}/lib"]
        host = [flag for w in WARNINGS for flag in ("-Xcompiler", w)]
        strict = ["-Werror", "all-warnings"] if "-Werror" in WARNINGS else []
        built.append(
            Extension(
                "qfast._cuda",
                sorted(glob("csrc/*.cu")),
                define_macros=[*macros, ("USE_CUDA", None)],
                extra_compile_args={
                    "cxx": flags,
                    "nvcc": [
                        *flags[:2],
                        "-Xcompiler=-fvisibility=hidden",
                        *flags[3:],
                        f"-isystem{cuda_home}/include",
                        *host,
                        *strict,
                    ],
                },
                extra_link_args=["-Wl,--no-as-needed"],
                libraries=["torch", "torch_cpu", "cudart_static", "dl", "rt", "pthread"],
                **common,
            )
        )
    return built


if os.environ.get("QFAST_NATIVE", "1") == "0":
    setup()
else:
    from torch.utils.cpp_extension import BuildExtension

    setup(ext_modules=extensions(), cmdclass={"build_ext": BuildExtension})
