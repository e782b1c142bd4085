"""tools/upscale.py from a Hugging Face directory to one, or to a checkpoint, and every way to ask it for nonsense."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import DTYPE, FEATURED, VOCAB, load_model, logits_of, write_base, write_tokenizer

from megatron_midus.config import ModelConfig
from megatron_midus.conversion.hf_io import SafetensorsReader
from megatron_midus.conversion.megatron_io import MegatronReader
from megatron_midus.upscaling import UpscalePlan

pytestmark = pytest.mark.usefixtures("warm_executable")

TOOLS = Path(__file__).parents[2] / "tools"
MEMORY = ["--memory-num-keys", "16", "--memory-topk", "4", "--memory-latent-size", "8"]


def load_tool(name):
    spec = importlib.util.spec_from_file_location(f"tool_{name}", TOOLS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


upscale = load_tool("upscale")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("bases") / "tiny")


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("bases") / "tied", tie_word_embeddings=True, seed=3)


def run(model, save, *arguments):
    return upscale.main(["--hf-model", str(model), "--save", str(save), *map(str, arguments)])


# -- what comes out --------------------------------------------------------------------------------------------------
FAMILIES = ["llama", "llama2", "llama3", "smollm", "mistral", "qwen2", "qwen3", *FEATURED]


@pytest.mark.parametrize("family", FAMILIES)
def test_midus_equals_its_base_bit_for_bit(tmp_path, family):
    source = write_base(tmp_path / "source", family)
    run(source, tmp_path / "out", "--save-format", "hf", "--num-blocks", 2, *MEMORY, "--memory-query-norm", "rms")
    result = load_model(tmp_path / "out")
    # Its own code, or the package's where another test of this process registered that; they are the same files.
    assert type(result).__name__ == "MidusForCausalLM"
    assert result.config.block_types.count("memory") == 2
    base = load_model(source)
    assert torch.equal(logits_of(result), logits_of(base))
    if family in FEATURED:
        check_other_passes(result, base, source, tmp_path / "out")
    check_what_survives(source, tmp_path / "out", base, result)


def check_other_passes(result, base, source, out):
    """Without the fused attention, token by token with a cache, and in 16 bits the two models are the same as well."""
    ids = torch.arange(3, 17)[None]
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(result.generate(ids, **settings), base.generate(ids, **settings))
    for model in (result, base):
        model.set_attn_implementation("eager")
    assert torch.equal(logits_of(result), logits_of(base))
    halves = [load_model(directory, **{DTYPE: torch.bfloat16}) for directory in (source, out)]
    assert torch.equal(logits_of(halves[0]), logits_of(halves[1]))


def check_what_survives(source, out, base, result):
    """Everything of the base that is not weights, as transformers sees it after loading."""
    from transformers import AutoTokenizer, GenerationConfig

    for name in ("vocab_size", "max_position_embeddings", "rms_norm_eps", "rope_parameters", "tie_word_embeddings",
                 "num_attention_heads", "num_key_value_heads", "bos_token_id", "eos_token_id"):  # fmt: skip
        wanted, found = getattr(base.config, name), getattr(result.config, name)
        if name == "rope_parameters" and "full_attention" in wanted:
            assert result.config.local_rope_theta == wanted["sliding_attention"]["rope_theta"]
            wanted = wanted["full_attention"]
        if name == "rope_parameters":  # what the base's class adds to it is of no effect
            found, wanted = ({k: v for k, v in rope.items() if k in found} for rope in (found, wanted))
        assert found == wanted, name
    assert result.config.head_dim == base.model.layers[0].self_attn.head_dim
    assert result.config.sliding_window == getattr(base.config, "sliding_window", None)
    old, new = (GenerationConfig.from_pretrained(str(d)) for d in (source, out))
    assert old.to_dict() == new.to_dict() and old.top_k == 7
    old, new = (AutoTokenizer.from_pretrained(str(d), trust_remote_code=True) for d in (source, out))
    message = [{"role": "user", "content": "tiny texts"}]
    assert old.apply_chat_template(message, tokenize=False) == new.apply_chat_template(message, tokenize=False) == "user: tiny texts\n"  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("policy", ["llama_pro", "solar"])
def test_plain_policies_keep_the_class_of_every_family(tmp_path, family, policy):
    source = write_base(tmp_path / "source", family)
    run(source, tmp_path / "out", "--save-format", "hf", "--policy", policy, "--num-blocks", 3, "--verify")
    base, result = load_model(source), load_model(tmp_path / "out", trust_remote_code=False)
    assert type(result) is type(base) and type(result).__module__.startswith("transformers.models.")
    assert len(result.model.layers) == 8
    assert torch.equal(logits_of(result), logits_of(base)) == (policy == "llama_pro")
    names = {name for name in result.state_dict() if ".layers.7." in name}
    assert len(names) == len({name for name in base.state_dict() if ".layers.4." in name})  # biases and norms too


def test_identity_is_not_an_accident(tmp_path, base):
    """The same comparison fails once the values are random."""
    run(base, tmp_path / "out", "--save-format", "hf", "--num-blocks", 2, *MEMORY)
    path = tmp_path / "out/model.safetensors"
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if name.endswith("memory.value_bank"):
            tensor.normal_()
    save_file(tensors, path, metadata={"format": "pt"})
    assert not torch.equal(logits_of(load_model(tmp_path / "out")), logits_of(load_model(base)))


@pytest.mark.parametrize(
    "policy, blocks, added, identity",
    [
        ("llama_pro", 2, 2, True),
        ("solar", 3, 3, False),
        ("stack", 7, 7, False),
        ("average", 3, 3, False),
        ("opt_deus", 2, 2, True),
        ("opt_deus_literal", 1, 1, True),
        ("control", 2, 0, True),
        ("none", None, 0, True),
    ],
)
def test_plain_policies_load_without_custom_code(tmp_path, tied, policy, blocks, added, identity):
    from transformers import LlamaForCausalLM

    blocks = [] if blocks is None else ["--num-blocks", blocks]
    run(tied, tmp_path / "out", "--save-format", "hf", "--policy", policy, *blocks, "--verify")
    result, report = LlamaForCausalLM.from_pretrained(str(tmp_path / "out"), output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert len(result.model.layers) == 5 + added
    assert torch.equal(logits_of(result.eval()), logits_of(load_model(tied))) is identity
    assert not list((tmp_path / "out").glob("*.py"))
    config, old = (json.loads((d / "config.json").read_text()) for d in (tmp_path / "out", tied))
    assert config == {**old, "num_hidden_layers": 5 + added}


def test_assets_travel_byte_for_byte(tmp_path, base):
    run(base, tmp_path / "hf", "--save-format", "hf", "--num-blocks", 1, *MEMORY)
    run(base, tmp_path / "mcore", "--num-blocks", 1, *MEMORY)
    iteration = tmp_path / "mcore/iter_0000000"
    names = {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "LICENSE"}
    for name in names | {path.name for path in base.glob("*.jinja")}:
        wanted = (base / name).read_bytes()
        assert (tmp_path / "hf" / name).read_bytes() == (iteration / "hf_assets" / name).read_bytes() == wanted
    assert (iteration / "hf_assets/config.json").read_bytes() == (base / "config.json").read_bytes()
    assert (tmp_path / "hf/README.md").read_text() != (base / "README.md").read_text()
    assert UpscalePlan.load(tmp_path / "hf") == UpscalePlan.load(iteration)


def test_both_formats_hold_the_same_tensors(tmp_path, base):
    arguments = ["--policy", "interleave", "--insert-after", 0, 3, *MEMORY, "--seed", 11]
    run(base, tmp_path / "hf", "--save-format", "hf", *arguments, "--max-shard-size", "100KB")
    run(base, tmp_path / "mcore", *arguments)
    iteration = tmp_path / "mcore/iter_0000000"
    model, plan = ModelConfig.load(iteration), UpscalePlan.load(iteration)
    assert (model.num_layers, model.vocab_size, model.hf_dtype) == (7, VOCAB, "float32")
    assert plan.seed == 11 and plan.source_name == "tiny" and len(plan.source_hash) == 64
    hf, megatron = SafetensorsReader(tmp_path / "hf"), MegatronReader(iteration, model, plan)
    assert set(hf.names()) == set(megatron.names())
    assert all(torch.equal(hf.read(name), megatron.read(name)) for name in hf.names())
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 3
    assert (tmp_path / "mcore/latest_checkpointed_iteration.txt").read_text().strip() == "0"


@pytest.mark.parametrize("asked, written", [("keep", torch.bfloat16), ("float32", torch.float32)])
def test_dtype(tmp_path, asked, written):
    source = write_base(tmp_path / "source", dtype=torch.bfloat16)
    run(source, tmp_path / "out", "--save-format", "hf", "--num-blocks", 2, *MEMORY, "--dtype", asked, "--verify")
    reader = SafetensorsReader(tmp_path / "out")
    assert {reader.dtype(name) for name in reader.names()} == {written}
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert str(written) == f"torch.{config.get('dtype') or config.get('torch_dtype')}"


@pytest.mark.parametrize("save_format", ["hf", "megatron"])
def test_verify_reports(tmp_path, base, capsys, save_format):
    run(
        base,
        tmp_path / "out",
        "--save-format",
        save_format,
        "--num-blocks",
        2,
        *MEMORY,
        "--verify",
        "--dtype",
        "bfloat16",
    )
    assert "bit-equal yes" in capsys.readouterr().out
    run(base, tmp_path / "no", "--save-format", save_format, "--policy", "stack", "--num-blocks", 2, "--verify")
    assert "bit-equal no" in capsys.readouterr().out


def test_verify_catches_a_broken_promise(tmp_path, base, monkeypatch):
    """Values that are not zero: the promise is broken, the tool fails and leaves nothing behind."""
    from megatron_midus.upscaling import initialize

    original = initialize.initialize_parameter

    def spoiled(name, shape, **settings):
        return torch.ones(shape) if name == "value_bank" else original(name, shape, **settings)

    monkeypatch.setattr(initialize, "initialize_parameter", spoiled)
    with pytest.raises(ValueError, match="must compute the base's function and does not"):
        run(base, tmp_path / "out", "--save-format", "hf", "--num-blocks", 2, *MEMORY, "--verify")
    assert not list(tmp_path.iterdir())


def test_dry_run_says_it_all_and_writes_nothing(tmp_path, base, capsys):
    run(base, tmp_path / "out", "--num-blocks", 2, *MEMORY, "--dry-run")
    out = capsys.readouterr().out
    assert "5 -> 7 layers" in out and "blocks follow layers 2, 4" in out
    assert "KV cache bytes/token" in out and "GFLOP/token" in out and "AdamW" in out
    assert not list(tmp_path.iterdir())


def test_calibrated_keys(tmp_path, base):
    text = tmp_path / "text.txt"
    text.write_text("tiny texts about tiny models, " * 40)
    run(base, tmp_path / "drawn", "--save-format", "hf", "--num-blocks", 2, *MEMORY)
    run(
        base, tmp_path / "out", "--save-format", "hf", "--num-blocks", 2, *MEMORY, "--memory-key-init", "calibrated",
        "--calibration-data", text, "--calibration-tokens", 300, "--verify",
    )  # fmt: skip
    drawn, out = SafetensorsReader(tmp_path / "drawn"), SafetensorsReader(tmp_path / "out")
    assert set(drawn.names()) == set(out.names())
    different = {name for name in out.names() if not torch.equal(out.read(name), drawn.read(name))}
    assert different == {f"model.layers.{i}.memory.{half}_keys" for i in (3, 6) for half in ("row", "col")}
    assert entropy_of_usage(tmp_path / "out") > entropy_of_usage(tmp_path / "drawn")


def entropy_of_usage(directory):
    """Entropy of the slots that the first memory reads on some text, nats, mean over its heads."""
    from transformers import AutoTokenizer

    from megatron_midus.ops import select_slots
    from megatron_midus.upscaling.calibration import collect_queries

    model = load_model(directory)
    ids = AutoTokenizer.from_pretrained(str(directory), trust_remote_code=True)(
        "models of texts and texts of models " * 9
    )["input_ids"]
    memory = model.model.layers[3].memory
    queries = collect_queries(model, [torch.tensor(ids)[None, :100]])[3]
    slots = select_slots(queries, memory.row_keys, memory.col_keys, topk=4)[0]
    entropies = []
    for head in range(slots.shape[1]):
        share = torch.bincount(slots[:, head].flatten().long(), minlength=256) / slots[:, head].numel()
        entropies.append(-(share[share > 0] * share[share > 0].log()).sum())
    return torch.stack(entropies).mean()


def test_queries_are_those_of_the_base(tmp_path, base):
    """What a memory sees is the attention output of the layer that its attention was copied from, after its own norm."""
    from megatron_midus.upscaling.calibration import collect_queries

    run(base, tmp_path / "out", "--save-format", "hf", "--insert-after", 4, *MEMORY)
    model, ids = load_model(tmp_path / "out"), torch.arange(3, 20)[None]
    queries = collect_queries(model, [ids, ids])
    assert list(queries) == [5] and queries[5].shape == (34, 6, 8)
    original = load_model(base)
    seen = {}
    attention = original.model.layers[4].self_attn
    attention.o_proj.register_forward_pre_hook(lambda module, args: seen.update(at=args[0]))
    with torch.no_grad():
        hidden = original.model(ids, output_hidden_states=True, use_cache=False)
        # The copy reads what layer 4 wrote; hidden states after the last layer are normed, so undo nothing: run it.
        captured = {}
        original.model.norm.register_forward_pre_hook(lambda module, args: captured.update(at=args[0]))
        original.model(ids, use_cache=False)
        positions = original.model.rotary_emb(captured["at"], torch.arange(17)[None])
        attention(original.model.layers[4].input_layernorm(captured["at"]), position_embeddings=positions, attention_mask=None)  # fmt: skip
    del hidden
    # One attention with and one without a causal mask object: the same sums in another order, fp32.
    torch.testing.assert_close(queries[5][:17], seen["at"].reshape(17, 6, 8), rtol=1e-5, atol=1e-5)


def test_overwrite(tmp_path, base):
    arguments = ["--save-format", "hf", "--policy", "llama_pro"]
    run(base, tmp_path / "out", *arguments, "--num-blocks", 1)
    (tmp_path / "out/left over").write_text("x")
    with pytest.raises(ValueError, match="is not empty"):
        run(base, tmp_path / "out", *arguments, "--num-blocks", 2)
    run(base, tmp_path / "out", *arguments, "--num-blocks", 2, "--overwrite")
    assert not (tmp_path / "out/left over").exists()
    assert UpscalePlan.load(tmp_path / "out").num_layers == 7


def test_parallel_sizes_are_recorded(tmp_path, base):
    run(
        base,
        tmp_path / "out",
        "--num-blocks",
        3,
        *MEMORY,
        "--target-tensor-parallel-size",
        2,
        "--target-pipeline-parallel-size",
        4,
    )
    record = json.loads((tmp_path / "out/iter_0000000/conversion.json").read_text())
    assert record == {"target_tensor_parallel_size": 2, "target_pipeline_parallel_size": 4, "padded_vocab_size": 512}


# -- what is refused -------------------------------------------------------------------------------------------------
def edit_config(**changes):
    def edit(model):
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**config, **changes}))

    return edit


def truncate(model):
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])


def edit_tensors(change):
    """An edit of the tensors of a directory; ``change`` takes them by name."""

    def edit(model):
        tensors = load_file(model / "model.safetensors")
        change(tensors)
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})

    return edit


def shard(model, *, drop=False, twice=False):
    """Two shards and their index, where there was one file; without the second, or with a tensor in both."""
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    parts = dict(list(tensors.items())[:9]), dict(list(tensors.items())[9 - twice :])
    for number, part in enumerate(parts[: 2 - drop]):
        save_file(part, model / f"{number}.safetensors", metadata={"format": "pt"})
    where = {name: f"{number}.safetensors" for number, part in enumerate(parts) for name in part}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


UP = "model.layers.2.mlp.up_proj.weight"
WRONG = [
    (edit_tensors(lambda t: t[UP][1].fill_(float("nan"))), [], f"{UP} .float32. holds 48 values that are NaN"),
    (edit_tensors(lambda t: t[UP][1, 2].fill_(7e4)), ["--dtype", "float16"], "holds 1 values .* or a --dtype"),
    (edit_tensors(lambda t: t.update({UP: t[UP].to(torch.int8)})), [], f"{UP} .* has dtype I8; only"),
    (edit_tensors(lambda t: t.pop(UP)), [], f"missing tensors {UP}"),
    (edit_tensors(lambda t: t.update(more=torch.ones(3))), [], "unexpected tensors more"),
    (lambda m: shard(m, drop=True), [], "1.safetensors is named by .* fetch the missing shard"),
    (lambda m: shard(m, twice=True), [], "is in 0.safetensors and in 1.safetensors; remove one of them"),
    (shutil.rmtree, [], "does not exist; give a local Hugging Face directory"),
    (lambda m: (m / "config.json").unlink(), [], "no Hugging Face model"),
    (lambda m: (m / "model.safetensors").unlink(), [], "holds no weights"),
    (truncate, [], "corrupt or truncated"),
    (lambda m: (m / "tokenizer.json").write_text("{"), [], "tokenizer.json is not valid JSON"),
    (lambda m: write_tokenizer(m, vocab_size=290), [], r"the embedding 263 rows; resize"),
    (edit_config(architectures=["BertModel"]), [], "BertModel is not supported; supported are LlamaForCausalLM"),
    (edit_config(num_hidden_layers=6), [], "missing tensors model.layers.5"),
    (edit_config(num_hidden_layers=4), [], "unexpected tensors model.layers.4"),
    (edit_config(intermediate_size=90), [], r"has shape \[88, 48\]"),
    (edit_config(tie_word_embeddings=True), [], "tie_word_embeddings=true"),
    (edit_config(attention_bias=True), [], r"missing tensors model.layers.0.self_attn.\w_proj.bias"),
    (edit_config(hidden_size=47), [], "hidden_size=47 is not divisible by num_attention_heads=6"),
    (edit_config(head_dim=7), ["--memory-num-keys", "4", "--memory-topk", "2"], "an even number"),
    (None, ["--memory-topk", "65"], "memory_topk=65 is out of range; choose 1 to memory_num_keys=64"),
    (None, ["--memory-topk", "0"], "memory_topk=0"),
    (None, ["--memory-num-keys", "0"], "memory_num_keys=0"),
    (None, ["--memory-num-keys", "50000"], "memory_num_keys=50000"),
    (None, ["--memory-num-heads", "2"], "memory_num_heads=2"),
    (None, ["--memory-key-init", "calibrated"], "give --calibration-data"),
    (None, ["--calibration-data", "setup.py"], "is only used by --memory-key-init calibrated"),
    (None, ["--memory-key-init", "calibrated", "--calibration-data", "no/such/file"], "no/such/file does not exist"),
    (None, ["--num-blocks", "6"], "num_blocks=6"),
    (None, ["--insert-after", "1"], "both say how many blocks are inserted; give one"),
    (None, ["--policy", "solar", "--num-blocks", "9"], "num_blocks=9"),
    (None, ["--policy", "llama_pro", "--memory-topk", "2"], "--memory-topk is a setting of Memory blocks"),
    (None, ["--policy", "none"], "inserts nothing"),
    (None, ["--max-shard-size", "many"], "'many' is not understood"),
    (None, ["--target-tensor-parallel-size", "4"], "choose one of"),
    (None, ["--target-pipeline-parallel-size", "2"], "7 layers"),
    (None, ["--seq-length", "0"], "--seq-length"),
]


@pytest.mark.parametrize("damage, arguments, message", WRONG)
def test_wrong_inputs_leave_nothing_behind(tmp_path, base, damage, arguments, message):
    model, save = tmp_path / "model", tmp_path / "results/out"
    shutil.copytree(base, model)
    if damage:
        damage(model)
    with pytest.raises(ValueError, match=message) as caught:
        run(model, save, "--num-blocks", 2, *arguments)
    assert "\n" not in str(caught.value)
    assert not save.exists() and not list(tmp_path.glob("results/*"))


def test_empty_calibration_text(tmp_path, base):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"txt": "not"}\n')
    arguments = ["--num-blocks", 2, *MEMORY, "--memory-key-init", "calibrated", "--calibration-data"]
    with pytest.raises(ValueError, match="holds no text"):
        run(base, tmp_path / "out", *arguments, tmp_path / "empty.txt")
    with pytest.raises(ValueError, match="2: no JSON object with a 'text' entry"):
        run(base, tmp_path / "out", *arguments, tmp_path / "bad.jsonl")
    assert not (tmp_path / "out").exists()


def test_wrong_outputs(tmp_path, base):
    (tmp_path / "file").write_text("x")
    for save, message in [(tmp_path / "file", "not a directory"), (base, "replace the base"), (base.parent, "replace the base")]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            run(base, save, "--num-blocks", 2, "--overwrite")
    with pytest.raises(ValueError, match="--save is missing"):
        upscale.main(["--hf-model", str(base), "--num-blocks", "2"])


def test_as_a_command(tmp_path, base):
    def command(*arguments):
        return subprocess.run([sys.executable, TOOLS / "upscale.py", *map(str, arguments)], capture_output=True, text=True)  # fmt: skip

    good = command("--hf-model", base, "--save", tmp_path / "out", "--num-blocks", 2, *MEMORY)
    assert good.returncode == 0 and "written:" in good.stdout and (tmp_path / "out/iter_0000000").is_dir()
    bad = command("--hf-model", tmp_path / "nowhere", "--save", tmp_path / "no", "--num-blocks", 2)
    assert bad.returncode == 1 and not (tmp_path / "no").exists()
    assert bad.stderr.strip().splitlines()[-1].startswith("error: model directory")
    assert "Traceback" not in bad.stderr


def test_help():
    help_text = upscale.make_parser().format_help()
    for flag in ("--memory-num-keys", "--max-shard-size", "--target-tensor-parallel-size", "default: 5GB"):
        assert flag in help_text


def test_settings_in_a_file(tmp_path, base, capsys):
    file = tmp_path / "upscale.yaml"
    file.write_text(f"hf-model: {base}\ndry-run: true\ninsert-after: [0]\nmemory_num_keys: 16\nmemory-topk: 4\n")
    assert upscale.main(["--config", str(file), "--memory-topk", "3"]) == 0
    printed = capsys.readouterr().out
    assert upscale.main(["--hf-model", str(base), "--dry-run", "--insert-after", "0", "--memory-num-keys", "16", "--memory-topk", "3"]) == 0  # fmt: skip
    assert capsys.readouterr().out == printed != ""
    file.write_text("num-keys: 16")
    with pytest.raises(ValueError, match="'num-keys' is no flag"):
        upscale.main(["--config", str(file)])
