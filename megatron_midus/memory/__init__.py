"""The head-wise memory as a Megatron-Core module."""

from megatron_midus.memory.layer import HeadWiseMemory, partition_axis

__all__ = ["HeadWiseMemory", "partition_axis"]
