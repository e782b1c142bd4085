"""Where a run begins, and which model it trains."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_midus.checkpoint.layout import iteration_directory, write_latest_iteration
from megatron_midus.config import MemoryConfig, ModelConfig
from megatron_midus.config.checkpoint import CheckpointConfig
from megatron_midus.training.architecture import resolve_architecture, resolve_model
from megatron_midus.training.arguments import parse_arguments
from megatron_midus.training.checkpoint.source import Source, find_source
from megatron_midus.upscaling import make_plan

MEMORY = MemoryConfig(memory_num_keys=5, memory_topk=2)
MODEL = ModelConfig(
    num_layers=3,
    hidden_size=48,
    ffn_hidden_size=100,
    num_attention_heads=6,
    num_query_groups=2,
    kv_channels=8,
    vocab_size=63,
    max_position_embeddings=77,
)


def checkpoint(root: Path, *iterations: int, policy: str = "interleave") -> Path:
    """A checkpoint directory without tensors."""
    memory = MEMORY if policy == "interleave" else None
    base_layers = 2 if policy != "none" else 3
    num_blocks = None if policy == "none" else 1
    plan = make_plan(policy, num_layers=base_layers, num_blocks=num_blocks, memory=memory)
    for iteration in iterations:
        directory = iteration_directory(root, iteration)
        directory.mkdir(parents=True)
        plan.save(directory)
        MODEL.save(directory)
        write_latest_iteration(root, iteration)
    return root


def arguments(flags: str = ""):
    return parse_arguments(["--mock-data", "--lr", "1e-3", "--train-iters", "3", *flags.split()])


def test_the_latest_iteration_is_resumed(tmp_path):
    root = checkpoint(tmp_path / "a", 0, 5)
    assert find_source(CheckpointConfig(load=str(root))) == Source(root / "iter_0000005", 5, resume=True)
    assert find_source(CheckpointConfig(load=str(root), ckpt_step=0)).iteration == 0
    assert find_source(CheckpointConfig(load=str(root), finetune=True)) == Source(root / "iter_0000005", 5)


def test_an_empty_load_begins_afresh_or_from_the_pretrained_checkpoint(tmp_path):
    base, run = checkpoint(tmp_path / "base", 0), tmp_path / "run"
    assert find_source(CheckpointConfig()) == Source(None)
    assert find_source(CheckpointConfig(load=str(run), save=str(run))) == Source(None)
    pretrained = CheckpointConfig(load=str(run), save=str(run), pretrained_checkpoint=str(base))
    assert find_source(pretrained) == Source(base / "iter_0000000", 0)
    run.mkdir()
    (run / ".iter_0000002.partial").mkdir()  # left by a killed save
    (run / "run.yaml").write_text("lr: 0.1")  # written before the first step
    assert find_source(CheckpointConfig(load=str(run))) == Source(None)
    assert find_source(pretrained) == Source(base / "iter_0000000", 0)
    checkpoint(run, 2)
    assert find_source(pretrained) == Source(run / "iter_0000002", 2, resume=True)


@pytest.mark.parametrize(
    "config", [{}, {"save": "other"}, {"finetune": True}, {"exit_on_missing_checkpoint": True}, {"ckpt_step": 2}]
)
def test_a_missing_load_is_an_error(config, tmp_path):
    with pytest.raises(ValueError, match="absent"):
        find_source(CheckpointConfig(load=str(tmp_path / "absent"), **config))


def test_a_directory_of_something_else_is_an_error(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="looks like a Hugging Face directory"):
        find_source(CheckpointConfig(load=str(tmp_path)))


def test_the_model_is_the_checkpoints(tmp_path):
    source = find_source(CheckpointConfig(load=str(checkpoint(tmp_path, 0))))
    architecture = resolve_architecture(arguments("--hidden-size 48"), source, tokenizer_vocab_size=None)
    assert architecture.model == MODEL and architecture.plan.memory == MEMORY
    assert architecture.train == "inserted" and architecture.assets is None


@pytest.mark.parametrize(
    ("policy", "train"), [("interleave", "inserted"), ("llama_pro", "inserted"), ("solar", "all"), ("none", "all")]
)
def test_what_learns_follows_the_policy_unless_said(policy, train, tmp_path):
    source = Source(iteration_directory(checkpoint(tmp_path, 0, policy=policy), 0))
    assert resolve_architecture(arguments(), source, tokenizer_vocab_size=None).train == train
    assert resolve_architecture(arguments("--train all"), source, tokenizer_vocab_size=None).train == "all"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--hidden-size 64", ["hidden_size=64", "hidden_size=48"]),
        ("--num-layers 2", ["num_layers=2", "num_layers=3"]),
        ("--tie-word-embeddings", ["tie_word_embeddings=True", "tie_word_embeddings=False"]),
        ("--memory-topk 3", ["memory_topk=3", "memory_topk=2"]),
    ],
)
def test_contradictions_name_both_values(flags, words, tmp_path):
    source = find_source(CheckpointConfig(load=str(checkpoint(tmp_path, 0))))
    with pytest.raises(ValueError) as caught:
        resolve_architecture(arguments(flags), source, tokenizer_vocab_size=None)
    assert all(word in str(caught.value) for word in words)


def test_a_plan_that_does_not_belong_to_the_model_is_refused(tmp_path):
    directory = iteration_directory(checkpoint(tmp_path, 0), 0)
    MODEL.with_layers([0] * 4).save(directory)
    with pytest.raises(ValueError, match="the plan has 3 blocks and model_config.json says num_layers=4"):
        resolve_architecture(arguments(), Source(directory), tokenizer_vocab_size=None)


@pytest.mark.parametrize("flag", ["--save", "--pretrained-checkpoint"])
def test_directories_of_another_model_are_refused(flag, tmp_path):
    mine, other = checkpoint(tmp_path / "a", 0), checkpoint(tmp_path / "b", 0, policy="llama_pro")
    with pytest.raises(ValueError, match=f"differs from that of {flag} .*block 2"):
        resolve_architecture(
            arguments(f"--load {mine} {flag} {other}"), Source(mine / "iter_0000000"), tokenizer_vocab_size=None
        )


def test_from_scratch_takes_flags_and_sensible_defaults():
    flags = "--num-layers 2 --hidden-size 96 --num-attention-heads 4 --seq-length 33"
    architecture = resolve_architecture(arguments(flags), Source(None), tokenizer_vocab_size=50)
    model = architecture.model
    assert (model.num_query_groups, model.kv_channels, model.vocab_size) == (4, 24, 50)
    assert (model.ffn_hidden_size, model.max_position_embeddings) == (256, 33)
    assert architecture.plan.policy == "none" and architecture.train == "all"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("", "--num-layers, --hidden-size, --num-attention-heads is missing"),
        ("--num-layers 2 --hidden-size 30 --num-attention-heads 4", "hidden_size=30 is not divisible"),
        ("--num-layers 2 --hidden-size 32 --num-attention-heads 4 --memory-topk 2", "memory_topk=2: a model from"),
        ("--num-layers 2 --hidden-size 32 --num-attention-heads 4 --train inserted", "policy none inserted no block"),
        ("--num-layers 2 --hidden-size 32 --num-attention-heads 4 --num-query-groups 3", "num_query_groups=3"),
    ],
)
def test_flags_from_scratch_that_do_not_make_a_model(flags, words):
    with pytest.raises(ValueError) as caught:
        resolve_architecture(arguments(flags), Source(None), tokenizer_vocab_size=50)
    assert words in str(caught.value)


def test_tokenizer_files_of_a_model_from_scratch_travel_but_not_its_config(tmp_path):
    from tokenizers import Tokenizer, models

    tokenizer = Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, unk_token="a"))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    settings = '{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}'
    (tmp_path / "tokenizer_config.json").write_text(settings)
    flags = f"--num-layers 2 --hidden-size 32 --num-attention-heads 4 --tokenizer-model {tmp_path}"
    found, architecture = resolve_model(arguments(flags), Source(None))
    assert found.vocab_size == architecture.model.vocab_size == 2
    assert architecture.assets == tmp_path and "config.json" in architecture.assets_left_out
    with pytest.raises(ValueError, match="has only 1 rows"):
        resolve_model(arguments(flags + " --vocab-size 1"), Source(None))
