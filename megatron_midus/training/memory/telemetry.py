"""Watches the Memory blocks of a run: counts in some steps, reports, raises the alarm, and revives dead sub-keys."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.optimizer import MegatronOptimizer

from megatron_midus.config.memory_telemetry import MemoryTelemetryConfig
from megatron_midus.training.memory.counters import BlockCounter, memory_layers
from megatron_midus.training.memory.figures import BlockFigures, block_figures
from megatron_midus.training.memory.revival import revive_dead_subkeys
from megatron_midus.training.memory.update_ratio import UpdateRatio
from megatron_midus.training.memory.usage import MemoryUsage
from megatron_midus.training.telemetry import Telemetry

# A block has recovered well above the threshold of the alarm only, so that it is not said again and again at the edge.
RECOVERY = 1.5

# Name in the line of the log -> figure, its format.
_LINE = {
    "slots used": ("slots-used", ".1%"),
    "dead slots": ("slots-dead", ".1%"),
    "dead sub-keys": ("subkeys-dead", ".1%"),
    "effective share": ("effective-share", ".1%"),
    "top-1 mass": ("top1-mass", ".3f"),
    "head overlap": ("head-overlap", ".3f"),
    "output/input norm": ("output-to-input-norm", ".2E"),
    "balance loss": ("balance-loss", ".3f"),
}


class MemoryTelemetry:
    """Told about every step by the loop. Everything that it does to training is revival, where that is asked for.

    Args:
        config: intervals and thresholds.
        model_chunks: of this rank.
        optimizer: of the same.
        report: where figures go, on the last rank of the run.
        seed: of the run.
        synchronise_parameters: makes the weights whole on every rank, called before they are looked at or revived.
    """

    def __init__(
        self,
        config: MemoryTelemetryConfig,
        *,
        model_chunks: Sequence[torch.nn.Module],
        optimizer: MegatronOptimizer,
        report: MemoryReport,
        seed: int,
        synchronise_parameters: Callable[[], None] = lambda: None,
    ) -> None:
        self.config = config
        self.optimizer = optimizer
        self.report = report
        self.seed = seed
        self.synchronise_parameters = synchronise_parameters
        self._counters = [BlockCounter(layer) for layer in memory_layers(model_chunks)]
        self.usage = MemoryUsage([counter.memory for counter in self._counters], config.memory_usage_decay)
        self._updates = UpdateRatio(optimizer)
        self._is_counting = False

    def before_step(self, iteration: int) -> None:
        """Before the step that ends as ``iteration``."""
        if self.config.is_counted(iteration) and not self._is_counting:
            self._is_counting = True
            for counter in self._counters:
                counter.start()
        if self.config.is_reported(iteration):
            self._updates.before_step()

    def after_step(self, iteration: int) -> None:
        """After it. Collective over all ranks where a report or a revival is due."""
        if self._is_counting and self.config.is_reported(iteration):
            self._is_counting = False
            self._report(iteration)
        if self.config.revives(iteration) and self.usage.reports:
            self._revive(iteration)

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return self.usage.state()

    def load(self, directory: Path) -> None:
        """Goes on from a checkpoint. Collective."""
        self.usage.load(directory)

    def _report(self, iteration: int) -> None:
        ratios = self._updates.after_step()
        self.synchronise_parameters()  # norms of values are of weights
        counts = [counter.stop() for counter in self._counters]
        self.usage.reports += 1
        figures = []
        for counter, counted in zip(self._counters, counts):
            self.usage.blocks[counter.memory.layer_index].update(counted, self.config.memory_usage_decay)
            figures.append(
                block_figures(counter.memory, counted, self.usage, dead_threshold=self.config.memory_dead_threshold)
            )
        everywhere = _of_all_stages(figures)
        if everywhere is not None:
            self.report.write(iteration, everywhere, ratios)

    def _revive(self, iteration: int) -> None:
        self.synchronise_parameters()
        moved = revive_dead_subkeys(
            [counter.memory for counter in self._counters if counter.memory.row_keys.requires_grad],
            self.usage,
            self.optimizer,
            dead_threshold=self.config.memory_dead_threshold,
            seed=self.seed,
            iteration=iteration,
        )
        everywhere = _of_all_stages(list(moved.items()))
        if everywhere is not None:
            self.report.write_revived(iteration, dict(everywhere))


def _of_all_stages(items: list[Any]) -> list[Any] | None:
    """The items of all pipeline stages on the last rank of the run; ``None`` on the others. Collective in its pipeline."""
    last = torch.distributed.get_world_size() - 1
    group = parallel_state.get_pipeline_model_parallel_group()
    ranks = torch.distributed.get_process_group_ranks(group)
    if last not in ranks:
        return None
    if len(ranks) == 1:
        return items
    parts: list[Any] | None = [None] * len(ranks) if torch.distributed.get_rank() == last else None
    torch.distributed.gather_object(items, parts, dst=last, group=group)
    return None if parts is None else [item for part in parts for item in part]


class MemoryReport:
    """Writes figures: one line of the log, scalars and histograms for TensorBoard and W&B, and the alarm."""

    def __init__(self, telemetry: Telemetry, alarm_threshold: float) -> None:
        self.telemetry = telemetry
        self.alarm_threshold = alarm_threshold
        self._collapsed: set[int] = set()

    def write(self, iteration: int, blocks: list[BlockFigures], update_ratios: dict[str, float]) -> None:
        blocks = sorted(blocks, key=lambda block: block.layer_index)
        means = mean_figures(blocks)
        self.telemetry.say(_line(iteration, means))
        scalars = {f"memory/{name}/all": value for name, value in means.items()}
        histograms = {}
        for block in blocks:
            where = _block_key(block.layer_index)
            scalars |= {f"memory/{name}/{where}": value for name, value in block.scalars.items()}
            histograms |= {f"memory/{name}/{where}": value for name, value in block.histograms.items()}
        scalars |= {f"update-to-weight/{name}": value for name, value in update_ratios.items()}
        self.telemetry.write_scalars(scalars, iteration)
        self.telemetry.write_histograms(histograms, iteration)
        for block in blocks:
            self._alarm(iteration, block)

    def _alarm(self, iteration: int, block: BlockFigures) -> None:
        index, share, threshold = block.layer_index, block.scalars["effective-share"], self.alarm_threshold
        if share < threshold and index not in self._collapsed:
            self._collapsed.add(index)
            self.telemetry.say(
                f" ALARM: memory of block {index} has collapsed at iteration {iteration}: its reads are worth "
                f"{share:.2%} of the slots, below --memory-alarm-threshold {threshold:g} (slots used: "
                f"{block.scalars['slots-used']:.2%}, top-1 mass: {block.scalars['top1-mass']:.3f}); see docs/telemetry.md"
            )
        elif share >= RECOVERY * threshold and index in self._collapsed:
            self._collapsed.remove(index)
            self.telemetry.say(f" memory of block {index} has recovered at iteration {iteration}: {share:.2%}")

    def write_revived(self, iteration: int, moved: dict[int, int]) -> None:
        """Tells how many sub-keys were revived, by layer index."""
        self.telemetry.write_scalars(
            {f"memory/subkeys-revived/{_block_key(index)}": float(number) for index, number in moved.items()}, iteration
        )
        if any(moved.values()):
            told = ", ".join(f"{number} in block {index}" for index, number in sorted(moved.items()) if number)
            self.telemetry.say(f" revived dead sub-keys after iteration {iteration}: {told}")


def mean_figures(blocks: list[BlockFigures]) -> dict[str, float]:
    """Means over the blocks of the model, which all have the same shape; frozen ones may lack figures of learning."""
    found: dict[str, list[float]] = {}
    for block in blocks:
        for name, value in block.scalars.items():
            found.setdefault(name, []).append(value)
    return {name: sum(values) / len(values) for name, values in found.items()}


def _line(iteration: int, means: dict[str, float]) -> str:
    fields = [f" memory at iteration {iteration:8d}"]
    fields += [f"{label}: {means[name]:{style}}" for label, (name, style) in _LINE.items() if name in means]
    return " | ".join(fields) + " |"


def _block_key(layer_index: int) -> str:
    # Sorted by name, blocks stand in the order of the model.
    return f"block-{layer_index:03d}"
