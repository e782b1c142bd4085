"""The training loop: steps, log, evaluations, checkpoints, and every reason to stop."""

from __future__ import annotations

import gc
import os
import time
from pathlib import Path
from typing import Any, Literal

import torch
from megatron.core.num_microbatches_calculator import (
    get_current_running_global_batch_size,
    update_num_microbatches,
)
from megatron.core.timers import Timers

from megatron_midus.data.samplers import sample_indices
from megatron_midus.errors import UserError
from megatron_midus.training.build import build_iterators
from megatron_midus.training.checkpoint.state import Progress, training_state
from megatron_midus.training.checkpoint.writer import CheckpointWriter
from megatron_midus.training.kl_to_base import kl_to_base
from megatron_midus.training.memory.telemetry import MemoryReport, MemoryTelemetry
from megatron_midus.training.messages import print_rank_0, rank, warn_rank_0
from megatron_midus.training.optimizer import learning_rates
from megatron_midus.training.profiler import StepProfiler
from megatron_midus.training.replicas import check_replicas
from megatron_midus.training.router_losses import router_losses
from megatron_midus.training.schedule import schedule_flags
from megatron_midus.training.signals import TerminationSignal
from megatron_midus.training.start import Start
from megatron_midus.training.step import (
    BatchShape,
    DivergedError,
    Learner,
    StepResult,
    evaluate,
    make_forward_step,
    parameter_norm,
    train_step,
)
from megatron_midus.training.telemetry import StepReport, Telemetry

Split = Literal["validation", "test"]
SPLITS: tuple[Split, ...] = ("validation", "test")

# Names that Megatron-Core gives to the parts of a step; those of higher levels than asked for are not measured.
_TIMERS = [
    "forward-backward",
    "all-grads-sync",
    "non-tensor-parallel-grads-all-reduce",
    "embedding-grads-all-reduce",
    "params-all-gather",
    "optimizer-copy-to-main-grad",
    "optimizer-unscale-and-check-inf",
    "optimizer-clip-main-grad",
    "optimizer-count-zeros",
    "optimizer-inner-step",
    "optimizer-copy-main-to-model-params",
    "forward-compute",
    "backward-compute",
    "forward-recv",
    "forward-send",
    "backward-recv",
    "backward-send",
    "forward-send-backward-recv",
    "backward-send-forward-recv",
    "forward-backward-send-forward-backward-recv",
]


class Trainer:
    """A run, ready to go.

    Args:
        start: what was asked for, and the model of it.
        learner: the model's part on this rank, built and restored.
        progress: where the run is; advanced as it goes.
        datasets: train, validation and test, ``None`` where this rank reads nothing.
        telemetry: the log.
        signal: tells that the process is to end.
        timers: Megatron-Core's.
        train_iters: steps of the whole run.
    """

    def __init__(
        self,
        start: Start,
        learner: Learner,
        *,
        progress: Progress,
        datasets: tuple[Any, Any, Any],
        telemetry: Telemetry,
        signal: TerminationSignal,
        timers: Timers,
        train_iters: int,
    ) -> None:
        arguments, architecture = start.arguments, start.architecture
        self.arguments = arguments
        self.architecture = architecture
        self.sizes = start.sizes
        self.learner = learner
        self.progress = progress
        self.datasets = datasets
        self.telemetry = telemetry
        self.signal = signal
        self.timers = timers
        self.train_iters = train_iters
        training = arguments.training
        self.shape = BatchShape(
            training.micro_batch_size,
            arguments.data.seq_length,
            arguments.data.reset_attention_mask,
            start.tokenizer.eod,
            documents_by_position=arguments.data.sft,
        )
        self.forward_step = make_forward_step(
            self.shape,
            check_loss=training.check_for_nan_in_loss_and_grad,
            kl_to_base=kl_to_base(arguments, architecture, learner.model_chunks),
        )
        self.writer: CheckpointWriter | None = None
        if arguments.checkpoint.save is not None:
            self.writer = CheckpointWriter(
                arguments.checkpoint.save,
                architecture,
                is_async=arguments.checkpoint.async_save,
                keep_last=arguments.checkpoint.keep_last,
                fully_parallel=arguments.checkpoint.ckpt_fully_parallel_save,
            )
        directory = Path(arguments.checkpoint.save or ".") / "profile"
        self.profiler = StepProfiler(arguments.logging, directory=directory, rank=rank())
        self._start = time.monotonic()
        # Chunks that only evaluate are in no DDP.
        self._gathers_ahead = arguments.parallel.overlap_param_gather and learner.optimizer is not None
        self.memory_telemetry = self._watch_memories()
        self.router_losses = router_losses(arguments, architecture)

    def _watch_memories(self) -> MemoryTelemetry | None:
        settings = self.arguments.memory_telemetry
        if self.learner.optimizer is None or not settings.memory_log_interval or self.architecture.plan.memory is None:
            return None
        return MemoryTelemetry(
            settings,
            model_chunks=self.learner.model_chunks,
            optimizer=self.learner.optimizer,
            report=MemoryReport(self.telemetry, settings.memory_alarm_threshold),
            seed=self.arguments.training.seed,
            synchronise_parameters=self._synchronise_parameters,
        )

    # -- the loop ------------------------------------------------------------------------------------------------
    def run(self) -> int:
        """Trains to the end or to a reason to stop; returns the exit code."""
        if self.arguments.training.skip_train:
            return self._only_evaluate()
        if self.arguments.training.eval_at_start:
            self._evaluate("validation")
        code = self._train()
        self._report_trace(self.profiler.close())
        if self.writer is not None:
            self.writer.finalize(blocking=True)
        if code is not None:
            return code
        if self.arguments.training.eval_interval:
            if not self._due_evaluation():
                self._evaluate("validation")
            self._evaluate("test")
        return 0

    def _only_evaluate(self) -> int:
        for split in SPLITS:
            if not self._evaluate(split):
                # Unlike a saved checkpoint, figures that are missing are no success.
                print_rank_0(f"exiting without the evaluation: {self._reason_to_leave()}")
                return 1
        return 0

    def _train(self) -> int | None:
        """Steps until the run is complete (``None``) or has to stop (the exit code)."""
        if self.progress.iteration >= self.train_iters:
            print_rank_0(f"nothing to train: iteration {self.progress.iteration} of {self.train_iters} is done")
            self._describe_samples_left()
            return None
        if reason := self._received_signal():
            print_rank_0(f"exiting before a step is made: {reason}")
            return 0
        iterator = self.training_iterator()
        if self.arguments.training.manual_gc:
            gc.disable()
            gc.collect()
        while self.progress.iteration < self.train_iters:
            if self.writer is not None:
                self.writer.finalize()
            self.profiler.before_step(self.progress.iteration + 1)
            result, samples = self._step(iterator)
            self._report_trace(self.profiler.after_step(self.progress.iteration + 1))
            if result.exit_code is not None:
                if result.save_before_exit:
                    self._save()
                print_rank_0(
                    f"the step after iteration {self.progress.iteration} was refused, its loss is NaN or infinite. "
                    f"{self._describe_batch(samples)}; exit {result.exit_code}"
                )
                return result.exit_code
            self._advance(result, samples)
            if self._after_step():
                return 0
        self._describe_samples_left()
        return None

    def _describe_samples_left(self) -> None:
        """What ``--train-samples`` or ``--train-epochs`` asks for and no whole batch holds."""
        total, consumed = self.arguments.training.total_samples, self.progress.consumed_train_samples
        if total is not None and consumed < total:
            print_rank_0(f"{total - consumed} of {total} samples are less than a global batch and are not trained on")

    def _after_step(self) -> bool:
        """Evaluates and saves where that is due; whether the run has to stop here."""
        iteration, training = self.progress.iteration, self.arguments.training
        check_interval = training.check_weight_hash_across_dp_replicas_interval
        if check_interval is not None and iteration % check_interval == 0:
            self._check_replicas()
        if self._due_evaluation():
            self._evaluate("validation")
        reason = self._reason_to_stop()
        interval = self.arguments.checkpoint.save_interval
        if reason is not None or iteration == self.train_iters or (interval and iteration % interval == 0):
            self._save()
        if training.manual_gc and training.manual_gc_interval and iteration % training.manual_gc_interval == 0:
            gc.collect()
        if reason is not None:
            print_rank_0(f"exiting after iteration {iteration}: {reason}")
            if "was received" in reason and "TORCHELASTIC_RUN_ID" in os.environ:
                print_rank_0("what torchrun reports after this is the signal that it received itself; nothing is lost")
        return reason is not None

    def training_iterator(self) -> Any:
        """This rank's training batches, from where the run is."""
        return build_iterators(
            self.datasets[0],
            self.arguments,
            num_chunks=len(self.learner.model_chunks),
            consumed_samples=self.progress.consumed_train_samples,
            is_training=True,
        )

    def _step(self, iterator: Any) -> tuple[StepResult, int]:
        training = self.arguments.training
        update_num_microbatches(self.progress.consumed_train_samples, consistency_check=True)
        samples = get_current_running_global_batch_size()
        if self.memory_telemetry is not None:
            self.memory_telemetry.before_step(self.progress.iteration + 1)
        try:
            result = train_step(
                self.forward_step,
                iterator,
                self.learner,
                self.shape,
                self.arguments.optimizer,
                samples=samples,
                check_loss=training.check_for_nan_in_loss_and_grad,
                empty_cache_level=training.empty_unused_memory_level,
            )
        except DivergedError as error:
            raise UserError(f"{error}. {self._describe_batch(samples)}") from None
        return result, samples

    def _describe_batch(self, samples: int) -> str:
        """Which samples the next step reads; ranks that read no data only know their places in the order."""
        start, data, dataset = self.progress.consumed_train_samples, self.arguments.data, self.datasets[0]
        if dataset is None:
            return f"It read places {start} to {start + samples - 1} of the order of training samples"
        indices = sample_indices(
            len(dataset),
            start=start,
            count=samples,
            dataloader_type=data.dataloader_type,
            seed=self.arguments.training.seed,
        )
        return f"It read training samples {', '.join(map(str, indices))}"

    def _advance(self, result: StepResult, samples: int) -> None:
        """Counts the step and reports it."""
        progress, optimizer = self.progress, self.learner.optimizer
        assert optimizer is not None
        progress.iteration += 1
        progress.consumed_train_samples += samples
        tokens = samples * self.arguments.data.seq_length
        progress.consumed_train_tokens += tokens
        progress.floating_point_operations += self.telemetry.flops_per_token * tokens
        logging = self.arguments.logging
        learning_rate, value_learning_rate = learning_rates(optimizer)
        due = progress.iteration % logging.log_interval == 0
        if self.router_losses is not None:
            self.router_losses.count_step()
        self.telemetry.step(
            StepReport(
                iteration=progress.iteration,
                consumed_samples=progress.consumed_train_samples,
                batch_size=samples,
                loss=result.loss,
                kl_to_base=result.kl_to_base,
                skipped=result.skipped,
                grad_norm=result.grad_norm,
                learning_rate=learning_rate,
                value_learning_rate=value_learning_rate,
                loss_scale=optimizer.get_loss_scale().item() if self.arguments.training.fp16 else None,
                num_zeros=result.num_zeros,
                params_norm=parameter_norm(self.learner.model_chunks) if logging.log_params_norm and due else None,
                load_balancing_loss=self.router_losses.take(progress.iteration) if self.router_losses and due else None,
            )
        )
        if self.memory_telemetry is not None:
            self.memory_telemetry.after_step(progress.iteration)
        if due and logging.timing_log_level > 0:
            self.timers.log(_TIMERS, normalizer=logging.log_interval, reset=True)

    def _report_trace(self, path: Path | None) -> None:
        if path is not None:
            print(f"rank {rank()} wrote the profile {path}", flush=True)

    def _check_replicas(self) -> None:
        start = time.perf_counter()
        self._synchronise_parameters()
        check_replicas(self.learner.model_chunks, self.progress.iteration)
        self.telemetry.pause(time.perf_counter() - start)

    # -- stopping ------------------------------------------------------------------------------------------------
    def _received_signal(self) -> str | None:
        if self.arguments.training.exit_signal_handler and (name := self.signal.received_anywhere()):
            return f"{name} was received"
        return None

    def _reason_to_leave(self) -> str | None:
        """Why the run has to end soon, in a step or an evaluation. Collective."""
        if reason := self._received_signal():
            return reason
        training = self.arguments.training
        if training.exit_duration_in_mins is not None and self._agree(
            time.monotonic() - self._start > training.exit_duration_in_mins * 60
        ):
            return f"it ran for more than {training.exit_duration_in_mins:g} minutes"
        return None

    def _reason_to_stop(self) -> str | None:
        if reason := self._reason_to_leave():
            return reason
        training = self.arguments.training
        if training.exit_interval is not None and self.progress.iteration % training.exit_interval == 0:
            return f"--exit-interval {training.exit_interval}"
        return None

    @staticmethod
    def _agree(flag: bool) -> bool:
        """Whether any rank says so; clocks differ."""
        value = torch.tensor([int(flag)], dtype=torch.int32, device="cuda")
        torch.distributed.all_reduce(value, op=torch.distributed.ReduceOp.MAX)
        return bool(value.item())

    # -- checkpoints ---------------------------------------------------------------------------------------------
    def _save(self) -> None:
        if self.writer is None:
            return
        start = time.perf_counter()
        self._synchronise_parameters()
        checkpoint = self.arguments.checkpoint
        state = training_state(
            self.learner.model_chunks,
            self.learner.optimizer if checkpoint.save_optim else None,
            self.learner.scheduler if checkpoint.save_optim else None,
            self.progress,
            train=self.architecture.train,
            sft=self.arguments.data.sft,
            samples_per_epoch=self.arguments.training.samples_per_epoch,
            with_rng=checkpoint.save_rng,
            memory_usage=self.memory_telemetry.state() if self.memory_telemetry is not None else None,
            flags=schedule_flags(self.arguments.optimizer, self.arguments.training, self.sizes.global_batch_size),
            average=self.learner.average,
            start_weights=self.learner.start_weights,
        )
        self.writer.save(self.progress.iteration, state)
        seconds = time.perf_counter() - start
        print_rank_0(
            f"  {'began to save' if checkpoint.async_save else 'saved'} a checkpoint of iteration "
            f"{self.progress.iteration} to {checkpoint.save} ({seconds:.1f} s)"
        )
        self.telemetry.pause(seconds)

    def _synchronise_parameters(self) -> None:
        """Under overlapped gathering the newest parameters may still lie scattered over ranks."""
        if self._gathers_ahead:
            for chunk in self.learner.model_chunks:
                chunk.start_param_sync(force_sync=True)

    # -- evaluation ----------------------------------------------------------------------------------------------
    def _due_evaluation(self) -> bool:
        interval = self.arguments.training.eval_interval
        return bool(interval) and self.progress.iteration % interval == 0

    def _evaluate(self, split: Split) -> bool:
        """Evaluates on a split, if it is there, and reports it; false where the run has to end before that is done."""
        num_batches, num_microbatches = self._evaluation_batches(split)
        if not num_batches:
            return True
        start = time.perf_counter()
        is_done = self._evaluate_model(split, split, num_batches, num_microbatches)
        if is_done and self.learner.average is not None:
            self._synchronise_parameters()
            with self.learner.average.in_place_of_weights():
                is_done = self._evaluate_model(split, f"{split} EMA", num_batches, num_microbatches)
        self.telemetry.pause(time.perf_counter() - start)
        return is_done

    def _evaluate_model(self, split: Split, name: str, num_batches: int, num_microbatches: int) -> bool:
        """Evaluates the model as it is, and reports that under a name; whether it was not left early."""
        # The same samples every time, so that evaluations compare.
        iterator = build_iterators(
            self._dataset(split),
            self.arguments,
            num_chunks=len(self.learner.model_chunks),
            consumed_samples=0,
            is_training=False,
        )
        result = evaluate(
            self.forward_step,
            iterator,
            self.learner.model_chunks,
            self.shape,
            num_batches=num_batches,
            num_microbatches=num_microbatches,
            must_leave=lambda: self._reason_to_leave() is not None,
        )
        if result.num_batches < num_batches:
            print_rank_0(f"left the evaluation on the {name} split after {result.num_batches} of {num_batches} batches")
        if result.loss is not None:
            self.telemetry.evaluation(
                iteration=self.progress.iteration,
                consumed_samples=self.progress.consumed_train_samples,
                split=name,
                loss=result.loss,
            )
        return result.num_batches == num_batches

    def _dataset(self, split: Split) -> Any:
        return self.datasets[1 if split == "validation" else 2]

    def _evaluation_batches(self, split: Split) -> tuple[int, int]:
        """Batches of an evaluation and micro-batches in each, the same on all ranks; no batches without the split."""
        training, dataset = self.arguments.training, self._dataset(split)
        # Rank 0 always has the datasets that there are.
        length = torch.tensor([len(dataset) if dataset is not None else 0], dtype=torch.int64, device="cuda")
        torch.distributed.broadcast(length, 0)
        step = training.micro_batch_size * self.sizes.data_parallel_size
        num_microbatches = self.sizes.num_microbatches(training.micro_batch_size)
        if training.full_validation and len(self.learner.model_chunks) == 1:
            # Small batches leave the fewest samples over.
            num_microbatches = 1
        available = int(length) // (step * num_microbatches)
        if int(length) and not available:
            warn_rank_0(f"the {split} split has {int(length)} samples, less than a batch, and is left out")
        return (available if training.full_validation else min(available, training.eval_iters)), num_microbatches
