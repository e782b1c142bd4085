"""What must hold at one layout: identity with the base, recompute, bfloat16; and checkpoints from one layout to another."""

from __future__ import annotations

from pathlib import Path

import pytest
import scenarios
import torch
from launcher import launch
from scenarios import Layout, Setting, assemble, compare_weights

LAYOUTS = {"tp1": Layout(), "tp2": Layout(tp=2), "tp2 sp": Layout(tp=2, sp=True), "pp2": Layout(pp=2)}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_with_values_of_zero_the_model_is_its_base(layout: Layout) -> None:
    """Bit for bit in fp32, at the same tensor-parallel size, whatever the other memory parameters hold."""
    settings = [
        Setting(zero_values=True),
        Setting(zero_values=True, memory={"memory_variant": "block"}),
        Setting(zero_values=True, memory={"memory_variant": "full", "memory_output_projection": "silu"}),
        Setting(zero_values=True, memory={"memory_attention": "full", "memory_output_projection": "linear"}),
    ]
    ranks = launch(scenarios.many_logits, layout.world_size, [Setting(policy="none"), *settings], layout)
    seen = [rank for rank in ranks if rank[0] is not None]
    assert seen
    for base, *upscaled in seen:
        assert base.std() > 0.1
        for logits in upscaled:
            assert torch.equal(logits, base)


@pytest.mark.parametrize("layout", [*LAYOUTS.values(), Layout(pp=3)], ids=[*LAYOUTS, "pp3"])
def test_packed_documents_do_not_see_each_other(layout: Layout) -> None:
    """With --reset-attention-mask the logits of a document are those that it has alone, whatever is packed before it."""
    ranks = launch(scenarios.packed_and_plain, layout.world_size, layout)
    seen = [rank for rank in ranks if rank[0] is not None]
    assert seen
    length = len(scenarios.SECOND)
    for separate, plain in seen:
        assert separate.shape == (3, scenarios.SEQUENCE, scenarios.VOCABULARY)
        behind_one, behind_other = separate[:2, -length:]
        assert torch.equal(behind_one, behind_other)
        # Alone it begins at position 0: fp32 rounding of the rotary angles, 1e-7 each, over six blocks; logits are of
        # order 1.
        torch.testing.assert_close(behind_one, separate[2, :length], rtol=0, atol=2e-5)
        assert (plain[0, -length:] - plain[1, -length:]).abs().max() > 0.01
        assert (plain[0, -length:] - plain[2, :length]).abs().max() > 0.01
        # The first document is behind nothing.
        assert torch.equal(separate[0, :5], plain[0, :5])


@pytest.mark.parametrize("train", ["all", "inserted"])
def test_recompute_changes_no_gradient(train: str) -> None:
    configs = [
        {},
        {"recompute_granularity": "full"},
        {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 2},
        {"recompute_granularity": "selective"},
        {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp"]},
    ]
    settings = {str(config): Setting(train=train, config=config, steps=3) for config in configs}
    for rank in launch(scenarios.train_all, 2, settings, Layout(tp=2, sp=True)):
        curves = [rank[name]["curve"] for name in settings]
        assert min(norm for _, norm in curves[0]) > 0
        assert all(curve == curves[0] for curve in curves)


def test_dropout_is_recomputed_as_it_was() -> None:
    dropout = {"attention_dropout": 0.2, "hidden_dropout": 0.2}
    settings = {
        "plain": Setting(config=dropout, steps=3),
        "recomputed": Setting(config={**dropout, "recompute_granularity": "full"}, steps=3),
        "without": Setting(steps=3),
    }
    (rank,) = launch(scenarios.train_all, 1, settings, Layout())
    assert rank["plain"]["curve"] == rank["recomputed"]["curve"] != rank["without"]["curve"]


def test_bfloat16_follows_float32() -> None:
    settings = {
        "fp32": Setting(),
        "bf16": Setting(config={"bf16": True}),
        "bf16 distributed": Setting(config={"bf16": True}, distributed_optimizer=True),
    }
    for rank in launch(scenarios.train_all, 2, settings, Layout(tp=2, sp=True)):
        fp32, bf16, distributed = (torch.tensor(rank[name]["curve"]) for name in settings)
        assert not torch.equal(fp32, bf16)
        # bfloat16 keeps 8 bits: 0.4 % a rounding, some dozen roundings deep.
        torch.testing.assert_close(bf16, fp32, rtol=0.05, atol=0)
        torch.testing.assert_close(distributed, bf16, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (Layout(), Layout(tp=2)),
        (Layout(tp=2, sp=True), Layout(pp=2)),
        pytest.param(Layout(pp=2, vpp=3), Layout(tp=4), marks=pytest.mark.slow),
        pytest.param(Layout(tp=2, pp=2), Layout(pp=3), marks=pytest.mark.slow),
    ],
)
def test_weights_move_between_layouts(source: Layout, target: Layout, tmp_path: Path) -> None:
    setting = Setting(model={"tie_word_embeddings": True}, memory={"memory_output_projection": "silu"})
    saved = launch(scenarios.save, source.world_size, setting, source, tmp_path)
    loaded = launch(scenarios.load, target.world_size, setting, target, tmp_path)
    expected, found = assemble(saved), assemble(loaded)
    assert set(found) == set(expected)
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key


@pytest.mark.parametrize("layout", [Layout(dp=2), pytest.param(Layout(tp=2, dp=2), marks=pytest.mark.slow)])
def test_the_distributed_optimizer_continues(layout: Layout, tmp_path: Path) -> None:
    """Its state goes through a checkpoint: the curve after it is the uninterrupted one's."""
    setting = Setting(train="inserted", distributed_optimizer=True, steps=6)
    whole = launch(scenarios.train, layout.world_size, setting, layout)
    resumed = launch(scenarios.train_in_two_parts, layout.world_size, setting, layout, 3, tmp_path)
    assert resumed[0]["curve"] == whole[0]["curve"]
    compare_weights(assemble([r["weights"] for r in resumed]), assemble([r["weights"] for r in whole]))
