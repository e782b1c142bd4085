"""Keys of the weights in checkpoints, and what is said to checkpoints that do not fit."""

from __future__ import annotations

import model_processes
from launcher import launch
from scenarios import Setting


def test_keys_are_those_of_the_documentation() -> None:
    """The local backend writes the keys of the backend that fuses norms, and no ``_extra_state``."""
    setting = Setting(memory={"memory_query_norm": "rms"}, model={"qk_layernorm": True, "add_qkv_bias": True})
    (found,) = launch(model_processes.checkpoint_keys, 1, setting)
    attention = "decoder.layers.2.self_attention."
    memory = {key.removeprefix(attention): shape for key, shape in found.items() if key.startswith("decoder.layers.2.")}
    assert memory == {
        "linear_qkv.layer_norm_weight": (24,),
        "linear_qkv.weight": (80, 24),
        "linear_qkv.bias": (80,),
        "q_layernorm.weight": (10,),
        "k_layernorm.weight": (10,),
        "linear_proj.query_norm": (4, 10),
        "linear_proj.row_keys": (4, 9, 5),
        "linear_proj.col_keys": (4, 9, 5),
        "linear_proj.values": (81, 7),
        "linear_proj.head_proj": (4, 7, 6),
    }
    plain = {key.removeprefix("decoder.layers.0.") for key in found if key.startswith("decoder.layers.0.")}
    assert plain == {
        "self_attention.linear_qkv.layer_norm_weight",
        "self_attention.linear_qkv.weight",
        "self_attention.linear_qkv.bias",
        "self_attention.q_layernorm.weight",
        "self_attention.k_layernorm.weight",
        "self_attention.linear_proj.weight",
        "mlp.linear_fc1.layer_norm_weight",
        "mlp.linear_fc1.weight",
        "mlp.linear_fc2.weight",
    }
    rest = {key for key in found if not key.startswith("decoder.layers.")}
    assert rest == {"embedding.word_embeddings.weight", "decoder.final_layernorm.weight", "output_layer.weight"}


def test_a_checkpoint_that_does_not_fit_is_named() -> None:
    (found,) = launch(model_processes.load_errors, 1)
    beside = "build the model from the plan and the architecture that lie beside the checkpoint"
    memory = "decoder.layers.2.self_attention.linear_proj."
    assert found["missing"] == f"DIR/saved lacks 2 tensors of this model, first {memory}log_temperature; {beside}"
    assert found["unexpected"] == f"DIR/saved holds 2 tensors that this model lacks, first {memory}mixer; {beside}"
    assert found["shape"] == (f"{memory}head_proj in DIR/saved has shape [4, 7, 6]; the model needs [4, 9, 6]")
    assert found["vocabulary"] == (
        "embedding.word_embeddings.weight in DIR/saved has shape [37, 24]; the model needs [50, 24]"
    )
    for name in ("no checkpoint", "no directory", "truncated"):
        assert found[name].startswith("DIR/") and "cannot be read as a Megatron checkpoint" in found[name], found[name]
        assert "\n" not in found[name]
