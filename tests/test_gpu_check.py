"""tools/gpu_check.sh and gpu_build.sh on a tree of stub programs: order, time limits, failures and results."""

from __future__ import annotations

import ast
import importlib
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tarfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
TOOLS = ROOT / "tools"
pytestmark = pytest.mark.skipif(os.name == "nt", reason="a shell script")

TORCH = """
__version__ = "0.0"
class version:
    cuda = "0.0"
class cuda:
    is_available = staticmethod(lambda: True)
    device_count = staticmethod(lambda: 0)
    get_device_capability = staticmethod(lambda: (9, 0))
"""
HEALTHY = "print('  qfast._C: loaded\\n  qfast._cuda: loaded\\n\\nhealthy')\n"
NOT_BUILT = """
import os, sys
if not os.path.exists("built"):
    print("  qfast._C: loaded\\n  qfast._cuda: not loaded: qfast was built without nvcc")
    sys.exit()
"""
BROKEN = "print('  lstm (cuda)  FAILED: RuntimeError: no kernel image')\n" + HEALTHY + "raise SystemExit(1)\n"
TEST = """
import pathlib, time, pytest
@pytest.MARK
@pytest.mark.parametrize("number", range(2))
def test_one(number):
    with open("order.txt", "a") as order:
        order.write(pathlib.Path(__file__).name + "\\n")
    BODY
""".replace("MARK", ".".join(["mark", "gpu"]))  # gpu_check.py must not mistake this file for one with such tests
BENCH = """
import sys
part = sys.argv[sys.argv.index("--only") + 1]
with open("order.txt", "a") as order:
    order.write(part + "\\n")
print(f"| case of {part} | 3 us |")
if part == "tcn":
    print("| other case of tcn | FAILED: RuntimeError |")
    sys.exit(1)
"""


def load(name: str) -> Any:
    """A module of tools."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(TOOLS))
        return importlib.import_module(name)


class Tree:
    """A source tree in which all programs but tools/gpu_check are stubs."""

    def __init__(self, root: Path) -> None:
        self.root, self.out = root, root / "out"
        for name in ("gpu_build.sh", "gpu_check.sh", "gpu_check.py", "library_checksums.py"):
            self.write(f"tools/{name}", (TOOLS / name).read_text())
            (root / "tools" / name).chmod(0o755)
        self.write("torch.py", TORCH)
        self.write("numpy.py", "__version__ = '0.0'")
        self.write("setuptools.py", "__version__ = '80.0'")
        self.write("setup.py", "open('built', 'w').close()")
        self.write("csrc/one.cu", "")
        self.write("qfast/__init__.py", "")
        self.write("qfast/doctor.py", HEALTHY)
        self.write("pytest.ini", "[pytest]\nmarkers =\n    gpu\n    slow\n")
        for name in ("aaa", "ops_attention_cuda", "estimators_cuda"):
            self.write(f"tests/test_{name}.py", TEST.replace("BODY", ""))
        self.write("bench/bench_gpu.py", BENCH)
        self.write("tools/gpu_kernels.py", "")
        self.stub("nvidia-smi", "echo 580.0")

    def write(self, path: str, text: str) -> None:
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_text(text)

    def set(self, constant: str, value: int) -> None:
        """Give a constant of gpu_check.py another value."""
        path = self.root / "tools" / "gpu_check.py"
        text, count = re.subn(rf"^{constant} = .*$", f"{constant} = {value}", path.read_text(), flags=re.MULTILINE)
        assert count == 1
        path.write_text(text)

    def stub(self, name: str, script: str) -> None:
        """A command on the PATH."""
        self.write(f"bin/{name}", f"#!/bin/sh\n{script}\n")
        (self.root / "bin" / name).chmod(0o755)

    def start(self, *command: str) -> subprocess.Popen[str]:
        environment: Mapping[str, str] = {
            **os.environ,
            "PATH": f"{self.root / 'bin'}:/usr/bin:/bin",
            "PYTHON": sys.executable,
            "OUT": str(self.out),
            "PYTHONPATH": str(self.root),  # the stub of torch
        }
        program = str(self.root / "tools" / command[0])
        return subprocess.Popen(
            [program, *command[1:]], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def run(self, *arguments: str) -> tuple[int, str]:
        """Exit status and output of gpu_check.sh."""
        return self.output(self.start("gpu_check.sh", *arguments))

    @staticmethod
    def output(process: subprocess.Popen[str]) -> tuple[int, str]:
        output, _ = process.communicate(timeout=400)
        return process.returncode, output

    def order(self) -> list[str]:
        """The parts in the order in which they ran."""
        lines = (self.root / "order.txt").read_text().split() if (self.root / "order.txt").exists() else []
        return [line for line, before in zip(lines, [None, *lines], strict=False) if line != before]

    def archived(self, command: str) -> dict[str, str]:
        """The logs in $OUT, by name."""
        with tarfile.open(self.out / f"{command}.tar.gz") as tar:
            files = [member for member in tar.getmembers() if member.isfile()]
            return {Path(member.name).name: tar.extractfile(member).read().decode() for member in files}


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


def state_of(part: str, output: str) -> str:
    """The outcome of a part in the results."""
    line = re.search(rf"^{part} +(ok|FAILED \(-?\d+\)|not finished)", output, re.MULTILINE)
    assert line is not None, output
    return line[1]


# ---------------------------------------------------------------- doctor and build
def test_all_tests_pass(tree: Tree) -> None:
    status, output = tree.run("tests")
    assert status == 0, output
    assert state_of("doctor", output) == state_of("test_aaa", output) == "ok"
    assert "no test failed" in output
    assert not (tree.root / "built").exists()
    assert sorted(path.name for path in tree.out.iterdir()) == ["tests.tar.gz", "tests.txt"]
    assert (tree.out / "tests.txt").read_text() in output
    logs = tree.archived("tests")
    assert "2 passed" in logs["test_aaa.log"]
    assert logs["results.txt"].splitlines()[:5] == output.splitlines()[:5]


@pytest.mark.parametrize("command", ["tests", "bench"])
def test_an_unhealthy_doctor_ends_the_check_with_its_first_error(tree: Tree, command: str) -> None:
    tree.write("qfast/doctor.py", BROKEN)
    status, output = tree.run(command)
    assert status == 1
    assert state_of("doctor", output) == "FAILED (1)"
    last = output.splitlines()[-1]
    assert last == "stopped: doctor is not healthy: lstm (cuda)  FAILED: RuntimeError: no kernel image"
    assert tree.order() == []
    assert (tree.out / f"{command}.txt").read_text().endswith(f"{last}\n")


def test_a_missing_library_is_built(tree: Tree) -> None:
    tree.write("qfast/doctor.py", NOT_BUILT + HEALTHY)
    status, output = tree.run("tests")
    assert status == 0, output
    assert "qfast._cuda: not loaded: qfast was built without nvcc" in output
    assert state_of("build", output) == "ok"
    assert (tree.root / "qfast" / "_libraries.sha256").exists()


def test_a_build_that_fails_ends_the_check(tree: Tree) -> None:
    tree.write("qfast/doctor.py", NOT_BUILT + HEALTHY)
    tree.write("setup.py", "print('one.cu(3): error: expected a ;'); raise SystemExit(1)")
    status, output = tree.run("tests")
    assert status == 1
    assert output.splitlines()[-1] == "stopped: build: one.cu(3): error: expected a ;"
    assert tree.order() == []


def test_libraries_of_other_sources_are_built_again(tree: Tree) -> None:
    subprocess.run([sys.executable, str(tree.root / "tools" / "library_checksums.py")], check=True)
    assert tree.run("bench")[0] == 1  # tcn fails
    assert not (tree.root / "built").exists()
    tree.write("csrc/one.cu", "changed")
    _, output = tree.run("bench")
    assert "the libraries are of other sources: csrc/one.cu" in output
    assert (tree.root / "built").exists()
    (tree.root / "built").unlink()
    assert "of other sources" not in tree.run("bench")[1]
    assert not (tree.root / "built").exists()


def test_checksums_detect_every_kind_of_change(tmp_path: Path) -> None:
    module = load("library_checksums")
    library = f"qfast/_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    for name in ("csrc/a.cu", "csrc/op/b.h", "setup.py", library):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert module.differences(tmp_path) == []  # there are no checksums yet
    module.write(tmp_path)
    assert module.differences(tmp_path) == []
    (tmp_path / library).write_text("truncated")
    (tmp_path / "csrc" / "a.cu").unlink()
    (tmp_path / "csrc" / "new.cu").touch()
    assert module.differences(tmp_path) == sorted(["csrc/a.cu", "csrc/new.cu", library])


# ---------------------------------------------------------------- the build beforehand
COMPILE = """
import sysconfig
for stem in ("_C", "_cuda"):
    open("qfast/" + stem + sysconfig.get_config_var("EXT_SUFFIX"), "w").close()
"""
LOADS = """
class ops:
    load_library = staticmethod(open)
class _C:
    _dispatch_get_registrations_for_dispatch_key = staticmethod(lambda key: ["aten::add", "qfast::lstm"])
"""


def test_the_build_prints_the_files_to_bring_along(tree: Tree) -> None:
    tree.write("torch.py", TORCH + LOADS)
    tree.write("setup.py", COMPILE)
    tree.write("qfast/_backend.py", "native = True")
    tree.write("qfast/doctor.py", "def report(): return {'healthy': True}")
    status, output = tree.output(tree.start("gpu_build.sh"))
    assert status == 0, output
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    files = [line.split()[1] for line in output.splitlines()[-3:]]
    assert files == [f"qfast/_C{suffix}", f"qfast/_cuda{suffix}", "qfast/_libraries.sha256"]
    assert load("library_checksums").differences(tree.root) == []
    tree.write("torch.py", TORCH + LOADS.replace('"qfast::lstm"', ""))
    status, output = tree.output(tree.start("gpu_build.sh"))
    assert status == 1
    assert "loads but registers no kernel" in output


def test_a_failed_build_prints_the_errors_of_the_compiler(tree: Tree) -> None:
    tree.write("setup.py", "print('compiling\\none.cu(3): error: expected a ;\\nstopped'); raise SystemExit(1)")
    status, output = tree.output(tree.start("gpu_build.sh"))
    assert status == 1
    assert output == "one.cu(3): error: expected a ;\nthe build failed, see build/gpu_build.log\n"
    assert not (tree.root / "qfast" / "_libraries.sha256").exists()


# ---------------------------------------------------------------- tests
def test_long_files_start_first(tree: Tree) -> None:
    tree.set("JOBS", 1)
    assert tree.run("tests")[0] == 0
    assert tree.order() == ["test_estimators_cuda.py", "test_ops_attention_cuda.py", "test_aaa.py"]


def test_failing_tests_are_the_last_lines(tree: Tree) -> None:
    tree.write("tests/test_ops_attention_cuda.py", TEST.replace("BODY", "assert number == 0"))
    status, output = tree.run("tests")
    assert status == 1
    assert state_of("test_ops_attention_cuda", output) == "FAILED (1)"
    assert state_of("test_aaa", output) == "ok"
    lines = output.splitlines()
    assert lines[-3] == "failing tests:"
    assert lines[-2].startswith("FAILED tests/test_ops_attention_cuda.py::test_one[1]")
    assert lines[-1] == "tests: 6 parts, 1 failed, 0 not finished"


def test_a_file_that_runs_out_of_time_is_not_finished(tree: Tree) -> None:
    body = "assert number == 1\n    time.sleep(1000)"
    tree.write("tests/test_ops_attention_cuda.py", TEST.replace("BODY", body))
    tree.set("TEST_SECONDS", 20)
    status, output = tree.run("tests")
    assert status == 2
    assert state_of("test_ops_attention_cuda", output) == "not finished"
    assert "FAILED tests/test_ops_attention_cuda.py::test_one[0]" in output.splitlines()[-2]


def test_a_check_without_time_for_its_first_part_says_so(tree: Tree) -> None:
    status, output = tree.run("tests", "--seconds", "0.5")
    assert status == 1
    assert state_of("machine", output) == "not finished"
    assert output.splitlines()[-1] == "stopped: machine: no output"


# ---------------------------------------------------------------- benchmarks and compute-sanitizer
def test_benchmarks_run_in_order_and_a_failing_one_does_not_stop_the_others(tree: Tree) -> None:
    tree.stub("compute-sanitizer", 'echo "$*" >>sanitizer.txt')
    status, output = tree.run("bench")
    assert status == 1
    assert tree.order() == ["step", "recurrent", "tcn", "encoder", "attention", "gather", "adam", "ways"]
    assert state_of("bench_tcn", output) == "FAILED (1)"
    assert state_of("bench_ways", output) == "ok"
    results = (tree.out / "bench.txt").read_text()
    assert "| other case of tcn | FAILED: RuntimeError |\n" in results
    assert "| case of ways | 3 us |\n" in results
    tools = re.findall(r"--tool (\w+)", (tree.root / "sanitizer.txt").read_text())
    assert tools == ["memcheck", "racecheck", "initcheck"]
    assert sorted(path.name for path in tree.out.iterdir()) == ["bench.tar.gz", "bench.txt"]


def test_a_sanitizer_that_does_not_work_here_is_not_a_failure(tree: Tree) -> None:
    tree.write("bench/bench_gpu.py", "")
    status, output = tree.run("bench")
    assert status == 0
    assert "compute-sanitizer is not on the PATH and was not run" in output
    tree.stub("compute-sanitizer", "echo Device not supported; exit 255")
    status, output = tree.run("bench")
    assert status == 0
    assert "compute-sanitizer does not work on this machine and was not run" in output
    assert "Device not supported" in tree.archived("bench")["sanitizer_probe.log"]


def test_a_sanitizer_without_the_filter_checks_all_kernels(tree: Tree) -> None:
    tree.write("bench/bench_gpu.py", "")
    tree.stub("compute-sanitizer", 'case "$*" in *kernel-regex*) exit 1;; esac; echo "$*" >>sanitizer.txt')
    status, _ = tree.run("bench")
    assert status == 0
    assert (tree.root / "sanitizer.txt").read_text().count("--tool") == 3


def test_errors_that_a_sanitizer_finds_are_failures(tree: Tree) -> None:
    tree.write("bench/bench_gpu.py", "")
    tree.stub("compute-sanitizer", 'case "$*" in *racecheck*) exit 9;; esac')
    status, output = tree.run("bench")
    assert status == 1
    assert state_of("sanitizer_memcheck", output) == state_of("sanitizer_initcheck", output) == "ok"
    assert state_of("sanitizer_racecheck", output) == "FAILED (9)"


# ---------------------------------------------------------------- ends from outside
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_results_survive_the_end_of_the_program(tree: Tree, number: signal.Signals) -> None:
    sleeper = (
        "import os, time; open('pid', 'w').write(str(os.getpid())); print('| begun |', flush=True); time.sleep(99)"
    )
    tree.write("bench/bench_gpu.py", BENCH + f"\nif part == 'recurrent':\n    {sleeper}\n")
    process = tree.start("gpu_check.sh", "bench")
    deadline = time.monotonic() + 60
    while not (tree.root / "pid").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.2)
    process.send_signal(number)
    if number == signal.SIGKILL:  # nobody is left to end the part
        os.kill(int((tree.root / "pid").read_text()), signal.SIGKILL)
    process.communicate(timeout=30)
    results = (tree.out / "bench.txt").read_text()
    assert "| case of step | 3 us |" in results
    assert "| case of step | 3 us |" in tree.archived("bench")["bench_step.log"]
    if number == signal.SIGTERM:
        assert process.returncode == 1
        assert results.endswith("stopped: interrupted by SIGTERM\n")
        assert state_of("bench_recurrent", results) == "not finished"
        assert "| begun |" in tree.archived("bench")["bench_recurrent.log"]
        with pytest.raises(ProcessLookupError):
            os.kill(int((tree.root / "pid").read_text()), 0)


# ---------------------------------------------------------------- the machine that runs it
# A machine with a GPU may lack these, because only the command line and workflows need them.
ABSENT = ("qfast.workflow", "qfast.cli", "pydantic", "ruamel", "qlib")
COLLECT = """
import importlib.abc, sys
import pytest
absent = sys.argv[1].split(",")
class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if any(f"{name}.".startswith(f"{other}.") for other in absent):
            raise ImportError(f"{name} is not on this machine")
sys.meta_path.insert(0, Refuse())
sys.path[:0] = ["bench", "tools"]
import bench_gpu, gpu_kernels, qfast.doctor
sys.exit(pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", "-m", "gpu and not slow", *sys.argv[2:]]))
"""


def test_gpu_tests_and_benchmarks_do_without_the_workflow() -> None:
    files = [str(path) for path in load("gpu_check").gpu_test_files()]
    assert len(files) > 8
    assert __file__ not in files  # pytest fails if it selects no test of a file
    command = [sys.executable, "-c", COLLECT, ",".join(ABSENT), *files]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_function_of_them_imports_the_workflow_later() -> None:
    files = {*load("gpu_check").gpu_test_files(), *(ROOT / "bench" / name for name in ("bench_gpu.py", "gpu_cases.py"))}
    files |= {ROOT / "tests" / "conftest.py", ROOT / "tools" / "gpu_kernels.py"}
    waiting = [*files]
    while waiting:  # the helpers that they import
        new = {ROOT / "tests" / "support" / f"{name}.py" for name in helpers_of(waiting.pop())} - files
        files |= new
        waiting += new
    assert len(files) > 20
    absent = ABSENT[:-1]  # the helpers import qlib where it is installed
    found = [f"{file.name}: {name}" for file in sorted(files) for name in imports_of(file) if name.startswith(absent)]
    assert found == []


def imports_of(file: Path) -> list[str]:
    """All modules that a file imports, also within functions."""
    nodes = list(ast.walk(ast.parse(file.read_text())))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    froms = [node for node in nodes if isinstance(node, ast.ImportFrom)]
    return [*names, *(f"{node.module}.{alias.name}" for node in froms for alias in node.names)]


def helpers_of(file: Path) -> list[str]:
    """The modules of tests/support that a file imports."""
    return [name.split(".")[1] for name in imports_of(file) if name.startswith("support.")]


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
@pytest.mark.parametrize("script", ["gpu_check.sh", "gpu_build.sh"])
def test_the_shell_accepts_the_scripts(script: str) -> None:
    subprocess.run(["bash", "-n", str(TOOLS / script)], check=True)
