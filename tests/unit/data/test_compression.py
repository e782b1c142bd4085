"""Whatever zstd and gzip can write is read, and what their programs refuse is refused with the file's name."""

from __future__ import annotations

import gzip
import json
import random

import pytest
import zstandard

from megatron_midus.data.corpus import read_documents

TEXTS = [f"{index} " + "".join(random.Random(index).choices("abcdefgh ", k=400)) for index in range(900)]
CONTENT = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
HALF = CONTENT.index(b"\n", len(CONTENT) // 2) + 1


def zstd(content=CONTENT, *, stream=False, **parameters):
    """As ``zstd`` does of a file, or of a pipe, whose length it does not know."""
    compressor = zstandard.ZstdCompressor(
        compression_params=zstandard.ZstdCompressionParameters(**{"compression_level": 3, **parameters})
    )
    if not stream:
        return compressor.compress(content)
    writer = compressor.compressobj()
    return writer.compress(content) + writer.flush()


def with_window(packed, log):
    """The frame of a pipe, saying that it needs ``2**log`` bytes, as ``zstd --long=LOG`` writes it (RFC 8878, 3.1.1.1.2)."""
    assert not packed[4] & 0b100000  # no single segment: the next byte is about the window
    return packed[:5] + bytes([(log - 10) << 3]) + packed[6:]


def skippable(size, kind=0):
    return bytes([0x50 + kind, 0x2A, 0x4D, 0x18]) + size.to_bytes(4, "little") + random.Random(1).randbytes(size)


def frames(kind, pieces=10):
    """Of a parallel compressor: many frames, with what it needs itself between them."""
    step = len(CONTENT) // pieces + 1
    return b"".join(kind + zstd(CONTENT[i : i + step]) for i in range(0, len(CONTENT), step))


ZSTD = {
    "fast": lambda: zstd(compression_level=-5),
    "level 19": lambda: zstd(compression_level=19),
    "a pipe": lambda: zstd(stream=True),
    "ultra 22": lambda: zstd(stream=True, compression_level=22, window_log=20),
    **{f"window {log}": lambda log=log: with_window(zstd(stream=True), log) for log in (27, 28, 30, 31)},
    "checksum": lambda: zstd(write_checksum=True),
    "no size": lambda: zstd(write_content_size=False),
    "long distance": lambda: zstd(enable_ldm=True, window_log=22),
    "two frames": lambda: zstd(CONTENT[:HALF]) + zstd(CONTENT[HALF:], write_checksum=True),
    "an empty frame": lambda: zstd(b"") + zstd() + zstd(b""),
    "skippable frames": lambda: frames(skippable(4)),
    "a large skippable frame first": lambda: skippable(300_000, kind=15) + zstd() + skippable(0),
}
GZIP = {
    "level 1": lambda: gzip.compress(CONTENT, 1),
    "stored": lambda: gzip.compress(CONTENT, 0),
    "two members": lambda: gzip.compress(CONTENT[:HALF]) + gzip.compress(CONTENT[HALF:]),
    "many members": lambda: b"".join(gzip.compress(line) for line in CONTENT.splitlines(keepends=True)),
    "an empty member": lambda: gzip.compress(b"") + gzip.compress(CONTENT) + gzip.compress(b""),
    # FEXTRA, FNAME, FCOMMENT: RFC 1952, 2.3.
    "a header with everything": lambda: (
        b"\x1f\x8b\x08\x1c" + bytes(6) + b"\x02\0xyname\0comment\0" + gzip.compress(CONTENT, mtime=0)[10:]
    ),
    "padding": lambda: gzip.compress(CONTENT) + bytes(100_000),
    "what follows": lambda: gzip.compress(CONTENT) + b"garbage",
}


@pytest.mark.parametrize(
    ("suffix", "pack"),
    [pytest.param(s, p, id=f"{s} {n}") for s, ways in ((".zst", ZSTD), (".gz", GZIP)) for n, p in ways.items()],
)
def test_what_the_programs_write_is_read(tmp_path, capsys, suffix, pack):
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(pack())
    assert [text for _, text in read_documents([str(path)])] == TEXTS
    # gzip leaves it out with a warning, and so do we.
    assert (f"{path}: what follows the compressed data is no gzip" in capsys.readouterr().err) == (
        pack is GZIP["what follows"]
    )


def with_dictionary(dictionary):
    return zstandard.ZstdCompressor(dict_data=dictionary).compress(CONTENT)


REFUSED = {
    "a trained dictionary": (
        lambda: with_dictionary(zstandard.train_dictionary(4096, [text.encode() for text in TEXTS])),
        ".zst",
        r"a\.jsonl\.zst was compressed with a dictionary, which is not in it; compress it again with: zstd -d -D DICTIONARY",
    ),
    "another file as a dictionary": (
        lambda: with_dictionary(zstandard.ZstdCompressionDict(CONTENT, dict_type=zstandard.DICT_TYPE_RAWCONTENT)),
        ".zst",
        r"a\.jsonl\.zst is damaged or cut off: .* or it was compressed against another file \(zstd -D or --patch-from\)",
    ),
    "garbage behind zstd": (lambda: zstd() + b"garbage, long enough", ".zst", "is damaged or cut off: .*descriptor"),
    "zstd cut": (lambda: zstd()[:-9], ".zst", "is damaged or cut off: the last frame is not complete"),
    "gzip cut": (lambda: gzip.compress(CONTENT)[:-9], ".gz", "is damaged or cut off: the last frame is not complete"),
    "gzip cut in its checksum": (lambda: gzip.compress(CONTENT)[:-1], ".gz", "the last frame is not complete"),
    "a second member cut": (lambda: gzip.compress(CONTENT) + gzip.compress(b"x")[:5], ".gz", "is not complete"),
    "a wrong checksum": (lambda: gzip.compress(CONTENT)[:-8] + bytes(8), ".gz", "is damaged or cut off: .*check"),
    "zstd called gzip": (zstd, ".gz", "is damaged or cut off: .*header"),
}


@pytest.mark.parametrize(("make", "suffix", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_read_is_said(tmp_path, make, suffix, message):
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(make())
    with pytest.raises(ValueError, match=message) as error:
        list(read_documents([str(path)]))
    assert "\n" not in str(error.value) and str(path) in str(error.value)
