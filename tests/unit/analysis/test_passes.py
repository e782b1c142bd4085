"""The analysis changes nothing that it does not mean to change: own, replayed and restarted passes, bit for bit."""

import pytest
import torch
from naive import BLOCKS, VARIANTS, NaivePass, losses, make_midus, make_windows, midus

from megatron_midus.analysis.passes import Variant, fixed_retrieval, measure, memories, own_passes
from megatron_midus.analysis.windows import loss_change
from megatron_midus.analysis.windows import make_windows as cut


@pytest.mark.parametrize("kind", VARIANTS)
def test_own_pass_is_the_models(kind):
    model, windows = midus(kind), make_windows()
    logits = model(input_ids=windows.inputs, use_cache=False).logits
    seen = []
    handle = model.lm_head.register_forward_hook(lambda *call: seen.append(call[-1]))
    (done,) = own_passes(model, windows, batch_size=6)
    handle.remove()
    assert torch.equal(seen[0], logits)
    assert torch.allclose(done.nats, losses(model, windows), rtol=1e-6)  # fp32 against fp64 softmax
    naive = NaivePass(model)
    assert torch.allclose(naive.losses(windows), done.nats, rtol=1e-5)  # fp32 of either order
    for block in memories(model):
        slots, weights = done.slots_and_weights(block)
        found = [sorted(zip(s, w)) for s, w in zip(slots.flatten(0, 1).tolist(), weights.flatten(0, 1).tolist())]
        for mine, theirs in zip(found, (sorted(pairs) for heads in naive.found[block] for pairs in heads)):
            assert [s for s, _ in mine] == [s for s, _ in theirs]
            assert [w for _, w in mine] == pytest.approx([w for _, w in theirs], abs=1e-5)


@pytest.mark.parametrize("kind", VARIANTS)
@pytest.mark.parametrize("pieces", [1, 3])
def test_replay_of_fixed_retrieval_is_exact(kind, pieces, monkeypatch):
    """Also where a look-up goes in pieces, as long inputs do."""
    model = midus(kind)
    if pieces > 1:
        monkeypatch.setattr("megatron_midus.hf.lookup_midus.MAX_SCORES", 5 * 3 * 6)
    for done in own_passes(model, make_windows(), batch_size=4):
        assert pieces == 1 or len(done.selected[1]) > 1
        for block in range(len(BLOCKS)):
            with fixed_retrieval(model, done) if block < 2 else torch.no_grad():
                assert torch.equal(done.again(block), done.nats)


def test_fixed_retrieval_is_deaf_to_queries_and_keys():
    model, windows = make_midus(), make_windows()
    (done,) = own_passes(model, windows, batch_size=6)
    with torch.no_grad():
        for memory in memories(model).values():
            memory.row_keys.normal_()
    with fixed_retrieval(model, done):
        assert torch.equal(done.again(0), done.nats)
    assert not torch.allclose(done.again(0), done.nats)


def test_a_change_leaves_no_trace():
    model, windows = midus(), make_windows()
    before = losses(model, windows)
    memory = memories(model)[1]

    def failing(done):
        with fixed_retrieval(model, done):
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError):
        measure(model, windows, {"x": Variant(1, failing)}, batch_size=2)
    assert "look_up" not in memory.__dict__ and not memory._forward_hooks
    assert torch.equal(losses(model, windows), before)


def test_a_loss_that_is_not_finite_is_said():
    model = make_midus()
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        list(own_passes(model, make_windows(), batch_size=6))


class Bytes:
    eod = 60

    def encode_batch(self, texts):
        return [[ord(c) - 97 for c in text] for text in texts]


def test_windows():
    windows = cut(Bytes(), ["abcd", "ef"], seq_length=3)
    assert windows.inputs.tolist() == [[60, 0, 1], [2, 3, 60]] and windows.labels.tolist() == [[0, 1, 2], [3, 60, 4]]
    with pytest.raises(ValueError, match="seq_length=9"):
        cut(Bytes(), ["abcd"], seq_length=9)
    with pytest.raises(ValueError, match="2 windows"):
        windows.halves()


def test_changes_are_paired():
    own = torch.tensor([10.0, 20.0, 60.0], dtype=torch.float64)
    change = loss_change(own + torch.tensor([1.0, 2.0, 3.0]), own, 2)
    assert change.value == pytest.approx(1.0) and change.stderr == pytest.approx(0.5 / 3**0.5)
    assert change.is_clear and loss_change(own[:1], own[:1], 2).stderr is None
