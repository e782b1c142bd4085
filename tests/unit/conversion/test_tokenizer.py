"""Ids that a tokenizer hands out are counted from its files, whatever kind it is."""

import json

import pytest
from tiny_models import write_tokenizer

from megatron_midus.conversion.tokenizer import check_tokenizer, tokenizer_size


def test_counts_what_transformers_counts(tmp_path):
    from transformers import AutoTokenizer

    write_tokenizer(tmp_path, vocab_size=271)
    tokenizer = AutoTokenizer.from_pretrained(str(tmp_path))
    assert tokenizer_size(tmp_path) == len(tokenizer) <= 271
    tokenizer.add_tokens(["<new>", "<newer>"])
    tokenizer.save_pretrained(str(tmp_path))
    assert tokenizer_size(tmp_path) == len(tokenizer)


def test_sentencepiece(tmp_path):
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["some words to learn pieces from, a few more words"] * 20),
        model_writer=model,
        vocab_size=30,
        model_type="bpe",
        minloglevel=2,
    )
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    assert tokenizer_size(tmp_path) == 30
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<a>": 30, "<b>": 41}))
    assert tokenizer_size(tmp_path) == 42


@pytest.mark.parametrize(
    "files, size",
    [
        ({}, None),
        ({"vocab.json": {"a": 0, "b": 7}}, 8),
        ({"tokenizer.json": {"model": {"vocab": [["a", -1.0], ["b", -2.0]]}}}, 2),
        ({"tokenizer.json": {"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 5}]}}, 6),
        ({"tokenizer.json": {"model": {"vocab": {}}, "added_tokens": None}}, 0),
    ],
)
def test_other_files(tmp_path, files, size):
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert tokenizer_size(tmp_path) == size


def test_refusals(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({"model": {"vocab": {"a": 10}}}))
    check_tokenizer(tmp_path, 11)
    with pytest.raises(ValueError, match="has 11 ids and the embedding 10 rows"):
        check_tokenizer(tmp_path, 10)
    for content in ("{", "[]", '{"model": 3}'):
        path.write_text(content)
        with pytest.raises(ValueError, match="tokenizer.json"):
            tokenizer_size(tmp_path)
    path.unlink()
    (tmp_path / "tokenizer.model").write_bytes(b"no model")
    with pytest.raises(ValueError, match="not a SentencePiece model"):
        tokenizer_size(tmp_path)
