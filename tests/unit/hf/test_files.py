"""Saving and loading: the directory stands alone, tied and resized embeddings, dtypes, device placement."""

import ast
import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_midus.hf import CODE_FILES, MidusForCausalLM, register


@pytest.fixture
def directory(midus, tmp_path):
    midus.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_saved_directory_loads_with_its_own_code(midus, directory, tokens, tmp_path):
    """In a process of its own: in this one another test may have registered the package's classes, which then win."""
    assert {path.name for path in CODE_FILES} <= {path.name for path in directory.iterdir()}
    for path in CODE_FILES:
        assert (directory / path.name).read_bytes() == path.read_bytes()
    program = f"""
import torch
from transformers import AutoModel, AutoModelForCausalLM
tokens = torch.load("tokens.pt")
model = AutoModelForCausalLM.from_pretrained({str(directory)!r}, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules") and not model.training
decoder = AutoModel.from_pretrained({str(directory)!r}, trust_remote_code=True)
with torch.no_grad():
    torch.save([model(tokens).logits, decoder(tokens).last_hidden_state], "results.pt")
model.save_pretrained("again")  # what was loaded can be handed on
"""
    torch.save(tokens, tmp_path / "tokens.pt")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
    logits, hidden_state = torch.load(tmp_path / "results.pt")
    with torch.no_grad():
        assert torch.equal(logits, midus(tokens).logits)
        assert torch.equal(hidden_state, midus.model(tokens).last_hidden_state)
    assert {path.name for path in directory.iterdir()} == {path.name for path in (tmp_path / "again").iterdir()}
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert again == json.loads((directory / "config.json").read_text())


def test_names_of_tensors(midus, directory):
    names = set(load_file(directory / "model.safetensors"))
    attention = {f"{x}_proj.weight" for x in "qkv"}
    memory = {f"mem_attn.{n}" for n in attention} | {
        f"memory.{n}" for n in ("row_keys", "col_keys", "value_bank", "head_proj")
    }
    transformer = {f"self_attn.{n}" for n in attention | {"o_proj.weight"}} | {
        f"mlp.{n}_proj.weight" for n in ("gate", "up", "down")
    }
    expected = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    for index, kind in enumerate(midus.config.block_types):
        own = memory if kind == "memory" else transformer | {"post_attention_layernorm.weight"}
        expected |= {f"model.layers.{index}.{name}" for name in own | {"input_layernorm.weight"}}
    assert names == expected


def test_names_of_every_memory_parameter(make_base, upscale):
    settings = {"memory_query_norm": "rms", "memory_query_temperature": True, "memory_attention": "full"}
    linear = upscale(make_base("qwen3"), **settings, memory_output_projection="linear")
    silu = upscale(make_base("qwen2"), **settings, memory_output_projection="silu")
    names = {name for model in (linear, silu) for name in model.state_dict()}
    for name in ("attn_proj", "query_norm", "log_temperature", "mixer", "gate"):
        assert f"model.layers.1.memory.{name}" in names
    assert {"model.layers.1.mem_attn.q_norm.weight", "model.layers.1.mem_attn.k_proj.bias"} <= names


def test_code_files_import_nothing_but_torch_and_transformers():
    """What is in a ``try`` may be missing: transformers does not ask for it either."""
    imported = set()
    for path in CODE_FILES:
        tree = ast.parse(path.read_text())
        optional = {id(inner) for node in ast.walk(tree) if isinstance(node, ast.Try) for inner in ast.walk(node)}
        for node in (node for node in ast.walk(tree) if id(node) not in optional):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add("." * node.level + (node.module or "").split(".")[0])
    ours = {".configuration_midus", ".lookup_midus"}
    assert imported - sys.stdlib_module_names == {"torch", "transformers", *ours}


@pytest.mark.slow
def test_loads_without_this_package(directory, tmp_path):
    """In a process that cannot import it, from a directory that is elsewhere."""
    shutil.move(directory, tmp_path / "moved")
    program = f"""
import sys
sys.modules["megatron_midus"] = sys.modules["megatron"] = None  # any import of them fails
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "moved")!r}, trust_remote_code=True)
print(model(torch.arange(3, 9)[None]).logits.abs().sum().item() > 0)
"""
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert out.stdout.strip() == "True", out.stderr


def test_in_process_registration(midus, directory, tokens):
    register()
    register()
    assert type(AutoConfig.from_pretrained(directory, trust_remote_code=False)).__module__.startswith("megatron_midus")
    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=False)
    assert type(model) is MidusForCausalLM
    fresh = AutoModelForCausalLM.from_config(midus.config)
    assert type(fresh) is MidusForCausalLM


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes(midus, tmp_path, tokens, dtype):
    midus.to(dtype).save_pretrained(tmp_path)
    model = MidusForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, midus(tokens).logits)  # a cast and a loaded model are the same


@pytest.mark.parametrize("tie", [True, False])
def test_tied_and_resized_embeddings(make_base, upscale, tmp_path, tokens, tie):
    model = upscale(make_base(tie_word_embeddings=tie), random_values=True)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tie
    before = model(tokens).logits
    model.resize_token_embeddings(110)
    assert model.config.vocab_size == 110 and model.lm_head.weight.shape[0] == 110
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tie
    # fewer or more columns may be blocked otherwise
    torch.testing.assert_close(model(tokens).logits[..., :97], before, rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path)
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) == (not tie)
    loaded = MidusForCausalLM.from_pretrained(tmp_path)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tie
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    loaded(tokens, labels=tokens).loss.backward()


def test_sharded_files(midus, tmp_path, tokens):
    midus.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    assert torch.equal(MidusForCausalLM.from_pretrained(tmp_path)(tokens).logits, midus(tokens).logits)


def test_missing_memory_tensors_start_fresh_and_loaded_ones_stay(midus, directory):
    """A guard against initialisers that overwrite what was just loaded."""
    from safetensors.torch import save_file

    state = load_file(directory / "model.safetensors")
    lost = state.pop("model.layers.1.memory.head_proj")
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    loaded = MidusForCausalLM.from_pretrained(directory).state_dict()
    for name, tensor in state.items():
        assert torch.equal(loaded[name], tensor), name
    fresh = loaded["model.layers.1.memory.head_proj"]
    assert fresh.isfinite().all() and 0.2 < fresh.std() < 0.6 and not torch.equal(fresh, lost)  # 1/sqrt(7) = 0.38


def test_device_map_offloads_whole_blocks(directory, midus, tokens, tmp_path):
    pytest.importorskip("accelerate")
    placed = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    placed |= {f"model.layers.{index}": "disk" if index in (1, 3) else "cpu" for index in range(5)}
    model = MidusForCausalLM.from_pretrained(directory, device_map=placed, offload_folder=str(tmp_path / "offload"))
    assert model.model.layers[1].memory.value_bank.device.type == "meta"
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, midus(tokens).logits)
    assert set(model._no_split_modules) == {"MidusDecoderLayer", "MidusMemoryLayer"}


def test_meta_device_knows_the_shapes(midus, tokens):
    with torch.device("meta"):
        model = MidusForCausalLM(midus.config)
        assert model(tokens.to("meta")).logits.shape == (3, 13, 97)
    model.to_empty(device="cpu")
    model.load_state_dict(midus.state_dict())
    assert torch.equal(model.eval()(tokens).logits, midus(tokens).logits)


def test_broken_field_is_named_before_the_model_is_made(midus):
    midus.config.memory_topk = 99
    with pytest.raises(ValueError, match="memory_topk=99"):
        MidusForCausalLM(midus.config)
