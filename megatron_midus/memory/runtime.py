"""How the memories of a run are computed: operators, placement and initial seed. ``MemoryConfig`` says what they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ValuePlacement = Literal["replicated", "latent"]


@dataclass(frozen=True)
class MemoryRuntime:
    """Settings that change neither the model nor its checkpoints.

    Args:
        seed: of the initial values. They are slices of one global tensor, so the number of ranks does not change them.
        backend: of ``megatron_midus.ops.head_wise_memory``.
        value_placement: where the bank that the heads of hive and block share lies: whole on every rank, or split on
            its columns. Checkpoints are the same.
        deterministic: of ``megatron_midus.ops.head_wise_memory``.
        values_main_grad: where Megatron's data parallelism keeps an fp32 gradient of the values, add to it directly.
            Values that several ranks replicate keep their own gradient, which is summed over them.
    """

    seed: int = 0
    backend: str = "auto"
    value_placement: ValuePlacement = "replicated"
    deterministic: bool = True
    values_main_grad: bool = False
