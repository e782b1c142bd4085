"""sdpa, eager, flash: one result. What transformers hands to each, and how much of the past a step looks at."""

import pytest
import torch
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from megatron_midus.hf import MidusConfig, MidusForCausalLM

# fp32: the same sums in another order; logits of order 1 to 10
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}
GREEDY = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None, "pad_token_id": 0}


def left_padded(tokens):
    mask = torch.ones_like(tokens)
    mask[1, :5] = mask[2, :9] = 0
    return tokens * mask, mask


def flash_like(calls):
    """An attention function under flash attention's contract: no mask or ``[B, S_kv]``, causal and window by itself."""

    def attend(module, query, key, value, attention_mask, scaling=None, dropout=0.0, sliding_window=None, **kwargs):
        assert attention_mask is None or attention_mask.dim() == 2, "flash attention takes which keys are there"
        batch, heads, length, _ = query.shape
        past = key.shape[2] - length
        calls.append((module.layer_idx, length, key.shape[2], sliding_window))
        seen = torch.ones(length, key.shape[2], dtype=torch.bool).tril(past)
        if sliding_window is not None:
            seen = seen.triu(past - sliding_window + 1)
        seen = seen.expand(batch, 1, -1, -1)
        if attention_mask is not None:
            seen = seen & attention_mask[:, None, None, :].bool()
        # A padding query sees nothing at all; its output is never read, but it must not be NaN.
        seen = seen | ~seen.any(-1, keepdim=True)
        groups = heads // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scaling)
        return out.transpose(1, 2), None

    return attend


@pytest.fixture
def flash(monkeypatch):
    """``flash(model)``: gives the model the stand-in under flash attention's own name; returns its calls."""
    calls = []

    def use(model):
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_attention_2", flash_like(calls))
        model.config._attn_implementation = "flash_attention_2"
        return calls

    return use


def logits(model, tokens, **kwargs):
    with torch.no_grad():
        return model(tokens, **kwargs).logits


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("window", [None, 4])
def test_three_interfaces_one_result(make_base, upscale, tokens, flash, padded, window):
    model = upscale(make_base(), random_values=True, sliding_window=window)
    ids, mask = left_padded(tokens) if padded else (tokens, torch.ones_like(tokens))
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    arguments = {"attention_mask": mask if padded else None, "position_ids": positions, "use_cache": False}
    found = []
    for name in ("sdpa", "eager"):
        model.set_attn_implementation(name)
        found.append(logits(model, ids, **arguments))
    calls = flash(model)
    found.append(logits(model, ids, **arguments))
    real = mask.bool()
    for other in found[1:]:
        torch.testing.assert_close(other[real], found[0][real], **TOLERANCE)
    assert calls == [(block, 13, 13, window) for block in range(5)]  # Memory blocks go through it as well
    if window:
        wide = upscale(make_base(), random_values=True)
        assert not torch.allclose(logits(wide, ids, **arguments)[real], found[0][real], **TOLERANCE)


def test_flash_generates_what_sdpa_generates(midus, tokens, flash):
    ids, mask = left_padded(tokens)
    expected = midus.generate(ids, attention_mask=mask, **GREEDY)
    calls = flash(midus)
    assert torch.equal(midus.generate(ids, attention_mask=mask, **GREEDY), expected)
    # After the prompt every step has one query and all keys before it: nothing is computed again.
    steps = [(length, past) for block, length, past, _ in calls if block == 1]
    assert steps == [(13, 13), *((1, 13 + n) for n in range(1, 8))]


def test_flash_is_accepted_by_the_class():
    assert MidusForCausalLM._supports_flash_attn and MidusForCausalLM._supports_flash_attn_2
    # Without the package transformers says so, by name; it does not fall back in silence.
    with pytest.raises(ImportError, match="[Ff]lash"):
        config = MidusConfig(
            vocab_size=9, hidden_size=8, num_attention_heads=2, num_hidden_layers=1, intermediate_size=8
        )
        MidusForCausalLM._from_config(config, attn_implementation="flash_attention_2")


def test_right_padding_changes_nothing_before_it(midus, tokens):
    mask = torch.ones_like(tokens)
    mask[:, 9:] = 0
    whole = logits(midus, tokens[:, :9])
    torch.testing.assert_close(logits(midus, tokens, attention_mask=mask)[:, :9], whole, **TOLERANCE)


def test_later_tokens_change_nothing_before_them(midus, tokens):
    changed = tokens.clone()
    changed[:, 9:] = (changed[:, 9:] + 5) % 97
    assert torch.equal(logits(midus, changed)[:, :9], logits(midus, tokens)[:, :9])
    assert not torch.equal(logits(midus, changed)[:, 9:], logits(midus, tokens)[:, 9:])


def test_a_cache_that_was_cut_back_goes_on(midus, tokens):
    """Assisted generation throws guessed tokens away."""
    cache = DynamicCache()
    logits(midus, tokens, past_key_values=cache, use_cache=True)
    cache.crop(-5)
    again = logits(midus, tokens[:, 8:], past_key_values=cache, use_cache=True)
    torch.testing.assert_close(again, logits(midus, tokens)[:, 8:], **TOLERANCE)


def test_assisted_generation(make_base, upscale, midus, tokens):
    assistant = upscale(make_base())  # the base itself: another function, so that guesses are right and wrong
    expected = midus.generate(tokens[:1], **GREEDY)
    assert torch.equal(midus.generate(tokens[:1], **GREEDY, assistant_model=assistant), expected)
    assert torch.equal(midus.generate(tokens[:1], **GREEDY, prompt_lookup_num_tokens=3), expected)


def test_generation_goes_on_from_a_cache(midus, tokens):
    expected = midus.generate(tokens, **GREEDY)
    first = midus.generate(tokens, **{**GREEDY, "max_new_tokens": 3}, return_dict_in_generate=True)
    rest = midus.generate(first.sequences, **{**GREEDY, "max_new_tokens": 5}, past_key_values=first.past_key_values)
    assert torch.equal(rest, expected)


@pytest.mark.slow
def test_compiled_decoding(make_base, upscale, tokens):
    """Through the real compiler: a step with a static cache, compiled once and used for all of them."""
    torch._dynamo.reset()
    model = upscale(make_base(num_hidden_layers=1), blocks=["transformer", "memory"], random_values=True)
    expected = model.generate(tokens, **GREEDY)
    model.generation_config.cache_implementation = "static"
    model.forward = torch.compile(model.forward, dynamic=True)
    assert torch.equal(model.generate(tokens, **GREEDY), expected)
    torch._dynamo.reset()


# -- soft-capped scores ----------------------------------------------------------------------------------------------
CAPPED = {"attn_logit_softcapping": 0.8, "final_logit_softcapping": 3.0}


def test_a_capped_model_chooses_an_attention_that_caps(make_base, upscale, tokens):
    base = make_base()
    model = upscale(base, random_values=True, **CAPPED)
    assert model.config._attn_implementation == "eager"
    capped = logits(model, tokens)
    assert capped.abs().max() <= 3.0
    plain = logits(upscale(base, random_values=True), tokens)
    assert not torch.allclose(capped, 3 * torch.tanh(plain / 3), **TOLERANCE)  # the scores count as well
    model.set_attn_implementation("flex_attention")
    torch.testing.assert_close(logits(model, tokens), capped, **TOLERANCE)


def test_a_capped_model_refuses_sdpa(make_base, upscale, tokens):
    model = upscale(make_base(), **CAPPED)
    message = r"attn_implementation='sdpa' does not bound attention scores .attn_logit_softcapping=0.8.; choose eager"
    with pytest.raises(ValueError, match=message):
        model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match=message):
        MidusForCausalLM._from_config(model.config, attn_implementation="sdpa")
    model.config._attn_implementation = "sdpa"  # nobody checks
    with pytest.raises(ValueError, match=message):
        logits(model, tokens)


@pytest.mark.parametrize("name", CAPPED)
def test_a_bound_is_a_positive_number(name):
    with pytest.raises(ValueError, match=f"{name}=0 must be a number above 0"):
        MidusConfig(**{name: 0})
