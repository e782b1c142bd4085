"""Training, validation and test samples from indexed datasets, through Megatron-Core's blended builder.

What the builder leaves to asserts, endless loops or silence is checked first (``sources.py``); here, that no sample
cache outlives its data.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.utils import log_single_rank

from megatron_midus.config.data import DataConfig
from megatron_midus.data.sft_dataset import SFTDataset, SFTDatasetConfig
from megatron_midus.data.sources import SPLITS, Blend, Sources, check_data, read_head
from megatron_midus.data.tokenizer import Tokenizer
from megatron_midus.errors import UserError

logger = logging.getLogger(__name__)


def build_train_valid_test_datasets(
    config: DataConfig,
    tokenizer: Tokenizer,
    *,
    num_samples: Sequence[int | None],
    seed: int,
    is_built_on_rank: Callable[[], bool] = lambda: True,
) -> tuple[Any, Any, Any]:
    """Builds the three datasets. Collective over all ranks; a blend of several needs torch.distributed initialised.

    Args:
        config: the source of data, ``seq_length`` and how samples are cut.
        tokenizer: the one that the data were made with.
        num_samples: samples of train, valid and test; the data are repeated as often as that takes. ``None`` = one pass;
            0 = do not build this split. With ``dataloader_type=cyclic`` and no blend weights, train is one pass whatever
            is asked, because the sampler repeats it; so its order does not depend on the length of the run.
        seed: of the document and sample order.
        is_built_on_rank: whether this rank reads samples; true on global rank 0, which writes the cache.

    Returns:
        ``(train, valid, test)`` datasets of dicts ``tokens, labels, position_ids`` int64 ``[seq_length]`` and
        ``loss_mask`` float32 ``[seq_length]``; ``None`` for a split that is not there or not built on this rank.

    Raises:
        ValueError: no source of data, missing or damaged files, a split without documents, ids beyond the vocabulary.
    """
    if not config.has_data:
        raise UserError("no data: give --data-path, or --train-data-path and --valid-data-path, or --mock-data")
    sizes = [None if n is None else int(n) for n in num_samples]
    if len(sizes) != 3 or any(n is not None and n < 0 for n in sizes):
        raise UserError(f"num_samples={list(num_samples)} must be three counts, for {', '.join(SPLITS)}")

    sources = check_data(config, tokenizer, sizes, functools.partial(log_single_rank, logger, logging.WARNING))
    cache = _cache_directory(config, sources.prefixes)
    train, valid, test = (
        _build_split(index, sources, config, tokenizer, cache, seed, is_built_on_rank) for index in range(len(SPLITS))
    )
    return train, valid, test


def _build_split(
    index: int,
    sources: Sources,
    config: DataConfig,
    tokenizer: Tokenizer,
    cache: str | None,
    seed: int,
    is_built_on_rank: Callable[[], bool],
) -> Any:
    """One split. Each has its own builder, because a blend may have weights in one and none in another."""
    size, source = sources.sizes[index], sources.blends[index]
    if size == 0 or (source is None and not config.mock_data):
        return None
    if source is not None:
        source = (source[0], _weights(source, size, sources.tokens, index))
    core_config = _gpt_dataset_config(config, tokenizer, source, index, cache=cache, seed=seed)
    if core_config.split_matrix is not None:
        core_config.split_matrix = [part if i == index else None for i, part in enumerate(core_config.split_matrix)]
        if core_config.split_matrix[index] is None:
            return None
    sizes = [size if i == index else 0 for i in range(len(SPLITS))]
    cls = MockGPTDataset if config.mock_data else SFTDataset if config.sft else GPTDataset
    return BlendedMegatronDatasetBuilder(cls, sizes, is_built_on_rank, core_config).build()[index]


def _weights(source: Blend, size: int | None, tokens: dict[str, list[int]], index: int) -> list[float] | None:
    """Weights of a blend. Without any, Megatron-Core never repeats a blend of several datasets, however many samples are
    asked for; the sizes of the datasets say the same and repeat it."""
    prefixes, weights = source
    if weights is not None or len(prefixes) == 1 or size is None:
        return weights
    return [float(tokens[prefix][index]) for prefix in prefixes]


def _gpt_dataset_config(
    config: DataConfig, tokenizer: Tokenizer, source: Blend | None, index: int, *, cache: str | None, seed: int
) -> GPTDatasetConfig:
    is_divided = bool(config.data_path)
    per_split = None if is_divided or config.mock_data else [source if i == index else None for i in range(len(SPLITS))]
    kind = functools.partial(SFTDatasetConfig, sft_long_conversations=config.sft_long_conversations)
    return (kind if config.sft else GPTDatasetConfig)(
        random_seed=seed,
        sequence_length=config.seq_length,
        blend=source if is_divided else None,
        blend_per_split=per_split,
        split=",".join(map(str, config.split_fractions())) if is_divided else None,
        path_to_cache=cache,
        tokenizer=tokenizer,
        reset_position_ids=config.reset_position_ids,
        reset_attention_mask=config.reset_attention_mask,
        eod_mask_loss=config.eod_mask_loss,
        # The causal mask is the attention's own business; megatron_midus.data.batch makes the one between documents.
        create_attention_mask=False,
    )


def _cache_directory(config: DataConfig, prefixes: Sequence[str]) -> str | None:
    """A directory for these very files: Megatron-Core keys its cache by path alone and would serve indices of older data."""
    if not prefixes:
        return config.data_cache_path
    root = Path(config.data_cache_path) if config.data_cache_path else Path(prefixes[0]).parent / "cache"
    digest = hashlib.sha256()
    for prefix in prefixes:
        digest.update(f"{os.path.getsize(prefix + '.bin')} {os.path.getsize(prefix + '.idx')} ".encode())
        digest.update(read_head(prefix + ".idx", 1 << 24))
    return str(root / digest.hexdigest()[:16])
