"""Tiny Hugging Face models of random numbers with a real tokenizer, for the tests of several packages."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

from megatron_midus.conversion.directories import write_hf_directory
from megatron_midus.conversion.families import from_hf_config
from megatron_midus.conversion.hf_io import read_hf_config
from megatron_midus.hf import CODE_FILES
from megatron_midus.upscaling import UpscalePlan
from megatron_midus.upscaling.tensors import model_shapes

# Name of the argument of from_pretrained: transformers 4 knows the old one, 5 the new one.
DTYPE = "dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype"
VOCAB = 263  # odd, and a little more than the tokenizer has
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_FAMILIES = {
    "llama": {},
    "llama2": {"num_key_value_heads": 6, "rms_norm_eps": 1e-5},
    "smollm": {"tie_word_embeddings": True, "num_key_value_heads": 2, "intermediate_size": 128},
    "llama3": {"rope_parameters": LLAMA3_ROPE},
    "mistral": {"sliding_window": 9},
    "qwen2": {},
    "qwen3": {"head_dim": 12},
    "qwen3_moe": {"head_dim": 12, "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "norm_topk_prob": True},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 40, "sliding_window": 9},
    "yarn": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 5000.0, "factor": 4.0, "beta_fast": 8}, "max_position_embeddings": 16},
    "dynamic": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 5000.0, "factor": 3.0}, "max_position_embeddings": 8},
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 3.0}},
    "llama3 short": {"rope_parameters": {**LLAMA3_ROPE, "low_freq_factor": 2.0, "original_max_position_embeddings": 16}},
    # original_max_position_embeddings below the sequences of the tests, so that the long factors count
    # 96: silu of a chunk of the fused projections has vector tails of its own otherwise
    "phi3": {"intermediate_size": 96, "rope_parameters": {"rope_type": "longrope", "rope_theta": 5000.0, "partial_rotary_factor": 0.75, "short_factor": [1.0, 1.1, 1.3], "long_factor": [1.0, 2.0, 5.0]}, "original_max_position_embeddings": 16, "sliding_window": 9, "pad_token_id": 0},
    "smollm3": {"no_rope_layers": [1, 0, 1, 1, 0], "pad_token_id": 0},
    "biased": {"attention_bias": True, "mlp_bias": True},
    "granite": {"embedding_multiplier": 3.5, "attention_multiplier": 0.21, "residual_multiplier": 0.37, "logits_scaling": 2.5, "attention_bias": True},
    "olmo2": {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    "olmo3": {"sliding_window": 6, "layer_types": [*["sliding_attention"] * 3, "full_attention", "sliding_attention"], "rope_parameters": {"full_attention": {"rope_type": "yarn", "rope_theta": 5000.0, "factor": 4.0, "original_max_position_embeddings": 16}, "sliding_attention": {"rope_type": "default", "rope_theta": 700.0}}, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    # bounds that most scores and many logits feel
    "gemma2": {"head_dim": 12, "sliding_window": 6, "query_pre_attn_scalar": 10, "attn_logit_softcapping": 1.5, "final_logit_softcapping": 4.0},
    "gemma3": {"head_dim": 12, "sliding_window": 6, "query_pre_attn_scalar": 10, "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention", "full_attention"], "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 3.0, "rope_theta": 5000.0}, "sliding_attention": {"rope_type": "default", "rope_theta": 700.0}}},
}  # fmt: skip
# Families whose blocks do not compute what a Llama's do.
FEATURED = ("phi3", "smollm3", "biased", "granite", "olmo2", "olmo3", "gemma2", "gemma3")
_CLASSES = {
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "yarn": "Qwen2",
    "qwen3": "Qwen3",
    "phi3": "Phi3",
    "qwen3_moe": "Qwen3Moe",
    "mixtral": "Mixtral",
    "smollm3": "SmolLM3",
    "granite": "Granite",
    "olmo2": "Olmo2",
    "olmo3": "Olmo3",
    "gemma2": "Gemma2",
}


class DictSource:
    """A ``TensorSource`` over a dictionary."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = tensors

    def names(self):
        return list(self.tensors)

    def shape(self, name):
        return tuple(self.tensors[name].shape)

    def dtype(self, name):
        return self.tensors[name].dtype

    def read(self, name):
        return self.tensors[name]


def randomize(model: torch.nn.Module, seed: int = 1) -> torch.nn.Module:
    """Every parameter random, norms and biases too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.3 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
            if name.endswith("norm.weight"):
                parameter.add_(1.0)
    return model


def make_model(family: str = "llama", *, seed: int = 1, **changes) -> torch.nn.Module:
    """A causal model of transformers: 5 layers, 6 heads of 8 channels in 2 groups.

    Lists with one entry per layer follow ``num_hidden_layers``.
    """
    settings = {
        "vocab_size": VOCAB,
        "hidden_size": 48,
        "intermediate_size": 88,
        "num_hidden_layers": 5,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
        **_FAMILIES[family],
        **changes,
    }
    for entry in ("layer_types", "no_rope_layers"):
        if entry in settings:
            settings[entry] = settings[entry][: settings["num_hidden_layers"]]
    name = _CLASSES.get(family, "Llama")
    if family == "gemma3":
        config, name = transformers.Gemma3TextConfig(**settings), "Gemma3"
    else:
        config = getattr(transformers, f"{name}Config")(**settings)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    return randomize(model, seed).eval()


def write_tokenizer(directory: str | Path, *, vocab_size: int = 260) -> None:
    """A byte-level BPE tokenizer with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(["a tiny text about tiny models, tokens and texts"] * 9, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    fast.save_pretrained(str(directory))


def write_base(directory: str | Path, family: str = "llama", *, dtype: torch.dtype = torch.float32, seed: int = 1, **changes) -> Path:  # fmt: skip
    """A whole Hugging Face directory: model, tokenizer, generation config, and a license to carry along."""
    directory = Path(directory)
    model = make_model(family, seed=seed, **changes).to(dtype)
    model.generation_config.update(do_sample=True, top_k=7, temperature=0.7)
    model.save_pretrained(str(directory))
    write_tokenizer(directory)
    (directory / "LICENSE").write_text("any use\n")
    (directory / "README.md").write_text("# the base's own card\n")
    return directory


def write_upscaled(directory: str | Path, base: str | Path, plan: UpscalePlan) -> Path:
    """``base`` up-scaled by ``plan``, as an export. Every tensor is random, so that no term can be wrong unnoticed, and of
    a size that keeps all blocks in play."""
    directory, model = Path(directory), from_hf_config(read_hf_config(base))
    generator = torch.Generator().manual_seed(8)
    tensors = {}
    for name, shape in model_shapes(model, plan).items():
        vector = len(shape) == 1
        scale = 0.3 if vector or ".memory." in name else shape[-1] ** -0.5
        shift = 1.0 if vector and "norm" in name else 0.0
        tensors[name] = torch.randn(shape, generator=generator) * scale + shift
    directory.mkdir()
    write_hf_directory(DictSource(tensors), directory, assets=base, model=model, plan=plan, code_files=CODE_FILES)
    return directory


def load_model(directory: str | Path, **options) -> torch.nn.Module:
    """A causal model in fp32, local code of the directory allowed."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        str(directory), **{DTYPE: torch.float32, "trust_remote_code": True, **options}
    ).eval()


def logits_of(model: torch.nn.Module, *, sequences: int = 2, length: int = 21, seed: int = 5) -> torch.Tensor:
    """``[sequences, length, VOCAB]`` on random tokens."""
    tokens = torch.randint(VOCAB, (sequences, length), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits
