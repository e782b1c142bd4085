"""How many token ids the tokenizer files of a Hugging Face directory hand out, without loading a tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_midus.errors import UserError
from megatron_midus.json_files import read_json_object


def tokenizer_size(directory: str | Path) -> int | None:
    """The largest token id of the tokenizer in ``directory`` plus one; ``None`` when there is no tokenizer.

    Reads ``tokenizer.json``, or ``tokenizer.model`` (SentencePiece) or ``vocab.json``, and ``added_tokens.json``.
    """
    directory = Path(directory)
    sizes = []
    if (directory / "tokenizer.json").is_file():
        sizes.append(_fast_size(directory / "tokenizer.json"))
    elif (directory / "tokenizer.model").is_file():
        sizes.append(_sentencepiece_size(directory / "tokenizer.model"))
    elif (directory / "vocab.json").is_file():
        sizes.append(_largest(read_json_object(directory / "vocab.json").values()))
    if (directory / "added_tokens.json").is_file():
        sizes.append(_largest(read_json_object(directory / "added_tokens.json").values()))
    return max(sizes, default=None)


def check_tokenizer(directory: str | Path, vocab_size: int) -> None:
    """Raises ``ValueError`` when the tokenizer knows ids that the embedding has no row for."""
    size = tokenizer_size(directory)
    if size is not None and size > vocab_size:
        raise UserError(
            f"the tokenizer in {directory} has {size} ids and the embedding {vocab_size} rows; "
            "resize the embedding or use the tokenizer that belongs to the model"
        )


def special_token_ids(directory: str | Path) -> dict[str, int]:
    """``bos_token_id``, ``eos_token_id`` and ``pad_token_id`` as far as the tokenizer in ``directory`` names them."""
    directory = Path(directory)
    if not (directory / "tokenizer_config.json").is_file() or not (directory / "tokenizer.json").is_file():
        return {}
    settings, content = (
        read_json_object(directory / "tokenizer_config.json"),
        read_json_object(directory / "tokenizer.json"),
    )
    ids = {token["content"]: token["id"] for token in content.get("added_tokens") or []}
    found = {}
    for name in ("bos_token", "eos_token", "pad_token"):
        token = settings.get(name)
        text = token.get("content") if isinstance(token, dict) else token
        if text in ids:
            found[f"{name}_id"] = ids[text]
    return found


def _fast_size(path: Path) -> int:
    content = read_json_object(path)
    try:
        vocab = content["model"]["vocab"]
        added = [token["id"] for token in content.get("added_tokens") or []]
        # Unigram models list their pieces in order, the others map them to ids.
        ids = range(len(vocab)) if isinstance(vocab, list) else vocab.values()
        return _largest([*ids, *added])
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a tokenizer: {type(error).__name__} {error}") from None


def _sentencepiece_size(path: Path) -> int:
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor()
    try:
        processor.Load(str(path))
        return processor.GetPieceSize()
    except (RuntimeError, OSError) as error:
        raise UserError(f"{path} is not a SentencePiece model: {error}") from None


def _largest(ids: Any) -> int:
    return max(ids, default=-1) + 1
