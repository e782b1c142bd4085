"""TrainingConfig: how long, how much at a time, what is trained, in which precision, when to evaluate and to stop."""

from __future__ import annotations

import dataclasses
from typing import Literal

from megatron_midus.errors import UserError


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """Training"""

    train_iters: int | None = None
    """Optimizer steps in total, the ones of earlier runs included. Give this, --train-samples or --train-epochs."""

    train_samples: int | None = None
    """Sequences in total, the ones of earlier runs included, whatever batch sizes they came in; what is left after the last
    whole batch is not trained on. Give this, --train-iters or --train-epochs."""

    train_epochs: int | None = None
    """Passes over the training data in total, the ones of earlier runs included; as --train-samples of so many times the samples
    that one pass has (with --sft packed ones, of several datasets without weights those of all). Give this, --train-iters
    or --train-samples."""

    samples_per_epoch: int | None = dataclasses.field(default=None, metadata={"flag": False})
    """Sequences in one pass over the training data; the driver fills it in for --train-epochs."""

    micro_batch_size: int = 1
    """Sequences per forward pass of one model replica."""

    global_batch_size: int | None = None
    """Sequences per optimizer step over all replicas; micro-batch-size * data-parallel size when absent. The rest is
    accumulated: micro-batches = global / (micro * data-parallel)."""

    rampup_batch_size: list[int] | None = None
    """Batch size ramp-up: START INCREMENT SAMPLES, the three numbers in sequences."""

    decrease_batch_size_if_needed: bool = False
    """Round the global batch size down to a multiple of micro-batch-size * data-parallel size instead of refusing."""

    train: Literal["inserted", "all", "lora", "values"] | None = None
    """What learns: the blocks that up-scaling inserted (the chosen layers of policy control), with the base frozen,
    every parameter, low-rank adapters on every linear layer, or the value banks of Memory blocks, with all else frozen.
    When absent, what the plan's policy is made for: all for none, solar and stack, inserted for the
    others. Another value on resume drops the optimizer state, because it belongs to other parameters."""

    moe_aux_loss_coeff: float | None = None
    """Weight of the load-balancing loss of routers that learn (Megatron's, summed over blocks); absent = what the base's
    configuration says. Frozen routers have none."""

    lora_rank: int | None = None
    """Rank of the adapters of --train lora. Checkpoints and exports hold merged weights."""

    lora_alpha: float = 16.0
    """Factor on the adapters' output, divided by --lora-rank."""

    kl_to_base: float = 0.0
    """Weight of a second term of the loss: KL(base || model) of the next-token distributions, nats, the base being the model
    without added blocks and adapters. Costs a forward pass of the base. Needs the base frozen (--train inserted, lora or values)
    and pipeline-parallel size 1; 0 = none."""

    bf16: bool = False
    """Compute in bfloat16 with float32 master weights."""

    fp16: bool = False
    """Compute in float16 with float32 master weights and dynamic loss scaling."""

    seed: int = 1234
    """Seed of Python, NumPy, torch, fresh weights and the data order."""

    hidden_dropout: float = 0.0
    """Probability with which a channel is dropped where a block adds to the residual stream, and after the embedding."""

    attention_dropout: float = 0.0
    """Probability with which an attention weight is dropped."""

    calculate_per_token_loss: bool = False
    """Average the gradient over the tokens of the global batch instead of over its micro-batches."""

    eval_interval: int = 1000
    """Steps between evaluations on the validation split; 0 = none."""

    eval_iters: int = 100
    """Global batches of the validation split per evaluation, the same ones every time; 0 = no evaluation."""

    full_validation: bool = False
    """Evaluate on the whole validation split instead of on --eval-iters batches."""

    eval_at_start: bool = False
    """Evaluate before the first step as well."""

    dry_run: bool = False
    """Build model, optimizer and data at this layout, run one forward and backward pass, report parameters, memory and
    FLOPs, and end: nothing is trained and nothing is written."""

    skip_train: bool = False
    """Only evaluate the checkpoint that --load names."""

    exit_interval: int | None = None
    """Save and exit after a step that this number divides."""

    exit_duration_in_mins: float | None = None
    """Save and exit after so many minutes of training."""

    exit_signal_handler: bool = True
    """On SIGTERM, SIGUSR1 or Ctrl-C finish the step or leave the evaluation, save and exit with 0; a second Ctrl-C ends at
    once."""

    check_for_nan_in_loss_and_grad: bool = True
    """Refuse a loss that is NaN or infinite before the optimizer sees it."""

    rerun_mode: Literal["disabled", "validate_results", "report_determinism_stats"] = "validate_results"
    """What a refused loss leads to: disabled = stop; validate_results = compute the step again, save and exit with 16
    when it repeats or 17 when it does not; report_determinism_stats = compute every step twice and report."""

    check_weight_hash_across_dp_replicas_interval: int | None = None
    """Steps between comparisons of the weights that ranks hold as copies (over data parallelism, and over tensor
    parallelism what it does not divide); a difference ends the run. Copies all weights to the CPU; absent = never."""

    manual_gc: bool = False
    """Collect Python's garbage at the same step on every rank instead of whenever Python decides."""

    manual_gc_interval: int = 100
    """Steps between collections under --manual-gc; 0 = never."""

    empty_unused_memory_level: Literal[0, 1, 2] = 0
    """Release cached GPU memory: 1 = before the optimizer step, 2 = after it as well."""

    def __post_init__(self) -> None:
        lengths = [self.train_iters, self.train_samples, self.train_epochs]
        if len([length for length in lengths if length is not None]) != 1 and not self.skip_train:
            raise UserError(
                f"train_iters={self.train_iters}, train_samples={self.train_samples} and train_epochs={self.train_epochs}: "
                "give exactly one of --train-iters, --train-samples and --train-epochs"
            )
        for name in (
            "train_iters",
            "train_samples",
            "train_epochs",
            "micro_batch_size",
            "global_batch_size",
            "exit_interval",
            "lora_rank",
            "check_weight_hash_across_dp_replicas_interval",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name}={value} must be at least 1")
        for name in ("eval_interval", "eval_iters", "manual_gc_interval"):
            if getattr(self, name) < 0:
                raise UserError(f"{name}={getattr(self, name)} must be 0 (never) or more")
        if self.dry_run and self.skip_train:
            raise UserError("dry_run builds a training run and skip_train has none; give one of the two flags")
        check_kl_weight(self.kl_to_base)
        for name in ("hidden_dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 0 and below 1")
        if self.bf16 and self.fp16:
            raise UserError("bf16 and fp16 exclude each other; give one of --bf16 and --fp16")
        if (self.train == "lora") != (self.lora_rank is not None):
            raise UserError(
                f"train={self.train} and lora_rank={self.lora_rank}: --train lora and --lora-rank need each other"
            )
        self._check_rampup()

    @property
    def total_samples(self) -> int | None:
        """Sequences in total; ``None`` where steps are counted, and of epochs before their data were looked at."""
        if self.train_epochs is None or self.samples_per_epoch is None:
            return self.train_samples
        return self.train_epochs * self.samples_per_epoch

    def _check_rampup(self) -> None:
        if self.rampup_batch_size is None:
            return
        if len(self.rampup_batch_size) != 3:
            raise UserError(
                f"rampup_batch_size={self.rampup_batch_size} needs three numbers: "
                "start batch size, increment, ramp-up samples"
            )
        if self.train_samples is None and self.train_epochs is None:
            raise UserError(
                "rampup_batch_size counts samples; give --train-samples or --train-epochs instead of --train-iters"
            )
        start, increment, samples = self.rampup_batch_size
        if start < 1 or increment < 1 or samples < 1:
            raise UserError(f"rampup_batch_size={self.rampup_batch_size}: every number must be at least 1")
        if self.global_batch_size is None:
            raise UserError("rampup_batch_size needs --global-batch-size, the size that it ends with")
        if self.global_batch_size <= start or (self.global_batch_size - start) % increment:
            raise UserError(
                f"rampup_batch_size: the way from {start} to global_batch_size={self.global_batch_size} is not a "
                f"positive multiple of the increment {increment}"
            )


def check_kl_weight(weight: float) -> None:
    """Raises ``UserError`` for what is no weight of ``--kl-to-base``; 0 passes."""
    if weight < 0:
        raise UserError(f"kl_to_base={weight} must be 0 (none) or more")
