"""Every parameter of a memory has a name that parametrizations and adapters can take; earlier names are still read."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from megatron_midus.config.memory import STORED_NAMES
from megatron_midus.hf.modeling_midus import OLD_NAMES, MidusMemory

ALL = {
    "memory_attention": "full",
    "memory_query_norm": "rms",
    "memory_query_temperature": True,
    "memory_output_projection": "linear",
}


class Doubled(nn.Module):
    def forward(self, tensor):
        return 2 * tensor


def memories(model):
    return [module for module in model.modules() if isinstance(module, MidusMemory)]


@pytest.mark.parametrize("settings", [ALL, {"memory_output_projection": "silu"}], ids=["all", "gate"])
def test_every_parameter_can_be_parametrized(make_base, upscale, tokens, settings):
    model = upscale(make_base(), random_values=True, **settings)
    memory = memories(model)[0]
    before = model(tokens).logits
    for name in [name for name, _ in memory.named_parameters()]:
        original = getattr(memory, name).detach().clone()
        parametrize.register_parametrization(memory, name, Doubled())
        assert torch.equal(getattr(memory, name), 2 * original)
        assert name == "col_keys" or not torch.equal(model(tokens).logits, before), name
        parametrize.remove_parametrizations(memory, name, leave_parametrized=False)
    assert torch.equal(model(tokens).logits, before)


def test_the_copy_of_the_table_that_travels_with_exports_is_the_table():
    assert {old: new for new, old in STORED_NAMES.items()} == OLD_NAMES


def test_a_state_dict_of_an_earlier_version_is_read(midus):
    state = midus.state_dict()
    old = {name.replace(".memory.value_bank", ".memory.values"): 3 * tensor for name, tensor in state.items()}
    assert sum(name.endswith(".values") for name in old) == len(memories(midus)) > 0
    midus.load_state_dict(old)
    assert all(
        torch.equal(tensor, old[name.replace(".value_bank", ".values")]) for name, tensor in midus.state_dict().items()
    )


@pytest.mark.parametrize(
    "names",
    [["memory.value_bank"], ["memory.value_bank", "memory.row_keys", "memory.head_proj"]],
    ids=["bank", "three"],
)
def test_lora_of_memory_parameters_trains_merges_and_is_read_again(make_base, upscale, tokens, tmp_path, names):
    peft = pytest.importorskip("peft")
    if "target_parameters" not in peft.LoraConfig.__dataclass_fields__:
        pytest.skip("this version of peft adapts no parameters")
    midus = upscale(make_base(), random_values=True)
    midus.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        before = midus(tokens).logits
    config = peft.LoraConfig(r=3, target_modules=[], target_parameters=names, task_type="CAUSAL_LM", lora_dropout=0.0)
    model = peft.get_peft_model(midus, config).train()
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, before)  # LoRA's B starts at zero
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        trained = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        optimizer.step()
    assert trained and all(".memory." in name and "lora_" in name for name in trained)
    with torch.no_grad():
        after = model.eval()(tokens).logits
    assert (after - before).abs().max() > 1e-3
    model.save_pretrained(tmp_path / "adapter")
    merged = model.merge_and_unload()
    with torch.no_grad():
        torch.testing.assert_close(merged(tokens).logits, after, rtol=1e-4, atol=1e-4)  # sums in another order
    merged.save_pretrained(tmp_path / "merged")
    base = type(midus).from_pretrained(tmp_path / "base").eval()
    with torch.no_grad():
        again = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
        torch.testing.assert_close(again(tokens).logits, after, rtol=1e-5, atol=1e-5)
        whole = type(midus).from_pretrained(tmp_path / "merged").eval()
        assert torch.equal(whole(tokens).logits, merged(tokens).logits)
