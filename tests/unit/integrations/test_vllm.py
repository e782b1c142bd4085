"""The plugin of vLLM against a small fake of vLLM: its registry, and its engine's way to build, fill and call a model."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn

from megatron_midus.hf import MidusConfig, MidusForCausalLM
from megatron_midus.integrations import vllm as plugin

ROOT = Path(__file__).parents[3]
VOCAB, BLOCKS = 61, ["transformer", "memory", "transformer", "transformer", "memory", "transformer"]
SETTINGS = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 14,  # not hidden size / heads
    "max_position_embeddings": 64,
    "rope_theta": 5000.0,
    "block_types": BLOCKS,
    "memory_num_keys": 11,
    "memory_topk": 5,
    "memory_latent_size": 7,
    "qk_norm": True,
    "attention_bias": True,
}


# -- registration ----------------------------------------------------------------------------------------------------
class FakeRegistry:
    """What the plugin may use of ``vllm.ModelRegistry``."""

    def __init__(self, known=()):
        self.models = dict.fromkeys(known, "vllm's own")

    def get_supported_archs(self):
        return self.models.keys()

    def register_model(self, architecture, model):
        module, _, name = model.partition(":")
        assert module and name, "vLLM wants module:class"
        self.models[architecture] = model


@pytest.fixture
def registry(monkeypatch):
    fake = FakeRegistry()
    monkeypatch.setitem(sys.modules, "vllm", types.SimpleNamespace(ModelRegistry=fake))
    return fake


def test_registers_once_and_with_transformers_too(registry):
    from transformers import AutoConfig

    for _ in range(2):
        plugin.register()
    assert registry.models == {"MidusForCausalLM": "vllm.model_executor.models.transformers:TransformersForCausalLM"}
    assert type(AutoConfig.for_model("midus")) is MidusConfig


def test_leaves_an_architecture_alone_that_vllm_knows(monkeypatch):
    fake = FakeRegistry(["MidusForCausalLM"])
    monkeypatch.setitem(sys.modules, "vllm", types.SimpleNamespace(ModelRegistry=fake))
    plugin.register()
    assert fake.models == {"MidusForCausalLM": "vllm's own"}


def test_the_module_needs_no_vllm():
    program = (
        "import sys; from megatron_midus.integrations.vllm import register; assert 'torch' not in sys.modules\n"
        "try: register()\nexcept ImportError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "No module named 'vllm'"


def test_setup_names_the_entry_point(monkeypatch):
    from setuptools import distutils

    monkeypatch.chdir(ROOT)
    points = distutils.core.run_setup("setup.py", stop_after="init").entry_points
    (point,) = points["vllm.general_plugins"]
    name, _, target = point.partition(" = ")
    module, _, function = target.partition(":")
    assert name == "midus" and getattr(sys.modules[module], function) is plugin.register


# -- the engine ------------------------------------------------------------------------------------------------------
class FakeAttention:
    """One slot of the KV cache; tokens of several sequences come packed, each with its own past."""

    def __init__(self, engine):
        self.engine, self.scale = engine, None
        self.past = {}  # sequence -> (key, value), [tokens, heads, head_dim]

    def forward(self, query, key, value):
        """``[T, heads * head_dim]`` each; two dimensions in, two out."""
        config, pieces, start = self.engine.config, [], 0
        query = query.view(len(query), config.num_attention_heads, -1)
        key, value = (x.view(len(x), config.num_key_value_heads, -1) for x in (key, value))
        for sequence, length in self.engine.packed:
            span = slice(start, start + length)
            start += length
            old = self.past.get(sequence, (key[:0], value[:0]))
            k, v = (torch.cat([past, new[span]]) for past, new in zip(old, (key, value)))
            self.past[sequence] = (k, v)
            groups = config.num_attention_heads // config.num_key_value_heads
            q, k, v = (x.transpose(0, 1) for x in (query[span], k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)))  # fmt: skip
            mask = torch.ones(length, k.shape[1], dtype=torch.bool).tril(k.shape[1] - length)
            out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale)
            pieces.append(out.transpose(0, 1).reshape(length, -1))
        return torch.cat(pieces)


def fake_vllm_attention(module, query, key, value, attention_mask, scaling=None, attention_instances=None, **kwargs):
    """``[1, heads, T, head_dim]`` each -> ``[T, heads * head_dim]``."""
    assert attention_mask is None or attention_mask.shape[-1] == query.shape[-2]
    attention = attention_instances[module.layer_idx]
    attention.scale = scaling
    query, key, value = (x.transpose(1, 2).reshape(query.shape[-2], -1) for x in (query, key, value))
    return attention.forward(query, key, value), None


@contextlib.contextmanager
def parameters_on_meta(monkeypatch):
    """Parameters become meta tensors as they are registered; everything else stays where it was made."""
    register = nn.Module.register_parameter

    def on_meta(module, name, parameter):
        if parameter is not None:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=False)
        register(module, name, parameter)

    with monkeypatch.context() as patch:
        patch.setattr(nn.Module, "register_parameter", on_meta)
        yield


class PlainLinear(nn.Module):
    """Stands in for vLLM's linear layers: another class than nn.Linear, its weights filled by the engine."""

    def __init__(self, linear):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x):
        return nn.functional.linear(x, self.weight, self.bias)


class MissingLayer(nn.Module):
    """A layer of another pipeline stage hands its first argument on."""

    def forward(self, *args, **kwargs):
        return args[0] if args else next(iter(kwargs.values()))


class FakeEngine:
    """Builds the decoder by AutoModel, replaces its linear layers, fills its parameters by name, packs sequences."""

    def __init__(self, config, weights, monkeypatch, stage=0, stages=1):
        from transformers import AutoModel
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        ALL_ATTENTION_FUNCTIONS["vllm"] = fake_vllm_attention
        config._attn_implementation = "vllm"
        with torch.device("meta"):  # how vLLM looks for the class of the decoder
            assert type(AutoModel.from_config(config).get_decoder()).__name__ == "MidusModel"
        with parameters_on_meta(monkeypatch):
            self.model = AutoModel.from_config(config)
        self.config, self.packed = config, []
        self.pipeline_parallel(stage, stages)
        self.replace(self.model)
        state = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
        for name, parameter in list(self.model.named_parameters()):
            assert parameter.device.type == "meta"
            module, _, attribute = name.rpartition(".")
            setattr(self.model.get_submodule(module), attribute, nn.Parameter(state[name], requires_grad=False))
        start, stop = (config.num_hidden_layers * s // stages for s in (stage, stage + 1))
        self.instances = {index: FakeAttention(self) for index in range(start, stop)}
        self.head = weights["lm_head.weight"]

    def pipeline_parallel(self, stage, stages):
        if stages == 1:
            return
        assert self.model.supports_pp_plan
        names = list(self.model._pp_plan)
        (layers,) = (name for name in names if isinstance(getattr(self.model, name), nn.ModuleList))
        before, after = names[: names.index(layers)], names[names.index(layers) + 1 :]
        for name in (before if stage else []) + (after if stage < stages - 1 else []):
            setattr(self.model, name, MissingLayer())
        start, stop = (self.config.num_hidden_layers * s // stages for s in (stage, stage + 1))
        for index in range(self.config.num_hidden_layers):
            if not start <= index < stop:
                getattr(self.model, layers)[index] = MissingLayer()

    def replace(self, module):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, PlainLinear(child))
            else:
                self.replace(child)

    @torch.no_grad()
    def hidden(self, packed, positions, ids=None, embeddings=None):
        """``packed``: (sequence, tokens) in order; ``ids``, ``positions`` ``[T]``. -> ``[T, d]``."""
        self.packed = packed
        return self.model(
            input_ids=None if ids is None else ids[None],
            inputs_embeds=None if embeddings is None else embeddings[None],
            use_cache=False,
            position_ids=positions[None],
            attention_instances=self.instances,
            return_dict=False,
        )[0][0, ...]


@pytest.fixture
def midus(registry):
    plugin.register()
    model = MidusForCausalLM(MidusConfig(**SETTINGS))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.3 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale + name.endswith("norm.weight"))
    return model.eval()


def prompts():
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(VOCAB, (length,), generator=generator) for length in (9, 1, 5)]


def test_continuous_batching_generates_what_transformers_generates(midus, monkeypatch):
    """Sequences of unequal length, packed; the second prompt joins while the others already decode."""
    expected = [
        midus.generate(p[None], max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)[0].tolist()
        for p in prompts()
    ]
    engine = FakeEngine(MidusConfig(**SETTINGS), midus.state_dict(), monkeypatch)
    assert sorted(engine.instances) == list(range(6))  # one slot per block, Memory blocks too
    done = [prompt.tolist() for prompt in prompts()]
    seen = [0, 0, 0]
    for step in range(8):
        running = [s for s in range(3) if (s != 1 or step >= 2) and len(done[s]) < len(expected[s])]
        if not running:
            break
        packed = [(s, len(done[s]) - seen[s]) for s in running]
        ids = torch.cat([torch.tensor(done[s][seen[s] :]) for s in running])
        positions = torch.cat([torch.arange(seen[s], len(done[s])) for s in running])
        logits = engine.hidden(packed, positions, ids) @ engine.head.T
        ends = torch.tensor([length for _, length in packed]).cumsum(0) - 1
        for s, token in zip(running, logits[ends].argmax(-1).tolist()):
            seen[s] = len(done[s])
            done[s].append(token)
    assert done == expected
    assert len({token for row in expected for token in row}) > 6  # it says something


def test_two_pipeline_stages(midus, monkeypatch):
    """The first stage has no norm, the second no embedding; hidden states go from one to the other."""
    weights, (prompt, *_) = midus.state_dict(), prompts()
    packed, positions = [(0, len(prompt))], torch.arange(len(prompt))
    whole = FakeEngine(MidusConfig(**SETTINGS), weights, monkeypatch).hidden(packed, positions, prompt)
    stages = [FakeEngine(MidusConfig(**SETTINGS), weights, monkeypatch, stage, 2) for stage in range(2)]
    assert [sorted(stage.instances) for stage in stages] == [[0, 1, 2], [3, 4, 5]]
    between = stages[0].hidden(packed, positions, prompt)
    assert torch.equal(stages[1].hidden(packed, positions, embeddings=between), whole)
    with torch.no_grad():
        # The same sums; transformers' attention adds a mask where the fake selects. fp32, values of order 1 to 10.
        torch.testing.assert_close(whole, midus.model(prompt[None]).last_hidden_state[0], rtol=1e-4, atol=1e-4)


def test_what_vllm_asks_of_the_class_and_its_configuration(midus):
    assert midus.model._supports_attention_backend
    assert all(module.is_causal for module in midus.modules() if hasattr(module, "is_causal"))
    config = midus.config
    assert config.get_text_config() is config and config.head_dim == 14
    assert config.auto_map["AutoModel"] == "modeling_midus.MidusModel"
    # vLLM would read a window per layer from it; the blocks' kinds are in block_types.
    assert not hasattr(config, "layer_types")
    # Nothing of a Memory block is split by the plan: its memory needs the output of all heads.
    assert not any("mem_attn" in pattern or "memory" in pattern for pattern in config.base_model_tp_plan)
