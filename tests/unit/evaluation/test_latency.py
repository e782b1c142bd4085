"""Latency and memory: what is run and counted; no time is asserted but for ratios of a model to itself."""

import pytest
import torch
from llama_of_bytes import make_llama

from megatron_midus.evaluation import latency
from megatron_midus.evaluation.latency import measure_latency, weight_bytes


def test_figures(monkeypatch):
    """With a clock that only the models turn: 1 s a token read, and 10 s more for the second model's calls."""
    now = [0.0]
    models = [make_llama(), make_llama(num_hidden_layers=3)]
    calls = []
    for index, model in enumerate(models):

        def tick(module, args, kwargs, output, index=index):
            calls.append((index, tuple(kwargs["input_ids"].shape)))
            now[0] += kwargs["input_ids"].shape[1] + 10 * index

        model.register_forward_hook(tick, with_kwargs=True)
    monkeypatch.setattr(latency.time, "perf_counter", lambda: now[0])
    first, second = measure_latency(models, prompt_tokens=7, decode_tokens=3, batch_size=2, rounds=5)
    assert (first.prefill_seconds, first.decode_seconds) == (7.0, 1.0)
    assert (second.prefill_seconds, second.decode_seconds) == (17.0, 11.0)
    assert first.prefill_ratio == 1.0 and second.prefill_ratio == 17 / 7 and second.decode_ratio == 11.0
    # In turns: a prefill and three steps of one model, then of the other.
    assert calls[:8] == [(m, shape) for m in (0, 1) for shape in [(2, 7)] + [(2, 1)] * 3]
    assert len(calls) == 2 * 4 * (5 + 1) + 2 * 4


def test_memory_is_counted():
    model = make_llama()  # fp32, 2 layers, 1 key/value head of 8 channels
    (figures,) = measure_latency([model], prompt_tokens=5, decode_tokens=2, batch_size=3, rounds=1)
    assert figures.cache_bytes_per_token == 2 * 2 * 8 * 4
    assert figures.weight_bytes == weight_bytes(model) >= 4 * sum(p.numel() for p in model.parameters())
    assert figures.peak_bytes is None or torch.cuda.is_available()


def test_tied_weights_count_once():
    untied, tied = make_llama(), make_llama(tie_word_embeddings=True)
    assert weight_bytes(untied) - weight_bytes(tied) == 4 * 263 * 24


def test_decoding_continues_the_prompt():
    """The cache and the positions of the steps: the logits equal those of the whole sequence."""
    model, tokens = make_llama(), torch.randint(256, (1, 9), generator=torch.Generator().manual_seed(1))
    seen = []
    with torch.inference_mode():
        output = model(input_ids=tokens, use_cache=True)
        handle = model.register_forward_hook(lambda m, a, k, out: seen.append((k["input_ids"], out.logits)), with_kwargs=True)  # fmt: skip
        latency._decode(model, output, 9, 3)
        handle.remove()
        whole = model(input_ids=torch.cat([tokens, *(ids for ids, _ in seen)], 1)).logits
    for step, (_, logits) in enumerate(seen):
        # float32, summed in another order.
        assert torch.allclose(logits[:, -1], whole[:, 9 + step], atol=1e-4)


@pytest.mark.parametrize("name", ["prompt_tokens", "decode_tokens", "batch_size", "rounds"])
def test_settings_out_of_range(name):
    with pytest.raises(ValueError, match=f"latency {name}=0 must be at least 1"):
        measure_latency([make_llama()], **{name: 0})
