"""Datasets: samples are the tokens of the documents, blends follow their weights, and bad data end at once."""

import collections
import json
import shutil
from pathlib import Path

import data_processes
import numpy
import pytest
from launcher import launch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_midus.config.data import DataConfig
from megatron_midus.data import build_train_valid_test_datasets
from megatron_midus.data.sources import parse_blend
from megatron_midus.data.tokenizer import NullTokenizer

pytestmark = pytest.mark.usefixtures("process_group")

TOKENIZER = NullTokenizer(1000)
EOD = TOKENIZER.eod


@pytest.fixture
def make(tmp_path):
    """``make(name, documents)`` writes an indexed dataset (an end-of-document token is added) and returns its prefix."""

    def call(name, documents, dtype=numpy.uint16):
        prefix = str(tmp_path / name)
        builder = IndexedDatasetBuilder(prefix + ".bin", dtype=dtype)
        for document in documents:
            builder.add_document(numpy.array([*document, EOD]), [len(document) + 1])
        builder.finalize(prefix + ".idx")
        return prefix

    return call


@pytest.fixture
def documents():
    """40 documents whose tokens are all different from each other's but for the end."""
    lengths = numpy.random.default_rng(1).integers(5, 30, size=40)
    starts = numpy.concatenate([[0], numpy.cumsum(lengths)[:-1]])
    return [list(range(start, start + length)) for start, length in zip(starts, lengths)]


def build(num_samples=(10, 3, 2), seed=3, tokenizer=TOKENIZER, **settings):
    config = DataConfig(**{"seq_length": 16, **settings})
    return build_train_valid_test_datasets(config, tokenizer, num_samples=num_samples, seed=seed)


def tokens_of(dataset):
    return [dataset[i]["tokens"].tolist() for i in range(len(dataset))]


def test_samples_are_pieces_of_the_shuffled_documents(make, documents):
    prefix = make("a", documents)
    train, valid, test = build((None, None, None), data_path=[prefix], split="60,25,15")
    seen = collections.Counter()
    for name, dataset, part in (
        ("train", train, slice(0, 24)),
        ("valid", valid, slice(24, 34)),
        ("test", test, slice(34, 40)),
    ):
        mine = {token for document in documents[part] for token in document} | {EOD}
        for sample in (dataset[i] for i in range(len(dataset))):
            tokens, labels = sample["tokens"].tolist(), sample["labels"].tolist()
            assert tokens[1:] == labels[:-1] and len(tokens) == 16, name
            assert set(tokens) <= mine, name
            # Inside a document the tokens count up.
            assert all(b == a + 1 or EOD in (a, b) for a, b in zip(tokens, labels))
            assert sample["position_ids"].tolist() == list(range(16)) and sample["loss_mask"].tolist() == [1.0] * 16
            seen.update(tokens)
    # One pass: no token twice.
    assert max(count for token, count in seen.items() if token != EOD) == 1


def test_more_samples_than_data_repeats_it_and_seed_orders_it(make, documents):
    prefix = make("a", documents)
    train, _, _ = build((200, 0, 0), data_path=[prefix])
    assert len(train) >= 200
    again, _, _ = build((200, 0, 0), data_path=[prefix])
    other, _, _ = build((200, 0, 0), data_path=[prefix], seed=4)
    assert tokens_of(train) == tokens_of(again) != tokens_of(other)


def test_cyclic_training_data_do_not_depend_on_the_length_of_the_run(make, documents):
    prefix = make("a", documents)
    short, long = (tokens_of(build((n, 3, 0), data_path=[prefix], dataloader_type="cyclic")[0]) for n in (10, 900))
    assert short == long


def test_blend_follows_its_weights(make):
    # The dataset of a token is its hundreds.
    prefixes = [make(str(i), [[100 * i + j % 50 for j in range(40 + i)] for _ in range(60)]) for i in range(3)]
    blend = ["0.5", prefixes[0], "2", prefixes[1], "1.5", prefixes[2]]
    train, valid, _ = build((400, 40, 0), data_path=blend, split="90,10")
    for dataset, count in ((train, 400), (valid, 40)):
        origins = collections.Counter(
            next(t for t in dataset[i]["tokens"].tolist() if t != EOD) // 100 for i in range(len(dataset))
        )
        total = sum(origins.values())
        assert count <= total <= count + 3
        for origin, weight in enumerate((0.5, 2, 1.5)):
            # The blend is made greedily: it is never off by more than a sample per dataset.
            assert abs(origins[origin] - total * weight / 4) <= 3, origins


@pytest.mark.parametrize("old_documents", [3, 500])
def test_replay_takes_the_share_that_was_asked_for(make, old_documents):
    """0.95 new 0.05 old, whether the old data are a handful that repeats or more than will be read."""
    new, old = make("new", [[1] * 99] * 100), make("old", [[2] * 99] * old_documents)
    train, _, _ = build((1000, 0, 0), train_data_path=["0.95", new, "0.05", old])
    origins = [next(t for t in tokens if t != EOD) for tokens in tokens_of(train)][:1000]
    # At any time, so that a run that is stopped early had its replay too; the greedy blend is off by one a dataset.
    for samples in (100, 400, 1000):
        assert abs(origins[:samples].count(2) - 0.05 * samples) <= 2


def test_blend_without_weights_follows_the_sizes(make):
    small, large = make("s", [[1] * 99] * 10), make("l", [[2] * 99] * 30)
    train, _, _ = build((None, 0, 0), train_data_path=[small, large])
    origins = collections.Counter(next(t for t in tokens if t != EOD) for tokens in tokens_of(train))
    assert origins[2] / origins[1] == pytest.approx(3, abs=0.1)


def test_blend_without_weights_is_repeated_as_well(make):
    """Megatron-Core would stop after one pass, in the middle of the run."""
    small, large = make("s", [[1] * 99] * 10), make("l", [[2] * 99] * 30)
    one_pass = len(build((None, 0, 0), train_data_path=[small, large])[0])
    for paths in ({"train_data_path": [small, large]}, {"data_path": [small, large], "split": "1"}):
        train, _, _ = build((3 * one_pass, 0, 0), **paths)
        assert len(train) >= 3 * one_pass
        origins = collections.Counter(next(t for t in tokens if t != EOD) for tokens in tokens_of(train))
        assert origins[2] / origins[1] == pytest.approx(3, abs=0.1)
    with pytest.raises(ValueError, match="one pass over a blend with weights is not defined; leave .* valid out"):
        build((5, None, 0), train_data_path=[small], valid_data_path=["1", small, "2", large])


def test_several_processes_read_one_blend(make):
    """Rank 0 writes the cache, rank 1 reads it; together they read what one process reads."""
    prefixes = [make(str(i), [[100 * i + j % 50 for j in range(40 + i)] for _ in range(60)]) for i in range(2)]
    settings = {"paths": ["1", prefixes[0], "3", prefixes[1]], "split": "8,2,0", "num_samples": (40, 8, 8)}
    (whole,) = launch(data_processes.read_blend, 1, **settings, built_on=[0])
    parts = launch(data_processes.read_blend, 2, **settings, built_on=[0, 1])
    for split in (0, 1):
        # A step of two ranks is two batches of one.
        assert [batch for step in zip(parts[0][split], parts[1][split]) for batch in step] == whole[split]
    assert len(whole[0]) == 20 and whole[2] is None and parts[1][2] is None
    assert launch(data_processes.read_blend, 2, **settings, built_on=[0])[1] == [None, None, None]


def test_separate_files_for_each_split(make):
    paths = {name: make(name, [[i] * 50] * 20) for i, name in enumerate(("train", "valid", "test"), start=1)}
    datasets = build((20, 5, 4), **{f"{name}_data_path": [path] for name, path in paths.items()})
    for i, dataset in enumerate(datasets, start=1):
        assert {t for tokens in tokens_of(dataset) for t in tokens} == {i, EOD}
    train, valid, test = build((20, 5, 4), train_data_path=[paths["train"]])
    assert train is not None and valid is None and test is None


def test_no_samples_asked_no_dataset(make, documents):
    train, valid, test = build((5, 0, 0), data_path=[make("a", documents)])
    assert train is not None and valid is None and test is None


def test_end_of_document_settings(make):
    prefix = make("a", [[1, 2, 3, 4]] * 40)
    settings = {"reset_position_ids": True, "eod_mask_loss": True}
    train, _, _ = build((5, 0, 0), data_path=[prefix], split="1", **settings)
    sample = train[0]
    positions = {int(t): int(p) for t, p in zip(sample["tokens"][5:], sample["position_ids"][5:])}
    assert positions == {1: 0, 2: 1, 3: 2, 4: 3, EOD: 4}
    assert sample["loss_mask"].tolist() == [0.0 if t == EOD else 1.0 for t in sample["tokens"].tolist()]


def test_no_real_token_is_taken_for_padding(make):
    """Megatron-Core takes the loss away from labels that equal the tokenizer's pad id, and makes the tokens 0."""
    prefix = make("a", [list(range(10))] * 40)
    train, _, _ = build((5, 0, 0), data_path=[prefix], split="1")
    assert all(train[i]["loss_mask"].min() == 1 for i in range(5))
    assert {t for tokens in tokens_of(train) for t in tokens} == {*range(10), EOD}


def test_mock_data():
    train, valid, test = build((7, 3, 1), mock_data=True)
    for dataset, count in ((train, 7), (valid, 3), (test, 1)):
        assert len(dataset) >= count
        assert dataset[0]["tokens"].max() < 1000
    with pytest.raises(ValueError, match="no data: give --data-path"):
        build()


def test_cache_does_not_outlive_the_data(make, documents, tmp_path):
    """Megatron-Core keys its cache by path: made again under the same name, the data would be read by stale indices."""
    cache = str(tmp_path / "elsewhere")
    build((30, 0, 0), data_path=[make("a", documents)], data_cache_path=cache)
    files = set(Path(cache).rglob("*.npy"))
    assert files
    build((30, 0, 0), data_path=[make("a", documents)], data_cache_path=cache)
    assert set(Path(cache).rglob("*.npy")) == files
    prefix = make("a", documents[:7])
    train, _, _ = build((30, 0, 0), data_path=[prefix], data_cache_path=cache)
    fresh, _, _ = build((30, 0, 0), data_path=[prefix], data_cache_path=str(tmp_path / "fresh"))
    assert tokens_of(train) == tokens_of(fresh)
    assert not (tmp_path / "cache").exists()


def overwrite(path, offset, content):
    with open(path, "r+b") as stream:
        stream.seek(offset)
        stream.write(content)


DAMAGE = {
    "no bin": (lambda p: Path(p + ".bin").unlink(), r"a\.bin does not exist"),
    "no idx": (lambda p: Path(p + ".idx").unlink(), r"a\.idx does not exist"),
    "bin cut": (lambda p: Path(p + ".bin").write_bytes(Path(p + ".bin").read_bytes()[:-6]), "it is truncated"),
    "idx cut": (lambda p: Path(p + ".idx").write_bytes(Path(p + ".idx").read_bytes()[:-6]), "is damaged"),
    "idx head cut": (lambda p: Path(p + ".idx").write_bytes(Path(p + ".idx").read_bytes()[:20]), "is damaged"),
    "idx of another version": (lambda p: overwrite(p + ".idx", 9, b"\x02"), "is damaged"),
    "idx of an unknown type": (lambda p: overwrite(p + ".idx", 17, b"\x77"), "is damaged"),
    "idx is text": (lambda p: Path(p + ".idx").write_text("hello world, I am no index"), "not the index of"),
    "idx is empty": (lambda p: Path(p + ".idx").write_bytes(b""), "not the index of"),
    "bin of another": (lambda p: Path(p + ".bin").write_bytes(bytes(10)), "its index says"),
    "broken statistics": (lambda p: Path(p + ".json").write_text("{"), "is not the statistics"),
}


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage, message", DAMAGE.values(), ids=DAMAGE.keys())
def test_damaged_files(make, documents, damage, message):
    prefix = make("a", documents)
    damage(prefix)
    with pytest.raises(ValueError, match=message):
        build(data_path=[prefix])


def test_ids_beyond_the_vocabulary(make, documents):
    prefix = make("a", documents)
    small = NullTokenizer(200)
    with pytest.raises(ValueError, match="holds the token id 999, but the tokenizer has only 200 ids"):
        build(data_path=[prefix], tokenizer=small)
    Path(prefix + ".json").write_text('{"max_token_id": 1234}')
    with pytest.raises(ValueError, match="token id 1234, but the tokenizer has only 1000"):
        build(data_path=[prefix])


def test_another_tokenizer_is_noticed(make, documents, caplog):
    prefix = make("a", documents)
    statistics = {"max_token_id": 999, "tokenizer": {**TOKENIZER.unique_identifiers}}
    Path(prefix + ".json").write_text(json.dumps(statistics))
    build(data_path=[prefix], split="8,1,1")
    assert "another tokenizer" not in caplog.text
    statistics["tokenizer"]["vocab_size"] = 1001
    Path(prefix + ".json").write_text(json.dumps(statistics))
    build(data_path=[prefix], split="8,1,1")
    assert "was made with another tokenizer" in caplog.text


def test_empty_split_is_refused_not_searched_for_ever(make, documents, caplog):
    prefix = make("a", documents[:20])
    with pytest.raises(ValueError, match="--split 99,1,0 leaves no document of .*a for valid"):
        build(data_path=[prefix], split="99,1,0")
    build((3, 0, 0), data_path=[prefix], split="99,1,0")
    # Nobody asked for the thousandth part of the default.
    train, valid, test = build(data_path=[prefix])
    assert train is not None and valid is not None and test is None
    assert "there is no test data" in caplog.text
    with pytest.raises(ValueError, match="leaves no document of .*a for train"):
        build(data_path=[prefix], split="1,99,0")


def test_wrong_prefix_gets_a_hint(make, documents, tmp_path):
    prefix = make("a_text_document", documents)
    for wrong in (str(tmp_path / "a"), prefix + ".bin"):
        with pytest.raises(ValueError, match="did you mean .*a_text_document"):
            build(data_path=[wrong])
    with pytest.raises(ValueError, match="give the prefix of a dataset"):
        build(data_path=[str(tmp_path / "b")])


def test_parse_blend(tmp_path):
    assert parse_blend(["a"]) == (["a"], None)
    assert parse_blend(["a", "b", "c"]) == (["a", "b", "c"], None)
    assert parse_blend(["a", "b"]) == (["a", "b"], None)
    assert parse_blend([".3", "a", "7e-1", "b"]) == (["a", "b"], [0.3, 0.7])
    for values in (["0.3", "a", "b"], ["a", "0.3", "b"], ["0.3", "a", "x", "b"], ["a", "0.3"]):
        with pytest.raises(ValueError, match="before every prefix or before none"):
            parse_blend(values)
    for weight in ("0", "-1", "inf", "nan"):
        with pytest.raises(ValueError, match="must be positive"):
            parse_blend([weight, "a"])


@pytest.mark.parametrize("counts", [(1, 2), (1, 2, -3)])
def test_wrong_counts(make, documents, counts):
    with pytest.raises(ValueError, match="must be three counts"):
        build(counts, data_path=[make("a", documents)])


def test_data_of_another_machine(make, documents, tmp_path):
    """A copy elsewhere gives the same samples."""
    prefix = make("a", documents)
    (tmp_path / "copy").mkdir()
    for suffix in (".bin", ".idx"):
        shutil.copy(prefix + suffix, tmp_path / "copy")
    here, there = (tokens_of(build(data_path=[p])[0]) for p in (prefix, str(tmp_path / "copy" / "a")))
    assert here == there
