#!/usr/bin/env bash
# Sets up the environment and runs every check: tests/run.sh [--fast] [pytest arguments]
#   --fast   leaves out the tests marked slow (all of them take about 19 minutes on 2 idle cores)
# MIDUS_TEST_WORKERS: processes that share the tests (default: 2, for 2 cores)
# MIDUS_COVERAGE=1: also the share of lines that unit tests execute; they then take a third longer
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fast=()
if [ "${1:-}" = --fast ]; then
    fast=(-m "not slow and not gpu")
    shift
fi
source tools/setup_environment.sh dev

# Processes of one thread each are faster than one of several on models this small.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export CUDA_VISIBLE_DEVICES="" # these tests run on the CPU everywhere; tests/gpu/run.sh is for the GPU

if [ $# -eq 0 ]; then
    ruff check .
    ruff format --check .
    mypy
    git ls-files -z '*.sh' '*.sbatch' .ci/run | xargs -0 -r shellcheck --severity=warning
    hadolint Dockerfile
fi
if [ "${MIDUS_COVERAGE:-}" = 1 ]; then
    COVERAGE_FILE="$(mktemp -d)/coverage"
    export COVERAGE_FILE
    trap 'rm -rf "${COVERAGE_FILE%/*}"' EXIT
fi
# In the order of the directories, process tests first: the many short unit tests then keep all workers busy to the end.
python -m pytest -q -n "${MIDUS_TEST_WORKERS:-2}" --dist loadfile --no-loadscope-reorder --durations=15 ${fast[@]+"${fast[@]}"} "$@"
if [ "${MIDUS_COVERAGE:-}" = 1 ]; then
    coverage combine --quiet
    printf 'unit tests alone, kernels left out, execute %s %% of the lines of megatron_midus\n' "$(coverage report --format=total)"
fi
