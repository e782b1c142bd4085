"""Upstream Megatron-LM's pretrain() on a MIDUS model: its pretrain_gpt.py with this project's hooks.

Needs a checkout of https://github.com/NVIDIA/Megatron-LM at core_v0.16.1 on PYTHONPATH; see docs/megatron_lm.md.
"""

import pretrain_gpt  # upstream's: batches, loss, datasets
import torch
from megatron.core.enums import ModelType
from megatron.training import get_args, pretrain

from megatron_midus import cli
from megatron_midus.integrations import megatron_lm


def main() -> None:
    megatron_lm.install_optimizer_overrides()
    pretrain_gpt.train_valid_test_datasets_provider.is_distributed = True
    pretrain(
        pretrain_gpt.train_valid_test_datasets_provider,
        megatron_lm.model_provider,
        ModelType.encoder_or_decoder,
        pretrain_gpt.forward_step,
        extra_args_provider=megatron_lm.extra_args_provider,
        get_embedding_ranks=pretrain_gpt.get_embedding_ranks,
    )
    args = get_args()
    if args.save and torch.distributed.get_rank() == 0:
        for directory in megatron_lm.complete_checkpoints(args.save, megatron_lm.find_upscaled(args).directory):
            print(f"ready for tools/convert_checkpoint.py: {directory}")


if __name__ == "__main__":
    cli.run(main)
