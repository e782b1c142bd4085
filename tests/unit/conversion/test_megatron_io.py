"""Canonical tensors through Megatron's names, fused layouts and files, and back without the loss of a bit."""

import dataclasses
import json
import shutil

import pytest
import torch
from tiny_models import DictSource

from megatron_midus.checkpoint.training_record import TrainingRecord
from megatron_midus.config import MemoryConfig, ModelConfig
from megatron_midus.conversion.megatron_io import (
    MegatronReader,
    check_parallel_sizes,
    fuse,
    megatron_layout,
    split,
    write_model_tensors,
)
from megatron_midus.conversion.streaming import in_parallel
from megatron_midus.upscaling import make_plan
from megatron_midus.upscaling.tensors import model_shapes

MODEL = ModelConfig(
    num_layers=3,
    hidden_size=24,
    ffn_hidden_size=40,
    num_attention_heads=6,
    num_query_groups=2,
    kv_channels=10,
    vocab_size=37,
    max_position_embeddings=64,
)
MEMORY = MemoryConfig(memory_num_keys=7, memory_topk=3, memory_latent_size=5)
PLAN = make_plan("interleave", num_layers=3, num_blocks=2, memory=MEMORY)


def random_source(model=MODEL, plan=PLAN, dtype=torch.float32):
    generator = torch.Generator().manual_seed(2)
    shapes = model_shapes(model, plan)
    return DictSource({name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()})


# -- layouts ---------------------------------------------------------------------------------------------------------
def test_query_key_value_rows_lie_per_group():
    """Rows numbered by hand: group 0 has query heads 0 to 2, group 1 heads 3 to 5."""
    model = dataclasses.replace(MODEL, kv_channels=2)
    query = torch.arange(12.0)[:, None]  # heads 0 .. 5, two channels each
    key, value = 100 + torch.arange(4.0)[:, None], 200 + torch.arange(4.0)[:, None]
    fused = fuse([query, key, value], model)
    assert fused[:, 0].tolist() == [0, 1, 2, 3, 4, 5, 100, 101, 200, 201, 6, 7, 8, 9, 10, 11, 102, 103, 202, 203]
    assert all(torch.equal(a, b) for a, b in zip(split(fused, 3, model), (query, key, value)))


@pytest.mark.parametrize("heads, groups", [(6, 6), (6, 2), (6, 1), (5, 5), (8, 4)])
@pytest.mark.parametrize("trailing", [(24,), ()])
def test_fuse_and_split_are_inverses(heads, groups, trailing):
    model = dataclasses.replace(MODEL, num_attention_heads=heads, num_query_groups=groups)
    parts = [torch.randn(n * 10, *trailing) for n in (heads, groups, groups)]
    fused = fuse(parts, model)
    assert fused.shape == ((heads + 2 * groups) * 10, *trailing)
    again = split(fused, 3, model)
    assert all(torch.equal(a, b) and b.is_contiguous() for a, b in zip(parts, again))


def test_gate_comes_before_up():
    gate, up = torch.randn(40, 24), torch.randn(40, 24)
    fused = fuse([gate, up], MODEL)
    assert torch.equal(fused[:40], gate) and torch.equal(fused[40:], up)
    assert torch.equal(split(fused, 2, MODEL)[1], up)


def test_layout_of_a_block_by_hand():
    layout = megatron_layout(MODEL, PLAN)
    memory = {key: names for key, names in layout.items() if key.startswith("decoder.layers.2.")}
    assert PLAN.block_types[2] == "memory"
    at = "decoder.layers.2.self_attention."
    assert memory == {
        at + "linear_qkv.layer_norm_weight": ("model.layers.2.input_layernorm.weight",),
        at + "linear_qkv.weight": tuple(f"model.layers.2.mem_attn.{letter}_proj.weight" for letter in "qkv"),
        at + "linear_proj.row_keys": ("model.layers.2.memory.row_keys",),
        at + "linear_proj.col_keys": ("model.layers.2.memory.col_keys",),
        at + "linear_proj.values": ("model.layers.2.memory.value_bank",),
        at + "linear_proj.head_proj": ("model.layers.2.memory.head_proj",),
    }
    assert layout["decoder.layers.0.mlp.linear_fc1.weight"] == (
        "model.layers.0.mlp.gate_proj.weight",
        "model.layers.0.mlp.up_proj.weight",
    )
    assert "output_layer.weight" in layout
    assert "output_layer.weight" not in megatron_layout(dataclasses.replace(MODEL, tie_word_embeddings=True), PLAN)


# -- files -----------------------------------------------------------------------------------------------------------
MODELS = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "bias": {"add_qkv_bias": True},
    "head norms": {"qk_layernorm": True},
    "experts": {"num_moe_experts": 3, "moe_ffn_hidden_size": 11},
}
MEMORIES = {
    "hive": {},
    "full": {"memory_variant": "full"},
    "block": {"memory_variant": "block", "memory_num_heads": 3},
    "everything": {
        "memory_query_norm": "rms",
        "memory_query_temperature": True,
        "memory_output_projection": "silu",
        "memory_attention": "full",
    },
    "mixer": {"memory_output_projection": "linear"},
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("memory", MEMORIES)
def test_round_trip(tmp_path, model, memory):
    model = dataclasses.replace(MODEL, **MODELS[model])
    plan = dataclasses.replace(PLAN, memory=dataclasses.replace(MEMORY, **MEMORIES[memory]))
    source = random_source(model, plan)
    write_model_tensors(source, tmp_path, model, plan, padded_vocab=64)
    reader = MegatronReader(tmp_path, model, plan)
    assert set(reader.names()) == set(source.names())
    for name in source.names():
        assert torch.equal(reader.read(name), source.read(name)), name
        assert reader.shape(name) == source.shape(name) and reader.dtype(name) == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_is_kept(tmp_path, dtype):
    source = random_source(dtype=dtype)
    write_model_tensors(source, tmp_path, MODEL, PLAN)
    reader = MegatronReader(tmp_path, MODEL, PLAN)
    for name in source.names():
        assert reader.dtype(name) == reader.read(name).dtype == dtype
        assert torch.equal(reader.read(name), source.read(name))


def test_megatron_itself_reads_it(tmp_path):
    """Shapes and files as Megatron-Core sees them; loading into a model is a test of several processes."""
    from megatron.core.dist_checkpointing import load_tensors_metadata
    from megatron.core.dist_checkpointing.core import check_is_distributed_checkpoint

    write_model_tensors(random_source(), tmp_path, MODEL, PLAN, padded_vocab=64, training=TrainingRecord(iteration=3))
    assert check_is_distributed_checkpoint(str(tmp_path))
    stored = {key: tensor.global_shape for key, tensor in load_tensors_metadata(str(tmp_path)).items()}
    assert set(stored) == set(megatron_layout(MODEL, PLAN))
    assert stored["embedding.word_embeddings.weight"] == (64, 24)
    assert stored["decoder.layers.0.self_attention.linear_qkv.weight"] == (100, 24)
    assert torch.load(tmp_path / "common.pt")["iteration"] == 3


def test_several_threads_write_and_read(tmp_path):
    source, seen = random_source(), []
    write_model_tensors(source, tmp_path, MODEL, PLAN, padded_vocab=64, workers=4, progress=seen.append)
    assert sorted(seen) == sorted(source.names())
    reader = MegatronReader(tmp_path, MODEL, PLAN)
    shuffled = sorted(source.names() * 3, key=lambda name: hash(name[::-1]))
    for name, tensor in in_parallel(lambda name: (name, reader.read(name)), shuffled, 4):
        assert torch.equal(tensor, source.read(name)), name


def test_values_that_are_not_finite_are_not_written(tmp_path):
    source = random_source()
    source.tensors["model.layers.2.memory.value_bank"][3, 1] = float("nan")
    with pytest.raises(ValueError, match="layers.2.memory.value_bank .float32. holds 1 values that are NaN"):
        write_model_tensors(source, tmp_path, MODEL, PLAN)
    assert not (tmp_path / "metadata.json").exists()


def test_reads_only_what_it_is_asked_for(tmp_path):
    """Writing asks for each tensor once, so memory holds one at a time."""
    asked = []

    class Counting(DictSource):
        def read(self, name):
            asked.append(name)
            return super().read(name)

    source = random_source()
    write_model_tensors(Counting(source.tensors), tmp_path, MODEL, PLAN)
    assert sorted(asked) == sorted(source.names())


def test_optimizer_state_is_ignored(tmp_path):
    """As after training: keys of other parts lie in the same files."""
    import torch.distributed.checkpoint as dcp

    plan = make_plan("none", num_layers=3)
    source = random_source(plan=plan)
    layout = megatron_layout(MODEL, plan)
    state = {key: fuse([source.read(name) for name in names], MODEL) for key, names in layout.items()}
    state |= {f"optimizer.state.exp_avg.{key}": torch.ones_like(tensor) for key, tensor in state.items()}
    dcp.save({**state, "rng_state/shard_0_1": torch.ones(3)}, checkpoint_id=tmp_path)
    (tmp_path / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist"}))
    reader = MegatronReader(tmp_path, MODEL, plan)
    assert all(torch.equal(reader.read(name), source.read(name)) for name in source.names())


# -- refusals --------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def good(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoint")
    write_model_tensors(random_source(), directory, MODEL, PLAN)
    return directory


def largest(directory):
    return max(directory.glob("*.distcp"), key=lambda path: path.stat().st_size)


DAMAGE = [
    (lambda d: (d / "metadata.json").unlink(), "not a whole torch_dist checkpoint"),
    (lambda d: (d / ".metadata").unlink(), "not a whole torch_dist checkpoint"),
    (lambda d: (d / ".metadata").write_bytes(b"xx"), "is corrupt"),
    (lambda d: (d / ".metadata").write_bytes((d / ".metadata").read_bytes()[:99]), "is corrupt"),
    (lambda d: largest(d).unlink(), "is missing; the checkpoint is not whole"),
    (lambda d: largest(d).write_bytes(largest(d).read_bytes()[:-9]), "is truncated"),
    (lambda d: [p.write_bytes(b"\0" * p.stat().st_size) for p in d.glob("*.distcp")], "is corrupt"),
]


@pytest.mark.parametrize("damage, message", DAMAGE)
def test_damaged_checkpoints(good, tmp_path, damage, message):
    directory = tmp_path / "damaged"
    shutil.copytree(good, directory)
    damage(directory)
    with pytest.raises(ValueError, match=message):
        reader = MegatronReader(directory, MODEL, PLAN)
        for name in reader.names():
            reader.read(name)


MISMATCHES = [
    (MODEL, make_plan("interleave", num_layers=3, num_blocks=3, memory=MEMORY), "has no tensor decoder.layers.1.self"),
    (MODEL, make_plan("none", num_layers=3), "has no tensor decoder.layers.2.self_attention.linear_proj.weight"),
    (MODEL, dataclasses.replace(PLAN, memory=dataclasses.replace(MEMORY, memory_num_keys=8)), r"linear_proj.row_keys has shape \[6, 7, 5\]"),
    (MODEL, dataclasses.replace(PLAN, memory=dataclasses.replace(MEMORY, memory_query_norm="rms")), "no tensor .*query_norm"),
    (dataclasses.replace(MODEL, vocab_size=64), PLAN, r"word_embeddings.weight has shape \[37, 24\]"),
    (dataclasses.replace(MODEL, ffn_hidden_size=44), PLAN, "linear_fc1.weight has shape"),
    (dataclasses.replace(MODEL, tie_word_embeddings=True), PLAN, "does not know: output_layer.weight"),
]  # fmt: skip


@pytest.mark.parametrize("model, plan, message", MISMATCHES)
def test_plans_and_models_of_other_checkpoints(good, model, plan, message):
    with pytest.raises(ValueError, match=message):
        MegatronReader(good, model, plan)


def test_mixed_dtypes_in_one_fused_tensor(tmp_path):
    source = random_source()
    name = "model.layers.0.self_attn.k_proj.weight"
    source.tensors[name] = source.tensors[name].half()
    with pytest.raises(ValueError, match="k_proj.weight.*different dtypes"):
        write_model_tensors(source, tmp_path, MODEL, PLAN)


@pytest.mark.parametrize("tp, pp", [(1, 1), (2, 1), (1, 5), (2, 5)])
def test_parallel_sizes_that_fit(tp, pp):
    check_parallel_sizes(MODEL, PLAN, tensor_parallel_size=tp, pipeline_parallel_size=pp)


@pytest.mark.parametrize(
    "tp, pp, message",
    [
        (4, 1, r"target_tensor_parallel_size=4; choose one of \[1, 2\]"),
        (3, 1, "num_query_groups=2"),
        (0, 1, "at least 1"),
        (1, 2, r"5 layers .* target_pipeline_parallel_size=2; choose one of \[1, 5\]"),
    ],
)
def test_parallel_sizes_that_do_not(tp, pp, message):
    with pytest.raises(ValueError, match=message):
        check_parallel_sizes(MODEL, PLAN, tensor_parallel_size=tp, pipeline_parallel_size=pp)


def test_query_groups_shared_by_ranks():
    model = dataclasses.replace(MODEL, num_query_groups=1)
    check_parallel_sizes(model, PLAN, tensor_parallel_size=2, pipeline_parallel_size=1)


@pytest.mark.parametrize("workers", [1, 4])
def test_what_goes_wrong_while_writing_is_told_as_it_is(tmp_path, workers):
    """DCP wraps it in an exception that is no Exception; here the cause comes out."""

    class Failing(DictSource):
        def read(self, name):
            if name.endswith("layers.2.memory.value_bank"):
                raise OSError("No space left on device")
            return super().read(name)

    with pytest.raises(OSError, match="No space left"):
        write_model_tensors(Failing(random_source().tensors), tmp_path, MODEL, PLAN, workers=workers)
    assert not (tmp_path / "metadata.json").exists()
