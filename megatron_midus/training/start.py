"""What a run begins with, found before Megatron is imported."""

from __future__ import annotations

import dataclasses

from megatron_midus.data.tokenizer import Tokenizer
from megatron_midus.training.architecture import Architecture
from megatron_midus.training.arguments import Arguments
from megatron_midus.training.checkpoint.source import Source
from megatron_midus.training.checks import RunSizes


@dataclasses.dataclass(frozen=True)
class Start:
    """What a run begins with."""

    arguments: Arguments
    sizes: RunSizes
    source: Source
    architecture: Architecture
    tokenizer: Tokenizer
