"""The figures of tools/plan.py against real runs: parameters and messages exactly, activations of the local layers exactly."""

import dataclasses

import pytest
from launcher import launch
from planning_processes import measure
from scenarios import GLOBAL_BATCH, MICRO_BATCH, SEQUENCE, Layout, Setting, make_setting_plan, model_config

from megatron_midus import planning

BF16 = {"bf16": True}
TOKEN = {"memory_query": "token", "memory_attention": "none"}
EXPERTS = {"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 20}
# Every token to every expert: how many rows are exchanged does not depend on the router.
ALL_EXPERTS = {**EXPERTS, "moe_router_topk": 4}
ALL_TO_ALL = {"moe_token_dispatcher_type": "alltoall"}
CASES = {
    "one": (Layout(), Setting()),
    "one inserted": (Layout(), Setting(train="inserted")),
    "tp": (Layout(tp=2), Setting(train="inserted")),
    "tp sp": (Layout(tp=2, sp=True), Setting()),
    "tp sp inserted": (Layout(tp=2, sp=True), Setting(train="inserted")),
    "tp full bank": (Layout(tp=2), Setting(memory={"memory_variant": "full"})),
    "tp block": (Layout(tp=2, sp=True), Setting(memory={"memory_variant": "block"})),
    "tp mixer": (Layout(tp=2, sp=True), Setting(memory={"memory_output_projection": "linear"})),
    "token": (Layout(), Setting(memory=TOKEN, train="inserted")),
    "tp token": (Layout(tp=2), Setting(memory=TOKEN)),
    "tp sp token": (Layout(tp=2, sp=True), Setting(memory=TOKEN, train="inserted")),
    "tp latent": (Layout(tp=2, sp=True), Setting(memory={"memory_latent_size": 8}, value_placement="latent")),
    "tp latent block": (
        Layout(tp=2),
        Setting(memory={"memory_variant": "block"}, value_placement="latent", train="inserted"),
    ),
    "pp": (Layout(pp=2), Setting()),
    "pp inserted": (Layout(pp=2), Setting(train="inserted")),
    "pp tied": (Layout(pp=2), Setting(model={"tie_word_embeddings": True})),
    "pp vpp": (Layout(pp=2, vpp=3), Setting(train="inserted")),
    "pp tp sp": (Layout(pp=2, tp=2, sp=True), Setting()),
    "dp": (Layout(dp=2), Setting()),
    "dp distributed": (Layout(dp=2), Setting(distributed_optimizer=True)),
    "soft-capped scores": (Layout(), Setting(model={"attention_softcap": 5.0})),
    "experts": (Layout(), Setting(model=EXPERTS)),
    "ep": (Layout(dp=2, ep=2), Setting(model=ALL_EXPERTS)),
    "ep inserted": (Layout(dp=2, ep=2), Setting(model=ALL_EXPERTS, train="inserted", distributed_optimizer=True)),
    "ep all to all": (Layout(dp=2, ep=2), Setting(model=ALL_EXPERTS, config=ALL_TO_ALL)),
    "tp sp experts": (Layout(tp=2, sp=True), Setting(model=EXPERTS)),
    "tp sp ep": (Layout(tp=2, sp=True, ep=2, etp=1), Setting(model=ALL_EXPERTS, config=ALL_TO_ALL)),
    "tp sp ep, experts split": (Layout(tp=2, dp=2, sp=True, ep=2), Setting(model=ALL_EXPERTS, config=ALL_TO_ALL)),
    "copies": (Layout(tp=2), Setting(policy="llama_pro", train="inserted")),
    "kl": (Layout(tp=2), Setting(train="inserted", kl_to_base=True)),
    "kl sp": (Layout(tp=2, sp=True), Setting(train="inserted", kl_to_base=True)),
    "kl ep": (Layout(dp=2, ep=2), Setting(model=ALL_EXPERTS, train="inserted", kl_to_base=True)),
}


def planned(layout: Layout, setting: Setting):
    plan = make_setting_plan(setting)
    chunks = layout.pp * (layout.vpp or 1)
    size = plan.num_layers // chunks
    stages = tuple(
        tuple(i for i in range(plan.num_layers) if (i // size) % layout.pp == stage) for stage in range(layout.pp)
    )
    ours = planning.ParallelLayout(
        stages,
        tensor=layout.tp,
        data=layout.dp,
        expert=layout.ep,
        expert_tensor=layout.etp,
        all_to_all=setting.config.get("moe_token_dispatcher_type") == "alltoall",
        chunks=layout.vpp or 1,
        sequence_parallel=layout.sp,
        distributed_optimizer=setting.distributed_optimizer,
        latent_values=setting.value_placement == "latent",
    )
    workload = planning.Workload(
        SEQUENCE,
        MICRO_BATCH,
        GLOBAL_BATCH,
        itemsize=2 if setting.config.get("bf16") else 4,
        train=setting.train,
        weight_copies=2,
        kl_to_base=setting.kl_to_base,
    )
    return model_config(plan.num_layers, **setting.model), plan, ours, workload


def expected(layout: Layout, setting: Setting, stage: int) -> dict:
    model, plan, ours, workload = planned(layout, setting)
    memory = planning.rank_memory(model, plan, ours, workload, stage=stage, vocab_divisible_by=1)
    messages: dict[tuple[str, int], float] = {}
    for message in planning.rank_traffic(model, plan, ours, workload, stage=stage, vocab_divisible_by=1):
        key = (message.kind, message.ranks)
        messages[key] = messages.get(key, 0.0) + message.size
    return {"memory": memory, "messages": messages, "kept": ours.in_flight(stage, workload.num_microbatches(ours.data))}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_what_a_rank_holds_and_sends(name):
    layout, setting = CASES[name]
    for found in launch(measure, layout.world_size, setting, layout):
        wanted = expected(layout, setting, found["stage"])
        memory = wanted["memory"]
        assert found["parameters"] == memory.parameters
        assert found["trained"] == memory.trained
        # The distributed optimizer pads its buffers.
        padding = 0.02 if setting.distributed_optimizer else 0
        assert found["optimizer"] == pytest.approx(memory.optimizer, rel=padding)
        assert found["copies"] == pytest.approx(memory.copies, rel=padding)
        assert found["activations"] * wanted["kept"] == pytest.approx(memory.activations, rel=0.01)
        for key in found["messages"].keys() | wanted["messages"].keys():
            # Grad norm, flags, losses and how many rows go to which expert are a few numbers a step; the distributed
            # optimizer pads its buffers.
            assert found["messages"].get(key, 0) == pytest.approx(wanted["messages"].get(key, 0), rel=0.03, abs=600), (
                key,
                found["messages"],
                wanted["messages"],
            )


@pytest.mark.slow
def test_sixteen_bits():
    layout, setting = Layout(tp=2, sp=True), Setting(train="inserted", config=BF16)
    setting = dataclasses.replace(setting)
    for found in launch(measure, 2, setting, layout):
        memory = expected(layout, setting, 0)["memory"]
        assert (found["parameters"], found["trained"]) == (memory.parameters, memory.trained)
        assert (found["optimizer"], found["copies"]) == (memory.optimizer, memory.copies)
        assert found["activations"] == pytest.approx(memory.activations, rel=0.01)
