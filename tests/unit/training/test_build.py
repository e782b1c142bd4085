"""What is decided when a run is built."""

from __future__ import annotations

import pytest

from megatron_midus.training.arguments import parse_arguments
from megatron_midus.training.build import transformer_impl


@pytest.mark.parametrize(
    ("flags", "chosen"),
    [
        ("", "auto"),
        ("--reset-attention-mask", "local"),
        ("--reset-attention-mask --transformer-impl local", "local"),
        ("--reset-position-ids --transformer-impl transformer_engine", "transformer_engine"),
    ],
)
def test_masks_between_documents_need_layers_that_look_at_masks(flags, chosen):
    arguments = parse_arguments(["--mock-data", "--lr", "1e-3", "--train-iters", "3", *flags.split()])
    assert transformer_impl(arguments) == chosen
