#!/usr/bin/env bash
# Llama-3.2-1B: base -> up-scaled checkpoint that computes the same function.
# Settings come from the environment: see examples/launch/common.sh. --tiny tries it on a CPU.
set -euo pipefail
# shellcheck source=examples/launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../launch/common.sh"
begin llama3.2_1b "$@"

need "$BASE_MODEL/config.json" "run 01_preprocess.sh first, or see 00_download.md"

# The paper's main setting: 8 Memory blocks, one after every second of the 16 layers. 512 sub-keys per half are 262,144
# slots; 256 cost less than half of the parameters (see --dry-run).
# --verify compares the logits of base and result, which must be bit-equal in fp32.
run python tools/upscale.py --hf-model "$BASE_MODEL" --save "$WORK/upscaled" --policy interleave \
    --num-blocks 8 --memory-num-keys 512 --memory-topk 16 --memory-latent-size 64 \
    --memory-query-norm rms --verify "${TINY_UPSCALE[@]}"
