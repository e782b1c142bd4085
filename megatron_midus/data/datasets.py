"""Training, validation and test samples from indexed datasets, through Megatron-Core's blended builder.

What the builder leaves to asserts, endless loops or silence is checked here first: missing and truncated files, splits
without a token (an endless loop), ids beyond the vocabulary, and a sample cache that outlived its data.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.utils import log_single_rank

from megatron_midus.config.data import DEFAULT_SPLIT, DataConfig
from megatron_midus.data.statistics import statistics_path
from megatron_midus.data.tokenizer import Tokenizer
from megatron_midus.errors import UserError

logger = logging.getLogger(__name__)

SPLITS = ("train", "valid", "test")
Blend = tuple[list[str], list[float] | None]

# Ids looked at when a dataset comes without the statistics that preprocess_data.py writes beside it.
_IDS_SAMPLED = 1 << 20


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

    sources = _sources(config, sizes)
    if config.dataloader_type == "cyclic" and sources[0] is not None and sources[0][1] is None and sizes[0] != 0:
        sizes[0] = None
    prefixes = sorted({prefix for blend in sources if blend for prefix in blend[0]})
    tokens = {}
    for prefix in prefixes:
        lengths = check_indexed_dataset(prefix, vocab_size=tokenizer.vocab_size)
        tokens[prefix] = _tokens_per_split(lengths, config)
        _compare_tokenizers(prefix, tokenizer)
    if config.data_path:
        sizes = _without_empty_splits(tokens, config, sizes)

    cache = _cache_directory(config, prefixes)
    train, valid, test = (
        _build_split(index, size, sources[index], config, tokenizer, tokens, cache, seed, is_built_on_rank)
        for index, size in enumerate(sizes)
    )
    return train, valid, test


def _build_split(
    index: int,
    size: int | None,
    source: Blend | None,
    config: DataConfig,
    tokenizer: Tokenizer,
    tokens: dict[str, list[int]],
    cache: str | None,
    seed: int,
    is_built_on_rank: Callable[[], bool],
) -> Any:
    """One split. Each has its own builder, because a blend may have weights in one and none in another."""
    if size == 0 or (source is None and not config.mock_data):
        return None
    if source is not None:
        source = (source[0], _weights(source, size, tokens, index, SPLITS[index]))
    core_config = _gpt_dataset_config(config, tokenizer, source, index, cache=cache, seed=seed)
    if core_config.split_matrix is not None:
        core_config.split_matrix = [part if i == index else None for i, part in enumerate(core_config.split_matrix)]
        if core_config.split_matrix[index] is None:
            return None
    sizes = [size if i == index else 0 for i in range(len(SPLITS))]
    cls = MockGPTDataset if config.mock_data else GPTDataset
    return BlendedMegatronDatasetBuilder(cls, sizes, is_built_on_rank, core_config).build()[index]


def _weights(
    source: Blend, size: int | None, tokens: dict[str, list[int]], index: int, name: str
) -> list[float] | None:
    """Weights of a blend. Without any, Megatron-Core never repeats a blend of several datasets, however many samples are
    asked for; the sizes of the datasets say the same and repeat it."""
    prefixes, weights = source
    if weights is not None and size is None:
        raise UserError(f"one pass over a blend with weights is not defined; leave the weights of {name} out")
    if weights is not None or len(prefixes) == 1 or size is None:
        return weights
    return [float(tokens[prefix][index]) for prefix in prefixes]


def parse_blend(values: Sequence[str], flag: str = "--data-path") -> Blend:
    """``["0.7", "a", "0.3", "b"]`` -> ``(["a", "b"], [0.7, 0.3])``; ``["a", "b"]`` -> ``(["a", "b"], None)``.

    Raises:
        ValueError: weights for some prefixes only, or a weight that is not positive.
    """
    weights = [_as_number(v) for v in values[::2]]
    if len(values) % 2 or all(w is None for w in weights):
        stray = [v for v in values if _as_number(v) is not None and not IndexedDataset.exists(v)]
        if stray:
            raise UserError(f"{flag} {' '.join(values)}: give a weight before every prefix or before none")
        return list(values), None
    for weight, prefix in zip(weights, values[1::2]):
        if weight is None:
            raise UserError(f"{flag} {' '.join(values)}: give a weight before every prefix or before none")
        if not 0 < weight < float("inf"):
            raise UserError(f"{flag}: the weight {weight} of {prefix} must be positive")
    return list(values[1::2]), [w for w in weights if w is not None]


def _as_number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def check_indexed_dataset(prefix: str, *, vocab_size: int) -> numpy.ndarray:
    """The tokens of each document, ``[documents]`` int32.

    Raises:
        ValueError: ``prefix.bin``/``.idx`` are missing, truncated or empty, or hold ids >= ``vocab_size``.
    """
    for suffix in (".idx", ".bin"):
        if not Path(prefix + suffix).is_file():
            raise UserError(f"{prefix}{suffix} does not exist{_hint(prefix)}")
    # Before the reader maps the file: its checks are asserts that leave half an object behind, and a short file is only
    # noticed in the middle of a run.
    _check_index_file(prefix + ".idx")
    try:
        dataset = IndexedDataset(prefix)
    except (AssertionError, ValueError, IndexError, OSError, KeyError) as error:
        raise UserError(f"{prefix}.idx or .bin is damaged ({type(error).__name__}); make it again") from None
    index = dataset.index
    if not len(index) or int(index.sequence_lengths.sum()) == 0:
        raise UserError(f"{prefix} holds no tokens")
    expected = int(index.sequence_pointers[-1]) + int(index.sequence_lengths[-1]) * index.dtype_size
    actual = os.path.getsize(prefix + ".bin")
    if actual != expected:
        raise UserError(f"{prefix}.bin has {actual} bytes, its index says {expected}; it is truncated, make it again")
    _check_ids(prefix, index.dtype, vocab_size)
    # A copy: the reader unmaps its file when it goes, and views of it then crash the process.
    return index.sequence_lengths.copy()


def _check_index_file(path: str) -> None:
    """Header, version, type and size: 34 bytes, then lengths, places and document ends."""
    head = _read_head(path, 34)
    if head[:9] != b"MMIDIDX\x00\x00":
        raise UserError(f"{path} is not the index of an indexed dataset; make it with tools/preprocess_data.py")
    if len(head) == 34:
        version, dtype, num_sequences, num_ends = struct.unpack("<QBQQ", head[9:])
        # A type of 4 bytes and one of 8 for each sequence, one of 8 for each end. Multimodal ones have more.
        needed = 34 + 12 * num_sequences + 8 * num_ends
        if version == 1 and 1 <= dtype <= 8 and os.path.getsize(path) >= needed:
            return
    raise UserError(f"{path} is damaged or cut off; make it again")


def _hint(prefix: str) -> str:
    for name in (f"{prefix}_text_document", prefix.removesuffix(".bin").removesuffix(".idx")):
        if name != prefix and IndexedDataset.exists(name):
            return f"; did you mean {name}?"
    return "; give the prefix of a dataset that tools/preprocess_data.py made"


def _check_ids(prefix: str, dtype: Any, vocab_size: int) -> None:
    """The largest id by the statistics beside the dataset, or else by its first ids."""
    statistics = _read_statistics(prefix)
    if statistics is not None:
        largest = statistics["max_token_id"]
    else:
        largest = int(numpy.fromfile(prefix + ".bin", dtype=dtype, count=_IDS_SAMPLED).max())
    if largest >= vocab_size:
        raise UserError(
            f"{prefix} holds the token id {largest}, but the tokenizer has only {vocab_size} ids; "
            "give the --tokenizer-model that the data were made with"
        )


def _compare_tokenizers(prefix: str, tokenizer: Tokenizer) -> None:
    """Warns where the data were made with other words for the same ids, which no check of ranges can see."""
    made_with = (_read_statistics(prefix) or {}).get("tokenizer", {})
    mine = tokenizer.unique_identifiers
    # The same vocabulary in two libraries has other spellings, so only like is compared with like.
    if made_with.get("class") == mine["class"] and made_with != mine:
        log_single_rank(
            logger,
            logging.WARNING,
            f"{prefix} was made with another tokenizer than the one given: its vocabulary or special tokens differ",
        )


def _read_statistics(prefix: str) -> dict[str, Any] | None:
    """What ``preprocess_data.py`` wrote beside a dataset; ``None`` when the dataset comes from elsewhere."""
    path = statistics_path(prefix)
    if not path.is_file():
        return None
    try:
        statistics = json.loads(path.read_text())
        statistics["max_token_id"] = int(statistics["max_token_id"])
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is not the statistics of a dataset; delete it or make the data again") from None
    return statistics


def _sources(config: DataConfig, sizes: Sequence[int | None]) -> list[Blend | None]:
    """The blend of each split; all three the same for ``--data-path``."""
    if config.mock_data:
        return [None, None, None]
    if config.data_path:
        return [parse_blend(config.data_path)] * 3
    paths = (config.train_data_path, config.valid_data_path, config.test_data_path)
    return [
        parse_blend(path, f"--{name}-data-path") if path and size != 0 else None
        for name, path, size in zip(SPLITS, paths, sizes)
    ]


def _tokens_per_split(lengths: numpy.ndarray, config: DataConfig) -> list[int]:
    """Tokens that train, valid and test have in a dataset: of their part with ``--data-path``, else all of them."""
    if not config.data_path:
        return [int(lengths.sum())] * len(SPLITS)
    counts, start = [], 0.0
    for share in config.split_fractions():
        # The builder's own rounding.
        begin, end = int(round(start * len(lengths))), int(round((start + share) * len(lengths)))
        counts.append(int(lengths[begin:end].sum()))
        start += share
    return counts


def _without_empty_splits(
    tokens: dict[str, list[int]], config: DataConfig, sizes: list[int | None]
) -> list[int | None]:
    """Sizes with 0 where the *default* split leaves no document; an empty split that was asked for is an error.

    Megatron-Core repeats an empty split for ever in search of its samples.
    """
    sizes = list(sizes)
    for index, (name, share) in enumerate(zip(SPLITS, config.split_fractions())):
        empty = [prefix for prefix, counts in tokens.items() if not counts[index]]
        if share == 0 or sizes[index] == 0 or not empty:
            continue
        found = f"--split {config.split or DEFAULT_SPLIT} leaves no document of {empty[0]} for {name}"
        if config.split is not None or name == "train":
            raise UserError(f"{found}; give it a larger share or 0, or a file of its own by --{name}-data-path")
        log_single_rank(logger, logging.WARNING, f"{found}: there is no {name} data")
        sizes[index] = 0
    return sizes


def _gpt_dataset_config(
    config: DataConfig, tokenizer: Tokenizer, source: Blend | None, index: int, *, cache: str | None, seed: int
) -> GPTDatasetConfig:
    is_divided = bool(config.data_path)
    per_split = None if is_divided or config.mock_data else [source if i == index else None for i in range(len(SPLITS))]
    return GPTDatasetConfig(
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
        digest.update(_read_head(prefix + ".idx", 1 << 24))
    return str(root / digest.hexdigest()[:16])


def _read_head(path: str, num_bytes: int) -> bytes:
    with open(path, "rb") as stream:
        return stream.read(num_bytes)
