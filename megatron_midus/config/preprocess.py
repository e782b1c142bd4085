"""What preprocessing, and the joining of its shards, can be told: inputs, tokenizer, filters, outputs."""

from __future__ import annotations

import dataclasses
import re
from typing import Literal

from megatron_midus.config.text import TEXT_KEY
from megatron_midus.errors import UserError

HUB = "hf://"
DEFAULT_SPLIT = "train"


@dataclasses.dataclass(frozen=True)
class Shard:
    """One of ``count`` parts of a corpus, the ``index``-th from 0."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        match = re.fullmatch(r"(\d{1,5})/(\d{1,5})", text)
        shard = cls(int(match[1]), int(match[2])) if match else cls(0, 0)
        if not shard.index < shard.count:
            raise UserError(f"--shard {text} is not I/N with I from 0 to N - 1, such as 0/8")
        return shard

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    @property
    def suffix(self) -> str:
        """What the names of its outputs have behind the prefix."""
        return f"_shard{self.index:05d}-of-{self.count:05d}"


@dataclasses.dataclass(frozen=True)
class PreprocessConfig:
    """Preprocessing

    Encodes a corpus (.jsonl, .txt, .parquet, datasets of the Hugging Face hub) into Megatron-Core indexed datasets, ready for --data-path of pretraining.

    Examples:
      midus preprocess --input corpus.jsonl --tokenizer-model DIR --output-prefix data/corpus --append-eod --workers 16
      midus preprocess --input corpus/ ... --output-prefix data/corpus --shard 3/8      (each of 8 jobs; then midus merge)
      midus preprocess --input hf://datasets/HuggingFaceFW/fineweb-edu/sample-10BT --split train ...
    """

    input: list[str]
    """Files (.jsonl or .txt, also .gz or .zst, and .parquet), directories of such files, glob patterns, or
    hf://datasets/ORG/NAME[@REVISION][/CONFIG or PATH], streamed from the Hugging Face hub. Must be given."""

    output_prefix: str
    """P of the outputs P_KEY_document.bin, .idx and .json (statistics). Must be given. Until they are whole, everything is in the
    directory .P.partial beside them; a killed run resumes from there when you start it again."""

    tokenizer_model: str
    """Directory of a HuggingFaceTokenizer, or .model file of a SentencePieceTokenizer. Must be given."""

    tokenizer_type: Literal["HuggingFaceTokenizer", "SentencePieceTokenizer", "NullTokenizer"] = "HuggingFaceTokenizer"
    """Kind of tokenizer. NullTokenizer takes texts of numbers; its --tokenizer-model is the number of ids."""

    json_keys: list[str] = dataclasses.field(default_factory=lambda: [TEXT_KEY])
    """Keys of the texts in a JSON line, or columns of a parquet file; each key gives one dataset."""

    split: str | None = None
    """Split of the datasets of the hub: train unless you say otherwise."""

    append_eod: bool = False
    """End every document with the tokenizer's end-of-sequence token. Training needs this."""

    prepend_bos: bool = False
    """Start every document with the tokenizer's beginning-of-sequence token."""

    sft: bool = False
    """The inputs are conversations (messages, prompt and completion, ShareGPT or Alpaca; .jsonl or .parquet), rendered by the
    tokenizer's chat template. Makes P_sft_document and, with what the assistant says, P_sft_loss_document, for --sft of pretraining."""

    chat_template: str | None = None
    """File of a chat template to use instead of the tokenizer's own."""

    split_special_tokens: bool = False
    """Encode special tokens that are spelled out in a text as plain characters, not as the tokens themselves."""

    workers: int = 1
    """Processes that encode. The output does not depend on it."""

    text_document_separator: str = "\\f"
    """What divides a .txt file into documents; \\n, \\t, \\f (form feed) and \\r are understood. A file without it is
    one document."""

    skip_bad_lines: bool = False
    """Leave malformed lines out and list them in P_malformed.txt, instead of ending at the first."""

    min_document_bytes: int | None = None
    """Leave out documents of fewer UTF-8 bytes."""

    max_document_bytes: int | None = None
    """Leave out documents of more UTF-8 bytes."""

    min_document_tokens: int | None = None
    """Leave out documents of fewer tokens, the beginning-of-sequence and end-of-document tokens not counted."""

    max_document_tokens: int | None = None
    """Leave out documents of more tokens, counted likewise."""

    split_by_hash: list[str] | None = None
    """Shares of train, valid and test, such as 98,1,1. Makes P_train_KEY_document and so on; a document goes by the
    hash of its text (white space aside), so the same text is always on the same side."""

    dedup: bool = dataclasses.field(default=False, metadata={"aliases": ["deduplicate"]})
    """Leave out documents whose text came before (white space aside), the first stays. Takes about 100 bytes of memory
    a document."""

    shard: str | None = dataclasses.field(default=None, metadata={"metavar": "I/N"})
    """Encode only the I-th of N parts of the input files, I from 0, into outputs of the prefix
    P_shardI-of-N. Shards share nothing and may run anywhere, at any time; midus merge makes of them what one run would have."""

    commit_seconds: float = 15.0
    """Seconds between the points from which a killed run can resume."""

    overwrite: bool = False
    """Replace outputs that exist, and throw away an unfinished run that had other settings."""

    def __post_init__(self) -> None:
        for name in ("input", "output_prefix", "tokenizer_model", "json_keys"):
            if not getattr(self, name):
                raise UserError(f"--{name.replace('_', '-')} is missing")
        if self.workers < 1:
            raise UserError(f"workers={self.workers} must be at least 1")
        if len(set(self.json_keys)) != len(self.json_keys):
            raise UserError(f"--json-keys {' '.join(self.json_keys)} names a key twice")
        for key in self.json_keys:
            if not re.fullmatch(r"[^/\0]+", key):
                raise UserError(f"--json-keys {key!r} cannot be part of a file name")
        if self.split is not None and not any(name.startswith(HUB) for name in self.input):
            raise UserError(
                f"--split {self.split} is of hf://datasets/… inputs, and there is none; for train, valid and test of one corpus "
                "give --split-by-hash"
            )
        self._check_sft()
        for kind in ("bytes", "tokens"):
            low, high = getattr(self, f"min_document_{kind}"), getattr(self, f"max_document_{kind}")
            if (low is not None and low < 0) or (high is not None and high < max(1, low or 0)):
                raise UserError(
                    f"--min-document-{kind} {low} and --max-document-{kind} {high} leave no document; "
                    "give 0 <= min <= max"
                )
        if not self.commit_seconds >= 0:
            raise UserError(f"commit_seconds={self.commit_seconds} must be 0 or more")
        self.shares()
        self.shard_of_files()

    def _check_sft(self) -> None:
        if not self.sft:
            if self.chat_template is not None:
                raise UserError(f"--chat-template {self.chat_template} is of --sft; add it")
            return
        if self.tokenizer_type != "HuggingFaceTokenizer":
            raise UserError(
                f"--sft needs a chat template, which {self.tokenizer_type} has not; give a HuggingFaceTokenizer"
            )
        for name, is_given in (
            ("json_keys", self.json_keys != [TEXT_KEY]),
            ("prepend_bos", self.prepend_bos),
            ("split_special_tokens", self.split_special_tokens),
        ):
            if is_given:
                flag = "--" + name.replace("_", "-")
                raise UserError(
                    f"{flag} does not go with --sft, where the chat template says what stands where; leave it out"
                )

    @property
    def dataset_names(self) -> list[str]:
        """The names of the datasets of a split: keys, or the ids and the loss mask of conversations."""
        return ["sft", "sft_loss"] if self.sft else self.json_keys

    def shard_of_files(self) -> Shard | None:
        """``--shard``; ``None`` without it."""
        return None if self.shard is None else Shard.parse(self.shard)

    @property
    def written_prefix(self) -> str:
        """What the names of the outputs begin with: ``output_prefix``, and the shard's number."""
        shard = self.shard_of_files()
        return self.output_prefix + ("" if shard is None else shard.suffix)

    def shares(self) -> list[float]:
        """``--split-by-hash`` as numbers, separated by commas or blanks; ``[1.0]`` without it."""
        if self.split_by_hash is None:
            return [1.0]
        words = [str(value) for value in self.split_by_hash]
        try:
            shares = [float(part) for word in words for part in word.split(",") if part]
        except ValueError:
            shares = []
        if not 1 <= len(shares) <= 3 or min(shares) < 0 or not 0 < sum(shares) < float("inf") or shares[0] == 0:
            raise UserError(f"--split-by-hash {' '.join(words)} is not shares of train, valid and test, such as 98,1,1")
        return shares


@dataclasses.dataclass(frozen=True)
class MergeConfig:
    """Merging of shards

    Joins what midus preprocess --shard I/N wrote into the datasets that one run over all files would have written, byte for byte.

    Examples:
      midus merge --output-prefix data/corpus --delete-shards
    """

    output_prefix: str
    """P of the shards and of the outputs P_KEY_document.bin, .idx and .json: the --output-prefix that the shards were given."""

    delete_shards: bool = False
    """Remove the shards once the outputs are whole."""

    overwrite: bool = False
    """Replace outputs that exist."""
