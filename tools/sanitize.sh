#!/usr/bin/env bash
# Build the C++ library with AddressSanitizer and UndefinedBehaviorSanitizer, then run the operators' tests and random
# calls of all operators with it.
#
#     tools/sanitize.sh [--minutes 2] [--isa avx2] [--seed 0] [--build-only] [pytest arguments...]
#
# A copy of the sources is built in build/sanitized, with less optimization and for one instruction set, and the library
# in qfast/ stays as it is. The build takes two minutes on two cores; later builds compile only what changed. Every
# report of a sanitizer ends the process and thus fails the script. Test files that need minutes are left out unless
# pytest arguments select them.
#
# Environment variables: PYTHON (python), MAX_JOBS (all cores), CXX (g++).
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python} minutes=2 isa=avx2 seed=0 build_only=
tests=()
while [ $# -gt 0 ]; do
  case $1 in
    --minutes) minutes=$2; shift 2 ;;
    --isa) isa=$2; shift 2 ;;
    --seed) seed=$2; shift 2 ;;
    --build-only) build_only=1; shift ;;
    *) tests+=("$1"); shift ;;
  esac
done
if [ ${#tests[@]} = 0 ]; then
  for file in tests/test_ops_*.py tests/test_operator_cases.py tests/test_optim.py tests/test_philox.py; do
    case $file in
      *_cuda.py | *test_ops_memory.py) ;; # kernels of a GPU; limits on the address space, which AddressSanitizer needs
      *) tests+=("$file") ;;
    esac
  done
fi

tree=build/sanitized/$isa
mkdir -p "$tree"
# Unchanged files keep their time stamps, so ninja compiles only what changed.
for part in qfast csrc tests tools bench setup.py pyproject.toml README.md LICENSE; do
  cp -ru --preserve=timestamps "$part" "$tree"
done
rm -f "$tree"/qfast/_C*.so "$tree"/qfast/_cuda*.so
cd "$tree"
export QFAST_CUDA=0 QFAST_ISAS=$isa QFAST_SANITIZE=address,undefined
"$python" setup.py -q build_ext --inplace >build.log 2>&1 || { cat build.log; exit 1; }
[ -z "$build_only" ] || exit 0

compiler=${CXX:-g++}
library() { "$compiler" -print-file-name="$1"; }
export LD_PRELOAD="$(library libasan.so) $(library libubsan.so) $(library libstdc++.so)"
# Python and torch free little at exit. An allocation that fails must raise an error in C++, as it does without a
# sanitizer.
export ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:max_allocation_size_mb=8192:abort_on_error=1
export UBSAN_OPTIONS=print_stacktrace=1
export PYTHONPATH=. OMP_NUM_THREADS=2 QFAST_BACKEND=cpu QFAST_CACHE_MB=0 # no reuse of memory, so every access beyond a buffer is seen
echo "== tests with $isa kernels under AddressSanitizer and UndefinedBehaviorSanitizer"
"$python" -m pytest -q -p no:cacheprovider "${tests[@]}"
echo "== $minutes minutes of random operator calls"
"$python" tools/torture.py --parts operators --minutes "$minutes" --seed "$seed" --sanitized
