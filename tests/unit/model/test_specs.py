"""Layer specs for both kinds of backend; Transformer Engine's through a provider that merely names what it is asked for."""

from __future__ import annotations

import model_processes
import pytest
from launcher import launch
from scenarios import Layout


@pytest.mark.parametrize("qk_layernorm", [False, True])
def test_a_backend_that_fuses_norms(qk_layernorm: bool) -> None:
    (found,) = launch(model_processes.fused_specs, 1, qk_layernorm)
    memory, plain = found["memory"], found["keep"]
    for spec in (memory, plain):
        assert spec["linear_qkv"] == "FusedNormColumnLinear" and spec["core_attention"] == "FusedAttention"
        assert spec["input_layernorm"] == spec["pre_mlp_layernorm"] == "IdentityOp"
        assert spec["q_layernorm"] == spec["k_layernorm"] == ("FusedNorm" if qk_layernorm else "IdentityOp")
        assert spec["keys_map"] == {}
    assert memory["layer"] == "MIDUSMemoryLayer" and memory["linear_proj"] == "HeadWiseMemory"
    assert memory["mlp"] == "IdentityOp"
    assert plain["layer"] == "TransformerLayer" and plain["linear_proj"] == "RowLinear"
    assert plain["mlp"] == "MLP" and plain["linear_fc1"] == "FusedNormColumnLinear"
    assert found["final"] == "FusedNorm"


def test_the_local_backend() -> None:
    (found,) = launch(model_processes.local_specs, 1)
    memory, plain = found["memory"], found["keep"]
    for spec in (memory, plain):
        assert spec["linear_qkv"] == "ColumnParallelLinear" and spec["core_attention"] == "SdpaAttention"
        assert spec["input_layernorm"] == "RMSNorm"
    assert memory["keys_map"] == {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
    assert plain["keys_map"] == {**memory["keys_map"], "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}
    assert found["final"] == "RMSNorm"


def test_a_memory_block_needs_its_settings() -> None:
    assert launch(model_processes.spec_error, 1) == ["block 3 is a Memory block; give its memory settings"]


@pytest.mark.parametrize(
    ("layout", "overrides", "expected"),
    [
        (Layout(pp=2), {}, [[[0, 1, 2]], [[3, 4, 5]]]),
        (Layout(pp=2, vpp=3), {}, [[[0], [2], [4]], [[1], [3], [5]]]),
        (Layout(pp=2), {"num_layers_in_first_pipeline_stage": 2}, [[[0, 1]], [[2, 3, 4, 5]]]),
        (Layout(pp=2), {"pipeline_model_parallel_layout": "Et|tttttL"}, [[[0]], [[1, 2, 3, 4, 5]]]),
    ],
)
def test_stages_hold_their_part_of_the_plan(layout: Layout, overrides: dict, expected: list) -> None:
    assert launch(model_processes.local_indices, 2, 6, layout, **overrides) == expected
