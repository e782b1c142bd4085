"""Where value banks go: the byte formulas with figures worked out by hand, and every reason not to choose."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_midus.config import MemoryConfig
from megatron_midus.upscaling.value_placement import (
    latent_bytes_per_microbatch,
    replicated_bytes_per_step,
    resolve_value_placement,
)

MEMORY = MemoryConfig(memory_num_keys=512, memory_topk=16, memory_latent_size=64)
SIZES = {"hidden_size": 2048, "num_attention_heads": 32}


def resolve(wanted: str, memory: MemoryConfig | None = MEMORY, **changes: Any) -> tuple[str, str]:
    settings = {
        **SIZES,
        "tensor_model_parallel_size": 4,
        "tokens_per_microbatch": 8192,
        "num_microbatches": 1,
        "itemsize": 2,
        **changes,
    }
    return resolve_value_placement(wanted, memory, **settings)


def test_bytes() -> None:
    assert replicated_bytes_per_step(MEMORY, hidden_size=2048, ranks=4) == 8 * 512 * 512 * 64 * 3 / 4
    selection, result = 12 * 8192 * 32 * 16, 4 * 8192 * 32 * 64 / 4
    found = latent_bytes_per_microbatch(MEMORY, **SIZES, tokens=8192, ranks=4, itemsize=2)
    assert found == (selection + result) * 3 / 4
    block = MemoryConfig(memory_variant="block", memory_num_keys=512, memory_topk=16, memory_num_heads=8)
    assert latent_bytes_per_microbatch(block, **SIZES, tokens=100, ranks=2, itemsize=2) == 12 * 100 * 8 * 16 / 2
    assert replicated_bytes_per_step(block, hidden_size=2048, ranks=2) == 8 * 512 * 512 * 2048 / 2


def test_auto_takes_the_cheaper_place() -> None:
    # 96 MiB of gradient against 48 MiB + ... for every micro-batch.
    assert resolve("auto", num_microbatches=1) == (
        "latent",
        "a step and block, a rank receives 48 MiB (1 micro-batches) with latent and 96 MiB with replicated",
    )
    assert resolve("auto", num_microbatches=4)[0] == "replicated"
    assert resolve("replicated", num_microbatches=1) == ("replicated", "as asked for")
    assert resolve("latent", num_microbatches=99) == ("latent", "as asked for")


@pytest.mark.parametrize(
    ("memory", "changes", "reason"),
    [
        (MemoryConfig(memory_latent_size=63), {}, "memory_latent_size=63 is not divisible"),
        (MemoryConfig(memory_variant="full"), {}, "variant full has a bank per head, split by heads as it is"),
        (None, {}, "the model has no Memory blocks"),
        (MEMORY, {"tensor_model_parallel_size": 1}, "one tensor-parallel rank holds everything"),
    ],
)
def test_where_there_is_nothing_to_choose(memory: MemoryConfig | None, changes: dict, reason: str) -> None:
    placement, why = resolve("auto", memory, **changes)
    assert placement == "replicated" and why.startswith(reason)
    if "tensor_model_parallel_size" in changes or memory is None:
        assert resolve("latent", memory, **changes)[0] == "replicated"
    else:
        with pytest.raises(ValueError, match=f"memory_value_placement=latent: {reason}.*choose replicated or auto"):
            resolve("latent", memory, **changes)
