"""Depth up-scaling: plans, policies and the initialisation of new tensors."""

from megatron_midus.upscaling.plan import PLAN_FILE, Block, UpscalePlan
from megatron_midus.upscaling.policies import POLICIES, make_plan

__all__ = ["PLAN_FILE", "POLICIES", "Block", "UpscalePlan", "make_plan"]
