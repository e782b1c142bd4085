"""Which samples a data-parallel rank reads, and in which order: a pure function of the samples consumed so far.

All samplers walk one global sequence of sample indices. A step of ``data_parallel_size`` micro-batches takes the next
``micro_batch_size * data_parallel_size`` entries of it, rank r the r-th slice. So a global batch holds the same samples
whatever the number of ranks and the micro-batch size, and a run resumes exactly from ``consumed_samples`` alone.
"""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader, Dataset

from megatron_midus.errors import UserError


class _ShardedSampler:
    """Batches of sample indices for one data-parallel rank, from a position in the global sequence on."""

    def __init__(
        self,
        *,
        total_samples: int,
        consumed_samples: int,
        micro_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
    ) -> None:
        if total_samples < 1:
            raise UserError(f"the dataset has {total_samples} samples; give more data or a smaller --seq-length")
        if consumed_samples < 0:
            raise UserError(f"consumed_samples={consumed_samples} must be 0 or more")
        if micro_batch_size < 1:
            raise UserError(f"micro_batch_size={micro_batch_size} must be at least 1")
        if not 0 <= data_parallel_rank < data_parallel_size:
            raise UserError(f"data_parallel_rank={data_parallel_rank} is not in 0 to {data_parallel_size - 1}")
        self.total_samples = total_samples
        self.consumed_samples = consumed_samples
        self.micro_batch_size = micro_batch_size
        self.stride = micro_batch_size * data_parallel_size
        self.offset = micro_batch_size * data_parallel_rank

    def _slices(self, stop: int | None) -> Iterator[range]:
        """Positions of this rank's micro-batches in the global sequence; whole strides only."""
        position = self.consumed_samples
        while stop is None or position + self.stride <= stop:
            yield range(position + self.offset, position + self.offset + self.micro_batch_size)
            position += self.stride


class SequentialSampler(_ShardedSampler):
    """``single``: samples ``consumed_samples … total_samples - 1`` once, in order; a last partial step is dropped."""

    def __init__(self, **settings: int) -> None:
        super().__init__(**settings)
        if self.consumed_samples + self.stride > self.total_samples:
            raise UserError(
                f"consumed_samples={self.consumed_samples} leaves less than one step of {self.stride} of the "
                f"{self.total_samples} samples; give more data, raise --train-iters, or use --dataloader-type cyclic"
            )

    def __len__(self) -> int:
        return (self.total_samples - self.consumed_samples) // self.stride

    def __iter__(self) -> Iterator[list[int]]:
        return (list(positions) for positions in self._slices(self.total_samples))


class CyclicSampler(_ShardedSampler):
    """``cyclic``: endless passes, each a permutation drawn from (seed, pass). A step may straddle two passes, so nothing
    is dropped."""

    def __init__(self, *, seed: int, **settings: int) -> None:
        super().__init__(**settings)
        self.seed = seed

    def _permutation(self, epoch: int) -> torch.Tensor:
        generator = torch.Generator()
        # The multiplier keeps (seed, pass) and (seed + 1, pass - 1) apart.
        generator.manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
        return torch.randperm(self.total_samples, generator=generator)

    def __iter__(self) -> Iterator[list[int]]:
        permutations: dict[int, torch.Tensor] = {}
        for positions in self._slices(None):
            batch = []
            for position in positions:
                epoch, index = divmod(position, self.total_samples)
                if epoch not in permutations:
                    # A micro-batch can touch several passes of a tiny dataset, but never an earlier one again.
                    permutations = {e: p for e, p in permutations.items() if e >= epoch}
                    permutations[epoch] = self._permutation(epoch)
                batch.append(int(permutations[epoch][index]))
            yield batch


def build_data_loader(
    dataset: Dataset,
    *,
    consumed_samples: int,
    micro_batch_size: int,
    data_parallel_rank: int,
    data_parallel_size: int,
    num_workers: int = 0,
    dataloader_type: Literal["single", "cyclic"] = "single",
    seed: int = 1234,
) -> DataLoader:
    """The micro-batches of one data-parallel rank.

    Args:
        dataset: what :func:`megatron_midus.data.build_train_valid_test_datasets` returned.
        consumed_samples: samples that the whole run (all ranks) has consumed; the loader starts after them. A
            validation loader that starts afresh at every evaluation passes 0.
        micro_batch_size: samples in one batch of this rank.
        data_parallel_rank, data_parallel_size: this rank's place among those that read different samples.
        num_workers: reading processes; 0 = read in the calling process.
        dataloader_type: ``single`` ends after one pass (raises ``ValueError`` when nothing is left at the start),
            ``cyclic`` never ends.
        seed: of the permutations of ``cyclic``.

    Returns:
        A loader of dicts of tensors ``[micro_batch_size, seq_length]``, see :func:`megatron_midus.data.get_batch`.
    """
    settings = {
        "total_samples": len(dataset),  # type: ignore[arg-type]
        "consumed_samples": consumed_samples,
        "micro_batch_size": micro_batch_size,
        "data_parallel_rank": data_parallel_rank,
        "data_parallel_size": data_parallel_size,
    }
    sampler: SequentialSampler | CyclicSampler
    if dataloader_type == "single":
        sampler = SequentialSampler(**settings)
    elif dataloader_type == "cyclic":
        sampler = CyclicSampler(seed=seed, **settings)
    else:
        raise UserError(f"dataloader_type={dataloader_type!r} is not known; choose single or cyclic")
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=num_workers > 0,
        worker_init_fn=_outlive_signals,
        # Readers of a fork server (the standard way from Python 3.14 on) have it for their parent, and leave when a signal
        # to the whole job has ended it; they also import torch once more.
        multiprocessing_context="fork" if num_workers else None,
        # An iterator draws the seed of its workers. From the process's own generator that would be a number less for
        # dropout, at every start and every evaluation.
        generator=torch.Generator().manual_seed(seed),
    )


def sample_indices(
    total_samples: int, *, start: int, count: int, dataloader_type: Literal["single", "cyclic"], seed: int
) -> list[int]:
    """The ``count`` samples of a dataset that a run reads once it has consumed ``start``, over all ranks."""
    settings = {
        "total_samples": total_samples,
        "consumed_samples": start,
        "micro_batch_size": count,
        "data_parallel_rank": 0,
        "data_parallel_size": 1,
    }
    sampler = CyclicSampler(seed=seed, **settings) if dataloader_type == "cyclic" else SequentialSampler(**settings)
    return next(iter(sampler))


def _outlive_signals(worker: int) -> None:
    """torchrun, SLURM and terminals send their signals to every process of a job; a reader that dies of one would take
    down the rank, which is still to finish its step and save. Readers end with the rank anyway."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def cyclic_iterator(loader: Iterable[Any]) -> Iterator[Any]:
    """Starts a loader again whenever it ends; for validation loaders that are read in small portions."""
    while True:
        empty = True
        for batch in loader:
            empty = False
            yield batch
        if empty:
            raise UserError("the data loader gave no batch")
