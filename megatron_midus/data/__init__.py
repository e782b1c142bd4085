"""Data: corpora -> indexed datasets -> samples -> batches. Names are loaded on first use, so that reading a corpus or
a tokenizer needs no Megatron."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_midus.data.batch import get_batch, needs_data
    from megatron_midus.data.datasets import build_train_valid_test_datasets
    from megatron_midus.data.samplers import CyclicSampler, SequentialSampler, build_data_loader, cyclic_iterator
    from megatron_midus.data.tokenizer import Tokenizer, build_tokenizer, check_tokenizer_fits

_HOMES = {
    "get_batch": "batch",
    "needs_data": "batch",
    "build_train_valid_test_datasets": "datasets",
    "CyclicSampler": "samplers",
    "SequentialSampler": "samplers",
    "build_data_loader": "samplers",
    "cyclic_iterator": "samplers",
    "Tokenizer": "tokenizer",
    "build_tokenizer": "tokenizer",
    "check_tokenizer_fits": "tokenizer",
}

__all__ = [
    "CyclicSampler",
    "SequentialSampler",
    "Tokenizer",
    "build_data_loader",
    "build_tokenizer",
    "build_train_valid_test_datasets",
    "check_tokenizer_fits",
    "cyclic_iterator",
    "get_batch",
    "needs_data",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
