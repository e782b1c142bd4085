#!/usr/bin/env bash
# Llama-3.1-8B: base against MIDUS on held-out text, and on zero-shot tasks (pip install 'megatron-midus[eval]').
# Settings come from the environment: see examples/launch/common.sh. --tiny tries it on a CPU.
set -euo pipefail
# shellcheck source=examples/launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../launch/common.sh"
begin llama3.1_8b "$@"

need "$WORK/midus_hf/config.json" "run 04_export.sh first"

# Zero-shot tasks as in the paper. TASK_DATA: a directory with their files, for nodes without a network (docs/evaluation.md).
tasks=(--tasks "${TASKS:-wikitext,arc_easy,arc_challenge,logiqa,piqa,winogrande,commonsense_qa,boolq,mmlu}")
[ -z "${TASK_DATA:-}" ] || tasks+=(--task-data "$TASK_DATA")

run python tools/evaluate.py --model "$BASE_MODEL" "$WORK/midus_hf" --data "$HELDOUT_TEXT" --seq-length 4096 --latency \
    "${tasks[@]}" --json "$WORK/evaluation.json" --markdown "$WORK/evaluation.md" "${TINY_EVALUATE[@]}"
