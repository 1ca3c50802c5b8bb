#!/usr/bin/env bash
# Run every check that needs a GPU. Requires nvcc and a CUDA build of torch; takes less than ten minutes:
#
#     tools/gpu_check.sh [FOLDER]        # default: gpu_check
#
# Builds both libraries for this GPU, runs every test marked gpu (one process per file, several at a time), and runs
# every kernel on small shapes under compute-sanitizer's memcheck, racecheck and initcheck. FOLDER/results.txt describes
# the machine and the outcome of each part; FOLDER also has one log per part. The exit status is 1 if any part failed.
# PYTHON selects the interpreter, JOBS the number of test files that run at a time.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(mkdir -p "${1:-gpu_check}" && cd "${1:-gpu_check}" && pwd)
python=${PYTHON:-python3}
results=$out/results.txt
failed=0
export QFAST_CUDA=1 MAX_JOBS=${MAX_JOBS:-$(nproc)} PYTHONUNBUFFERED=1 OMP_NUM_THREADS=2

say() { printf '%s\n' "$*" | tee -a "$results"; }
# part NAME SECONDS COMMAND...: run a command with a time limit, log to NAME.log, add a line to results.txt
part() {
  local name=$1 limit=$2 began=$SECONDS status=0
  shift 2
  timeout "$limit" "$@" >"$out/$name.log" 2>&1 || status=$?
  say "$(printf '%-28s %s  %3d s  %s' "$name" "$([ $status = 0 ] && echo ok || echo "FAILED ($status)")" \
    $((SECONDS - began)) "$(tail -n 1 "$out/$name.log" | cut -c1-100)")"
  return $status
}

: >"$results"
say "qfast on a GPU, $(date -u +%Y-%m-%dT%H:%MZ), $(git rev-parse --short HEAD 2>/dev/null || echo 'no git')"
"$python" - <<'PY' 2>&1 | tee -a "$results"
import platform, setuptools, torch
print("torch", torch.__version__, "CUDA", torch.version.cuda, "python", platform.python_version())
if int(setuptools.__version__.split(".")[0]) < 77:
    raise SystemExit(f"setuptools {setuptools.__version__} cannot read pyproject.toml. Remedy: setuptools 77 or newer")
if not torch.cuda.is_available():
    raise SystemExit("torch sees no GPU")
for i in range(torch.cuda.device_count()):
    p = torch.cuda.get_device_properties(i)
    print(f"cuda:{i}", p.name, f"sm_{p.major}{p.minor}", p.multi_processor_count, "multiprocessors", p.total_memory >> 20, "MiB")
PY
[ "${PIPESTATUS[0]}" = 0 ] || exit 1
nvcc --version | tail -n 2 | tee -a "$results"
nvidia-smi --query-gpu=driver_version --format=csv,noheader | tee -a "$results"
TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')}
export TORCH_CUDA_ARCH_LIST

# A build in place downloads and installs nothing.
part build 300 "$python" setup.py build_ext --inplace || exit 1
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
part doctor 60 "$python" -m qfast.doctor || failed=1

files=$(grep -lE 'mark\.gpu|needs_kernels' tests/test_*.py)
for file in $files; do
  while [ "$(jobs -rp | wc -l)" -ge "${JOBS:-4}" ]; do wait -n || failed=1; done
  part "$(basename "$file" .py)" 240 "$python" -m pytest -q -m "gpu and not slow" -p no:cacheprovider "$file" &
done
while [ "$(jobs -rp | wc -l)" -gt 0 ]; do wait -n || failed=1; done

# sanitize TOOL [FILTER...]: run the kernels under a tool of compute-sanitizer
sanitize() {
  local tool=$1
  shift
  # Without caching, each tensor is its own allocation, so an access outside a tensor is detected.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 part "sanitizer_$tool" 120 compute-sanitizer --tool "$tool" --error-exitcode 9 "$@" \
    "$python" tools/gpu_kernels.py
}
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck initcheck; do
    sanitize $tool --kernel-regex kns=qfast && continue
    # If this release does not support the filter for qfast's kernels, check all kernels.
    if ! grep -q 'SUMMARY' "$out/sanitizer_$tool.log"; then sanitize $tool && continue; fi
    failed=1
  done
else
  say "compute-sanitizer is not on the PATH and was not run"
  failed=1
fi
say "$([ $failed = 0 ] && echo 'all ok' || echo 'some parts failed, see the logs')  ${SECONDS} s"
exit $failed
