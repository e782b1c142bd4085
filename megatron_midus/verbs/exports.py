"""What the verbs that write Hugging Face directories share."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

from megatron_midus.config import ModelConfig
from megatron_midus.conversion.families import check_plan, notes_on
from megatron_midus.hub import short_name
from megatron_midus.upscaling import PLAN_FILE, UpscalePlan
from megatron_midus.upscaling.policies import none


def code_files(plan: UpscalePlan) -> tuple[Path, ...]:
    """The configuration and modeling file of MIDUS, where the model needs them."""
    if not plan.memory_indices:
        return ()
    from megatron_midus.hf import CODE_FILES

    return CODE_FILES


def print_notes(hf_config: dict[str, Any]) -> None:
    """Says on stderr what of a ``config.json`` is read differently from how it is written."""
    for note in notes_on(hf_config):
        print(f"note: {note}", file=sys.stderr)


def check_export_loads(directory: Path, model: ModelConfig, plan: UpscalePlan) -> None:
    """Loads a directory without weights before it is called done; raises ``UserError`` when transformers cannot."""
    from megatron_midus.conversion.verify import check_loads
    from megatron_midus.hf import register
    from megatron_midus.upscaling.tensors import model_shapes

    register()
    check_loads(directory, model_shapes(model, plan))


def read_plan(directory: str, model: ModelConfig, config: dict[str, Any]) -> UpscalePlan:
    """The plan of a Hugging Face directory; ``none`` for a model that was never up-scaled."""
    if (Path(directory) / PLAN_FILE).is_file():
        return UpscalePlan.load(directory)
    name = short_name(directory)
    if model.family == "midus":
        print(f"{directory} has no {PLAN_FILE}; its blocks are taken from block_types in config.json", file=sys.stderr)
        return UpscalePlan.from_hf_config(config, source_name=name)
    return dataclasses.replace(none(num_layers=model.num_layers), source_name=name)


def base_plan_of(directory: str, model: ModelConfig, config: dict[str, Any]) -> UpscalePlan | None:
    """The plan of a base that is a MIDUS model; ``None`` of any other, all of whose layers count as the base's."""
    if model.family != "midus":
        return None
    plan = read_plan(directory, model, config)
    check_plan(config, plan)
    return plan
