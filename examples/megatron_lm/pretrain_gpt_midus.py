"""Upstream Megatron-LM's pretrain() on a MIDUS model, with its flags, data, logs and checkpoints; see docs/megatron_lm.md."""

from megatron_midus import cli
from megatron_midus.integrations.megatron_lm_loop import pretrain

if __name__ == "__main__":
    cli.run(pretrain)
