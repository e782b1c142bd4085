"""What is said of the machine."""

import json

import torch

from megatron_midus.report.machine import device_name, machine_facts, versions_text


def test_facts_name_hardware_and_versions():
    facts = json.loads(json.dumps(machine_facts()))
    assert facts["versions"]["torch"] == torch.__version__ and f"torch {torch.__version__}" in versions_text(facts)
    assert facts["cores"] >= 1 and facts["threads"] == torch.get_num_threads() and facts["memory_gib"] > 0
    assert facts["processor"]


def test_a_device_is_its_gpus_or_its_processor():
    gpu = {"name": "H", "memory_gib": 80.0, "multiprocessors": 132}
    assert device_name({"processor": "p", "gpus": []}) == "p"
    assert device_name({"processor": "p", "gpus": [gpu, gpu, {**gpu, "name": "K"}]}) == "2 × H, 1 × K"
    assert device_name({"processor": "p", "gpus": ["H"]}) == "1 × H"
