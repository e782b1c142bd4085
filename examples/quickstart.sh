#!/usr/bin/env bash
# The whole journey on two CPU cores, on real text, in about six minutes after installation:
# tiny base model -> up-scaled with Memory blocks -> continual pre-training on two tensor-parallel processes ->
# Hugging Face model -> held-out perplexity against the base -> a few generated lines.
# Where there is an NVIDIA GPU, one process trains on it instead, in bf16; CUDA_VISIBLE_DEVICES="" hides it.
#
# Usage: examples/quickstart.sh [OUTPUT_DIR]        (default: quickstart_output; it must be empty or absent)
# TRAIN_ITERS shortens or lengthens the training (default: 80 iterations of 16 x 512 tokens).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out="${1:-quickstart_output}"
train_iters="${TRAIN_ITERS:-80}"
base=examples/tiny_base

if [ -d "$out" ] && [ -n "$(ls -A "$out")" ]; then
    echo "error: $out is not empty; delete it or name another output directory" >&2
    exit 1
fi
source tools/setup_environment.sh
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
started=$SECONDS
if python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    place="on one GPU" processes=1 layout=(--distributed-backend nccl --bf16)
else
    place="on 2 tensor-parallel processes" processes=2 layout=(--distributed-backend gloo --tensor-model-parallel-size 2)
fi
step() { printf '\n\033[1m[%3d s] %s\033[0m\n' "$((SECONDS - started))" "$*"; }

step "1/6  Collecting text: documentation (new domain), standard library source (the base's own domain, held-out part)"
python examples/make_corpus.py --corpus docs --max-megabytes 6 --output-dir "$out/corpus/docs"
python examples/make_corpus.py --corpus stdlib --output-dir "$out/corpus/stdlib"

step "2/6  Tokenising"
for half in train heldout; do
    python tools/preprocess_data.py --input "$out/corpus/docs/$half.jsonl" --json-keys text \
        --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$base" --append-eod --workers 2 \
        --output-prefix "$out/data/$half"
done

step "3/6  Up-scaling $base: a Memory block after every second layer; at step 0 the model must equal its base bit for bit"
python tools/upscale.py --hf-model "$base" --save "$out/upscaled" --policy interleave --num-blocks 4 \
    --memory-num-keys 64 --memory-topk 8 --memory-latent-size 32 --memory-query-norm rms --verify

step "4/6  Continual pre-training of the inserted blocks, base frozen, $place"
torchrun --nproc-per-node "$processes" pretrain_midus.py "${layout[@]}" \
    --pretrained-checkpoint "$out/upscaled" --load "$out/checkpoints" --save "$out/checkpoints" --save-interval 40 \
    --tensorboard-dir "$out/tensorboard" \
    --train-data-path "$out/data/train_text_document" --valid-data-path "$out/data/heldout_text_document" \
    --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$base" \
    --seq-length 512 --micro-batch-size 16 --global-batch-size 16 --train-iters "$train_iters" \
    --train inserted --lr 3e-3 --min-lr 3e-4 --value-lr-mult 10 --lr-decay-style cosine --lr-warmup-iters 10 \
    --clip-grad 1.0 --eval-interval 20 --eval-iters 4 --eval-at-start --log-interval 10

step "5/6  Exporting to Hugging Face"
python tools/convert_checkpoint.py --load "$out/checkpoints" --save "$out/midus_hf" --to hf

step "6/6  Held-out perplexity, base against MIDUS, on the new domain and on the old one, and a few lines from both"
python tools/evaluate.py --model "$base" "$out/midus_hf" \
    --data "$out/corpus/docs/heldout.jsonl" "$out/corpus/stdlib/heldout.jsonl" --seq-length 512 \
    --json "$out/evaluation.json" --max-tokens 50000 \
    --generate "The argument must be" "Returns a new" --temperature 0.7

step "Done. What lies where"
printf '  %-34s %s\n' \
    "$out/upscaled" "up-scaled checkpoint (Megatron torch_dist)" \
    "$out/checkpoints" "trained checkpoints; training resumes from here with the same command" \
    "$out/midus_hf" "the Hugging Face model: AutoModelForCausalLM.from_pretrained(dir, trust_remote_code=True)" \
    "$out/evaluation.json" "the figures above" \
    "$out/tensorboard" "curves: tensorboard --logdir $out/tensorboard"
