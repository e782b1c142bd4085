"""--kl-to-base: loss and gradients against plain torch and a model that is the base, and the same at another layout."""

from __future__ import annotations

import kl_to_base_processes
import pytest
import torch
import training_runs
from launcher import launch
from scenarios import Setting
from training_runs import Run

# One base block and one added. Values are random, so that the model is not its base.
SETTINGS = {
    "memory": Setting(train="inserted"),
    "capped and scaled": Setting(
        train="inserted", model={"logits_softcap": 2.0, "logits_divisor": 1.5, "embedding_multiplier": 3.0}
    ),
    "copies": Setting(train="inserted", policy="llama_pro", model={"tie_word_embeddings": True}),
    "adapters": Setting(train="lora"),
    "at the start": Setting(train="inserted", zero_values=True),
    "dropout": Setting(train="inserted", config={"hidden_dropout": 0.5}),
    "experts": Setting(
        train="inserted",
        policy="llama_pro",
        model={"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 24, "moe_aux_loss_coeff": 0.5},
    ),
    "recompute": Setting(train="inserted", config={"recompute_granularity": "selective"}),
}


@pytest.fixture(scope="module")
def outcomes():
    return launch(kl_to_base_processes.outcomes, 1, SETTINGS)[0]


@pytest.mark.parametrize("name", SETTINGS)
def test_the_base_is_the_base(name, outcomes):
    found, expected = outcomes[name]["base"]
    assert torch.equal(found, expected)
    assert outcomes[name]["passes"] == 1, "the base's pass runs an added block"


@pytest.mark.parametrize("name", [name for name in SETTINGS if name != "dropout"])
def test_loss_and_gradients(name, outcomes):
    ours, plain, without = (outcomes[name][key] for key in ("ours", "plain", "without"))
    assert ours["lm loss"] == without["lm loss"], "the cross-entropy is the same bit by bit"
    # fp32 against log-probabilities in fp64.
    assert ours["lm loss"] == pytest.approx(plain["lm loss"], rel=1e-6)
    assert ours["kl to base"] == pytest.approx(plain["kl to base"], rel=1e-5)
    assert ours["gradients"].keys() == plain["gradients"].keys() == without["gradients"].keys()
    for key, gradient in ours["gradients"].items():
        torch.testing.assert_close(gradient, plain["gradients"][key], rtol=1e-4, atol=1e-5, msg=lambda m, key=key: f"{key}: {m}")  # fmt: skip
    shares = [(g - without["gradients"][key]).norm() / g.norm().clamp(min=1e-9) for key, g in ours["gradients"].items()]
    if name == "at the start":
        assert ours["kl to base"] == 0.0 and not any(shares)
    else:
        assert ours["kl to base"] > 1e-3 and min(shares) > 0.01


KL = "--train inserted --kl-to-base 20"
LAYOUT = (
    "--tensor-model-parallel-size 2 --sequence-parallel --use-distributed-optimizer --overlap-grad-reduce "
    "--overlap-param-gather --micro-batch-size 1 --recompute-granularity full --recompute-method uniform "
    "--recompute-num-layers 1"
)


def test_four_processes_train_as_one(tmp_path):
    """Padded rows of the vocabulary, micro-batches, a distributed optimizer, recompute."""
    launch(training_runs.write_checkpoints, 1, tmp_path, "hive")
    runs = {"kl": Run(tmp_path / "hive", KL, 3), "without": Run(tmp_path / "hive", "--train inserted", 3)}
    (one,) = launch(training_runs.train_runs, 1, runs, "--micro-batch-size 4")
    for rank in launch(training_runs.train_runs, 4, {"kl": runs["kl"]}, LAYOUT):
        # 1e-5 is what is promised of all layouts.
        torch.testing.assert_close(torch.tensor(rank["kl"]), torch.tensor(one["kl"]), rtol=1e-5, atol=0)
    (_, loss, _, divergence), *_ = one["kl"]
    assert 0 < divergence < loss / 2
    assert loss == one["without"][0][1] and abs(one["kl"][2][1] - one["without"][2][1]) > 1e-4
