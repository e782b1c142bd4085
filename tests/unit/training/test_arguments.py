"""The command line: Megatron's names, every flag explained, contradictions refused before torch is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_midus.training.arguments import build_parser, parse_arguments

GOOD = "--mock-data --lr 1e-3 --train-iters 3"

# What users of a Megatron fork expect.
MEGATRON_FLAGS = [
    "--load",
    "--save",
    "--save-interval",
    "--pretrained-checkpoint",
    "--finetune",
    "--ckpt-step",
    "--no-load-optim",
    "--no-load-rng",
    "--no-save-optim",
    "--no-save-rng",
    "--async-save",
    "--exit-interval",
    "--exit-duration-in-mins",
    "--exit-signal-handler",
    "--train-iters",
    "--train-samples",
    "--rampup-batch-size",
    "--lr",
    "--min-lr",
    "--lr-warmup-iters",
    "--lr-warmup-samples",
    "--lr-warmup-fraction",
    "--lr-decay-style",
    "--lr-decay-iters",
    "--lr-decay-samples",
    "--lr-wsd-decay-style",
    "--lr-wsd-decay-iters",
    "--override-opt_param-scheduler",
    "--use-checkpoint-opt_param-scheduler",
    "--data-path",
    "--split",
    "--train-data-path",
    "--valid-data-path",
    "--test-data-path",
    "--data-cache-path",
    "--mock-data",
    "--num-workers",
    "--tokenizer-type",
    "--tokenizer-model",
    "--make-vocab-size-divisible-by",
    "--eval-interval",
    "--eval-iters",
    "--log-interval",
    "--tensorboard-dir",
    "--log-throughput",
    "--log-params-norm",
    "--wandb-project",
    "--wandb-exp-name",
    "--distributed-backend",
    "--recompute-granularity",
    "--recompute-method",
    "--recompute-num-layers",
    "--micro-batch-size",
    "--global-batch-size",
    "--seq-length",
    "--num-layers",
    "--hidden-size",
    "--ffn-hidden-size",
    "--num-attention-heads",
    "--num-query-groups",
    "--group-query-attention",
    "--kv-channels",
    "--max-position-embeddings",
    "--norm-epsilon",
    "--rotary-base",
    "--vocab-size",
    "--untie-embeddings-and-output-weights",
    "--init-method-std",
    "--swiglu",
    "--normalization",
    "--position-embedding-type",
    "--disable-bias-linear",
    "--attention-dropout",
    "--hidden-dropout",
    "--tensor-model-parallel-size",
    "--pipeline-model-parallel-size",
    "--context-parallel-size",
    "--num-layers-per-virtual-pipeline-stage",
    "--sequence-parallel",
    "--use-distributed-optimizer",
    "--overlap-grad-reduce",
    "--overlap-param-gather",
    "--bf16",
    "--fp16",
    "--loss-scale",
    "--clip-grad",
    "--weight-decay",
    "--start-weight-decay",
    "--end-weight-decay",
    "--weight-decay-incr-style",
    "--adam-beta1",
    "--adam-beta2",
    "--adam-eps",
    "--optimizer",
    "--seed",
    "--transformer-impl",
    "--calculate-per-token-loss",
    "--deterministic-mode",
    "--timing-log-level",
    "--full-validation",
    "--skip-train",
    "--manual-gc",
    "--dataloader-type",
    "--use-mcore-models",
    "--ckpt-format",
    "--no-masked-softmax-fusion",
    "--no-gradient-accumulation-fusion",
]


@pytest.mark.parametrize("flag", MEGATRON_FLAGS)
def test_megatrons_flags_are_known(flag):
    assert flag in {option for action in build_parser()._actions for option in action.option_strings}


def test_every_flag_is_explained():
    unexplained = [action.option_strings for action in build_parser()._actions if not (action.help or "").strip()]
    assert unexplained == []


def test_help_needs_no_torch():
    program = (
        "import sys; sys.modules['torch'] = sys.modules['megatron'] = sys.modules['transformers'] = None\n"
        "sys.argv = ['pretrain_midus.py', '--help']; import runpy; runpy.run_path('pretrain_midus.py', "
        "run_name='__main__')"
    )
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "--value-lr-mult" in done.stdout


def test_only_given_architecture_is_kept():
    arguments = parse_arguments([*GOOD.split(), "--hidden-size", "8", "--memory-topk", "2"])
    assert arguments.architecture == {"hidden_size": 8} and arguments.memory == {"memory_topk": 2}


def test_megatrons_spellings():
    arguments = parse_arguments([*GOOD.split(), "--override-opt_param-scheduler", "--no-load-optim"])
    assert arguments.optimizer.override_opt_param_scheduler and not arguments.checkpoint.load_optim
    untied = parse_arguments([*GOOD.split(), "--untie-embeddings-and-output-weights"])
    assert untied.architecture == {"tie_word_embeddings": False}


WRONG = [
    ("--train-samples 4", "exactly one of --train-iters, --train-samples and --train-epochs"),
    ("--train-epochs 4", "exactly one of --train-iters, --train-samples and --train-epochs"),
    ("--micro-batch-size 0", "micro_batch_size=0 must be at least 1"),
    ("--global-batch-size -1", "global_batch_size=-1 must be at least 1"),
    ("--bf16 --fp16", "exclude each other"),
    ("--fp16 --distributed-backend gloo", "fp16 needs a GPU"),
    ("--eval-iters -1", "eval_iters=-1"),
    ("--rampup-batch-size 2 2 8", "give --train-samples"),
    ("--lr 0", "lr=0.0 must be above 0"),
    ("--min-lr 1", "min_lr=1.0 must lie between 0 and lr=0.001"),
    ("--lr-warmup-init 1", "lr_warmup_init=1.0"),
    ("--lr-warmup-fraction 1", "below 1"),
    ("--lr-warmup-fraction 0.1 --lr-warmup-iters 2", "give one"),
    ("--lr-decay-style WSD", "needs --lr-wsd-decay-iters"),
    ("--lr-decay-samples 4", "--train-iters counts steps"),
    ("--value-lr-mult 0", "value_lr_mult=0.0 must be above 0"),
    ("--value-weight-decay 0.1 --weight-decay 0", "give --weight-decay as well"),
    ("--adam-beta2 1", "adam_beta2=1.0"),
    ("--ema-decay 1", "ema_decay=1.0 must be above 0 and below 1"),
    ("--l2-to-start -1", "l2_to_start=-1.0 must not be negative"),
    ("--l2-to-start 1 --memory-update-slots 9", "leaves most of them as they are; give one"),
    ("--weight-decay-incr-style linear", "needs 0 <= --start-weight-decay"),
    ("--start-weight-decay 0.1", "--weight-decay-incr-style linear or cosine"),
    ("--override-opt_param-scheduler --use-checkpoint-opt_param-scheduler", "exclude each other"),
    ("--tensor-model-parallel-size 0", "tensor_model_parallel_size=0"),
    ("--sequence-parallel", "sequence_parallel=True splits"),
    ("--overlap-param-gather", "needs --use-distributed-optimizer"),
    ("--ddp-average-in-collective --distributed-backend gloo", "needs NCCL"),
    ("--num-layers-per-virtual-pipeline-stage 1", "needs --pipeline-model-parallel-size of at least 2"),
    (
        "--num-layers-per-virtual-pipeline-stage 1 --pipeline-model-parallel-size 2 --no-overlap-p2p-comm",
        "trains wrongly without overlapped transfers",
    ),
    ("--reset-attention-mask --transformer-impl transformer_engine", "needs the local layers"),
    ("--reset-attention-mask --context-parallel-size 2", "give --transformer-impl local and no context parallelism"),
    ("--recompute-granularity full", "needs --recompute-method"),
    ("--recompute-method uniform", "settings of --recompute-granularity full"),
    ("--save-interval 5", "needs --save DIR"),
    ("--save x --save-interval 0", "save_interval=0"),
    ("--keep-last -1", "keep_last=-1"),
    ("--finetune", "give --load DIR"),
    ("--ckpt-step 3", "needs --load DIR"),
    ("--log-interval 0", "log_interval=0"),
    ("--wandb-project x", "needs --wandb-exp-name"),
    ("--skip-train", "give --load DIR"),
    ("--tie-word-embeddings --untie-embeddings-and-output-weights", "contradict each other"),
    ("--hidden-dropout 1.0", "hidden_dropout=1.0 must be at least 0 and below 1"),
    ("--apply-query-key-layer-scaling", "depends on layer numbers, which inserted blocks shift; leave the flag out"),
    ("--no-rope-freq 4", "no_rope_freq=4 depends on layer numbers"),
    ("--window-attn-skip-freq 2", "window_attn_skip_freq=2 depends on layer numbers"),
    ("--first-last-layers-bf16", "first_last_layers_bf16=True depends on layer numbers"),
    ("--no-swiglu", "swiglu=False is not available here"),
    ("--make-vocab-size-divisible-by 0", "make_vocab_size_divisible_by=0"),
]


@pytest.mark.parametrize(("flags", "words"), WRONG)
def test_values_that_do_not_fit_are_named(flags, words):
    with pytest.raises(ValueError) as caught:
        parse_arguments([*GOOD.split(), *flags.split()])
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--lr 1 --train-iters 3", "no data were given"),
        ("--mock-data --train-iters 3", "no learning rate was given"),
        ("--mock-data --lr 1", "exactly one of --train-iters"),
        ("--mock-data --lr 1 --train-samples 8 --lr-warmup-iters 1", "--train-samples counts samples"),
        ("--mock-data --lr 1 --train-epochs 2 --lr-warmup-iters 1", "--train-epochs counts samples"),
        ("--mock-data --lr 1 --train-epochs 2", "--mock-data has no end; give --train-iters"),
        (
            "--mock-data --lr 1 --train-samples 8 --rampup-batch-size 2 3 4 --global-batch-size 6",
            "not a positive multiple of the increment 3",
        ),
        ("--mock-data --lr 1 --train-samples 8 --rampup-batch-size 2 2 4", "needs --global-batch-size"),
        ("--mock-data --lr 1 --train-samples 8 --rampup-batch-size 2 2 --global-batch-size 6", "three numbers"),
    ],
)
def test_what_is_missing_is_named(flags, words):
    with pytest.raises(ValueError) as caught:
        parse_arguments(flags.split())
    assert words in str(caught.value)
