"""Preprocessing: what lands in the dataset, the same bytes for any number of workers, no leaks, nothing half-written."""

import collections
import json
import random
from pathlib import Path

import numpy
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_midus.data import preprocess as module
from megatron_midus.data.preprocess import PreprocessConfig, preprocess
from megatron_midus.data.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer
from megatron_midus.data.writer import split_bounds, split_of


@pytest.fixture
def run(tmp_path, hf_tokenizer_dir):
    """``run(input, name="out", **settings)``: preprocesses and returns ``(prefix without key, result)``."""

    def call(*inputs, name="out", **settings):
        settings = {"tokenizer_model": hf_tokenizer_dir, "append_eod": True, **settings}
        prefix = str(tmp_path / "made" / name)
        return prefix, preprocess(PreprocessConfig(input=list(inputs), output_prefix=prefix, **settings))

    return call


def documents(prefix):
    dataset = IndexedDataset(prefix)
    return [dataset[i].tolist() for i in range(len(dataset))]


def bytes_of(prefix):
    return {path.name: path.read_bytes() for path in Path(prefix).parent.glob(Path(prefix).name + "*")}


def test_content_is_the_tokens_of_every_document(run, jsonl, texts, hf_tokenizer_dir):
    prefix, result = run(jsonl([*texts[:7], "", " \n", *texts[7:]]))
    tokenizer = HuggingFaceTokenizer(hf_tokenizer_dir)
    expected = [[*ids, tokenizer.eod] for ids in tokenizer.encode_batch(texts)]
    assert documents(f"{prefix}_text_document") == expected
    dataset = IndexedDataset(f"{prefix}_text_document")
    assert dataset.document_indices.tolist() == list(range(len(texts) + 1))
    assert dataset.index.dtype == numpy.uint16

    statistics = json.loads(Path(f"{prefix}_text_document.json").read_text())
    counts = {name: statistics[name] for name in ("documents", "tokens", "bytes", "max_token_id", "skipped_empty")}
    assert counts == {
        "documents": len(texts),
        "tokens": sum(map(len, expected)),
        "bytes": sum(len(text.encode()) for text in texts),
        "max_token_id": max(map(max, expected)),
        "skipped_empty": 2,
    }
    assert statistics["bytes_per_token"] == pytest.approx(counts["bytes"] / counts["tokens"])
    assert result.empty == 2 and result.datasets[f"{prefix}_text_document"].tokens == counts["tokens"]


def test_sentencepiece_without_eod_and_with_bos(run, jsonl, texts, sp_model):
    settings = {"tokenizer_type": "SentencePieceTokenizer", "tokenizer_model": sp_model}
    prefix, _ = run(jsonl(), append_eod=False, prepend_bos=True, **settings)
    tokenizer = SentencePieceTokenizer(sp_model)
    assert documents(f"{prefix}_text_document") == [[1, *ids] for ids in tokenizer.encode_batch(texts)]


def test_bytes_do_not_depend_on_workers(run, jsonl, texts, monkeypatch):
    """With chunks of 700 bytes the corpus makes far more tasks than the window holds."""
    monkeypatch.setattr(module, "_CHUNK_BYTES", 700)
    corpus = jsonl(texts + texts[3:9] + ["", "x"])
    settings = {"split_by_hash": [0.7, 0.2, 0.1], "dedup": True}
    one = bytes_of(run(corpus, workers=1, **settings)[0])
    assert set(one) == {
        f"out_{s}_text_document.{e}" for s in ("train", "valid", "test") for e in ("bin", "idx", "json")
    }
    for workers in (2, 3):
        assert bytes_of(run(corpus, workers=workers, overwrite=True, **settings)[0]) == one


def test_chunks_do_not_change_the_bytes(run, jsonl, monkeypatch):
    whole = bytes_of(run(jsonl())[0])
    monkeypatch.setattr(module, "_CHUNK_DOCUMENTS", 1)
    assert bytes_of(run(jsonl(), overwrite=True)[0]) == whole


def test_several_keys(run, tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [{"text": "one", "title": "uno"}, {"text": "", "title": "dos"}, {"text": "three", "title": " "}]
    path.write_text("\n".join(map(json.dumps, rows)))
    prefix, result = run(str(path), json_keys=["title", "text"], tokenizer_type="HuggingFaceTokenizer")
    assert {Path(p).name: s.documents for p, s in result.datasets.items()} == {
        "out_title_document": 2,
        "out_text_document": 2,
    }
    assert result.empty == 0


def test_text_files(run, tmp_path, hf_tokenizer_dir):
    (tmp_path / "a.txt").write_text("one\n\ntwo")
    (tmp_path / "b.txt").write_text("three")
    eod = HuggingFaceTokenizer(hf_tokenizer_dir).eod
    inputs = [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]
    assert [len([t for t in d if t == eod]) for d in documents(run(*inputs)[0] + "_text_document")] == [1, 1]
    prefix, result = run(*inputs, name="split", text_document_separator=r"\n\n")
    assert [s.documents for s in result.datasets.values()] == [3]
    with pytest.raises(ValueError, match="is plain text and has no keys"):
        run(*inputs, name="keys", json_keys=["body"])


def test_split_never_leaks(run, jsonl, texts, hf_tokenizer_dir):
    """Copies, also with other white space and in other files, and with other documents around, stay on one side."""
    copies = [text.replace(" ", "\n ") + " " for text in texts]
    shuffled = random.Random(3).sample(texts + copies, 2 * len(texts))
    settings = {"split_by_hash": [0.6, 0.3, 0.1]}
    first, _ = run(jsonl(texts), name="first", **settings)
    second, result = run(jsonl(shuffled, "b.jsonl"), name="second", **settings)
    tokenizer = HuggingFaceTokenizer(hf_tokenizer_dir)

    def sides(prefix):
        found = collections.defaultdict(set)
        for split in ("train", "valid", "test"):
            for ids in documents(f"{prefix}_{split}_text_document"):
                found[" ".join(tokenizer.decode(ids[:-1]).split())].add(split)
        return found

    assert all(len(where) == 1 for where in sides(second).values())
    assert sides(first) == sides(second)
    assert len(sides(first)) == len(texts)
    assert sum(s.documents for s in result.datasets.values()) == 2 * len(texts)


def test_split_shares():
    bounds = split_bounds([0.8, 0.15, 0.05])
    generator = numpy.random.default_rng(0)
    count = 20_000
    sides = numpy.bincount([split_of(generator.bytes(16), bounds) for _ in range(count)]) / count
    # Four standard deviations of a share of 20,000 draws.
    for got, wanted in zip(sides, (0.8, 0.15, 0.05)):
        assert abs(got - wanted) < 4 * (wanted * (1 - wanted) / count) ** 0.5
    # A share of 0 gets nothing, not even the extreme digests; rounding of the sum opens no gap.
    for shares in ([0.7, 0.3, 0.0], [0.1, 0.2, 0.0], [1.0], [3, 0, 1]):
        bounds = split_bounds(shares)
        assert {shares[split_of(d, bounds)] > 0 for d in (b"\x00" * 16, b"\xff" * 16, b"\x7f" * 16)} == {True}


def test_dedup_keeps_the_first(run, jsonl, texts):
    prefix, result = run(jsonl([*texts, *(text + " " for text in texts), "new"]), dedup=True)
    plain, _ = run(jsonl([*texts, "new"], "b.jsonl"), name="plain")
    assert result.duplicates == len(texts)
    assert documents(f"{prefix}_text_document") == documents(f"{plain}_text_document")


def test_bad_lines_end_the_run_or_are_counted(run, tmp_path, texts):
    path = tmp_path / "a.jsonl"
    good = [json.dumps({"text": text}) for text in texts]
    path.write_text("\n".join([*good[:5], "{", *good[5:], '{"text": 1}']))
    for workers in (1, 2):
        with pytest.raises(ValueError, match=r"a\.jsonl:6: not JSON"):
            run(str(path), workers=workers)
        assert list((tmp_path / "made").iterdir()) == []
    prefix, result = run(str(path), skip_bad_lines=True)
    assert result.malformed == 2 and [e.split(": ")[0] for e in result.malformed_examples] == [
        f"{path}:6",
        f"{path}:63",
    ]
    assert len(documents(f"{prefix}_text_document")) == len(texts)


def test_large_vocabulary_takes_int32(run, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "5 69999 65536"}))
    settings = {"tokenizer_type": "NullTokenizer", "tokenizer_model": "70001"}
    prefix, _ = run(str(path), **settings)
    assert documents(f"{prefix}_text_document") == [[5, 69999, 65536, 70000]]
    assert IndexedDataset(f"{prefix}_text_document").index.dtype == numpy.int32


def test_outputs_are_whole_or_absent(run, jsonl, tmp_path, monkeypatch):
    prefix, _ = run(jsonl())
    before = bytes_of(prefix)
    with pytest.raises(ValueError, match="exists; choose another --output-prefix"):
        run(jsonl())

    real = module.encode_chunk

    def full_disk(chunk, settings):
        if full_disk.calls:
            raise OSError(28, "No space left on device")
        full_disk.calls += 1
        return real(chunk, settings)

    full_disk.calls = 0
    monkeypatch.setattr(module, "_CHUNK_BYTES", 700)
    monkeypatch.setattr(module, "encode_chunk", full_disk)
    with pytest.raises(OSError):
        run(jsonl(), overwrite=True)
    assert full_disk.calls == 1
    assert bytes_of(prefix) == before
    assert len(list((tmp_path / "made").iterdir())) == len(before) == 3


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"input": []}, "--input is missing"),
        ({"tokenizer_model": ""}, "--tokenizer-model is missing"),
        ({"workers": 0}, "workers=0"),
        ({"json_keys": ["a", "a"]}, "names a key twice"),
        ({"json_keys": ["a/b"]}, "cannot be part of a file name"),
        ({"split_by_hash": [0.0, 1.0]}, "is not shares"),
        ({"split_by_hash": [0.9, -0.1]}, "is not shares"),
        ({"split_by_hash": [1, 1, 1, 1]}, "is not shares"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        PreprocessConfig(**{"input": ["a"], "output_prefix": "p", "tokenizer_model": "t", **settings})


def test_wrong_combinations(run, jsonl, sp_model, hf_tokenizer_dir):
    corpus = jsonl(["only one"])
    with pytest.raises(ValueError, match="none of the 1 documents belongs into"):
        run(corpus, split_by_hash=[0.5, 0.5])
    with pytest.raises(ValueError, match="no document with any text"):
        run(jsonl(["", " "], "empty.jsonl"))
    with pytest.raises(ValueError, match="tokenizer directory nowhere does not exist"):
        run(corpus, tokenizer_model="nowhere")
    with pytest.raises(ValueError, match="has no beginning-of-sequence token"):
        run(corpus, tokenizer_type="NullTokenizer", tokenizer_model="9", prepend_bos=True)
