"""OpT-DeUS: neurons that are merely in another order are found again, and a block is what the method says it is."""

import itertools

import pytest
import torch
from random_base import MODEL, random_base, upscaled

from megatron_midus.upscaling.tensors import layer_name, split_name, transformer_shapes
from megatron_midus.upscaling.transport import TOLERANCE, transport_plan

OUTPUTS = ("self_attn.o_proj.weight", "mlp.down_proj.weight")


def test_a_permutation_is_found():
    generator = torch.Generator().manual_seed(1)
    second = torch.randn(13, 7, generator=generator)
    order = torch.randperm(13, generator=generator)
    plan = transport_plan(second[order], second)
    wanted = torch.zeros(13, 13)
    wanted[torch.arange(13), order] = 1 / 13
    # Rows of this size lie more than 10 regularisations apart: what leaks to a wrong row is below exp(-10) / 13.
    torch.testing.assert_close(plan, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("distance", [0.05, 0.5, 50.0])
def test_masses_are_equal_whatever_the_scale(distance):
    """Costs of 0.05 are blurred by the regularisation of 0.06; those of 50 underflow in a plain Sinkhorn."""
    generator = torch.Generator().manual_seed(2)
    first, second = distance * torch.randn(2, 11, 5, generator=generator)
    plan = transport_plan(first, second)
    assert plan.isfinite().all() and (plan >= 0).all()
    for axis in (0, 1):
        torch.testing.assert_close(plan.sum(axis) * 11, torch.ones(11), rtol=0, atol=2 * TOLERANCE)


def test_it_is_the_cheapest_plan_where_all_can_be_tried():
    first, second = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(3))
    cost = torch.cdist(first, second)
    best = min(itertools.permutations(range(5)), key=lambda p: sum(cost[i, j].item() for i, j in enumerate(p)))
    assert transport_plan(first, second).argmax(1).tolist() == list(best)


def permuted_base():
    """Layer 2 is layer 1 with its neurons in another order, in a way that the alignment can undo."""
    base = random_base()
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randperm(MODEL.hidden_size, generator=generator)  # order of the attention's outputs
    for suffix, shape in transformer_shapes(MODEL).items():
        source = base.tensors[layer_name(1, suffix)]
        if suffix == "self_attn.o_proj.weight":
            moved = source[hidden]
        elif suffix.startswith(("mlp.gate", "mlp.up")):
            moved = source[:, hidden][torch.randperm(shape[0], generator=generator)]
        elif suffix.startswith("mlp.down") or "_proj.weight" in suffix:
            moved = source[torch.randperm(shape[0], generator=generator)]
        else:
            continue
        base.tensors[layer_name(2, suffix)] = moved
    return base


def test_a_layer_and_its_permuted_copy_fuse_to_the_copy():
    base, plan, new = upscaled("opt_deus", insert_after=[1], base=permuted_base())
    assert plan.blocks[2].describe() == "blend(1, 2, transport)"
    for suffix in transformer_shapes(MODEL):
        fused = new[layer_name(2, suffix)]
        if suffix in OUTPUTS:
            assert not fused.any()
        elif suffix.endswith("_proj.weight"):
            # Rows are found again up to the mass that the regularisation spreads.
            torch.testing.assert_close(fused, base[layer_name(2, suffix)], rtol=0, atol=1e-2)


def test_every_tensor_by_hand():
    """Each rule written out with plain matrices, normalised and literal."""
    base = random_base()
    read = lambda layer, suffix: base.tensors[layer_name(layer, suffix)]  # noqa: E731
    for policy in ("opt_deus", "opt_deus_literal"):
        _, _, new = upscaled(policy, insert_after=[1], base=base)
        for suffix in transformer_shapes(MODEL):
            first, second = read(1, suffix), read(2, suffix)
            output = transport_plan(read(1, OUTPUTS[0]), read(2, OUTPUTS[0]))
            output = output * (MODEL.hidden_size if policy == "opt_deus" else 1)
            if suffix in OUTPUTS:
                aligned, second = torch.zeros_like(first), torch.zeros_like(second)
            elif suffix.startswith(("mlp.gate", "mlp.up")):
                moved = first @ output
                aligned = transport_plan(moved, second).T @ moved * (len(first) if policy == "opt_deus" else 1)
            elif suffix.endswith(("proj.weight", "proj.bias")):
                weight = suffix.replace("bias", "weight")
                aligned = transport_plan(read(1, weight), read(2, weight)).T @ first
                aligned = aligned * (len(first) if policy == "opt_deus" else 1)
            elif suffix.startswith("post_attention"):
                aligned = first @ (output + torch.eye(len(first))) / 2
            else:
                aligned = first
            torch.testing.assert_close(new[layer_name(2, suffix)], (aligned + second) / 2, rtol=1e-5, atol=1e-5)


def test_literal_is_about_half_of_the_next_layer():
    base, _, new = upscaled("opt_deus_literal", insert_after=[1])
    for name, tensor in new.items():
        index, suffix = split_name(name)
        if index == 2 and suffix.endswith(("up_proj.weight", "q_proj.weight")):
            half = base[layer_name(2, suffix)] / 2
            assert (tensor - half).norm() < 0.1 * half.norm()
