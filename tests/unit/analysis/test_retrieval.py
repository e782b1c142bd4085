"""Exchanges with the retrieval fixed, against loops over the look-ups of an own pass and tables made by hand."""

import pytest
import torch
from naive import HEADS, NaivePass, make_midus, make_windows, midus, outputs, table

from megatron_midus.analysis.algebra import rank_of
from megatron_midus.analysis.passes import memories
from megatron_midus.analysis.retrieval import SHARINGS, measure_retrieval, num_retrieval_passes


def shared_by_hand(memory, found):
    """What all heads read instead of their own tables, fitted to the look-ups ``found``; ``[N, O]``."""
    own = table(memory)
    if memory.config.memory_variant == "full":
        mass = torch.zeros(own.shape[:2], dtype=torch.float64)
        for heads in found:
            for head, pairs in enumerate(heads):
                for slot, weight in pairs:
                    mass[head, slot] += weight
        used = mass.sum(0) > 0
        mass = torch.where(used, mass / mass.sum(0).clamp(min=1e-300), 1 / HEADS)
        return (mass[..., None] * own).sum(0)
    values = memory.value_bank.detach().double()
    latent = outputs(found, [values] * HEADS)  # [T, M, L]
    wanted = outputs(found, own)
    best = torch.linalg.lstsq(latent.flatten(0, 1), wanted.flatten(0, 1), driver="gelsd").solution
    return values @ best


@pytest.mark.parametrize("kind", ["hive", "hive-dressed", "full"])
def test_against_tables_by_hand(kind):
    model, windows = midus(kind), make_windows()
    progress = []
    result = measure_retrieval(model, windows, batch_size=2, progress=progress.append)
    assert sum(progress) == num_retrieval_passes(model) * len(windows) and result.reason is None
    first, second = windows.halves()
    fitted, own = NaivePass(model), NaivePass(model)
    fitted.losses(first)
    before = own.losses(second)
    tables = {}
    for block, memory in memories(model).items():
        whole = table(memory)
        shared = shared_by_hand(memory, fitted.found[block])
        tables[block] = {
            "shared": shared.expand_as(whole),
            "mean": whole.mean(0).expand_as(whole),
            "swapped": torch.stack([whole[head - 1] for head in range(HEADS)]),
            "off": torch.zeros_like(whole),
        }

    def rise(**changed):
        after = NaivePass(model, fixed=own.found, **changed).losses(second)
        return pytest.approx((after - before).sum().item() / second.num_tokens, abs=2e-5)

    for kind_ in SHARINGS:
        for block in (1, 3):
            exchange = result.exchanges[block][kind_]
            assert exchange.rise.value == rise(tables={block: tables[block][kind_]})
            changed = outputs(own.found[block], tables[block][kind_])
            error = (changed - own.read[block]).square().sum() / own.read[block].square().sum()
            assert exchange.error == pytest.approx(error.item(), rel=1e-4)
        both = {block: tables[block][kind_] for block in (1, 3)}
        assert result.all_blocks[kind_].rise.value == rise(tables=both)
    rises = [abs(entry.rise.value) for block in (1, 3) for entry in result.exchanges[block].values()]
    assert min(rises) > 1e-4


def test_equal_projections_lose_nothing_when_shared():
    model = make_midus()
    with torch.no_grad():
        for memory in memories(model).values():
            memory.head_proj.copy_(memory.head_proj[:1].expand_as(memory.head_proj))
    result = measure_retrieval(model, make_windows(), batch_size=3)
    for block in (1, 3):
        for kind in ("shared", "mean", "swapped"):
            assert abs(result.exchanges[block][kind].rise.value) < 1e-6
            assert result.exchanges[block][kind].error < 1e-10
        assert result.exchanges[block]["off"].error == 1.0


def test_ranks_of_the_parameters():
    model = make_midus()
    memory = memories(model)[1]
    with torch.no_grad():
        memory.head_proj[0] = torch.outer(torch.arange(1.0, 6.0), torch.arange(1.0, 9.0))
        memory.value_bank[:, 2:] = 0
    result = measure_retrieval(model, make_windows(), batch_size=3).structures
    first = result[1].projections
    assert len(first) == HEADS and first[0].effective == pytest.approx(1, abs=1e-5)
    assert first[1].effective > 2 and first[1].full == 5 and 2 < first[1].random < 5
    assert result[1].values.effective == pytest.approx(2, abs=0.3) and result[1].values.full == 5
    whole = table(memory).transpose(0, 1).flatten(1)
    assert result[1].table.effective == pytest.approx(rank_of(torch.linalg.svdvals(whole), (36, 5)).effective, rel=1e-4)
    assert result[3].values.effective > 3


def test_variant_block_has_nothing_to_exchange():
    result = measure_retrieval(midus("block"), make_windows(), batch_size=3)
    assert "no head-specific projections" in result.reason
    assert list(result.exchanges[1]) == list(result.all_blocks) == ["off"]
    assert result.structures[1].projections == [] and result.structures[1].stacked is None


def test_half_a_text_must_hold_two_windows():
    with pytest.raises(ValueError, match="3 windows"):
        measure_retrieval(midus(), make_windows(count=3), batch_size=3)
