"""Megatron checkpoints on the disk: layout, checksums, what all ranks stored alike. Below conversion and training."""
