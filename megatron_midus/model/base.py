"""The base inside an up-scaled model: what is left of it without the blocks that were added and without adapters."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from megatron.core.models.gpt import GPTModel

from megatron_midus.model.layer import layer_index
from megatron_midus.model.lora import adapters_off
from megatron_midus.upscaling import UpscalePlan


@contextlib.contextmanager
def as_base(gpt: GPTModel, plan: UpscalePlan) -> Iterator[None]:
    """Inside, ``gpt`` is the base in evaluation mode: added blocks are not run and adapters contribute nothing.

    Args:
        gpt: the whole model, not a pipeline stage of it.
        plan: of the model, with ``plan.contains_base``.
    """
    layers, is_training = gpt.decoder.layers, gpt.training
    gpt.eval()
    gpt.decoder.layers = torch.nn.ModuleList(layer for layer in layers if layer_index(layer) in plan.kept_indices)
    try:
        with adapters_off(gpt):
            yield
    finally:
        gpt.decoder.layers = layers
        gpt.train(is_training)
