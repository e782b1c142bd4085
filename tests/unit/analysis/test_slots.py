"""What slots fire on, and how often slots are read, against counts in loops."""

import collections
import math

import pytest
import torch
from naive import HEADS, KEYS, TOPK, VARIANTS, VOCAB, NaivePass, make_midus, make_windows, midus

from megatron_midus.analysis.passes import memories
from megatron_midus.analysis.slots import CONTEXT_BEFORE, SlotSettings, measure_slots
from megatron_midus.analysis.usage import concentration, distribution, measure_usage

SLOTS = KEYS**2


class Letters:
    """Token i is the i-th letter from "0"; a text starts without its first space, as with SentencePiece."""

    def decode(self, ids):
        return "".join(" " + chr(48 + i) for i in ids)[1:]


def events(model, windows, block):
    """Every read: (head, slot, weight, window, position)."""
    seen = NaivePass(model)
    seen.losses(windows)
    length = windows.inputs.shape[1]
    return [
        (head, slot, weight, *divmod(place, length))
        for place, heads in enumerate(seen.found[block])
        for head, pairs in enumerate(heads)
        for slot, weight in pairs
    ]


def information(mass, text):
    """Bits between two counters of tokens."""
    shares = ((token, w / sum(mass.values())) for token, w in mass.items() if w)
    return sum(p * math.log2(p / text[token] * text.total()) for token, p in shares)


@pytest.mark.parametrize("kind", VARIANTS)
def test_slots_against_a_count(kind, monkeypatch):
    monkeypatch.setattr("megatron_midus.analysis.slots._MAX_PENDING", 50)  # merged many times
    model, windows = midus(kind), make_windows(count=12)
    settings = SlotSettings(most_used=4, most_selective=5, tokens=3, contexts=2, min_reads=4)
    found = measure_slots(model, windows, Letters(), settings, batch_size=5)
    text = collections.Counter(windows.inputs.flatten().tolist())
    for block in (1, 3):
        reads = events(model, windows, block)
        mass, count, tokens = collections.Counter(), collections.Counter(), collections.defaultdict(collections.Counter)
        for head, slot, weight, window, position in reads:
            mass[head, slot] += weight
            count[head, slot] += 1
            tokens[head, slot][windows.inputs[window, position].item()] += weight

        bits = {key: information(tokens[key], text) for key in tokens}
        used = sorted((key for key in mass if mass[key] > 0), key=lambda key: -mass[key])[:4]
        assert [(s.head, s.slot) for s in found[block].most_used] == used
        often = [key for key in mass if count[key] >= 4 and mass[key] > 0]
        selective = sorted(often, key=lambda key: -bits[key])[:5]
        shown = found[block].most_selective
        assert [s.information for s in shown] == pytest.approx([bits[key] for key in selective], abs=1e-4)
        total = sum(mass[key] for key in often)
        assert found[block].mean_information == pytest.approx(sum(bits[k] * mass[k] for k in often) / total, abs=1e-4)
        for slot in [*found[block].most_used, *shown]:
            key = (slot.head, slot.slot)
            assert (slot.reads, slot.row, slot.col) == (count[key], *divmod(slot.slot, KEYS))
            assert slot.mass == pytest.approx(mass[key], rel=1e-4) and slot.num_tokens == len(tokens[key])
            best = sorted(tokens[key].values(), reverse=True)[:3]
            assert [share for _, share in slot.tokens] == pytest.approx([w / mass[key] for w in best], abs=1e-4)
            token, share = slot.tokens[0]
            assert share == pytest.approx(tokens[key][ord(token[-1]) - 48] / mass[key], abs=1e-4)
            places = sorted((r for r in reads if r[:2] == key), key=lambda r: (-r[2], *r[3:]))[:2]
            assert [c.weight for c in slot.contexts] == pytest.approx([p[2] for p in places], abs=1e-4)
            for context in slot.contexts:
                row = windows.inputs[context.window].tolist()
                before = row[max(0, context.position - CONTEXT_BEFORE) : context.position]
                assert context.before == (Letters().decode(before) if before else "")
                assert context.token == " " + chr(48 + row[context.position])
                assert context.after[-1] == chr(48 + windows.labels[context.window, context.position].item())
                assert any(r[:2] == key and r[3:] == (context.window, context.position) for r in reads)


def test_equal_weights_take_the_earlier_place():
    model = make_midus(memory_topk=1)  # the only slot of a look-up weighs 1 everywhere
    slots = measure_slots(model, make_windows(), Letters(), SlotSettings(contexts=2), batch_size=4)[1].most_used
    reads = events(model, make_windows(), 1)
    for slot in slots:
        places = sorted({r[3:] for r in reads if r[:2] == (slot.head, slot.slot) and r[2] == 1.0})
        assert [(c.window, c.position) for c in slot.contexts] == places[:2] or len(places) < 2
    assert slots


@pytest.mark.parametrize("kind", VARIANTS)
def test_usage_against_a_count(kind):
    model, windows = midus(kind), make_windows()
    found, _, _ = measure_usage(model, windows, batch_size=4)
    reads = events(model, windows, 1)
    own_banks = kind == "full"
    count = collections.Counter((head if own_banks else 0, slot) for head, slot, *_ in reads)
    bank = found[1].bank
    assert bank.num_slots == SLOTS * (HEADS if own_banks else 1)
    assert bank.num_slots - bank.num_dead == len(count) and bank.share_used == len(count) / bank.num_slots
    shares = [c / len(reads) for c in count.values()]
    assert len(reads) == windows.num_tokens * HEADS * TOPK
    assert bank.entropy == pytest.approx(-sum(p * math.log(p) for p in shares))
    for head in range(HEADS):
        rows = collections.Counter(slot // KEYS for h, slot, *_ in reads if h == head)
        assert found[1].row_shares[head] == pytest.approx([rows[i] / rows.total() for i in range(KEYS)])
        cols = collections.Counter(slot % KEYS for h, slot, *_ in reads if h == head)
        assert found[1].col_shares[head] == pytest.approx([cols[i] / cols.total() for i in range(KEYS)])
    lookups = collections.defaultdict(list)
    for head, _, weight, *place in reads:
        lookups[(head, *place)].append(weight)
    tops = [max(w) / sum(w) for w in lookups.values() if sum(w) > 0]
    assert found[1].top1_mass == pytest.approx(sum(tops) / len(tops), rel=1e-4)
    assert found[1].silent_lookups == pytest.approx(1 - len(tops) / len(lookups))
    overlap = found[1].overlap
    if own_banks:
        assert overlap is None
        return
    heads = [collections.Counter(slot for h, slot, *_ in reads if h == head) for head in range(HEADS)]
    total = heads[0].total()
    for a in range(HEADS):
        assert overlap[a] == pytest.approx([(heads[a] & heads[b]).total() / total for b in range(HEADS)])


def test_loudness():
    model, windows = midus(), make_windows()
    hidden, written = [], []
    layer = model.model.layers[3]
    handles = [
        layer.register_forward_pre_hook(lambda _, given: hidden.append(given[0])),
        layer.register_forward_hook(lambda *call: written.append(call[-1])),
    ]
    with torch.no_grad():
        model(input_ids=windows.inputs, use_cache=False)
    for handle in handles:
        handle.remove()
    ratios = ((written[0] - hidden[0]).norm(dim=-1) / hidden[0].norm(dim=-1)).flatten()
    found = measure_usage(model, windows, batch_size=6)[0][3]
    assert found.relative_norm == pytest.approx(ratios.mean().item(), rel=1e-4)
    assert found.relative_norm_5 == pytest.approx(ratios.quantile(0.05, interpolation="nearest").item(), rel=1e-3)
    norms = memories(model)[3].value_bank.norm(dim=-1)
    assert found.max_value_norm == pytest.approx(norms.max().item()) and not found.values_are_zero
    assert found.value_norm == pytest.approx(norms.mean().item())


def test_distributions_known_in_closed_form():
    even, single = distribution(torch.full((8,), 3)), distribution(torch.tensor([0, 5, 0, 0]))
    assert even.effective_slots == pytest.approx(8) and even.kl_to_uniform == pytest.approx(0, abs=1e-12)
    assert single.effective_slots == pytest.approx(1) and single.num_dead == 3
    assert single.share_used_if_uniform == pytest.approx(1 - 0.75**5)
    assert distribution(torch.zeros(4, dtype=torch.int64)).entropy is None
    curve = concentration(torch.tensor([1, 0, 6, 3]))
    assert curve[0] == (0.25, 0.6) and (0.5, 0.9) in curve and curve[-1] == (1.0, 1.0)
    assert VOCAB < 75  # Letters: a letter each
