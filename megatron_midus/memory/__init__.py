"""The head-wise memory as a Megatron-Core module."""

from megatron_midus.memory.balance import BalanceLoss
from megatron_midus.memory.layer import HeadWiseMemory, ValuePlacement, partition_axis

__all__ = ["BalanceLoss", "HeadWiseMemory", "ValuePlacement", "partition_axis"]
