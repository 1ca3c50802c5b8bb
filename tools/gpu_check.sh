#!/usr/bin/env bash
# Check a machine with a GPU, by two commands:
#
#     tools/gpu_check.sh tests     # doctor and all tests marked gpu, at most 300 s
#     tools/gpu_check.sh bench     # doctor, bench/bench_gpu.py part by part, compute-sanitizer; at most 360 s
#
# PYTHON selects the interpreter. tools/gpu_check.py describes the options and the results.
cd "$(dirname "$0")/.." || exit 1
# Two threads per process would compete for the cores. Without the workspace setting, cuBLAS and cuDNN may add in
# another order each time.
export OMP_NUM_THREADS=1 CUBLAS_WORKSPACE_CONFIG=:4096:8 PYTHONUNBUFFERED=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
exec "${PYTHON:-python3}" tools/gpu_check.py "$@"
