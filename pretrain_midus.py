"""Entry point of training: ``torchrun --nproc-per-node N pretrain_midus.py …`` or ``python pretrain_midus.py …``."""

from megatron_midus.training.main import run

# Checkpoint writers are processes of their own that import this file again.
if __name__ == "__main__":
    run()
