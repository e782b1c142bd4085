#!/usr/bin/env bash
# Qwen3-4B-Base: text -> Megatron's indexed datasets.
# Settings come from the environment: see examples/launch/common.sh. --tiny tries it on a CPU.
set -euo pipefail
# shellcheck source=examples/launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../launch/common.sh"
begin qwen3_4b "$@"

tiny_download
need "$BASE_MODEL/config.json" "00_download.md says how to get it"
need "$HELDOUT_TEXT" "00_download.md says how to get it"

preprocess() { # preprocess NAME TEXT...
    run python tools/preprocess_data.py --input "${@:2}" --json-keys text --output-prefix "$WORK/data/$1" \
        --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$BASE_MODEL" --append-eod --workers "$WORKERS" --overwrite
}

preprocess train "$TRAIN_TEXT"
preprocess heldout "$HELDOUT_TEXT"
