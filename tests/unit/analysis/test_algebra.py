"""Ranks of matrices whose rank is known, truncation against a plain SVD, the shared projection against least squares."""

import pytest
import torch
from naive import VARIANTS, midus, table

from megatron_midus.analysis.algebra import (
    random_rank,
    rank_of,
    shared_projection,
    singular_values,
    table_directions,
    table_width,
    truncate_table,
)
from megatron_midus.analysis.passes import memories, replaced


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_equal_singular_values_count_one_each(rank):
    left, right = torch.linalg.qr(random(40, rank)).Q, torch.linalg.qr(random(7, rank, seed=1)).Q
    found = rank_of(singular_values(5 * left @ right.T), (40, 7))
    # Squares of singular values keep about 1e-8 of the largest as noise.
    assert found.effective == pytest.approx(rank, rel=1e-5) and found.stable == pytest.approx(rank, rel=1e-9)
    assert found.full == 7 and found.spectrum[0] == 1.0 and sum(v > 1e-6 for v in found.spectrum) == rank


def test_unequal_singular_values():
    found = rank_of(singular_values(torch.diag(torch.tensor([4.0, 2.0, 2.0]))), (3, 3))
    assert found.effective == pytest.approx(2**1.5)  # entropy of (1/2, 1/4, 1/4)
    assert found.stable == pytest.approx(1.5) and found.spectrum == pytest.approx([1.0, 0.5, 0.5])


def test_noise_of_a_tall_matrix_is_nearly_full():
    assert 7.9 < random_rank(10**9, 8) < 8  # not drawn whole
    assert random_rank(32, 32) == pytest.approx(25.6, abs=1)  # mean of 100 draws 25.57, their standard deviation 0.31


def test_zeros_have_no_rank():
    found = rank_of(singular_values(torch.zeros(5, 3)), (5, 3))
    assert (found.effective, found.stable, found.spectrum) == (None, None, [])


@pytest.mark.parametrize("kind", VARIANTS)
@pytest.mark.parametrize("weighted", [False, True])
def test_truncation_is_that_of_an_svd(kind, weighted, monkeypatch):
    monkeypatch.setattr("megatron_midus.analysis.algebra._ROWS", 7)
    memory = memories(midus(kind))[1]
    whole = table(memory).transpose(0, 1).flatten(1)  # [N, C]
    weights = random(len(whole)).abs() if weighted else None
    root = torch.ones(len(whole), 1) if weights is None else weights.sqrt()[:, None]
    left, values, right = torch.linalg.svd(root * whole, full_matrices=False)
    directions, found = table_directions(memory, weights)
    width = table_width(memory)
    assert width == torch.linalg.matrix_rank(whole)
    assert torch.allclose(found[:width], values[:width], rtol=1e-6)
    for rank in (1, 2, width):
        with replaced(memory, **truncate_table(memory, directions[:, :rank])):
            cut = root * table(memory).transpose(0, 1).flatten(1)
        best = left[:, :rank] * values[:rank] @ right[:rank]
        assert torch.allclose(cut, best, atol=1e-5)  # parameters are fp32
    assert torch.equal(table(memory).transpose(0, 1).flatten(1), whole)


def test_shared_projection_is_least_squares():
    reads, projections = random(3, 50, 4), random(3, 4, 6, seed=1)
    reads[:, :, 3] = 0  # a direction that nothing ever reads
    grams = torch.einsum("mtl,mtk->mlk", reads, reads)
    found = shared_projection(grams, projections)
    wanted = (reads @ projections).flatten(0, 1)
    best = torch.linalg.lstsq(reads.flatten(0, 1), wanted, driver="gelsd").solution
    assert torch.allclose(found[:3], best[:3], rtol=1e-4, atol=1e-5)  # the ridge is 1e-6
    assert torch.allclose(found[3], projections.mean(0)[3])
    same = projections[:1].expand_as(projections)
    assert torch.allclose(shared_projection(grams, same), same[0], atol=1e-12)
    assert torch.equal(shared_projection(torch.zeros_like(grams), projections), projections.mean(0))
