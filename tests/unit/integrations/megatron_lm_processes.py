"""What the processes of test_megatron_lm.py do: upstream's recorded arguments behind the names that the hooks import."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer, get_standard_config_overrides
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group

from megatron_midus.checkpoint.layout import iteration_directory
from megatron_midus.config import ModelConfig
from megatron_midus.integrations import megatron_lm
from megatron_midus.model.builder import build_model, make_transformer_config
from megatron_midus.model.checkpoint import load_weights
from megatron_midus.model.layer import MIDUSMemoryLayer, layer_index
from megatron_midus.upscaling import UpscalePlan

RECORD = Path(__file__).parent / "megatron_lm_arguments.json"
SEQUENCE, VOCAB = 21, 101


def decode(value: Any) -> Any:
    """A recorded value: JSON, or a dictionary that names what JSON lacks."""
    if isinstance(value, list):
        return [decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "dtype":
        return getattr(torch, content)
    if kind == "tuple":
        return tuple(decode(item) for item in content)
    if kind == "dict":
        return {name: decode(item) for name, item in content.items()}
    module, name, *member = content
    found = getattr(importlib.import_module(module), name)
    return found[member[0]] if kind == "enum" else found


def recorded(part: str, root: Path) -> dict[str, Any]:
    """``arguments`` or ``transformer_config`` of the record, about the checkpoint at ``root``."""
    values = json.loads(RECORD.read_text().replace("@MODEL@", str(root)))[part]
    return {name: decode(value) for name, value in values.items()}


def install_upstream(root: Path, **changes: Any) -> argparse.Namespace:
    """Modules with upstream's names that answer as upstream did when it was recorded; returns its arguments."""
    arguments = argparse.Namespace(**{**recorded("arguments", root), **changes})
    training, conversion, loop = (ModuleType(f"megatron.training{end}") for end in ("", ".arguments", ".training"))
    training.get_args = lambda: arguments
    conversion.core_transformer_config_from_args = lambda args: TransformerConfig(
        **{**recorded("transformer_config", root), "hetereogenous_dist_checkpoint": args.hetereogenous_dist_checkpoint}
    )

    def get_megatron_optimizer_config(args: argparse.Namespace) -> tuple[OptimizerConfig, dict]:
        config = OptimizerConfig(optimizer="adam", lr=args.lr, min_lr=args.min_lr, weight_decay=args.weight_decay)
        return config, get_standard_config_overrides(config=config)

    loop.get_megatron_optimizer_config = get_megatron_optimizer_config
    for module in (training, conversion, loop):
        sys.modules[module.__name__] = module
    return arguments


def start() -> None:
    """Process groups and seeds, as upstream has them before it asks for a model."""
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)


def loss_of(model: torch.nn.Module) -> torch.Tensor:
    """``[b, s]`` nats on fixed random tokens."""
    tokens = fixed_tokens()
    positions = torch.arange(SEQUENCE).expand(2, -1)
    return model(tokens[:, :-1], positions, None, labels=tokens[:, 1:])


def fixed_tokens() -> torch.Tensor:
    return torch.randint(VOCAB, (2, SEQUENCE + 1), generator=torch.Generator().manual_seed(2))


def unmasked_loss_of(model: torch.nn.Module) -> torch.Tensor:
    """The loss when the rows that pad the vocabulary, which are zero, take part in the softmax."""
    tokens = fixed_tokens()
    logits = model(tokens[:, :-1], torch.arange(SEQUENCE).expand(2, -1), None).detach()  # [b, s, rows]
    logits[..., VOCAB:] = 0.0
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")


def drivers_model(root: Path) -> GPTModel:
    """The model of this project's own driver, with the weights of the checkpoint."""
    directory = iteration_directory(root, 0)
    model, plan = ModelConfig.load(directory), UpscalePlan.load(directory)
    gpt = build_model(
        make_transformer_config(model, plan),
        model=model,
        plan=plan,
        sequence_length=32,
        make_vocab_size_divisible_by=8,
    )
    load_weights([gpt], directory)
    return gpt


def describe(gpt: GPTModel) -> dict[str, Any]:
    layers = gpt.decoder.layers
    return {
        "kinds": ["memory" if isinstance(layer, MIDUSMemoryLayer) else "transformer" for layer in layers],
        "indices": [layer_index(layer) for layer in layers],
        "shapes": {name: list(parameter.shape) for name, parameter in gpt.named_parameters()},
        "trainable": [name for name, parameter in gpt.named_parameters() if parameter.requires_grad],
    }


def build_both(root: Path) -> dict[str, Any]:
    """The provider's model beside the driver's, on the same weights."""
    start()
    arguments = install_upstream(root)
    gpt = megatron_lm.model_provider(pre_process=True, post_process=True)
    fresh = loss_of(gpt)
    load_weights([gpt], iteration_directory(root, 0))
    loss = loss_of(gpt)
    loss.mean().backward()
    own = drivers_model(root)
    # What upstream's loader asks of a checkpoint: every key of the model must be there.
    stored = {
        entry.key
        for entry in nested_values(dist_checkpointing.load_tensors_metadata(str(iteration_directory(root, 0))))
    }
    asked = nested_values(gpt.sharded_state_dict(metadata=ensure_metadata_has_dp_cp_group(None)))
    missing = {entry.key for entry in asked if isinstance(entry, ShardedObject) or entry.key not in stored}
    gradients = {name: p.grad.abs().sum().item() for name, p in gpt.named_parameters() if p.grad is not None}
    return {
        **describe(gpt),
        "own": describe(own),
        "missing": sorted(missing),
        "rows": arguments.padded_vocab_size,
        "fresh": fresh.detach(),
        "loss": loss.detach(),
        "own_loss": loss_of(own).detach(),
        "gradients": gradients,
    }


def build_by_spec(root: Path) -> dict[str, Any]:
    """As upstream's ``gpt_builder`` does with ``--spec``."""
    start()
    arguments = install_upstream(root, train="all")
    config = sys.modules["megatron.training.arguments"].core_transformer_config_from_args(arguments)
    gpt = GPTModel(
        config=config,
        transformer_layer_spec=vars(megatron_lm)["midus_block_spec"],
        vocab_size=arguments.padded_vocab_size,
        max_sequence_length=arguments.max_position_embeddings,
        share_embeddings_and_output_weights=not arguments.untie_embeddings_and_output_weights,
        position_embedding_type=arguments.position_embedding_type,
        rotary_percent=arguments.rotary_percent,
        rotary_base=arguments.rotary_base,
        rope_scaling=arguments.use_rope_scaling,
    )
    gpt.unpadded_vocab_size = VOCAB
    load_weights([gpt], iteration_directory(root, 0))
    return {**describe(gpt), "loss": loss_of(gpt).detach(), "own_loss": unmasked_loss_of(drivers_model(root))}


def param_groups(root: Path) -> list[dict[str, Any]]:
    """The groups that upstream's optimizer makes of the overrides, by name of parameter."""
    start()
    arguments = install_upstream(root, value_lr_mult=7.0, lr=0.5, min_lr=0.25, weight_decay=0.1)
    gpt = megatron_lm.model_provider()
    names = {parameter: name for name, parameter in gpt.named_parameters()}
    wrapped = DistributedDataParallel(gpt.config, DistributedDataParallelConfig(), gpt)
    megatron_lm.install_optimizer_overrides()
    megatron_lm.install_optimizer_overrides()  # a second call must not wrap the first
    config, overrides = sys.modules["megatron.training.training"].get_megatron_optimizer_config(arguments)
    optimizer = get_megatron_optimizer(config, [wrapped], config_overrides=overrides)
    keys = ("wd_mult", "max_lr", "min_lr", "lr_mult", "default_config")
    return [
        {**{key: group[key] for key in keys}, "names": sorted(names[p] for p in group["params"])}
        for group in optimizer.param_groups
    ]


def errors(root: Path, cases: list[tuple[str, dict[str, Any]]]) -> list[str]:
    """What a hook says to changed arguments."""
    start()
    found = []
    for hook, changes in cases:
        install_upstream(root, **changes)
        # The specs are kept once they are made.
        call: Callable = megatron_lm.model_provider if hook == "provider" else megatron_lm._BlockSpec()._make
        try:
            call()
            found.append("no error")
        except ValueError as error:
            found.append(str(error))
    return found
