"""What a run tells: Megatron's one-line log, TensorBoard, Weights & Biases, and a progress bar on terminals.

All of it happens on the last rank, which holds the last pipeline stage and so the loss.
"""

from __future__ import annotations

import dataclasses
import datetime
import math
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_midus.config.logging import LoggingConfig
from megatron_midus.errors import UserError

if TYPE_CHECKING:
    from megatron_midus.training.memory.figures import Histogram


@dataclasses.dataclass
class StepReport:
    """What one step found out.

    Attributes:
        loss: mean loss over the tokens of the global batch, nats; ``None`` on ranks that do not know it.
        skipped: whether the optimizer left the step out (float16 overflow).
        grad_norm: global L2 norm of the gradient before clipping.
        learning_rate, value_learning_rate: of the next step, as Megatron logs it.
        kl_to_base: as ``loss``, the divergence from the base; ``None`` without ``--kl-to-base``.
        load_balancing_loss: mean of the routers that learn since the last report, 1 = balanced; ``None`` where there is none.
    """

    iteration: int
    consumed_samples: int
    batch_size: int
    loss: float | None
    skipped: bool
    grad_norm: float | None
    learning_rate: float | None
    value_learning_rate: float | None
    loss_scale: float | None
    num_zeros: int | None
    params_norm: float | None = None
    load_balancing_loss: float | None = None
    kl_to_base: float | None = None


class Telemetry:
    """Collects steps and reports them.

    Args:
        config: intervals and destinations.
        train_iters: steps of the whole run, for ``iteration i/ n`` and the time left.
        flops_per_token: of a training step, forward and backward.
        seq_length: tokens per sample.
        world_size: devices that share the work.
        first_iteration: iteration that the run begins after.
        is_writer: whether this rank reports.
        run_settings: stored with the Weights & Biases run.
    """

    def __init__(
        self,
        config: LoggingConfig,
        *,
        train_iters: int,
        flops_per_token: float,
        seq_length: int,
        world_size: int,
        first_iteration: int,
        is_writer: bool,
        run_settings: dict[str, Any] | None = None,
        save_directory: str | None = None,
    ) -> None:
        self.config = config
        self.train_iters = train_iters
        self.flops_per_token = flops_per_token
        self.seq_length = seq_length
        self.world_size = world_size
        self.is_writer = is_writer
        self._writer = _tensorboard(config) if is_writer else None
        self._wandb = _wandb(config, run_settings or {}, save_directory) if is_writer else None
        self._bar = _progress_bar(config, train_iters, first_iteration) if is_writer else None
        self._reset_interval()

    # -- a step --------------------------------------------------------------------------------------------------
    def step(self, report: StepReport) -> None:
        """Takes the report of a finished step; prints a line every ``log_interval`` steps."""
        self._count(report)
        if not self.is_writer:
            return
        if report.iteration % self.config.tensorboard_log_interval == 0:
            self._write_step(report)
        if report.iteration % self.config.log_interval == 0:
            self._log_interval(report)
        self._advance_bar(report)

    def _count(self, report: StepReport) -> None:
        self._interval_steps += 1
        self._interval_tokens += report.batch_size * self.seq_length
        if report.loss is not None and math.isfinite(report.loss) and not report.skipped:
            self._losses.append(report.loss)
            if report.kl_to_base is not None:
                self._divergences.append(report.kl_to_base)
        elif report.loss is not None and not math.isfinite(report.loss):
            self._nan_steps += 1
        self._skipped_steps += int(report.skipped)

    def _reset_interval(self) -> None:
        self._interval_start = time.perf_counter()
        self._interval_steps = 0
        self._interval_tokens = 0
        self._skipped_steps = 0
        self._nan_steps = 0
        self._losses: list[float] = []
        self._divergences: list[float] = []

    def pause(self, seconds: float) -> None:
        """Leaves ``seconds`` (an evaluation, a save) out of the time per iteration."""
        self._interval_start += seconds

    # -- the line ------------------------------------------------------------------------------------------------
    def _log_interval(self, report: StepReport) -> None:
        elapsed = time.perf_counter() - self._interval_start
        seconds = elapsed / self._interval_steps
        throughput = self.flops_per_token * self._interval_tokens / (elapsed * 1e12 * self.world_size)
        tokens_per_second = self._interval_tokens / elapsed
        self.say(self._line(report, seconds, throughput, tokens_per_second))
        scalars = {"iteration-time": seconds, "throughput": throughput, "tokens-per-second": tokens_per_second}
        if self.config.log_memory_to_tensorboard:
            scalars["peak-memory-bytes"] = peak_memory_bytes()
        if report.load_balancing_loss is not None:
            scalars["load_balancing_loss"] = report.load_balancing_loss
        self._write(scalars, report.iteration)
        self._reset_interval()

    def _line(self, report: StepReport, seconds: float, throughput: float, tokens_per_second: float) -> str:
        """Megatron's format. Tools parse it: names, order and widths are Megatron's, additions come last."""
        fields = [
            f" [{datetime.datetime.now():%Y-%m-%d %H:%M:%S.%f}] iteration {report.iteration:8d}/{self.train_iters:8d}",
            f"consumed samples: {report.consumed_samples:12d}",
            f"elapsed time per iteration (ms): {seconds * 1000:.1f}",
        ]
        if self.config.log_throughput:
            fields.append(f"throughput per GPU (TFLOP/s/GPU): {throughput:.1f}")
        if report.learning_rate is not None:
            fields.append(f"learning rate: {report.learning_rate:.6E}")
        fields.append(f"global batch size: {report.batch_size:5d}")
        if self._losses:
            fields.append(f"lm loss: {sum(self._losses) / len(self._losses):.6E}")
        if report.loss_scale is not None:
            fields.append(f"loss scale: {report.loss_scale:.1f}")
        if report.grad_norm is not None:
            fields.append(f"grad norm: {report.grad_norm:.3f}")
        if report.num_zeros is not None:
            fields.append(f"num zeros: {report.num_zeros}")
        if report.params_norm is not None:
            fields.append(f"params norm: {report.params_norm:.3f}")
        if report.load_balancing_loss is not None:
            fields.append(f"load_balancing_loss: {report.load_balancing_loss:.6E}")
        fields.append(f"number of skipped iterations: {self._skipped_steps:3d}")
        fields.append(f"number of nan iterations: {self._nan_steps:3d}")
        if self._divergences:
            fields.append(f"kl to base: {sum(self._divergences) / len(self._divergences):.6E}")
        fields.append(f"tokens per second: {tokens_per_second:.0f}")
        fields.append(f"time left: {format_seconds((self.train_iters - report.iteration) * seconds)}")
        return " | ".join(fields) + " |"

    def say(self, text: str) -> None:
        """Prints a whole line, above the progress bar where there is one."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stdout)
            sys.stdout.flush()
        elif self.is_writer:
            print(text, flush=True)

    # -- destinations --------------------------------------------------------------------------------------------
    def _write_step(self, report: StepReport) -> None:
        scalars: dict[str, float | None] = {
            "learning-rate": report.learning_rate,
            "value-learning-rate": report.value_learning_rate,
            "batch-size": report.batch_size,
            "lm loss": report.loss,
            "kl to base": report.kl_to_base,
            "loss-scale": report.loss_scale,
            "grad-norm": report.grad_norm,
            "num-zeros": report.num_zeros,
            "params-norm": report.params_norm,
        }
        self._write(scalars, report.iteration)
        against_samples = {f"{key} vs samples": value for key, value in scalars.items()}
        self._write(against_samples, report.consumed_samples, to_wandb=False)

    def evaluation(self, *, iteration: int, consumed_samples: int, split: str, loss: float) -> None:
        """Reports the mean loss of an evaluation, nats per token, and its perplexity."""
        if not self.is_writer:
            return
        # Megatron caps the exponent, so that a model that knows nothing does not overflow.
        perplexity = math.exp(min(20.0, loss))
        text = f" {split} loss at iteration {iteration} | lm loss value: {loss:.6E} | lm loss PPL: {perplexity:.6E} | "
        self.say("\n".join(["-" * (len(text) + 1), text, "-" * (len(text) + 1)]))
        name = f"lm loss {split}"
        self._write({name: loss, f"{name} ppl": perplexity}, iteration)
        against_samples = {f"{name} vs samples": loss, f"{name} ppl vs samples": perplexity}
        self._write(against_samples, consumed_samples, to_wandb=False)

    def write_scalars(self, scalars: dict[str, float], step: int) -> None:
        """Sends scalars to TensorBoard and Weights & Biases."""
        self._write(scalars, step)

    def write_histograms(self, histograms: dict[str, Histogram], step: int) -> None:
        """Sends counted histograms to TensorBoard and Weights & Biases."""
        if self._writer is not None:
            for key, histogram in histograms.items():
                self._writer.add_histogram_raw(
                    key,
                    min=histogram.edges[0],
                    max=histogram.edges[-1],
                    num=sum(histogram.counts),
                    sum=histogram.total,
                    sum_squares=histogram.total_squares,
                    bucket_limits=histogram.edges[1:],
                    bucket_counts=histogram.counts,
                    global_step=step,
                )
        if self._wandb is not None and histograms:
            import wandb

            drawn = {k: wandb.Histogram(np_histogram=(h.counts, h.edges)) for k, h in histograms.items()}
            self._wandb.log(drawn, step)

    def _write(self, scalars: dict[str, Any], step: int, *, to_wandb: bool = True) -> None:
        known = {key: value for key, value in scalars.items() if value is not None}
        if self._writer is not None:
            for key, value in known.items():
                self._writer.add_scalar(key, value, step)
        if self._wandb is not None and to_wandb:
            self._wandb.log(known, step)

    def _advance_bar(self, report: StepReport) -> None:
        if self._bar is None:
            return
        # First the loss: update() is what draws.
        if report.loss is not None:
            self._bar.set_postfix_str(f"loss {report.loss:.4f}", refresh=False)
        self._bar.update(report.iteration - self._bar.n)

    def close(self) -> None:
        """Flushes and closes everything."""
        if self._bar is not None:
            self._bar.close()
        if self._writer is not None:
            self._writer.close()
        if self._wandb is not None:
            self._wandb.finish()


def format_seconds(seconds: float) -> str:
    """``1:02:03``; days are hours."""
    whole = max(0, round(seconds))
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def _tensorboard(config: LoggingConfig) -> Any:
    if config.tensorboard_dir is None:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError(f"--tensorboard-dir needs tensorboard ({error}); pip install tensorboard") from None
    return SummaryWriter(log_dir=config.tensorboard_dir, max_queue=config.tensorboard_queue_size)


def _wandb(config: LoggingConfig, settings: dict[str, Any], save_directory: str | None) -> Any:
    if config.wandb_project is None:
        return None
    try:
        import wandb
    except ImportError as error:
        raise UserError(f"--wandb-project needs wandb ({error}); pip install wandb") from None
    directory = config.wandb_save_dir or str(Path(save_directory or ".") / "wandb")
    Path(directory).mkdir(parents=True, exist_ok=True)
    return wandb.init(dir=directory, name=config.wandb_exp_name, project=config.wandb_project, config=settings)


def _progress_bar(config: LoggingConfig, total: int, done: int) -> Any:
    """A bar on stderr when that is a terminal; a file would collect thousands of carriage returns."""
    if not (config.log_progress and sys.stderr.isatty()):
        return None
    from tqdm import tqdm

    return tqdm(total=total, initial=done, unit="step", dynamic_ncols=True, file=sys.stderr, leave=False)


def peak_memory_bytes() -> int:
    """Of the device where there is one, else of this process."""
    import torch

    from megatron_midus import platform

    if not platform.is_cpu():
        return torch.cuda.max_memory_allocated()
    import resource

    # Linux counts in kilobytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
