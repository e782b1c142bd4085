"""Experiment files: what they mean, and each of their mistakes in one line."""

import dataclasses

import experiments
import pytest

from megatron_midus.comparison.experiment import REPOSITORY, read_experiment, with_defaults
from megatron_midus.upscaling import POLICIES

PRO = {"name": "a", "policy": "llama_pro", "num_blocks": 2}
CALIBRATED = {"name": "a", "policy": "interleave", "num_blocks": 2, "memory": {"key_init": "calibrated"}}


def test_numbers_defaults_and_paths(tmp_path):
    entries = experiments.values(budget={"tokens": "2M"}, prepare=["make {output}/x {repository}/y"])
    entries["data"]["old"] = "{output}/old.jsonl"
    entries["data"]["valid"] = "{repository}/valid.jsonl"
    found = experiments.read(tmp_path, entries)
    assert found.budget.tokens == 2_000_000 and found.lr == [1e-3]
    assert found.base == str(tmp_path / "base") and found.data.new == str(tmp_path / "new.jsonl")
    assert found.data.old == str(tmp_path / "out/old.jsonl") and found.data.valid == str(REPOSITORY / "valid.jsonl")
    assert found.prepare == [f"make {tmp_path}/out/x {REPOSITORY}/y"]
    pro, midus, base = found.arms
    assert (pro.num_blocks, pro.memory, base.num_blocks) == (2, {}, None)
    assert midus.memory == {"num_keys": 8, "topk": 4, "latent_size": 6} and midus.lr == [1e-3, 1e-2]
    assert found.rates(pro) == [1e-3] and found.rates(midus) == [1e-3, 1e-2] and found.rates(base) == []
    assert found.reference_name == "pro"


def test_what_an_arm_says_itself_wins():
    defaults = {"num_blocks": 4, "memory": {"num_keys": 8, "topk": 4}, "driver": {"clip-grad": 1.0}}
    arm = {"name": "a", "policy": "interleave", "memory": {"topk": 2}, "driver": {"weight-decay": 0.1}}
    assert with_defaults(arm, defaults) == {
        **arm,
        "num_blocks": 4,
        "memory": {"num_keys": 8, "topk": 2},
        "driver": {"clip-grad": 1.0, "weight-decay": 0.1},
    }
    assert "num_blocks" not in with_defaults({"policy": "solar", "insert_after": [1]}, defaults)
    assert "insert_after" not in with_defaults({"policy": "solar", "num_blocks": 1}, {"insert_after": [1]})
    assert defaults["memory"] == {"num_keys": 8, "topk": 4}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sedes": [1]}, "mine.yaml: unknown key 'sedes'; did you mean seeds?"),
        ({"base": None}, "mine.yaml: 'base' is missing"),
        ({"defaults": [1]}, "mine.yaml: defaults is not a mapping"),
        ({"defaults": {"num_block": 1}}, "mine.yaml: defaults: unknown key 'num_block'; did you mean num_blocks?"),
        ({"defaults": {"name": "x"}}, "mine.yaml: defaults: unknown key 'name'"),
        ({"arms": []}, "mine.yaml: arms is empty; name at least one"),
        ({"arms": [3]}, "mine.yaml: arms[0]: 3 is not a mapping"),
        ({"arms": [PRO, PRO]}, "mine.yaml: arms: 'a' is given twice"),
        ({"arms": [{**PRO, "polcy": 1}]}, "mine.yaml: arms[0]: unknown key 'polcy'; did you mean policy?"),
        ({"arms": [{**PRO, "name": "../a"}]}, "mine.yaml: arms[0]: name '../a' may only have letters"),
        ({"arms": [{**PRO, "policy": "pro"}]}, "policy 'pro' is not one of "),
        ({"arms": [{**PRO, "memory": {"topk": 2}}]}, "memory settings do not apply to policy llama_pro; choose interleave"),
        ({"arms": [{"name": "a", "policy": "none"}]}, "policy none inserts nothing to train; choose train: all"),
        ({"arms": [CALIBRATED]}, "calibration_data and memory: {key_init: calibrated} or {domain_gate: true} need each other"),
        ({"arms": [{**PRO, "calibration_data": "x"}]}, "calibration_data and memory: {key_init: calibrated} or {domain_gate: true} need each"),
        ({"arms": [{**PRO, "background_data": "x"}]}, "background_data and memory: {domain_gate: true} need each other"),
        ({"arms": [{**PRO, "lr": [0.1, 0.1]}]}, "arms[0]: lr=[0.1, 0.1]: a learning rate is given twice"),
        ({"arms": [{**PRO, "lr": 0}]}, "arms[0]: lr=[0.0]: every learning rate must be above 0"),
        ({"lr": None, "arms": [PRO]}, "arm 'a' has no learning rate; give 'lr' to it or to the experiment"),
        ({"lr": -1}, "mine.yaml: lr=[-1.0]: every learning rate must be above 0"),
        ({"reference": "prow"}, "reference: unknown key 'prow'; did you mean pro?"),
        ({"seeds": []}, "seeds=[] must be whole numbers of at least 1"),
        ({"seeds": [0]}, "seeds=[0] must be whole numbers of at least 1"),
        ({"seeds": [1, 1]}, "seeds: 1 is given twice"),
        ({"seq_length": 0}, "seq_length=0 must be at least 1"),
        ({"min_lr_ratio": 2}, "min_lr_ratio=2.0 must lie between 0 and 1"),
        ({"budget": {}}, "budget: give exactly one of 'tokens' and 'flops'"),
        ({"budget": {"tokens": 1, "flops": 1}}, "budget: give exactly one of 'tokens' and 'flops'"),
        ({"budget": {"flops": -1}}, "budget: must be above 0"),
        ({"layout": {"nproc": 0}}, "layout: nproc=0 must be at least 1"),
        ({"evaluation": {"points": 0}}, "evaluation: points=0 must be at least 1"),
        ({"latency": {"rounds": -1}}, "latency: rounds must be 0 or more"),
        ({"data": {"train": [], "new": "x"}}, "data: train is empty; name at least one text or dataset"),
        ({"data": {"train": [{}], "new": "x"}}, "data: train[0]: give exactly one of 'text' (to be tokenised) and"),
        ({"data": {"train": [{"text": "a", "weight": 0}], "new": "x"}}, "train[0]: weight=0.0 must be above 0"),
        ({"data": {"train": [{"text": "a", "weight": 1}, {"text": "b"}], "new": "x"}}, "some sources have a weight and"),
    ],
)  # fmt: skip
def test_mistakes(tmp_path, changes, message):
    with pytest.raises(ValueError) as caught:
        experiments.read(tmp_path, experiments.values(**changes))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_is_none(tmp_path):
    with pytest.raises(ValueError, match="experiment .*missing.yaml is not a file"):
        read_experiment(tmp_path / "missing.yaml", tmp_path)


def test_a_part_of_it(tmp_path):
    whole = experiments.read(tmp_path, experiments.values(reference="pro"))
    part = whole.select(["midus"], [2])
    assert [arm.name for arm in part.arms] == ["midus"] and part.seeds == [2] and part.reference_name == "midus"
    assert whole.select(None, None) == whole
    with pytest.raises(ValueError, match="--arms: unknown key 'midas'; did you mean midus"):
        whole.select(["midas"], None)
    with pytest.raises(ValueError, match="--seeds: 7 is not one of 1, 2"):
        whole.select(None, [7])


def test_every_policy_can_be_an_arm(tmp_path):
    arms = [{"name": name, "policy": name, "train": "all"} for name in POLICIES]
    found = experiments.read(tmp_path, experiments.values(arms=arms))
    assert [arm.policy for arm in found.arms] == list(POLICIES)
    assert dataclasses.asdict(found.arms[0])["train"] == "all"
