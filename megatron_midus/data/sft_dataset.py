"""Samples of supervised fine-tuning: packed whole conversations, from an indexed dataset of ids and one of the loss mask.

Megatron-LM's own SFTDataset is part of its training package and not of Megatron-Core, reads and renders text while it trains, takes each line as
one sample and cuts what is too long. Here conversations are encoded before (midus preprocess --sft), as any data of Megatron-Core.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy
import torch
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.megatron_dataset import MegatronDataset
from megatron.core.datasets.utils import Split

from megatron_midus.data.packing import Packing
from megatron_midus.data.sources import loss_prefix
from megatron_midus.errors import UserError


@dataclasses.dataclass
class SFTDatasetConfig(GPTDatasetConfig):
    """Settings of Megatron-Core's datasets, and what becomes of conversations that are longer than a sample."""

    sft_long_conversations: str = "refuse"


def describe(dataset: Any, *, global_batch_size: int) -> str:
    """What an epoch is, of an SFTDataset or a blend of several."""
    parts: list[SFTDataset] = getattr(dataset, "datasets", [dataset])
    conversations, samples = sum(p.num_conversations for p in parts), sum(p.packing.per_epoch for p in parts)
    left_out = sum(p.num_left_out for p in parts)
    fill = sum(p.packing.fill * p.packing.per_epoch for p in parts) / samples
    more = f", {left_out:,} left out as too long" if left_out else ""
    return (
        f"conversations: {conversations:,}{more}, packed into {samples:,} samples, {100 * fill:.1f} % full; "
        f"an epoch is {samples / global_batch_size:.4g} steps"
    )


@dataclasses.dataclass(frozen=True)
class Conversations:
    """Ids of each conversation, and 1 beside those that the assistant says."""

    ids: IndexedDataset
    loss: IndexedDataset


class SFTDataset(MegatronDataset):
    """Samples of ``sequence_length`` places. A conversation of ``n`` tokens takes ``n - 1`` of them: what it is asked to predict,
    so no label belongs to another conversation. Behind the last conversation the places are empty: no loss, and each has
    position 0, as a document of its own.

    Args:
        dataset: of ``build_low_level_dataset``.
        indices: conversations of this split.
        num_samples: samples wanted; as many epochs as that takes. ``None`` = one.
    """

    def __init__(
        self,
        dataset: Conversations,
        dataset_path: str | None,
        indices: numpy.ndarray,
        num_samples: int | None,
        index_split: Split,
        config: SFTDatasetConfig,
    ) -> None:
        super().__init__(dataset, dataset_path, indices, num_samples, index_split, config)  # type: ignore[arg-type]
        self._conversations, self._size = dataset, config.sequence_length
        assert config.tokenizer is not None
        self._filler = config.tokenizer.eod
        places = dataset.ids.sequence_lengths[indices].astype(numpy.int64) - 1
        keep = self._kept(indices, places, config.sft_long_conversations)
        if not keep.any():
            raise UserError(
                f"no conversation of {dataset_path} is left for {index_split.name}: all are longer than --seq-length {self._size}; "
                "raise it"
            )
        self._indices, self.num_left_out = indices[keep], int((~keep).sum())
        self.packing = Packing(numpy.minimum(places[keep], self._size), self._size, seed=config.random_seed)
        wanted = self.packing.per_epoch if num_samples is None else num_samples
        self._epochs = max(1, -(-wanted // self.packing.per_epoch))

    def _kept(self, indices: numpy.ndarray, places: numpy.ndarray, long: str) -> numpy.ndarray:
        """``[n]`` bool: not those that are too long, or without loss where they are cut."""
        keep = places >= 1
        for row in numpy.flatnonzero(places > self._size).tolist():
            is_cut = long == "truncate" and self._conversations.loss[int(indices[row])][1 : self._size + 1].any()
            keep[row] = bool(is_cut)
        return keep

    @staticmethod
    def numel_low_level_dataset(low_level_dataset: Any) -> int:
        return len(low_level_dataset.ids.sequence_lengths)

    @staticmethod
    def build_low_level_dataset(dataset_path: str, config: Any) -> Any:
        return Conversations(IndexedDataset(dataset_path), IndexedDataset(loss_prefix(dataset_path)))

    @property
    def num_conversations(self) -> int:
        """Conversations of an epoch."""
        return len(self._indices)

    def __len__(self) -> int:
        return self._epochs * self.packing.per_epoch

    def __getitem__(self, idx: int) -> dict[str, torch.Tensor]:
        tokens = numpy.full(self._size, self._filler, dtype=numpy.int64)
        labels, positions, loss = (
            tokens.copy(),
            numpy.zeros(self._size, numpy.int64),
            numpy.zeros(self._size, numpy.float32),
        )
        start = 0
        for row in self.packing[idx].tolist():
            conversation = int(self._indices[row])
            # Together tokens and labels are at most one longer than the sample.
            ids = self._conversations.ids[conversation][: self._size + 1]
            end = start + len(ids) - 1
            tokens[start:end], labels[start:end] = ids[:-1], ids[1:]
            loss[start:end] = self._conversations.loss[conversation][1 : self._size + 1]
            positions[start:end] = numpy.arange(end - start)
            start = end
        return {
            "tokens": torch.from_numpy(tokens),
            "labels": torch.from_numpy(labels),
            "loss_mask": torch.from_numpy(loss),
            "position_ids": torch.from_numpy(positions),
        }
