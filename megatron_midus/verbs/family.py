"""``midus doctor --family``: one family of models here and in transformers, module by module, and the first that differs."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_midus.checkpoint.layout import iteration_directory
from megatron_midus.config import MemoryConfig, ModelConfig
from megatron_midus.conversion.directories import write_megatron_checkpoint
from megatron_midus.conversion.families import FAMILIES, family_of, from_hf_config, to_hf_config
from megatron_midus.conversion.families.midus import midus_config
from megatron_midus.conversion.hf_io import CONFIG_FILE, open_hf_weights, read_hf_config
from megatron_midus.conversion.megatron_logits import megatron_states
from megatron_midus.conversion.stored import StoredTensors
from megatron_midus.conversion.verify import check_loadable, load_fp32, random_tokens
from megatron_midus.errors import UserError
from megatron_midus.hub import fetched_model
from megatron_midus.upscaling import UpscalePlan
from megatron_midus.upscaling.policies import none
from megatron_midus.upscaling.tensors import model_shapes
from megatron_midus.weight_files import find_weight_files

# fp32 sums in another order, through a few layers; of the standard deviation of what transformers computes.
TOLERANCE = 1e-4
LONGEST = 48  # tokens of a sequence: longer than the windows of a small model
_LARGEST = 2**32  # bytes of weight files that are loaded; of larger ones the shape is made small
_SMALL = {"num_hidden_layers": 6, "vocab_size": 512, "num_key_value_heads": 2, "sliding_window": 16}

# {end of a module's name: what a difference there, and none before, comes from}. The first that fits.
_CAUSES = {
    "rotary_emb": "the angles: rotary_base (rope_theta and its default), rope_scaling, rotary_percent",
    "embed_tokens": "the embedding itself: the rows of the vocabulary, padding_idx",
    "layers.0:input": "what happens to the embedding: embedding_multiplier, round_embedding_multiplier",
    "q_norm": "the norm of queries and keys: qk_layernorm, qk_norm_width, norm_epsilon, zero_centered_norm",
    "k_norm": "the norm of queries and keys: qk_layernorm, qk_norm_width, norm_epsilon, zero_centered_norm",
    "layernorm": "the norm: norm_epsilon (rms_norm_eps and its default), zero_centered_norm, wide_norm, norm_placement",
    "q_proj": "add_qkv_bias, or the rules of `stored`",
    "k_proj": "add_qkv_bias, or the rules of `stored`",
    "v_proj": "add_qkv_bias, or the rules of `stored`",
    "o_proj:input": "the attention itself: rotary_base (rope_theta and its default), rope_scaling, rotary_percent, "
    "rope_layers, attention_scale, qk_layernorm, sliding_window, sliding_layers, attention_softcap",
    "o_proj": "add_output_bias",
    "gate_proj": "add_mlp_bias, or the rules of `stored`: gate and up in another order",
    "up_proj": "add_mlp_bias, or the rules of `stored`: gate and up in another order",
    "act_fn": "the activation: hidden_act",
    "down_proj:input": "the activation: hidden_act; or gate and up in another order (`stored`)",
    "down_proj": "add_mlp_bias",
    "mlp": "the MLP: hidden_act, add_mlp_bias, the order of gate and up (`stored`); of experts their router",
    "self_attn": "the attention and its output projection",
    "model.norm": "the last norm: norm_epsilon, zero_centered_norm",
    "lm_head": "tie_word_embeddings, or the tensor of the output layer",
    "logits": "what happens to the logits: logits_divisor, logits_softcap",
}
_BLOCK = "what surrounds the branches: residual_multiplier, norm_placement, the norms behind them"


@dataclasses.dataclass(frozen=True)
class Difference:
    """The first module in which two models differ.

    Attributes:
        name: in transformers, ``model.layers.3.self_attn.o_proj:input``.
        largest: absolute difference.
        sigma: standard deviation of what transformers computes there.
        equal: modules before it that agree.
        cause: what it may come from.
    """

    name: str
    largest: float
    sigma: float
    equal: int
    cause: str

    def describe(self) -> str:
        share = f"max difference {self.largest:.3e}, {self.largest / max(self.sigma, 1e-30):.1e} of sigma"
        return f"differs first at {self.name}: {share}; the {self.equal} before it agree. Look at {self.cause}"


@dataclasses.dataclass(frozen=True)
class FamilyReport:
    """What was compared with transformers.

    Attributes:
        architecture: of ``config.json``.
        weights: where they came from, in words.
        modules: compared, of the Hugging Face model and of Megatron's.
        largest: difference over sigma, of each where there is none to tell.
        differences: the first of each; ``None`` = they agree.
    """

    architecture: str
    weights: str
    modules: dict[str, int]
    largest: dict[str, float]
    differences: dict[str, Difference | None]


def check_family(directory: str, *, with_megatron: bool = True) -> FamilyReport:
    """Compares the models of a directory's family here with that of transformers.

    Args:
        directory: with ``config.json``; weights that are absent, or above 4 GiB, are random ones of a small shape.
        with_megatron: whether to run Megatron's model too, in a process of its own.

    Raises:
        UserError: a family that is not known, or tensors that its file does not explain.
    """
    directory = fetched_model(directory)
    config = read_hf_config(directory)
    family_of(config)  # names what is missing before anything is made
    with tempfile.TemporaryDirectory(prefix="midus-family-") as temporary:
        source, weights = Path(directory), "those of the directory"
        if not _has_small_weights(source):
            source = Path(temporary) / "small"
            weights = f"random, {_make_small(config, source)}"
            config = read_hf_config(source)
        model = from_hf_config(config)
        plan = none(num_layers=model.num_layers)
        shapes = model_shapes(model, plan)
        _check_tensors(config, shapes)
        tensors = open_hf_weights(source, model, shapes)
        ids = random_tokens(
            vocab_size=model.vocab_size, num_sequences=2, seq_length=min(LONGEST, model.max_position_embeddings)
        )
        theirs = module_states(load_fp32(source), ids)
        found = {"Hugging Face model": module_states(_own_model(config, model, plan, tensors), ids)}
        if with_megatron:
            root = Path(temporary) / "megatron"
            write_megatron_checkpoint(
                tensors, root, assets=source, model=model, plan=plan, make_vocab_size_divisible_by=1
            )
            found["Megatron model"] = megatron_states(iteration_directory(root, 0), ids)
    shared = {name: _shared(theirs, states) for name, states in found.items()}
    return FamilyReport(
        architecture=family_of(config).architecture,
        weights=weights,
        modules={name: len(names) for name, names in shared.items()},
        largest={name: max(_ratio(theirs[n], found[name][n])[2] for n in names) for name, names in shared.items()},
        differences={name: first_difference(theirs, states) for name, states in found.items()},
    )


def _shared(theirs: dict[str, torch.Tensor], ours: dict[str, torch.Tensor]) -> list[str]:
    """Names of what both hold, in the order in which transformers computes it."""
    return [name for name in theirs if name in ours and ours[name].numel() == theirs[name].numel()]


def _ratio(theirs: torch.Tensor, ours: torch.Tensor) -> tuple[float, float, float]:
    """Largest difference, standard deviation, and the one over the other."""
    orders = [ours.reshape(theirs.shape)]
    if ours.dim() == 4 and ours.transpose(1, 2).shape == theirs.shape:
        orders.append(ours.transpose(1, 2))  # heads before positions, or behind them
    largest = min((theirs - order).abs().max().item() for order in orders)
    sigma = theirs.std().item()
    return largest, sigma, largest / max(sigma, 1e-30)


def first_difference(theirs: dict[str, torch.Tensor], ours: dict[str, torch.Tensor]) -> Difference | None:
    """The first module in which ``ours`` is not ``theirs`` up to rounding."""
    for equal, name in enumerate(_shared(theirs, ours)):
        largest, sigma, ratio = _ratio(theirs[name], ours[name])
        if not ratio <= TOLERANCE:
            return Difference(name, largest, sigma, equal, cause_of(name))
    return None


def cause_of(name: str) -> str:
    """What a difference that begins at a module comes from."""
    for end, cause in _CAUSES.items():
        if name.endswith(end):
            return cause
    return _BLOCK


# -- the models ------------------------------------------------------------------------------------------------------
def _has_small_weights(directory: Path) -> bool:
    names = find_weight_files(directory).names
    return (
        bool(names)
        and sum((directory / name).stat().st_size for name in names if (directory / name).is_file()) <= _LARGEST
    )


def _make_small(config: dict[str, Any], directory: Path) -> str:
    """Writes a model of the same class with fewer and narrower layers and random weights; returns its size in words."""
    import transformers

    from megatron_midus.hf import register

    register()
    small = small_config(config)
    directory.mkdir()
    (directory / CONFIG_FILE).write_text(json.dumps(small))
    made = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(str(directory)))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            # Norms too: at 1 or 0 they would hide what they do.
            scale = 0.3 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5
            centre = parameter.detach().mean() if name.endswith("norm.weight") else 0.0
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale + centre)
    made.float().save_pretrained(str(directory))
    # As it came: what it leaves out is the family's to know.
    (directory / CONFIG_FILE).write_text(json.dumps(small))
    return f"{small['num_hidden_layers']} layers of {small['hidden_size']} channels"


def small_config(config: dict[str, Any]) -> dict[str, Any]:
    """``config`` with at most 6 layers, 4 heads and 512 tokens; heads keep their channels, so a rope scaling stays as it is."""
    small = {name: value for name, value in config.items() if name not in ("quantization_config", "auto_map")}
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    groups = config.get("num_key_value_heads") or heads
    channels = config.get("head_dim") or config["hidden_size"] // heads
    for name, largest in _SMALL.items():
        if config.get(name):
            small[name] = min(config[name], largest)
    small["num_attention_heads"] = min(groups, 2) * min(heads // groups, 2)
    small["hidden_size"] = small["num_attention_heads"] * channels
    small["intermediate_size"] = min(config["intermediate_size"], 2 * small["hidden_size"] + 8)
    if config.get("num_key_value_heads"):
        small["num_key_value_heads"] = min(groups, 2)
    for name, value in config.items():
        if isinstance(value, list) and len(value) == layers:
            small[name] = value[: small["num_hidden_layers"]]
        if name.endswith("token_id"):
            first = value[0] if isinstance(value, list) else value
            small[name] = None if first is None else min(first, small["vocab_size"] - 1)
    return {**small, "torch_dtype": "float32"}


def _check_tensors(config: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> None:
    """Raises ``UserError`` for a tensor that one side has and the other has not."""
    try:
        check_loadable(config, shapes)
    except UserError as error:
        raise UserError(f"the family's file describes other tensors than transformers: {error}") from None


def _own_model(config: dict[str, Any], model: ModelConfig, plan: UpscalePlan, tensors: Any) -> Any:
    """The Hugging Face model of this package with the tensors, without Memory blocks."""
    from megatron_midus.hf import MidusConfig, MidusForCausalLM

    plain = dataclasses.replace(plan, memory=MemoryConfig())
    base = to_hf_config(config, model, plan, dtype="float32")
    made = MidusForCausalLM(MidusConfig(**midus_config(base, model, plain))).float().eval()
    parameters, stored = dict(made.named_parameters()), StoredTensors(tensors, FAMILIES["midus"].stored)
    with torch.no_grad():
        for name in stored.names():
            parameters[name].copy_(stored.read(name))
    return made


# -- what they compute -----------------------------------------------------------------------------------------------
def module_states(model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """What every module of a causal model puts out, ``:input`` what blocks and output projections get, and the logits.

    Args:
        model: of transformers.
        ids: ``[b, s]``.
    """
    states: dict[str, torch.Tensor] = {}
    with _recording(model, states), torch.no_grad():
        states["logits"] = model(input_ids=ids, use_cache=False).logits.clone()
    return states


@contextlib.contextmanager
def _recording(model: torch.nn.Module, states: dict[str, torch.Tensor]) -> Iterator[None]:
    hooks = []
    for name, module in model.named_modules():
        # One rotary embedding of theirs may be what two are here.
        if name in ("", "model") or (name == "model.rotary_emb" and hasattr(model.model, "rotary_emb_local")):
            continue
        hooks.append(module.register_forward_hook(lambda m, i, output, name=name: _keep(states, name, output)))
        if name.endswith((".o_proj", ".down_proj", "norm", "layers.0")):
            hooks.append(
                module.register_forward_pre_hook(
                    lambda m, args, kwargs, name=name: _keep(
                        states, f"{name}:input", args or kwargs.get("hidden_states")
                    ),
                    with_kwargs=True,
                )
            )
    several: set[str] = set()
    for name, module in model.named_modules():
        if name.endswith("rotary_emb"):
            hooks.append(
                module.register_forward_hook(lambda m, i, output, name=name: _compare(states, name, output, several))
            )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for name in several:
            del states[name]


def _compare(states: dict[str, torch.Tensor], name: str, output: Any, several: set[str]) -> None:
    """Notes an embedding that gives blocks different angles: which it gives first is as Python orders a set."""
    if name in states and not torch.equal(states[name], output[0].float()):
        several.add(name)


def _keep(states: dict[str, torch.Tensor], name: str, output: Any) -> None:
    found = output[0] if isinstance(output, tuple) else output
    if isinstance(found, torch.Tensor) and found.is_floating_point():
        states.setdefault(name, found.detach().float().clone())
