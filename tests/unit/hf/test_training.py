"""Fine-tuning: loss, gradients, gradient checkpointing, PEFT, compilation."""

import copy

import pytest
import torch

from megatron_midus.hf import MidusConfig, MidusForCausalLM


def gradients(model, tokens, **kwargs):
    model.zero_grad()
    loss = model(tokens, labels=tokens, **kwargs).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def test_loss_is_next_token_cross_entropy(midus, tokens):
    labels = tokens.clone()
    labels[0, :5] = -100
    out = midus(tokens, labels=labels)
    expected = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(out.loss, expected)  # the same mean over the same logits
    half = midus(tokens, labels=labels, num_items_in_batch=2 * int((labels[:, 1:] != -100).sum())).loss
    torch.testing.assert_close(half, expected / 2)  # how Trainer accumulates gradients


def test_every_parameter_learns(midus, tokens):
    _, grads = gradients(midus, tokens)
    assert all(grad.abs().max() > 0 for grad in grads.values())


def test_at_the_start_only_the_values_learn(make_base, upscale, tokens):
    _, grads = gradients(upscale(make_base()), tokens)
    for name, grad in grads.items():
        if ".memory." in name:
            assert (grad.abs().max() > 0) == name.endswith("value_bank"), name


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(midus, tokens, reentrant):
    midus.train()
    loss, plain = gradients(midus, tokens, use_cache=False)  # a cache hands other strides to the attention kernel
    midus.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        midus.enable_input_require_grads()
    runs = []
    handles = [
        layer.memory.register_forward_pre_hook(lambda *_: runs.append(1))
        for layer in midus.model.layers
        if hasattr(layer, "memory")
    ]
    loss_again, checkpointed = gradients(midus, tokens)
    assert len(runs) == 2 * len(handles)  # each Memory block ran once more in the backward pass
    assert torch.equal(loss, loss_again)
    assert midus(tokens).past_key_values is None  # a cache would be filled twice
    for name, grad in plain.items():
        assert torch.equal(grad, checkpointed[name]), name


def test_frozen_base_with_checkpointing_still_trains_the_memory(midus, tokens):
    """The usual trap: nothing below the first Memory block requires a gradient."""
    midus.train()
    for name, parameter in midus.named_parameters():
        parameter.requires_grad_(".memory." in name)
    midus(tokens, labels=tokens).loss.backward()
    plain = {name: p.grad.clone() for name, p in midus.named_parameters() if p.requires_grad}
    midus.zero_grad()
    midus.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    midus(tokens, labels=tokens).loss.backward()
    for name, grad in plain.items():
        assert grad.abs().max() > 0
        assert torch.equal(dict(midus.named_parameters())[name].grad, grad), name


def test_training_lowers_the_loss_from_a_silent_memory(make_base, upscale, tokens):
    model = upscale(make_base()).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("mem" in name)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    losses = []
    for _ in range(30):
        loss = model(tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_lora(midus, tokens, tmp_path):
    peft = pytest.importorskip("peft")
    base = copy.deepcopy(midus)
    with torch.no_grad():
        before = midus(tokens).logits
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["memory"], task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(midus, config).train()
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, before)  # LoRA's B starts at zero
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        trained = {name for name, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
    assert sum("lora_B" in name for name in trained) == 2 * 5  # both projections of all five blocks
    assert any("memory.modules_to_save" in name and name.endswith("value_bank") for name in trained)
    assert not any("embed_tokens" in name or ".mlp." in name for name in trained)
    with torch.no_grad():
        after = model.eval()(tokens).logits
        assert not torch.equal(after, before)
        model.save_pretrained(tmp_path)
        assert torch.equal(base(tokens).logits, before)
        again = peft.PeftModel.from_pretrained(base, tmp_path).eval()
        assert torch.equal(again(tokens).logits, after)


def test_fresh_model_is_silent_and_reproducible(tokens):
    config = MidusConfig(
        vocab_size=97, hidden_size=48, intermediate_size=72, num_hidden_layers=3, num_attention_heads=6,
        block_types=["transformer", "memory", "transformer"], memory_num_keys=11, memory_topk=5,
    )  # fmt: skip
    states = []
    for _ in range(2):
        torch.manual_seed(1)
        states.append(MidusForCausalLM(config).state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not states[0]["model.layers.1.memory.value_bank"].any()
    keys = states[0]["model.layers.1.memory.row_keys"]
    assert keys.abs().max() <= 0.5 and keys.std() > 0.25  # uniform in +-1/sqrt(4): 0.289
    assert abs(states[0]["model.layers.0.mlp.up_proj.weight"].std() - 0.02) < 0.001
    assert torch.equal(states[0]["model.norm.weight"], torch.ones(48))


def test_traces_without_graph_breaks(make_base, upscale, tokens):
    """Whole graphs in training and inference; the backend that runs the traced graph as it is takes no compiler."""
    torch._dynamo.reset()
    midus = upscale(make_base(num_hidden_layers=1), blocks=["transformer", "memory"], random_values=True)
    compiled = torch.compile(midus, backend="eager", fullgraph=True)
    with torch.no_grad():
        # the traced graph runs the same operators
        torch.testing.assert_close(compiled(tokens).logits, midus(tokens).logits, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(compiled(tokens[:, :7]).logits, midus(tokens[:, :7]).logits, rtol=1e-5, atol=1e-5)
    midus.train()
    compiled(tokens, labels=tokens).loss.backward()
    assert all(p.grad.abs().max() > 0 for p in midus.parameters())
    torch._dynamo.reset()
