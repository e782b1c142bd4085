#!/usr/bin/env bash
# Qwen3-4B-Base: base -> up-scaled checkpoint that computes the same function.
# Settings come from the environment: see examples/launch/common.sh. --tiny tries it on a CPU.
set -euo pipefail
# shellcheck source=examples/launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../launch/common.sh"
begin qwen3_4b "$@"

need "$BASE_MODEL/config.json" "run 01_preprocess.sh first, or see 00_download.md"

# One Memory block after every third of the 36 layers. Qwen3's 32 heads of 128 channels answer for 2560 / 32 = 80 of the
# hidden channels each, which is why the latent size is 80.
# --verify compares the logits of base and result, which must be bit-equal in fp32.
run python tools/upscale.py --hf-model "$BASE_MODEL" --save "$WORK/upscaled" --policy interleave \
    --num-blocks 12 --memory-num-keys 512 --memory-topk 16 --memory-latent-size 80 \
    --memory-query-norm rms --verify "${TINY_UPSCALE[@]}"
