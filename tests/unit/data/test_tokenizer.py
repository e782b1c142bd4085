"""Tokenizers: the same ids as the library's own call, no special tokens added, and every wrong directory in one line."""

import json
import pickle
import shutil

import pytest
import sentencepiece
from transformers import AutoTokenizer

from megatron_midus.config.data import DataConfig
from megatron_midus.data import build_tokenizer, check_tokenizer_fits
from megatron_midus.data.tokenizer import HuggingFaceTokenizer, NullTokenizer, SentencePieceTokenizer, make_tokenizer


def test_hugging_face_ids_equal_transformers(hf_tokenizer_dir, texts):
    reference = AutoTokenizer.from_pretrained(hf_tokenizer_dir)
    tokenizer = HuggingFaceTokenizer(hf_tokenizer_dir)
    assert tokenizer.encode_batch(texts) == [reference(t, add_special_tokens=False)["input_ids"] for t in texts]
    assert [tokenizer.decode(ids) for ids in tokenizer.encode_batch(texts)] == texts
    assert (tokenizer.eod, tokenizer.bos, tokenizer.pad) == (reference.eos_token_id, reference.bos_token_id, -1)
    assert tokenizer.vocab_size == len(reference) == 300
    assert tokenizer.encode_batch([]) == [] and tokenizer.encode_batch([""]) == [[]]


def test_long_texts_are_not_cut(hf_tokenizer_dir, tmp_path, texts):
    """Neither model_max_length nor a truncation stored in tokenizer.json may shorten a document."""
    shutil.copytree(hf_tokenizer_dir, tmp_path / "t")
    path = tmp_path / "t" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["truncation"] = {"max_length": 4, "stride": 0, "strategy": "LongestFirst", "direction": "Right"}
    path.write_text(json.dumps(content))
    long = " ".join(texts)
    tokenizer = HuggingFaceTokenizer(tmp_path / "t")
    assert tokenizer.decode(tokenizer.encode_batch([long])[0]) == long
    assert tokenizer.encode_batch([long]) == HuggingFaceTokenizer(hf_tokenizer_dir).encode_batch([long])


def test_special_tokens_in_a_text(hf_tokenizer_dir):
    text = "memory </s> block"
    parsed, split = (HuggingFaceTokenizer(hf_tokenizer_dir, split_special_tokens=s) for s in (False, True))
    assert parsed.eod in parsed.encode_batch([text])[0]
    assert split.eod not in split.encode_batch([text])[0]
    assert split.decode(split.encode_batch([text])[0]) == text
    for tokenizer in (parsed, split):
        copy = pickle.loads(pickle.dumps(tokenizer))
        assert copy.encode_batch([text]) == tokenizer.encode_batch([text])


def test_sentencepiece_ids_equal_the_library(sp_model, texts):
    reference = sentencepiece.SentencePieceProcessor(model_file=sp_model)
    tokenizer = pickle.loads(pickle.dumps(SentencePieceTokenizer(sp_model)))
    assert tokenizer.encode_batch(texts) == [reference.encode(t) for t in texts]
    assert (tokenizer.eod, tokenizer.bos, tokenizer.vocab_size) == (2, 1, 340)
    assert "</s>" not in [reference.id_to_piece(i) for i in tokenizer.encode_batch(["a </s> b"])[0]]


def test_identifiers_follow_the_content_not_the_path(hf_tokenizer_dir, tmp_path, sp_model):
    shutil.copytree(hf_tokenizer_dir, tmp_path / "moved")
    first, moved = HuggingFaceTokenizer(hf_tokenizer_dir), HuggingFaceTokenizer(tmp_path / "moved")
    assert first.unique_identifiers == moved.unique_identifiers
    path = tmp_path / "moved" / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    a, b = [token for token, index in vocabulary.items() if index in (298, 299)]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    path.write_text(json.dumps(content))
    assert HuggingFaceTokenizer(tmp_path / "moved").unique_identifiers != first.unique_identifiers
    assert SentencePieceTokenizer(sp_model).unique_identifiers != first.unique_identifiers


def test_null_tokenizer():
    tokenizer = NullTokenizer(50)
    assert tokenizer.encode_batch(["3 49", ""]) == [[3, 49], []]
    assert (tokenizer.eod, tokenizer.decode([3, 4])) == (49, "3 4")
    for text in ("50", "-1", "x", "1.5", "²"):
        with pytest.raises(ValueError, match="is not an id from 0 to 49"):
            tokenizer.encode_batch([text])


def break_directory(directory, how):
    if how == "no files":
        for path in directory.iterdir():
            path.unlink()
    elif how == "truncated":
        text = (directory / "tokenizer.json").read_text()
        (directory / "tokenizer.json").write_text(text[: len(text) // 2])
    elif how == "not a tokenizer":
        (directory / "tokenizer.json").write_text("{}")
    else:
        content = json.loads((directory / "tokenizer_config.json").read_text())
        content.pop("eos_token")
        (directory / "tokenizer_config.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    "how, message",
    [
        ("no files", "holds no tokenizer"),
        ("truncated", "cannot be read"),
        ("not a tokenizer", "cannot be read"),
        ("no eos", "no end-of-sequence token"),
    ],
)
def test_broken_directories(hf_tokenizer_dir, tmp_path, how, message):
    shutil.copytree(hf_tokenizer_dir, tmp_path / "t")
    break_directory(tmp_path / "t", how)
    with pytest.raises(ValueError, match=message) as error:
        HuggingFaceTokenizer(tmp_path / "t")
    assert str(tmp_path / "t") in str(error.value) and "\n" not in str(error.value)


def test_directory_of_an_unknown_model_type(hf_tokenizer_dir, tmp_path, texts):
    """An export with model code of its own names a model type that AutoTokenizer does not know."""
    shutil.copytree(hf_tokenizer_dir, tmp_path / "t")
    (tmp_path / "t" / "config.json").write_text(json.dumps({"model_type": "nobody_knows", "auto_map": {}}))
    content = json.loads((tmp_path / "t" / "tokenizer_config.json").read_text())
    content.pop("tokenizer_class")
    (tmp_path / "t" / "tokenizer_config.json").write_text(json.dumps(content))
    tokenizer = HuggingFaceTokenizer(tmp_path / "t")
    assert tokenizer.encode_batch(texts) == HuggingFaceTokenizer(hf_tokenizer_dir).encode_batch(texts)


def test_wrong_paths(tmp_path, hf_tokenizer_dir, sp_model):
    (tmp_path / "bad.model").write_bytes(b"not a model")
    for kind, path, message in [
        ("HuggingFaceTokenizer", tmp_path / "none", "does not exist"),
        ("HuggingFaceTokenizer", sp_model, "is a file"),
        ("SentencePieceTokenizer", tmp_path / "none.model", "does not exist"),
        ("SentencePieceTokenizer", hf_tokenizer_dir, "does not exist"),
        ("SentencePieceTokenizer", tmp_path / "bad.model", "is not a SentencePiece model"),
        ("NullTokenizer", "many", "not a number"),
        ("GPT2BPETokenizer", "x", "is not known"),
    ]:
        with pytest.raises(ValueError, match=message) as error:
            make_tokenizer(kind, path)
        assert "\n" not in str(error.value)


def test_sentencepiece_without_end_of_sequence(tmp_path, texts):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_prefix=str(tmp_path / "sp"),
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        eos_id=-1,
        minloglevel=2,
    )
    with pytest.raises(ValueError, match="no end-of-sequence piece"):
        SentencePieceTokenizer(tmp_path / "sp.model")


def test_build_tokenizer_chooses(hf_tokenizer_dir, sp_model):
    build = build_tokenizer
    assert isinstance(build(DataConfig(tokenizer_model=hf_tokenizer_dir)), HuggingFaceTokenizer)
    assert isinstance(build(DataConfig(tokenizer_model=sp_model)), SentencePieceTokenizer)
    assert isinstance(build(DataConfig(), default_directory=hf_tokenizer_dir), HuggingFaceTokenizer)
    assert isinstance(build(DataConfig(mock_data=True, vocab_size=9)), NullTokenizer)
    assert isinstance(build(DataConfig(mock_data=True, tokenizer_model=sp_model)), SentencePieceTokenizer)
    with pytest.raises(ValueError, match="--tokenizer-model"):
        build(DataConfig())
    with pytest.raises(ValueError, match="number of ids"):
        build(DataConfig(mock_data=True))


def test_tokenizer_larger_than_the_embedding():
    check_tokenizer_fits(NullTokenizer(50), 50)
    with pytest.raises(ValueError, match="ids up to 49, but the embedding of m has only 49 rows"):
        check_tokenizer_fits(NullTokenizer(50), 49, where="m")
