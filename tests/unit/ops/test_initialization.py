"""Start values: their distribution, their independence of order, and keys that fit the queries they came from."""

import math

import pytest
import torch

from megatron_midus.config import MemoryConfig
from megatron_midus.ops import calibrated_keys, initialize_parameter, select_slots


def make(name, shape, **changes):
    return initialize_parameter(name, shape, **({"seed": 0, "layer_index": 3} | changes))


def test_every_parameter_of_every_memory_has_a_start_value():
    for variant in ("hive", "full", "block"):
        for projection in ("none",) if variant == "block" else ("none", "linear", "attention", "silu"):
            config = MemoryConfig(
                memory_variant=variant, memory_output_projection=projection, memory_query_norm="rms",
                memory_query_temperature=True, memory_attention="full", memory_num_keys=8, memory_query="block",
                memory_domain_gate=True,
            )  # fmt: skip
            shapes = config.parameter_shapes(hidden_size=24, num_attention_heads=3, kv_channels=6)
            for name, shape in shapes.items():
                value = make(name, shape, dtype=torch.bfloat16, query_scale=3.0)
                assert value.shape == shape and value.dtype == torch.bfloat16
                assert bool(value.any()) == (
                    name not in ("value_bank", "mixer", "log_temperature", "domain_gate", "domain_gate_bias")
                )
                assert name not in ("query_norm", "block_norm") or value.eq(3 if name == "query_norm" else 1).all()


@pytest.mark.parametrize(
    "name, shape, key_init, std",
    [
        ("row_keys", (4, 512, 32), "uniform", 1 / math.sqrt(3 * 32)),
        ("col_keys", (4, 512, 32), "normal", 1 / math.sqrt(3 * 32)),
        ("row_keys", (4, 512, 32), "calibrated", 1 / math.sqrt(3 * 32)),
        ("head_proj", (4, 64, 256), "uniform", 1 / math.sqrt(64)),
        ("gate", (4, 64, 256), "uniform", 1 / math.sqrt(64)),
        ("attn_proj", (256, 256), "uniform", 1 / math.sqrt(256)),
    ],
)
def test_spread(name, shape, key_init, std):
    value = make(name, shape, key_init=key_init)
    # 65536 samples: the standard error of the deviation is 0.3 %, of the mean std / 256.
    assert float(value.std()) == pytest.approx(std, rel=0.015)
    assert abs(float(value.mean())) < 5 * std / 256
    if name in ("row_keys", "col_keys") and key_init != "normal":
        assert float(value.abs().max()) <= 1 / math.sqrt(shape[-1])


def test_depends_on_seed_layer_and_name_alone():
    shape = (2, 16, 4)
    first = make("row_keys", shape)
    torch.manual_seed(5)
    torch.rand(3)
    make("head_proj", shape)
    assert torch.equal(make("row_keys", shape), first)
    others = [make("col_keys", shape), make("row_keys", shape, seed=1), make("row_keys", shape, layer_index=4)]
    assert not any(torch.equal(other, first) for other in others)
    state = torch.random.get_rng_state()
    make("row_keys", shape)
    assert torch.equal(torch.random.get_rng_state(), state), "the global generator was used"
    # Written down so that a change of the rule cannot pass unnoticed: it would change every seeded model.
    torch.testing.assert_close(first[0, 0], torch.tensor(FIRST_KEY), rtol=0, atol=1e-6)


FIRST_KEY = [-0.0428984, -0.4564594, 0.1075019, -0.2362258]


def test_wrong_names():
    with pytest.raises(ValueError, match="memory parameter 'bias' is not known; choose one of"):
        make("bias", (3,))
    with pytest.raises(ValueError, match="key_init='orthogonal' is not known"):
        make("row_keys", (2, 3, 4), key_init="orthogonal")


# -- calibrated keys -------------------------------------------------------------------------------------------------
def queries(tokens=2000, heads=3, channels=16, mean=5.0):
    """Queries with what real ones have: a mean that all tokens share, and channels of very different size."""
    generator = torch.Generator().manual_seed(0)
    size = torch.logspace(-1, 0.5, channels)
    offset = mean * torch.randn(heads, channels, generator=generator)
    return torch.randn(tokens, heads, channels, generator=generator) * size + offset


def usage(query, keys, topk):
    """Share of all slots used by some token, and mean entropy of the weights over log K, per head."""
    index, scores = select_slots(query, *keys, topk=topk)
    num_slots = keys[0].shape[1] ** 2
    used = torch.stack([index[:, h].unique().numel() / torch.tensor(num_slots) for h in range(query.shape[1])])
    log_p = scores.double().log_softmax(-1)
    return used, -(log_p.exp() * log_p).sum(-1).mean(0) / math.log(topk)


@pytest.mark.parametrize("target", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("num_keys, topk", [(32, 8), (9, 9), (64, 2)])
def test_entropy_is_as_asked(num_keys, topk, target):
    query = queries()
    keys = calibrated_keys(query, num_keys=num_keys, topk=topk, seed=0, target_entropy=target)
    assert all(key.shape == (3, num_keys, 8) and key.dtype == torch.float32 for key in keys)
    _, entropy = usage(query, keys, topk)
    torch.testing.assert_close(entropy, torch.full((3,), target, dtype=torch.float64), rtol=0, atol=1e-4)


def test_slots_are_used_where_uniform_keys_collapse():
    query = queries()
    uniform = [make(name, (3, 32, 8)) for name in ("row_keys", "col_keys")]
    used_uniform, _ = usage(query, uniform, 8)
    used, _ = usage(query, calibrated_keys(query, num_keys=32, topk=8, seed=0), 8)
    assert (used > 0.9).all()
    assert (used > 1.5 * used_uniform).all(), (used, used_uniform)


def test_same_seed_same_keys():
    query = queries(tokens=100)
    first = calibrated_keys(query, num_keys=16, topk=4, seed=1)
    again = calibrated_keys(query, num_keys=16, topk=4, seed=1)
    other = calibrated_keys(query, num_keys=16, topk=4, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert not any(torch.equal(a, b) for a, b in zip(first, other))
    assert not torch.equal(*first)


@pytest.mark.parametrize("tokens", [1, 2, 5])
@pytest.mark.parametrize("channels", [2, 6])
def test_fewer_tokens_than_keys(tokens, channels):
    query = queries(tokens=tokens, channels=channels)
    for key in calibrated_keys(query, num_keys=16, topk=4, seed=0):
        assert key.isfinite().all() and key.any(-1).all()
        if channels > 2:  # of one channel only the sign is left
            assert all(len(head.unique(dim=0)) == 16 for head in key)


@pytest.mark.parametrize("value", [0.0, 3.0, -1e-20, 1e20])
def test_constant_queries(value):
    for key in calibrated_keys(torch.full((50, 2, 6), value), num_keys=16, topk=4, seed=0):
        assert key.isfinite().all() and key.any(-1).all()
        assert all(len(head.unique(dim=0)) == 16 for head in key)


def test_tokens_that_are_not_finite_are_left_out():
    query = queries(tokens=40)
    bad = torch.cat([query, torch.full((1, 3, 16), torch.nan)])
    for found, expected in zip(*(calibrated_keys(q, num_keys=16, topk=4, seed=0) for q in (bad, query))):
        assert torch.equal(found, expected)


def test_bf16_queries():
    assert all(k.isfinite().all() for k in calibrated_keys(queries().bfloat16(), num_keys=16, topk=4, seed=0))


@pytest.mark.parametrize(
    "query, changes, words",
    [
        (torch.zeros(0, 2, 6), {}, "give .tokens, heads, channels., channels even"),
        (torch.zeros(4, 2, 5), {}, "channels even"),
        (torch.full((4, 2, 6), torch.nan), {}, "none of the 4 calibration queries is finite"),
        (torch.zeros(4, 2, 6), {"topk": 17}, "topk=17 is out of range; choose 1 to num_keys=16"),
        (torch.zeros(4, 2, 6), {"target_entropy": 1.0}, "target_entropy=1.0 is out of range"),
    ],
)
def test_wrong_calibration(query, changes, words):
    with pytest.raises(ValueError, match=words):
        calibrated_keys(query, **({"num_keys": 16, "topk": 4, "seed": 0} | changes))
