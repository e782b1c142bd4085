"""Counts which slots text of the old domain reads, and keeps the counts in the checkpoint: the work of midus background.

Shapes: N slots of a bank; M memory heads, p tensor-parallel ranks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.num_microbatches_calculator import init_num_microbatches_calculator
from megatron.core.rerun_state_machine import RerunMode, initialize_rerun_state_machine

from megatron_midus.checkpoint.background import BackgroundHeader, SlotBackground, write_background
from megatron_midus.errors import UserError
from megatron_midus.training import build
from megatron_midus.training.memory.counters import gather_heads, memories
from megatron_midus.training.memory.slot_reads import SlotReads
from megatron_midus.training.messages import print_rank_0, rank
from megatron_midus.training.pretrain import connect_ranks
from megatron_midus.training.start import Start
from megatron_midus.training.step import BatchShape, make_forward_step, run_schedule

Counts = dict[int, SlotBackground]


def count_background(start: Start) -> Path:
    """Reads ``train_iters`` global batches and writes the counts into the checkpoint of ``start``; returns the file.

    Raises:
        UserError: a model without Memory blocks.
    """
    if start.architecture.plan.memory is None:
        raise UserError(f"{start.source.directory} has no Memory blocks, and so no slots to count")
    start = connect_ranks(start)
    directory, num_batches = start.source.directory, start.arguments.training.train_iters
    assert directory is not None and num_batches is not None
    counts = _of_all_stages(_count(start, num_batches))
    path = Path()
    if rank() == 0:
        header = BackgroundHeader(
            num_batches=num_batches,
            batch_size=start.sizes.global_batch_size,
            seq_length=start.arguments.data.seq_length,
            iteration=start.source.iteration,
        )
        path = write_background(directory, header, counts)
        print_rank_0(_describe(header, counts, path))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    return path


def _count(start: Start, num_batches: int) -> Counts:
    """The counts of the Memory blocks of this rank's stage, all heads. Collective."""
    arguments, sizes = start.arguments, start.sizes
    training, data = arguments.training, arguments.data
    initialize_rerun_state_machine(mode=RerunMode.DISABLED)
    init_num_microbatches_calculator(
        rank(), None, sizes.global_batch_size, training.micro_batch_size, sizes.data_parallel_size, False
    )
    chunks = _build_frozen_model(start)
    found = memories(chunks)
    reads = SlotReads(found)
    shape = BatchShape(
        training.micro_batch_size,
        data.seq_length,
        data.reset_attention_mask,
        start.tokenizer.eod,
        documents_by_position=data.sft,
    )
    forward_step = make_forward_step(shape, check_loss=False)
    datasets = build.build_datasets(
        data, start.tokenizer, num_samples=(num_batches * sizes.global_batch_size, 0, 0), seed=training.seed
    )
    iterator = build.build_iterators(
        datasets[0], arguments, num_chunks=len(chunks), consumed_samples=0, is_training=True
    )
    num_microbatches = sizes.num_microbatches(training.micro_batch_size)
    batches: list[Any] = [0] * len(found)
    total: list[Any] = [0] * len(found)
    for _ in range(num_batches):
        reads.clear()
        # Nothing is trained, so nothing is recorded; but observers are shown passes that could record alone.
        run_schedule(forward_step, iterator, chunks, shape, num_microbatches, True)
        for index, of_batch in enumerate(reads.take()):
            batches[index] = batches[index] + (of_batch > 0).int()
            total[index] = total[index] + of_batch
    return {
        memory.layer_index: SlotBackground(_all_heads(memory, b).cpu(), _all_heads(memory, t).cpu())
        for memory, b, t in zip(found, batches, total)
    }


def _build_frozen_model(start: Start) -> list[torch.nn.Module]:
    arguments, architecture = start.arguments, start.architecture
    config = build.transformer_config(arguments, architecture)
    placement = build.place_values(arguments, architecture, start.sizes)
    chunks = build.build_model_chunks(arguments, architecture, config, start.source, placement)
    chunks = build.wrap_model_chunks(chunks, arguments, config)
    for chunk in chunks:
        chunk.requires_grad_(False)
        chunk.eval()
    return chunks


def _all_heads(memory: Any, counts: torch.Tensor) -> torch.Tensor:
    return gather_heads(counts, memory.tp_group) if counts.dim() == 2 else counts


def _of_all_stages(counts: Counts) -> Counts:
    """Those of all pipeline stages on rank 0; this stage's on the others. Collective in the pipeline of rank 0."""
    group = parallel_state.get_pipeline_model_parallel_group()
    ranks = torch.distributed.get_process_group_ranks(group)
    if 0 not in ranks or len(ranks) == 1:
        return counts
    parts: list[Any] | None = [None] * len(ranks) if rank() == 0 else None
    torch.distributed.gather_object(counts, parts, dst=0, group=group)
    return counts if parts is None else {index: block for part in parts for index, block in part.items()}


def _describe(header: BackgroundHeader, counts: Counts, path: Path) -> str:
    tokens = header.num_batches * header.batch_size * header.seq_length
    read = sum(int((block.batches > 0).sum()) for block in counts.values())
    slots = sum(block.batches.numel() for block in counts.values())
    always = sum(int((block.batches == header.num_batches).sum()) for block in counts.values())
    told = (
        f"{header.num_batches} background batches of {header.batch_size} samples, {tokens} tokens, read {read} of {slots} "
        f"slots; the counts are in {path}"
    )
    if 2 * always <= slots:
        return told
    return (
        f"WARNING: {always} of {slots} slots are read in every batch, and --memory-update-score tfidf updates none of "
        f"these; count smaller batches, or train with --memory-update-score kl\n{told}"
    )
