"""Readers of text files: what is a document, in which order, and every way in which a file can be broken."""

import gzip
import json
import sys

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from megatron_midus.data import corpus
from megatron_midus.data.corpus import find_inputs, read_documents, unescape


def read(*inputs, **options):
    return [text for _, text in read_documents([str(i) for i in inputs], **options)]


def test_json_lines_keep_order_and_pass_over_blank_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"text": "one"}\r\n\n  \n{"id": 3, "text": "zwei \\u00fc"}\n{"text": " \\n"}\n{"text": "last"}'
    )
    assert list(read_documents([str(path)])) == [(f"{path}:1", "one"), (f"{path}:4", "zwei ü"), (f"{path}:6", "last")]


def test_text_file_is_one_document_blank_lines_included(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("first\n\nstill first\n")
    assert read(path) == ["first\n\nstill first\n"]


def test_form_feed_divides_and_lines_are_counted(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("a\nb\f\fc\nd\fe")
    assert list(read_documents([str(path)])) == [(f"{path}:1", "a\nb"), (f"{path}:2", "c\nd"), (f"{path}:3", "e")]


@pytest.mark.parametrize("separator", ["\n\n", "<|end|>", "é"])
@pytest.mark.parametrize("chunk", [3, 5, 1 << 20])
def test_separator_across_chunks(tmp_path, monkeypatch, separator, chunk):
    monkeypatch.setattr(corpus, "_CHUNK", chunk)
    documents = ["abc", "defgh ü", "i", "jklmnopqrstuvw"]
    path = tmp_path / "a.txt"
    path.write_text(separator.join(documents))
    assert read(path, separator=separator) == documents


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_compressed_equals_plain(tmp_path, suffix, texts):
    pack = gzip.compress if suffix == ".gz" else zstandard.ZstdCompressor().compress
    content = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    half = content.index(b"\n", len(content) // 2) + 1
    # Two frames one after the other are one valid file.
    (tmp_path / f"a.jsonl{suffix}").write_bytes(pack(content[:half]) + pack(content[half:]))
    assert read(tmp_path / f"a.jsonl{suffix}") == texts


def test_directories_and_patterns_are_sorted_and_read_once(tmp_path):
    for name in ("b.jsonl", "sub/a.jsonl", "c.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"text": name}))
    (tmp_path / "notes.md").write_text("not a corpus")
    assert read(tmp_path) == ["b.jsonl", "c.jsonl", "sub/a.jsonl"]
    assert read(tmp_path / "c.jsonl", tmp_path) == ["c.jsonl", "b.jsonl", "sub/a.jsonl"]
    assert [p.name for p in find_inputs([str(tmp_path / "*.jsonl")])] == ["b.jsonl", "c.jsonl"]


MALFORMED = {
    "not json": (b'{"text": "ok"}\n{"text": ', "a.jsonl:2: not JSON"),
    "a list": (b'["text"]', "a.jsonl:1: a list, not a JSON object"),
    "a string": (b'"text"', "a.jsonl:1: a str, not"),
    "key missing": (b'{"body": "x"}', "a.jsonl:1: no key 'text'; keys there: 'body'"),
    "no keys": (b"{}", "keys there: none"),
    "null": (b'{"text": null}', "'text' is NoneType, not a string"),
    "number": (b'{"text": 3}', "'text' is int, not a string"),
    "list of texts": (b'{"text": ["a"]}', "'text' is list, not a string"),
    "latin-1": (b'{"text": "ok"}\n\n{"text": "\xfc"}', "a.jsonl:3: not UTF-8"),
    "half a surrogate pair": (b'{"text": "\\ud800"}', "half of a surrogate pair"),
    "two records on a line": (b'{"text": "a"}{"text": "b"}', "a.jsonl:1: not JSON (Extra data"),
    "single quotes": (b"{'text': 'a'}", "a.jsonl:1: not JSON"),
    "binary": (bytes(range(128, 200)), "not UTF-8"),
    "deeply nested": (b"[" * 200_000, "a.jsonl:1: not JSON (nested too deeply)"),
    "nested in another entry": (b'{"text": "a", "b": ' + b'{"c":' * 90_000, "a.jsonl:1: not JSON (nested too deeply)"),
    "an integer of 5000 digits": (
        b'{"id": ' + b"7" * 5000 + b', "text": "a"}',
        "a.jsonl:1: not JSON (Exceeds the limit",
    ),
    "not a number": (b'{"text": NaN}', "'text' is float, not a string"),
    "the other half of a pair": (b'{"text": "a\\udc00\\ud800"}', "half of a surrogate pair"),
    "a byte-order mark in the middle": (b'{"text": "a"}\n\xef\xbb\xbf{"text": "b"}', "a.jsonl:2: not JSON"),
    "UTF-16": ('{"text": "a"}'.encode("utf-16"), "a.jsonl:1: not UTF-8"),
    "a zero byte": (b'{"text": "a\0"}', "a.jsonl:1: not JSON"),
    "a huge line": (b'{"text": "' + b"a" * 3_000_000, "a.jsonl:1: not JSON (Unterminated string"),
    "lines of an old Macintosh": (b'{"text": "a"}\r{"text": "b"}', "a.jsonl:1: not JSON (Extra data"),
    "empty file": (b"", "no document with any text"),
    "white space only": (b'\n{"text": "  "}\n', "no document with any text"),
}


@pytest.mark.parametrize("content, message", MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_json_lines(tmp_path, content, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        read(path)
    assert message in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("damage", ["cut", "garbage", "flipped"])
def test_damaged_compression(tmp_path, suffix, damage, texts):
    content = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    pack = gzip.compress if suffix == ".gz" else zstandard.ZstdCompressor(write_checksum=True).compress
    packed = bytearray(pack(content))
    if damage == "cut":
        del packed[-len(packed) // 3 :]
    elif damage == "garbage":
        packed[:] = content
    else:
        packed[len(packed) // 2] ^= 0xFF
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(packed)
    with pytest.raises(ValueError, match=r"a\.jsonl\.\w+ is damaged or cut off|a\.jsonl\.\w+:\d+: not"):
        read(path)


def test_inputs_that_cannot_be_used(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"a,b")
    (tmp_path / "empty").mkdir()
    for name, message in {
        "nowhere.jsonl": "does not exist",
        "a.csv": "neither JSON lines nor text nor parquet",
        "empty": "holds no .jsonl",
        "*.zip": "no file matches",
    }.items():
        with pytest.raises(ValueError, match=message):
            find_inputs([str(tmp_path / name)])
    with pytest.raises(ValueError, match="no input file"):
        find_inputs([])


def test_passing_over_records(tmp_path, texts):
    """``start`` begins in the middle, in every kind of file, and in a parquet file also in the middle of a row group."""
    (tmp_path / "a.jsonl").write_text("\n\n".join(json.dumps({"text": text}) for text in texts))
    (tmp_path / "b.txt").write_text("\f".join(texts))
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "d.parquet", row_group_size=5)
    for path in sorted(tmp_path.iterdir()):
        for start in (0, 1, 10, 13, len(texts) - 1, len(texts)):
            assert [r.parse(["text"])[0] for r in corpus.read_raw(path, start=start)] == texts[start:], path
    assert [r.where for r in corpus.read_raw(tmp_path / "d.parquet", start=13)][0] == f"{tmp_path}/d.parquet:14"


def not_utf8():
    column = pyarrow.array([b"fine", b"\xff\xfe"], pyarrow.binary())
    # Unchecked, as a careless writer makes it.
    return pyarrow.StringArray.from_buffers(2, *column.buffers()[1:])


PARQUET = {
    "null": (pyarrow.array(["a", None]), "a.parquet:2: 'text' is NoneType, not a string"),
    "numbers": (pyarrow.array([1, 2]), "a.parquet:1: 'text' is int, not a string"),
    "lists": (pyarrow.array([["a"]]), "'text' is list, not a string"),
    "not UTF-8": (not_utf8(), "a.parquet:2: 'text': not UTF-8"),
    "bytes": (pyarrow.array([b"\xfc"]), "a.parquet:1: 'text': not UTF-8"),
    "no row": (pyarrow.array([], pyarrow.string()), "no document with any text"),
}


@pytest.mark.parametrize("column, message", PARQUET.values(), ids=PARQUET.keys())
def test_malformed_rows(tmp_path, column, message):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), path)
    with pytest.raises(ValueError) as error:
        read(path)
    assert message in str(error.value) and str(path) in str(error.value)


@pytest.mark.parametrize("damage", ["empty", "text", "cut", "flipped"])
def test_damaged_parquet(tmp_path, texts, damage):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path, compression="zstd", use_dictionary=False)
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        content[4:64] = bytes(60)
    content = {"empty": b"", "text": b"no parquet", "cut": content[: len(content) // 2]}.get(damage, content)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.parquet is damaged") as error:
        read(path)
    assert str(path) in str(error.value)


def test_missing_column(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a"], "id": [1]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet: no column 'text'; columns there: 'body', 'id'"):
        read(tmp_path / "a.parquet")


def test_unescape():
    assert unescape(r"a\n\t\f\r\\n") == "a\n\t\f\r\\n"
    for bad in (r"\x", "\\"):
        with pytest.raises(ValueError, match="escape"):
            unescape(bad)


@pytest.mark.parametrize("package, suffix", [("zstandard", ".jsonl.zst"), ("pyarrow", ".parquet")])
def test_packages_are_asked_for_by_name(tmp_path, monkeypatch, package, suffix):
    monkeypatch.setitem(sys.modules, package, None)
    path = tmp_path / f"a{suffix}"
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=f"pip install {package}"):
        read(path)
