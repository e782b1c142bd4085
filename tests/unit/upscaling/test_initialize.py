"""Every tensor of an up-scaled model is the right one: copied, zeroed, averaged or newly made."""

import threading

import pytest
import torch
from random_base import MEMORY, MODEL, random_base, upscaled
from tiny_models import DictSource

from megatron_midus.ops import initialize_parameter
from megatron_midus.upscaling import POLICIES, make_plan
from megatron_midus.upscaling.initialize import UpscaledTensors, parse_dtype
from megatron_midus.upscaling.tensors import model_shapes, split_name


@pytest.mark.parametrize("policy", POLICIES)
def test_names_shapes_and_base_layers(policy):
    base, plan, new = upscaled(policy, **({} if policy == "none" else {"num_blocks": 3}))
    assert {name: tuple(tensor.shape) for name, tensor in new.items()} == model_shapes(MODEL, plan)
    for name, tensor in new.items():
        index, suffix = split_name(name)
        if index is None:
            assert torch.equal(tensor, base[name])
        elif plan.blocks[index].kind == "keep":
            assert torch.equal(tensor, base[f"model.layers.{plan.blocks[index].source[0]}.{suffix}"])


def test_llama_pro_zeroes_the_two_outputs_alone():
    base, plan, new = upscaled("llama_pro", num_blocks=2)
    for index in plan.inserted_indices:
        source = plan.blocks[index].source[0]
        for name, tensor in new.items():
            layer, suffix = split_name(name)
            if layer != index:
                continue
            if suffix in ("self_attn.o_proj.weight", "mlp.down_proj.weight"):
                assert not tensor.any() and tensor.shape == base[f"model.layers.{source}.{suffix}"].shape
            else:
                assert torch.equal(tensor, base[f"model.layers.{source}.{suffix}"])


def test_average_is_the_mean_of_every_tensor():
    base, plan, new = upscaled("average", insert_after=[1])
    for name in base:
        if name.startswith("model.layers.1."):
            other = name.replace("layers.1.", "layers.2.")
            wanted = (base[name].double() + base[other].double()) / 2
            # fp32 sums and halves two fp32 numbers: one rounding.
            torch.testing.assert_close(new[other].double(), wanted, rtol=2**-24, atol=0)


def test_mean_of_bfloat16_is_rounded_once():
    base, _, new = upscaled("average", insert_after=[0], base=random_base(dtype=torch.bfloat16))
    name = "model.layers.{}.mlp.up_proj.weight"
    wanted = ((base[name.format(0)].double() + base[name.format(1)].double()) / 2).to(torch.bfloat16)
    assert torch.equal(new[name.format(1)], wanted)


def test_memory_block_copies_norm_and_attention():
    base, plan, new = upscaled("interleave", num_blocks=2)
    for index in plan.memory_indices:
        source = plan.blocks[index].source[0]
        for letter in "qkv":
            for kind in ("weight", "bias"):
                copied = new[f"model.layers.{index}.mem_attn.{letter}_proj.{kind}"]
                assert torch.equal(copied, base[f"model.layers.{source}.self_attn.{letter}_proj.{kind}"])
        for letter in "qk":
            copied = new[f"model.layers.{index}.mem_attn.{letter}_norm.weight"]
            assert torch.equal(copied, base[f"model.layers.{source}.self_attn.{letter}_norm.weight"])
        norm = "input_layernorm.weight"
        assert torch.equal(new[f"model.layers.{index}.{norm}"], base[f"model.layers.{source}.{norm}"])
        o_proj = base[f"model.layers.{source}.self_attn.o_proj.weight"]
        assert torch.equal(new[f"model.layers.{index}.memory.attn_proj"], o_proj)


def test_memory_parameters_start_as_the_contract_says():
    _, plan, new = upscaled("interleave", num_blocks=2)
    index = plan.memory_indices[1]
    memory = {name.rsplit(".", 1)[1]: tensor for name, tensor in new.items() if f"layers.{index}.memory." in name}
    assert not memory["value_bank"].any() and not memory["mixer"].any()
    assert bool((memory["query_norm"] == 1).all())
    for name in ("row_keys", "col_keys", "head_proj"):
        wanted = initialize_parameter(name, tuple(memory[name].shape), key_init="uniform", seed=0, layer_index=index)
        assert torch.equal(memory[name], wanted) and memory[name].any()


def test_copies_share_nothing():
    base, plan, new = upscaled("stack", num_blocks=5)
    for name, tensor in new.items():
        index, suffix = split_name(name)
        if index is not None and plan.blocks[index].inserted:
            tensor.fill_(9)
    assert not any(bool((tensor == 9).any()) for tensor in base.values())


@pytest.mark.parametrize("stored, asked, written", [
    ("float32", "keep", "float32"), ("bfloat16", "keep", "bfloat16"),
    ("float32", "bfloat16", "bfloat16"), ("bfloat16", "float32", "float32"), ("float32", "float16", "float16"),
])  # fmt: skip
def test_dtype_policy(stored, asked, written):
    base = random_base(dtype=getattr(torch, stored))
    plan = make_plan("interleave", num_layers=5, num_blocks=1, memory=MEMORY)
    source = UpscaledTensors(base, MODEL, plan, dtype=asked)
    for name in source.names():
        assert source.read(name).dtype == source.dtype(name) == getattr(torch, written)


def test_calibrated_keys_replace_the_drawn_ones():
    name = "model.layers.1.memory.row_keys"
    keys = torch.full((6, 7, 2), 0.25)  # attention "full": a query has 24 / 6 channels
    _, _, new = upscaled("interleave", insert_after=[0], calibrated={name: keys})
    assert torch.equal(new[name], keys)
    assert not torch.equal(new[name.replace("row", "col")], keys)


def test_seeds_and_layers_differ():
    import dataclasses

    plan = make_plan("interleave", num_layers=5, num_blocks=2, memory=MEMORY)
    name = "model.layers.{}.memory.row_keys"
    keys = {}
    for seed in (0, 1):
        source = UpscaledTensors(random_base(), MODEL, dataclasses.replace(plan, seed=seed))
        keys |= {(seed, index): source.read(name.format(index)) for index in plan.memory_indices}
    tensors = list(keys.values())
    assert not any(torch.equal(a, b) for i, a in enumerate(tensors) for b in tensors[:i])


def test_refusals():
    with pytest.raises(ValueError, match="float8"):
        parse_dtype("float8")
    with pytest.raises(ValueError, match="base of 4 layers, this one has 5"):
        UpscaledTensors(random_base(), MODEL, make_plan("none", num_layers=4))


class NoticedLock:
    """A lock that tells when ``thread`` has come to it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.arrived = threading.Event()
        self.thread: threading.Thread | None = None

    def __enter__(self) -> None:
        if threading.current_thread() is self.thread:
            self.arrived.set()
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def test_threads_that_fuse_two_blocks_get_each_its_own(monkeypatch):
    """The second thread comes at the worst moment: when the first has kept its block and not yet taken it."""
    base, plan, wanted = upscaled("opt_deus", num_blocks=2)
    first, second = (f"model.layers.{index}.mlp.up_proj.weight" for index in plan.inserted_indices)
    lock = NoticedLock()

    class Interleaved(UpscaledTensors):
        @property
        def _fused(self):
            return self.__dict__.get("fused")

        @_fused.setter
        def _fused(self, value):
            self.__dict__["fused"] = value
            if value is not None and lock.thread is None:

                def read():
                    found[second] = tensors.read(second)
                    lock.arrived.set()

                lock.thread = threading.Thread(target=read)
                lock.thread.start()
                lock.arrived.wait()  # at the lock, or past the whole

    found = {}
    tensors = Interleaved(DictSource(base), MODEL, plan)
    tensors._fusing = lock
    found[first] = tensors.read(first)
    lock.thread.join()
    for name in (first, second):
        assert torch.equal(found[name], wanted[name]), name
    assert not torch.equal(wanted[first], wanted[second])
