"""What --verify reports: figures of two logit tensors, worked out by hand, and the first tensor that differs."""

import math

import pytest
import torch
from tiny_models import DictSource

from megatron_midus.conversion.verify import compare, first_difference, random_tokens


def test_equal_logits():
    logits = torch.randn(2, 5, 11, generator=torch.Generator().manual_seed(0))
    result = compare(logits, logits.clone())
    assert result.bit_equal and result.max_difference == 0 and result.kl == 0 and result.argmax_agreement == 1
    assert "bit-equal yes" in result.describe() and "KL 0.000e+00 nats/token" in result.describe()


def test_figures_by_hand():
    one = torch.tensor([[[math.log(3.0), 0.0]], [[0.0, 0.0]]])  # probabilities 3/4, 1/4 and 1/2, 1/2
    two = torch.tensor([[[0.0, math.log(3.0)]], [[1.0, 1.0]]])  # 1/4, 3/4 and 1/2, 1/2
    result = compare(one, two)
    # (3/4 ln 3 - 1/4 ln 3 + 0) / 2 positions; fp32 logarithms
    assert result.kl == pytest.approx(math.log(3.0) / 4, rel=1e-6)
    assert result.argmax_agreement == 0.5 and not result.bit_equal
    assert result.max_difference == pytest.approx(math.log(3.0), rel=1e-6)


def test_tokens_are_drawn_from_the_whole_vocabulary():
    ids = random_tokens(vocab_size=7)
    assert ids.shape == (3, 33) and set(ids.flatten().tolist()) == set(range(7))
    assert torch.equal(ids, random_tokens(vocab_size=7))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"a": torch.ones(2)}, "b is on one side only"),
        ({"a": torch.ones(2), "b": torch.ones(2, 1)}, r"b is torch.float32 \[2\] against torch.float32 \[2, 1\]"),
        ({"a": torch.ones(2).half(), "b": torch.ones(2)}, "a is torch.float32"),
        ({"a": torch.ones(2), "b": torch.tensor([1.0, 1.5])}, "b differs by up to 5.000e-01"),
    ],
)
def test_first_difference(change, message):
    wanted = DictSource({"a": torch.ones(2), "b": torch.ones(2)})
    assert first_difference(wanted, wanted) is None
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(first_difference(wanted, DictSource(change)))
