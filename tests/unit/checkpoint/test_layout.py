"""Iterations are found, assets are told from weights, and every wrong directory is named."""

import pytest

from megatron_midus.checkpoint.layout import (
    copy_assets,
    find_checkpoint,
    is_asset,
    iteration_directory,
    read_latest_iteration,
    write_latest_iteration,
)


def checkpoint(root, *iterations):
    for iteration in iterations:
        iteration_directory(root, iteration).mkdir(parents=True)
    write_latest_iteration(root, iterations[-1])
    return root


def test_finds_the_latest_or_a_certain_iteration(tmp_path):
    checkpoint(tmp_path, 0, 20, 12345678)
    assert find_checkpoint(tmp_path) == (tmp_path / "iter_12345678", 12345678)
    assert find_checkpoint(tmp_path, 20) == (tmp_path / "iter_0000020", 20)
    assert find_checkpoint(tmp_path / "iter_0000000") == (tmp_path / "iter_0000000", 0)
    assert read_latest_iteration(tmp_path / "iter_0000000") is None


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        find_checkpoint(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no latest_checkpointed_iteration.txt"):
        find_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="looks like a Hugging Face directory"):
        find_checkpoint(tmp_path)
    checkpoint(tmp_path, 1, 2)
    with pytest.raises(ValueError, match=r"iter_0000003 does not exist; .* holds iterations \[1, 2\]"):
        find_checkpoint(tmp_path, 3)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("release")
    with pytest.raises(ValueError, match="'release', not an iteration number"):
        find_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "name, asset",
    [
        ("config.json", True),
        ("tokenizer.json", True),
        ("tokenizer.model", True),
        ("tokenizer_config.json", True),
        ("generation_config.json", True),
        ("chat_template.jinja", True),
        ("vocab.json", True),
        ("merges.txt", True),
        ("LICENSE", True),
        ("model.safetensors", False),
        ("model-00001-of-00002.safetensors", False),
        ("model.safetensors.index.json", False),
        ("model.safetensors.index.fp16.json", False),
        ("model.fp16.safetensors", False),
        ("pytorch_model.bin", False),
        ("pytorch_model.bin.index.json", False),
        ("consolidated.00.pth", False),
        ("model.gguf", False),
        ("modeling_midus.py", False),
        ("configuration_midus.py", False),
        ("midus_plan.json", False),
        ("README.md", False),
        (".gitattributes", False),
    ],
)
def test_which_files_travel(name, asset):
    assert is_asset(name) is asset


def test_copy_is_byte_for_byte(tmp_path):
    source, target = tmp_path / "source", tmp_path / "a/b"
    (source / "additional_chat_templates").mkdir(parents=True)
    (source / "original").mkdir()
    (source / "original/weights.txt").write_text("not an asset")
    (source / "additional_chat_templates/rag.jinja").write_text("{{ x }}")
    (source / "tokenizer.json").write_bytes(b'{ "odd"  :\r\n "spacing" }')
    (source / "config.json").write_text("{}")
    (source / "model.safetensors").write_bytes(b"x")
    assert copy_assets(source, target, skip=["config.json"]) == ["additional_chat_templates", "tokenizer.json"]
    assert (target / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert sorted(p.name for p in target.rglob("*")) == ["additional_chat_templates", "rag.jinja", "tokenizer.json"]
