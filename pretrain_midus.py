"""Entry point of training: ``torchrun --nproc-per-node N pretrain_midus.py …`` or ``python pretrain_midus.py …``."""

import os

# Before torch starts them: threads of OpenMP that have nothing to do sleep instead of keeping the cores from the threads
# of the look-up (docs/performance.md).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from megatron_midus.training.main import run

# Checkpoint writers are processes of their own that import this file again.
if __name__ == "__main__":
    run()
