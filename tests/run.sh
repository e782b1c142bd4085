#!/usr/bin/env bash
# Sets up the environment and runs every check: tests/run.sh [--fast] [pytest arguments]
#   --fast   leaves out the tests marked slow (under 5 minutes on 2 cores instead of under 25)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fast=()
if [ "${1:-}" = --fast ]; then
    fast=(-m "not slow and not gpu")
    shift
fi
source tools/setup_environment.sh dev

# Two processes of one thread each are faster than one of two on models this small.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export CUDA_VISIBLE_DEVICES="" # these tests run on the CPU everywhere; tests/gpu/run.sh is for the GPU

if [ $# -eq 0 ]; then
    ruff check .
    ruff format --check .
    mypy
    git ls-files -z '*.sh' '*.sbatch' .ci/run | xargs -0 -r shellcheck --severity=warning
    hadolint Dockerfile
fi
python -m pytest -q -n "${MIDUS_TEST_WORKERS:-2}" --dist loadfile --durations=15 ${fast[@]+"${fast[@]}"} "$@"
