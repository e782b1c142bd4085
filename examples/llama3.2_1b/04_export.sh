#!/usr/bin/env bash
# Llama-3.2-1B: last checkpoint -> Hugging Face model.
# Settings come from the environment: see examples/launch/common.sh. --tiny tries it on a CPU.
set -euo pipefail
# shellcheck source=examples/launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../launch/common.sh"
begin llama3.2_1b "$@"

need "$WORK/checkpoints/latest_checkpointed_iteration.txt" "run 03_cpt.sh first"

run python tools/convert_checkpoint.py --load "$WORK/checkpoints" --save "$WORK/midus_hf" --to hf --verify --overwrite
