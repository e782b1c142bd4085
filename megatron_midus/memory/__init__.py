"""The head-wise memory as a Megatron-Core module."""

from megatron_midus.memory.balance import BalanceLoss
from megatron_midus.memory.layer import HeadWiseMemory, partition_axis
from megatron_midus.memory.runtime import MemoryRuntime, ValuePlacement

__all__ = ["BalanceLoss", "HeadWiseMemory", "MemoryRuntime", "ValuePlacement", "partition_axis"]
