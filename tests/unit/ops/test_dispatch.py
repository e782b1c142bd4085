"""Arguments that do not fit end in one sentence; the choice of a backend is said once and never silent."""

import logging

import pytest
import torch

from megatron_midus.ops import cpu, dispatch, head_wise_memory, select_slots, unsupported_reason
from megatron_midus.ops.numba import function as numba_function


def arguments(**changes):
    given = {
        "query_THD": torch.randn(7, 2, 6),
        "row_keys_HND": torch.randn(2, 9, 3),
        "col_keys_HND": torch.randn(2, 9, 3),
        "values": torch.randn(81, 4),
        "head_proj": torch.randn(2, 4, 5),
        "topk": 3,
    }
    return given | changes


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"query_THD": torch.randn(7, 12)}, r"query has shape \[7, 12\]; give \[tokens, heads, channels\]"),
        ({"query_THD": torch.randn(7, 2, 5)}, "query has 5 channels per head; product keys need an even number"),
        ({"query_THD": torch.randn(7, 3, 6)}, r"row_keys has shape \[2, 9, 3\]; the query wants \[3, sub-keys, 3\]"),
        ({"query_THD": torch.ones(7, 2, 6, dtype=torch.int64)}, "query has dtype torch.int64; give a floating-point"),
        ({"col_keys_HND": torch.randn(2, 8, 3)}, "row_keys has 9 sub-keys and col_keys 8; they must be equal"),
        ({"col_keys_HND": torch.randn(2, 9, 4)}, r"col_keys has shape \[2, 9, 4\]; the query wants"),
        ({"topk": 10}, "topk=10 is out of range; choose 1 to the number of sub-keys, 9"),
        ({"topk": 0}, "topk=0 is out of range"),
        ({"values": torch.randn(80, 4)}, r"values has shape \[80, 4\]; variant hive wants \[81, width\]"),
        ({"values": torch.randn(81, 4), "variant": "full", "head_proj": None}, r"variant full wants \[2, 81, width\]"),
        ({"variant": "block"}, r"head_proj only belongs to variant hive; variant=block got \[2, 4, 5\]"),
        ({"head_proj": None}, "head_proj only belongs to variant hive; variant=hive got none"),
        ({"head_proj": torch.randn(2, 3, 5)}, r"head_proj has shape \[2, 3, 5\]; wanted \[2, 4, width\]"),
        ({"values": torch.randn(81, 4, device="meta")}, "values is on meta and query on cpu; move them to one device"),
        ({"variant": "hyve"}, "variant='hyve' is not known; choose one of"),
        ({"score_activation": "tanh"}, "score_activation='tanh' is not known; choose one of"),
        ({"backend": "cuda"}, "memory backend 'cuda' cannot run: it is not known; choose one of"),
    ],
)
def test_wrong_arguments(changes, words):
    with pytest.raises(ValueError, match=words) as error:
        head_wise_memory(**arguments(**changes))
    assert "\n" not in str(error.value)


def test_select_slots_checks_too():
    with pytest.raises(ValueError, match="topk=10 is out of range"):
        select_slots(torch.randn(7, 2, 6), torch.randn(2, 9, 3), torch.randn(2, 9, 3), topk=10)


def test_a_buffer_for_the_values_gradient_needs_triton():
    buffer = torch.zeros(81, 4)
    for backend in ("torch", "reference", "auto"):
        with pytest.raises(ValueError, match="only triton adds the gradient of the values to a buffer"):
            head_wise_memory(**arguments(backend=backend), values_main_grad=buffer)


def test_auto_takes_the_first_that_can_run_and_says_why_once(monkeypatch, caplog):
    dispatch._log_once.cache_clear()
    monkeypatch.setattr(numba_function, "_installed", lambda: False)
    with caplog.at_level(logging.INFO, logger=dispatch.__name__):
        fast = head_wise_memory(**arguments())
        head_wise_memory(**arguments())
    assert [record.getMessage() for record in caplog.records] == [
        "head-wise memory: backend torch (not triton: its kernels need CUDA tensors and these are on cpu; "
        "not numba: the package numba is not installed; run pip install numba)"
    ]
    assert fast.shape == (7, 2, 5)
    caplog.clear()
    monkeypatch.setattr(cpu, "unsupported_reason", lambda *args, **settings: "it rains")
    with caplog.at_level(logging.INFO, logger=dispatch.__name__):
        head_wise_memory(**arguments())
    assert "backend reference (not triton: " in caplog.text and "; not torch: it rains)" in caplog.text


def test_a_named_backend_that_cannot_run_raises(monkeypatch):
    monkeypatch.setattr(cpu, "unsupported_reason", lambda *args, **settings: "it rains")
    with pytest.raises(ValueError, match="memory backend 'torch' cannot run: it rains"):
        head_wise_memory(**arguments(backend="torch"))


def test_unsupported_reason():
    inputs = [torch.zeros(3, 2, 6, device="meta")]
    assert unsupported_reason("reference", *inputs, topk=1, variant="hive") is None
    assert "not meta" in unsupported_reason("torch", *inputs, topk=1, variant="hive")


def test_a_new_backend_is_one_line(monkeypatch):
    """What the registry asks of a backend: two functions of a module."""
    import sys
    import types

    module = types.ModuleType("backend_of_a_test")
    module.unsupported_reason = lambda *tensors, **settings: None
    module.head_wise_memory = lambda query, *rest, deterministic, **settings: query + deterministic
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(dispatch, "BACKENDS", {"fast": module.__name__, **dispatch.BACKENDS})
    given = arguments()
    assert torch.equal(head_wise_memory(**given, deterministic=False), given["query_THD"])
