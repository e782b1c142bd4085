"""Head-wise memory as functions of tensors: no module, no process group, no Megatron."""

from megatron_midus.ops.balance import balance_loss
from megatron_midus.ops.dispatch import (
    Observer,
    aggregate_values,
    head_wise_memory,
    select_slots,
    unsupported_reason,
    weigh_slots,
)
from megatron_midus.ops.initialization import calibrated_keys, initialize_parameter
from megatron_midus.ops.reference import transform_query, unit_rms

__all__ = [
    "Observer",
    "aggregate_values",
    "balance_loss",
    "calibrated_keys",
    "head_wise_memory",
    "initialize_parameter",
    "select_slots",
    "transform_query",
    "unit_rms",
    "unsupported_reason",
    "weigh_slots",
]
