"""Which model is trained: what a checkpoint's own files say, or flags for training from scratch."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from megatron_midus.checkpoint.layout import (
    ASSETS_DIRECTORY,
    find_background,
    find_checkpoint,
    read_latest_iteration,
)
from megatron_midus.config import ModelConfig
from megatron_midus.config.checkpoint import CheckpointConfig
from megatron_midus.data.chat_template import template_of_run
from megatron_midus.data.tokenizer import Tokenizer, build_tokenizer, check_tokenizer_fits
from megatron_midus.errors import UserError
from megatron_midus.hub import local_model
from megatron_midus.training.arguments import Arguments
from megatron_midus.training.checkpoint.source import Source
from megatron_midus.upscaling import UpscalePlan, make_plan
from megatron_midus.upscaling.cost import Train

# They break the function of the base, so everything must learn; under the others the base stays useful frozen.
_ALL_LEARN = ("solar", "stack")


@dataclasses.dataclass(frozen=True)
class Architecture:
    """The model of this run.

    Attributes:
        model: the decoder with all its blocks.
        plan: what each block is.
        train: the resolved ``--train``.
        assets: directory of Hugging Face files, or file of a SentencePiece model, that travels into every checkpoint.
        assets_left_out: files of that directory that do not, because they describe another model.
        background: file of midus background, which travels into every checkpoint as well.
        chat_template: that of fine-tuning, which checkpoints have instead of the tokenizer's own.
    """

    model: ModelConfig
    plan: UpscalePlan
    train: Train
    assets: Path | None
    assets_left_out: tuple[str, ...] = ()
    background: Path | None = None
    chat_template: str | None = None


def resolve_architecture(arguments: Arguments, source: Source, *, tokenizer_vocab_size: int | None) -> Architecture:
    """The model, from the files beside the weights, or from flags when there are no weights.

    Args:
        tokenizer_vocab_size: rows of the embedding of a model from scratch when ``--vocab-size`` is absent.

    Raises:
        ValueError: flags that contradict the checkpoint (both values are named), or flags that are missing.
    """
    if source.directory is None:
        _check_flags_from_scratch(arguments)
        return _from_flags(arguments, tokenizer_vocab_size)
    model, plan = ModelConfig.load(source.directory), UpscalePlan.load(source.directory)
    if model.num_layers != plan.num_layers:
        raise UserError(
            f"{source.directory}: the plan has {plan.num_layers} blocks and model_config.json says "
            f"num_layers={model.num_layers}; they do not belong together"
        )
    _check_flags(arguments.architecture, model.to_dict(), source.directory)
    _check_flags(arguments.memory, plan.memory.to_dict() if plan.memory else {}, source.directory)
    _check_other_plans(arguments.checkpoint, plan, source.directory)
    assets = source.directory / ASSETS_DIRECTORY
    return Architecture(
        model,
        plan,
        resolve_train(arguments.training.train, plan),
        assets if assets.is_dir() else None,
        background=find_background(source.directory),
    )


def _check_flags(given: dict[str, Any], stored: dict[str, Any], directory: Path) -> None:
    for name, value in given.items():
        if name not in stored:
            raise UserError(f"{name}={value} was given, but {directory} has no Memory blocks; leave the flag out")
        if value != stored[name]:
            raise UserError(
                f"{name}={value} contradicts {directory}, which has {name}={stored[name]}; leave the flag out"
            )


def _check_other_plans(checkpoint: CheckpointConfig, plan: UpscalePlan, directory: Path) -> None:
    """Neither ``--save`` nor ``--pretrained-checkpoint`` may belong to another model."""
    for flag, root in (("--save", checkpoint.save), ("--pretrained-checkpoint", checkpoint.pretrained_checkpoint)):
        if root is None or not Path(root).is_dir() or Path(root).resolve() == directory.resolve().parent:
            continue
        if read_latest_iteration(root) is None:
            continue
        other = find_checkpoint(root)[0]
        difference = plan.difference(UpscalePlan.load(other))
        if difference is not None:
            raise UserError(
                f"the plan of {directory} differs from that of {flag} {other}: {difference}; choose another directory"
            )


def resolve_train(train: Train | None, plan: UpscalePlan) -> Train:
    """What ``--train`` means for a plan; by its policy when the flag is absent."""
    if train is None:
        return "inserted" if plan.policy not in _ALL_LEARN and plan.inserted_indices else "all"
    if train == "inserted" and not plan.inserted_indices:
        raise UserError(f"train=inserted, but policy {plan.policy} inserted no block; use --train all")
    if train == "values" and not plan.memory_indices:
        raise UserError(f"train=values, but policy {plan.policy} has no Memory blocks; use --train all")
    return train


def _from_flags(arguments: Arguments, tokenizer_vocab_size: int | None) -> Architecture:
    given = dict(arguments.architecture)
    hidden_size, heads = given["hidden_size"], given["num_attention_heads"]
    given.setdefault("num_query_groups", heads)
    given.setdefault("kv_channels", hidden_size // heads)
    # A gated MLP has three matrices instead of two; 2/3 keeps the 4 * hidden_size of a plain one, as Megatron does.
    given.setdefault("ffn_hidden_size", int(4 * hidden_size * 2 / 3 / 64) * 64 or 64)
    given.setdefault("max_position_embeddings", arguments.data.seq_length)
    if "vocab_size" not in given:
        assert tokenizer_vocab_size is not None
        given["vocab_size"] = tokenizer_vocab_size
    model = ModelConfig(**given)
    plan = make_plan("none", num_layers=model.num_layers)
    return Architecture(model, plan, resolve_train(arguments.training.train, plan), None)


def _check_flags_from_scratch(arguments: Arguments) -> None:
    """What must be given, and what must not, when there is no checkpoint."""
    given = arguments.architecture
    missing = [n for n in ("num_layers", "hidden_size", "num_attention_heads") if n not in given]
    if missing:
        flags = ", ".join("--" + name.replace("_", "-") for name in missing)
        raise UserError(
            f"there is no checkpoint to load, and {flags} is missing to train from scratch; give it, or --load DIR"
        )
    if arguments.memory:
        flags = ", ".join(f"{name}={value}" for name, value in arguments.memory.items())
        raise UserError(f"{flags}: a model from scratch has no Memory blocks; train it, then use midus upscale")
    hidden_size, heads = given["hidden_size"], given["num_attention_heads"]
    if heads < 1 or (hidden_size % heads and "kv_channels" not in given):
        raise UserError(
            f"hidden_size={hidden_size} is not divisible by num_attention_heads={heads}; give --kv-channels"
        )


def resolve_model(arguments: Arguments, source: Source) -> tuple[Tokenizer, Architecture]:
    """Tokenizer and model, each of which may decide about the other.

    Raises:
        ValueError: see ``resolve_architecture``; a tokenizer that is missing or too large for the embedding.
    """
    data = arguments.data
    if source.directory is not None:
        architecture = resolve_architecture(arguments, source, tokenizer_vocab_size=None)
        tokenizer = build_tokenizer(
            dataclasses.replace(data, vocab_size=architecture.model.vocab_size), default_directory=architecture.assets
        )
    else:
        _check_flags_from_scratch(arguments)
        tokenizer = build_tokenizer(dataclasses.replace(data, vocab_size=arguments.architecture.get("vocab_size")))
        architecture = resolve_architecture(arguments, source, tokenizer_vocab_size=tokenizer.vocab_size)
        files = None if data.tokenizer_model is None else Path(local_model(data.tokenizer_model))
        architecture = dataclasses.replace(
            architecture,
            assets=files if files is not None and files.exists() else None,
            # The directory of a whole model describes that one; export writes these from ours.
            assets_left_out=("config.json", "generation_config.json"),
        )
    check_tokenizer_fits(tokenizer, architecture.model.vocab_size)
    if data.sft:
        architecture = dataclasses.replace(architecture, chat_template=template_of_run(data, tokenizer))
    return tokenizer, architecture
