"""Writes an up-scaled checkpoint of the tiny model with random weights, values included, as tools/upscale.py would."""

from __future__ import annotations

from pathlib import Path

from fork_server import fork_server

from megatron_midus.checkpoint.checksums import write_checksums
from megatron_midus.checkpoint.layout import iteration_directory, write_latest_iteration
from megatron_midus.config import MemoryConfig, ModelConfig
from megatron_midus.upscaling import UpscalePlan, make_plan

BASE = ModelConfig(
    num_layers=2,
    hidden_size=32,
    ffn_hidden_size=64,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=8,
    vocab_size=101,
    max_position_embeddings=64,
)
MEMORY = MemoryConfig(memory_num_keys=7, memory_topk=3, memory_latent_size=8, memory_query_norm="rms")


def write_upscaled(
    directory: Path,
    *,
    base: ModelConfig = BASE,
    memory: MemoryConfig = MEMORY,
    insert_after: tuple[int, ...] = (0,),
) -> Path:
    """Makes ``directory/iter_0000000`` and returns ``directory``."""
    plan = make_plan("interleave", num_layers=base.num_layers, insert_after=insert_after, memory=memory)
    process = fork_server().Process(target=_write, args=(directory, base, plan))
    process.start()
    process.join()
    assert process.exitcode == 0
    return directory


def _write(directory: Path, base: ModelConfig, plan: UpscalePlan) -> None:
    import torch
    from megatron.core import parallel_state, tensor_parallel

    from megatron_midus.model.builder import build_model, make_transformer_config
    from megatron_midus.model.checkpoint import save_weights
    from megatron_midus.platform import initialize_distributed

    initialize_distributed("gloo")
    parallel_state.initialize_model_parallel()
    torch.manual_seed(7)
    tensor_parallel.model_parallel_cuda_manual_seed(7)
    model = plan.applied_to(base)
    chunk = build_model(make_transformer_config(model, plan), model=model, plan=plan, sequence_length=32)
    for name, parameter in chunk.named_parameters():
        if name.endswith((".value_bank", ".query_norm")):
            torch.nn.init.normal_(parameter, std=0.1)
    target = iteration_directory(directory, 0)
    target.mkdir(parents=True)
    save_weights([chunk], target)
    plan.save(target)
    model.save(target)
    write_checksums(target)
    write_latest_iteration(directory, 0)
    torch.distributed.destroy_process_group()


def write_averages(root: Path, iteration: int, directory: Path) -> Path:
    """Makes a checkpoint of iteration 0 whose weights are the averages (``--ema-decay``) of another one."""
    from megatron_midus.conversion.megatron_io import MegatronReader, write_model_tensors

    source, target = iteration_directory(root, iteration), iteration_directory(directory, 0)
    target.mkdir(parents=True)
    plan, model = UpscalePlan.load(source), ModelConfig.load(source)
    write_model_tensors(MegatronReader(source, model, plan, averaged=True), target, model, plan)
    plan.save(target)
    model.save(target)
    write_latest_iteration(directory, 0)
    return directory


def read_tensors(root: Path, iteration: int) -> dict:
    """All tensors of a checkpoint by key, whole, those of the optimizer included."""
    import torch
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    reader = checkpoint.FileSystemReader(str(iteration_directory(root, iteration)))
    stored = reader.read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in stored.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    checkpoint.load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def read_weights(root: Path, iteration: int) -> dict:
    """Model tensors of a checkpoint by key, whole, as fp32 torch tensors."""
    model = ("embedding.", "decoder.", "output_layer.")
    return {name: tensor.float() for name, tensor in read_tensors(root, iteration).items() if name.startswith(model)}
