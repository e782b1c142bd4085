"""Samples of fine-tuning against a loop over the conversations, long ones, splits and blends; the mask between conversations."""

from __future__ import annotations

import numpy
import pytest
import torch

from megatron_midus.config.data import DataConfig
from megatron_midus.data import build_train_valid_test_datasets
from megatron_midus.data.batch import position_mask
from megatron_midus.data.statistics import DatasetStatistics
from megatron_midus.data.tokenizer import NullTokenizer
from megatron_midus.data.writer import write_index

pytestmark = pytest.mark.usefixtures("process_group")

TOKENIZER = NullTokenizer(1000)
TOKENIZER.chat_template = "a"  # type: ignore[attr-defined]
RANDOM = numpy.random.RandomState(0)
LENGTHS = RANDOM.randint(3, 18, 50).tolist()


def write(path, lengths, *, seed=1):
    """Conversations of random ids, with a loss on a part in the middle and at the end; returns prefix, ids and masks."""
    random = numpy.random.RandomState(seed)
    ids = [random.randint(0, 999, n) for n in lengths]
    masks = [(numpy.arange(n) % 4 == 2) | (numpy.arange(n) == n - 1) for n in lengths]
    for name, parts in ((f"{path}_sft_document", ids), (f"{path}_sft_loss_document", masks)):
        numpy.concatenate(parts).astype(numpy.uint16).tofile(f"{name}.bin")
        write_index(f"{name}.idx", numpy.array(lengths, numpy.int32), "uint16")
    return f"{path}_sft_document", ids, masks


def build(*, sizes=(40, 0, 0), seed=7, **settings):
    config = DataConfig(**{"sft": True, "seq_length": 24, **settings})
    return build_train_valid_test_datasets(config, TOKENIZER, num_samples=sizes, seed=seed)


def conversations_of(sample) -> list[tuple[list[int], list[float]]]:
    """The conversations that a sample holds: ids and which of them after the first have a loss."""
    starts = numpy.flatnonzero(sample["position_ids"].numpy() == 0).tolist()
    found = []
    for start, end in zip(starts, [*starts[1:], len(sample["tokens"])]):
        assert sample["position_ids"][start:end].tolist() == list(range(end - start))
        tokens, labels = sample["tokens"][start:end].tolist(), sample["labels"][start:end].tolist()
        loss = sample["loss_mask"][start:end].tolist()
        if loss == [0.0]:  # a place behind the last
            assert tokens == labels == [TOKENIZER.eod]
            continue
        assert labels[:-1] == tokens[1:]
        found.append(([*tokens, labels[-1]], loss))
    return found


def test_an_epoch_holds_every_conversation_whole(tmp_path):
    prefix, ids, masks = write(tmp_path / "a", LENGTHS)
    train, valid, _ = build(data_path=[prefix], split="100,0,0", sizes=(None, 0, 0))
    assert valid is None
    found = [conversation for index in range(len(train)) for conversation in conversations_of(train[index])]
    expected = [(i.tolist(), m[1:].astype(float).tolist()) for i, m in zip(ids, masks)]
    assert sorted(found) == sorted(expected)
    # The order is of the seed; more samples go on with another epoch, and the beginning stays.
    longer, _, _ = build(data_path=[prefix], split="100,0,0", sizes=(3 * len(train), 0, 0))
    other, _, _ = build(data_path=[prefix], split="100,0,0", sizes=(None, 0, 0), seed=8)
    assert len(longer) == 3 * len(train)

    def tokens(dataset, start=0):
        return [dataset[start + index]["tokens"].tolist() for index in range(len(train))]

    assert tokens(longer) == tokens(train) != tokens(other)
    assert tokens(longer, len(train)) != tokens(train)


def test_splits_and_blends(tmp_path):
    prefix, ids, _ = write(tmp_path / "a", LENGTHS)
    other, more, _ = write(tmp_path / "b", LENGTHS[:20], seed=2)
    train, valid, test = build(data_path=[prefix], split="60,20,20", sizes=(None, None, None))
    parts = [[c for i in range(len(d)) for c, _ in conversations_of(d[i])] for d in (train, valid, test)]
    assert [sorted(part) for part in parts] == [
        sorted(i.tolist() for i in ids[a:b]) for a, b in ((0, 30), (30, 40), (40, 50))
    ]
    blend, _, _ = build(train_data_path=["0.25", other, "0.75", prefix], sizes=(40, 0, 0))
    source = [
        tuple(c) in {tuple(m.tolist()) for m in more} for i in range(40) for c, _ in conversations_of(blend[i])[:1]
    ]
    assert len(blend) >= 40 and sum(source) == 10


def test_conversations_that_are_too_long(tmp_path):
    lengths = [5, 25, 26, 60, 9]
    prefix, ids, masks = write(tmp_path / "a", lengths)
    common = {"train_data_path": [prefix], "sizes": (None, 0, 0)}
    with pytest.raises(ValueError) as error:
        build(**common)
    assert str(error.value) == (
        f"2 of 5 conversations of {prefix} are longer than --seq-length 24, the longest has 60 tokens; give --seq-length 59, or "
        "--sft-long-conversations truncate or drop"
    )
    dropped, _, _ = build(**common, sft_long_conversations="drop")
    cut, _, _ = build(**common, sft_long_conversations="truncate")
    found = {
        name: [c for i in range(len(d)) for c, _ in conversations_of(d[i])]
        for name, d in (("drop", dropped), ("cut", cut))
    }
    assert sorted(found["drop"]) == sorted(ids[i].tolist() for i in (0, 1, 4))
    assert sorted(found["cut"]) == sorted(i[:25].tolist() for i in ids)
    # One whose loss is all behind the cut has nothing to learn.
    loss = numpy.concatenate(masks).astype(numpy.uint16)
    loss[sum(lengths[:3]) : sum(lengths[:3]) + 59] = 0
    loss.tofile(f"{tmp_path}/a_sft_loss_document.bin")
    cut, _, _ = build(**common, sft_long_conversations="truncate")
    assert sorted(c for i in range(len(cut)) for c, _ in conversations_of(cut[i])) == sorted(
        ids[i][:25].tolist() for i in (0, 1, 2, 4)
    )
    assert cut.num_left_out == 1
    with pytest.raises(ValueError, match="no conversation of .* is left for train"):
        build(**common, seq_length=3, sft_long_conversations="drop")


def test_data_that_do_not_fit(tmp_path):
    prefix, _, _ = write(tmp_path / "a", LENGTHS)
    common = {"train_data_path": [prefix], "sizes": (None, 0, 0)}
    statistics = DatasetStatistics(50, 1, 1, 998)
    (tmp_path / "a_sft_document.json").write_text(statistics.to_json(sft=True, chat_template_sha256="0"))
    with pytest.raises(
        ValueError, match="was made with another chat template than this run's; give --chat-template FILE"
    ):
        build(**common)
    with pytest.raises(ValueError, match="holds conversations of midus preprocess --sft; train on them with --sft"):
        build(**common, sft=False)
    (tmp_path / "a_sft_document.json").unlink()
    config = DataConfig(sft=True, seq_length=24, train_data_path=[prefix])
    with pytest.raises(ValueError, match="the tokenizer has no chat template, and .* was made with one"):
        build_train_valid_test_datasets(config, NullTokenizer(1000), num_samples=(None, 0, 0), seed=1)
    write_index(tmp_path / "a_sft_loss_document.idx", numpy.array([*LENGTHS[1:], LENGTHS[0]], numpy.int32), "uint16")
    with pytest.raises(ValueError, match="and its loss mask are of different conversations"):
        build(**common)
    (tmp_path / "a_sft_loss_document.idx").unlink()
    with pytest.raises(ValueError, match="has no loss mask .* beside it, so it holds no conversations"):
        build(**common)


def test_flags_that_contradict():
    for settings, message in (
        ({"sft": True, "mock_data": True}, "--mock-data does not go with --sft"),
        ({"sft": True, "eod_mask_loss": True}, "--eod-mask-loss does not go with --sft"),
        ({"sft_long_conversations": "drop"}, "--sft-long-conversations drop is of --sft"),
        ({"chat_template": "t"}, "--chat-template t is of --sft"),
    ):
        with pytest.raises(ValueError, match=message):
            DataConfig(**settings)


def test_position_mask_against_a_loop():
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 0], [0, 1, 2, 3, 4, 5, 6]])
    mask = position_mask(positions)
    for row, of_row in enumerate(positions.tolist()):
        for query in range(7):
            for key in range(7):
                allowed = key <= query and 0 not in of_row[key + 1 : query + 1]
                assert bool(mask[row, 0, query, key]) != allowed
