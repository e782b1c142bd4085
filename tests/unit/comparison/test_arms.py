"""What arms amount to: steps of a budget, parameters, settings that do not fit."""

import dataclasses

import experiments
import pytest

from megatron_midus.comparison.arms import RESERVED_FLAGS, count_iterations, resolve, resolve_arm
from megatron_midus.comparison.experiment import Arm, Budget, Evaluation
from megatron_midus.training.arguments import build_parser
from megatron_midus.upscaling import POLICIES
from megatron_midus.upscaling.cost import flops_per_token, forward_flops_per_token


def with_budget(experiment, points=1, **budget):
    return dataclasses.replace(experiment, budget=Budget(**budget), evaluation=Evaluation(points=points))


def test_iterations(tmp_path):
    experiment = experiments.read(tmp_path)  # 4 x 32 = 128 tokens a step
    assert count_iterations(with_budget(experiment, tokens=128 * 7 + 127), 1.0) == 7
    assert count_iterations(with_budget(experiment, points=3, tokens=128 * 7), 1.0) == 6
    assert count_iterations(with_budget(experiment, points=9, tokens=128 * 7), 1.0) == 7
    assert count_iterations(with_budget(experiment, flops=128 * 1e6 * 5.5), 1e6) == 5
    with pytest.raises(ValueError, match="the budget of 127 tokens is below one step of 4 sequences of 32 tokens"):
        count_iterations(with_budget(experiment, tokens=127), 1.0)


def test_flops_buy_a_cheaper_arm_more_steps(tmp_path):
    experiment = with_budget(experiments.read(tmp_path), flops=1e9)
    pro, midus, base = resolve(experiment, experiments.MODEL, build_parser())
    for arm in (pro, midus):
        assert arm.flops_per_token == flops_per_token(experiments.MODEL, arm.plan, 32, train="inserted")
        steps = arm.flops_per_token * 128
        assert arm.iterations * steps <= 1e9 < (arm.iterations + 1) * steps
    held = dataclasses.replace(midus.arm, driver={"kl-to-base": "1e-1"})
    base_flops = forward_flops_per_token(experiments.MODEL, base.plan, 32)
    assert resolve_arm(experiment, held, experiments.MODEL).flops_per_token == midus.flops_per_token + base_flops
    assert pro.iterations != midus.iterations and base.iterations == 0
    assert pro.added == pro.trainable and midus.added == midus.trainable and (base.added, base.trainable) == (0, 0)
    assert len({arm.architecture for arm in (pro, midus, base)}) == 3


def test_every_policy_resolves(tmp_path):
    experiment = experiments.read(tmp_path)
    for policy in POLICIES:
        arm = Arm("a", policy, num_blocks=None if policy == "none" else 2, train="all")
        found = resolve_arm(experiment, arm, experiments.MODEL)
        assert found.trainable == found.parameters and found.iterations == 32 // 10 * 10
        assert (found.added == 0) == (policy in ("none", "control"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"memory": {"num_key": 8}}, "arm 'a': memory: 'memory_num_key' is no flag; did you mean"),
        ({"memory": {"num_keys": "x"}}, "arm 'a': memory: memory_num_keys: 'x' is not"),
        ({"memory": {"num_keys": 2, "topk": 16}}, "arm 'a': .*topk"),
        ({"num_blocks": 9}, "arm 'a': num_blocks=9 cannot be inserted between 4 layers"),
        ({"insert_after": [7], "num_blocks": None}, "arm 'a': cannot insert after layer 7; the base has layers 0 to 3"),
        ({"num_blocks": None}, "arm 'a': policy interleave needs the number of blocks to insert; give --num-blocks"),
    ],
)
def test_what_does_not_fit_the_base(tmp_path, changes, message):
    arm = Arm(**{"name": "a", "policy": "interleave", "num_blocks": 2, **changes})
    with pytest.raises(ValueError, match=message):
        resolve_arm(experiments.read(tmp_path), arm, experiments.MODEL)


def test_driver_flags(tmp_path):
    experiment, driver = experiments.read(tmp_path), build_parser()
    known = {action.dest for action in driver._actions}
    for name in ("train-iters", "--save", "tensorboard_dir"):
        wrong = dataclasses.replace(experiment, driver={name: 3})
        with pytest.raises(ValueError, match=f"driver: '{name}' is set by the experiment itself; leave it out"):
            resolve(wrong, experiments.MODEL, driver)
    arms = [dataclasses.replace(experiment.arms[0], driver={"clip-gard": 1})]
    with pytest.raises(ValueError, match="arm 'pro': driver: 'clip-gard' is no flag; did you mean clip_grad"):
        resolve(dataclasses.replace(experiment, arms=arms), experiments.MODEL, driver)
    assert set(RESERVED_FLAGS) <= known | {"config"}
