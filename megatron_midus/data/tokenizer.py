"""Tokenizers behind one small protocol: Hugging Face directory, SentencePiece file, or none for mock data.

Text is encoded without special tokens (no beginning-of-sequence); the end-of-document token is the tokenizer's
end-of-sequence token and is added by whoever asks for it. Imports no Megatron; pickles small, so that workers start fast.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from megatron_midus.config.data import DataConfig
from megatron_midus.errors import UserError
from megatron_midus.hub import local_model

TOKENIZER_TYPES = ("HuggingFaceTokenizer", "SentencePieceTokenizer", "NullTokenizer")


class Tokenizer(Protocol):
    """What preprocessing, the datasets and the driver ask of a tokenizer."""

    vocab_size: int
    """Largest id + 1."""
    eod: int
    """Id of the end-of-document token."""
    bos: int | None
    """Id of the beginning-of-sequence token, if there is one; never added by ``encode_batch``."""
    pad: int
    """Always -1: documents hold no padding, and Megatron-Core takes the loss away from every label that equals this."""
    unique_identifiers: dict[str, Any]
    """What makes this tokenizer another one than its neighbour; part of the keys of Megatron-Core's sample cache."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without special tokens."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``."""
        ...


class HuggingFaceTokenizer:
    """The tokenizer of a local Hugging Face directory.

    Args:
        directory: holds ``tokenizer.json`` or the files of a slow tokenizer. Nothing is fetched, no code in it is run.
        split_special_tokens: encode a special token that is spelled out in the text (``</s>``) as plain characters
            instead of as that token.

    Raises:
        ValueError: no such directory, no tokenizer in it, or a tokenizer without an end-of-sequence token.
    """

    pad = -1

    def __init__(self, directory: str | Path, *, split_special_tokens: bool = False) -> None:
        hf_tokenizer = load_hf_tokenizer(directory)
        if hf_tokenizer.eos_token_id is None:
            raise UserError(
                f"the tokenizer in {directory} has no end-of-sequence token, which ends documents; "
                "set eos_token in its tokenizer_config.json"
            )
        self.eod: int = hf_tokenizer.eos_token_id
        self.bos: int | None = hf_tokenizer.bos_token_id
        vocabulary = hf_tokenizer.get_vocab()
        # Not len(tokenizer): vocabularies with holes have ids beyond their size.
        self.vocab_size = max(len(hf_tokenizer), 1 + max(vocabulary.values(), default=0))
        self.chat_template = chat_template_of(hf_tokenizer)
        self.split_special_tokens = split_special_tokens
        # The Rust tokenizer alone pickles in a fraction of the time, and its workers need no transformers.
        self._fast = hf_tokenizer.backend_tokenizer if getattr(hf_tokenizer, "is_fast", False) else None
        self._slow = None if self._fast is not None else hf_tokenizer
        if self._fast is not None:
            self._fast.no_truncation()
            self._fast.no_padding()
            self._fast.encode_special_tokens = split_special_tokens
        self.unique_identifiers = _identify(
            "HuggingFaceTokenizer", vocabulary, eod=self.eod, vocab_size=self.vocab_size
        )

    def __getstate__(self) -> dict[str, Any]:
        # encode_special_tokens is not part of the serialised Rust tokenizer; __setstate__ sets it again.
        return self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._fast is not None:
            self._fast.encode_special_tokens = self.split_special_tokens

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        if self._fast is not None:
            return [e.ids for e in self._fast.encode_batch_fast(list(texts), add_special_tokens=False)]
        assert self._slow is not None
        options = {"split_special_tokens": True} if self.split_special_tokens else {}
        return self._slow(list(texts), add_special_tokens=False, **options)["input_ids"]

    def decode(self, ids: Sequence[int]) -> str:
        backend = self._fast if self._fast is not None else self._slow
        return backend.decode(list(ids), skip_special_tokens=False)


def chat_template_of(hf_tokenizer: Any) -> str | None:
    """The text of the chat template; of several, the default."""
    template = hf_tokenizer.chat_template
    return template.get("default") if isinstance(template, dict) else template


class SentencePieceTokenizer:
    """A SentencePiece ``.model`` file, or a directory with ``tokenizer.model`` in it.

    Raises:
        ValueError: no such file, not a SentencePiece model, or a model without an end-of-sequence piece.
    """

    pad = -1

    def __init__(self, path: str | Path) -> None:
        import sentencepiece

        path = Path(path)
        if path.is_dir():
            path = path / "tokenizer.model"
        if not path.is_file():
            raise UserError(f"SentencePiece model {path} does not exist; give the .model file to --tokenizer-model")
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise UserError(f"{path} is not a SentencePiece model: {_one_line(error)}") from None
        self.eod: int = self._model.eos_id()
        if self.eod < 0:
            raise UserError(
                f"the SentencePiece model {path} has no end-of-sequence piece, which ends documents; train it with eos_id >= 0"
            )
        self.bos: int | None = self._model.bos_id() if self._model.bos_id() >= 0 else None
        self.vocab_size: int = self._model.get_piece_size()
        vocabulary = {self._model.id_to_piece(i): i for i in range(self.vocab_size)}
        self.unique_identifiers = _identify(
            "SentencePieceTokenizer", vocabulary, eod=self.eod, vocab_size=self.vocab_size
        )

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self._model.encode(list(texts), out_type=int, num_threads=1)

    def decode(self, ids: Sequence[int]) -> str:
        return self._model.decode(list(ids))


class NullTokenizer:
    """Text is the ids themselves, ``"5 17 3"``; the last id is the end of a document. For mock data."""

    pad = -1
    bos = None

    def __init__(self, vocab_size: int) -> None:
        if vocab_size < 2:
            raise UserError(f"vocab_size={vocab_size} of a NullTokenizer must be at least 2")
        self.vocab_size = vocab_size
        self.eod = vocab_size - 1
        self.unique_identifiers = {"class": "NullTokenizer", "vocab_size": vocab_size}

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [[self._id(word) for word in text.split()] for text in texts]

    def _id(self, word: str) -> int:
        if not (word.isascii() and word.isdigit() and int(word) < self.vocab_size):
            raise UserError(f"{word!r} is not an id from 0 to {self.vocab_size - 1}, as a NullTokenizer needs")
        return int(word)

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))


def load_hf_tokenizer(directory: str | Path) -> Any:
    """The transformers tokenizer of a local directory; raises a one-line ``ValueError`` when there is none."""
    directory = Path(local_model(directory))
    if directory.is_file():
        raise UserError(f"{directory} is a file; a HuggingFaceTokenizer is the directory that holds tokenizer.json")
    if not directory.is_dir():
        raise UserError(f"tokenizer directory {directory} does not exist")
    known = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")
    if not any((directory / name).is_file() for name in known):
        raise UserError(f"{directory} holds no tokenizer; expected one of {', '.join(known)}")
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        with _quiet_transformers():
            return AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
    # What a broken file raises depends on the tokenizer class; the Rust parser raises a bare Exception.
    except Exception as error:
        first = error
    if (directory / "tokenizer.json").is_file():
        # A directory whose config.json names a model type of its own tells AutoTokenizer nothing; the file suffices.
        with contextlib.suppress(Exception):
            return PreTrainedTokenizerFast.from_pretrained(str(directory), local_files_only=True)
    raise UserError(f"the tokenizer in {directory} cannot be read: {_one_line(first)}")


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """AutoTokenizer reads config.json too, and complains of a model type that is not its own; tokenizers have none."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logging.set_verbosity(verbosity)


def build_tokenizer(config: DataConfig, *, default_directory: str | Path | None = None) -> Tokenizer:
    """The tokenizer that ``config`` names.

    Args:
        config: ``tokenizer_type`` and ``tokenizer_model``; with ``mock_data`` and neither, a NullTokenizer of
            ``config.vocab_size`` ids.
        default_directory: where to look when ``config`` names no tokenizer, usually the ``hf_assets`` of the checkpoint.

    Raises:
        ValueError: nothing named, or what is named is no tokenizer.
    """
    kind, model = config.tokenizer_type, config.tokenizer_model
    if kind == "NullTokenizer" or (kind is None and model is None and config.mock_data):
        if config.vocab_size is None:
            raise UserError("a NullTokenizer needs the number of ids")
        return NullTokenizer(config.vocab_size)
    path = model if model is not None else default_directory
    if path is None:
        raise UserError("no tokenizer was given; give --tokenizer-model")
    if kind is None:
        kind = "SentencePieceTokenizer" if str(path).endswith(".model") else "HuggingFaceTokenizer"
    return make_tokenizer(kind, path)


def make_tokenizer(kind: str, path: str | Path, *, split_special_tokens: bool = False) -> Tokenizer:
    """``HuggingFaceTokenizer`` or ``SentencePieceTokenizer`` at ``path``, or a ``NullTokenizer`` of ``path`` ids."""
    if kind == "HuggingFaceTokenizer":
        return HuggingFaceTokenizer(path, split_special_tokens=split_special_tokens)
    if split_special_tokens and kind != "SentencePieceTokenizer":
        raise UserError(f"split_special_tokens does not apply to {kind}")
    if kind == "SentencePieceTokenizer":
        # SentencePiece never parses control pieces in a text, so split_special_tokens holds anyway.
        return SentencePieceTokenizer(path)
    if kind == "NullTokenizer":
        if not str(path).isdigit():
            raise UserError(f"--tokenizer-model {path} of a NullTokenizer is not a number of ids")
        return NullTokenizer(int(str(path)))
    raise UserError(f"tokenizer type {kind!r} is not known; choose one of {', '.join(TOKENIZER_TYPES)}")


def check_tokenizer_fits(tokenizer: Tokenizer, num_embeddings: int, *, where: str = "the model") -> None:
    """Raises ``ValueError`` when ``tokenizer`` can produce ids that an embedding of ``num_embeddings`` rows lacks."""
    if tokenizer.vocab_size > num_embeddings:
        raise UserError(
            f"the tokenizer has ids up to {tokenizer.vocab_size - 1}, but the embedding of {where} has only "
            f"{num_embeddings} rows; use the tokenizer that the model was trained with"
        )


def _identify(kind: str, vocabulary: dict[str, int], **values: int) -> dict[str, Any]:
    """Content, not path: a tokenizer that is moved stays the same one."""
    content = json.dumps(sorted(vocabulary.items(), key=lambda item: (item[1], item[0])), ensure_ascii=True)
    return {"class": kind, "vocabulary_sha256": hashlib.sha256(content.encode()).hexdigest(), **values}


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."
