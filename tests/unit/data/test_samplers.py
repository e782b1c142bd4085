"""Samplers: order, sharding, and resume from the count of consumed samples alone."""

import itertools
import multiprocessing
import os
import signal

import pytest
import torch

from megatron_midus.data import CyclicSampler, SequentialSampler, build_data_loader, cyclic_iterator
from megatron_midus.data.samplers import sample_indices


def global_order(kind, *, total, consumed, micro_batch, ranks, steps, seed=5):
    """The samples of ``steps`` steps in the order of the global sequence, put together from all ranks."""
    more = {"seed": seed} if kind is CyclicSampler else {}
    samplers = [
        kind(
            total_samples=total,
            consumed_samples=consumed,
            micro_batch_size=micro_batch,
            data_parallel_rank=rank,
            data_parallel_size=ranks,
            **more,
        )
        for rank in range(ranks)
    ]
    steps_of_ranks = [list(itertools.islice(sampler, steps)) for sampler in samplers]
    return [index for step in zip(*steps_of_ranks) for batch in step for index in batch]


@pytest.mark.parametrize("kind", [SequentialSampler, CyclicSampler])
@pytest.mark.parametrize("resume_at", [6, 18, 42])
def test_resume_is_the_uninterrupted_sequence(kind, resume_at):
    settings = {"total": 103, "micro_batch": 3, "ranks": 2}
    whole = global_order(kind, consumed=0, steps=16, **settings)
    rest = global_order(kind, consumed=resume_at, steps=16 - resume_at // 6, **settings)
    assert rest == whole[resume_at:]


@pytest.mark.parametrize("kind", [SequentialSampler, CyclicSampler])
def test_order_does_not_depend_on_the_layout(kind):
    """A run continues exactly on another number of ranks, and with another micro-batch."""
    layouts = [(1, 12), (12, 1), (2, 3), (4, 3), (3, 2)]
    orders = [
        global_order(kind, total=103, consumed=24, micro_batch=m, ranks=r, steps=60 // (m * r)) for m, r in layouts
    ]
    assert all(order == orders[0] for order in orders)


def test_sequential_reads_every_sample_once_and_drops_the_rest():
    assert global_order(SequentialSampler, total=23, consumed=4, micro_batch=2, ranks=3, steps=99) == list(range(4, 22))
    sampler = SequentialSampler(
        total_samples=23, consumed_samples=4, micro_batch_size=2, data_parallel_rank=1, data_parallel_size=3
    )
    assert len(sampler) == len(list(sampler)) == 3


def test_cyclic_passes_are_different_permutations():
    order = global_order(CyclicSampler, total=10, consumed=0, micro_batch=4, ranks=1, steps=10)
    passes = [order[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(p) == list(range(10)) for p in passes)
    assert len({tuple(p) for p in passes}) == 4
    other = global_order(CyclicSampler, total=10, consumed=0, micro_batch=4, ranks=1, steps=10, seed=6)
    assert other[:10] != passes[0] and other[:10] != passes[1]


def test_cyclic_with_a_batch_larger_than_the_data():
    order = global_order(CyclicSampler, total=3, consumed=2, micro_batch=8, ranks=2, steps=2)
    whole = global_order(CyclicSampler, total=3, consumed=0, micro_batch=1, ranks=1, steps=34)
    assert order == whole[2:34]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"total_samples": 0}, "the dataset has 0 samples"),
        ({"consumed_samples": -1}, "consumed_samples=-1"),
        ({"micro_batch_size": 0}, "micro_batch_size=0"),
        ({"data_parallel_rank": 2}, "data_parallel_rank=2 is not in 0 to 1"),
        ({"consumed_samples": 8}, "leaves less than one step of 4"),
    ],
)
def test_wrong_settings(change, message):
    settings = {
        "total_samples": 10,
        "consumed_samples": 0,
        "micro_batch_size": 2,
        "data_parallel_rank": 0,
        "data_parallel_size": 2,
    }
    with pytest.raises(ValueError, match=message):
        SequentialSampler(**{**settings, **change})


class Squares(torch.utils.data.Dataset):
    def __len__(self):
        return 11

    def __getitem__(self, index):
        return {"tokens": torch.tensor([index, index**2])}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_data_loader(num_workers):
    loader = build_data_loader(
        Squares(),
        consumed_samples=4,
        micro_batch_size=2,
        data_parallel_rank=1,
        data_parallel_size=2,
        num_workers=num_workers,
    )
    assert [b["tokens"].tolist() for b in loader] == [[[6, 36], [7, 49]]]
    repeated = list(itertools.islice(cyclic_iterator(loader), 3))
    assert all(b["tokens"].tolist() == [[6, 36], [7, 49]] for b in repeated)


def test_data_loader_refuses_what_it_does_not_know():
    settings = {"consumed_samples": 0, "micro_batch_size": 1, "data_parallel_rank": 0, "data_parallel_size": 1}
    with pytest.raises(ValueError, match="choose single or cyclic"):
        build_data_loader(Squares(), dataloader_type="random", **settings)
    with pytest.raises(ValueError, match="the data loader gave no batch"):
        next(cyclic_iterator([]))


def test_readers_outlive_sigterm():
    """Launchers send it to every process of a job, and the rank is still to finish its step."""
    loader = build_data_loader(
        Squares(),
        consumed_samples=0,
        micro_batch_size=2,
        data_parallel_rank=0,
        data_parallel_size=1,
        num_workers=1,
        dataloader_type="cyclic",
        seed=0,
    )
    batches = iter(loader)
    next(batches)
    readers = multiprocessing.active_children()
    assert readers
    for reader in readers:
        os.kill(reader.pid, signal.SIGTERM)
    for _ in range(5):  # more than are read ahead
        next(batches)
    assert all(reader.is_alive() for reader in readers)


@pytest.mark.parametrize("dataloader_type", ["single", "cyclic"])
def test_the_samples_of_a_batch_can_be_named_afterwards(dataloader_type):
    """Two ranks, micro-batches of three: a global batch of six, of which the third reads places 12 to 17 of 23."""
    settings = {"total_samples": 23, "consumed_samples": 0, "micro_batch_size": 3, "data_parallel_size": 2}
    build = SequentialSampler if dataloader_type == "single" else lambda **kw: CyclicSampler(seed=5, **kw)
    read = [next(itertools.islice(build(**settings, data_parallel_rank=rank), 2, None)) for rank in (0, 1)]
    named = sample_indices(23, start=12, count=6, dataloader_type=dataloader_type, seed=5)
    assert named == read[0] + read[1]
