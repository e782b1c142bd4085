"""Preprocessing: what lands in the dataset, the same bytes for any number of workers, no leaks, nothing half-written."""

import collections
import json
import os
import random
from pathlib import Path

import numpy
import pyarrow
import pyarrow.parquet
import pytest
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder
from test_corpus import MALFORMED

from megatron_midus.data import preprocess as module
from megatron_midus.data.preprocess import PreprocessConfig, preprocess
from megatron_midus.data.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer
from megatron_midus.data.writer import dtype_of, split_bounds, split_of, write_index


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
    assert result.skipped.empty == 2 and result.datasets[f"{prefix}_text_document"].tokens == counts["tokens"]


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
    for workers in (2, 4):
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
    assert result.skipped.empty == 0


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
    assert result.skipped.duplicates == len(texts)
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
    assert result.skipped.malformed == 2 and [e.split(": ")[0] for e in result.skipped.malformed_examples] == [
        f"{path}:6",
        f"{path}:63",
    ]
    assert len(documents(f"{prefix}_text_document")) == len(texts)


def test_every_way_a_line_fails_to_parse_is_a_malformed_document(run, tmp_path):
    """Each is left out, counted and listed with file and line; what is beside it is kept."""
    bad = [
        content for content, message in MALFORMED.values() if b"\n" not in content and f"{message} "[:8] == "a.jsonl:"
    ]
    path = tmp_path / "a.jsonl"
    good = json.dumps({"text": "good"}).encode()
    path.write_bytes(b"\n".join(line for each in bad for line in (each, good)))
    prefix, result = run(str(path), skip_bad_lines=True)
    assert len(bad) > 10 and result.skipped.malformed == len(bad)
    listed = Path(f"{prefix}_malformed.txt").read_text().splitlines()
    assert [line.split(": ")[0] for line in listed] == [f"{path}:{1 + 2 * index}" for index in range(len(bad))]
    assert len(documents(f"{prefix}_text_document")) == len(bad)


def test_malformed_lines_are_listed(run, tmp_path, texts):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join([json.dumps({"text": text}) for text in texts] + ["{"] * 9))
    prefix, result = run(str(path), skip_bad_lines=True)
    lines = Path(f"{prefix}_malformed.txt").read_text().splitlines()
    assert [line.split(": ")[0] for line in lines] == [f"{path}:{len(texts) + i}" for i in range(1, 10)]
    assert result.skipped.malformed == 9 and result.skipped.malformed_examples == lines[:5]
    statistics = json.loads(Path(f"{prefix}_text_document.json").read_text())
    assert statistics["skipped_malformed"] == 9 and statistics["documents"] == len(texts)


def test_index_is_megatrons(tmp_path):
    """Byte for byte what Megatron-Core's builder writes."""
    generator = numpy.random.default_rng(0)
    lengths = generator.integers(1, 50, size=37).astype(numpy.int32)
    for dtype in ("uint16", "int32"):
        builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=getattr(numpy, dtype))
        for length in lengths:
            builder.add_document(generator.integers(0, 9, size=length), [int(length)])
        builder.finalize(str(tmp_path / "theirs.idx"))
        write_index(tmp_path / "ours.idx", lengths, dtype)
        assert (tmp_path / "ours.idx").read_bytes() == (tmp_path / "theirs.idx").read_bytes()
    for vocab_size in (100, 65499, 65500, 65536, 70000):
        assert dtype_of(vocab_size) == DType.optimal_dtype(vocab_size).__name__


# -- parquet ---------------------------------------------------------------------------------------------------------
def test_parquet_equals_json_lines(run, jsonl, texts, tmp_path):
    path = write_parquet(tmp_path / "a.parquet", {"id": list(range(len(texts))), "text": texts}, row_group_size=7)
    prefix, result = run(path)
    expected, _ = run(jsonl(), name="json")
    assert documents(f"{prefix}_text_document") == documents(f"{expected}_text_document")
    assert result.bytes_read == sum(len(text.encode()) for text in texts)


@pytest.mark.parametrize("kind", [pyarrow.large_string(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string())])
def test_parquet_strings_of_every_kind(run, texts, tmp_path, kind):
    column = pyarrow.array(texts).cast(kind)
    prefix, _ = run(write_parquet(tmp_path / "a.parquet", {"text": column}))
    expected, _ = run(write_parquet(tmp_path / "b.parquet", {"text": texts}), name="plain")
    assert documents(f"{prefix}_text_document") == documents(f"{expected}_text_document")


def test_several_columns_and_kinds_of_file(run, tmp_path):
    parquet = write_parquet(tmp_path / "a.parquet", {"title": ["uno", "dos"], "text": ["one", ""]})
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "three", "title": "tres"}))
    _, result = run(parquet, str(tmp_path / "b.jsonl"), json_keys=["text", "title"])
    assert [s.documents for s in result.datasets.values()] == [2, 3]


# -- filters ---------------------------------------------------------------------------------------------------------
def test_lengths_in_bytes_and_tokens(run, jsonl, hf_tokenizer_dir):
    tokenizer = HuggingFaceTokenizer(hf_tokenizer_dir)
    corpus = ["größe", "größe größe 模型", "the memory block", "the memory block reads what it wrote", "x"]
    sizes = [len(text.encode()) for text in corpus]
    tokens = [len(ids) for ids in tokenizer.encode_batch(corpus)]
    assert len(set(sizes)) == len(set(tokens)) == 5
    for kind, measured in (("bytes", sizes), ("tokens", tokens)):
        low, high = sorted(measured)[1], sorted(measured)[3]
        settings = {f"min_document_{kind}": low, f"max_document_{kind}": high}
        prefix, result = run(jsonl(corpus), name=kind, **settings)
        kept = [text for text, size in zip(corpus, measured) if low <= size <= high]
        assert [tokenizer.decode(ids[:-1]) for ids in documents(f"{prefix}_text_document")] == kept
        assert (result.skipped.too_short, result.skipped.too_long) == (1, 1)
        statistics = json.loads(Path(f"{prefix}_text_document.json").read_text())
        assert statistics["skipped_too_short"] == statistics["skipped_too_long"] == 1


def test_everything_is_counted_once(run, jsonl, texts):
    corpus = [*texts, *texts, "", "x", "x", "x" * 5000]
    settings = {"dedup": True, "min_document_bytes": 2, "max_document_bytes": 4000, "split_by_hash": ["80,10,10"]}
    _, result = run(jsonl(corpus), **settings)
    assert result.skipped.counts() == {
        "empty": 1, "too_short": 2, "too_long": 1, "duplicates": len(texts), "malformed": 0,
    }  # fmt: skip
    kept = sum(statistics.documents for statistics in result.datasets.values())
    assert kept + sum(result.skipped.counts().values()) == len(corpus)


# -- going on --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("stop_after", [1, 5, 9])
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_run_that_ended_early_goes_on(run, jsonl, texts, tmp_path, monkeypatch, capsys, stop_after, kind):
    """Several files, splits and duplicates; the run ends in the middle of a file, what is not committed is lost."""
    monkeypatch.setattr(module, "_CHUNK_BYTES", 700)
    if kind == "jsonl":
        inputs = [jsonl(texts[:20] + ["{"]), jsonl(texts[11:] + [texts[3]], "b.jsonl")]
        Path(inputs[0]).write_text(Path(inputs[0]).read_text().replace('{"text": "{"}', "{"))
    else:
        columns = [texts[:20] + [None], texts[11:] + [texts[3]]]
        inputs = [
            write_parquet(tmp_path / f"{i}.parquet", {"text": c}, row_group_size=4) for i, c in enumerate(columns)
        ]
    settings = {"split_by_hash": ["60,30,10"], "dedup": True, "skip_bad_lines": True, "commit_seconds": 0.0}
    whole, expected = run(*inputs, name="whole", **settings)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        end_after(patch, stop_after)
        run(*inputs, name="again", **settings)
    assert "keeps what was done; the same command goes on" in capsys.readouterr().err
    partial = tmp_path / "made/.again.partial"
    for stream in partial.glob("*.bin"):
        # What a kill leaves: more than was committed.
        stream.write_bytes(stream.read_bytes() + b"xyz")
    again, result = run(*inputs, name="again", **settings)
    rename = {name.replace("whole", "again"): content for name, content in bytes_of(whole).items()}
    assert bytes_of(again) == rename and "again_malformed.txt" in rename
    assert result.skipped == expected.skipped and result.bytes_read == expected.bytes_read > result.bytes_resumed > 0
    assert not partial.exists()


def test_a_bad_line_late_in_the_corpus_costs_no_work(run, jsonl, texts, monkeypatch, tmp_path):
    monkeypatch.setattr(module, "_CHUNK_BYTES", 700)
    corpus = jsonl()
    Path(corpus).write_text(Path(corpus).read_text() + "{\n")
    with pytest.raises(ValueError, match="not JSON"):
        run(corpus, commit_seconds=0.0)
    prefix, result = run(corpus, skip_bad_lines=True)
    assert result.bytes_resumed > 0.8 * result.bytes_read
    whole, _ = run(corpus, name="whole", skip_bad_lines=True)
    assert documents(f"{prefix}_text_document") == documents(f"{whole}_text_document")


def test_an_unfinished_run_of_other_settings_is_refused(run, jsonl, monkeypatch, tmp_path):
    monkeypatch.setattr(module, "_CHUNK_BYTES", 700)
    corpus = jsonl()
    with monkeypatch.context() as patch:
        end_after(patch, 5)
        with pytest.raises(KeyboardInterrupt):
            run(corpus, commit_seconds=0.0)
    with pytest.raises(ValueError, match="unfinished run that differs: append_eod true there, false here; give its"):
        run(corpus, append_eod=False)
    Path(corpus).write_text(Path(corpus).read_text() + json.dumps({"text": "more"}))
    with pytest.raises(
        ValueError, match=r"unfinished run that differs: inputs .*corpus\.jsonl \d+ \d+. there, .*corpus"
    ):
        run(corpus)
    prefix, result = run(corpus, overwrite=True)
    assert result.bytes_resumed == 0
    assert bytes_of(prefix) == {
        name.replace("fresh", "out"): content for name, content in bytes_of(run(corpus, name="fresh")[0]).items()
    }


def test_a_run_that_ended_among_its_last_renames_goes_on(run, jsonl, monkeypatch, tmp_path):
    corpus = jsonl()
    whole = bytes_of(run(corpus, name="whole", split_by_hash=["60,40"])[0])
    real, calls = os.replace, []

    def replace(source, target):
        calls.append(target)
        # The first one is the journal's state.
        if len(calls) == 4:
            raise KeyboardInterrupt
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(KeyboardInterrupt):
            run(corpus, split_by_hash=["60,40"])
    prefix, _ = run(corpus, split_by_hash=["60,40"])
    assert {name.replace("out", "whole"): content for name, content in bytes_of(prefix).items()} == whole


def end_after(monkeypatch, chunks):
    """Interrupts the run when so many chunks are encoded."""
    real, count = module.encode_chunk, iter(range(chunks))

    def encode(chunk, settings):
        if next(count, None) is None:
            raise KeyboardInterrupt
        return real(chunk, settings)

    monkeypatch.setattr(module, "encode_chunk", encode)


def write_parquet(path, columns, **options):
    pyarrow.parquet.write_table(pyarrow.table(columns), path, **options)
    return str(path)


def test_large_vocabulary_takes_int32(run, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "5 69999 65536"}))
    settings = {"tokenizer_type": "NullTokenizer", "tokenizer_model": "70001"}
    prefix, _ = run(str(path), **settings)
    assert documents(f"{prefix}_text_document") == [[5, 69999, 65536, 70000]]
    assert IndexedDataset(f"{prefix}_text_document").index.dtype == numpy.int32


def test_outputs_are_whole_or_absent(run, jsonl, tmp_path, monkeypatch, capsys):
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
    assert "keeps what was done" not in capsys.readouterr().err
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
        ({"split_by_hash": ["98,x"]}, "is not shares"),
        ({"split_by_hash": [","]}, "is not shares"),
        ({"min_document_bytes": -1}, "leave no document"),
        ({"min_document_tokens": 9, "max_document_tokens": 8}, "leave no document"),
        ({"max_document_bytes": 0}, "leave no document"),
        ({"commit_seconds": -1.0}, "commit_seconds=-1.0 must be 0 or more"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        PreprocessConfig(**{"input": ["a"], "output_prefix": "p", "tokenizer_model": "t", **settings})


def test_wrong_combinations(run, jsonl, sp_model, hf_tokenizer_dir):
    corpus = jsonl(["only one"])
    with pytest.raises(ValueError, match="none of the 1 documents falls into"):
        run(corpus, split_by_hash=[0.5, 0.5])
    with pytest.raises(ValueError, match="no document with any text"):
        run(jsonl(["", " "], "empty.jsonl"))
    with pytest.raises(ValueError, match="tokenizer directory nowhere does not exist"):
        run(corpus, tokenizer_model="nowhere")
    with pytest.raises(ValueError, match="has no beginning-of-sequence token"):
        run(corpus, tokenizer_type="NullTokenizer", tokenizer_model="9", prepend_bos=True)
