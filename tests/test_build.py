"""The build: libraries that the extension links, the choices of setup.py, and the pure-Python installation."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import qfast
from qfast import _backend

ROOT = Path(__file__).parents[1]
LIBRARIES = _backend._library_files("_C") + _backend._library_files("_cuda")
from_source = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source tree")
TOOLS = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # ninja may be installed next to Python
needs_nm = pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm and readelf (binutils)")
# All symbols of torch that a library may use: the C functions of the stable ABI.
STABLE = re.compile(r"^(aoti_torch_|torch_[a-z0-9_]+$)")


def tool(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def copy_sources(to: Path) -> Path:
    """The source tree without build products."""
    to.mkdir()
    names = ("pyproject.toml", "setup.py", "README.md", "csrc", "qfast")
    skip = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
    for source in (ROOT / name for name in names if (ROOT / name).exists()):
        if source.is_dir():
            shutil.copytree(source, to / source.name, ignore=skip)
        else:
            shutil.copy(source, to)
    return to


@needs_nm
@pytest.mark.parametrize("library", LIBRARIES, ids=lambda p: p.name.split(".")[0])
def test_only_the_stable_abi_of_torch_is_used(library: Path) -> None:
    undefined = [line.split()[-1] for line in tool("nm", "-D", "--undefined-only", str(library)).splitlines()]
    assert any(symbol.startswith("aoti_torch_") for symbol in undefined)
    mangled = [s for s in undefined if re.match(r"_ZNK?(2at|3c10|5torch)", s)]
    assert mangled == []
    torch_like = [s for s in undefined if "torch" in s]
    assert [s for s in torch_like if not STABLE.match(s)] == []


@needs_nm
@pytest.mark.parametrize("library", LIBRARIES, ids=lambda p: p.name.split(".")[0])
def test_no_library_of_cuda_is_needed(library: Path) -> None:
    needed = re.findall(r"NEEDED.*\[(.+)\]", tool("readelf", "-d", str(library)))
    assert not [name for name in needed if "cuda" in name or "python" in name or "c10" in name]
    if library.name.startswith("_cuda"):
        assert "libtorch.so" in needed  # it loads libtorch_cuda.so if there is one
        assert "PyInit" not in tool("nm", "-D", str(library))


def macros_of_later_torches() -> set[str]:
    """Macros that torch's headers define only since a release later than the target of the build."""
    result: set[str] = set()
    for header in Path(torch.__file__).parent.joinpath("include", "torch", "csrc", "stable").rglob("*.h"):
        conditions: list[bool] = []
        for line in header.read_text().splitlines():
            if re.match(r"#\s*if", line):
                conditions.append(bool(re.search(r"TORCH_VERSION_2_1[1-9]_", line)))
            elif re.match(r"#\s*endif", line):
                conditions.pop()
            elif any(conditions) and (define := re.match(r"#\s*define\s+(\w+)", line)):
                result.add(define[1])
    return result


@from_source
def test_no_macro_of_a_later_torch() -> None:
    """With such a macro the sources would not compile against torch 2.10, whatever the target."""
    later = macros_of_later_torches()
    if torch.__version__ >= "2.13":
        assert "STABLE_TORCH_ERROR_CODE_CHECK" in later
    words = {word for path in (ROOT / "csrc").rglob("*.*") for word in re.findall(r"\w+", path.read_text())}
    assert words & later == set()


@from_source
@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"QFAST_CUDA": "yes"}, r"QFAST_CUDA is 'yes', allowed: 0 \(never\), 1 \(or fail\), auto"),
        ({"QFAST_CUDA": "1", "CUDA_HOME": "/nowhere", "PATH": "/nowhere"}, r"QFAST_CUDA=1 but no nvcc"),
    ],
    ids=["bad-value", "no-toolkit"],
)
def test_setup_refuses_cuda_by_request(environment: dict[str, str], message: str) -> None:
    if "CUDA_HOME" in environment and Path("/usr/local/cuda/bin/nvcc").exists():
        pytest.skip("there is a toolkit in /usr/local/cuda")
    command = [sys.executable, "setup.py", "--version"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode != 0
    assert re.search(message, done.stderr)


@from_source
@pytest.mark.skipif(torch.version.cuda is not None, reason="needs a CPU-only torch")
def test_setup_reports_that_a_cpu_only_torch_cannot_load_the_cuda_library(tmp_path: Path) -> None:
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho release 13.0\n")
    nvcc.chmod(0o755)
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libcudart_static.a").touch()

    def errors(choice: str) -> str:
        environment = {**os.environ, "CUDA_HOME": str(tmp_path), "QFAST_CUDA": choice, "QFAST_NATIVE": "1"}
        command = [sys.executable, "setup.py", "--version"]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stderr

    assert re.search(r"CUDA library is not built .* CPU-only build .* QFAST_CUDA=1", errors("auto"))
    assert "CPU-only" not in errors("1")
    assert "CPU-only" not in errors("0")


@from_source
@pytest.mark.skipif(not shutil.which("ninja", path=TOOLS) or not shutil.which("c++"), reason="needs ninja and c++")
def test_a_second_build_recompiles_changed_files(tmp_path: Path) -> None:
    """Each build has another temporary folder, as in pip's editable installs."""
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    sources = {
        "csrc/a.h": "inline int a = 1;",
        "csrc/one.cpp": '#include "a.h"\nint one() { return a; }',
        "csrc/two.cpp": "int two() { return 2; }",
        "csrc/module.cpp": "int module() { return 4; }",
        "csrc/sum/sum_kernels.h": "static int sum() { return 3; }",
        # compiled once per instruction set, so no function may be defined in two units
        "csrc/sum/sum_kernels.cpp": '#include "sum/sum_kernels.h"\nstatic int unit = sum();',
        "qfast/__init__.py": "",
    }
    for name, text in sources.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)

    def build(number: int, **variables: str) -> dict[str, int]:
        command = [sys.executable, "setup.py", "build_ext", "--inplace", "--build-temp", str(tmp_path / f"t{number}")]
        environment = {**os.environ, "QFAST_CUDA": "0", "QFAST_NATIVE": "1", "PATH": TOOLS, **variables}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        return {file.name: file.stat().st_mtime_ns for file in tmp_path.glob("build/objects/*/qfast._C/**/*.o")}

    def changed(after: dict[str, int], before: dict[str, int]) -> set[str]:
        return {name for name in after if after[name] != before[name]}

    first = build(1)
    units = {name for name in first if name.startswith("sum_kernels.")}
    assert "sum_kernels.baseline.o" in units
    assert set(first) == {"module.o", "one.o", "two.o", *units}
    assert build(2) == first
    (tmp_path / "csrc/a.h").write_text("inline int a = 5;")
    third = build(3)
    assert changed(third, first) == {"one.o"}
    (tmp_path / "csrc/sum/sum_kernels.h").write_text("static int sum() { return 7; }")
    assert changed(build(4), third) == units
    # Another Python links the objects and compiles only what depends on Python.
    (objects,) = (tmp_path / "build" / "objects").iterdir()
    other = objects.rename(tmp_path / "other")
    assert set(build(5, QFAST_OBJECTS=str(other))) == {"module.o"}


@from_source
@pytest.mark.skipif(sys.version_info < (3, 11), reason="needs tomllib")
def test_bootstrap_installs_the_build_requirements() -> None:
    import tomllib

    spec = importlib.util.spec_from_file_location("bootstrap", ROOT / "bootstrap.py")
    assert spec is not None
    assert spec.loader is not None
    bootstrap = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bootstrap)
    asked = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    assert bootstrap.build_requirements() == asked


@from_source
@pytest.mark.slow
def test_a_pure_python_wheel_works(tmp_path: Path) -> None:
    """QFAST_NATIVE=0: no compiler, no native library, the plain-torch tier passes its self-test."""
    source = copy_sources(tmp_path / "source")
    environment = {**os.environ, "QFAST_NATIVE": "0", "CXX": "/nowhere", "CC": "/nowhere"}
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", tmp_path, source]
    subprocess.run(command, env=environment, check=True, timeout=600)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as content:
        names = content.namelist()
        content.extractall(tmp_path / "installed")
    assert "qfast/py.typed" in names
    assert not [n for n in names if n.endswith(".so") or n.startswith(("tests", "csrc", "bench"))]
    code = "import qfast.doctor as d; r = d.report(); print(r['healthy'], r['backend']['cpu']['reason'])"
    path = {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}
    done = subprocess.run([sys.executable, "-c", code], env=path, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.startswith("True not built (QFAST_NATIVE=0"), done.stderr


def test_version_is_that_of_the_distribution() -> None:
    from importlib.metadata import version

    if hasattr(qfast, "__version__"):
        assert qfast.__version__ == version("qfast-models")
