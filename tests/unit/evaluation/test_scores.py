"""Standard errors by influences: against the textbook formula, lm-eval, and resampling."""

import math

import pytest
import torch

from megatron_midus.evaluation.scores import (
    Score,
    bits_influences,
    influences_of,
    mean_influences,
    perplexity_influences,
    root_sum_of_squares,
    subtract,
)


def random_numbers(count, seed=0):
    return torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_score(influences, value=0.5, **changes):
    fields = {"task": "t", "metric": "acc", "value": value, "stderr": 0.1, "higher_is_better": True, "items": 9}
    return Score(**{**fields, **changes}, influences=influences)


def test_error_of_a_mean():
    items = random_numbers(37)
    expected = float(items.std(correction=1)) / math.sqrt(37)
    assert root_sum_of_squares(mean_influences([items.tolist()])) == pytest.approx(expected, rel=1e-12)


def test_as_lm_eval_has_it():
    from lm_eval.api.metrics import mean_stderr

    items = [0.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0]
    assert root_sum_of_squares(mean_influences([items])) == pytest.approx(mean_stderr(items), rel=1e-12)


def test_error_of_a_stratified_mean():
    """Var(sum_s n_s mean_s / N) = sum_s n_s^2 var_s / n_s / N^2."""
    strata = [random_numbers(5, 1), 3 + random_numbers(11, 2)]
    variance = sum(len(s) * float(s.var(correction=1)) for s in strata) / 16**2
    found = root_sum_of_squares(mean_influences([s.tolist() for s in strata]))
    assert found == pytest.approx(math.sqrt(variance), rel=1e-12)
    # The distance between the subjects' means is no sampling error.
    assert found < root_sum_of_squares(mean_influences([torch.cat(strata).tolist()]))


def test_one_item_has_no_error():
    assert mean_influences([[1.0], [0.0, 1.0]]) is None
    assert perplexity_influences([-3.0], [2.0]) is None and bits_influences([-3.0], [2.0]) is None


def test_error_of_a_perplexity_is_that_of_resampling():
    words = (5 + 20 * random_numbers(400, 3).abs()).tolist()
    nats = [-w * (1.5 + 0.2 * float(x)) for w, x in zip(words, random_numbers(400, 4))]
    generator = torch.Generator().manual_seed(5)
    draws = []
    for _ in range(1500):
        chosen = torch.randint(400, (400,), generator=generator).tolist()
        draws.append(math.exp(-sum(nats[i] for i in chosen) / sum(words[i] for i in chosen)))
    expected = float(torch.tensor(draws).std())
    # 1500 draws know a standard deviation to 2 %; the linearisation is better than that here.
    assert root_sum_of_squares(perplexity_influences(nats, words)) == pytest.approx(expected, rel=0.08)


def test_errors_of_bits_and_perplexity_agree():
    """d exp(x) = exp(x) dx, and bits are x / ln 2."""
    nats, sizes = [-30.0, -41.0, -12.0], [10, 13, 5]
    value = math.exp(83 / 28)
    bits, perplexity = bits_influences(nats, sizes), perplexity_influences(nats, sizes)
    assert perplexity == pytest.approx([value * math.log(2) * b for b in bits], rel=1e-12)
    assert sum(perplexity) == pytest.approx(0, abs=1e-9)
    assert perplexity_influences([-1e6, -1e6], [1, 1]) is None  # exp overflows


def test_differences_are_paired():
    """What both models find hard cancels; independent errors would not."""
    hard = random_numbers(50)
    first = make_score(tuple(mean_influences([hard.tolist()])))
    second = make_score(tuple(mean_influences([(hard + 0.01 * random_numbers(50, 1)).tolist()])), value=0.75)
    difference = subtract(second, first)
    assert difference.value == 0.25
    expected = float((0.01 * random_numbers(50, 1)).std(correction=1)) / math.sqrt(50)
    assert difference.stderr == pytest.approx(expected, rel=1e-9)
    assert difference.stderr < 0.05 * root_sum_of_squares(first.influences)
    assert subtract(first, first).stderr == 0.0


@pytest.mark.parametrize("other", [None, (0.1, 0.2)])
def test_no_error_where_items_cannot_be_paired(other):
    assert subtract(make_score(other), make_score((0.1, 0.2, 0.3))).stderr is None


def test_metrics_are_told_apart_by_their_results():
    pairs = [(-3.0, 2), (-4.0, 3)]
    assert influences_of("word_perplexity", [pairs]) == perplexity_influences([-3.0, -4.0], [2, 3])
    assert influences_of("bits_per_byte", [pairs]) == bits_influences([-3.0, -4.0], [2, 3])
    assert influences_of("acc_norm", [[0, 1], [1, 1]]) == mean_influences([[0, 1], [1, 1]])
    assert influences_of("word_perplexity", [pairs, pairs]) is None
    assert influences_of("f1", [[0.0, 1.0]]) is None and influences_of("f1", [pairs]) is None


def test_json_has_no_infinity():
    assert make_score(None, value=math.inf).to_dict()["value"] is None
