#!/usr/bin/env bash
# Install a wheel into a fresh environment without a compiler and use it:
#
#     tools/check_wheel.sh dist/cpu/qfast_models-*.whl .venv/bin/python
#
# The second argument is a Python whose installed packages (torch and so on) the environment uses, so nothing is
# downloaded. qfast itself comes from the wheel only. The PATH contains the environment and no compiler.
set -euo pipefail
wheel=$(realpath "$1") python=$2
tests=$(realpath "$(dirname "$0")/..")/tools/wheel_smoke.py
folder=$(mktemp -d)
original=$PATH # the environment's PATH has no rm
trap 'PATH=$original rm -rf "$folder"' EXIT
"$python" -m venv "$folder/env"
packages=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
target=$("$folder/env/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
echo "$packages" >"$target/packages.pth" # its own .pth files, for example of an editable install, are not read
# --ignore-installed: the packages of that Python may include a qfast.
"$folder/env/bin/python" -m pip install --quiet --no-deps --no-index --ignore-installed "$wheel"
cd "$folder"
export PATH=$folder/env/bin MPLBACKEND=Agg
unset PYTHONPATH CXX CC
for tool in cc c++ gcc g++ clang clang++ nvcc; do
  if command -v "$tool" >/dev/null; then
    echo "$tool is on the PATH" >&2
    exit 1
  fi
done
qfast doctor --json >doctor.json
began=$SECONDS
qfast demo --output demo --quiet
echo "demo: $((SECONDS - began)) s"
python "$tests" doctor.json
