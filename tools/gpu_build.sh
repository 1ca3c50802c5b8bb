#!/usr/bin/env bash
# Build both libraries for a machine with a GPU that has no network. This machine needs nvcc but no GPU:
#
#     tools/gpu_build.sh                 # for Python 3.12, torch 2.11 and sm_90
#
# A build on that machine would take minutes of its time, mostly for the C++ library. Only the C++ library depends
# on the version of Python. Neither depends on the version of torch, because both use its stable ABI.
# The script prints the files to copy into the source tree of the other machine. One of them holds the checksums of the
# libraries and of their sources, with which tools/gpu_check.sh detects libraries of another version.
#
# PYTHON selects the interpreter: one that can import torch is used as it is. Any other (default: python3.12) becomes a
# virtual environment in build/gpu_python, into which pip installs torch with its CUDA libraries (4.5 GB on disk).
# TORCH selects the version of torch in that environment (2.11.0), TORCH_CUDA_ARCH_LIST the GPU (9.0), and MAX_JOBS the
# number of compilers that run at the same time.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3.12}
export PYENV_VERSION=${PYENV_VERSION:-3.12} # where python3.12 is a command of pyenv
export QFAST_CUDA=1 TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-9.0} MAX_JOBS=${MAX_JOBS:-$(nproc)}

if ! "$python" -c 'import torch' 2>/dev/null; then
  if ! "$python" -c 'import venv' 2>/dev/null; then
    echo "$python does not run. Remedy: set PYTHON to an interpreter of the version that the other machine has" >&2
    exit 1
  fi
  [ -x build/gpu_python/bin/python ] || "$python" -m venv build/gpu_python
  python=build/gpu_python/bin/python
  # torch 2.11 requires setuptools below 82, and pyproject.toml requires 77.
  "$python" -m pip install --quiet --no-compile "torch==${TORCH:-2.11.0}" 'setuptools>=77,<82' wheel ninja \
    'pybind11>=2.13' numpy pandas safetensors
fi
bin=$("$python" -c 'import sysconfig; print(sysconfig.get_path("scripts"))')
export PATH=$bin:$PATH # setup.py finds ninja there

began=$SECONDS log=build/gpu_build.log
mkdir -p build
if ! "$python" setup.py build_ext --inplace >"$log" 2>&1; then
  grep -E 'error|Error' "$log" | head -n 20 >&2
  echo "the build failed, see $log" >&2
  exit 1
fi
echo "built in $((SECONDS - began)) s"
suffix=$("$python" -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')
libraries=(qfast/_C"$suffix" qfast/_cuda"$suffix")

# Both libraries must load here too, although the kernels cannot run.
PYTHONPATH=$PWD "$python" - "${libraries[1]}" <<'PY'
import platform, sys
import torch
from qfast import _backend, doctor

facts = doctor.report()
if not (_backend.native and facts["healthy"]):
    raise SystemExit(f"the C++ library is not usable: {facts['backend']['cpu']['reason']} {facts['self_test']}")
torch.ops.load_library(sys.argv[1])
kernels = [name for name in torch._C._dispatch_get_registrations_for_dispatch_key("CUDA") if name.startswith("qfast::")]
if not kernels:
    raise SystemExit(f"{sys.argv[1]} loads but registers no kernel")
print(f"both load under Python {platform.python_version()} and torch {torch.__version__}; self-tests on the CPU pass")
PY

"$python" tools/library_checksums.py
echo "Copy these files to the same places in the source tree of the machine with the GPU:"
du -h "${libraries[@]}" qfast/_libraries.sha256
