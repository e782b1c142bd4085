"""A base of random tensors, never a model of transformers, and what policies make of it."""

import torch
from tiny_models import DictSource

from megatron_midus.config import MemoryConfig, ModelConfig
from megatron_midus.upscaling import make_plan
from megatron_midus.upscaling.initialize import UpscaledTensors
from megatron_midus.upscaling.tensors import model_shapes

MODEL = ModelConfig(
    num_layers=5,
    hidden_size=24,
    ffn_hidden_size=40,
    num_attention_heads=6,
    num_query_groups=2,
    kv_channels=10,
    vocab_size=37,
    max_position_embeddings=64,
    add_qkv_bias=True,
    qk_layernorm=True,
)
MEMORY = MemoryConfig(
    memory_num_keys=7,
    memory_topk=3,
    memory_latent_size=5,
    memory_query_norm="rms",
    memory_output_projection="linear",
    memory_attention="full",
)


def random_base(model=MODEL, dtype=torch.float32):
    generator = torch.Generator().manual_seed(4)
    shapes = model_shapes(model, make_plan("none", num_layers=model.num_layers))
    return DictSource({name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()})


def upscaled(policy, *, base=None, dtype="keep", calibrated=None, **plan):
    memory = plan.pop("memory", MEMORY)
    plan = make_plan(policy, num_layers=5, memory=memory, **plan)
    base = base or random_base()
    source = UpscaledTensors(base, MODEL, plan, dtype=dtype, calibrated=calibrated)
    return base.tensors, plan, {name: source.read(name) for name in source.names()}
