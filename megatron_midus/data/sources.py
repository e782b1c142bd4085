"""What the flags of the data name, checked before anything is built. Imports neither torch nor Megatron.

What Megatron-Core would answer with a bare assert, an endless loop or silence is refused here: missing and truncated
files, splits without a token (an endless loop), ids beyond the vocabulary.
"""

from __future__ import annotations

import dataclasses
import os
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy

from megatron_midus.config.data import DEFAULT_SPLIT, DataConfig
from megatron_midus.data.chat_template import template_digest, template_of_run
from megatron_midus.data.statistics import statistics_path
from megatron_midus.data.tokenizer import Tokenizer
from megatron_midus.errors import UserError
from megatron_midus.json_files import read_json_object

SPLITS = ("train", "valid", "test")
Blend = tuple[list[str], list[float] | None]
Warn = Callable[[str], None]

# The element types of Megatron-Core's indexed datasets, by the code in the index.
_DTYPES = {
    1: numpy.uint8,
    2: numpy.int8,
    3: numpy.int16,
    4: numpy.int32,
    5: numpy.int64,
    6: numpy.float64,
    7: numpy.float32,
    8: numpy.uint16,
}
_HEADER = struct.Struct("<9sQBQQ")

# Ids looked at when a dataset comes without the statistics that preprocess_data.py writes beside it.
_IDS_SAMPLED = 1 << 20


@dataclasses.dataclass(frozen=True)
class Sources:
    """The data of a run, as they lie on the disk.

    Attributes:
        blends: prefixes and weights of train, valid and test; ``None`` for a split that is not there.
        sizes: samples of each split that are built; ``None`` = one pass, 0 = not built.
        tokens: of each split in each dataset.
    """

    blends: list[Blend | None]
    sizes: list[int | None]
    tokens: dict[str, list[int]]

    @property
    def prefixes(self) -> list[str]:
        return sorted(self.tokens)


def check_data_files(config: DataConfig, sizes: Sequence[int | None]) -> None:
    """Looks for the files that the flags of the data name, and at the heads of their indices. Needs no tokenizer.

    Args:
        sizes: samples of train, valid and test; 0 = that split is not read.

    Raises:
        ValueError: a prefix without files, weights that do not fit their prefixes.
    """
    for prefix in _prefixes(blends(config, sizes)):
        _check_files(prefix)
        if config.sft:
            _check_loss_files(prefix)


def check_data(config: DataConfig, tokenizer: Tokenizer, sizes: Sequence[int | None], warn: Warn) -> Sources:
    """Checks all that can be known of the data before a dataset is built.

    Args:
        tokenizer: the one that the data were made with.
        sizes: samples of train, valid and test; ``None`` = one pass over the split; 0 = it is not read.
        warn: is told what is odd and no reason to end.

    Raises:
        ValueError: missing or damaged files, a split without documents, ids beyond the vocabulary, weights where the
            split is read once.
    """
    sizes, found = list(sizes), blends(config, sizes)
    if config.dataloader_type == "cyclic" and found[0] is not None and found[0][1] is None and sizes[0] != 0:
        sizes[0] = None
    tokens = {}
    for prefix in _prefixes(found):
        lengths = check_indexed_dataset(prefix, vocab_size=tokenizer.vocab_size)
        if config.sft:
            lengths = _check_conversations(prefix, lengths, config)
            _check_template(prefix, template_of_run(config, tokenizer))
        elif (_read_statistics(prefix) or {}).get("sft"):
            raise UserError(f"{prefix} holds conversations of midus preprocess --sft; train on them with --sft")
        tokens[prefix] = _tokens_per_split(lengths, config)
        _compare_tokenizers(prefix, tokenizer, warn)
    if config.data_path:
        sizes = _without_empty_splits(tokens, config, sizes, warn)
    for name, blend, size in zip(SPLITS, found, sizes):
        if blend is not None and blend[1] is not None and size is None:
            raise UserError(f"one pass over a blend with weights is not defined; leave the weights of {name} out")
    return Sources(found, sizes, tokens)


def _prefixes(found: Sequence[Blend | None]) -> list[str]:
    return sorted({prefix for blend in found if blend for prefix in blend[0]})


def parse_blend(values: Sequence[str], flag: str = "--data-path") -> Blend:
    """``["0.7", "a", "0.3", "b"]`` -> ``(["a", "b"], [0.7, 0.3])``; ``["a", "b"]`` -> ``(["a", "b"], None)``.

    Raises:
        ValueError: weights for some prefixes only, or a weight that is not positive.
    """
    weights = [_as_number(v) for v in values[::2]]
    if len(values) % 2 or all(w is None for w in weights):
        stray = [v for v in values if _as_number(v) is not None and not _exists(v)]
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
    lengths, dtype = read_lengths(prefix)
    if not len(lengths) or int(lengths.sum()) == 0:
        raise UserError(f"{prefix} holds no tokens")
    _check_ids(prefix, dtype, vocab_size)
    return lengths


def read_lengths(prefix: str) -> tuple[numpy.ndarray, Any]:
    """The tokens of each document, ``[documents]`` int32, and the type of the ids.

    Raises:
        ValueError: ``prefix.bin``/``.idx`` are missing or truncated.
    """
    _check_files(prefix)
    lengths, end, dtype = _read_index(prefix + ".idx")
    actual = os.path.getsize(prefix + ".bin")
    if actual != end:
        raise UserError(f"{prefix}.bin has {actual} bytes, its index says {end}; it is truncated, make it again")
    return lengths, dtype


def _check_files(prefix: str) -> None:
    for suffix in (".idx", ".bin"):
        if not Path(prefix + suffix).is_file():
            raise UserError(f"{prefix}{suffix} does not exist{_hint(prefix)}")
    _check_index_file(prefix + ".idx")


def _read_index(path: str) -> tuple[numpy.ndarray, int, Any]:
    """Tokens of each sequence, the bytes that the ``.bin`` file must have, and the type of an id.

    Megatron-Core's own reader checks by asserts that leave half an object behind, and notices a short file only in the
    middle of a run.
    """
    _, _, code, num_sequences, num_ends = _HEADER.unpack(read_head(path, _HEADER.size))
    dtype = _DTYPES[code]
    lengths = numpy.fromfile(path, numpy.int32, num_sequences, offset=_HEADER.size)
    if not num_sequences:
        return lengths, 0, dtype
    pointers = _HEADER.size + 4 * num_sequences
    last = int(numpy.fromfile(path, numpy.int64, 1, offset=pointers + 8 * (num_sequences - 1))[0])
    ends = pointers + 8 * num_sequences
    if not num_ends or numpy.fromfile(path, numpy.int64, 1, offset=ends + 8 * (num_ends - 1))[0] != num_sequences:
        raise UserError(f"{path} is damaged: its documents do not end where its sequences do; make it again")
    return lengths, last + int(lengths[-1]) * numpy.dtype(dtype).itemsize, dtype


def _check_index_file(path: str) -> None:
    """Header (magic, version, type, counts of sequences and of document ends), and the size that follows from it."""
    head = read_head(path, _HEADER.size)
    if head[:9] != b"MMIDIDX\x00\x00":
        raise UserError(f"{path} is not the index of an indexed dataset; make it with midus preprocess")
    if len(head) == _HEADER.size:
        _, version, code, num_sequences, num_ends = _HEADER.unpack(head)
        # A length of 4 bytes and a place of 8 for each sequence, 8 for each document end. Multimodal ones have more.
        needed = _HEADER.size + 12 * num_sequences + 8 * num_ends
        if version == 1 and code in _DTYPES and os.path.getsize(path) >= needed:
            return
    raise UserError(f"{path} is damaged or cut off; make it again")


def loss_prefix(prefix: str) -> str:
    """``P_sft_document`` -> ``P_sft_loss_document``: where 1 stands for each token that the assistant says."""
    return prefix.removesuffix("_document") + "_loss_document"


def _check_loss_files(prefix: str) -> None:
    if not _exists(loss_prefix(prefix)):
        raise UserError(
            f"{prefix} has no loss mask {loss_prefix(prefix)}.bin beside it, so it holds no conversations; make them with "
            "midus preprocess --sft"
        )


def _check_conversations(prefix: str, lengths: numpy.ndarray, config: DataConfig) -> numpy.ndarray:
    """``lengths`` with 0 for conversations that are left out because they are too long."""
    _check_loss_files(prefix)
    if not numpy.array_equal(check_indexed_dataset(loss_prefix(prefix), vocab_size=2), lengths):
        raise UserError(f"{prefix} and its loss mask are of different conversations; make both again")
    # A place for every token that is predicted.
    is_long = lengths > config.seq_length + 1
    if config.sft_long_conversations == "refuse" and is_long.any():
        raise UserError(
            f"{int(is_long.sum())} of {len(lengths)} conversations of {prefix} are longer than --seq-length {config.seq_length}, the "
            f"longest has {int(lengths.max())} tokens; give --seq-length {int(lengths.max()) - 1}, or --sft-long-conversations "
            "truncate or drop"
        )
    return numpy.where(is_long, 0, lengths) if config.sft_long_conversations == "drop" else lengths


def _check_template(prefix: str, template: str | None) -> None:
    """The model answers through the template that its export has, so that has to be the one it learnt with."""
    if template is None:
        raise UserError(
            f"the tokenizer has no chat template, and {prefix} was made with one; give its file with --chat-template"
        )
    digest = template_digest(template)
    if (_read_statistics(prefix) or {}).get("chat_template_sha256", digest) != digest:
        raise UserError(
            f"{prefix} was made with another chat template than this run's; give --chat-template FILE with the one of midus preprocess"
        )


def _exists(prefix: str) -> bool:
    return Path(prefix + ".idx").is_file() and Path(prefix + ".bin").is_file()


def _hint(prefix: str) -> str:
    for name in (f"{prefix}_text_document", prefix.removesuffix(".bin").removesuffix(".idx")):
        if name != prefix and _exists(name):
            return f"; did you mean {name}?"
    return "; give the prefix of a dataset that midus preprocess made"


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


def _compare_tokenizers(prefix: str, tokenizer: Tokenizer, warn: Warn) -> None:
    """Warns where the data were made with other words for the same ids, which no check of ranges can see."""
    made_with = (_read_statistics(prefix) or {}).get("tokenizer", {})
    mine = tokenizer.unique_identifiers
    # The same vocabulary in two libraries has other spellings, so only like is compared with like.
    if made_with.get("class") == mine["class"] and made_with != mine:
        warn(f"{prefix} was made with another tokenizer than the one given: its vocabulary or special tokens differ")


def _read_statistics(prefix: str) -> dict[str, Any] | None:
    """What ``preprocess_data.py`` wrote beside a dataset; ``None`` when the dataset comes from elsewhere."""
    path = statistics_path(prefix)
    if not path.is_file():
        return None
    try:
        statistics = read_json_object(path)
        statistics["max_token_id"] = int(statistics["max_token_id"])
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is not the statistics of a dataset; delete it or make the data again") from None
    return statistics


def blends(config: DataConfig, sizes: Sequence[int | None]) -> list[Blend | None]:
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
    tokens: dict[str, list[int]], config: DataConfig, sizes: Sequence[int | None], warn: Warn
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
        warn(f"{found}: there is no {name} data")
        sizes[index] = 0
    return sizes


def read_head(path: str, num_bytes: int) -> bytes:
    with open(path, "rb") as stream:
        return stream.read(num_bytes)
