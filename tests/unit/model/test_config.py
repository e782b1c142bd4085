"""What make_transformer_config refuses, and in which words."""

from __future__ import annotations

import model_processes
from launcher import launch

NO_MEMORY = None
CASES = [
    ({}, {}, {"tensor_model_parallel_size": 3}, "num_attention_heads=4 is not divisible by tensor_model_parallel_size=3; "
     "choose one of [1, 2, 4]"),
    ({"ffn_hidden_size": 42}, {}, {"tensor_model_parallel_size": 4}, "ffn_hidden_size=42 is not divisible by "
     "tensor_model_parallel_size=4; choose one of [1, 2]"),
    ({}, {"memory_variant": "block", "memory_num_heads": 2}, {"tensor_model_parallel_size": 4},
     "memory_num_heads=2 is not divisible by tensor_model_parallel_size=4; choose one of [1, 2]"),
    ({"num_attention_heads": 12, "num_query_groups": 4, "ffn_hidden_size": 48}, NO_MEMORY,
     {"tensor_model_parallel_size": 6}, "num_query_groups=4 is neither a multiple nor a divisor of "
     "tensor_model_parallel_size=6; choose one of [1, 2, 4, 12]"),
    ({}, {}, {"pipeline_model_parallel_size": 4}, "num_layers=6 (4 base and 2 added ones) is not divisible by 4 pipeline "
     "stages and chunks; choose one of [1, 2, 3, 6]"),
    ({}, {}, {"virtual_pipeline_model_parallel_size": 2}, "needs pipeline_model_parallel_size of at least 2"),
    ({}, {}, {"sequence_parallel": True}, "sequence_parallel needs tensor_model_parallel_size of at least 2"),
    ({}, {}, {"context_parallel_size": 2}, "context_parallel_size=2 needs Transformer Engine"),
    ({}, {}, {"apply_query_key_layer_scaling": True}, "depends on layer numbers, which inserted blocks shift"),
    ({}, {}, {"window_attn_skip_freq": 2}, "depends on layer numbers"),
    ({}, {}, {"no_rope_freq": 4}, "depends on layer numbers"),
    ({}, {}, {"first_last_layers_bf16": True}, "depends on layer numbers"),
    ({}, {}, {"num_moe_experts": 4}, "num_moe_experts=4 is not that of the model, which has None; leave it out"),
    ({}, {}, {"hiden_dropout": 0.1}, "hiden_dropout is not a field of Megatron's TransformerConfig"),
    ({}, {}, {"recompute_method": "uniform"}, "belong to recompute_granularity=full"),
    ({}, {}, {"recompute_granularity": "selective", "recompute_modules": ["layernorm"]}, "needs Transformer Engine"),
    ({"num_layers": 5}, {}, {}, "the model has 5 layers and the plan 6"),
    ({"hidden_size": 26}, {}, {}, "hidden_size=26 is not divisible by num_attention_heads=4"),
    ({}, {}, {"tensor_model_parallel_size": 4, "sequence_parallel": True}, "no error"),
    ({}, {}, {"pipeline_model_parallel_size": 4, "num_layers_in_first_pipeline_stage": 1,
              "num_layers_in_last_pipeline_stage": 1}, "no error"),
    ({}, {}, {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 3, "overlap_p2p_comm": False},
     "overlap_p2p_comm=False trains wrongly with several model chunks"),
    # Chunks that only the layout string knows of.
    ({}, {}, {"pipeline_model_parallel_size": 2, "pipeline_model_parallel_layout": "Et|tt|tt|tL",
              "batch_p2p_comm": True}, "batch_p2p_comm=True trains wrongly with several model chunks"),
    ({}, {}, {"pipeline_model_parallel_size": 2, "pipeline_model_parallel_layout": "Et|tt|tt|L"},
     "places 5 blocks and the model has 6"),
    ({}, {}, {"pipeline_model_parallel_size": 2, "pipeline_model_parallel_layout": "Et|tt|tt|tL"}, "no error"),
    ({}, {}, {"recompute_granularity": "full", "bf16": True, "hidden_dropout": 0.1}, "no error"),
]  # fmt: skip


def test_refusals_name_value_and_remedy() -> None:
    (found,) = launch(model_processes.config_errors, 1, [case[:3] for case in CASES])
    for (*_, expected), message in zip(CASES, found):
        assert expected in message and "\n" not in message


def test_settings_that_megatron_gets_wrong_by_itself() -> None:
    (config,) = launch(model_processes.config_fields, 1)
    assert config["overlap_p2p_comm"] and not config["batch_p2p_comm"]
    assert config["hetereogenous_dist_checkpoint"]
    assert (config["hidden_dropout"], config["attention_dropout"]) == (0.0, 0.0)
    assert config["window_size"] == (4, 0)
    assert config["kv_channels"] == 10
