#!/usr/bin/env bash
# Qwen3-4B-Base: base against MIDUS on held-out text, and zero-shot where lm-eval is installed.
# Settings come from the environment: see examples/launch/common.sh. --tiny tries it on a CPU.
set -euo pipefail
# shellcheck source=examples/launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../launch/common.sh"
begin qwen3_4b "$@"

need "$WORK/midus_hf/config.json" "run 04_export.sh first"

run python tools/evaluate.py --model "$BASE_MODEL" "$WORK/midus_hf" --data "$HELDOUT_TEXT" --seq-length 4096 \
    --json "$WORK/perplexity.json" --markdown "$WORK/perplexity.md" "${TINY_EVALUATE[@]}"
