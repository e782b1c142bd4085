"""What the processes of the data tests do; the launcher has started their process group."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megatron_midus.config.data import DataConfig
from megatron_midus.data import build_data_loader, build_train_valid_test_datasets, get_batch
from megatron_midus.data.batch import document_mask
from megatron_midus.data.tokenizer import NullTokenizer

SETTINGS = {"micro_batch_size": 3, "seq_length": 8, "device": "cpu", "is_first_stage": True, "is_last_stage": True}
NAMES = ("tokens", "labels", "loss_mask", "position_ids")


def samples(count, batch=3, length=8):
    """Random batches, the same on every call."""
    generator = torch.Generator().manual_seed(7)
    for _ in range(count):
        text = torch.randint(0, 2**31, (batch, length + 1), generator=generator)
        yield {
            "tokens": text[:, :-1],
            "labels": text[:, 1:],
            "loss_mask": torch.randint(0, 2, (batch, length), generator=generator).float(),
            "position_ids": torch.randint(0, 99, (batch, length), generator=generator),
            "dataset_id": torch.zeros(batch),
        }


def broadcast() -> None:
    """Two tensor-parallel ranks, of which the first alone reads."""
    group = dist.new_group([0, 1])
    reader = samples(3) if dist.get_rank() == 0 else None
    for expected in samples(3):
        batch = get_batch(reader, **SETTINGS, tp_group=group)
        assert all(torch.equal(batch[name], expected[name]) for name in NAMES)


def context_parallel() -> None:
    """Rank r of cp keeps chunks r and 2 * cp - 1 - r, so that causal attention is the same work for all."""
    group = dist.new_group([0, 1])
    (whole,) = samples(1)
    positions = ([0, 1, 6, 7], [2, 3, 4, 5])[dist.get_rank()]
    batch = get_batch(samples(1), **SETTINGS, cp_group=group, reset_attention_mask=True, eod=0)
    assert all(torch.equal(batch[name], whole[name][:, positions]) for name in NAMES)
    assert torch.equal(batch["attention_mask"], document_mask(whole["tokens"], 0)[:, :, positions])
    with pytest.raises(ValueError, match="seq_length=6 is not divisible by .*4"):
        get_batch(samples(1), **{**SETTINGS, "seq_length": 6}, cp_group=group)


def read_blend(paths: list[str], split: str | None, num_samples: tuple, built_on: list[int]) -> list[list | None]:
    """Builds a blend on all ranks and reads this rank's share of it."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    config = DataConfig(data_path=paths, split=split, seq_length=16)
    datasets = build_train_valid_test_datasets(
        config, NullTokenizer(1000), num_samples=num_samples, seed=2, is_built_on_rank=lambda: rank in built_on
    )
    read: list[list | None] = []
    for dataset in datasets:
        if dataset is None:
            read.append(None)
            continue
        loader = build_data_loader(
            dataset, consumed_samples=0, micro_batch_size=2, data_parallel_rank=rank, data_parallel_size=world_size
        )
        read.append([batch["tokens"].tolist() for batch in loader])
    return read
