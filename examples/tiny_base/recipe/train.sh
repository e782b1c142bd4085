#!/usr/bin/env bash
# Makes examples/tiny_base again from nothing: corpus, tokenizer, pre-training from scratch with this project's driver,
# export to Hugging Face, held-out perplexity. About half an hour on two CPU cores with AVX-512; without it bf16 takes
# hours, and leaving --bf16 out is faster. A second call continues a run that was interrupted.
#
# Usage: examples/tiny_base/recipe/train.sh [WORK_DIR]      (default: runs/tiny_base; the model appears in WORK_DIR/hf)
# HEADS (4; or 2, 8), TRAIN_ITERS (1500) and PRECISION (--bf16; empty: fp32) make siblings of it with as many parameters.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
work="${1:-runs/tiny_base}"
source tools/setup_environment.sh ""
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
recipe=examples/tiny_base/recipe
heads="${HEADS:-4}"

python examples/make_corpus.py --corpus stdlib --output-dir "$work/corpus"
python $recipe/make_tokenizer.py --corpus-dir "$work/corpus" --output-dir "$work/tokenizer" --max-length 512
for half in train heldout; do
    [ -e "$work/data/${half}_text_document.idx" ] || python tools/preprocess_data.py --input "$work/corpus/$half.jsonl" --json-keys text \
        --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$work/tokenizer" --append-eod --workers 2 \
        --output-prefix "$work/data/$half"
done

# As many processes as there are cores to spare: they share each batch of 16 sequences.
torchrun --nproc-per-node "${NPROC:-2}" pretrain_midus.py --distributed-backend gloo ${PRECISION---bf16} \
    --num-layers 8 --hidden-size 128 --ffn-hidden-size 384 --num-attention-heads "$heads" --num-query-groups $((heads / 2)) --kv-channels $((128 / heads)) \
    --max-position-embeddings 512 --tie-word-embeddings \
    --train-data-path "$work/data/train_text_document" --valid-data-path "$work/data/heldout_text_document" \
    --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$work/tokenizer" \
    --seq-length 512 --micro-batch-size 8 --global-batch-size 16 --train-iters "${TRAIN_ITERS:-1500}" \
    --train all --lr 3e-3 --min-lr 3e-4 --lr-decay-style cosine --lr-warmup-iters 50 --weight-decay 0.1 --clip-grad 1.0 \
    --adam-beta2 0.95 --eval-interval 250 --eval-iters 4 --log-interval 10 --log-throughput \
    --load "$work/checkpoints" --save "$work/checkpoints" --save-interval 250 --tensorboard-dir "$work/tensorboard"

python tools/convert_checkpoint.py --load "$work/checkpoints" --save "$work/hf" --to hf --dtype bfloat16
python tools/evaluate.py --model "$work/hf" --data "$work/corpus/heldout.jsonl" --seq-length 512
