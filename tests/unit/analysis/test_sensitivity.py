"""Smaller k, n, banks and widths against loops over all slots, and against models that are configured so."""

import collections

import pytest
import torch
from naive import KEYS, LATENT, TOPK, VARIANTS, NaivePass, losses, make_midus, make_windows, midus, table

from megatron_midus.analysis.passes import memories
from megatron_midus.analysis.sensitivity import (
    SHARES_OF_SLOTS,
    halvings,
    measure_sensitivity,
    num_sensitivity_passes,
)


@pytest.fixture(scope="module", params=VARIANTS)
def studied(request):
    """Model, both halves of the text, and what was found."""
    model, windows = midus(request.param), make_windows()
    progress = []
    found = measure_sensitivity(model, windows, batch_size=2, progress=progress.append)
    assert sum(progress) == num_sensitivity_passes(model) * len(windows)
    return model, *windows.halves(), found


def rise(model, second, changed):
    own = losses(model, second)
    return pytest.approx(((changed - own).sum() / second.num_tokens).item(), abs=2e-5)


def test_what_the_model_has_costs_nothing(studied):
    model, _, _, found = studied
    curves = (found.topk, found.num_keys, found.share_of_slots, found.rank, found.rank_by_use)
    for curve, own in zip(curves, (TOPK, KEYS, 1.0, max(found.rank), max(found.rank_by_use))):
        assert curve[own].value == 0.0 == curve[own].stderr
    assert all(abs(e.value) > 1e-4 for curve in curves[:2] for number, e in curve.items() if number < TOPK)
    if model.config.memory_variant == "hive":
        assert list(found.rank) == [LATENT, 2, 1]


def test_topk_is_that_of_a_model_with_it(studied):
    model, _, second, found = studied
    assert list(found.topk) == [6, 3, 1]
    kind = next(k for k in VARIANTS if midus(k) is model)
    for topk in (6, 1):
        assert found.topk[topk].value == rise(model, second, losses(make_midus(kind, memory_topk=topk), second))


def test_sub_keys(studied):
    model, first, second, found = studied
    assert list(found.num_keys) == [6, 3]
    seen = NaivePass(model)
    seen.losses(first)
    allowed = {}
    for block, memory in memories(model).items():
        heads = len(memory.row_keys)
        reads = [
            [collections.Counter(divmod(s, KEYS)[axis] for row in seen.found[block] for s, _ in row[h]) for h in range(heads)]
            for axis in (0, 1)
        ]  # fmt: skip
        if memory.config.memory_variant != "full":
            reads = [[sum(axis, collections.Counter())] * heads for axis in reads]
        allowed[block] = [
            [i * KEYS + j for i in top(rows) for j in top(cols)] for rows, cols in zip(*reads)
        ]  # fmt: skip
    changed = NaivePass(model, allowed=allowed).losses(second)
    assert found.num_keys[3].value == rise(model, second, changed)


def top(counter):
    """The three most read of the keys, of equals the first."""
    return sorted(range(KEYS), key=lambda key: (-counter[key], key))[:3]


def test_pruned_slots(studied):
    model, first, second, found = studied
    seen = NaivePass(model)
    seen.losses(first)
    share = 0.25
    tables = {}
    for block, memory in memories(model).items():
        is_full = memory.config.memory_variant == "full"
        reads = collections.Counter(
            (h if is_full else 0, s) for row in seen.found[block] for h, pairs in enumerate(row) for s, _ in pairs
        )
        banks = len(memory.row_keys) if is_full else 1
        places = [(h, s) for h in range(banks) for s in range(KEYS**2)]
        kept = set(sorted(places, key=lambda place: (-reads[place], place))[: len(places) // 4])
        whole = table(memory).clone()
        for h, s in places:
            if (h, s) not in kept:
                whole[h if is_full else slice(None), s] = 0
        tables[block] = whole
    assert list(found.share_of_slots) == list(SHARES_OF_SLOTS)
    changed = NaivePass(model, tables=tables).losses(second)
    assert found.share_of_slots[share].value == rise(model, second, changed)


def test_narrow_tables(studied):
    model, _, second, found = studied
    tables = {}
    for block, memory in memories(model).items():
        whole = table(memory)
        left, values, right = torch.linalg.svd(whole.transpose(0, 1).flatten(1), full_matrices=False)
        cut = left[:, :1] * values[:1] @ right[:1]
        tables[block] = cut.view(KEYS**2, *whole.shape[::2]).transpose(0, 1)
    assert found.rank[1].value == rise(model, second, NaivePass(model, tables=tables).losses(second))
    assert found.rank_by_use[1].value != found.rank[1].value


def test_halvings():
    assert halvings(12, 4) == [12, 6, 4] and halvings(1) == [1] and halvings(4, 4) == [4]
