"""What a run says of itself: the cost of a missing Transformer Engine on GPUs."""

from __future__ import annotations

import pytest

from megatron_midus.training import summary


@pytest.mark.parametrize(
    ("backend", "available", "told"), [("nccl", False, True), ("nccl", True, False), ("gloo", False, False)]
)
def test_a_missing_transformer_engine_is_told_on_gpus_alone(monkeypatch, backend, available, told):
    monkeypatch.setattr(summary, "transformer_engine_available", lambda: available)
    text = summary.missing_engine(backend)
    assert bool(text) is told
    if told:
        assert (
            "slower" in text and "no context parallelism" in text and "megatron-midus[gpu]" in text and "\n" not in text
        )
