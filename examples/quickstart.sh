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
source tools/setup_environment.sh ""
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
started=$SECONDS
if python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    place="on one GPU" processes=1 layout=(--flags --distributed-backend nccl --bf16 --tensor-model-parallel-size 1)
else
    place="on 2 tensor-parallel processes" processes=2 layout=()
fi
step() { printf '\n\033[1m[%3d s] %s\033[0m\n' "$((SECONDS - started))" "$*"; }

step "1/6  Collecting text: documentation (new domain), standard library source (the base's own domain, held-out part)"
python examples/make_corpus.py --corpus docs --max-megabytes 6 --output-dir "$out/corpus/docs"
python examples/make_corpus.py --corpus stdlib --output-dir "$out/corpus/stdlib"

# The steps of megatron_midus/recipes/tiny_base.yaml; `midus recipe show tiny_base` prints them as commands.
recipe() {
    python -m megatron_midus recipe run tiny_base --step "$1" --work "$out" --base-model "$base" --gpus-per-node "$processes" \
        --train-text "$out/corpus/docs/train.jsonl" --heldout-text "$out/corpus/docs/heldout.jsonl" "$out/corpus/stdlib/heldout.jsonl" \
        --train-iters "$train_iters" --master-port "${MASTER_PORT:-29500}" "${@:2}"
}

step "2/6  Tokenising"
recipe preprocess

step "3/6  Up-scaling $base: a Memory block after every second layer; at step 0 the model must equal its base bit for bit"
# The gate learns to tell the two domains apart from either's training text, and lets the memories speak in the new one.
recipe upscale --flags --memory-domain-gate --calibration-data "$out/corpus/docs/train.jsonl" --background-data "$out/corpus/stdlib/train.jsonl"

step "4/6  Continual pre-training of the inserted blocks, base frozen, $place"
recipe pretrain "${layout[@]}"

step "5/6  Exporting to Hugging Face"
recipe convert

step "6/6  Held-out perplexity, base against MIDUS, on the new domain and on the old one, and a few lines from both"
recipe evaluate

step "Done. What lies where"
printf '  %-34s %s\n' \
    "$out/upscaled" "up-scaled checkpoint (Megatron torch_dist)" \
    "$out/checkpoints" "trained checkpoints; training resumes from here with the same command" \
    "$out/midus_hf" "the Hugging Face model: AutoModelForCausalLM.from_pretrained(dir, trust_remote_code=True)" \
    "$out/evaluation.json" "the figures above" \
    "$out/tensorboard" "curves: tensorboard --logdir $out/tensorboard"
