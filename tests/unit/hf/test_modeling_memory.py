"""The memory of modeling_midus.py against the definition in megatron_midus.ops, outputs and gradients."""

import itertools
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_midus import ops
from megatron_midus.hf import MidusConfig, lookup_midus, modeling_midus

TOKENS = 23
VARIANTS = ("hive", "full", "block")
ACTIVATIONS = ("softmax", "sigmoid", "relu")


def make_memory(dtype=torch.float64, **settings):
    config = MidusConfig(
        hidden_size=48, intermediate_size=8, num_attention_heads=6, num_hidden_layers=1, head_dim=14,
        block_types=["memory"], **{"memory_num_keys": 11, "memory_topk": 5, "memory_latent_size": 7, **settings},
    )  # fmt: skip
    memory = modeling_midus.MidusMemory(config).to(dtype)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in memory.parameters():
            # Mean 0.3: relu and the rms norm see no symmetric special case.
            parameter.copy_(0.3 + 0.5 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    attended = torch.randn(TOKENS, 6 * 14, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    return memory, attended


def make_block_input(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(TOKENS, 48, generator=generator, dtype=torch.float64).requires_grad_()


def expected_output(memory, attended, normed=None, residual=None):
    """docs/architecture.md "Parameters of a memory", word for word, over the reference operator."""
    config, p = memory.config, dict(memory.named_parameters())
    a = attended
    if config.memory_attention == "full":
        a = a @ p["attn_proj"].T
    heads = config.memory_num_heads or 6
    raw = {
        "attention": lambda: in_heads(a, heads),
        "token": lambda: in_heads(normed, heads),
        "sum": lambda: unit(in_heads(a, heads)) + unit(in_heads(normed, heads)),
        "concat": lambda: torch.cat([unit(in_heads(a, heads)), unit(in_heads(normed, heads))], dim=-1),
        "block": lambda: in_heads(unit(residual + a, config.rms_norm_eps) * p["block_norm"], heads),
    }[config.memory_query]()
    q = raw
    if config.memory_query_norm == "rms":
        q = unit(q) * p["query_norm"]
    if config.memory_query_temperature:
        q = q * torch.exp(p["log_temperature"])[:, None]
    m = ops.head_wise_memory(
        q, p["row_keys"], p["col_keys"], p["value_bank"], p.get("head_proj"), topk=config.memory_topk,
        variant=config.memory_variant, score_activation=config.memory_score_activation, backend="reference",
    )  # fmt: skip
    if config.memory_output_projection == "silu":
        m = m * torch.nn.functional.silu(torch.einsum("thq,hqo->tho", raw, p["gate"]))
    y = m.flatten(1)
    if config.memory_output_projection == "linear":
        y = y + y @ p["mixer"]
    elif config.memory_output_projection == "attention":
        y = y + a @ p["mixer"]
    if config.memory_domain_gate:
        y = (
            y
            * torch.sigmoid(normed.detach().float() @ p["domain_gate"].float() + p["domain_gate_bias"].float())[:, None]
        )
    return y


def in_heads(x, heads):
    return x.view(len(x), heads, -1)


def unit(x, epsilon=1e-6):
    return x / (x.pow(2).mean(-1, keepdim=True) + epsilon).sqrt()


def all_settings():
    for variant, activation in itertools.product(VARIANTS, ACTIVATIONS):
        yield {"memory_variant": variant, "memory_score_activation": activation}
    for variant, attention, norm in itertools.product(VARIANTS, ("attn_prime", "full"), ("none", "rms")):
        yield {
            "memory_variant": variant,
            "memory_attention": attention,
            "memory_query_norm": norm,
            "memory_query_temperature": norm == "none",
        }
    for variant, projection in itertools.product(("hive", "full"), ("linear", "attention", "silu")):
        yield {"memory_variant": variant, "memory_output_projection": projection, "memory_query_norm": "rms"}
    yield {"memory_query": "token", "memory_attention": "none"}
    yield {"memory_query": "token", "memory_output_projection": "attention", "memory_query_norm": "rms"}
    for query, variant in itertools.product(("sum", "concat", "block"), VARIANTS):
        yield {"memory_query": query, "memory_attention": "full", "memory_variant": variant, "memory_query_norm": "rms"}
    yield {"memory_query": "token", "memory_attention": "none", "memory_domain_gate": True}
    yield {"memory_output_projection": "linear", "memory_domain_gate": True}
    yield {"memory_variant": "block", "memory_num_heads": 3}
    yield {"memory_topk": 1}
    yield {"memory_topk": 11}  # k = n
    yield {"memory_num_keys": 1, "memory_topk": 1}


@pytest.fixture(params=["package", "plain"])
def both(request, monkeypatch):
    """With the operators of the package, and as where it is not installed."""
    if request.param == "plain":
        monkeypatch.setattr(lookup_midus, "head_wise_memory", None)


@pytest.mark.usefixtures("both")
@pytest.mark.parametrize("settings", all_settings(), ids=lambda s: "-".join(map(str, s.values())))
def test_outputs_and_gradients_equal_the_definition(settings):
    memory, attended = make_memory(**settings)
    config, results = memory.config, []
    inputs = [attended if config.memory_attention != "none" else None, make_block_input(6), make_block_input(7)]
    read = [
        config.memory_attention != "none", config.memory_query in ("token", "sum", "concat"), config.memory_query == "block"
    ]  # fmt: skip
    for function in (memory, lambda *x: expected_output(memory, *x)):
        output = function(*inputs)
        weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
        variables = [*itertools.compress(inputs, read), *(p for p in memory.parameters() if p.requires_grad)]
        results.append([output, *torch.autograd.grad((output * weights).sum(), variables)])
    for ours, theirs in zip(*results):
        assert theirs.any() or config.memory_topk == 1  # the softmax of one score does not move
        # fp64 sums of at most a few hundred terms of order 1 to 100
        tolerance = 1e-5 if config.memory_domain_gate else 1e-11  # the gate is worked out in fp32
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.usefixtures("both")
@pytest.mark.parametrize("variant", VARIANTS)
def test_single_precision_stays_within_its_rounding(variant):
    memory, attended = make_memory(torch.float32, memory_variant=variant)
    exact = expected_output(memory.double(), attended.double())
    # 10 roundings of 2**-24 on outputs of order 10
    torch.testing.assert_close(memory.float()(attended).double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("both")
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_scores_are_single(variant, dtype):
    """Against the reference on the same rounded numbers; the same slots must be read."""
    memory, attended = make_memory(dtype, memory_variant=variant)
    exact = expected_output(memory, attended).float()  # the reference computes in fp32 and rounds once
    ours = memory(attended).float()
    # Weights, values and sums are each rounded once more: 3 * eps of the output's size.
    assert (ours - exact).abs().max() <= 3 * torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.usefixtures("both")
@pytest.mark.parametrize("variant", VARIANTS)
def test_bfloat16_gradients(variant):
    """Against fp32 on the same rounded numbers: direction and size, since selections at near ties may differ."""
    memory, attended = make_memory(torch.bfloat16, memory_variant=variant)
    half = torch.autograd.grad(memory(attended).sum(), [attended, *memory.parameters()])
    attended = attended.detach().float().requires_grad_()
    memory.float()
    single = torch.autograd.grad(memory(attended).sum(), [attended, *memory.parameters()])
    for ours, theirs in zip(half, single):
        assert ours.dtype == torch.bfloat16
        # bf16 keeps 8 bits; a gradient passes about five roundings: 5 * 2**-8 = 2 % of its length
        assert (ours.float() - theirs).norm() <= 0.02 * theirs.norm()


@pytest.mark.usefixtures("both")
def test_autocast_leaves_the_scores_alone():
    memory, attended = make_memory(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(memory(attended), memory(attended.detach()))
        ours = memory(attended)
    assert torch.equal(ours, memory(attended))


@pytest.mark.parametrize("topk", [1, 2, 3, 5, 8, 16, 31, 32])
def test_candidates_are_all_pairs_that_can_win(topk):
    rows, cols = lookup_midus.candidate_pairs(topk, torch.device("cpu"))
    assert sorted(zip(rows.tolist(), cols.tolist())) == [
        (i, j) for i in range(topk) for j in range(topk) if (i + 1) * (j + 1) <= topk
    ]


def test_selection_is_the_best_of_all_slots():
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(19, 3, 6, generator=generator)
    row_keys, col_keys = torch.randn(2, 3, 10, 3, generator=generator)
    slots, scores = lookup_midus.select_slots(query, row_keys, col_keys, 7)
    rows = torch.einsum("tmd,mnd->tmn", query[..., :3], row_keys)
    cols = torch.einsum("tmd,mnd->tmn", query[..., 3:], col_keys)
    every = (rows[..., :, None] + cols[..., None, :]).flatten(-2)
    best = every.topk(7, dim=-1)
    # fp32 dot products of three terms of order 1, summed in another order
    torch.testing.assert_close(scores, best.values, rtol=0, atol=1e-6)
    assert torch.equal(slots, best.indices)


def test_ties_select_each_slot_once():
    query = torch.zeros(4, 2, 6)
    keys = torch.ones(2, 9, 3)
    slots, scores = lookup_midus.select_slots(query, keys, keys, 6)
    assert torch.equal(scores, torch.zeros(4, 2, 6))
    assert slots.min() >= 0 and slots.max() < 81
    assert all(len(set(row)) == 6 for row in slots.flatten(0, 1).tolist())


@pytest.mark.usefixtures("both")
def test_untouched_slots_get_no_gradient_and_nan_reads_in_range():
    memory, attended = make_memory(torch.float32, memory_num_keys=40)
    slots, _ = lookup_midus.select_slots(attended.view(TOKENS, 6, 14), memory.row_keys, memory.col_keys, 5)
    memory(attended).sum().backward()
    touched = torch.zeros(1600, dtype=torch.bool)
    touched[slots.flatten()] = True
    assert 0 < touched.sum() < 1600
    assert torch.equal(memory.value_bank.grad.abs().sum(-1) > 0, touched)
    with torch.no_grad():
        broken = attended.clone()
        broken[3, 0] = math.nan
        output = memory(broken)
    healthy = torch.arange(TOKENS) != 3
    assert torch.equal(output[healthy], memory(attended)[healthy]) and output[3].isnan().any()


def test_long_inputs_go_in_pieces(monkeypatch):
    monkeypatch.setattr(lookup_midus, "head_wise_memory", None)
    memory, attended = make_memory(torch.float32, memory_num_keys=40, memory_latent_size=1)
    with torch.no_grad(), LargestTensor() as whole_run:
        whole = memory(attended)
    monkeypatch.setattr(lookup_midus, "MAX_SCORES", 6 * 40 * 4)  # four tokens at a time
    with torch.no_grad(), LargestTensor() as run:
        pieces = memory(attended)
    # the same fp32 sums in another blocking
    torch.testing.assert_close(pieces, whole, rtol=1e-5, atol=1e-6)
    assert whole_run.numel == 6 * 40 * TOKENS  # all scores of one half at once
    assert run.numel <= max(attended.numel(), memory.row_keys.numel(), memory.value_bank.numel()) < whole_run.numel / 2


class LargestTensor(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operator returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


# -- under a compiler ------------------------------------------------------------------------------------------------
@pytest.mark.usefixtures("both")
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_compiler_cuts_nothing_and_memory_stays_bounded(variant, monkeypatch):
    """One graph for all numbers of tokens, whose look-up cuts when it runs; outputs and gradients as without compiler."""
    memory, attended = make_memory(torch.float32, memory_num_keys=40, memory_latent_size=1, memory_variant=variant)
    expected = [memory(attended), *gradients(memory, attended)]
    monkeypatch.setattr(lookup_midus, "MAX_SCORES", 6 * 40 * 4)  # four tokens at a time
    torch._dynamo.reset()
    graphs = []
    compiled = torch.compile(memory, backend=recorder(graphs), fullgraph=True, dynamic=True)
    found = [compiled(attended), *gradients(compiled, attended)]
    for ours, theirs in zip(found, expected):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)  # the same fp32 sums in another blocking
    for tokens in (2, 7, TOKENS - 1):
        torch.testing.assert_close(compiled(attended[:tokens]), expected[0][:tokens], rtol=1e-5, atol=1e-5)
    assert len(graphs) == 1
    assert sum("midus.look_up" in str(node.target) for node in graphs[0].nodes) == 1
    largest = max(t.numel() for t in (attended, *memory.parameters()))
    assert largest < 6 * 40 * TOKENS or variant != "hive"
    if lookup_midus.head_wise_memory is None:
        p = dict(memory.named_parameters())
        tensors = [p.get(name) for name in ("row_keys", "col_keys", "value_bank", "head_proj")]
        with LargestTensor() as run:
            lookup_midus.look_up_gradients(
                expected[0].detach().view(TOKENS, 1 if variant == "block" else 6, -1),
                attended.view(TOKENS, 6, 14), *tensors, 5, variant, "softmax",
            )  # fmt: skip
        assert run.numel <= largest


def gradients(function, attended):
    parameters = [p for p in function.parameters()]
    return torch.autograd.grad(function(attended).square().sum(), [attended, *parameters])


def recorder(graphs):
    from torch._dynamo.backends.common import aot_autograd

    compile_whole = aot_autograd(fw_compiler=lambda graph, inputs: graph.forward)

    def backend(graph, inputs):
        graphs.append(graph.graph)
        return compile_whole(graph, inputs)

    return backend


def test_an_exported_graph_needs_no_operator_of_ours():
    memory, attended = make_memory(torch.float32)
    tokens = torch.export.Dim("tokens", min=2, max=4096)
    with torch.no_grad():
        program = torch.export.export(memory, (attended.detach(),), dynamic_shapes=({0: tokens},))
        assert "midus" not in str(program.graph)
        for number in (2, 9, TOKENS):
            ours = program.module()(attended[:number].detach())
            torch.testing.assert_close(ours, memory(attended[:number]), rtol=1e-5, atol=1e-6)


def test_start_values():
    memory, _ = make_memory(
        torch.float32, memory_query_norm="rms", memory_query_temperature=True, memory_output_projection="silu",
        memory_num_keys=64, memory_attention="full",
    )  # fmt: skip
    memory.reset_parameters()
    p = dict(memory.named_parameters())
    assert (
        not p["value_bank"].any() and not p["log_temperature"].any() and torch.equal(p["query_norm"], torch.ones(6, 8))
    )
    bound = 4**-0.5  # half of the query of 8 channels
    assert 0.95 * bound < p["row_keys"].abs().max() <= bound
    # 5 % = four standard errors of a deviation measured on 2000 samples or more
    for name, fan_in in (("gate", 8), ("attn_proj", 84)):
        assert abs(p[name].std() * fan_in**0.5 - 1) < 0.15
    memory.config.memory_key_init = "normal"
    memory.reset_parameters()
    assert p["col_keys"].abs().max() > bound and abs(p["col_keys"].std() / (bound / 3**0.5) - 1) < 0.1
