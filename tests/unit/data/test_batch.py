"""Batches: what each stage gets, the mask between documents, and the broadcast over tensor-parallel processes."""

import data_processes
import pytest
import torch
from data_processes import NAMES, SETTINGS, samples
from launcher import launch

from megatron_midus.data import get_batch, needs_data
from megatron_midus.data.batch import document_mask


def test_one_process_gets_what_was_read():
    iterator = samples(2)
    for expected in samples(2):
        batch = get_batch(iterator, **SETTINGS)
        assert all(torch.equal(batch[name], expected[name]) for name in NAMES)
        assert batch["loss_mask"].dtype == torch.float32 and batch["attention_mask"] is None


@pytest.mark.parametrize("first, last", [(True, False), (False, True), (False, False)])
def test_each_pipeline_stage_gets_its_part(first, last):
    batch = get_batch(samples(1), **{**SETTINGS, "is_first_stage": first, "is_last_stage": last})
    there = {name for name in NAMES if batch[name] is not None}
    assert there == ({"tokens", "position_ids"} if first else {"labels", "loss_mask"} if last else set())
    assert needs_data(is_first_stage=first, is_last_stage=last) == (first or last)


def test_middle_stage_reads_nothing_unless_it_needs_the_mask():
    middle = {**SETTINGS, "is_first_stage": False, "is_last_stage": False}
    assert set(get_batch(None, **middle).values()) == {None}
    batch = get_batch(samples(1), **middle, reset_attention_mask=True, eod=5)
    assert batch["attention_mask"].shape == (3, 1, 8, 8) and batch["tokens"] is None
    assert needs_data(is_first_stage=False, is_last_stage=False, reset_attention_mask=True)


def test_document_mask_against_a_loop():
    tokens = torch.tensor([[4, 9, 1, 9, 9, 2, 3], [9, 1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6, 9]])
    mask = document_mask(tokens, eod=9)
    for row, text in enumerate(tokens.tolist()):
        for query in range(7):
            for key in range(7):
                allowed = key <= query and 9 not in text[key:query]
                assert bool(mask[row, 0, query, key]) != allowed


def test_what_cannot_be_used():
    with pytest.raises(ValueError, match="the data are exhausted"):
        get_batch(samples(0), **SETTINGS)
    with pytest.raises(ValueError, match=r"shape \(2, 8\), expected \(3, 8\)"):
        get_batch(samples(1, batch=2), **SETTINGS)
    with pytest.raises(ValueError, match="needs the id of the end-of-document token"):
        get_batch(samples(1), **SETTINGS, reset_attention_mask=True)


@pytest.mark.parametrize("function", [data_processes.broadcast, data_processes.context_parallel])
def test_parallel_processes(function):
    launch(function, 2)
