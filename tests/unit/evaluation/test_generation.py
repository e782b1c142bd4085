"""Generation: greedy is the arg max of every step, sampling follows its seed."""

import pytest
import torch

from megatron_midus.evaluation.generation import generate_text


def test_greedy_is_the_argmax_of_every_step(llama, byte_tokenizer):
    ids = list(b"the ")
    for _ in range(9):
        with torch.no_grad():
            best = int(llama(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        if best == byte_tokenizer.eod:
            break
        ids.append(best)
    text = generate_text(llama, byte_tokenizer, "the ", max_new_tokens=9)
    assert text and "the " + text == byte_tokenizer.decode(ids)


def test_sampling_is_seeded(llama, byte_tokenizer):
    def texts(**settings):
        return generate_text(llama, byte_tokenizer, "a", max_new_tokens=12, temperature=1.5, **settings)

    assert texts(seed=1) == texts(seed=1)
    assert len({texts(seed=seed) for seed in range(5)}) > 1


def test_end_of_document_ends_it(llama, byte_tokenizer):
    """The most likely token of every step is made the end of a document."""
    from llama_of_bytes import make_llama

    model = make_llama()
    with torch.no_grad():
        model.lm_head.weight[:] = 0
        model.lm_head.weight[byte_tokenizer.eod] = model.lm_head.weight.new_full((24,), 1e-6)
        hidden = model.model(input_ids=torch.tensor([list(b"ab")])).last_hidden_state[0, -1]
        model.lm_head.weight[byte_tokenizer.eod] = hidden
    assert generate_text(model, byte_tokenizer, "ab", max_new_tokens=9) == ""


def test_empty_prompt_and_wrong_settings(llama, byte_tokenizer):
    assert isinstance(generate_text(llama, byte_tokenizer, "", max_new_tokens=3), str)
    with pytest.raises(ValueError, match="max_new_tokens=0"):
        generate_text(llama, byte_tokenizer, "a", max_new_tokens=0)
    with pytest.raises(ValueError, match="temperature=-1"):
        generate_text(llama, byte_tokenizer, "a", temperature=-1)
