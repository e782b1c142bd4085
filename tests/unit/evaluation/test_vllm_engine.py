"""Where tasks cannot run in vLLM is said before a model is loaded; tests/serving/test_tasks.py runs them there."""

from __future__ import annotations

import importlib.util

import pytest

from megatron_midus.evaluation.vllm_engine import check_engine, default_max_length


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_processes": 2}, "runs in one process and there are 2; start it without torchrun"),
        ({"device": "cuda:1"}, "give CUDA_VISIBLE_DEVICES=1 and --device cuda"),
        ({"max_length": 511}, "vLLM needs 2 tokens more, and a model was made for 512; give --max-length 510 at most"),
        ({}, "needs vLLM, which is not installed; pip install vllm, or leave the flag out"),
    ],
)
def test_what_cannot_be(changes, message):
    assert importlib.util.find_spec("vllm") is None
    asked = {"num_processes": 1, "device": "cpu", "max_length": 510, "contexts": [2048, 512], **changes}
    with pytest.raises(ValueError, match=message):
        check_engine(**asked)


def test_the_default_leaves_room_for_what_vllm_writes():
    assert default_max_length(512, [2048, 512]) == 510
    assert default_max_length(2048, [4096]) == default_max_length(2048, []) == 2048
