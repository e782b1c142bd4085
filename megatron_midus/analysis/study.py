"""The whole analysis of one exported model on one text: which parts there are, in what order, and all of their figures."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_midus.analysis.heads import HeadImportance, measure_heads, num_head_passes
from megatron_midus.analysis.passes import Progress
from megatron_midus.analysis.retrieval import Retrieval, measure_retrieval, num_retrieval_passes
from megatron_midus.analysis.sensitivity import Sensitivity, measure_sensitivity, num_sensitivity_passes
from megatron_midus.analysis.slots import NUM_SLOT_PASSES, BlockSlots, SlotSettings, measure_slots
from megatron_midus.analysis.usage import BlockUsage, measure_usage
from megatron_midus.analysis.windows import Estimate, Windows, loss_change, mean_loss
from megatron_midus.config.analyze import PARTS
from megatron_midus.errors import UserError
from megatron_midus.evaluation.loading import read_config
from megatron_midus.evaluation.perplexity import Tokenizer
from megatron_midus.evaluation.result import model_name

FITTED_PARTS = ("retrieval", "sensitivity")


@dataclasses.dataclass(frozen=True)
class BaseLoss:
    """The base model on the same windows.

    Attributes:
        name: of the base.
        loss: nats per token.
        difference: loss of the MIDUS model minus that of the base, paired over windows.
    """

    name: str
    loss: Estimate
    difference: Estimate


@dataclasses.dataclass
class Study:
    """Everything that was found; parts that were not asked for are ``None``."""

    name: str
    directory: str
    memory: dict[str, Any]
    """Settings of the Memory blocks."""
    block_types: list[str]
    num_heads: int
    """Memory heads of a block."""
    text: dict[str, Any]
    """Where it came from, ``tokens``, ``windows``, ``seq_length``."""
    loss: Estimate
    notes: list[str]
    base: BaseLoss | None = None
    usage: dict[int, BlockUsage] | None = None
    heads: HeadImportance | None = None
    retrieval: Retrieval | None = None
    slots: dict[int, BlockSlots] | None = None
    sensitivity: Sensitivity | None = None
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def variant(self) -> str:
        return self.memory["memory_variant"]

    def to_dict(self) -> dict[str, Any]:
        """For JSON: fields by name; blocks, counts and shares that are keys become strings."""
        return dataclasses.asdict(self)


def check_is_midus(directory: str | Path) -> None:
    """Raises ``ValueError`` unless ``directory`` is an exported model with Memory blocks."""
    config = read_config(directory)
    if config.get("model_type") != "midus":
        raise UserError(
            f"{directory} is a model of type {config.get('model_type')!r}, not midus; give a directory that "
            "midus upscale or midus convert wrote for Hugging Face"
        )
    if "memory" not in (config.get("block_types") or []):
        raise UserError(f"{directory} has no Memory block, so there is nothing to analyse")


def num_windows(model: Any, windows: Windows, parts: Sequence[str]) -> int:
    """Windows that all passes of ``analyse`` read together, for a progress bar."""
    passes = {
        "heads": lambda: num_head_passes(model),
        "retrieval": lambda: num_retrieval_passes(model),
        "slots": lambda: NUM_SLOT_PASSES,
        "sensitivity": lambda: num_sensitivity_passes(model),
    }
    return round(len(windows) * (1 + sum(count() for part, count in passes.items() if part in parts)))


def analyse(
    model: Any,
    windows: Windows,
    tokenizer: Tokenizer,
    *,
    directory: str | Path,
    parts: Sequence[str] = PARTS,
    batch_size: int = 8,
    slot_settings: SlotSettings | None = None,
    base: tuple[str, torch.Tensor] | None = None,
    progress: Progress | None = None,
) -> Study:
    """Runs the parts one after the other.

    Args:
        model: a ``MidusForCausalLM`` with at least one Memory block, in evaluation mode.
        parts: of ``PARTS``.
        base: name and ``plain_losses`` of the base model on the same windows.
        progress: called with the number of windows after every batch of every pass.

    Raises:
        ValueError: an unknown part, a loss that is not finite, or too few windows for a part.
    """
    check_parts(parts, windows)
    settings: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
    usage, _, nats = measure_usage(model, windows, **settings)
    length = windows.inputs.shape[1]
    study = Study(
        name=model_name(directory),
        directory=str(directory),
        memory={key: value for key, value in model.config.to_dict().items() if key.startswith("memory_")},
        block_types=list(model.config.block_types),
        num_heads=model.config.num_lookup_heads(),
        text={"tokens": windows.num_tokens, "windows": len(windows), "seq_length": length},
        loss=mean_loss(nats, length),
        notes=_notes(model, usage, windows),
        base=base and BaseLoss(base[0], mean_loss(base[1], length), loss_change(nats, base[1], length)),
    )
    if "usage" in parts:
        study.usage = usage
    if "heads" in parts:
        study.heads = measure_heads(model, windows, **settings)
    if "retrieval" in parts:
        study.retrieval = measure_retrieval(model, windows, **settings)
    if "slots" in parts:
        study.slots = measure_slots(model, windows, tokenizer, slot_settings or SlotSettings(), **settings)
    if "sensitivity" in parts:
        study.sensitivity = measure_sensitivity(model, windows, **settings)
    return study


def check_parts(parts: Sequence[str], windows: Windows) -> None:
    """Raises ``ValueError`` for unknown parts, and when the text is too short for what they ask."""
    unknown = [part for part in parts if part not in PARTS]
    if unknown or not parts:
        raise UserError(f"parts {unknown or 'none'} are not known; choose from {' '.join(PARTS)}")
    if set(parts) & set(FITTED_PARTS):
        windows.halves()


def _notes(model: Any, usage: dict[int, BlockUsage], windows: Windows) -> list[str]:
    """What a reader has to know before any figure."""
    notes = []
    silent = [block for block, entry in usage.items() if entry.values_are_zero]
    if len(silent) == len(usage):
        notes.append(
            "all values are zero, as after up-scaling and before training: the Memory blocks write nothing. Slots are "
            "selected all the same, so usage and slots say something about the keys; every change of the loss is zero"
        )
    elif silent:
        notes.append(f"the values of blocks {silent} are all zero: these blocks write nothing")
    if len(windows) < 30:
        notes.append(
            f"{len(windows)} windows are few: standard errors from fewer than about 30 are rough; give more text or a "
            "smaller --seq-length"
        )
    scarce = [block for block, entry in usage.items() if entry.bank.share_used_if_uniform < 0.99]
    if scarce:
        wanted = usage[scarce[0]].bank.share_used_if_uniform
        notes.append(
            f"the text makes too few look-ups to reach all slots: reads spread evenly would touch {wanted:.0%} of them. "
            "Slots that were not read need not be dead, and the entropy is biased down"
        )
    if model.config.memory_variant == "full":
        notes.append("variant full: every head has slots of its own, so slots are counted over all heads")
    return notes
