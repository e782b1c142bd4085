#!/usr/bin/env bash
# Llama-3.1-8B: continual pre-training of the Memory blocks, base frozen, on one node or many.
# Settings come from the environment: see examples/launch/common.sh. --tiny tries it on a CPU.
set -euo pipefail
# shellcheck source=examples/launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../launch/common.sh"
begin llama3.1_8b "$@"

need "$WORK/upscaled" "run 02_upscale.sh first"
need "$WORK/data/train_text_document.idx" "run 01_preprocess.sh first"

# 16 GB of frozen weights: two GPUs share a replica so that long sequences fit; on 80 GB and more try one.
PARALLEL=(--tensor-model-parallel-size 2 --sequence-parallel --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather)

# 4 B tokens: 1,907 steps of 512 sequences of 4,096. The micro-batch is what fits on a GPU; the rest is accumulated.
TRAINING=(--seq-length 4096 --micro-batch-size 2 --global-batch-size 512 --train-iters "${TRAIN_ITERS:-1907}"
    --bf16 --train inserted)

# The base stays as it is, so the learning rate is one of training from scratch. Memory values see few tokens each and
# learn 10 times faster.
OPTIMIZER=(--lr 5e-4 --min-lr 5e-5 --value-lr-mult 10 --lr-decay-style WSD --lr-wsd-decay-style minus_sqrt
    --lr-wsd-decay-iters 200 --lr-warmup-iters 100 --weight-decay 0.1 --adam-beta2 0.95 --clip-grad 1.0)

# To keep more of the old domain, mix some of it in: --train-data-path 0.95 new_text_document 0.05 old_text_document
DATA=(--train-data-path "$WORK/data/train_text_document" --valid-data-path "$WORK/data/heldout_text_document"
    --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$BASE_MODEL" --data-cache-path "$WORK/cache")

# The same command continues from the last checkpoint, on any number of nodes; the first time it begins with the up-scaled one.
CHECKPOINTS=(--load "$WORK/checkpoints" --save "$WORK/checkpoints" --pretrained-checkpoint "$WORK/upscaled"
    --save-interval 200 --async-save --keep-last 3)

LOGGING=(--log-interval 10 --log-throughput --eval-interval 200 --eval-iters 20 --tensorboard-dir "$WORK/tensorboard")

launch pretrain_midus.py "${PARALLEL[@]}" "${TRAINING[@]}" "${OPTIMIZER[@]}" "${DATA[@]}" "${CHECKPOINTS[@]}" "${LOGGING[@]}" \
    "${TINY_CPT[@]}"
