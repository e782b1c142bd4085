"""What the families share: a config.json of transformers 4 or 5 read into a ModelConfig, and refusals in words."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megatron_midus.config import ModelConfig
from megatron_midus.config.rope import DEFAULT_ROPE_THETA, chosen_rope, ignored_entries, normalise_rope, rotary_percent
from megatron_midus.conversion.stored import Rule
from megatron_midus.errors import UserError

_SIZES = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "vocab_size",
    "max_position_embeddings",
)
# Entries about files that an export does not have: it holds all weights, in full precision, under the usual names.
DROPPED = {
    "quantization_config": "the weights are in full precision",
    "compression_config": "the weights are in full precision",
    "transformers_weights": "the weights get the usual names",
}
# Names of activations in transformers and in ModelConfig.
ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
# Any model without features of its own, to compare with.
LLAMA = ModelConfig(
    num_layers=1, hidden_size=4, ffn_hidden_size=4, num_attention_heads=1, num_query_groups=1, kv_channels=4,
    vocab_size=4, max_position_embeddings=4,
)  # fmt: skip
_OPTIONAL_SIZES = (
    "num_key_value_heads",
    "head_dim",
    "sliding_window",
    "num_experts",
    "num_local_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
)


@dataclasses.dataclass(frozen=True)
class Family:
    """One architecture of transformers.

    Attributes:
        name: its ``model_type``.
        architecture: its entry in ``architectures``.
        defaults: what transformers assumes for an entry that ``config.json`` leaves out.
        required: entries that must hold one value (given or assumed), because the model here has no other.
        settings: the fields of ``ModelConfig`` that this family computes itself, from the config and its defaults.
        partial_rotary: whether its class leaves channels of a head unrotated where ``partial_rotary_factor`` says so.
        stored: how its tensors lie in its files, where not under canonical names.
        rope_theta: base of the rotary embedding where ``config.json`` names none.
        per_layer_rope: whether ``rope_parameters`` may hold one description for each kind of attention.
        layers: lists of the class's with one entry per layer, from the config and its defaults, that a plain export of
            another depth must say.
    """

    name: str
    architecture: str
    defaults: Mapping[str, Any]
    required: Mapping[str, Any]
    settings: Callable[[dict[str, Any]], dict[str, Any]] = lambda config: {}
    partial_rotary: bool = False
    stored: Sequence[Rule] = ()
    rope_theta: float = DEFAULT_ROPE_THETA
    per_layer_rope: bool = False
    layers: Callable[[dict[str, Any]], dict[str, list]] = lambda config: {}


def model_config_from(config: dict[str, Any], family: Family) -> ModelConfig:
    """Reads ``config`` as ``family`` does."""
    full = {**family.defaults, **config}
    for name, wanted in family.required.items():
        if full.get(name, wanted) != wanted and not (wanted is False and full[name] is None):
            raise UserError(f"{family.architecture} with {name}={full[name]} is not supported; only {name}={wanted} is")
    _check_numbers(full)
    heads = full["num_attention_heads"]
    if full.get("rope_theta") is None:
        full["rope_theta"] = family.rope_theta
    main = _main_rope(full) if family.per_layer_rope else full
    rotary_base, rope_scaling = read_rope(main)
    partial = rotary_percent(main)
    if partial != 1.0 and not family.partial_rotary:
        raise UserError(f"{family.architecture} with partial_rotary_factor={partial} is not supported; only 1 is")
    return ModelConfig(
        **{
            "num_layers": full["num_hidden_layers"],
            "hidden_size": full["hidden_size"],
            "ffn_hidden_size": full["intermediate_size"],
            "num_attention_heads": heads,
            # null in old configs: as many as query heads.
            "num_query_groups": full.get("num_key_value_heads") or heads,
            "kv_channels": full.get("head_dim") or full["hidden_size"] // heads,
            "vocab_size": full["vocab_size"],
            "max_position_embeddings": full["max_position_embeddings"],
            "norm_epsilon": full["rms_norm_eps"],
            "rotary_base": rotary_base,
            "rope_scaling": rope_scaling,
            "rotary_percent": partial,
            "tie_word_embeddings": bool(full.get("tie_word_embeddings", False)),
            "init_method_std": full.get("initializer_range", 0.02),
            "family": family.name,
            "hf_dtype": hf_dtype(config) or "float32",
            **family.settings(full),
        }
    )


def _check_numbers(config: dict[str, Any]) -> None:
    """Raises ``ValueError`` for sizes that are missing or no positive whole number."""
    missing = [name for name in _SIZES if name not in config]
    if missing:
        raise UserError(f"config.json has no entry {', '.join(missing)}")
    for name in (*_SIZES, *_OPTIONAL_SIZES):
        value = config.get(name)
        if value is None and name in _OPTIONAL_SIZES:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"config.json has {name}={value!r}, which is not a positive whole number")


def read_rope(config: dict[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """Base and scaling of the rotary embedding, whichever entries of ``config`` they lie in."""
    rope = normalise_rope(chosen_rope(config))
    base = float(rope.pop("rope_theta"))
    return base, None if rope["rope_type"] == "default" else rope


def _main_rope(config: dict[str, Any]) -> dict[str, Any]:
    """``config`` with the rotary embedding of the layers that do not slide, where it describes two."""
    parameters = config.get("rope_parameters") or {}
    if "full_attention" not in parameters and "sliding_attention" not in parameters:
        return config
    return {**config, "rope_parameters": parameters.get("full_attention")}


def local_rope(config: dict[str, Any], *, theta: float) -> dict[str, Any]:
    """The field of ``ModelConfig`` for the rotary embedding of sliding layers, ``theta`` where ``config`` does not say it."""
    rope = (config.get("rope_parameters") or {}).get("sliding_attention") or {}
    if rope.get("rope_type", "default") != "default":
        raise UserError(f"rope scaling {rope['rope_type']!r} of sliding layers is not supported; only default is")
    return {"local_rotary_base": float(rope.get("rope_theta") or theta)}


def kinds_of_layers(config: dict[str, Any], period: int) -> list[str]:
    """``layer_types``; where ``config`` has none, all layers slide but for every ``period``-th."""
    layers = range(config["num_hidden_layers"])
    made = ["sliding_attention" if (layer + 1) % period else "full_attention" for layer in layers]
    return list(config.get("layer_types") or made)


def notes_on(config: dict[str, Any]) -> list[str]:
    """What of ``config`` is not used, in words, for people to read."""
    notes, config = [], _main_rope(config)
    for name, why in DROPPED.items():
        if config.get(name):
            notes.append(f"{name} of config.json is left out of what is written: {why}")
    rope, scaling, parameters = chosen_rope(config), config.get("rope_scaling"), config.get("rope_parameters") or {}
    renamed = {"rope_type" if name == "type" else name: value for name, value in parameters.items()}
    if scaling and any(rope.get(name) != value for name, value in renamed.items()):
        notes.append(f"rope_scaling={scaling} takes the place of rope_parameters={parameters}, as in transformers")
    if ignored := ignored_entries(rope):
        notes.append(f"{', '.join(ignored)} of the rope scaling has no effect and is left out, as in transformers")
    return notes


def hf_dtype(config: dict[str, Any]) -> str | None:
    """``dtype`` (transformers 5) or ``torch_dtype`` (4) of a config, ``None`` when it names none."""
    return config.get("dtype") or config.get("torch_dtype")


def activation(name: str) -> str:
    """``ModelConfig.hidden_act`` for a name of transformers."""
    if name not in ACTIVATIONS:
        raise UserError(f"hidden_act={name} is not supported; only {', '.join(ACTIVATIONS)} are")
    return ACTIVATIONS[name]


def soft_cap(config: dict[str, Any], name: str) -> float | None:
    """The bound of a soft-capping; ``None`` = there is none."""
    bound = config[name]
    if bound is None:
        return None
    if not isinstance(bound, (int, float)) or isinstance(bound, bool) or not bound > 0:
        raise UserError(f"config.json has {name}={bound!r}; it must be a number above 0, or null")
    return float(bound)


def sliding_settings(config: dict[str, Any], kinds: list[str]) -> dict[str, Any]:
    """Fields of ``ModelConfig`` for a model whose layers have the attentions ``kinds``."""
    unknown = sorted(set(kinds) - {"full_attention", "sliding_attention"})
    if unknown:
        raise UserError(
            f"layer_types has {', '.join(unknown)}; only full_attention and sliding_attention are supported"
        )
    if "sliding_attention" not in kinds or config.get("sliding_window") is None:
        return {"sliding_window": None, "local_rotary_base": None}
    slides = [kind == "sliding_attention" for kind in kinds]
    return {"sliding_window": config["sliding_window"], "sliding_layers": slides}


def check_full_attention(config: dict[str, Any]) -> None:
    """Raises ``ValueError`` when ``layer_types`` gives some layer another attention than the full one."""
    types = sorted(set(config.get("layer_types") or ()))
    if types not in ([], ["full_attention"]):
        raise UserError(f"layer_types has {', '.join(types)}; only full_attention for all layers is supported")


def uniform_sliding_window(config: dict[str, Any]) -> int | None:
    """The window of models whose layers all have the same attention; ``ValueError`` for a mixture.

    With ``layer_types`` transformers takes its class Ministral for a Mistral, and that follows them.
    """
    types = set(config.get("layer_types") or ())
    if len(types) > 1:
        raise UserError(f"layer_types mixes {', '.join(sorted(types))}; only one kind for all layers is supported")
    if types:
        return config.get("sliding_window") if types == {"sliding_attention"} else None
    return config.get("sliding_window")


def expert_settings(config: dict[str, Any]) -> dict[str, Any]:
    """What the families of mixtures of experts have in common; transformers 5 gives one name to the number of experts."""
    return {
        "num_moe_experts": config.get("num_local_experts") or config["num_experts"],
        "moe_router_topk": config["num_experts_per_tok"],
        "moe_aux_loss_coeff": float(config["router_aux_loss_coef"]),
    }
