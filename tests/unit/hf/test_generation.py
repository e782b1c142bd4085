"""KV cache, generate, padding, and the contract of serving engines."""

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

# fp32: the same sums as in one pass, over other blockings of the sequence; logits of order 1 to 10
CACHE_TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}
GREEDY = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": None, "pad_token_id": 0}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_steps_with_a_cache_equal_one_pass(midus, tokens, attention, kind):
    midus.set_attn_implementation(attention)
    cache = DynamicCache() if kind == "dynamic" else StaticCache(config=midus.config, max_cache_len=20)
    with torch.no_grad():
        whole = midus(tokens, use_cache=False).logits
        parts = []
        for start, stop in ((0, 5), (5, 6), (6, 7), (7, 11), (11, 13)):
            parts.append(midus(tokens[:, start:stop], past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, **CACHE_TOLERANCE)


def test_a_step_computes_only_its_own_token(midus, tokens):
    looked_up = []
    for layer in midus.model.layers:
        if hasattr(layer, "memory"):
            layer.memory.register_forward_hook(lambda module, args, out: looked_up.append(out.shape[:2].numel()))
    out = midus.generate(tokens, **{**GREEDY, "max_new_tokens": 4}, return_dict_in_generate=True)
    assert looked_up == [3 * 13] * 2 + [3] * 2 * 3  # two Memory blocks: the prompt, then three single tokens
    assert len(out.past_key_values.layers) == midus.config.num_hidden_layers
    assert all(layer.keys.shape == (3, 2, 16, 8) for layer in out.past_key_values.layers)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_greedy_generation_equals_recomputing_everything(make_base, upscale, tokens, family):
    model = upscale(make_base(family), random_values=True)
    expected = model.generate(tokens, **GREEDY, use_cache=False)
    assert torch.equal(model.generate(tokens, **GREEDY), expected)
    assert torch.equal(model.generate(tokens, **GREEDY, cache_implementation="static"), expected)
    assert len(expected.unique()) > 10  # it does say something


def test_beams_and_sampling(midus, tokens):
    beams = {**GREEDY, "num_beams": 3, "num_return_sequences": 2}
    assert torch.equal(midus.generate(tokens, **beams), midus.generate(tokens, **beams, use_cache=False))
    sampled = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        sampled.append(midus.generate(tokens, **{**GREEDY, "do_sample": True}, top_k=20, use_cache=use_cache))
    assert torch.equal(*sampled)


@pytest.mark.parametrize("cache", [None, "static"])
def test_left_padded_batch_equals_single_sequences(midus, tokens, cache):
    lengths = (13, 6, 9)
    padded, mask = torch.zeros_like(tokens), torch.zeros_like(tokens)
    for row, length in enumerate(lengths):
        padded[row, 13 - length :] = tokens[row, :length]
        mask[row, 13 - length :] = 1
    together = midus.generate(padded, attention_mask=mask, **GREEDY, cache_implementation=cache)
    for row, length in enumerate(lengths):
        alone = midus.generate(tokens[row : row + 1, :length], **GREEDY)
        assert torch.equal(together[row, 13:], alone[0, length:])


def test_embeddings_as_input_and_last_logits_only(midus, tokens):
    with torch.no_grad():
        expected = midus(tokens).logits
        embedded = midus.get_input_embeddings()(tokens)
        assert torch.equal(midus(inputs_embeds=embedded).logits, expected)
        for keep, picked in ((1, slice(-1, None)), (3, slice(-3, None)), (torch.tensor([0, 7]), [0, 7])):
            # the head multiplies fewer rows, which may be blocked otherwise
            torch.testing.assert_close(
                midus(tokens, logits_to_keep=keep).logits, expected[:, picked], rtol=1e-5, atol=1e-5
            )
        first, *_ = midus(tokens, return_dict=False)
        assert torch.equal(first, expected)
        with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
            midus(tokens, inputs_embeds=embedded)
        with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
            midus()


def test_contract_of_serving_engines(midus, tokens):
    """As vLLM calls it: packed tokens, no cache, an attention object per layer, attention output ``[T, H * D]``."""
    lengths, called = (13, 4, 9), []
    packed = torch.cat([tokens[row, :length] for row, length in enumerate(lengths)])[None]  # [1, T]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]

    def attend(module, query, key, value, attention_mask, scaling=None, attention_instances=None, **kwargs):
        assert attention_mask is None  # such engines mask by themselves
        called.append(attention_instances[module.layer_idx])
        key, value = (states.repeat_interleave(3, dim=1) for states in (key, value))
        pieces = [
            torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling)
            for q, k, v in zip(*(states.split(lengths, dim=2) for states in (query, key, value)))
        ]
        return torch.cat(pieces, dim=2)[0].transpose(0, 1).reshape(len(packed[0]), -1), None

    ALL_ATTENTION_FUNCTIONS.register("serving_engine", attend)
    with torch.no_grad():
        expected = [
            midus.model(tokens[row : row + 1, :length]).last_hidden_state[0] for row, length in enumerate(lengths)
        ]
        midus.config._attn_implementation = "serving_engine"
        instances = {index: f"slot {index}" for index in range(midus.config.num_hidden_layers)}
        hidden = midus.model(
            packed, position_ids=positions, use_cache=False, attention_instances=instances, return_dict=False
        )[0]
    assert called == list(instances.values())
    torch.testing.assert_close(hidden[0], torch.cat(expected), **CACHE_TOLERANCE)


def test_wanting_attributes_of_serving_engines(midus):
    from megatron_midus.hf import MidusModel

    assert MidusModel._supports_attention_backend
    assert midus.config.auto_map["AutoModel"] == "modeling_midus.MidusModel"
    assert not any("mem_attn" in pattern for pattern in midus.config.base_model_tp_plan)


def test_the_output_layer_is_split_as_that_of_a_llama():
    from transformers import LlamaForCausalLM

    from megatron_midus.hf import MidusForCausalLM

    assert MidusForCausalLM._tp_plan == LlamaForCausalLM._tp_plan
    assert MidusForCausalLM._pp_plan == LlamaForCausalLM._pp_plan


@pytest.mark.parametrize("first", [False, True], ids=["within", "the first block"])
@pytest.mark.parametrize("implementation", [None, "static"])
def test_blocks_without_attention_take_no_cache(make_base, upscale, tokens, implementation, first):
    blocks = ["transformer", "memory", "transformer", "memory", "transformer"]
    settings = {"memory_query": "token", "memory_attention": "none", "random_values": True}
    model = upscale(make_base(), blocks=["memory", *blocks] if first else blocks, **settings)
    plain = model.generate(tokens, use_cache=False, **GREEDY)
    cached = model.generate(tokens, cache_implementation=implementation, return_dict_in_generate=True, **GREEDY)
    assert torch.equal(cached.sequences, plain)
    kept = [layer for layer in cached.past_key_values.layers if getattr(layer, "keys", None) is not None]
    assert len(kept) == 3
