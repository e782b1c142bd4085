#!/usr/bin/env bash
# The line between learning and forgetting on a base of 36 M parameters, from nothing, meant for ten minutes of one large GPU:
# source code of the installed packages -> a base -> six methods on documentation -> what each forgets for what it learns.
# Not run on a GPU yet. TINY=1 runs the same steps on a CPU in two minutes, with a base that knows nothing and one strength a method.
#
# Usage: examples/larger_base/run.sh [OUTPUT_DIR]      (default: runs/larger_base; a second call goes on)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
out="$(realpath -m "${1:-runs/larger_base}")"
source tools/setup_environment.sh ""
export TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
base=examples/tiny_base
if [ -n "${TINY:-}" ]; then
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
    megabytes=1 size=(--num-layers 2 --hidden-size 64 --ffn-hidden-size 96 --num-attention-heads 4 --num-query-groups 2 --kv-channels 16)
    run=(--distributed-backend gloo --train-iters 4 --micro-batch-size 4 --global-batch-size 4 --seq-length 128 --num-workers 0)
else
    megabytes=30 size=(--num-layers 12 --hidden-size 512 --ffn-hidden-size 1408 --num-attention-heads 8 --num-query-groups 4 --kv-channels 64)
    run=(--distributed-backend nccl --bf16 --train-iters 1500 --micro-batch-size 64 --global-batch-size 64 --seq-length 512 --lr-warmup-iters 100)
fi

mkdir -p "$out/base"
python examples/make_corpus.py --corpus stdlib --max-megabytes "$megabytes" --output-dir "$out/base/corpus"
for half in train heldout; do
    python -m megatron_midus preprocess --input "$out/base/corpus/$half.jsonl" --json-keys text --append-eod --workers 2 --overwrite \
        --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$base" --output-prefix "$out/base/$half"
done
python -m megatron_midus pretrain "${size[@]}" "${run[@]}" --max-position-embeddings 512 --tie-word-embeddings --train all \
    --train-data-path "$out/base/train_text_document" --valid-data-path "$out/base/heldout_text_document" \
    --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$base" \
    --lr 1e-3 --min-lr 1e-4 --lr-decay-style cosine --weight-decay 0.1 --adam-beta2 0.95 --log-interval 50 --eval-iters 4 \
    --load "$out/base/checkpoints" --save "$out/base/checkpoints" --save-interval 500
python -m megatron_midus convert --load "$out/base/checkpoints" --save "$out/base/hf" --to hf --overwrite

experiment=examples/larger_base/line.yaml
if [ -n "${TINY:-}" ]; then
    experiment="$out/tiny.yaml"
    # "key: value # tiny: other" becomes "key: other"; for a command it is its number of megabytes.
    sed -E -e 's/--max-megabytes 30 (.*) # tiny: (.*)$/--max-megabytes \2 \1/' -e 's/^( *[a-z_]+:) .* # tiny: (.*)$/\1 \2/' examples/larger_base/line.yaml >"$experiment"
fi
python -m megatron_midus compare "$experiment" --output "$out/line"
