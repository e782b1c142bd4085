"""Strengths: one arm of the file, many runs of it; what they share, what differs, and what is refused."""

from __future__ import annotations

import pytest
from experiments import make_runs, read, values

GRIDS = [
    {"name": "pro", "policy": "llama_pro", "strengths": {"num_blocks": [1, 2], "lr": ["1e-3", "1e-2"]}},
    {"name": "midus", "policy": "interleave", "strengths": [{"memory.topk": [4]}, {"value-lr-mult": [10, 30]}]},
    {"name": "lora", "policy": "none", "train": "lora", "strengths": {"lora-rank": [2, 4]}},
    {"name": "full", "policy": "none", "train": "all", "strengths": {"replay": [0, 0.25], "tokens": [2048]}},
]  # fmt: skip


def entries(**changes):
    data = {"train": [{"text": "train.jsonl"}], "new": "new.jsonl", "replay": [{"text": "new.jsonl"}]}
    return values(arms=GRIDS, data=data, **changes)


def test_every_combination_is_a_run_and_the_base_is_among_them(tmp_path):
    experiment = read(tmp_path, entries())
    names = [arm.name for arm in experiment.arms]
    assert names == [
        "base",
        *(f"pro@num_blocks={n},lr={lr}" for n in (1, 2) for lr in ("1e-3", "1e-2")),
        "midus@memory.topk=4", "midus@value-lr-mult=10", "midus@value-lr-mult=30",
        "lora@lora-rank=2", "lora@lora-rank=4",
        "full@replay=0,tokens=2048", "full@replay=0.25,tokens=2048",
    ]  # fmt: skip
    assert [(arm.num_blocks, arm.lr) for arm in experiment.arms[1:5]] == [
        (n, [r]) for n in (1, 2) for r in (1e-3, 1e-2)
    ]
    assert [arm.method for arm in experiment.arms[:2]] == ["base", "pro"] and experiment.arms[
        1
    ].point == "num_blocks=1,lr=1e-3"
    assert experiment.arms[5].memory == {"num_keys": 8, "topk": 4, "latent_size": 6}


def test_one_strength_of_each_method_has_the_base_beside_it_too(tmp_path):
    arms = [{**GRIDS[0], "strengths": {"lr": ["1e-3"]}}, {**GRIDS[2], "strengths": {"lora-rank": [2]}}]
    experiment = read(tmp_path, {**entries(), "arms": arms})
    assert [arm.name for arm in experiment.arms] == ["base", "pro@lr=1e-3", "lora@lora-rank=2"]
    assert experiment.has_strengths


def test_a_method_is_chosen_by_its_name_and_the_base_stays(tmp_path):
    experiment = read(tmp_path, entries(reference="pro"))
    assert experiment.reference_name == "pro@num_blocks=1,lr=1e-3"
    chosen = experiment.select(["lora", "pro@num_blocks=2,lr=1e-2"], [2])
    assert [arm.name for arm in chosen.arms] == [
        "base",
        "pro@num_blocks=2,lr=1e-2",
        "lora@lora-rank=2",
        "lora@lora-rank=4",
    ]
    with pytest.raises(ValueError, match="--arms: unknown key 'lor'; did you mean lora"):
        experiment.select(["lor"], None)


def flag(words, name):
    found = words[words.index(name) + 1 :]
    return list(found[: next(i for i, word in enumerate([*found, "--"]) if word.startswith("--"))])


def test_steps_of_strengths(tmp_path):
    runs = make_runs(tmp_path, entries())
    chains = {arm.arm.name: runs.chain(arm, 1, 1e-3) for arm in runs.arms if arm.iterations}
    lora = [chains[f"lora@lora-rank={rank}"] for rank in (2, 4)]
    # What training alone sees shares the up-scaled model; what up-scaling sees does not.
    assert lora[0].steps[0].makes == lora[1].steps[0].makes == (tmp_path / "out/runs/lora/seed-1/upscaled",)
    assert lora[0].directory.name == "lora-rank=2,lr=0.001"
    blocks = [chains[f"pro@num_blocks={n},lr=1e-3"].steps[0].makes[0] for n in (1, 2)]
    assert [path.parent.name for path in blocks] == ["num_blocks=1", "num_blocks=2"]
    assert chains["midus@memory.topk=4"].steps[0].makes[0].parent.name == "memory.topk=4"
    # The blend of replay; arms without it neither read nor wait for the old text.
    whole, replayed = chains["full@replay=0,tokens=2048"].train, chains["full@replay=0.25,tokens=2048"].train
    train, old = (str(tmp_path / f"out/data/{name}-0/part_text_document") for name in ("train", "replay"))
    assert flag(whole.words, "--train-data-path") == [train]
    assert flag(replayed.words, "--train-data-path") == ["0.75", train, "0.25", old]
    assert [step.name for step in whole.after] == ["upscale", "tokenise-train-0", "tokenise-valid"]
    assert [step.name for step in replayed.after] == [
        "upscale",
        "tokenise-train-0",
        "tokenise-replay-0",
        "tokenise-valid",
    ]
    # 16 of 32 steps, down to a multiple of the points; the data are drawn for the longest.
    assert flag(whole.words, "--exit-interval") == ["10"] and flag(whole.words, "--train-iters") == ["30"]


def test_trained_parameters_of_adapters(tmp_path):
    runs = make_runs(tmp_path, entries())
    found = {arm.arm.point: arm for arm in runs.arms if arm.arm.method == "lora"}
    # 4 layers: q 24+60, k and v 24+20, o 60+24, gate and up 24+40, down 40+24; rank 2.
    assert found["lora-rank=2"].trainable == 2 * 4 * (84 + 2 * 44 + 84 + 3 * 64)
    assert found["lora-rank=4"].trainable == 2 * found["lora-rank=2"].trainable
    assert found["lora-rank=2"].flops_per_token < found["lora-rank=4"].flops_per_token


@pytest.mark.parametrize(
    ("arm", "message"),
    [
        ({"strengths": {"lr": "1e-3"}}, r"strengths: \{'lr': '1e-3'\} must be lines of 'key: \[value"),
        ({"strengths": {"driver": [{"lr": 1}]}}, "give single settings"),
        ({"strengths": {"replay": [1.0]}}, r"replay=1.0 must be at least 0 and below 1"),
        (
            {"policy": "none", "train": "lora", "strengths": {"lr": [1e-3]}},
            r"train: lora needs driver: \{lora-rank: R\}",
        ),
        ({"strengths": {"value-lr-mul": [3]}}, "did you mean value_lr_mult"),
    ],
)
def test_what_a_grid_cannot_be(arm, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_runs(tmp_path, values(arms=[{"name": "mine", "policy": "llama_pro", **arm}], defaults={}))


def test_replay_needs_a_text(tmp_path):
    with pytest.raises(ValueError, match="name the text under data: replay"):
        read(tmp_path, values(arms=[{"name": "mine", "policy": "llama_pro", "replay": 0.1}]))
