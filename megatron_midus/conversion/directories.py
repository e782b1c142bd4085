"""Whole output directories: a Hugging Face model, or the first iteration of a Megatron checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_midus.checkpoint.checksums import write_checksums
from megatron_midus.checkpoint.layout import (
    ASSETS_DIRECTORY,
    copy_assets,
    iteration_directory,
    write_latest_iteration,
)
from megatron_midus.checkpoint.training_record import UNTRAINED, TrainingRecord
from megatron_midus.config import ModelConfig, padded_vocab_size
from megatron_midus.conversion.families import fresh_config, stored_family, to_hf_config
from megatron_midus.conversion.hf_io import CONFIG_FILE, check_free_space, dtype_name, read_hf_config, write_safetensors
from megatron_midus.conversion.megatron_io import write_model_tensors
from megatron_midus.conversion.model_card import model_card
from megatron_midus.conversion.tokenizer import special_token_ids
from megatron_midus.upscaling import UpscalePlan
from megatron_midus.upscaling.tensors import EMBEDDING, TensorSource

CONVERSION_FILE = "conversion.json"

Progress = Callable[[str], None]


def silent(name: str) -> None:
    """A progress callback that shows nothing."""


def write_hf_directory(
    source: TensorSource,
    directory: str | Path,
    *,
    assets: str | Path,
    model: ModelConfig,
    plan: UpscalePlan,
    code_files: Sequence[str | Path],
    max_shard_size: int = 5 * 10**9,
    workers: int = 1,
    training: TrainingRecord = UNTRAINED,
    evaluation: Mapping[str, Any] | None = None,
    progress: Progress = silent,
) -> None:
    """Fills the existing, empty ``directory`` with a model that transformers loads.

    Args:
        source: every canonical tensor of the model, in the dtype in which it is to be written.
        assets: directory with the source's ``config.json``, tokenizer and other files, copied byte for byte.
        model: the architecture.
        plan: the blocks; with Memory blocks among them ``code_files`` travel along.
        code_files: the configuration and modeling file of MIDUS.
        max_shard_size: bytes of one safetensors file.
        workers: tensors that are read and written at a time.
        training: what the weights went through, for the model card.
        evaluation: report of midus evaluate, for the model card.
        progress: called with each tensor's name.
    """
    directory = Path(directory)
    check_free_space(source, directory)
    dtype = dtype_name(source.dtype(EMBEDDING))
    if Path(assets).is_dir():
        copy_assets(assets, directory, skip=[CONFIG_FILE])
    _write_config(Path(assets), directory, to_hf_config(source_config(assets, model, plan), model, plan, dtype=dtype))
    plan.save(directory)
    if plan.memory_indices:
        for path in code_files:
            shutil.copyfile(path, directory / Path(path).name)
    card = model_card(model, plan, dtype=dtype, training=training, evaluation=evaluation)
    (directory / "README.md").write_text(card, encoding="utf-8")
    write_safetensors(
        source,
        directory,
        rules=stored_family(model, plan).stored,
        max_shard_size=max_shard_size,
        workers=workers,
        progress=progress,
    )


def source_config(assets: str | Path, model: ModelConfig, plan: UpscalePlan) -> dict[str, Any]:
    """The ``config.json`` among ``assets``; one made of ``model`` where it was trained from scratch.

    An up-scaled model had a source, so it is a mistake when its files are gone.
    """
    if plan.policy != "none" or (Path(assets) / CONFIG_FILE).is_file():
        return read_hf_config(assets)
    return fresh_config(model, special_token_ids(assets))


def _write_config(assets: Path, directory: Path, config: dict[str, Any]) -> None:
    """Writes ``config.json``; where nothing changed, the source's own bytes."""
    if (assets / CONFIG_FILE).is_file() and config == read_hf_config(assets):
        shutil.copyfile(assets / CONFIG_FILE, directory / CONFIG_FILE)
    else:
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        (directory / CONFIG_FILE).write_text(text, encoding="utf-8")


def write_megatron_checkpoint(
    source: TensorSource,
    directory: str | Path,
    *,
    assets: str | Path,
    model: ModelConfig,
    plan: UpscalePlan,
    tensor_parallel_size: int = 1,
    pipeline_parallel_size: int = 1,
    make_vocab_size_divisible_by: int = 128,
    training: TrainingRecord = UNTRAINED,
    workers: int = 1,
    progress: Progress = silent,
) -> None:
    """Fills the empty ``directory`` with a checkpoint whose one iteration is the model of ``source``.

    Args:
        source: every canonical tensor of the model.
        assets: a Hugging Face directory; its ``config.json``, tokenizer … go into ``hf_assets`` byte for byte.
        model: the architecture; ``num_layers`` is taken from the plan.
        plan: the blocks.
        tensor_parallel_size, pipeline_parallel_size: what the model will be trained with; recorded, and the vocabulary
            is padded for it. Any other sizes can load the checkpoint as well.
        make_vocab_size_divisible_by: rows of the embedding per tensor-parallel rank are a multiple of this.
        training: what the weights went through; its iteration is that of the checkpoint.
        workers: tensors that are read and written at a time.
        progress: called with each tensor's name.
    """
    target = iteration_directory(directory, training.iteration)
    target.mkdir(parents=True)
    check_free_space(source, target)
    padded = padded_vocab_size(
        model.vocab_size,
        divisible_by=make_vocab_size_divisible_by,
        tensor_model_parallel_size=tensor_parallel_size,
    )
    write_model_tensors(
        source, target, model, plan, padded_vocab=padded, training=training, workers=workers, progress=progress
    )
    plan.applied_to(model).save(target)
    plan.save(target)
    copy_assets(assets, target / ASSETS_DIRECTORY)
    record = {
        "target_tensor_parallel_size": tensor_parallel_size,
        "target_pipeline_parallel_size": pipeline_parallel_size,
        "padded_vocab_size": padded,
    }
    (target / CONVERSION_FILE).write_text(json.dumps(record, indent=2) + "\n")
    write_checksums(target)
    write_latest_iteration(directory, training.iteration)
