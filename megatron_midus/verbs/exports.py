"""What the verbs that write Hugging Face directories share."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from megatron_midus.config import ModelConfig
from megatron_midus.conversion.families import notes_on
from megatron_midus.upscaling import UpscalePlan


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
