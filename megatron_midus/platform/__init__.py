"""The only place that knows whether this is CUDA over NCCL or a CPU over Gloo. Importing it changes nothing."""

from megatron_midus.platform.cpu_mapping import CPU, activate_cpu_mapping
from megatron_midus.platform.device import (
    apex_available,
    cpu_multiplies_bf16,
    describe,
    device,
    is_cpu,
    require_apex,
    require_transformer_engine,
    transformer_engine_available,
)
from megatron_midus.platform.fused_adam import FusedAdam, install_fused_adam
from megatron_midus.platform.process_group import check_backend, initialize_distributed, name_of_this_start

__all__ = [
    "CPU",
    "FusedAdam",
    "activate_cpu_mapping",
    "apex_available",
    "check_backend",
    "cpu_multiplies_bf16",
    "describe",
    "device",
    "initialize_distributed",
    "install_fused_adam",
    "is_cpu",
    "name_of_this_start",
    "require_apex",
    "require_transformer_engine",
    "transformer_engine_available",
]
