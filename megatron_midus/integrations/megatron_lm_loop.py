"""Upstream Megatron-LM's ``pretrain()`` called as its release wants it: data, forward pass, and a run without a GPU.

``megatron.training`` is in the ``megatron-core`` wheel since 0.17 and a checkout before; upstream's ``pretrain_gpt.py``, which
has the functions below for upstream's own models, is in no wheel.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.enums import ModelType

from megatron_midus import platform
from megatron_midus.data import needs_data
from megatron_midus.integrations import megatron_lm
from megatron_midus.megatron_compat import let_upstream_start_without_nvcc, use_built_dataset_helpers
from megatron_midus.training.step import BatchShape, make_forward_step


def pretrain() -> None:
    """Trains as the command line says, with the hooks of ``megatron_lm``, and makes the checkpoints readable by our tools."""
    if _backend(sys.argv[1:]) == "gloo":
        pretend_cuda()
    megatron_lm.install_optimizer_overrides()
    use_built_dataset_helpers()
    let_upstream_start_without_nvcc()
    try:
        _call_pretrain()
    finally:  # upstream leaves by sys.exit where a flag says when to
        _complete_checkpoints()


def _call_pretrain() -> None:
    """Before 0.18 ``pretrain()`` parses the command line itself; since then it takes a container of configurations."""
    training = megatron_lm.upstream("megatron.training")
    parts = {
        "train_valid_test_dataset_provider": datasets_provider,
        "model_provider": megatron_lm.model_provider,
        "model_type": ModelType.encoder_or_decoder,
        "forward_step_func": forward_step,
    }
    if "cfg_container" in inspect.signature(training.pretrain).parameters:
        arguments = megatron_lm.upstream("megatron.training.arguments").parse_and_validate_args(
            megatron_lm.extra_args_provider
        )
        container = megatron_lm.upstream("megatron.training.argument_utils").pretrain_cfg_container_from_args(arguments)
        training.pretrain(container, **parts)
    else:
        training.pretrain(**parts, extra_args_provider=megatron_lm.extra_args_provider)


def _complete_checkpoints() -> None:
    try:
        arguments = megatron_lm.upstream("megatron.training").get_args()
    except AssertionError:  # it ended before there were any
        return
    upscaled = megatron_lm.find_upscaled(arguments, required=False)
    if arguments.save and arguments.rank == 0 and upscaled is not None and Path(arguments.save).is_dir():
        for directory in megatron_lm.complete_checkpoints(arguments.save, upscaled.directory):
            print(f"ready for midus convert: {directory}", flush=True)


def datasets_provider(num_samples: Sequence[int], vp_stage: int | None = None) -> tuple[Any, Any, Any]:
    """``train_valid_test_dataset_provider`` of upstream's ``pretrain()``: GPT samples, or mock ones.

    Args:
        num_samples: of train, validation and test.
        vp_stage: virtual pipeline stage.
    """
    arguments = megatron_lm.upstream("megatron.training").get_args()
    blend, blend_per_split = megatron_lm.upstream("megatron.training.utils").get_blend_and_blend_per_split(arguments)
    config = GPTDatasetConfig(
        random_seed=arguments.seed,
        sequence_length=arguments.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=arguments.split,
        path_to_cache=arguments.data_cache_path,
        tokenizer=megatron_lm.upstream("megatron.training").get_tokenizer(),
        reset_position_ids=arguments.reset_position_ids,
        reset_attention_mask=arguments.reset_attention_mask,
        eod_mask_loss=arguments.eod_mask_loss,
        create_attention_mask=False,  # the attention makes the causal mask, get_batch the one between documents
    )
    kind = MockGPTDataset if arguments.mock_data else GPTDataset

    def is_built() -> bool:
        return parallel_state.get_tensor_model_parallel_rank() == 0 and needs_data(
            is_first_stage=parallel_state.is_pipeline_first_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage),
            is_last_stage=parallel_state.is_pipeline_last_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage),
            reset_attention_mask=arguments.reset_attention_mask,
        )

    return BlendedMegatronDatasetBuilder(kind, num_samples, is_built, config).build()


datasets_provider.is_distributed = True  # type: ignore[attr-defined]  # every rank calls it


def forward_step(iterator: Iterator | None, model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
    """``forward_step_func`` of upstream's ``pretrain()``: that of ``midus pretrain``."""
    training = megatron_lm.upstream("megatron.training")
    arguments = training.get_args()
    shape = BatchShape(
        micro_batch_size=arguments.micro_batch_size,
        seq_length=arguments.seq_length,
        reset_attention_mask=arguments.reset_attention_mask,
        eod=training.get_tokenizer().eod if arguments.reset_attention_mask else None,
    )
    return make_forward_step(shape, check_loss=arguments.check_for_nan_in_loss_and_grad)(iterator, model)


# -- without a GPU ---------------------------------------------------------------------------------------------------
def _backend(command_line: Sequence[str]) -> str | None:
    """What ``--distributed-backend`` says."""
    for index, word in enumerate(command_line):
        if word.startswith("--distributed-backend="):
            return word.partition("=")[2]
        if word == "--distributed-backend" and index + 1 < len(command_line):
            return command_line[index + 1]
    return None


def pretend_cuda() -> None:
    """Lets upstream's loop run on the CPU, for a try-out: it refuses to start where torch says that there is no CUDA.

    Raises:
        ValueError: where there is a GPU.
    """
    platform.initialize_distributed("gloo")
    import torch._dynamo.config

    torch._dynamo.config.disable = True  # upstream compiles pieces of a step, and the compiler would ask for the GPU
    torch.cuda.is_available = lambda: True
    torch.cuda.get_device_properties = lambda *_: SimpleNamespace(major=10, minor=0, name="cpu")
    torch.Tensor.pin_memory = lambda self, *_, **__: self  # type: ignore[method-assign]
