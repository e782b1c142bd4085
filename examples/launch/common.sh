# What the launch scripts of examples/<model>/ share: each does one step of megatron_midus/recipes/<model>.yaml, which holds all
# settings (`midus recipe show <model>` prints them as commands), in the Python environment of the repository.
#     source "$(dirname "${BASH_SOURCE[0]}")/../launch/common.sh"; recipe <model> <step> "$@"
# shellcheck shell=bash
#
# Set from outside, all optional:
#   WORK             everything is read and written below it          (runs/<model>; with --tiny runs/<model>-tiny)
#   BASE_MODEL       Hugging Face directory of the base               ($WORK/base, or the model in the local Hugging Face cache)
#   TRAIN_TEXT       text to train on: a file, a directory or a glob  ($WORK/text/train)
#   HELDOUT_TEXT     text that is never trained on                    ($WORK/text/heldout.jsonl)
#   GPUS_PER_NODE    processes on each node                           (as many as nvidia-smi lists)
#   NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT                       (1, 0, 127.0.0.1, 29500)
#   MAX_RESTARTS     times that torchrun starts again by itself after a process died (0); it resumes from the last checkpoint
#   TASKS, TASK_DATA zero-shot tasks of 05_evaluate.sh and local files of them  (the paper's nine; from the network)
#   TRAIN_ITERS      optimizer steps                                  (what the recipe says)
#   WORKERS          processes that tokenise                          (as many as there are cores)
#   MIDUS_VENV       Python environment (see tools/setup_environment.sh); "none" inside the image
#
# Words after -- are flags for pretraining, behind those of the recipe, so that they win:
#     bash examples/llama3.2_1b/03_cpt.sh -- --lr 5e-4 --save-interval 100
#
# With --tiny the same commands run on a CPU in a minute: a random model in the shape of the real one, a little text
# that every machine has, and smaller numbers (`tiny` in megatron_midus/recipes).

recipe() { # recipe MODEL STEP [--tiny] [-- FLAG...]
    local model=$1 step=$2 words=() flags=() extras="eval,gpu?"
    shift 2
    while [ $# -gt 0 ]; do
        case "$1" in
            --tiny)
                words+=(--tiny) extras=eval
                export CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # before torch is loaded
                ;;
            --)
                [ "$step" = pretrain ] || { echo "error: 03_cpt.sh alone takes flags after --" >&2; exit 1; }
                flags=("${@:2}")
                break
                ;;
            *) echo "error: unknown argument $1; --tiny is the only one, and flags for pretraining come after --; other settings come from the environment" >&2; exit 1 ;;
        esac
        shift
    done
    cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 1
    # shellcheck source=tools/setup_environment.sh
    source tools/setup_environment.sh "$extras"
    set_from WORK --work BASE_MODEL --base-model TRAIN_TEXT --train-text HELDOUT_TEXT --heldout-text WORKERS --workers \
        TRAIN_ITERS --train-iters GPUS_PER_NODE --gpus-per-node NNODES --nodes NODE_RANK --node-rank MASTER_ADDR --master-addr \
        MASTER_PORT --master-port MAX_RESTARTS --max-restarts
    if [ "$step" = evaluate ]; then
        [ -z "${TASKS:-}" ] || flags+=(--tasks "$TASKS")
        [ -z "${TASK_DATA:-}" ] || flags+=(--task-data "$TASK_DATA")
    fi
    [ ${#flags[@]} -eq 0 ] || flags=(--flags "${flags[@]}")
    # exec: signals of a scheduler reach torchrun itself, not a shell that keeps them.
    exec python -m megatron_midus recipe run "$model" --step "$step" "${words[@]}" "${flags[@]}"
}

set_from() { # set_from VARIABLE FLAG ...: flags of the variables that are set, into `words` of the caller
    while [ $# -gt 0 ]; do
        [ -z "${!1:-}" ] || words+=("$2=${!1}")
        shift 2
    done
}
