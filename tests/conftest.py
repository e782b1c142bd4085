"""Lets Triton's kernels run as numpy where there is no GPU."""

import os

import torch

# Read when triton is first imported, so it is set before any test module is. A process that a test starts to compile
# kernels has to unset it.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
