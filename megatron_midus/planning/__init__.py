"""What a training layout costs each rank, from the plan alone: parameters, memory, traffic, time. Imports no Megatron."""

from megatron_midus.planning.footprint import RankMemory, rank_memory
from megatron_midus.planning.parallel_layout import ParallelLayout, Workload
from megatron_midus.planning.traffic import Message, rank_traffic

__all__ = ["ParallelLayout", "Message", "RankMemory", "Workload", "rank_memory", "rank_traffic"]
