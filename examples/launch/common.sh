# What the launch scripts of examples/<model>/ share. Each of them begins with
#     source "$(dirname "${BASH_SOURCE[0]}")/../launch/common.sh"; begin <model> "$@"
# shellcheck shell=bash disable=SC2034  # the arrays are read by the scripts that source this file
#
# Set from outside, all optional:
#   WORK             everything is read and written below it          (runs/<model>; with --tiny runs/<model>-tiny)
#   BASE_MODEL       Hugging Face directory of the base               ($WORK/base)
#   TRAIN_TEXT       text to train on: files, a directory or a glob   ($WORK/text/train)
#   HELDOUT_TEXT     text that is never trained on                    ($WORK/text/heldout.jsonl)
#   GPUS_PER_NODE    processes on each node                           (as many as nvidia-smi lists)
#   NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT                       (1, 0, 127.0.0.1, 29500)
#   MAX_RESTARTS     times that torchrun starts again by itself after a process died (0); it resumes from the last checkpoint
#   TASKS, TASK_DATA zero-shot tasks of 05_evaluate.sh and local files of them  (the paper's nine; from the network)
#   TRAIN_ITERS      optimizer steps                                  (what 03_cpt.sh says)
#   WORKERS          processes that tokenise                          (as many as there are cores)
#   MIDUS_VENV       Python environment (see tools/setup_environment.sh); "none" inside the image
#
# Words after -- are flags for pretrain_midus.py, behind those of 03_cpt.sh, so that they win:
#     bash examples/llama3.2_1b/03_cpt.sh -- --lr 5e-4 --save-interval 100
#
# With --tiny the same commands run on a CPU in a minute: a random model in the shape of the real one, a little text
# that every machine has, and the flags of the arrays below appended (the last one wins).

TINY_UPSCALE=() TINY_CPT=() TINY_EVALUATE=() MORE_FLAGS=()

begin() {
    local model=$1
    shift
    TINY=no
    while [ $# -gt 0 ]; do
        case "$1" in
            --tiny) TINY=yes ;;
            --)
                [[ "${0##*/}" == 03_cpt.sh ]] || { echo "error: 03_cpt.sh alone takes flags after --" >&2; exit 1; }
                MORE_FLAGS=("${@:2}")
                break
                ;;
            *) echo "error: unknown argument $1; --tiny is the only one, and flags for pretrain_midus.py come after --; other settings come from the environment" >&2; exit 1 ;;
        esac
        shift
    done
    cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 1
    # shellcheck source=tools/setup_environment.sh
    source tools/setup_environment.sh eval
    MODEL=$model
    if [ "$TINY" = yes ]; then
        tiny_settings
    fi
    WORK="${WORK:-runs/$MODEL}"
    BASE_MODEL="${BASE_MODEL:-$WORK/base}"
    TRAIN_TEXT="${TRAIN_TEXT:-$WORK/text/train}"
    HELDOUT_TEXT="${HELDOUT_TEXT:-$WORK/text/heldout.jsonl}"
    WORKERS="${WORKERS:-$(nproc)}"
    export TOKENIZERS_PARALLELISM=false
    export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}" # Megatron overlaps in launch order; harmless from Blackwell on
}

tiny_settings() {
    WORK="${WORK:-runs/$MODEL-tiny}"
    TRAIN_TEXT="${TRAIN_TEXT:-$WORK/text/train.jsonl}"
    GPUS_PER_NODE="${GPUS_PER_NODE:-2}" WORKERS="${WORKERS:-2}"
    export HF_HUB_OFFLINE=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
    export CUDA_VISIBLE_DEVICES="" # the CPU alone, so that it runs the same where there is a GPU
    TINY_UPSCALE=(--num-blocks 2 --memory-num-keys 16 --memory-topk 4 --memory-latent-size 8)
    TINY_CPT=(--distributed-backend gloo --seq-length 64 --micro-batch-size 2 --global-batch-size 8 --train-iters "${TRAIN_ITERS:-6}"
        --lr-warmup-iters 2 --lr-wsd-decay-iters 2 --save-interval 3 --eval-interval 3 --eval-iters 1 --log-interval 1)
    TASKS="${TASKS:-arc_easy,piqa}" TASK_DATA="${TASK_DATA:-examples/task_data}"
    TINY_EVALUATE=(--seq-length 64 --max-tokens 4000 --max-length 128 --latency-prompt-tokens 32 --latency-rounds 2)
}

# The tiny stand-in for 00_download.md: a random model of the family, and text of this machine.
tiny_download() {
    [ "$TINY" = yes ] || return 0
    [ -e "$BASE_MODEL/config.json" ] || run python examples/launch/make_tiny_model.py --family "$MODEL" --save "$BASE_MODEL"
    [ -e "$WORK/text/train.jsonl" ] || run python examples/make_corpus.py --corpus docs --max-megabytes 0.5 --output-dir "$WORK/text"
}

need() { # need PATH WHERE_IT_COMES_FROM
    [ -e "$1" ] || { echo "error: $1 does not exist; $2" >&2; exit 1; }
}

run() { # says what is run, as it could be typed
    printf '+' >&2
    printf ' %q' "$@" >&2
    printf '\n' >&2
    "$@"
}

# torchrun on this node; call the script on every node with the same NNODES, MASTER_ADDR and MASTER_PORT, and its NODE_RANK.
launch() {
    local gpus="${GPUS_PER_NODE:-$(nvidia-smi --list-gpus 2>/dev/null | wc -l)}"
    [ "$gpus" -gt 0 ] || { echo "error: no GPU found; set GPUS_PER_NODE, or try --tiny on a CPU" >&2; exit 1; }
    # After SIGTERM torchrun kills what has not ended in 30 seconds; a checkpoint may take longer. Older releases of torch ignore this.
    export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-540}"
    # exec: signals of a scheduler reach torchrun itself, not a shell that keeps them.
    run exec torchrun --nnodes "${NNODES:-1}" --node-rank "${NODE_RANK:-0}" --nproc-per-node "$gpus" \
        --master-addr "${MASTER_ADDR:-127.0.0.1}" --master-port "${MASTER_PORT:-29500}" \
        --max-restarts "${MAX_RESTARTS:-0}" "$@" "${MORE_FLAGS[@]}"
}
