"""Sub-keys from real queries: runs a calibration text through the up-scaled model and looks at what its memories see."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_midus.errors import UserError
from megatron_midus.json_files import parse_json
from megatron_midus.ops import calibrated_keys
from megatron_midus.upscaling.plan import UpscalePlan
from megatron_midus.upscaling.tensors import layer_name

# A text of this size holds more tokens than anybody calibrates with; the rest of a huge file is not read.
_MAX_BYTES = 64 * 2**20


def calibration_tokens(path: str | Path, tokenizer: Any, *, num_tokens: int, seq_length: int) -> list[torch.Tensor]:
    """The first ``num_tokens`` tokens of a text as sequences ``[1, <= seq_length]``.

    Args:
        path: ``.jsonl`` with a ``text`` entry per line, anything else is plain text.
        tokenizer: of the model, from transformers.
    """
    ids: list[int] = []
    for text in _texts(Path(path)):
        # Not verbose: a document may be longer than the model's context, its pieces are not.
        ids += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) >= num_tokens:
            break
    if not ids:
        raise UserError(f"{path} holds no text to calibrate with; give a text file or .jsonl with a 'text' entry")
    return list(torch.tensor(ids[:num_tokens])[None].split(seq_length, dim=1))


def _texts(path: Path) -> Iterator[str]:
    if not path.is_file():
        raise UserError(f"calibration data {path} does not exist")
    with open(path, encoding="utf-8", errors="replace") as stream:
        if path.suffix != ".jsonl":
            yield stream.read(_MAX_BYTES)
            return
        for number, line in enumerate(stream, start=1):
            try:
                if line.strip():
                    yield str(parse_json(line, f"{path}:{number}")["text"])
            except (KeyError, TypeError):
                raise UserError(f"{path}:{number}: no JSON object with a 'text' entry") from None


def collect_queries(model: Any, sequences: Sequence[torch.Tensor]) -> dict[int, torch.Tensor]:
    """``{layer index: queries [T, M, D]}`` of every Memory block, as its look-up sees them.

    Args:
        model: a ``MidusForCausalLM`` in evaluation mode.
        sequences: token ids ``[1, S]``.
    """
    seen: dict[int, list[torch.Tensor]] = {}

    def recorder(index: int):
        def record(query_TMD: torch.Tensor) -> torch.Tensor:
            seen.setdefault(index, []).append(query_TMD.detach().float().clone())
            return original[index](query_TMD)

        return record

    memories = {i: layer.memory for i, layer in enumerate(model.model.layers) if hasattr(layer, "memory")}
    original = {index: memory.look_up for index, memory in memories.items()}
    try:
        for index, memory in memories.items():
            memory.look_up = recorder(index)
        with torch.no_grad():
            for ids in sequences:
                model(input_ids=ids, use_cache=False)
    finally:
        for index, memory in memories.items():
            memory.look_up = original[index]
    return {index: torch.cat(parts) for index, parts in seen.items()}


def keys_from_queries(queries: dict[int, torch.Tensor], plan: UpscalePlan) -> dict[str, torch.Tensor]:
    """Canonical name -> sub-keys ``[M, n, D/2]`` for every new Memory block of the plan."""
    assert plan.memory is not None
    keys = {}
    for index in plan.new_memory_indices:
        rows, cols = calibrated_keys(
            queries[index],
            num_keys=plan.memory.memory_num_keys,
            topk=plan.memory.memory_topk,
            seed=plan.seed + index,
        )
        keys[layer_name(index, "memory.row_keys")] = rows
        keys[layer_name(index, "memory.col_keys")] = cols
    return keys
