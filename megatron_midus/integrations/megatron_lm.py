"""Hooks for upstream Megatron-LM: a MIDUS model in *its* pretrain(), with its flags and checkpoints.

Upstream's ``megatron.training`` is imported inside functions: before 0.17 it is a checkout on PYTHONPATH, and not installed.
"""

from __future__ import annotations

import argparse
import importlib
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_midus.checkpoint.layout import ASSETS_DIRECTORY, LATEST_FILE, find_checkpoint
from megatron_midus.config import ModelConfig, padded_vocab_size
from megatron_midus.config.fields import field_docs
from megatron_midus.config.model import MODEL_CONFIG_FILE
from megatron_midus.config.optimizer import OptimizationConfig
from megatron_midus.errors import UserError
from megatron_midus.memory import MemoryRuntime
from megatron_midus.model.builder import build_model, freeze
from megatron_midus.model.config import check_transformer_config
from megatron_midus.model.specs import get_midus_block_spec
from megatron_midus.platform import is_cpu
from megatron_midus.training.architecture import resolve_train
from megatron_midus.training.optimizer import param_group_overrides
from megatron_midus.upscaling import PLAN_FILE, UpscalePlan

UPSTREAM = "https://github.com/NVIDIA/Megatron-LM, tag core_v0.16.1"

# The rope scaling that upstream has built in, its factor aside.
_UPSTREAM_ROPE = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

# Arguments under which upstream would build another model, or another wrapper around it, than checkpoints of ours are for.
_UNSUPPORTED = (
    "use_legacy_models",
    "yaml_cfg",
    "num_experts",
    "mtp_num_layers",
    "multi_latent_attention",
    "heterogeneous_layers_config_path",
    "experimental_attention_variant",
    "init_model_with_meta_device",
    "use_torch_fsdp2",
    "use_megatron_fsdp",
    "fp16_lm_cross_entropy",
    "rotary_interleaved",
    "rotary_seq_len_interpolation_factor",
)


class Upscaled(NamedTuple):
    """What lies beside the weights of an up-scaled checkpoint."""

    model: ModelConfig
    plan: UpscalePlan
    directory: Path
    """Its ``iter_*`` directory."""


def upstream(name: str) -> ModuleType:
    """A module of upstream's, or one line on where to get it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"{name} cannot be imported ({error}); pip install 'megatron-midus[upstream]' on Python 3.12 or newer, or put a "
            f"checkout of Megatron-LM on PYTHONPATH ({UPSTREAM})"
        ) from None


# -- arguments -------------------------------------------------------------------------------------------------------
def extra_args_provider(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """``extra_args_provider`` of upstream's ``pretrain()``: flags of ours, and the checkpoint's architecture as defaults.

    With ``--midus-model`` (or a ``--pretrained-checkpoint`` or ``--load`` of ours) on the command line nothing about the
    architecture has to be given; what is given must agree with the checkpoint.

    Raises:
        ValueError: a checkpoint that is missing or not ours.
    """
    docs = field_docs(OptimizationConfig)
    group = parser.add_argument_group("MIDUS")
    group.add_argument(
        "--midus-model",
        metavar="DIR",
        help="up-scaled checkpoint of midus upscale that says what the model is; "
        "when absent, --pretrained-checkpoint or --load does",
    )
    group.add_argument(
        "--train",
        choices=("inserted", "all"),
        help="parameters that learn: the inserted blocks, the base frozen, or all; by the plan's policy when absent",
    )
    defaults = OptimizationConfig()
    for name in ("value_lr_mult", "value_weight_decay"):
        flag = "--" + name.replace("_", "-")
        group.add_argument(flag, type=float, default=getattr(defaults, name), help=docs[name])
    group.add_argument("--memory-backend", default="auto", help="auto, reference, torch, numba or triton")
    # Read by upstream's conversion to a TransformerConfig: layers of two kinds cannot be stacked in a checkpoint.
    parser.set_defaults(hetereogenous_dist_checkpoint=True)
    upscaled = find_upscaled(_peek(sys.argv[1:]), required=False)
    if upscaled is not None:
        parser.set_defaults(**architecture_arguments(upscaled.model, upscaled.plan))
    return parser


def _peek(command_line: Sequence[str]) -> argparse.Namespace:
    """The directories on a command line, before it is parsed."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in ("--midus-model", "--pretrained-checkpoint", "--load"):
        parser.add_argument(flag, nargs="?")
    return parser.parse_known_args(list(command_line))[0]


def find_upscaled(arguments: argparse.Namespace, *, required: bool = True) -> Upscaled | None:
    """Plan and architecture of the checkpoint that a run is about.

    Args:
        arguments: with ``midus_model``, ``pretrained_checkpoint`` and ``load``, the first that is given counts. A
            ``load`` that is not there yet does not.
        required: raise when none is given.
    """
    for name in ("midus_model", "pretrained_checkpoint", "load"):
        root = getattr(arguments, name, None)
        if root is None or (name == "load" and not (Path(root) / LATEST_FILE).is_file() and not required):
            continue
        directory, _ = find_checkpoint(root)
        return Upscaled(ModelConfig.load(directory), UpscalePlan.load(directory), directory)
    if required:
        raise UserError("there is no up-scaled checkpoint to build the model of; give --midus-model DIR")
    return None


def architecture_arguments(model: ModelConfig, plan: UpscalePlan) -> dict[str, Any]:
    """Upstream's arguments of an architecture, by name.

    Raises:
        ValueError: an architecture that upstream's arguments cannot say.
    """
    if features := model.unlike_llama():
        raise UserError(
            f"{', '.join(features)} of this model are no arguments of Megatron-LM; train it with midus pretrain"
        )
    arguments = {
        "num_layers": plan.num_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "group_query_attention": True,
        "num_query_groups": model.num_query_groups,
        "kv_channels": model.kv_channels,
        "max_position_embeddings": model.max_position_embeddings,
        "position_embedding_type": "rope",
        "rotary_percent": model.rotary_percent,
        "rotary_base": model.rotary_base,
        "use_rope_scaling": bool(_rope_factor(model)),
        "normalization": "RMSNorm",
        "layernorm_epsilon": model.norm_epsilon,
        "qk_layernorm": model.qk_layernorm,
        "swiglu": True,
        "add_bias_linear": False,
        "add_qkv_bias": model.add_qkv_bias,
        "untie_embeddings_and_output_weights": not model.tie_word_embeddings,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "window_size": None if model.sliding_window is None else (model.sliding_window - 1, 0),
        "ckpt_format": "torch_dist",
    }
    if _rope_factor(model):
        arguments["rope_scaling_factor"] = _rope_factor(model)
    return arguments


def _rope_factor(model: ModelConfig) -> float | None:
    """Factor of a scaling that upstream can compute itself; for any other ``model_provider`` puts in a module of ours."""
    scaling = model.rope_scaling or {}
    return float(scaling["factor"]) if scaling.items() >= _UPSTREAM_ROPE.items() else None


def check_arguments(arguments: argparse.Namespace, upscaled: Upscaled) -> None:
    """Raises ``ValueError`` for arguments of upstream's that ask for another model than the checkpoint's."""
    if not hasattr(arguments, "midus_model"):
        raise UserError(
            "the flags of megatron_midus are missing; pass extra_args_provider of "
            "megatron_midus.integrations.megatron_lm to pretrain()"
        )
    if upscaled.model.num_moe_experts is not None:
        raise UserError(
            f"{upscaled.directory} has experts, which this integration does not build; train it with midus pretrain"
        )
    for name, value in architecture_arguments(upscaled.model, upscaled.plan).items():
        given = getattr(arguments, name, None)
        if (tuple(given) if isinstance(given, list) else given) != value:
            raise UserError(
                f"{name}={given} contradicts {upscaled.directory}, which has {name}={value}; leave the flag out"
            )
    for name in _UNSUPPORTED:
        if getattr(arguments, name, None):
            raise UserError(
                f"{name}={getattr(arguments, name)} is not supported by up-scaled models; leave the flag out"
            )
    rows = _vocabulary_rows(arguments, upscaled.model)
    if arguments.padded_vocab_size is not None and arguments.padded_vocab_size > rows:
        raise UserError(
            f"the tokenizer needs padded_vocab_size={arguments.padded_vocab_size} rows and the embedding has {rows}; "
            f"use the tokenizer of {upscaled.directory / ASSETS_DIRECTORY}"
        )
    _check_resumed_plan(arguments, upscaled)


def _vocabulary_rows(arguments: argparse.Namespace, model: ModelConfig) -> int:
    return padded_vocab_size(
        model.vocab_size,
        divisible_by=arguments.make_vocab_size_divisible_by,
        tensor_model_parallel_size=arguments.tensor_model_parallel_size,
    )


def _check_resumed_plan(arguments: argparse.Namespace, upscaled: Upscaled) -> None:
    """A checkpoint that is resumed may have been completed with the plan of another model."""
    if arguments.load is None or not (Path(arguments.load) / LATEST_FILE).is_file():
        return
    directory, _ = find_checkpoint(arguments.load)
    if not (directory / PLAN_FILE).is_file():
        return
    difference = upscaled.plan.difference(UpscalePlan.load(directory))
    if difference is not None:
        raise UserError(f"the plan of {upscaled.directory} differs from that of --load {directory}: {difference}")


# -- model -----------------------------------------------------------------------------------------------------------
class UpscaledGPTModel(GPTModel):
    """A ``GPTModel`` whose checkpoints are those of this project under upstream's save and load.

    They hold no ``_extra_state`` objects, which carry FP8 statistics only; upstream's loader refuses a checkpoint that
    lacks an object which the model names.
    """

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict:
        """The weights as sharded tensors, by name; with FP8 the extra state too."""
        state = super().sharded_state_dict(*args, **kwargs)
        if self.config.fp8:
            return state
        return {key: value for key, value in state.items() if not key.endswith("_extra_state")}


def model_provider(
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    config: TransformerConfig | None = None,
    pg_collection: Any = None,
) -> GPTModel:
    """``model_provider`` of upstream's ``pretrain()``: this rank's part of the up-scaled model, frozen as ``--train`` says.

    Args:
        pre_process, post_process: given by upstream; the same as what ``parallel_state`` says.
        vp_stage: virtual pipeline stage.
        config: of the model; made of upstream's arguments when absent.
        pg_collection: upstream's process groups; those of ``parallel_state`` are used.

    Raises:
        ValueError: arguments that contradict the checkpoint, or that up-scaled models cannot have.
    """
    arguments = upstream("megatron.training").get_args()
    upscaled = find_upscaled(arguments)
    assert upscaled is not None
    check_arguments(arguments, upscaled)
    config = config or _transformer_config(arguments, upscaled)
    gpt = build_model(
        config,
        model=upscaled.model,
        plan=upscaled.plan,
        sequence_length=arguments.seq_length,
        transformer_impl=arguments.transformer_impl,
        make_vocab_size_divisible_by=arguments.make_vocab_size_divisible_by,
        memory_runtime=MemoryRuntime(seed=arguments.seed, backend=arguments.memory_backend),
        vp_stage=vp_stage,
        model_class=UpscaledGPTModel,
    )
    assert (gpt.pre_process, gpt.post_process) == (pre_process, post_process), "stages differ from parallel_state"
    # The tokenizer's rows until here; upstream reads it for its FLOPs and stores it in checkpoints.
    arguments.padded_vocab_size = _vocabulary_rows(arguments, upscaled.model)
    freeze([gpt], upscaled.plan, resolve_train(arguments.train, upscaled.plan))
    return gpt


def _transformer_config(arguments: argparse.Namespace, upscaled: Upscaled) -> TransformerConfig:
    """Upstream's own conversion, checked."""
    if is_cpu():
        arguments.use_cpu_initialization = True
    config = upstream("megatron.training.arguments").core_transformer_config_from_args(arguments)
    check_transformer_config(config, upscaled.model, upscaled.plan)
    return config


class _BlockSpec(TransformerBlockSubmodules):
    """``--spec``: the layer specs of the plan, made when upstream asks for them, after its arguments are known."""

    def __init__(self) -> None:
        self._made: TransformerBlockSubmodules | None = None

    @property
    def layer_specs(self) -> list:  # type: ignore[override]
        return self._make().layer_specs

    @layer_specs.setter
    def layer_specs(self, value: Any) -> None:
        raise AttributeError("the layer specs follow from the plan")

    @property
    def layer_norm(self) -> Any:  # type: ignore[override]
        return self._make().layer_norm

    @layer_norm.setter
    def layer_norm(self, value: Any) -> None:
        raise AttributeError("the final norm follows from --transformer-impl")

    def _make(self) -> TransformerBlockSubmodules:
        if self._made is None:
            arguments = upstream("megatron.training").get_args()
            upscaled = find_upscaled(arguments)
            assert upscaled is not None
            check_arguments(arguments, upscaled)
            _check_spec_arguments(arguments, upscaled)
            self._made = get_midus_block_spec(
                upscaled.plan,
                _transformer_config(arguments, upscaled),
                transformer_impl=arguments.transformer_impl,
                runtime=MemoryRuntime(seed=arguments.seed, backend=arguments.memory_backend),
            )
        return self._made


def _check_spec_arguments(arguments: argparse.Namespace, upscaled: Upscaled) -> None:
    """What a spec alone cannot do in upstream's ``gpt_builder``."""
    instead = "use model_provider of megatron_midus.integrations.megatron_lm instead of --spec"
    if resolve_train(arguments.train, upscaled.plan) != "all":
        raise UserError(f"train=inserted freezes parameters, which --spec cannot; give --train all, or {instead}")
    if arguments.virtual_pipeline_model_parallel_size is not None:
        raise UserError(f"virtual pipeline stages have specs of their own, which --spec does not tell apart; {instead}")
    scaling = upscaled.model.rope_scaling
    if scaling is not None and _rope_factor(upscaled.model) != 8.0:
        raise UserError(f"upstream's gpt_builder cannot compute {scaling}, only llama3 with a factor of 8; {instead}")


midus_block_spec = _BlockSpec()
"""For upstream's own ``gpt_builder``: ``--spec megatron_midus.integrations.megatron_lm midus_block_spec``."""


# -- optimizer -------------------------------------------------------------------------------------------------------
def optimizer_overrides(arguments: argparse.Namespace) -> dict:
    """``config_overrides`` of Megatron-Core's optimizer: learning rate and weight decay of memory values and norms."""
    settings = OptimizationConfig(
        lr=arguments.lr,
        min_lr=arguments.min_lr or 0.0,
        weight_decay=arguments.weight_decay,
        value_lr_mult=arguments.value_lr_mult,
        value_weight_decay=arguments.value_weight_decay,
    )
    return param_group_overrides(settings)


def install_optimizer_overrides() -> None:
    """Adds ``optimizer_overrides`` to what upstream's ``pretrain()`` hands to its optimizer; call it before.

    ``pretrain()`` has no argument for them: it asks ``megatron.training.training.get_megatron_optimizer_config``, which
    this replaces by a function that asks the original and adds ours.
    """
    training = upstream("megatron.training.training")
    original = training.get_megatron_optimizer_config
    if getattr(original, "adds_midus_overrides", False):
        return

    def get_megatron_optimizer_config(args: argparse.Namespace) -> tuple[Any, dict]:
        config, overrides = original(args)
        return config, {**overrides, **optimizer_overrides(args)}

    get_megatron_optimizer_config.adds_midus_overrides = True  # type: ignore[attr-defined]
    training.get_megatron_optimizer_config = get_megatron_optimizer_config


# -- checkpoints -----------------------------------------------------------------------------------------------------
def complete_checkpoints(save: str | Path, source: str | Path) -> list[Path]:
    """Puts plan, architecture and tokenizer beside the checkpoints that upstream wrote, so that our tools can read them.

    Args:
        save: upstream's ``--save``.
        source: the up-scaled checkpoint, its root or ``iter_*`` directory.

    Returns:
        The directories that were completed; those that had everything are left as they are.
    """
    directory, _ = find_checkpoint(source)
    completed = []
    for target in sorted(Path(save).glob("iter_*")):
        # metadata.json is written last: without it a save is still under way.
        if not (target / "metadata.json").is_file() or (target / PLAN_FILE).is_file():
            continue
        shutil.copyfile(directory / MODEL_CONFIG_FILE, target / MODEL_CONFIG_FILE)
        if (directory / ASSETS_DIRECTORY).is_dir():
            shutil.copytree(directory / ASSETS_DIRECTORY, target / ASSETS_DIRECTORY, dirs_exist_ok=True)
        shutil.copyfile(directory / PLAN_FILE, target / PLAN_FILE)
        completed.append(target)
    return completed
