"""config.json files of transformers 4 and 5 become the right ModelConfig and come back; the rest is refused by name."""

import pytest
import transformers
from tiny_models import FEATURED, LLAMA3_ROPE, make_model

from megatron_midus.config import MemoryConfig
from megatron_midus.conversion.families import FAMILIES, check_model, check_plan, from_hf_config, to_hf_config
from megatron_midus.upscaling import make_plan

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 263,
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 128,
    "torch_dtype": "bfloat16",
}
MEMORY = MemoryConfig(memory_num_keys=16, memory_query_norm="rms")
PLAN = make_plan("interleave", num_layers=5, num_blocks=2, memory=MEMORY)


@pytest.mark.parametrize("family", ["llama", "llama3", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_reads_what_transformers_writes(tmp_path, family, tied):
    import json

    model = make_model(family, tie_word_embeddings=tied)
    model.save_pretrained(str(tmp_path))
    read = from_hf_config(json.loads((tmp_path / "config.json").read_text()))
    config = model.config
    assert (read.num_layers, read.hidden_size, read.ffn_hidden_size, read.vocab_size) == (5, 48, 88, 263)
    assert (read.num_attention_heads, read.num_query_groups) == (6, 2)
    assert read.kv_channels == (12 if family == "qwen3" else 8)
    assert read.norm_epsilon == config.rms_norm_eps and read.max_position_embeddings == 128
    assert read.rotary_base == 5000.0 and read.tie_word_embeddings is tied
    assert read.add_qkv_bias is (family == "qwen2") and read.qk_layernorm is (family == "qwen3")
    assert read.sliding_window == (9 if family == "mistral" else None)
    assert (read.rope_scaling or {}).get("factor") == (8.0 if family == "llama3" else None)
    assert read.hf_dtype == "float32" and read.family == family.removesuffix("3" if family == "llama3" else "")


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 5000.0},
        {"rope_theta": 5000.0, "rope_scaling": None},
        {"rope_parameters": {"rope_theta": 5000.0, "rope_type": "default"}},
        {"rope_parameters": None, "rope_theta": 5000},
    ],
)
def test_plain_rope_of_both_generations(rope):
    model = from_hf_config({**LLAMA, **rope})
    assert model.rotary_base == 5000.0 and model.rope_scaling is None


@pytest.mark.parametrize("kind_key", ["rope_type", "type"])
def test_scaled_rope_of_both_generations(kind_key):
    scaling = {k: v for k, v in LLAMA3_ROPE.items() if k not in ("rope_theta", "rope_type")} | {kind_key: "llama3"}
    old = from_hf_config({**LLAMA, "rope_theta": 5000.0, "rope_scaling": scaling})
    new = from_hf_config({**LLAMA, "rope_parameters": {**scaling, "rope_theta": 5000.0}})
    assert old.rotary_base == new.rotary_base == 5000.0
    assert old.rope_scaling == new.rope_scaling == {k: v for k, v in LLAMA3_ROPE.items() if k != "rope_theta"}


def test_what_old_and_short_configs_leave_out():
    model = from_hf_config({k: v for k, v in LLAMA.items() if k not in ("num_key_value_heads", "rms_norm_eps")})
    assert model.num_query_groups == 6 and model.norm_epsilon == 1e-6
    assert model.rotary_base == 10000.0 and not model.tie_word_embeddings
    assert from_hf_config({**LLAMA, "head_dim": None}).kv_channels == 8
    assert from_hf_config({**LLAMA, "num_key_value_heads": None}).num_query_groups == 6
    assert from_hf_config({k: v for k, v in LLAMA.items() if k != "architectures"}).family == "llama"


def test_defaults_are_those_of_transformers():
    """What a config.json leaves out is filled in as transformers fills it in."""
    for family in FAMILIES.values():
        if family.name == "midus":
            continue
        theirs = transformers.AutoConfig.for_model(family.name)
        for name, value in family.defaults.items():
            theirs_value = theirs.rope_parameters[name] if name == "rope_theta" else getattr(theirs, name)
            assert theirs_value == value, (family.name, name)


# What the config.json of the named models say where they differ from each other.
RELEASED = {
    "Llama-2-7b": ({"architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000, "max_position_embeddings": 4096, "rms_norm_eps": 1e-05, "rope_scaling": None, "tie_word_embeddings": False, "pretraining_tp": 1, "hidden_act": "silu", "torch_dtype": "float16"},
                   {"num_query_groups": 32, "kv_channels": 128, "rotary_base": 10000.0, "rope_scaling": None, "hf_dtype": "float16"}),
    "Llama-3-8B": ({"architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 500000.0, "tie_word_embeddings": False, "attention_bias": False, "hidden_act": "silu", "torch_dtype": "bfloat16"},
                   {"num_query_groups": 8, "rotary_base": 500000.0, "rope_scaling": None}),
    "Llama-3.2-1B": ({"architectures": ["LlamaForCausalLM"], "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256, "max_position_embeddings": 131072, "rms_norm_eps": 1e-05, "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192, "rope_type": "llama3"}, "rope_theta": 500000.0, "tie_word_embeddings": True, "mlp_bias": False, "torch_dtype": "bfloat16"},
                     {"kv_channels": 64, "tie_word_embeddings": True, "rotary_base": 500000.0}),
    "Mistral-7B-v0.1": ({"architectures": ["MistralForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000, "max_position_embeddings": 32768, "rms_norm_eps": 1e-05, "sliding_window": 4096, "rope_theta": 10000.0, "tie_word_embeddings": False},
                        {"sliding_window": 4096, "num_query_groups": 8}),
    "Mistral-7B-v0.3": ({"architectures": ["MistralForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32768, "max_position_embeddings": 32768, "rms_norm_eps": 1e-05, "sliding_window": None, "rope_theta": 1000000.0},
                        {"sliding_window": None, "rotary_base": 1000000.0}),
    "Qwen2.5-0.5B": ({"architectures": ["Qwen2ForCausalLM"], "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936, "max_position_embeddings": 32768, "rms_norm_eps": 1e-06, "max_window_layers": 24, "sliding_window": 32768, "use_sliding_window": False, "use_mrope": False, "rope_theta": 1000000.0, "tie_word_embeddings": True},
                     {"add_qkv_bias": True, "sliding_window": None, "kv_channels": 64, "tie_word_embeddings": True}),
    "Qwen3-0.6B": ({"architectures": ["Qwen3ForCausalLM"], "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 40960, "rms_norm_eps": 1e-06, "max_window_layers": 28, "sliding_window": None, "use_sliding_window": False, "rope_theta": 1000000, "tie_word_embeddings": True, "attention_bias": False},
                   {"qk_layernorm": True, "kv_channels": 128, "rotary_base": 1000000.0}),
    "Qwen3-30B-A3B": ({"architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 40960, "rms_norm_eps": 1e-06, "max_window_layers": 48, "sliding_window": None, "use_sliding_window": False, "rope_theta": 1000000.0, "rope_scaling": None, "tie_word_embeddings": False, "attention_bias": False, "decoder_sparse_step": 1, "mlp_only_layers": [], "moe_intermediate_size": 768, "norm_topk_prob": True, "num_experts": 128, "num_experts_per_tok": 8, "output_router_logits": False, "router_aux_loss_coef": 0.001},
                      {"qk_layernorm": True, "num_moe_experts": 128, "moe_router_topk": 8, "moe_ffn_hidden_size": 768, "ffn_hidden_size": 6144, "moe_router_pre_softmax": False, "moe_aux_loss_coeff": 0.001}),
    "Mixtral-8x7B-v0.1": ({"architectures": ["MixtralForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000, "max_position_embeddings": 32768, "rms_norm_eps": 1e-05, "sliding_window": None, "rope_theta": 1000000.0, "tie_word_embeddings": False, "num_experts_per_tok": 2, "num_local_experts": 8, "output_router_logits": False, "router_aux_loss_coef": 0.02},
                          {"qk_layernorm": False, "num_moe_experts": 8, "moe_router_topk": 2, "moe_ffn_hidden_size": 14336, "rotary_base": 1000000.0, "moe_router_pre_softmax": False, "moe_aux_loss_coeff": 0.02}),
    "Phi-4-mini": ({"architectures": ["Phi3ForCausalLM"], "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32, "num_attention_heads": 24, "num_key_value_heads": 8, "vocab_size": 200064, "max_position_embeddings": 131072, "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-05, "partial_rotary_factor": 0.75, "rope_scaling": {"long_factor": [1.5] * 48, "short_factor": [1.0] * 48, "type": "longrope"}, "rope_theta": 10000.0, "sliding_window": 262144, "tie_word_embeddings": True, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
                   {"rotary_percent": 0.75, "kv_channels": 128}),
    "SmolLM3-3B": ({"architectures": ["SmolLM3ForCausalLM"], "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 4, "vocab_size": 128256, "max_position_embeddings": 65536, "rms_norm_eps": 1e-06, "rope_theta": 5000000.0, "no_rope_layer_interval": 4, "no_rope_layers": [1, 1, 1, 0] * 9, "use_sliding_window": False, "max_window_layers": 28},
                   {"rope_layers": (True, True, True, False) * 9, "tie_word_embeddings": True}),
    "granite-3.3-2b": ({"architectures": ["GraniteForCausalLM"], "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 40, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 49159, "max_position_embeddings": 131072, "rms_norm_eps": 1e-05, "rope_theta": 10000000.0, "attention_multiplier": 0.015625, "embedding_multiplier": 12.0, "residual_multiplier": 0.22, "logits_scaling": 8.0, "tie_word_embeddings": True},
                       {"attention_scale": 0.015625, "residual_multiplier": 0.22, "logits_divisor": 8.0, "embedding_multiplier": 12.0}),
    "OLMo-2-1B": ({"architectures": ["Olmo2ForCausalLM"], "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 100352, "max_position_embeddings": 4096, "rms_norm_eps": 1e-06, "rope_theta": 500000},
                  {"norm_placement": "post", "qk_norm_width": True}),
    "Olmo-3-7B": ({"architectures": ["Olmo3ForCausalLM"], "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 100278, "max_position_embeddings": 65536, "rms_norm_eps": 1e-06, "rope_theta": 500000, "rope_scaling": {"attention_factor": 1.2079441541679836, "beta_fast": 32.0, "beta_slow": 1.0, "factor": 8.0, "original_max_position_embeddings": 8192, "rope_type": "yarn"}, "sliding_window": 4096, "layer_types": ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"] * 8},
                  {"sliding_layers": (True, True, True, False) * 8, "local_rotary_base": 500000.0, "sliding_window": 4096}),
    "gemma-2-2b": ({"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 256000, "max_position_embeddings": 8192, "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "sliding_window": 4096, "query_pre_attn_scalar": 256, "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "use_bidirectional_attention": None, "cache_implementation": "hybrid"},
                   {"sliding_layers": (True, False) * 13, "attention_scale": 0.0625, "local_rotary_base": None, "hidden_act": "gelu_tanh", "attention_softcap": 50.0, "logits_softcap": 30.0, "tie_word_embeddings": True}),
    "gemma-3-1b": ({"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "vocab_size": 262144, "max_position_embeddings": 32768, "rms_norm_eps": 1e-06, "rope_theta": 1000000, "rope_local_base_freq": 10000, "rope_scaling": None, "sliding_window": 512, "sliding_window_pattern": 6, "query_pre_attn_scalar": 256, "hidden_activation": "gelu_pytorch_tanh", "attn_logit_softcapping": None, "final_logit_softcapping": None, "cache_implementation": "hybrid"},
                   {"sliding_layers": tuple((layer + 1) % 6 != 0 for layer in range(26)), "attention_scale": 0.0625, "local_rotary_base": 10000.0, "hidden_act": "gelu_tanh"}),
    "SmolLM-135M": ({"architectures": ["LlamaForCausalLM"], "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152, "max_position_embeddings": 2048, "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "rope_scaling": None, "tie_word_embeddings": True, "attention_bias": False},
                    {"kv_channels": 64, "num_query_groups": 3, "tie_word_embeddings": True}),
}  # fmt: skip


@pytest.mark.parametrize("name", RELEASED)
def test_released_models(name):
    config, wanted = RELEASED[name]
    model = from_hf_config(config)
    assert {field: getattr(model, field) for field in wanted} == wanted
    assert (model.hidden_size, model.num_layers) == (config["hidden_size"], config["num_hidden_layers"])
    # Memory blocks fit: the output of a head is hidden_size / heads channels, whatever its size.
    plan = make_plan("interleave", num_layers=model.num_layers, num_blocks=2, memory=MEMORY)
    plan.memory.check_model(hidden_size=model.hidden_size, num_attention_heads=model.num_attention_heads, kv_channels=model.kv_channels)  # fmt: skip
    assert from_hf_config(to_hf_config(config, model, plan, dtype="bfloat16")).rotary_base == model.rotary_base


REFUSED = [
    ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel is not supported; supported are LlamaForCausalLM, Mist"),
    ({"architectures": ["GemmaForCausalLM"]}, "GemmaForCausalLM is not supported"),
    (
        {"architectures": ["GptOssForCausalLM"]},
        r"GptOssForCausalLM is not supported .attention sinks, .* are missing.; su",
    ),
    ({"architectures": [], "model_type": "gpt_oss"}, "gpt_oss is not supported .attention sinks"),
    ({"architectures": ["Gemma2ForCausalLM"], "attn_logit_softcapping": 0}, "attn_logit_softcapping=0; it must be"),
    ({"architectures": ["Gemma2ForCausalLM"], "final_logit_softcapping": "30"}, "final_logit_softcapping='30'"),
    ({"architectures": ["Gemma2ForCausalLM"], "use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
    ({"architectures": ["Qwen3MoeForCausalLM"], "mlp_only_layers": [0]}, "mlp_only_layers=.0. is not supported"),
    ({"architectures": ["Qwen3MoeForCausalLM"], "decoder_sparse_step": 2}, "decoder_sparse_step=2 is not supported"),
    ({"architectures": ["MixtralForCausalLM"], "num_local_experts": 4, "num_experts_per_tok": 5}, "moe_router_topk=5"),
    ({"architectures": ["MixtralForCausalLM"], "num_local_experts": "8"}, "num_local_experts='8'"),
    ({"architectures": ["Phi3ForCausalLM"], "resid_pdrop": 0.1}, "resid_pdrop=0.1"),
    (
        {
            "architectures": ["Phi3ForCausalLM"],
            "partial_rotary_factor": 0.75,
            "rope_scaling": {"type": "su", "short_factor": [1.0] * 4, "long_factor": [1.0] * 3},
        },
        "short_factor of the rope scaling has 4 entries; 6 channels",
    ),
    ({"architectures": ["Qwen2ForCausalLM"], "layer_types": ["sliding_attention"] * 5}, "sliding_attention"),
    (
        {"architectures": ["Qwen3ForCausalLM"], "layer_types": ["full_attention", "sliding_attention"]},
        "full_attention, sliding_attention",
    ),
    ({"architectures": None, "model_type": "opt"}, "opt is not supported"),
    ({"architectures": [], "model_type": None}, "none named"),
    ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
    ({"architectures": ["Gemma3ForCausalLM"], "attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0"),
    ({"architectures": ["Gemma3ForCausalLM"], "hidden_activation": "relu"}, "hidden_act=relu"),
    ({"architectures": ["Olmo3ForCausalLM"], "layer_types": ["chunked_attention"] * 5}, "chunked_attention"),
    (
        {"architectures": ["Olmo3ForCausalLM"], "layer_types": ["sliding_attention", "full_attention"]},
        "sliding_layers names 2",
    ),
    (
        {"architectures": ["Gemma3ForCausalLM"], "rope_parameters": {"sliding_attention": {"rope_type": "linear"}}},
        "of sliding layers",
    ),
    ({"architectures": ["SmolLM3ForCausalLM"], "use_sliding_window": True}, "use_sliding_window=True"),
    ({"hidden_act": "gelu"}, "hidden_act=gelu"),
    ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "rope scaling 'longrope' has no short_factor"),
    ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor='2'"),
    ({"rope_scaling": {"type": "dynamic", "factor": True}}, "factor=True"),
    ({"rope_scaling": {**LLAMA3_ROPE, "low_freq_factor": 4.0}}, "low_freq_factor=4.0"),
    ({"rope_scaling": {**LLAMA3_ROPE, "high_freq_factor": None}}, "has no high_freq_factor"),
    ({"rope_scaling": {**LLAMA3_ROPE, "original_max_position_embeddings": -1}}, "original_max_position_embeddings=-1"),
    ({"rope_scaling": {**LLAMA3_ROPE, "factor": None}}, "has no factor"),
    ({"rope_scaling": {"type": "yarn", "factor": 2.0, "truncate": 1}}, "truncate=1"),
    ({"rope_scaling": {"type": "yarn", "factor": 2.0, "partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}, "head_dim": 2}, "kv_channels=2"),
    ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "differ between layer types"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ({"num_key_value_heads": 4}, "num_attention_heads=6 is not divisible by num_query_groups=4"),
    ({"num_hidden_layers": 0}, "num_hidden_layers=0, which is not a positive whole number"),
    ({"hidden_size": "48"}, "hidden_size='48'"),
    ({"vocab_size": None}, "vocab_size=None"),
    ({"head_dim": 8.0}, "head_dim=8.0"),
    ({"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True}, "use_sliding_window=True"),
    ({"architectures": ["Qwen3ForCausalLM"], "attention_bias": True}, "attention_bias=True"),
    (
        {"architectures": ["MistralForCausalLM"], "layer_types": ["full_attention", "sliding_attention"]},
        "mixes full_attention, sliding_attention",
    ),
]


@pytest.mark.parametrize("changes, message", REFUSED)
def test_refusals(changes, message):
    with pytest.raises(ValueError, match=message):
        from_hf_config({**LLAMA, **changes})


def test_missing_entry():
    with pytest.raises(ValueError, match="no entry hidden_size, vocab_size"):
        from_hf_config({k: v for k, v in LLAMA.items() if k not in ("hidden_size", "vocab_size")})


def test_plain_export_changes_what_changed_alone():
    source = {**LLAMA, "custom_entry": {"kept": [1, 2]}, "rope_theta": 5000.0, "transformers_version": "4.40.0"}
    plan = make_plan("llama_pro", num_layers=5, num_blocks=2)
    exported = to_hf_config(source, from_hf_config(source), plan, dtype="float32")
    changed = {key for key in exported if exported[key] != source.get(key)}
    assert changed == {"num_hidden_layers", "torch_dtype"} and exported["num_hidden_layers"] == 7
    assert set(exported) == set(source) and source["num_hidden_layers"] == 5


def test_plain_export_without_blocks_changes_nothing():
    source = {**LLAMA, "dtype": "bfloat16", "torch_dtype": None}
    plan = make_plan("none", num_layers=5)
    assert to_hf_config(source, from_hf_config(source), plan, dtype="bfloat16") == source


def test_layer_types_follow_the_layers():
    source = {**LLAMA, "architectures": ["Qwen3ForCausalLM"], "layer_types": ["full_attention"] * 5}
    plan = make_plan("stack", num_layers=5, num_blocks=3)
    exported = to_hf_config(source, from_hf_config(source), plan, dtype="bfloat16")
    assert exported["layer_types"] == ["full_attention"] * 8


@pytest.mark.parametrize("family", ["llama", "llama3", "mistral", "qwen2", "qwen3", *FEATURED])
def test_midus_config_round_trip(family):
    """The architecture that is read from a MIDUS config is the base's with more layers; MidusConfig agrees."""
    from megatron_midus.hf import MidusConfig

    base = make_model(family)
    source = {**base.config.to_dict(), "architectures": [type(base).__name__], "dtype": "float32"}
    model = from_hf_config(source)
    exported = to_hf_config(source, model, PLAN, dtype="float32")
    again = from_hf_config(exported)
    assert again.family == "midus" and again.num_layers == 7
    for name, value in PLAN.applied_to(model).to_dict().items():
        if name not in ("family", "num_layers", "rope_scaling"):
            assert getattr(again, name) == value, name
    assert (again.rope_scaling or {}).get("factor") == (model.rope_scaling or {}).get("factor")
    check_plan(exported, PLAN)

    config = MidusConfig(**exported)
    assert config.block_types == list(PLAN.block_types)
    assert {name: getattr(config, name) for name in MEMORY.to_dict()} == MEMORY.to_dict()
    assert config.to_dict()["auto_map"] == exported["auto_map"]
    # Nothing of ours is lost or reinterpreted by the class that will read the file.
    written = config.to_dict()
    assert {k: written[k] for k in exported if k in written and written[k] != exported[k]} == {}
    assert to_hf_config(exported, again, PLAN, dtype="float32") == exported


def midus(**changes):
    return {**to_hf_config(LLAMA, from_hf_config(LLAMA), PLAN, dtype="bfloat16"), **changes}


@pytest.mark.parametrize(
    "config, plan, message",
    [
        (LLAMA, PLAN, "num_hidden_layers=5, midus_plan.json 7"),
        ({**LLAMA, "num_hidden_layers": 7}, PLAN, "one of config.json and midus_plan.json has Memory blocks"),
        (midus(), make_plan("llama_pro", num_layers=5, num_blocks=2), "has Memory blocks"),
        (midus(block_types=["memory"] * 7), PLAN, "block_types"),
        (midus(memory_num_keys=8), PLAN, "memory_num_keys is 8 in config.json and 16"),
    ],
)
def test_plan_of_another_model(config, plan, message):
    with pytest.raises(ValueError, match=message):
        check_plan(config, plan)


def test_check_model():
    model = from_hf_config(LLAMA)
    check_model(LLAMA, model.with_layers([0] * 7), PLAN)
    check_model(midus(), model.with_layers([0] * 7), PLAN)
    with pytest.raises(ValueError, match="num_layers=5, midus_plan.json 7"):
        check_model(LLAMA, model, PLAN)
    with pytest.raises(ValueError, match="num_hidden_layers=6"):
        check_model({**LLAMA, "num_hidden_layers": 6}, model.with_layers([0] * 7), PLAN)
    with pytest.raises(ValueError, match="vocab_size is 263 in model_config.json and 999"):
        check_model({**LLAMA, "vocab_size": 999}, model.with_layers([0] * 7), PLAN)
