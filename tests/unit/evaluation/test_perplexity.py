"""Perplexity against a loop over single tokens, against distributions known in closed form, and its counts."""

import collections
import math
import types

import pytest
import torch

from megatron_midus.evaluation import measure_perplexity
from megatron_midus.evaluation.perplexity import limit_documents
from megatron_midus.progress import Callback

DOCUMENTS = ["The memory block reads.", "zwei größere Wörter", "", "x", "It adds to the bank of values, slot by slot."]


def brute_force(model, tokenizer, documents, *, seq_length, stride, mode, add_bos):
    """``(nats, tokens)``: every token on its own, from the definition. A prediction belongs to the first window that
    makes it; window w reads tokens ``w * stride … w * stride + seq_length - 1``."""
    streams = []
    for ids in tokenizer.encode_batch(documents):
        body = [(i, True) for i in [*ids, tokenizer.eod]]
        if add_bos:
            body = [(tokenizer.bos, False), *body]
        if mode == "document" or not streams:
            streams.append(body if add_bos else [(tokenizer.eod, False), *body])
        else:
            streams[0] += body
    nats, count = 0.0, 0
    for stream in streams:
        ids = [token for token, _ in stream]
        for position, (token, counted) in enumerate(stream):
            if not counted:
                continue
            window = next(w for w in range(len(ids)) if w * stride + seq_length >= position)
            context = torch.tensor([ids[window * stride : position]])
            with torch.no_grad():
                logits = model(input_ids=context).logits[0, -1].double()
            nats -= torch.log_softmax(logits, 0)[token].item()
            count += 1
    return nats, count


@pytest.mark.parametrize("mode", ["packed", "document"])
@pytest.mark.parametrize("add_bos", [False, True])
@pytest.mark.parametrize("seq_length, stride, batch_size", [(16, 16, 3), (7, 3, 1), (64, 64, 2), (9, 1, 8), (1, 1, 5)])
def test_against_a_loop_over_tokens(llama, byte_tokenizer, mode, add_bos, seq_length, stride, batch_size):
    settings = {"seq_length": seq_length, "stride": stride, "mode": mode, "add_bos": add_bos}
    nats, count = brute_force(llama, byte_tokenizer, DOCUMENTS, **settings)
    result = measure_perplexity(llama, byte_tokenizer, DOCUMENTS, batch_size=batch_size, **settings)
    num_bytes = sum(len(text.encode()) for text in DOCUMENTS)
    assert result.tokens == count == num_bytes + len(DOCUMENTS)
    assert (result.bytes, result.documents) == (num_bytes, len(DOCUMENTS))
    # fp32 logits of about 10: 1e-6 relative each, in other batch shapes.
    assert result.nats == pytest.approx(nats, rel=1e-5)
    assert result.loss == pytest.approx(nats / count, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(nats / count), rel=1e-4)
    assert result.bits_per_byte == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)


def test_stride_is_the_sequence_length_when_absent(llama, byte_tokenizer):
    whole, given = (measure_perplexity(llama, byte_tokenizer, DOCUMENTS, seq_length=16, stride=s) for s in (None, 16))
    assert whole.nats == given.nats and whole.tokens_read == whole.tokens
    overlapping = measure_perplexity(llama, byte_tokenizer, DOCUMENTS, seq_length=16, stride=4)
    assert overlapping.tokens == whole.tokens and overlapping.tokens_read > 3 * whole.tokens_read
    assert overlapping.nats != whole.nats


class Fixed(torch.nn.Module):
    """A model that gives the same logits everywhere."""

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.nn.Parameter(logits)

    def forward(self, input_ids, use_cache):
        return types.SimpleNamespace(logits=self.logits.expand(*input_ids.shape, -1))


def test_uniform_model_has_the_vocabulary_as_perplexity(byte_tokenizer):
    result = measure_perplexity(Fixed(torch.zeros(263)), byte_tokenizer, DOCUMENTS, seq_length=10)
    # fp32 log of 263.
    assert result.perplexity == pytest.approx(263, rel=1e-6)
    assert result.bits_per_byte == pytest.approx(math.log2(263) * result.tokens / result.bytes, rel=1e-6)


def test_unigram_model_has_the_entropy_of_the_tokens_as_loss(byte_tokenizer):
    counts = collections.Counter(token for text in DOCUMENTS for token in [*text.encode(), byte_tokenizer.eod])
    total = sum(counts.values())
    entropy = -sum(n / total * math.log(n / total) for n in counts.values())
    logits = torch.full((263,), -1e4)
    for token, n in counts.items():
        logits[token] = math.log(n)
    for mode in ("packed", "document"):
        result = measure_perplexity(Fixed(logits), byte_tokenizer, DOCUMENTS, seq_length=5, mode=mode)
        assert result.loss == pytest.approx(entropy, rel=1e-6)  # fp32 log-softmax


def test_progress_counts_the_tokens_read(llama, byte_tokenizer):
    seen = []
    progress = Callback(lambda title, done, total: seen.append((title, done, total)))
    result = measure_perplexity(
        llama, byte_tokenizer, DOCUMENTS, seq_length=8, batch_size=2, progress=progress, title="text"
    )
    assert seen[-1] == ("text", result.tokens_read, result.tokens_read) and len(seen) > 3
    assert result.seconds > 0 and result.tokens_per_second == result.tokens_read / result.seconds
    assert result.to_dict()["perplexity"] == result.perplexity


def test_half_precision_losses_are_taken_in_fp32(byte_tokenizer):
    from llama_of_bytes import make_llama

    model = make_llama(seed=4)
    full = measure_perplexity(model, byte_tokenizer, DOCUMENTS, seq_length=16)
    half = measure_perplexity(model.to(torch.bfloat16), byte_tokenizer, DOCUMENTS, seq_length=16)
    # bf16 has 8 bits: a few per cent on logits that spread over several nats.
    assert half.loss == pytest.approx(full.loss, rel=0.05) and half.loss != full.loss


def test_weights_that_are_not_finite(byte_tokenizer):
    with pytest.raises(ValueError, match="the loss is not finite"):
        measure_perplexity(Fixed(torch.full((263,), math.nan)), byte_tokenizer, DOCUMENTS, seq_length=8)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"seq_length": 0}, "seq_length=0"),
        ({"stride": 0}, "stride=0 is out of range; choose 1 to seq_length=8"),
        ({"stride": 9}, "stride=9 is out of range"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"mode": "sliding"}, "choose packed or document"),
        ({"documents": []}, "no document"),
    ],
)
def test_wrong_settings(llama, byte_tokenizer, settings, message):
    settings = {"documents": DOCUMENTS, "seq_length": 8, **settings}
    with pytest.raises(ValueError, match=message):
        measure_perplexity(llama, byte_tokenizer, **settings)


def test_no_beginning_of_sequence(llama):
    tokenizer = types.SimpleNamespace(bos=None, eod=257, vocab_size=258)
    with pytest.raises(ValueError, match="no beginning-of-sequence"):
        measure_perplexity(llama, tokenizer, DOCUMENTS, add_bos=True)


@pytest.mark.parametrize("bound", [1, 22, 23, 24, 60, 10_000])
def test_limit_documents(byte_tokenizer, bound):
    kept = limit_documents(DOCUMENTS, byte_tokenizer, bound)
    whole = "".join(DOCUMENTS)
    assert whole.startswith("".join(kept)) and all(kept)
    # A cut at a character leaves at most the other bytes of it unused, or a piece of white space.
    assert min(bound, len(whole.encode())) - 4 <= sum(len(text.encode()) for text in kept) <= bound
    with pytest.raises(ValueError, match="max_tokens=0"):
        limit_documents(DOCUMENTS, byte_tokenizer, 0)
