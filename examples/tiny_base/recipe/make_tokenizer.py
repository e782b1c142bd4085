"""Trains the SentencePiece tokenizer of the tiny base model and writes the same tokenizer in Hugging Face's format.

Both files give the same ids for the same text, which the script checks on held-out text before it writes anything.
"""

from __future__ import annotations

import inspect
import io
import json
from pathlib import Path

import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from megatron_midus.cli import run
from megatron_midus.config.parser import ArgumentParser
from megatron_midus.errors import UserError
from megatron_midus.files import write_text_atomically

UNKNOWN, BEGIN, END = "<unk>", "<s>", "</s>"


def read_texts(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def train_sentencepiece(texts: list[str], vocab_size: int) -> bytes:
    """A byte-fallback BPE that keeps every space and line break: code is nothing without them."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        # SentencePiece takes a line as a sentence; line breaks come back as a piece of their own.
        sentence_iterator=iter([line + "\n" for text in texts for line in text.splitlines()]),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        allow_whitespace_only_pieces=True,
        user_defined_symbols=["\n"],
        byte_fallback=True,
        character_coverage=0.9995,
        num_threads=1,
        unk_piece=UNKNOWN,
        bos_piece=BEGIN,
        eos_piece=END,
        minloglevel=1,
    )
    return model.getvalue()


def to_hugging_face(model: bytes) -> Tokenizer:
    """The same BPE as a ``tokenizers`` pipeline: SentencePiece's merge order is the order of its pieces."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    pieces = [processor.id_to_piece(i) for i in range(processor.get_piece_size())]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    special = {
        i for i in range(len(pieces)) if processor.is_control(i) or processor.is_unknown(i) or processor.is_byte(i)
    }
    merges = []
    for index, piece in enumerate(pieces):
        if index in special or piece == "\n":
            continue
        splits = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        splits = [(left, right) for left, right in splits if left in vocab and right in vocab]
        merges += sorted(splits, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token=UNKNOWN, fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in (UNKNOWN, BEGIN, END)])
    return tokenizer


def main() -> int:
    parser = ArgumentParser(description=inspect.cleandoc(__doc__))
    parser.add_argument("--corpus-dir", type=Path, required=True, help="directory with train.jsonl and heldout.jsonl")
    parser.add_argument("--output-dir", type=Path, required=True, help="receives the tokenizer files")
    parser.add_argument(
        "--vocab-size", type=int, default=2048, help="pieces, bytes and specials included (default: 2048)"
    )
    parser.add_argument("--max-length", type=int, default=1024, help="positions of the model, tokens (default: 1024)")
    args = parser.parse_args()

    model = train_sentencepiece(read_texts(args.corpus_dir / "train.jsonl"), args.vocab_size)
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    tokenizer = to_hugging_face(model)
    characters = tokens = 0
    for text in [*read_texts(args.corpus_dir / "heldout.jsonl"), "café ☃ \t\n\n  x\u0000 日本"]:
        ids = processor.encode(text)
        if ids != tokenizer.encode(text, add_special_tokens=False).ids:
            raise UserError(f"the two tokenizers disagree on a text that begins with {text[:60]!r}")
        if tokenizer.decode(ids) != text:
            raise UserError(f"a text that begins with {text[:60]!r} does not survive the round trip")
        characters, tokens = characters + len(text.encode()), tokens + len(ids)

    args.output_dir.mkdir(parents=True, exist_ok=True)
    (args.output_dir / "tokenizer.model").write_bytes(model)
    write_text_atomically(args.output_dir / "tokenizer.json", tokenizer.to_str(pretty=False))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": args.max_length,
        "bos_token": BEGIN,
        "eos_token": END,
        "unk_token": UNKNOWN,
        "clean_up_tokenization_spaces": False,
    }
    write_text_atomically(args.output_dir / "tokenizer_config.json", json.dumps(settings, indent=2) + "\n")
    print(
        f"{args.output_dir}: {processor.get_piece_size()} pieces, {characters / tokens:.2f} bytes a token on held-out text"
    )
    return 0


if __name__ == "__main__":
    run(main)
