"""tools/convert_checkpoint.py there and back: every tensor equal, every file of the tokenizer equal, every misuse named."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from tiny_models import FEATURED, DictSource, load_model, logits_of, randomize, write_base, write_tokenizer

from megatron_midus.checkpoint.checksums import write_checksums
from megatron_midus.checkpoint.layout import iteration_directory, write_latest_iteration
from megatron_midus.config import MemoryConfig, ModelConfig
from megatron_midus.conversion import megatron_io
from megatron_midus.conversion.directories import write_megatron_checkpoint
from megatron_midus.conversion.families import from_hf_config
from megatron_midus.conversion.hf_io import SafetensorsReader, read_hf_config
from megatron_midus.conversion.megatron_io import MegatronReader
from megatron_midus.upscaling import PLAN_FILE, UpscalePlan, make_plan
from megatron_midus.upscaling.tensors import model_shapes

pytestmark = pytest.mark.usefixtures("warm_executable")

TOOL = Path(__file__).parents[2] / "tools/convert_checkpoint.py"
FAMILIES = ["llama", "llama2", "llama3", "smollm", "mistral", "qwen2", "qwen3"]
MEMORY = MemoryConfig(memory_num_keys=16, memory_topk=4, memory_latent_size=8)
SETTINGS = {
    "hive": MEMORY,
    "full": dataclasses.replace(MEMORY, memory_variant="full", memory_query_norm="rms", memory_query_temperature=True),
    "block": dataclasses.replace(MEMORY, memory_variant="block", memory_num_heads=2, memory_score_activation="relu"),
    "gated": dataclasses.replace(MEMORY, memory_output_projection="silu", memory_attention="full"),
    "mixed": dataclasses.replace(MEMORY, memory_output_projection="linear", memory_score_activation="sigmoid"),
}


def load_tool():
    spec = importlib.util.spec_from_file_location("tool_convert_checkpoint", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


convert = load_tool()


def run(load, save, to, *arguments):
    return convert.main(["--load", str(load), "--save", str(save), "--to", to, *map(str, arguments)])


def random_checkpoint(directory, base, policy="interleave", *, memory=MEMORY, dtype=torch.float32, **plan):
    """A checkpoint as training leaves it: every value random, value banks too."""
    model = from_hf_config(read_hf_config(base))
    plan = plan or {"num_blocks": 2}
    plan = make_plan(policy, num_layers=5, memory=memory if policy == "interleave" else None, **plan)
    generator = torch.Generator().manual_seed(8)
    tensors = {}
    for name, shape in model_shapes(model, plan).items():
        scale = 1.0 if "memory" in name else 0.3
        tensors[name] = (torch.randn(shape, generator=generator) * scale + name.endswith("norm.weight")).to(dtype)
    write_megatron_checkpoint(DictSource(tensors), directory, assets=base, model=model, plan=plan)
    return tensors, model, plan


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("bases") / "tiny")


# -- round trips -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family, tied", [("llama", False), ("llama", True), ("llama3", False), ("mistral", False), ("qwen2", True), ("qwen3", False), *((name, False) for name in FEATURED)])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hugging_face_there_and_back(tmp_path, family, tied, dtype):
    source = write_base(tmp_path / "source", family, dtype=dtype, tie_word_embeddings=tied)
    run(source, tmp_path / "megatron", "megatron", "--verify", "tensors")
    run(tmp_path / "megatron", tmp_path / "hf", "hf", "--verify", "tensors")
    before, after = SafetensorsReader(source), SafetensorsReader(tmp_path / "hf")
    assert set(before.names()) == set(after.names())
    for name in before.names():
        assert torch.equal(before.read(name), after.read(name)) and before.dtype(name) == after.dtype(name)
    for path in source.iterdir():
        if path.name not in ("model.safetensors", "README.md"):
            assert (tmp_path / "hf" / path.name).read_bytes() == path.read_bytes(), path.name
    assert torch.equal(logits_of(load_model(source)), logits_of(load_model(tmp_path / "hf", trust_remote_code=False)))


@pytest.mark.parametrize("memory", SETTINGS)
def test_midus_there_and_back_with_random_values(tmp_path, base, memory):
    tensors, model, plan = random_checkpoint(tmp_path / "trained", base, memory=SETTINGS[memory])
    run(tmp_path / "trained", tmp_path / "hf", "hf", "--max-shard-size", "200KB")
    hf = SafetensorsReader(tmp_path / "hf")
    assert set(hf.names()) == set(tensors)
    assert all(torch.equal(hf.read(name), tensor) for name, tensor in tensors.items())
    result = load_model(tmp_path / "hf")
    state = result.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in tensors.items())
    assert logits_of(result).isfinite().all()

    run(tmp_path / "hf", tmp_path / "again", "megatron", "--target-tensor-parallel-size", "2")
    iteration = tmp_path / "again/iter_0000000"
    assert UpscalePlan.load(iteration) == plan
    again = MegatronReader(iteration, ModelConfig.load(iteration), plan)
    assert all(torch.equal(again.read(name), tensor) for name, tensor in tensors.items())

    run(tmp_path / "again", tmp_path / "hf again", "hf")
    assert (tmp_path / "hf again/config.json").read_bytes() == (tmp_path / "hf/config.json").read_bytes()
    names = {path.name for path in (tmp_path / "hf").iterdir() if ".safetensors" not in path.name}
    assert names <= {path.name for path in (tmp_path / "hf again").iterdir()}


def test_a_fine_tuned_export_goes_back_to_megatron(tmp_path, base):
    _, _, plan = random_checkpoint(tmp_path / "trained", base, num_blocks=2)
    run(tmp_path / "trained", tmp_path / "hf", "hf")
    model = load_model(tmp_path / "hf")
    randomize(model, seed=9).save_pretrained(tmp_path / "tuned")
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    (tmp_path / "tuned" / "README.md").unlink(missing_ok=True)
    carried = tmp_path / "tuned" / PLAN_FILE
    assert UpscalePlan.load(tmp_path / "tuned") == plan
    for name in ("with the plan", "without"):
        if name == "without":
            carried.unlink()
        run(tmp_path / "tuned", tmp_path / f"{name}/megatron", "megatron", "--verify", "tensors")
        found = UpscalePlan.load(tmp_path / f"{name}/megatron/iter_0000000")
        assert found.blocks == plan.blocks and found.memory == plan.memory
        assert (found == plan) == (name == "with the plan")
        run(tmp_path / f"{name}/megatron", tmp_path / f"{name}/hf", "hf")
        again = load_model(tmp_path / f"{name}/hf").state_dict()
        assert set(again) == set(expected)
        assert all(torch.equal(again[key], tensor) for key, tensor in expected.items())


@pytest.mark.parametrize("policy", ["llama_pro", "solar", "stack", "average", "opt_deus", "control"])
def test_plain_policies_there_and_back(tmp_path, base, policy):
    tensors, model, plan = random_checkpoint(tmp_path / "trained", base, policy, num_blocks=3)
    run(tmp_path / "trained", tmp_path / "hf", "hf")
    result = load_model(tmp_path / "hf", trust_remote_code=False)
    assert type(result).__name__ == "LlamaForCausalLM" and len(result.model.layers) == plan.num_layers
    assert all(torch.equal(result.state_dict()[name], tensor) for name, tensor in tensors.items())
    run(tmp_path / "hf", tmp_path / "again", "megatron", "--verify", "tensors")
    assert UpscalePlan.load(tmp_path / "again/iter_0000000") == plan


def test_later_iterations_and_dtypes(tmp_path, base):
    tensors, model, plan = random_checkpoint(tmp_path / "trained", base)
    root = tmp_path / "trained"
    shutil.copytree(iteration_directory(root, 0), iteration_directory(root, 40))
    write_latest_iteration(root, 40)
    run(root, tmp_path / "latest", "hf", "--dtype", "bfloat16", "--verify", "logits")
    assert "trained for 40 iterations" in (tmp_path / "latest/README.md").read_text()
    reader = SafetensorsReader(tmp_path / "latest")
    assert all(torch.equal(reader.read(name), tensor.bfloat16()) for name, tensor in tensors.items())
    assert json.loads((tmp_path / "latest/config.json").read_text())["dtype"] == "bfloat16"
    run(root, tmp_path / "first", "hf", "--ckpt-step", 0)
    assert "not trained since" in (tmp_path / "first/README.md").read_text()
    run(iteration_directory(root, 0), tmp_path / "direct", "hf")


def test_export_takes_the_dtype_of_the_source(tmp_path):
    """fp32 master weights in training, bf16 again in the export."""
    source = write_base(tmp_path / "source", dtype=torch.bfloat16)
    run(source, tmp_path / "megatron", "megatron", "--dtype", "float32")
    iteration = tmp_path / "megatron/iter_0000000"
    assert ModelConfig.load(iteration).hf_dtype == "float32"
    dataclasses.replace(ModelConfig.load(iteration), hf_dtype="bfloat16").save(iteration)
    write_checksums(iteration)
    run(tmp_path / "megatron", tmp_path / "hf", "hf")
    before, after = SafetensorsReader(source), SafetensorsReader(tmp_path / "hf")
    assert all(torch.equal(before.read(name), after.read(name)) for name in before.names())


def test_the_card_knows_training_and_evaluation(tmp_path, base):
    random_checkpoint(tmp_path / "trained", base)
    iteration = iteration_directory(tmp_path / "trained", 0)
    state = {"training_state": {"consumed_train_tokens": 40_960, "train": "inserted"}, "iteration": 40}
    torch.save(state, iteration / "common.pt")
    write_checksums(iteration)
    iteration.rename(iteration_directory(tmp_path / "trained", 40))
    (tmp_path / "e.json").write_text('{"models": [{"name": "tiny", "results": {"prose": {"perplexity": 33.3}}}]}')
    run(tmp_path / "trained", tmp_path / "hf", "hf", "--ckpt-step", 40, "--evaluation", tmp_path / "e.json")
    card = (tmp_path / "hf/README.md").read_text()
    assert "40 iterations on 40,960 tokens" in card and "| tiny | prose | perplexity | 33.3 |" in card
    assert "- trained: " in card


def test_generation_after_the_export(tmp_path, base):
    from transformers import AutoTokenizer

    random_checkpoint(tmp_path / "trained", base)
    run(tmp_path / "trained", tmp_path / "hf", "hf")
    tokenizer = AutoTokenizer.from_pretrained(str(tmp_path / "hf"), trust_remote_code=True)
    model = load_model(tmp_path / "hf")
    ids = tokenizer("tiny texts", return_tensors="pt").input_ids
    with torch.no_grad():
        cached, full = (model.generate(ids, max_new_tokens=9, do_sample=False, use_cache=c) for c in (True, False))
    assert torch.equal(cached, full) and cached.shape[1] > ids.shape[1]


# -- refusals --------------------------------------------------------------------------------------------------------
def edit_json(name, **changes):
    def edit(directory):
        path = directory / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


def edit_blocks(change):
    """An edit of the plan's list of blocks, as somebody with an editor would make it."""

    def edit(directory):
        plan = json.loads((directory / PLAN_FILE).read_text())
        change(plan["blocks"])
        (directory / PLAN_FILE).write_text(json.dumps(plan))

    return edit


def truncate_largest(directory):
    path = max(directory.glob("*.distcp"), key=lambda path: path.stat().st_size)
    path.write_bytes(path.read_bytes()[:-5])


def other_plan(directory):
    make_plan("interleave", num_layers=5, num_blocks=2, memory=dataclasses.replace(MEMORY, memory_num_keys=17)).save(directory)  # fmt: skip


def plan_of_other_layers(directory):
    make_plan("interleave", num_layers=5, insert_after=[0, 1], memory=MEMORY).save(directory)


WRONG_MEGATRON = [
    (lambda i: shutil.rmtree(i.parent), [], "checkpoint directory .* does not exist"),
    (lambda i: (i.parent / "latest_checkpointed_iteration.txt").unlink(), [], "not a Megatron checkpoint"),
    (shutil.rmtree, [], r"iter_0000000 does not exist; .* holds iterations \[\]"),
    (None, ["--ckpt-step", "7"], "iter_0000007 does not exist"),
    (lambda i: (i / "model_config.json").unlink(), [], "model_config.json does not exist"),
    (lambda i: (i / "model_config.json").write_text("{"), [], "model_config.json is not valid JSON"),
    (edit_json("model_config.json", colour=1), [], "unknown entries"),
    (edit_json("model_config.json", num_layers=5), [], "num_layers=5, midus_plan.json 7"),
    (edit_json("model_config.json", ffn_hidden_size=90), [], "ffn_hidden_size is 90 in model_config.json and 88"),
    (lambda i: (i / PLAN_FILE).unlink(), [], "midus_plan.json does not exist"),
    (edit_json(PLAN_FILE, schema_version=9), [], "schema version 9"),
    (other_plan, [], "ask for"),
    (plan_of_other_layers, [], "has no tensor"),
    (lambda i: shutil.rmtree(i / "hf_assets"), [], "hf_assets does not exist"),
    (lambda i: write_tokenizer(i / "hf_assets", vocab_size=290), [], "263 rows"),
    (truncate_largest, [], "is truncated"),
    (lambda i: (i / ".metadata").unlink(), [], "not a whole torch_dist checkpoint"),
    (None, ["--max-shard-size", "x"], "'x' is not understood"),
    (None, ["--evaluation", "no/such.json"], "no/such.json does not exist"),
    (lambda i: (i / "common.pt").write_bytes(b"PK"), [], "common.pt is corrupt"),
    (edit_json(PLAN_FILE, num_base_layers=3), [], "midus_plan.json"),
    (edit_blocks(lambda blocks: blocks[1].update(source=[9])), [], "midus_plan.json.*9"),
    (edit_blocks(lambda blocks: blocks[1].update(kind="mamba")), [], "midus_plan.json.*mamba"),
    (edit_blocks(lambda blocks: blocks.pop()), [], "num_layers=7, midus_plan.json 6"),
    (edit_json(PLAN_FILE, colour="red"), [], "expected entries"),
    (edit_json(PLAN_FILE, memory={"memory_num_keys": -1}), [], "memory_num_keys=-1"),
    (edit_json(PLAN_FILE, memory=None), [], "has no memory settings"),
    (edit_json(PLAN_FILE, schema_version=None), [], "schema version None"),
    (lambda i: (i / PLAN_FILE).write_text("[]"), [], "midus_plan.json"),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, base):
    directory = tmp_path_factory.mktemp("checkpoints") / "trained"
    random_checkpoint(directory, base)
    return directory


@pytest.mark.parametrize("damage, arguments, message", WRONG_MEGATRON)
def test_wrong_checkpoints(tmp_path, checkpoint, damage, arguments, message):
    shutil.copytree(checkpoint, tmp_path / "load")
    if damage:
        damage(tmp_path / "load/iter_0000000")
    with pytest.raises(ValueError, match=message) as caught:
        # Files that do not belong together, as they look where no checksums tell.
        run(tmp_path / "load", tmp_path / "results/out", "hf", "--no-verify-checkpoint", *arguments)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("results/*"))


def test_weights_that_broke_in_training_are_not_exported(tmp_path, base):
    """Written by threads of the tool; what the others had written by then goes as well."""
    tensors, model, plan = random_checkpoint(tmp_path / "trained", base)
    layout = megatron_io.megatron_layout(model, plan)
    iteration = tmp_path / "trained/iter_0000000"
    tensors[VALUES][3, 1] = float("nan")
    state = {key: megatron_io.fuse([tensors[name] for name in names], model) for key, names in layout.items()}
    for path in iteration.glob("*.distcp"):
        path.unlink()
    (iteration / ".metadata").unlink()
    dcp.save(state, checkpoint_id=iteration)
    with pytest.raises(ValueError, match=rf"{VALUES} \(float32\) holds 1 values that are NaN"):
        run(tmp_path / "trained", tmp_path / "results/out", "hf", "--no-verify-checkpoint", "--workers", 3)
    assert not list(tmp_path.glob("results/*"))


@pytest.mark.parametrize("name", ["midus_plan.json", ".metadata", "hf_assets/config.json", "common.pt"])
def test_a_flipped_bit_is_one_line(name, tmp_path, checkpoint):
    shutil.copytree(checkpoint, tmp_path / "load")
    path = tmp_path / "load/iter_0000000" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} is damaged"):
        run(tmp_path / "load", tmp_path / "results/out", "hf")
    assert not list(tmp_path.glob("results/*"))


def edit_tensors(change):
    """An edit of the tensors of a directory; ``change`` takes them by name."""

    def edit(directory):
        tensors = load_file(directory / "model.safetensors")
        change(tensors)
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})

    return edit


VALUES = "model.layers.3.memory.value_bank"
WRONG_HF = [
    (edit_tensors(lambda t: t[VALUES].fill_(float("inf"))), [], f"{VALUES} .* NaN or infinite"),
    (edit_tensors(lambda t: t.update({VALUES: t[VALUES].to(torch.int32)})), [], f"{VALUES} .* has dtype I32"),
    (edit_tensors(lambda t: t.pop(VALUES)), [], f"missing tensors {VALUES}"),
    (edit_tensors(lambda t: t.update(more=torch.ones(3))), [], "unexpected tensors more"),
    (edit_tensors(lambda t: t.update({VALUES: t[VALUES][1:].clone()})), [], f"{VALUES} has shape"),
    (edit_json(PLAN_FILE, schema_version=9), [], "schema version 9"),
    (edit_json(PLAN_FILE, schema_version="1"), [], "schema version 1"),
    (edit_blocks(lambda blocks: blocks[1].update(source=[9])), [], "midus_plan.json.*9"),
    (edit_blocks(lambda blocks: blocks.reverse()), [], "block_types"),
    (lambda d: write_tokenizer(d, vocab_size=290), [], "263 rows"),
    (lambda d: (d / "tokenizer.json").write_text("{"), [], "tokenizer.json is not valid JSON"),
    (edit_json("config.json", num_hidden_layers=6), [], "num_hidden_layers=6, midus_plan.json 7"),
    (edit_json("config.json", memory_num_keys=8), [], "memory_num_keys is 8 in config.json and 16"),
    (edit_json("config.json", block_types=["memory"] * 7), [], "block_types"),
    (lambda d: (d / "model.safetensors").write_bytes(b"xyz"), [], "corrupt or truncated"),
    (edit_json("config.json", architectures=["GPTX"], model_type="gptx"), [], "GPTX is not supported"),
    (None, ["--target-tensor-parallel-size", "4"], "choose one of"),
    (None, ["--target-pipeline-parallel-size", "3"], "7 layers"),
    (None, ["--ckpt-step", "3"], "leave it out with --to megatron"),
    (None, ["--evaluation", "x.json"], "leave it out with --to megatron"),
    (None, ["--weights", "ema"], "--weights ema chooses weights of a Megatron checkpoint"),
    (None, ["--workers", "0"], "--workers 0 is out of range"),
    (None, ["--make-vocab-size-divisible-by", "0"], "at least 1"),
]


@pytest.fixture(scope="module")
def exported(tmp_path_factory, checkpoint):
    directory = tmp_path_factory.mktemp("exports") / "midus"
    run(checkpoint, directory, "hf")
    return directory


@pytest.mark.parametrize("damage, arguments, message", WRONG_HF)
def test_wrong_hugging_face_directories(tmp_path, exported, damage, arguments, message):
    shutil.copytree(exported, tmp_path / "load")
    if damage:
        damage(tmp_path / "load")
    with pytest.raises(ValueError, match=message) as caught:
        run(tmp_path / "load", tmp_path / "results/out", "megatron", *arguments)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("results/*"))


def test_the_wrong_way_round(tmp_path, base, checkpoint):
    with pytest.raises(ValueError, match="looks like a Hugging Face directory"):
        run(base, tmp_path / "out", "hf")
    with pytest.raises(ValueError, match="looks like a Megatron checkpoint"):
        run(checkpoint, tmp_path / "out", "megatron")
    with pytest.raises(ValueError, match="would replace what is loaded"):
        run(checkpoint / "iter_0000000", checkpoint, "hf", "--overwrite")


@pytest.mark.parametrize("family", ["qwen3", pytest.param("solar", marks=pytest.mark.slow)])  # fmt: skip
def test_verify_compares_megatron_with_hugging_face(tmp_path, family, capfd):
    """From a Hugging Face directory with every tensor random, and back; reported with figures."""
    policy = family if family in ("llama_pro", "solar") else "interleave"
    source = write_base(tmp_path / "base", family if family in FAMILIES else "qwen2", dtype=torch.bfloat16)
    random_checkpoint(tmp_path / "trained", source, policy, num_blocks=2, dtype=torch.bfloat16)
    run(tmp_path / "trained", tmp_path / "hf", "hf", "--verify")
    run(tmp_path / "hf", tmp_path / "again", "megatron", "--verify", "logits", "--dtype", "float32")
    reports = [line for line in capfd.readouterr().out.splitlines() if "KL" in line]
    assert len(reports) == 2 and all("argmax agreement 100.00 %" in line for line in reports)


def test_verify_catches_a_layout_that_is_its_own_inverse(tmp_path, base, monkeypatch):
    """Gate and up exchanged on the way in and on the way out: every tensor comes back, and the function is another."""
    fuse, split = megatron_io.fuse, megatron_io.split
    turn = lambda parts: parts[::-1] if len(parts) == 2 else parts  # noqa: E731
    monkeypatch.setattr(megatron_io, "fuse", lambda parts, model: fuse(turn(parts), model))
    monkeypatch.setattr(megatron_io, "split", lambda *arguments: turn(split(*arguments)))
    run(base, tmp_path / "tensors", "megatron", "--verify", "tensors")
    with pytest.raises(ValueError, match="do not compute the same function: max difference"):
        run(base, tmp_path / "logits", "megatron", "--verify", "logits")
    assert not (tmp_path / "logits").exists()


def test_verify_catches_a_wrong_layout(tmp_path, base, monkeypatch):
    """A fused tensor whose parts were swapped is found when it is read back."""
    original = megatron_io.fuse
    monkeypatch.setattr(megatron_io, "fuse", lambda parts, model: original(parts[::-1] if len(parts) == 2 else parts, model))  # fmt: skip
    with pytest.raises(ValueError, match="gate_proj.weight differs by up to"):
        run(base, tmp_path / "out", "megatron", "--verify", "tensors")
    assert not (tmp_path / "out").exists()


def test_as_a_command(tmp_path, checkpoint):
    def command(*arguments):
        return subprocess.run([sys.executable, TOOL, *map(str, arguments)], capture_output=True, text=True)

    good = command("--load", checkpoint, "--save", tmp_path / "out", "--to", "hf", "--verify", "tensors")
    assert (
        good.returncode == 0 and "tensors are equal" in good.stdout and (tmp_path / "out/modeling_midus.py").is_file()
    )
    bad = command("--load", tmp_path / "nowhere", "--save", tmp_path / "no", "--to", "hf")
    assert bad.returncode == 1 and "Traceback" not in bad.stderr and not (tmp_path / "no").exists()
    assert bad.stderr.strip() == f"error: checkpoint directory {tmp_path / 'nowhere'} does not exist"
    assert "any size can load it" in " ".join(convert.make_parser().format_help().split())
