#!/usr/bin/env bash
# Llama-3.1-8B: base -> up-scaled checkpoint that computes the same function.
# Settings come from the environment: see examples/launch/common.sh. --tiny tries it on a CPU.
set -euo pipefail
# shellcheck source=examples/launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../launch/common.sh"
begin llama3.1_8b "$@"

need "$BASE_MODEL/config.json" "run 01_preprocess.sh first, or see 00_download.md"

# One Memory block after every second of the 32 layers; the latent size follows the head size of 128.
# --verify compares the logits of base and result, which must be bit-equal in fp32.
run python tools/upscale.py --hf-model "$BASE_MODEL" --save "$WORK/upscaled" --policy interleave \
    --num-blocks 16 --memory-num-keys 512 --memory-topk 16 --memory-latent-size 128 \
    --memory-query-norm rms --verify "${TINY_UPSCALE[@]}"
