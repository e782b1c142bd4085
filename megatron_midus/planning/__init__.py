"""What a training layout costs each rank, from the plan alone: parameters, memory, traffic, time. Imports no Megatron."""

from megatron_midus.planning.footprint import RankMemory, rank_memory
from megatron_midus.planning.layout import Layout, Workload
from megatron_midus.planning.traffic import Message, rank_traffic

__all__ = ["Layout", "Message", "RankMemory", "Workload", "rank_memory", "rank_traffic"]
