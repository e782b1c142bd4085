"""What is timed: one prompt, then single tokens on a growing cache, the models in turns. No figure is asserted."""

import pytest
import torch
from tiny_models import make_model

from megatron_midus.evaluation.latency import measure_latency


def test_prompt_once_then_single_tokens_in_turns():
    models, calls = [make_model("llama"), make_model("qwen3")], []
    for index, model in enumerate(models):
        model.register_forward_pre_hook(
            lambda module, args, kwargs, index=index: calls.append(
                (index, tuple(kwargs["input_ids"].shape), kwargs["past_key_values"].get_seq_length())
            ),
            with_kwargs=True,
        )
    found = measure_latency(models, batch_size=3, prompt_length=7, new_tokens=2, repetitions=2)
    once = lambda index: [(index, (3, 7), 0), (index, (3, 1), 7), (index, (3, 1), 8)]  # noqa: E731
    assert calls == (once(0) + once(1)) * 3  # one warm-up
    assert all(latency.prefill_ms > 0 and latency.decode_ms > 0 for latency in found)


@pytest.mark.parametrize("name", ["batch_size", "prompt_length", "new_tokens", "repetitions"])
def test_sizes(name):
    with pytest.raises(ValueError, match=f"{name}=0 must be at least 1"):
        measure_latency([torch.nn.Linear(1, 1)], **{name: 0})
    with pytest.raises(ValueError, match="models=0"):
        measure_latency([])
