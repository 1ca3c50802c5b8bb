"""Builds qfast._C (CPU, always) and qfast._cuda (where nvcc is found); everything else is in pyproject.toml.

Environment: QFAST_NATIVE=0 builds neither (plain-torch tier, no compiler); QFAST_CUDA=0 skips _cuda, 1 fails
without it; QFAST_WERROR=1 has warnings fail; CUDA_HOME, MAX_JOBS, TORCH_CUDA_ARCH_LIST are torch's own.
"""

import fcntl
import hashlib
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


def in_csrc(pattern: str) -> list[str]:
    """Files of csrc and its folders, one for each operator."""
    return sorted(glob(f"csrc/**/{pattern}", recursive=True))


def extensions() -> list[Extension]:
    cuda_home = find_cuda()  # first: a wrong QFAST_CUDA is named even where the packages below are missing
    import pybind11
    import torch
    from torch.utils import cpp_extension

    system = [pybind11.get_include(), *cpp_extension.include_paths()]  # warnings in these are not ours
    flags = ["-O3", "-std=c++20", *(flag for path in system for flag in ("-isystem", path))]
    flags.append(f"-I{os.path.abspath('csrc')}")
    cxx = [*flags, "-g0", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden", *WARNINGS]  # sqrt in vectors
    tools = subprocess.getoutput(f"{cpp_extension.get_cxx_compiler()} --version; {cuda_home}/bin/nvcc --version")
    if cuda_home:
        cpp_extension.CUDA_HOME = cuda_home  # None beside a CPU-only torch
        release = tuple(map(int, re.findall(r"release (\d+)\.(\d+)", tools)[-1]))
        archs = [arch for since, known in ARCHS.items() if since <= release for arch in known]
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ";".join(archs) + "+PTX")  # the newest's PTX serves later ones
    unseen = repr((torch.version.git_version, pybind11.__version__, tools)).encode()  # by ninja: so in all commands
    facts = {"QFAST_CUDA_TOOLKIT": cuda_home or "none", "QFAST_TOOLS": hashlib.sha256(unseen).hexdigest()}
    facts["QFAST_CUDA_ARCHS"] = os.environ["TORCH_CUDA_ARCH_LIST"] if cuda_home else "none"
    macros = [("TORCH_TARGET_VERSION", STABLE_ABI), *((k, f'"{v}"') for k, v in facts.items())]
    paths, headers = cpp_extension.library_paths(), [*in_csrc("*.h"), *in_csrc("*.cuh")]
    built = [Extension("qfast._C", in_csrc("*.cpp"), define_macros=macros, library_dirs=paths, language="c++",
                       libraries=["torch_cpu"], extra_compile_args={"cxx": cxx}, depends=headers)]  # fmt: skip
    if cuda_home:
        nvcc = [*flags, "-isystem", f"{cuda_home}/include", "-Xcompiler", ",".join(cxx[len(flags) :])]
        nvcc += ["-Werror", "all-warnings"] if "-Werror" in WARNINGS else []
        link = ["-Wl,--no-as-needed", "-ltorch"]  # libtorch.so brings in libtorch_cuda.so where there is one
        read = hashlib.sha256(b"".join(Path(h).read_bytes() for h in headers))  # nvcc's, ninja may not know
        built += [Extension("qfast._cuda", in_csrc("*.cu"), extra_link_args=link, depends=headers,
                            define_macros=[*macros, ("USE_CUDA", None), ("QFAST_HEADERS", read.hexdigest())],
                            library_dirs=[*paths, f"{cuda_home}/lib64", f"{cuda_home}/lib"], language="c++",
                            libraries=["torch_cpu", "cudart_static", "dl", "rt", "pthread"],
                            extra_compile_args={"cxx": cxx, "nvcc": nvcc})]  # fmt: skip
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
            self.build_temp = os.path.abspath(f"build/objects/{sys.implementation.cache_tag}/{ext.name}")
            os.makedirs(self.build_temp, exist_ok=True)  # it lasts, pip's does not; x.cpp and x.cu both become x.o
            with open(f"{self.build_temp}/lock", "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # another build at the same time waits, and finds it all done
                super().build_extension(ext)

    return Build


native = os.environ.get("QFAST_NATIVE", "1") != "0"
setup(**({"ext_modules": extensions(), "cmdclass": {"build_ext": build_command()}} if native else {}))
